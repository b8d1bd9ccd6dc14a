"""Adapters to attention libraries, run on stand-ins of the libraries and compared with float64.

The stand-ins have the signatures and documented semantics of the libraries; only a run on a library
itself can confirm them (``OperatorInfo.unproven``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import library_stand_ins
import naive
import pytest
import sparse_stand_ins
import torch
from adapters import (
    LIMIT,
    LSE_LIMIT,
    PER_HEAD,
    SHAPES,
    SUPPORTED,
    WINDOWS,
    block_masks,
    compare,
    errors,
    inputs,
    install_stand_ins,
    load,
    problem_of,
    run_adapter,
    supported_dtypes,
    windowed_documents,
    with_direction,
    within_limits,
)

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV, BackwardInputs, Unsupported
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.parallel.partial_results.merge import merge
from cpbench.selectors.selections import Blocks, block_grid
from cpbench.sweep.verification.cases import HEAD_MASKS, MASKS, SEQ_LEN


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_ins(monkeypatch)


# --- masks that heads share -----------------------------------------------------------------------


@pytest.mark.parametrize("text", MASKS, ids=lambda text: text.split(":")[0])
@pytest.mark.parametrize("name", SUPPORTED)
def test_equals_float64_or_is_refused(name: str, text: str) -> None:
    mask = masks.build(text, SEQ_LEN)
    if name == "flashinfer.block_sparse":
        mask = mask.crop(0, SEQ_LEN, 0, 288)
    if text.partition(":")[0] in SUPPORTED[name]:
        for shape, dtype in zip(SHAPES, supported_dtypes(name) * 2, strict=False):
            compare(name, mask, problem_of(mask, shape, dtype))
        return
    info, op = load(name)
    problem = with_direction(info, problem_of(mask, SHAPES[0], "bfloat16"))
    reason = op.unsupported(problem, mask, "cpu")
    assert reason is not None
    assert reason.startswith(f"{name} does not take this mask: ")
    assert (
        "supports consecutive documents" in reason
        or "windows of FlashInfer have only a left bound" in reason
    )
    assert len(reason.splitlines()) == 1


# More keys than queries, and more queries than keys, some of which see nothing.
UNEVEN = (
    ("causal:seq_q=17", 96),
    ("causal:seq_q=1", 96),
    ("full:seq_q=40", 96),
    ("full:seq_q=96", 32),
    ("causal:seq_q=97", 32),
)


@pytest.mark.parametrize(("text", "tokens"), UNEVEN)
@pytest.mark.parametrize("name", SUPPORTED)
def test_uneven_lengths(name: str, text: str, tokens: int) -> None:
    mask = masks.build(text, tokens)
    problem = problem_of(mask, SHAPES[0], supported_dtypes(name)[-1])
    if name == "te.cudnn" and text == "causal:seq_q=97":
        _, op = load(name)
        assert "at least as many keys as queries" in op.unsupported(problem, mask, "cpu")
        return
    compare(name, mask, problem)


@pytest.mark.parametrize("sizes", [((20, 32),), ((5, 9), (12, 12), (3, 11))])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (3, 2), (4, -1), (-1, 2), (0, 0), (0, 4)])
@pytest.mark.parametrize(
    "name", ["flash_attn.2", "flash_attn.3", "flash_attn.torch", "te.cudnn", "flashinfer.dense"]
)
def test_windows(name: str, left: int, right: int, sizes: Any) -> None:
    mask = windowed_documents(left, right, sizes)
    problem = problem_of(mask, SHAPES[0], "float16")
    if name == "flashinfer.dense" and right > 0:
        _, op = load(name)
        reason = op.unsupported(replace(problem, direction="fwd"), mask, "cpu")
        assert f"its queries see {right} tokens ahead" in reason
        return
    compare(name, mask, problem)


@pytest.mark.parametrize("name", SUPPORTED)
def test_empty_masks(name: str) -> None:
    mask = AttnMask.from_slices(32, 32, [])
    problem = problem_of(mask, SHAPES[0], "bfloat16")
    results = run_adapter(name, mask, problem)
    assert (results["lse"] == -torch.inf).all()
    assert all((x == 0).all() for tensor, x in results.items() if tensor != "lse")


@pytest.mark.parametrize(
    "name", ["flash_attn.2", "flash_attn.3", "flash_attn.torch", "flashinfer.dense"]
)
def test_documents_with_more_queries_than_keys(name: str) -> None:
    mask = windowed_documents(-1, 0, ((9, 4), (5, 8), (6, 1)))
    assert mask.empty_rows().sum() == 10
    compare(name, mask, problem_of(mask, SHAPES[0], "float16"))


@pytest.mark.parametrize("name", ["magi.ffa", "flashmask", "flashinfer.block_sparse"])
def test_rows_that_see_nothing(name: str) -> None:
    rows = [(5, 40, 3, 30, -60, 0), (50, 57, 10, 60, -3, 3)]
    mask = AttnMask.from_slices(67, 64, rows)
    assert mask.empty_rows().any()
    compare(name, mask, problem_of(mask, (2, 2, 1, 64), "bfloat16"))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_custom_scale(name: str) -> None:
    mask = masks.build("causal", 64)
    problem = problem_of(mask, SHAPES[0], "bfloat16", scale=0.25)
    q, *rest = inputs(problem)
    expected = naive.attention(q * 2, *rest, mask)  # 2 / sqrt(64) is 0.25
    results = run_adapter(name, mask, problem)
    assert naive.error(results["out"], expected["out"]) < LIMIT["bfloat16"]
    assert naive.error(results["lse"], expected["lse"]) < LSE_LIMIT
    if "dk" in results:
        assert naive.error(results["dk"], expected["dk"]) < LIMIT["bfloat16"]
        assert naive.error(results["dq"], expected["dq"] * 2) < LIMIT["bfloat16"]


def test_the_tagged_api_of_flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    library_stand_ins.install(monkeypatch, library_stand_ins.dense(tag=True))
    for text in (mask for mask in MASKS if mask.partition(":")[0] in WINDOWS):
        mask = masks.build(text, SEQ_LEN)
        compare("flash_attn.3", mask, problem_of(mask, SHAPES[0], "float16"))


def test_the_older_signatures_of_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    library_stand_ins.install(monkeypatch, sparse_stand_ins.sparse("flashinfer_0_6_18"))
    mask = masks.build("causal", 64)
    for name in ("flashinfer.dense", "flashinfer.block_sparse"):
        compare(name, mask, problem_of(mask, SHAPES[0], "bfloat16"))
    heads = block_masks(128, 4)
    compare("flashinfer.variable", heads, problem_of(heads, SHAPES[0], "bfloat16"))


# --- masks per head, and selections ---------------------------------------------------------------


@pytest.mark.parametrize("tokens", [256, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("flashinfer.variable", {}),
        ("vsa.kernel", {}),
        ("vsa.kernel", {"backend": "triton"}),
        ("vsa.kernel", {"backend": "sm90"}),
    ],
)
def test_blocks_of_each_head(name: str, params: dict[str, Any], shape: Any, tokens: int) -> None:
    mask = block_masks(tokens, shape[1])
    compare(name, mask, problem_of(mask, shape, "bfloat16"), **params)


def test_blocks_of_varying_size() -> None:
    built = masks.build_heads(HEAD_MASKS[2], SEQ_LEN, 4)
    compare("flashinfer.variable", built, problem_of(built, SHAPES[0], "float16"))


def test_keys_are_repeated_only_if_heads_of_a_group_differ() -> None:
    first, second = block_masks(256, 2).masks
    info, op = load("flashinfer.variable")
    for heads, repeat in (((first, first, second, second), 1), ((first, second) * 2, 2)):
        mask = HeadMasks(heads)
        problem = problem_of(mask, SHAPES[0], "bfloat16", direction="fwd")
        assert op.prepare(mask, problem, "cpu").repeat == repeat
        compare(info.name, mask, problem)


def random_selection(tokens: int, shape: Any, block: int, within: str = "full") -> Blocks:
    """Random blocks; one block of queries has none."""
    grid = block_grid(masks.build(within, tokens), block, block, "cpu")
    generator = torch.Generator().manual_seed(3)
    size = (*shape[:2], *grid.areas.shape)
    kept = torch.rand(size, generator=generator) < 0.4
    kept[0, 0, 1] = False
    return Blocks(grid, kept)


@pytest.mark.parametrize("tokens", [256, 300])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "params"),
    [("flashinfer.variable", {}), ("vsa.kernel", {}), ("vsa.kernel", {"backend": "triton"})],
)
def test_selections(name: str, params: Any, shape: Any, block: int, tokens: int) -> None:
    mask = random_selection(tokens, shape, block)
    compare(name, mask, problem_of(mask, shape, "bfloat16"), **params)


def test_selections_with_other_block_sizes() -> None:
    mask = random_selection(200, SHAPES[0], 48)
    compare("flashinfer.variable", mask, problem_of(mask, SHAPES[0], "float16"))
    _, op = load("vsa.kernel")
    with pytest.raises(Unsupported, match="multiples of 64 tokens, not 48 x 48"):
        op.prepare(mask, problem_of(mask, SHAPES[0], "bfloat16"), "cpu")


@pytest.mark.parametrize("name", PER_HEAD)
def test_selections_with_partial_blocks_are_refused(name: str) -> None:
    info, op = load(name)
    causal = random_selection(256, SHAPES[0], 64, within="causal")
    problem = with_direction(info, problem_of(causal, SHAPES[0], "bfloat16"))
    reason = op.unsupported(problem, causal.grid.mask, "cpu")
    assert reason is not None
    assert "entirely visible, and this mask cuts some of them (a causal one does)" in reason
    with pytest.raises(Unsupported, match=r"\(a causal one does\)"):
        op.prepare(causal, problem, "cpu")
    heads = masks.build_heads("block_sparse_uniform:block_size=64,causal=true", 256, 4)
    assert "entirely visible" in op.unsupported(problem, heads, "cpu")


@pytest.mark.parametrize("name", PER_HEAD)
def test_a_selector_computes_with_the_adapter(name: str) -> None:
    mask = masks.build("full", 300)
    problem = problem_of(mask, SHAPES[0], "bfloat16", direction="fwd")
    q, k, v, _ = inputs(problem)
    results = []
    for kernel in ("bands", name):
        selector = registry.implementation(
            registry.operator_info("oracle"), {"kernel": kernel, "block_size": 64}
        )
        results.append(selector.forward(QKV(q, k, v), selector.prepare(mask, problem, "cpu")))
    (expected_out, expected_lse), (out, lse) = results
    assert naive.error(out, expected_out) < LIMIT["bfloat16"]
    assert naive.error(lse, expected_lse) < 1e-4


# --- partial results ------------------------------------------------------------------------------

WITH_EXTERNAL_LSE = [n for n in (*SUPPORTED, *PER_HEAD) if registry.operator_info(n).external_lse]


def test_adapters_with_a_backward_pass_take_an_external_lse() -> None:
    assert set(WITH_EXTERNAL_LSE) == {*SUPPORTED, *PER_HEAD} - {
        "flashinfer.dense", "flashinfer.block_sparse", "flashinfer.variable"
    }  # fmt: skip


@pytest.mark.parametrize("name", [*SUPPORTED, *PER_HEAD])
def test_partial_results_over_key_subsets_add_up(name: str) -> None:
    """The last 64 of 192 tokens: they see earlier keys fully and the last ones causally."""
    if name in PER_HEAD:
        whole: Any = block_masks(192, 4).crop(128, 192, 0, 192)
    else:
        whole = masks.build("causal", 192, seq_q=64)
    info, op = load(name)
    problem = with_direction(info, problem_of(whole, SHAPES[0], "bfloat16"))
    q, k, v, dout = inputs(problem)
    spans = [(0, 128), (128, 192)]
    plans = []
    for a, b in spans:
        mask = whole.crop(0, 64, a, b)
        subproblem = replace(problem, seq_k=b - a, scale=problem.softmax_scale)
        assert op.unsupported(subproblem, mask, "cpu") is None
        plans.append(op.prepare(mask, subproblem, "cpu"))
    results = [
        op.forward(QKV(q, k[:, a:b], v[:, a:b]), p) for (a, b), p in zip(spans, plans, strict=True)
    ]
    (out, lse), (second_out, second_lse) = results
    out, lse = merge(out.float(), lse, second_out.float(), second_lse)
    merged = {"out": out.to(q.dtype), "lse": lse}
    if info.external_lse:
        grads = [
            op.backward(BackwardInputs(dout, q, k[:, a:b], v[:, a:b], merged["out"], lse), p)
            for (a, b), p in zip(spans, plans, strict=True)
        ]
        merged["dq"] = sum(g[0].double() for g in grads)
        merged["dk"], merged["dv"] = (torch.cat([g[n] for g in grads], 1) for n in (1, 2))
    error_of = errors(merged, whole, problem)
    assert within_limits(error_of, "bfloat16"), error_of
