"""RoPE: frequencies by their formulas, scores by distance and layout, and as an input of cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import run_cases

import cpbench
from cpbench.core.problem import Case, Problem
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.inputs.rope import Rotation, parse, rotation_of, warning_of
from cpbench.inputs.rotary import frequencies
from cpbench.parallel import layout as layouts
from cpbench.reports.collection import collect
from cpbench.reports.tables import render
from cpbench.sweep import sweep_file

BASE, FACTOR, LENGTH = 5e5, 8.0, 4096
SCALINGS: dict[str, dict[str, float]] = {
    "unscaled": {},
    "pi": {"factor": FACTOR},
    "ntk": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "original_length": LENGTH},
}


def naive(x: np.ndarray, positions: list[int], scaling: str) -> np.ndarray:
    """The rotation of ``[B, S, H, D]`` in float64, one pair at a time."""
    out, dim = np.empty_like(x), x.shape[3]
    for i in range(dim // 2):
        theta, size = BASE ** (-2 * i / dim), 1.0
        if scaling == "pi":
            theta /= FACTOR
        elif scaling == "ntk":
            theta = (BASE * FACTOR ** (dim / (dim - 2))) ** (-2 * i / dim)
        elif scaling == "yarn":
            kept = min(max((LENGTH * theta / (2 * math.pi) - 1) / 31, 0.0), 1.0)
            theta, size = kept * theta + (1 - kept) * theta / FACTOR, 1 + 0.1 * math.log(FACTOR)
        for s, m in enumerate(positions):
            a, b = x[:, s, :, i], x[:, s, :, i + dim // 2]
            cos, sin = math.cos(m * theta) * size, math.sin(m * theta) * size
            out[:, s, :, i], out[:, s, :, i + dim // 2] = a * cos - b * sin, b * cos + a * sin
    return out


@pytest.mark.parametrize("scaling", SCALINGS)
def test_it_is_the_rotation_of_its_formula(scaling: str) -> None:
    x = torch.randn(2, 5, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = [0, 1, 77, 4096, 1 << 20]
    name = None if scaling == "unscaled" else scaling
    turned = cpbench.rope(x, positions, base=BASE, scaling=name, **SCALINGS[scaling])
    assert np.abs(turned.numpy() - naive(x.numpy(), positions, scaling)).max() < 1e-9
    spec = parse({"scaling": scaling, "base": BASE, **SCALINGS[scaling]})
    problem = Problem(
        batch=2, seq_q=5, seq_k=5, heads_q=3, heads_kv=3, head_dim=32, dtype="float64"
    )
    of_inputs = Rotation(spec).apply("k", x, problem, np.array(positions))
    assert torch.equal(of_inputs, turned)
    assert Rotation(spec).apply("v", x, problem, np.array(positions)) is x


def test_scaled_frequencies_at_their_ends() -> None:
    plain, _ = frequencies(128, BASE)
    for scaling in ("pi", "ntk", "yarn"):
        scaled, _ = frequencies(128, BASE, scaling, **SCALINGS[scaling])  # type: ignore[arg-type]
        assert scaled[-1] == pytest.approx(plain[-1] / FACTOR)
        assert scaled[0] == pytest.approx(plain[0] / (FACTOR if scaling == "pi" else 1))


def test_scores_depend_on_distances_alone_and_far_away_too() -> None:
    """Angles formed in float32 would be wrong by up to 0.4 at 16 million."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 64, 1, 128, generator=g) for _ in range(2))
    near = [cpbench.rope(x, np.arange(64), base=BASE)[0, :, 0].double() for x in (q, k)]
    far = [cpbench.rope(x, np.arange(64) + (1 << 24), base=BASE)[0, :, 0].double() for x in (q, k)]
    scores, shifted = near[0] @ near[1].T, far[0] @ far[1].T
    assert float((scores - shifted).abs().max()) * 128**-0.5 < 1e-4


def test_gradients_turn_back() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cpbench.rope(x, [3, 1, 7, 9]), (x,))
    dout = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(cpbench.rope(x), x, dout)
    assert torch.allclose(cpbench.rope(grad), dout)  # orthogonal


