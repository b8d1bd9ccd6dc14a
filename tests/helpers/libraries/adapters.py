"""Helpers of the tests of adapters: supported masks, and comparison with dense float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import library_stand_ins
import naive
import pytest
import sparse_stand_ins
import torch
import torch_flash_stand_in

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.selectors.selections import Blocks
from cpbench.sweep.verification.cases import MASKS

LIMIT = {"bfloat16": 1.2e-2, "float16": 2e-3}
LSE_LIMIT = 1e-5
WINDOWS = {
    "full",
    "causal",
    "full_document",
    "causal_document",
    "sliding_window",
    "sliding_window_causal",
}
ALL = {mask.partition(":")[0] for mask in MASKS}
# The masks of ``cpbench verify`` that each adapter supports.
SUPPORTED = {
    "flash_attn.2": WINDOWS,
    "flash_attn.3": WINDOWS,
    "flash_attn.torch": WINDOWS,
    "te.cudnn": WINDOWS,
    "flashinfer.dense": WINDOWS - {"sliding_window"},
    "flashinfer.block_sparse": ALL,
    "magi.ffa": ALL,
    "flashmask": ALL,
}
PAGED = ("paged.flash_attn", "paged.flashinfer")
PER_HEAD = ("flashinfer.variable", "vsa.kernel")
PARAMS: dict[str, dict[str, Any]] = {
    "flashinfer.block_sparse": {"block_q": 16, "block_k": 32},
}
SHAPES = ((2, 4, 2, 64), (1, 3, 1, 128))


def install_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-ins of all libraries, and pretend to have a Hopper device."""
    library_stand_ins.install(
        monkeypatch, {**library_stand_ins.dense(), **sparse_stand_ins.sparse()}
    )
    torch_flash_stand_in.install(monkeypatch)
    set_capability(monkeypatch, (9, 0))


def set_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr("cpbench.kernels.libraries.adapter.compute_capability", lambda: capability)


class DenseMask:
    """Booleans as a mask for the dense reference."""

    def __init__(self, dense: torch.Tensor) -> None:
        self._dense = dense

    def to_dense(self) -> torch.Tensor:
        return self._dense


def problem_of(mask: Any, shape: tuple[int, int, int, int], dtype: str, **changes: Any) -> Problem:
    batch, heads_q, heads_kv, dim = shape
    sizes = {"batch": batch, "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": dim}
    return Problem(seq_q=mask.seq_q, seq_k=mask.seq_k, dtype=dtype, **{**sizes, **changes})


def inputs(problem: Problem) -> list[torch.Tensor]:
    longest = max(problem.seq_q, problem.seq_k)
    heads = (problem.heads_q, problem.heads_kv)
    dtype = getattr(torch, problem.dtype)
    q, k, v, dout = naive.random_inputs(problem.batch, longest, *heads, problem.head_dim, dtype)
    S, T = problem.seq_q, problem.seq_k
    return [q[:, :S], k[:, :T], v[:, :T], dout[:, :S]]  # not contiguous, as cropped parts are not


def load(name: str, **params: Any) -> tuple[registry.OperatorInfo, Any]:
    info = registry.operator_info(name)
    return info, registry.implementation(info, {**PARAMS.get(name, {}), **params})


def with_direction(info: registry.OperatorInfo, problem: Problem) -> Problem:
    """The problem, forward only for an operator without a backward pass."""
    return problem if info.backward_on else replace(problem, direction="fwd")


def run_adapter(
    name: str, mask: Any, problem: Problem, change: Callable[[Any], Any] = lambda plan: plan,
    **params: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The results of an adapter by name; ``change`` modifies its plan."""
    info, op = load(name, **params)
    problem = with_direction(info, problem)
    q, k, v, dout = inputs(problem)
    plan = change(op.prepare(mask, problem, "cpu"))
    out, lse = op.forward(QKV(q, k, v), plan)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((len(q), q.shape[2], q.shape[1]), torch.float32)
    results = {"out": out, "lse": lse}
    if info.backward_on:
        grads = op.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
        for grad, tensor in zip(grads, (q, k, v), strict=True):
            assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype)
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return results


def errors(results: dict[str, torch.Tensor], mask: Any, problem: Problem) -> dict[str, float]:
    if isinstance(mask, Blocks):
        mask = DenseMask(mask.dense_rows(0, mask.seq_q))
    expected = naive.attention(*inputs(problem), mask)
    return {name: naive.error(x, expected[name]) for name, x in results.items()}


def within_limits(errors: dict[str, float], dtype: str) -> bool:
    limit = {"lse": LSE_LIMIT}
    return all(error < limit.get(name, LIMIT[dtype]) for name, error in errors.items())


def compare(name: str, mask: Any, problem: Problem, **params: Any) -> None:
    """Assert that an adapter supports a mask and equals dense float64."""
    info, op = load(name, **params)
    assert op.unsupported(with_direction(info, problem), _static_mask(mask), "cpu") is None
    error_of = errors(run_adapter(name, mask, problem, **params), mask, problem)
    assert within_limits(error_of, problem.dtype), error_of


def _static_mask(mask: Any) -> Any:
    """The mask that a selection is a subset of, which is known before the selection."""
    return mask.grid.mask if isinstance(mask, Blocks) else mask


def supported_dtypes(name: str) -> tuple[str, ...]:
    return registry.operator_info(name).dtypes


def windowed_documents(left: int, right: int, sizes: tuple[tuple[int, int], ...]) -> AttnMask:
    """Documents of n queries and m keys each, under one window."""
    rows, q0, k0 = [], 0, 0
    for n, m in sizes:
        corner = k0 + m - q0 - n
        low, high = (
            corner - left if left >= 0 else -999,
            corner + right if right >= 0 else 999,
        )
        rows.append((q0, q0 + n, k0, k0 + m, low, high))
        q0, k0 = q0 + n, k0 + m
    return AttnMask.from_slices(q0, k0, rows)


def block_masks(tokens: int, heads: int) -> HeadMasks:
    built = masks.build_heads("block_sparse_uniform:block_size=64,keep=0.4", tokens, heads)
    assert isinstance(built, HeadMasks)
    return built


def is_correct(name: str, mask: Any, problem: Problem, change: Any = None, **params: Any) -> bool:
    """Whether the library takes an adapter's calls and the results are right; ``change`` modifies
    its plan."""
    try:
        results = run_adapter(name, mask, problem, change or (lambda plan: plan), **params)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return within_limits(errors(results, mask, problem), problem.dtype)
