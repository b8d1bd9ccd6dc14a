"""Inputs with planted needles and sinks, and inputs from a file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cpbench
from cpbench import inputs
from cpbench.core.problem import Problem
from cpbench.inputs import Recipe
from cpbench.inputs import rope as rope_of_inputs
from cpbench.inputs.rope import Rotation
from cpbench.sweep import sweep_file
from cpbench.worker.checks import recipe_of

TOKENS, HEADS_Q, HEADS_KV, DIM = 2048, 4, 2, 64
ROTATING = ["lm_infinite", "longheads", "msa"]


def _problem(**changes: object) -> Problem:
    values = {
        "batch": 2, "seq_q": TOKENS, "seq_k": TOKENS, "heads_q": HEADS_Q, "heads_kv": HEADS_KV,
        "head_dim": DIM, "dtype": "float32",
    }  # fmt: skip
    return Problem(**{**values, **changes})


def _make(
    spec: str, name: str, problem: Problem | None = None, seed: int = 0, rope: str = ""
) -> torch.Tensor:
    problem = problem or _problem()
    tokens, heads = (
        (problem.seq_q, problem.heads_q) if name == "q" else (problem.seq_k, problem.heads_kv)
    )
    rotation = Rotation(rope_of_inputs.parse(rope)) if rope else None
    recipe = Recipe(seed, inputs.parse(spec), rotation)
    return recipe.make(
        name, problem, np.arange(tokens), batches=range(problem.batch), heads=range(heads),
        device="cpu",
    )  # fmt: skip


def _attention(spec: str, b: int, h: int, rope: str = "") -> torch.Tensor:
    """``[S, T]`` attention probabilities of a head, with all keys visible."""
    q, k = _make(spec, "q", rope=rope), _make(spec, "k", rope=rope)
    scores = q[b, :, h].double() @ k[b, :, h // 2].double().T * DIM**-0.5
    return scores.softmax(-1)


ROPES = ["", "unscaled:base=500000", "yarn:factor=8,original_length=256"]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [1, 16])
def test_looking_queries_give_a_needle_its_share(length: int, rope: str) -> None:
    """Also if queries and keys are rotated."""
    probs = _attention(f"needles:count=4,length={length},mass=0.8,looking=1.0", 1, 2, rope)
    # Only a needle, a key or a span of them, gets that much of the attention.
    spans = probs.unfold(1, length, 1).sum(-1)
    largest = spans.max(1).values
    late = largest[3 * TOKENS // 4 + length :]  # all needles are past
    assert 0.55 < float(late.mean()) < 0.9
    assert float((late > 0.2).double().mean()) > 0.97
    first = int(spans[-1].argmax())
    before = probs[:first, first : first + length].sum(1)
    assert float(before.max()) < 0.05, "no query looks for a later needle"


def test_needles_differ_by_head_and_batch() -> None:
    places = set()
    for b in (0, 1):
        for h in (0, 2):
            probs = _attention("needles:count=4,length=1,mass=0.8,looking=1.0", b, h)
            keys = probs[3 * TOKENS // 4 + 1 :].argmax(1)
            counts = torch.bincount(keys, minlength=TOKENS)
            needles = torch.nonzero(counts > 20)[:, 0].tolist()
            assert len(needles) == 4
            assert max(needles) < 3 * TOKENS // 4
            places.add(tuple(needles))
    assert len(places) == 4


def test_queries_look_in_runs_and_some_runs_do_not_look() -> None:
    probs = _attention("needles:count=4,length=1,mass=0.9,looking=0.5,run=32", 0, 1)
    looks = (probs.max(1).values > 0.3)[3 * TOKENS // 4 + 32 :]
    by_run = looks[: len(looks) // 32 * 32].view(-1, 32).double().mean(1)
    assert ((by_run > 0.9) | (by_run < 0.1)).all()
    assert 0.2 < float((by_run > 0.9).double().mean()) < 0.8


@pytest.mark.parametrize("rope", ROPES)
def test_sinks_get_their_share_of_every_query(rope: str) -> None:
    probs = _attention("sinks:count=4,mass=0.5", 0, 3, rope)
    share = probs[:, :4].sum(1)
    assert 0.35 < float(share.mean()) < 0.65
    assert float((share > 0.1).double().mean()) > 0.98


def test_values_and_gradients_are_normal() -> None:
    for name in ("v", "dout"):
        assert torch.equal(_make("needles", name), _make("normal", name))
    assert not torch.equal(_make("needles", "k"), _make("normal", "k"))


def test_any_subset_of_rows_has_the_same_values() -> None:
    """So ranks of any layout, and checks, generate the same inputs."""
    whole = _make("needles:sinks=4,sink_mass=0.2,mass=0.5", "q")
    recipe = Recipe(0, inputs.parse("needles:sinks=4,sink_mass=0.2,mass=0.5"))
    tokens = np.array([1900, 3, 1024])
    rows = recipe.make("q", _problem(), tokens, batches=[1], heads=[3, 0], device="cpu")
    assert torch.allclose(rows[0], whole[1][tokens][:, [3, 0]], atol=1e-6)
    # With fewer queries than keys, they are the last tokens.
    last = _make("needles:sinks=4,sink_mass=0.2,mass=0.5", "q", _problem(seq_q=8))
    positions = np.arange(8)
    normal = Recipe(0).make(
        "q", _problem(seq_q=8), positions, batches=[0, 1], heads=range(4), device="cpu"
    )
    assert last.shape == normal.shape
    assert not torch.equal(last, normal)


def test_half_precision_rounds_the_same_values() -> None:
    exact = _make("needles", "k")
    rounded = _make("needles", "k", _problem(dtype="bfloat16"))
    assert torch.equal(exact.bfloat16(), rounded)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needle", "no inputs 'needle'; there are: normal, sinks, needles, haystack, file"),
        ("needles:size=3", "no parameter 'size'; it takes count, length, mass"),
        ("needles:mass=1.5", "mass = 1.5 must be from 0 to below 1"),
        ("needles:mass=0.9,sink_mass=0.2,sinks=4", "mass + sink_mass = 1.1 must be below 1"),
        ("needles:sink_mass=0.2,mass=0.5", "sink_mass without sinks"),
        ("needles:count=a", "count is not of type int: 'a'"),
        ("needles:count=40", "head_dim = 64 has room for 32"),
        ("needles:length=3000", "do not fit seq_len = 1024"),
        ("sinks:count=0", "count = 0 must be at least 1"),
        ("sinks:count=1025", "1025 sinks do not fit seq_len = 1024"),
        ("file", "file must be given"),
        ("file:nowhere.safetensors", "there is no file 'nowhere.safetensors'"),
    ],
)
def test_invalid_inputs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        sweep_file.expand({"sweep": {"inputs": spec}}, "s")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_parameters_are_a_product() -> None:
    table = {"inputs": [{"name": "needles", "length": [1, 16], "count": [2, 4]}, "normal"]}
    specs = [str(case.inputs) for case in sweep_file.expand({"sweep": table}, "s").cases]
    assert specs == [
        "needles:count=2,length=1", "needles:count=2,length=16", "needles:count=4,length=1",
        "needles:count=4,length=16", "normal",
    ]  # fmt: skip
    assert len({case.id for case in sweep_file.expand({"sweep": table}, "s").cases}) == 5


# --- captured -----------------------------------------------------------------------------------


@pytest.fixture
def captured(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(1, 300, heads, 32, generator=generator).to(torch.bfloat16)
        for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    path = tmp_path / "qkv.safetensors"
    save_file(tensors, path)
    return path, tensors


def _case(path: Path, **changes: object) -> list[object]:
    table = {
        "inputs": f"file:{path}", "seq_len": 256, "num_heads_q": 4, "num_heads_kv": 2,
        "head_dim": 32,
    }  # fmt: skip
    return list(sweep_file.expand({"sweep": {**table, **changes}}, "s").cases)


def test_the_tensors_of_a_file_are_the_inputs(captured: tuple) -> None:
    path, tensors = captured
    problem = _problem(batch=1, seq_q=256, seq_k=256, head_dim=32)
    for name in ("q", "k", "v"):
        made = _make(f"file:{path}", name, problem)
        assert made.dtype == torch.float32
        assert torch.equal(made, tensors[name][:, :256].float())
    last = _make(f"file:{path}", "q", _problem(batch=1, seq_q=5, seq_k=256, head_dim=32))
    assert torch.equal(last, tensors["q"][:, 251:256].float())


def test_a_file_may_hold_only_the_queries_of_the_case(tmp_path: Path) -> None:
    path = tmp_path / "layer=3.safetensors"
    tensors = {"q": torch.randn(1, 5, 4, 32), **{n: torch.randn(1, 300, 2, 32) for n in "kv"}}
    save_file(tensors, path)
    assert _case(path, queries=5)
    with pytest.raises(ValueError, match="the case needs"):
        _case(path, queries=6)
    made = _make(f"file:{path}", "q", _problem(batch=1, seq_q=5, seq_k=256, head_dim=32))
    assert torch.equal(made, tensors["q"])


def test_values_of_another_head_dim(tmp_path: Path) -> None:
    path = tmp_path / "mla.safetensors"
    dims = {"q": (4, 32), "k": (2, 32), "v": (2, 16)}
    tensors = {name: torch.randn(1, 300, *dim) for name, dim in dims.items()}
    save_file(tensors, path)
    problem = _problem(batch=1, seq_q=256, seq_k=256, head_dim=32, head_dim_v=16)
    for kind in ("normal", "needles:count=2", f"file:{path}"):
        for name, dim in (("q", 32), ("k", 32), ("v", 16), ("dout", 16)):
            made = _make(kind, name, problem)
            assert made.shape[-1] == dim
            if kind.startswith("file") and name in tensors:
                assert torch.equal(made, tensors[name][:, :256])
    table = {"inputs": f"file:{path}", "seq_len": 256, "num_heads_kv": 2, "head_dim": 32}
    assert sweep_file.expand({"sweep": {**table, "head_dim_v": 16}}, "s").cases
    with pytest.raises(ValueError, match=r"v of mla.* the case needs \[1, at least 256, 2, 32\]"):
        sweep_file.expand({"sweep": table}, "s")


def test_a_file_with_values_that_are_not_finite_floats_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything starts, wherever such a value is."""
    monkeypatch.setattr("cpbench.core.user_files._CHUNK", 1000)
    dtypes = (torch.int32, torch.float8_e4m3fn, torch.float64, torch.float32, torch.bfloat16,
              torch.float16)  # fmt: skip
    for number, (dtype, value) in enumerate(
        itertools.product(dtypes, (1.0, math.nan, math.inf, -math.inf))
    ):
        floating = torch.zeros(1, dtype=dtype).element_size() > 1 and dtype != torch.int32
        if not floating and value != 1:
            continue
        path, k = tmp_path / f"{number}.safetensors", torch.ones(1, 256, 2, 32)
        k[0, 200, 1, 3] = value
        tensors = {"k": k.to(dtype), "q": torch.zeros(1, 256, 4, 32), "v": torch.zeros_like(k)}
        save_file({"a": torch.tensor([math.nan]), **tensors}, path)
        if floating and value == 1:
            assert _case(path)
            continue
        with pytest.raises(ValueError, match=r"k of .* (not finite|is I32, not|is F8_E4M3, not)"):
            _case(path)


