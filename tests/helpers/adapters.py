"""What the tests of adapters share: who takes what, and each against dense float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import library_stand_ins
import naive
import pytest
import sparse_stand_ins
import torch

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.selectors.common.selection import Blocks
from cpbench.sweep.verification import MASKS

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
# What each takes of the masks of ``cpbench verify``.
SUPPORTED = {
    "flash_attn.2": WINDOWS,
    "flash_attn.3": WINDOWS,
    "te.cudnn": WINDOWS,
    "flashinfer.dense": WINDOWS - {"sliding_window"},
    "flashinfer.block_sparse": ALL,
    "magi.ffa": ALL,
    "flashmask": ALL,
}
PER_HEAD = ("flashinfer.variable", "vsa.kernel")
PARAMS: dict[str, dict[str, Any]] = {
    "flashinfer.block_sparse": {"block_q": 16, "block_k": 32},
}
SHAPES = ((2, 4, 2, 64), (1, 3, 1, 128))


def install_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins where imports look, and a Hopper device."""
    library_stand_ins.install(
        monkeypatch, {**library_stand_ins.dense(), **sparse_stand_ins.sparse()}
    )
    set_capability(monkeypatch, (9, 0))


def set_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr("cpbench.kernels.libraries.adapter.compute_capability", lambda: capability)


class Seen:
    """Booleans as a mask that the reference takes."""

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
    return problem if info.backward_on else replace(problem, direction="fwd")


def found(
    name: str, mask: Any, problem: Problem, change: Callable[[Any], Any] = lambda plan: plan,
    **params: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What an adapter returns, by tensor; with its plan changed."""
    info, op = load(name, **params)
    problem = with_direction(info, problem)
    q, k, v, dout = inputs(problem)
    plan = change(op.prepare(mask, problem, "cpu"))
    out, lse = op.forward(QKV(q, k, v), plan)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((len(q), q.shape[2], q.shape[1]), torch.float32)
    got = {"out": out, "lse": lse}
    if info.backward_on:
        grads = op.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
        for x, like in zip(grads, (q, k, v), strict=True):
            assert (x.shape, x.dtype) == (like.shape, like.dtype)
        got |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return got


def errors(got: dict[str, torch.Tensor], mask: Any, problem: Problem) -> dict[str, float]:
    seen = Seen(mask.rows(0, mask.seq_q)) if isinstance(mask, Blocks) else mask
    want = naive.attention(*inputs(problem), seen)
    return {name: naive.error(x, want[name]) for name, x in got.items()}


def right(off: dict[str, float], dtype: str) -> bool:
    return all(x < (LSE_LIMIT if name == "lse" else LIMIT[dtype]) for name, x in off.items())


def compare(name: str, mask: Any, problem: Problem, **params: Any) -> None:
    info, op = load(name, **params)
    assert op.unsupported(with_direction(info, problem), _shown(mask), "cpu") is None
    off = errors(found(name, mask, problem, **params), mask, problem)
    assert right(off, problem.dtype), off


def _shown(mask: Any) -> Any:
    """What is known of a selection before it is made."""
    return mask.grid.mask if isinstance(mask, Blocks) else mask


def supported_dtypes(name: str) -> tuple[str, ...]:
    return registry.operator_info(name).supported_dtypes


def windowed_documents(left: int, right: int, sizes: tuple[tuple[int, int], ...]) -> AttnMask:
    """Documents of n queries and m keys under one window."""
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
    """Whether an adapter is right with its plan changed, and the library takes it."""
    try:
        got = found(name, mask, problem, change or (lambda plan: plan), **params)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return right(errors(got, mask, problem), problem.dtype)