def test_dtypes_and_refusals() -> None:
    x = torch.randn(1, 3, 2, 8)
    half = cpbench.rope(x.bfloat16(), base=BASE)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, cpbench.rope(x.bfloat16().float(), base=BASE).bfloat16())
    for arguments, message in (
        ({"positions": [0, 1]}, r"3 integer positions, not torch.int64 \[2\]"),
        ({"positions": [0.0, 1.0, 2.0]}, "3 integer positions, not torch.float32"),
        ({"base": 1.0}, "base = 1 must be above 1"),
        ({"factor": 2.0}, "needs a scaling: pi, ntk, yarn"),
        ({"scaling": "linear"}, "'linear' is not one of pi, ntk, yarn"),
        ({"scaling": "yarn", "factor": 2.0}, "yarn needs that of the training"),
        ({"scaling": "pi", "factor": 2, "original_length": 4}, "nothing else takes one"),
        ({"scaling": "ntk"}, "ntk needs the factor by which it scales"),
        ({"scaling": "yarn", "original_length": 8}, "yarn needs the factor"),
        ({"scaling": "yarn", "factor": 2, "original_length": "8k"}, "'8k' is not an integer"),
        ({"scaling": "pi", "factor": "2"}, "factor = '2' is not a number"),
        ({"base": [5e5]}, r"base = \[500000.0\] is not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            cpbench.rope(x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even head_dim, not 7"):
        cpbench.rope(x[..., :7])
    with pytest.raises(ValueError, match=r"\[B, S, heads, D\], not torch.int64 \[3\]"):
        cpbench.rope(torch.arange(3))


# --- as an input of cases ------------------------------------------------------------------------


def _case(**keys: object) -> Case:
    (case,) = sweep_file.expand_table({"seq_len": 100, "head_dim": 16, **keys})
    return case


def _make(recipe: Recipe, name: str, problem: Problem, positions: np.ndarray) -> torch.Tensor:
    return recipe.make(name, problem, positions, batches=[0], heads=range(2), device="cpu")


@pytest.mark.parametrize("positions", ["sequence", "document"])
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "zigzag_document", "striped", "dispatch"])
def test_every_layout_has_the_scores_of_the_whole_sequence(name: str, positions: str) -> None:
    case = _case(
        mask="causal_document:doc_lens=[37,20,43]", num_heads_q=2,
        rope=f"yarn:factor=4,original_length=32,positions={positions}",
    )  # fmt: skip
    problem, mask = case.problem, cpbench.masks.build(case.mask, 100)
    recipe = Recipe(3, case.inputs, rotation_of(case))
    whole = {x: _make(recipe, x, problem, np.arange(100)) for x in "qk"}
    layout = layouts.build(name, 100, 3, mask)
    for x in "qk":
        shards = [_make(recipe, x, problem, layout.positions(rank)) for rank in range(3)]
        assert torch.equal(layout.unshard(shards), whole[x])
    unrotated = {x: _make(Recipe(3), x, problem, np.arange(100)) for x in "qk"}
    starts = [0, 37, 57] if positions == "document" else [0]
    at = [i - max(start for start in starts if start <= i) for i in range(100)]
    for x in "qk":
        turned = cpbench.rope(unrotated[x], at, scaling="yarn", factor=4, original_length=32)
        assert torch.equal(whole[x], turned)
    # Within a document distances are the same, whether or not positions restart.
    scores = whole["q"][0, :, 0].double() @ whole["k"][0, :, 0].double().T
    restarted = [cpbench.rope(unrotated[x], np.arange(100), scaling="yarn", factor=4,
                              original_length=32)[0, :, 0].double() for x in "qk"]  # fmt: skip
    inside = mask.to_dense()
    assert float((scores - restarted[0] @ restarted[1].T)[inside].abs().max()) < 1e-4


def test_few_queries_have_the_last_positions() -> None:
    case, all_queries = _case(queries=10, rope="unscaled"), _case(rope="unscaled")
    rotation = rotation_of(case)
    assert rotation is not None
    rows = torch.randn(1, 10, 2, 16)
    turned = rotation.apply("q", rows, case.problem, np.arange(10))
    assert torch.equal(turned, cpbench.rope(rows, np.arange(90, 100)))
    assert torch.equal(turned, rotation.apply("q", rows, all_queries.problem, np.arange(90, 100)))