def test_captured_queries_are_not_rotated_again(captured: tuple) -> None:
    """Neither where the file says so nor where it says nothing."""
    path, tensors = captured
    for mark in (None, {"rotated": "true"}):
        save_file(tensors, path, mark)
        with pytest.raises(ValueError, match=r"rope = unscaled: q and k of qkv.* as captured"):
            _case(path, rope=["none", "unscaled"])
        for operator in ROTATING:
            with pytest.raises(ValueError, match=rf"{operator} applies RoPE, which q and k of qkv"):
                _case(path, operator=["bands", operator])
    save_file(tensors, path, {"rotated": "no"})
    with pytest.raises(ValueError, match=r"metadata rotated of .* is 'no', not true or false"):
        _case(path)


def test_captured_queries_without_rope_are_rotated(captured: tuple) -> None:
    """By the case or by its operator; needles in them are not."""
    path, tensors = captured
    save_file(tensors, path, {"rotated": "false"})
    assert len(_case(path, operator=["bands", *ROTATING])) == 1 + len(ROTATING)
    (case,) = _case(path, rope="unscaled")
    turned = recipe_of(case).make(
        "q", case.problem, np.arange(256), batches=[0], heads=range(4), device="cpu"
    )
    torch.testing.assert_close(turned, cpbench.rope(tensors["q"][:, :256].float()))
    for changes, reason in (
        ({"rope": "unscaled"}, "rope = unscaled"), ({"operator": "msa"}, "msa applies RoPE")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{reason}, after which needles in captured"):
            _case(path, inputs=f"haystack:file={path}", **changes)


def test_the_id_of_a_case_depends_on_the_content_of_the_file(
    captured: tuple, tmp_path: Path
) -> None:
    path, tensors = captured
    (before,) = _case(path)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(path.read_bytes())
    (same,) = _case(moved)
    assert same.id == before.id
    save_file({**tensors, "k": tensors["k"] + 1}, moved)
    (changed,) = _case(moved)
    assert changed.id != before.id
    assert len({case.problem_key for case in (before, changed)}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 301}, "q of qkv.safetensors is [1, 300, 4, 32]; the case needs [1, at least"),
        ({"num_heads_q": 8}, "the case needs [1, at least 256, 8, 32]"),
        ({"num_heads_kv": 4}, "k of qkv.safetensors is [1, 300, 2, 32]"),
        ({"head_dim": 64}, "4, 64]"),
        ({"batch": 2}, "the case needs [2, at least"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(captured: tuple, changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _case(captured[0], **changes)
    assert message in str(caught.value)


def test_files_without_the_tensors_and_broken_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no such thing at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        _case(path)
    save_file({"q": torch.zeros(1, 300, 4, 32), "keys": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no tensor 'k'; it has keys, q"):
        _case(path)
    save_file({name: torch.zeros(300, 4, 32) for name in "qkv"}, path)
    with pytest.raises(ValueError, match=r"q of .* is \[300, 4, 32\], not \[B, T, heads, D\]"):
        _case(path)
