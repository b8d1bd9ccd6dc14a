"""Needles in captured q, k and v: exact attention finds all, and all else is as it was captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Case
from cpbench.inputs import InputSequence, build_generator, in_captured
from cpbench.inputs.haystack import CAPTURED_SINKS
from cpbench.masks.paged.batch import PagedBatch
from cpbench.parallel.world import World
from cpbench.sweep import sweep_file
from cpbench.verify.check import Tensors, rank_inputs
from cpbench.verify.quality import count_shown, found_figures
from cpbench.worker.checks import recipe_of

TOKENS, DIM = 600, 32
HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": DIM}
QUESTIONS = ["depth=0.0", "depth=0.4", "depth=1.0,mass=0.7", "keys=4", "values=4",
             "hops=3,depth=0.1", "length=8"]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As of a model: keys and queries have means and few dimensions, scores are low but for those
    of a sink, which queries of half of the heads attend to, and values are large but that of it."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    energy = torch.linspace(0.05, 1.5, DIM) ** 2
    mean = normals(2, DIM)
    q, k = (normals(2, TOKENS, heads, DIM) * energy * 1.5 for heads in (4, 2))
    q, k = q + mean.repeat_interleave(2, 0) * 1.5, k - mean * 1.5
    k[:, 0, 0] = mean[0] * 2
    v = normals(2, TOKENS, 2, DIM) * 5 + normals(2, DIM) * 3
    v[:, 0] = 0.1
    file = tmp_path_factory.mktemp("captured") / "qkv.safetensors"
    save_file({"q": q, "k": k, "v": v}, file)
    return str(file)


def _case(inputs: str, **keys: Any) -> Case:
    table = {**HEADS, "batch": 2, "seq_len": TOKENS, "direction": "fwd", "inputs": inputs, **keys}
    if keys.get("phase"):
        del table["batch"], table["seq_len"]
    (case,) = sweep_file.expand_table(table)
    return case


def _pass(case: Case) -> tuple[Attention, Tensors, dict[str, float]]:
    """Inputs, and what their outputs show."""
    work, recipe = (
        Attention(case.operator, "single", World.of_case(case, 1), 0, "cpu"),
        recipe_of(case),
    )
    x = rank_inputs(work, recipe, "cpu")
    out, _, _ = work.forward(work.inputs_of(x), None)
    queries = work.world.queries.positions(0)
    return work, x, found_figures([count_shown(out, queries, work.problem, recipe)])


def _captured(work: Attention, path: str) -> Tensors:
    return rank_inputs(work, recipe_of(_case(f"file:{path}")), "cpu")


@pytest.mark.parametrize("questions", QUESTIONS)
def test_exact_attention_gives_needles_their_mass_and_finds_them(questions: str, path: str) -> None:
    case = _case(f"haystack:file={path},{questions}")
    work, x, found = _pass(case)
    assert found["found"] > 0.97
    assert found["solved"] > 0.95
    haystack = build_generator(case.inputs)
    visible = torch.as_tensor(masks.build("causal", TOKENS).to_dense())
    for b, h in np.ndindex(2, 4):
        g = h // 2
        planted, questions_of_head = haystack.questions(
            0, work.problem, InputSequence(b, TOKENS, TOKENS), g
        )
        scores = x["q"][b, :, h].double() @ x["k"][b, :, g].double().T * DIM**-0.5
        probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        needle = haystack.needle_of(np.arange(TOKENS), planted.starts)
        for question in questions_of_head:
            own = torch.as_tensor((needle >= 0) & (planted.key[needle] == question.key))
            mass = probs[torch.as_tensor(question.tokens)][:, own].sum(1)
            assert float((mass - haystack.mass).abs().max()) < 1e-4
        asking = np.concatenate([question.tokens for question in questions_of_head])
        others = torch.as_tensor(np.setdiff1d(np.arange(TOKENS // 2, TOKENS), asking))
        seen = probs[others][:, torch.as_tensor(needle >= 0)].sum(1).mean()
        assert float(seen) < 0.01 * haystack.needles * haystack.length
    half = _case(f"haystack:file={path},{questions}", dtype="bfloat16")
    assert _pass(half)[2]["found"] > 0.97


@pytest.mark.parametrize("questions", ["keys=3,values=2,length=2", "hops=2,queries=9"])
def test_all_but_needles_and_the_queries_that_ask_is_as_captured(questions: str, path: str) -> None:
    case = _case(f"haystack:file={path},{questions}")
    work, x, _ = _pass(case)
    captured, haystack = _captured(work, path), build_generator(case.inputs)
    for b, g in np.ndindex(2, 2):
        planted, asked = haystack.questions(0, work.problem, InputSequence(b, TOKENS, TOKENS), g)
        needles = np.flatnonzero(haystack.needle_of(np.arange(TOKENS), planted.starts) >= 0)
        assert len(needles) == haystack.needles * haystack.length
        assert needles.min() >= CAPTURED_SINKS
        asking = np.sort(np.concatenate([question.tokens for question in asked]))
        for name, heads, changed in (
            ("k", [g], needles), ("v", [g], needles), ("q", [2 * g, 2 * g + 1], asking)
        ):  # fmt: skip
            for h in heads:
                differs = (x[name][b, :, h] != captured[name][b, :, h]).any(1)
                assert differs.nonzero()[:, 0].tolist() == changed.tolist()
        # As long as captured ones are.
        for name in "kv":
            norms = x[name][b, :, g].norm(dim=1)
            usual = captured[name][b, :, g].square().sum(1).mean().sqrt()
            assert torch.allclose(norms[torch.as_tensor(needles)], usual, rtol=1e-3)


def test_a_window_finds_what_is_in_it(path: str) -> None:
    window = {"mask": "sliding_window_causal:window=100"}
    assert _pass(_case(f"haystack:file={path},depth=1.0", **window))[2]["solved"] > 0.97
    assert _pass(_case(f"haystack:file={path},depth=0.3", **window))[2]["found"] < 0.2


def test_queries_as_captured_find_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(f"haystack:file={path},depth=0.3,keys=2", seed=5)
    monkeypatch.setattr(in_captured, "_sizes", lambda rows, *_: rows.new_zeros(len(rows)))
    assert _pass(case)[2]["found"] < 0.2


def test_other_seeds_have_other_needles(path: str) -> None:
    work, x, _ = _pass(_case(f"haystack:file={path}"))
    other = rank_inputs(work, recipe_of(_case(f"haystack:file={path}", seed=1)), "cpu")
    changed = (x["k"] != other["k"]).any(3)
    assert changed.sum() == 2 * 2 * 2  # one in each head, and where the other has its
    assert not torch.equal(*(one["k"][changed] for one in (x, other)))


def test_rows_do_not_depend_on_what_is_made_with_them(path: str) -> None:
    case = _case(f"haystack:file={path},hops=2,depth=0.2")
    work, x, _ = _pass(case)
    tokens = np.arange(TOKENS - 70, TOKENS, 3)
    for name, head in (("q", 3), ("k", 1), ("v", 1)):
        rows = recipe_of(case).make(
            name, work.problem, tokens, batches=[1], heads=[head], device="cpu"
        )
        assert torch.equal(rows[0, :, 0], x[name][1, torch.as_tensor(tokens), head])


@pytest.mark.parametrize("questions", ["depth=0.0", "depth=0.7", "keys=3", "values=3", "length=3"])
def test_sequences_of_a_file_are_decoded(questions: str, path: str) -> None:
    """Of unequal lengths; needles are planted in them, and all else is as captured."""
    lens = {"phase": "decode", "key_lens": [500, 130], "page_size": 16}
    case = _case(f"haystack:file={path},{questions}", operator="paged.gathered", **lens)
    _, x, found = _pass(case)
    assert found["found"] > 0.97
    captured = recipe_of(_case(f"file:{path}", operator="bands"))
    whole = _case(f"file:{path}").problem
    changed = build_generator(case.inputs).needles * build_generator(case.inputs).length
    for b, tokens in enumerate(lens["key_lens"]):
        slots = torch.as_tensor(PagedBatch.of_case(case).slots_of(b))
        for name in "kv":
            rows = captured.make(
                name, whole, np.arange(tokens), batches=[b], heads=[0, 1], device="cpu"
            )
            differs = (x[name][0, slots] != rows[0]).any(2).sum(0)
            assert differs.tolist() == [changed, changed]
    untouched = _pass(_case(f"file:{path}", operator="paged.gathered", **lens))[1]
    q = captured.make("q", whole, np.array([499]), batches=[0], heads=range(4), device="cpu")
    assert torch.equal(untouched["q"][0, 0], q[0, 0])


def test_a_file_may_hold_the_queries_that_ask_alone(path: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    few = tmp_path / "few.safetensors"
    save_file({**tensors, "q": tensors["q"][:, -8:].contiguous()}, few)
    _, x, found = _pass(_case(f"haystack:file={few}", queries=8))
    assert found["found"] > 0.97
    assert x["q"].shape[1] == 8
    with pytest.raises(ValueError, match=r"hops = 2: .* queries = 8"):
        _case(f"haystack:file={few},hops=2,depth=0.2", queries=8)


def test_values_of_another_head_dim(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (4, 32), "k": (2, 32), "v": (2, 16)}
    file = tmp_path / "mla.safetensors"
    save_file({n: torch.randn(1, 300, *x, generator=generator) for n, x in shapes.items()}, file)
    case = _case(f"haystack:file={file}", batch=1, seq_len=300, head_dim_v=16)
    assert _pass(case)[2]["found"] > 0.97


def test_keys_that_are_all_alike_hold_no_needle(tmp_path: Path) -> None:
    file = tmp_path / "alike.safetensors"
    save_file({name: torch.ones(1, 300, n, 32) for name, n in (("q", 4), ("k", 2), ("v", 2))}, file)
    case = _case(f"haystack:file={file}", batch=1, seq_len=300)
    with pytest.raises(ValueError, match=r"no needle wins 0.9 of the attention .* head 0 of alike"):
        _pass(case)


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        ("file=missing.safetensors", {}, "there is no file 'missing.safetensors'"),
        ("file=PATH", {"num_heads_kv": 4}, "k of qkv.safetensors is [2, 600, 2, 32]; the case "
                                           "needs [2, at least 600, 4, 32]"),
        ("file=PATH", {"seq_len": 1024}, "needs [2, at least 1024, 4, 32]"),
        ("file=PATH", {"head_dim": 64}, "needs [2, at least 600, 4, 64]"),
        ("file=PATH,length=70,keys=2", {}, "2 needles of 70 tokens at depth 0.5 and 64 queries do "
                                           "not fit seq_len = 600"),
        ("file=PATH", {"rope": "unscaled"}, "rope = unscaled: q and k of qkv.safetensors are used "
                                            "as captured"),
        ("file=PATH", {"operator": "lm_infinite"}, "lm_infinite applies RoPE"),
        ("file=PATH", {"operator": "gla", "num_heads_kv": 4}, "gla is a sequence mixer"),
        ("file=PATH", {"phase": "decode", "key_lens": [40, 700]}, "at least 700"),
        ("file=PATH", {"phase": "decode", "key_lens": [40, 70, 9]}, "needs [3, at least 70"),
        ("file=3", {}, "file is not of type str: 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    options: str, keys: dict[str, Any], message: str, path: str
) -> None:
    with pytest.raises(ValueError) as caught:
        _case(f"haystack:{options.replace('PATH', path)}", **keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
