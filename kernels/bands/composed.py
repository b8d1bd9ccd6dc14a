"""Attention for any mask with the kernel of another operator: one call for each piece of the mask.

A mask that the kernel takes whole is one call, whose result is returned as it is.  Others are
divided (``bands.pieces``), and the partial results merged in float32.

Legend: B batch, S queries, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import (
    QKV,
    BackwardInputs,
    declared_refusal,
    is_deterministic,
    zero_gradients,
)
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.kernels.bands.pieces import Indivisible, Piece, Tokens, divide
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.partial_results.merge import merge

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, Operator, OutLse
    from cpbench.core.problem import Problem


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel: a range or the numbers of its queries and of its keys, and the
    kernel's plan."""

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    plan: Any


class Composed:
    """Any mask by the kernel of an operator.

    Args:
        name: of the operator.

    Raises:
        ValueError: if there is none of that name, or its partial results do not merge.
    """

    def __init__(self, name: str) -> None:
        self.info: OperatorInfo = operator_info(name)
        if self.info.selects or not (self.info.mergeable and self.info.external_lse):
            raise ValueError(
                f"kernel = {name!r} of bands must be an operator of given masks that returns its "
                "log-sum-exp and whose backward pass takes another one"
            )
        self._kernel: Operator | None = None

    @property
    def kernel(self) -> Operator:
        """The implementation of the operator, which is imported when it is needed."""
        if self._kernel is None:
            self._kernel = implementation(self.info, {})
        return self._kernel

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``."""
        return is_deterministic(self.info, self.kernel, problem, device)

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        """See ``cpbench.core.operator.Operator.unsupported``."""
        reason = declared_refusal(self.info, problem, device.partition(":")[0])
        if reason is None:
            try:
                self._divide(mask, problem, device)
            except Indivisible as refusal:
                reason = str(refusal)
        return f"bands: {reason}" if reason else None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> tuple[Call, ...]:
        """The calls for a mask."""
        calls = []
        for piece in self._divide(mask, problem, device):
            plan = self.kernel.prepare(piece.mask, _problem_of(problem, piece.mask), device)
            calls.append(Call(_index(piece.queries, device), _index(piece.keys, device), plan))
        return tuple(calls)

    def _divide(self, mask: AttnMask, problem: Problem, device: str) -> list[Piece]:
        def refusal(part: AttnMask) -> str | None:
            if part.kind not in self.info.masks:
                return f"{self.info.name} takes {', '.join(self.info.masks)} masks"
            return self.kernel.unsupported(_problem_of(problem, part), part, device)

        return divide(mask, refusal)

    def forward(self, qkv: QKV, calls: Sequence[Call]) -> OutLse:
        """See ``cpbench.core.operator.Operator.forward``."""
        import torch

        q, k, v = qkv
        B, S, H, _ = q.shape
        if len(calls) == 1 and _covers(calls[0], q, k):
            return self.kernel.forward(qkv, calls[0].plan)
        out: torch.Tensor | None = None
        lse = q.new_full((B, H, S), -torch.inf, dtype=torch.float32)
        for call in calls:
            inputs = QKV(_take(q, call.queries), _take(k, call.keys), _take(v, call.keys))
            part, part_lse = self.kernel.forward(inputs, call.plan)
            assert part_lse is not None
            if part.shape[1] == S and out is None and isinstance(call.queries, slice):
                out, lse = part, part_lse
                continue
            if out is None:
                out = q.new_zeros((B, S, H, v.shape[3]), dtype=torch.float32)
            out = out.float()
            old_lse = _take(lse, call.queries, 2)
            merged, merged_lse = merge(_take(out, call.queries), old_lse, part, part_lse)
            _put(lse, call.queries, merged_lse, 2)
            if not isinstance(call.queries, slice):  # else it is a view of out
                _put(out, call.queries, merged, 1)
        if out is None:
            return q.new_zeros((B, S, H, v.shape[3])), lse
        return out.to(q.dtype), lse

    def backward(self, x: BackwardInputs, calls: Sequence[Call]) -> Gradients:
        """See ``cpbench.core.operator.Operator.backward``; sums are of float32."""
        import torch

        if not calls:
            return zero_gradients(x.qkv)
        if len(calls) == 1 and _covers(calls[0], x.q, x.k):
            return self.kernel.backward(x, calls[0].plan)
        dq, dk, dv = (torch.zeros_like(y, dtype=torch.float32) for y in x.qkv)
        for call in calls:
            dout, q, out = (_take(y, call.queries) for y in (x.dout, x.q, x.out))
            k, v = _take(x.k, call.keys), _take(x.v, call.keys)
            lse = _take(x.lse, call.queries, 2).contiguous()
            parts = self.kernel.backward(BackwardInputs(dout, q, k, v, out, lse), call.plan)
            tokens = (call.queries, call.keys, call.keys)
            for total, index, part in zip((dq, dk, dv), tokens, parts, strict=True):
                if isinstance(index, slice):
                    total[:, index].add_(part)
                else:
                    total.index_add_(1, index, part.float())  # every token at most once
        return dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype)


def _covers(call: Call, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a call is of all queries and keys."""
    whole = slice(0, q.shape[1]), slice(0, k.shape[1])
    return (call.queries, call.keys) == whole


def _problem_of(problem: Problem, part: AttnMask) -> Problem:
    return replace(problem, seq_q=part.seq_q, seq_k=part.seq_k)


def _index(tokens: Tokens, device: str) -> slice | torch.Tensor:
    """Tokens as what a tensor on the device is indexed with."""
    import torch

    if isinstance(tokens, range):
        return slice(tokens.start, tokens.stop)
    return torch.as_tensor(np.ascontiguousarray(tokens), device=device)


def _take(x: torch.Tensor, index: slice | torch.Tensor, axis: int = 1) -> torch.Tensor:
    """Tokens along an axis: a view of a range, a copy of others."""
    if isinstance(index, slice):
        return x.narrow(axis, index.start, index.stop - index.start)
    return x.index_select(axis, index)


def _put(x: torch.Tensor, index: slice | torch.Tensor, values: torch.Tensor, axis: int) -> None:
    """Write tokens along an axis."""
    if isinstance(index, slice):
        x.narrow(axis, index.start, index.stop - index.start).copy_(values)
    else:
        x.index_copy_(axis, index, values)
