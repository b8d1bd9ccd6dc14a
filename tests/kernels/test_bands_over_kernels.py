"""`bands` over the kernels of other operators, with stand-ins of their libraries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
import torch_flash_stand_in
from adapters import LIMIT, LSE_LIMIT, inputs, install_stand_ins, problem_of, set_capability
from launch_counter import LaunchCounter, count_fused_merges
from library_stand_ins import _flash_2_window
from raw_masks import FAR, MASKS, mask_of

from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.kernels.bands.operator import Bands
from cpbench.kernels.bands.pieces import divide
from cpbench.kernels.libraries.adapter import misread_bound
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert_library import Unconvertible
from cpbench.parallel.bound_operator import BoundOperator

LIBRARIES = ("flash_attn.torch", "flash_attn.2", "flash_attn.3", "te.cudnn")
SHAPE = (2, 4, 2, 16)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the libraries; they compute on CPU what is declared for CUDA."""
    install_stand_ins(monkeypatch)


def results_of(operator: Bands, mask: AttnMask, problem: Problem) -> dict[str, torch.Tensor]:
    q, k, v, dout = inputs(problem)
    composed = operator.composed(problem, "cuda")
    assert composed is not None
    calls = composed.prepare(mask, problem, "cpu")
    out, lse = composed.forward(QKV(q, k, v), calls)
    assert lse is not None
    grads = composed.backward(BackwardInputs(dout, q, k, v, out, lse), calls)
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    for name, like in (("out", q), ("dq", q), ("dk", k), ("dv", v)):
        assert (results[name].shape, results[name].dtype) == (like.shape, like.dtype)
    return results


def check(results: dict[str, torch.Tensor], mask: AttnMask, problem: Problem) -> None:
    expected = naive.attention(*inputs(problem), mask)
    for name, x in results.items():
        limit = LSE_LIMIT if name == "lse" else LIMIT[problem.dtype]
        assert naive.error(x, expected[name]) < limit, name


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kernel", LIBRARIES)
@pytest.mark.usefixtures("libraries")
def test_any_mask_by_the_kernel_of_a_library(kernel: str, name: str) -> None:
    mask = mask_of(name)
    problem = problem_of(mask, SHAPE, "float16")
    check(results_of(Bands(kernel=kernel), mask, problem), mask, problem)


@pytest.mark.parametrize("kernel", ["reference", "sdpa.cpu_flash"])
@pytest.mark.parametrize("name", ["causal", "empty_rows", "empty"])
def test_a_kernel_that_takes_every_mask_is_called_once(kernel: str, name: str) -> None:
    mask = mask_of(name)
    problem = problem_of(mask, SHAPE, "bfloat16")
    operator = Bands(kernel=kernel)
    assert operator.unsupported(problem, mask, "cpu") is None
    assert len(operator.prepare(mask, problem, "cpu").calls) == (name != "empty")
    check(results_of(operator, mask, problem), mask, problem)


NARROW = '''
from dataclasses import replace

from cpbench.core.registry import OperatorInfo, implementation, operator_info


class Narrow:
    """The reference, for full and causal masks only."""

    def __init__(self):
        self.inner = implementation(operator_info("reference"), {})
        self.prepare, self.forward = self.inner.prepare, self.inner.forward
        self.backward = self.inner.backward

    def unsupported(self, problem, mask, device):
        return None if mask.kind in ("full", "causal") else "only full and causal masks"


op = OperatorInfo(name="narrow", summary="for a test", source="a test", load=Narrow)
'''