def test_one_rotation_is_one_case(tmp_path: Path) -> None:
    plain = _case()
    assert plain.id == _case(rope="none").id
    same = [
        {"base": 500000, "scaling": "yarn", "factor": 8, "original_length": "4k"},
        {"base": 5e5, "scaling": "yarn", "factor": 8.0, "original_length": 4096,
         "positions": "sequence"},
        "yarn:original_length=4k,base=5e5,factor=8",
    ]  # fmt: skip
    ids = {_case(rope=rope).id for rope in same}
    assert len(ids) == 1
    assert ids != {plain.id}
    assert _case(rope={"base": 10000}).rope == Spec("unscaled")
    bases = sweep_file.expand_table({"rope": {"base": [10000, 5e5, 500000]}})
    texts = ["unscaled", "unscaled:base=500000", "unscaled:base=500000"]
    assert [str(case.rope) for case in bases] == texts
    assert Case.from_json(bases[1].to_json()) == bases[1]
    file = tmp_path / "theta.txt"
    file.write_text(" ".join(map(str, frequencies(16, BASE)[0])))
    table = _case(rope=f"table:file={file}")
    x = torch.randn(1, 100, 2, 16)
    rotation = rotation_of(table)
    assert rotation is not None
    turned = rotation.apply("k", x, table.problem, np.arange(100))
    assert torch.allclose(turned, cpbench.rope(x, base=BASE), atol=1e-5)
    file.write_text("1 " * 8)
    assert _case(rope=f"table:file={file}").id != table.id
    file.write_text("1 2")
    with pytest.raises(ValueError, match=r"2 frequencies; head_dim 16 takes 8"):
        _case(rope=f"table:file={file}")


def test_warnings_outside_of_the_bounds_of_the_base() -> None:
    def warning(base: float, seq_len: str, **more: object) -> str | None:
        rope = {"base": base, **more}
        return warning_of(_case(head_dim=128, seq_len=seq_len, rope=rope))

    for seq_len, lowest in (("128k", 2.4e4), ("1m", 2.0e5)):
        assert warning(1.05 * lowest, seq_len) is None
        assert f"should be at least {lowest:.2g}" in (warning(0.95 * lowest, seq_len) or "")
    assert warning(2.1e7, "1m") is None
    assert "should be at most 2.2e+07" in (warning(2.3e7, "1m") or "")
    assert warning(1e4, "128k", scaling="ntk", factor=8) is None
    scaled = warning(1e4, "128k", scaling="pi", factor=2)
    assert "as with an unscaled base of 2e+04, which should be at least 2.4e+04" in (scaled or "")
    assert warning(1e4, "128k", scaling="yarn", factor=8, original_length="16k") is None
    assert warning_of(_case(seq_len="128k")) is None


def test_a_run_checks_rotated_inputs_and_times_the_rotation_apart(tmp_path: Path) -> None:
    """Results differ from those without the rotation, but not between layouts."""
    ring = {"strategy": "ring", "world_size": 2, "direction": "fwd", "mask": "causal"}
    rope = ["none", {"base": 10, "positions": "sequence"}]
    records = run_cases(
        tmp_path / "run", {"memory": False, "exposure": False, "max_seconds": 0.05}, seq_len=400,
        layout=["contiguous", "striped"], rope=rope, **ring,
    )  # fmt: skip
    assert [record.status for record in records] == ["ok"] * 4
    assert all(set(record.errors) == {"small", "sampled", "tiles"} for record in records)
    by_case = {(record.case.layout.name, record.case.rope.name): record for record in records}
    turned = by_case["contiguous", "unscaled"], by_case["striped", "unscaled"]
    sums = [np.array(record.fingerprint["out"]) for record in turned]
    unrotated = np.array(by_case["striped", "none"].fingerprint["out"])
    assert np.allclose(sums[0][-1], sums[1][-1], rtol=1e-4)
    assert not np.allclose(sums[0][-1], unrotated[-1], rtol=1e-2)
    assert all(record.rope_us for record in turned)
    assert by_case["striped", "none"].rope_us is None
    assert "the slowest pair turns" in turned[0].notes[0]
    flat = " ".join(render.render(collect([tmp_path / "run"]), "table").split())
    assert "Rotating queries and keys (RoPE) takes" in flat
    assert "Warning: rope unscaled:base=10: the slowest pair turns" in flat