def test_an_operator_in_a_file_and_masks_it_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    operator = Bands(kernel=f"{tmp_path}/narrow.py:op")
    for name in ("documents", "prefix", "full_documents"):
        mask = mask_of(name)
        problem = problem_of(mask, SHAPE, "bfloat16")
        assert operator.unsupported(problem, mask, "cpu") is None
        check(results_of(operator, mask, problem), mask, problem)
    mask = mask_of("window")
    reason = operator.unsupported(problem_of(mask, SHAPE, "bfloat16"), mask, "cpu")
    assert reason == "bands: only full and causal masks"


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("bands", "would be itself"),
        ("moba", "an operator of given masks"),
        ("sdpa.math", "returns its log-sum-exp"),
        ("nosuch", "nosuch"),
    ],
)
def test_kernels_that_cannot_be(kernel: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Bands(kernel=kernel)
    assert len(str(caught.value).splitlines()) == 1


def test_refusals_name_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of("causal")
    half = problem_of(mask, SHAPE, "bfloat16")
    missing = Bands(kernel="flash_attn.3").unsupported(half, mask, "cuda")
    assert missing is not None
    assert missing.startswith("bands: flash_attn.3 needs the Python package flash_attn_interface")
    bands = Bands()
    no_gpu = bands.unsupported(half, mask, "cuda")
    assert no_gpu == "bands: flash_attn.torch needs a CUDA device; torch sees none"
    set_capability(monkeypatch, (9, 0))
    assert bands.unsupported(half, mask, "cuda:0") is None
    float32 = problem_of(mask, SHAPE, "float32")
    assert "takes bfloat16, float16, not float32" in str(bands.unsupported(float32, mask, "cuda"))
    deterministic = problem_of(mask, SHAPE, "bfloat16", deterministic=True)
    assert "is not deterministic" in str(bands.unsupported(deterministic, mask, "cuda"))
    heads = masks.build_heads("block_sparse_uniform:block_size=64,keep=0.4", 256, 4)
    mla = replace(half, head_dim=24, head_dim_v=16)
    assert bands.unsupported(mla, mask, "cuda") is None
    composed = bands.composed(mla, "cuda")
    assert composed is not None
    assert composed.info.name == "triton_band"
    assert "one mask for all heads" in str(bands.unsupported(half, heads, "cuda"))


@pytest.mark.parametrize(
    ("spec", "device", "backward", "expected"),
    [
        ("bands", "cpu", True, True),
        ("bands", "cuda", True, False),
        ("bands:kernel=triton_band", "cuda", True, True),
        ("bands:kernel=sdpa.efficient", "cuda", True, False),
        ("triton_band", "cuda", True, True),
        ("gathered", "cpu", True, True),
        ("gathered", "cuda", True, False),
        ("gathered", "cuda", False, True),
        ("moba", "cpu", True, True),
        ("moba:kernel=gathered", "cuda", True, False),
        ("moba:kernel=triton_block_sparse", "cuda", True, True),
    ],
)
def test_timed_calls_are_compared_bitwise_only_where_kernels_are_deterministic(
    spec: str, device: str, backward: bool, expected: bool
) -> None:
    """Others sum gradients in any order, so that their results differ a little from call to call,
    which is not wrong."""
    problem = problem_of(
        mask_of("causal"), SHAPE, "bfloat16", direction="fwd_bwd" if backward else "fwd"
    )
    assert BoundOperator.load(spec, device).is_deterministic(problem) == expected


def refusal(mask: AttnMask) -> str | None:
    """As an adapter with windows and documents."""
    try:
        return misread_bound(mask)
    except Unconvertible as error:
        return str(error)


# Calls for each mask of 48K tokens; of documents, those of one draw of the corpus `pile`.
CALLS = {
    "full": 1, "causal": 1, "sliding_window": 1, "sliding_window_causal": 1, "full_document": 1,
    "causal_document": 1, "prefix_lm_causal": 2, "prefix_lm_document": 2, "share_question": 2,
    "causal_blockwise": 2, "streaming": 3, "global_sliding_window": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_documents_are_one_call(name: str) -> None:
    mask = masks.build(name, 48 * 1024)
    pieces = divide(mask, refusal)
    assert len(pieces) == CALLS[name] <= len(mask.slices) + 1
    assert sum(piece.mask.area for piece in pieces) == mask.area


@pytest.mark.parametrize("name", MASKS)
def test_pieces_are_the_mask(name: str) -> None:
    mask = mask_of(name)
    visible = np.zeros((mask.seq_q, mask.seq_k), dtype=int)
    for piece in divide(mask, refusal):
        visible[np.ix_(list(piece.queries), list(piece.keys))] += piece.mask.to_dense()
    assert np.array_equal(visible, mask.to_dense())


@pytest.mark.parametrize("seq_q", [9, 40, 200])
@pytest.mark.parametrize("hi", [-30, 0, 17, FAR])
@pytest.mark.parametrize("lo", [-FAR, -50, -120])
def test_windows_of_slices_with_more_queries_than_keys(seq_q: int, hi: int, lo: int) -> None:
    """Their pieces are windows that FlashAttention-2 reads right."""
    mask = AttnMask.from_slices(seq_q, 30, [(0, seq_q, 0, 30, lo, hi)])
    for piece in divide(mask, refusal):
        (q0, q1, k0, k1, low, high) = piece.mask.slices[0].tolist()
        assert (q0, k0) == (0, 0)
        corner = k1 - q1
        call = {
            "window_size_left": corner - low if low > 1 - q1 else -1,
            "window_size_right": high - corner if high < k1 - 1 else -1,
            "causal": False,
        }
        read = _flash_2_window(q1, k1, call).numpy()
        assert np.array_equal(read, piece.mask.to_dense())


@pytest.mark.usefixtures("libraries")
def test_the_result_of_one_call_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of("documents")
    problem = problem_of(mask, SHAPE, "bfloat16")
    operator = Bands()
    q, k, v, dout = inputs(problem)
    composed = operator.composed(problem, "cuda")
    assert composed is not None
    calls = composed.prepare(mask, problem, "cpu")
    kernel, made = composed.kernel, []

    def record(function: Any) -> Any:
        def call(*args: Any) -> Any:
            made.append(function(*args))
            return made[-1]

        return call

    monkeypatch.setattr(kernel, "forward", record(kernel.forward))
    monkeypatch.setattr(kernel, "backward", record(kernel.backward))
    out, lse = composed.forward(QKV(q, k, v), calls)
    assert lse is not None
    assert (out, lse) == made[0]
    grads = composed.backward(BackwardInputs(dout, q, k, v, out, lse), calls)
    assert all(a is b for a, b in zip(grads, made[1], strict=True))


def counted(mask: AttnMask, monkeypatch: pytest.MonkeyPatch) -> tuple[LaunchCounter, LaunchCounter]:
    """What one forward and one backward pass of bands on CUDA would launch, on meta tensors."""
    set_capability(monkeypatch, (9, 0))
    problem = problem_of(mask, (1, 32, 8, 128), "bfloat16")
    q, dout, k, v = (
        torch.empty(1, mask.seq_q, heads, 128, dtype=torch.bfloat16, device="meta")
        for heads in (32, 32, 8, 8)
    )
    composed = Bands().composed(problem, "meta")
    assert composed is not None
    calls = composed.prepare(mask, problem, "meta")
    passes = LaunchCounter(), LaunchCounter()
    count_fused_merges(monkeypatch, passes[0])
    with passes[0]:
        out, lse = composed.forward(QKV(q, k, v), calls)
    assert lse is not None
    with passes[1]:
        composed.backward(BackwardInputs(dout, q, k, v, out, lse), calls)
    return passes


def test_kernels_and_bytes_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """16K tokens, 32 query and 8 key/value heads of 128 in bfloat16."""
    tokens = 16 * 1024
    q_bytes = tokens * 32 * 128 * 2
    forward, backward = counted(masks.build("causal", tokens), monkeypatch)
    assert set(forward.kernels) == {"_flash_attention_forward"}
    assert set(backward.kernels) == {"_flash_attention_backward", "masked_fill", "eq"}
    assert forward.nbytes < 2.6 * q_bytes  # q, out, and a quarter of each for k and v
    documents, _ = counted(masks.build("causal_document", tokens), monkeypatch)
    assert documents.kernels["_flash_attention_forward"] == 1
    sinks, _ = counted(masks.build("streaming", tokens), monkeypatch)
    assert sinks.kernels["merge_results"] == sinks.kernels["_flash_attention_forward"] == 3


def test_the_schema_is_that_of_the_adapter() -> None:
    """Without a stand-in, on meta tensors: names, number of arguments, shapes and dtypes."""
    assert torch_flash_stand_in  # which binds its arguments by the same schema
    for name, count in (("forward", 10), ("backward", 14)):
        schema = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema
        names = [a.name for a in schema.arguments]
        assert sum(not a.kwarg_only for a in schema.arguments) == count
        assert {"scale", "window_size_left", "window_size_right"} <= set(names)
