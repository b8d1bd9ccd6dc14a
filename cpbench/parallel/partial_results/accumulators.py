"""Accumulators of partial results over disjoint sets of keys, forward and backward.

Strategies choose what to compute (queries, keys, plan); these merge the partial results in float32.
A single partial result is returned unchanged, so a strategy with one call per rank pays nothing.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim; of out,
dout and v it is that of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, BackwardInputs, nothing_visible

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.bound_selector import TokenOrder


def row_delta(dout_BSHD: torch.Tensor, out_BSHD: torch.Tensor) -> torch.Tensor:
    """Return sum(dout * out), ``[B, S, H]`` float32: all that a backward pass needs of out."""
    return (dout_BSHD.float() * out_BSHD.float()).sum(-1)


def output_with_delta(dout_BSHD: torch.Tensor, delta_BSH: torch.Tensor) -> torch.Tensor:
    """Return an output that has this delta, for operators that take out; 0 where dout is 0.

    It is the one of minimal norm, a multiple of dout, so that rounding it to the dtype of dout
    costs no more than rounding the output did.
    """
    square = dout_BSHD.float().square().sum(-1)
    factor = (delta_BSH / square).masked_fill_(square == 0, 0.0)
    out_BSHD: torch.Tensor = (dout_BSHD.float() * factor.unsqueeze(-1)).to(dout_BSHD.dtype)
    return out_BSHD


class ForwardAccumulator:
    """Accumulates a forward pass over disjoint sets of keys for one set of queries.

    Args:
        value_dim: head_dim of the values; 0 for that of the queries.
    """

    def __init__(self, op: BoundOperator, q_BSHD: torch.Tensor, value_dim: int = 0) -> None:
        self._op, self._q, self._value_dim = op, q_BSHD, value_dim or q_BSHD.shape[3]
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any) -> None:
        """Attend to another subset of keys."""
        if self._out is None or not isinstance(plan, Planned) or plan.crop is None:
            self.add_partial(*self._op.forward(QKV(self._q, k_BTGD, v_BTGD), plan))
            return
        q0, q1, _, _ = plan.crop  # other queries see none of these keys
        out, lse = self._op.forward_cropped(QKV(self._q, k_BTGD, v_BTGD), plan)
        assert lse is not None
        assert self._lse is not None
        self._out = self._out.float()
        cropped_lse = self._lse[:, :, q0:q1]
        cropped_lse.copy_(self._op.merge(self._out[:, q0:q1], cropped_lse, out, lse)[1])

    def add_partial(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge the partial result of another subset of keys; its tensors may be overwritten."""
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            assert lse is not None
            assert self._lse is not None
            self._out, self._lse = self._op.merge(self._out, self._lse, out, lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return out in the dtype of q, and lse; zeros and -inf when nothing was added."""
        if self._out is None:
            return nothing_visible(self._q, self._value_dim)
        return self._out.to(self._q.dtype), self._lse

    def empty_result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised memory for an out and lse of these queries."""
        import torch

        b, s, h, _ = self._q.shape
        out = self._op.empty((b, s, h, self._value_dim), self._q.dtype)
        return out, self._op.empty((b, h, s), torch.float32)


class BackwardAccumulator:
    """Accumulates dq over disjoint sets of keys; returns dk and dv of each set."""

    def __init__(
        self,
        op: BoundOperator,
        dout_BSHD: torch.Tensor,
        q_BSHD: torch.Tensor,
        out_BSHD: torch.Tensor,
        lse_BHS: torch.Tensor | None,
    ) -> None:
        self._op, self._dout, self._q = op, dout_BSHD, q_BSHD
        self._out, self._lse = out_BSHD, lse_BHS
        self._dq: torch.Tensor | None = None

    def add(
        self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return dk and dv of these keys, in their dtype, and accumulate their part of dq."""
        lse: Any = self._lse
        x = BackwardInputs(self._dout, self._q, k_BTGD, v_BTGD, self._out, lse)
        if self._dq is None or not isinstance(plan, Planned) or plan.crop is None:
            dq, dk, dv = self._op.backward(x, plan)
            self.add_partial(dq)
            return dk, dv
        q0, q1, k0, k1 = plan.crop
        dq, dk, dv = self._op.backward_cropped(x, plan)
        self._dq = self._dq.float()
        self._dq[:, q0:q1].add_(dq)
        tokens = k_BTGD.shape[1]
        return padded(dk, tokens, k0, k1), padded(dv, tokens, k0, k1)

    def add_partial(self, dq: torch.Tensor) -> None:
        """Add the partial dq of another subset of keys; the first one may be overwritten."""
        self._dq = dq if self._dq is None else self._dq.float().add_(dq)

    def finish(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return dq in the dtype of q, or in ``dtype``."""
        import torch

        dtype = dtype or self._q.dtype
        if self._dq is None:
            return torch.zeros_like(self._q, dtype=dtype)
        return self._dq.to(dtype)


@dataclass(frozen=True)
class Planned:
    """An operator's plan for one subproblem.

    Attributes:
        plan: the plan of the operator.
        problem, mask: what it is the plan of.
        area: visible pairs.
        crop: ``(q0, q1, k0, k1)`` if the plan covers only these queries and keys, as no others
            see or are seen; None if it covers all.
        kv_heads: as for ``World``: the operator gets these key/value heads.
        order: of a selector: where its tokens are in the sequence; None for other operators.
    """

    plan: Any
    problem: Problem
    mask: Any
    area: int
    crop: tuple[int, int, int, int] | None = None
    kv_heads: tuple[int, ...] = ()
    order: TokenOrder | None = None


def padded(part_BSHD: torch.Tensor, tokens: int, start: int, end: int) -> torch.Tensor:
    """Pad the tokens from ``start`` to ``end`` with zeros to all ``tokens``."""
    if part_BSHD.shape[1] == tokens:
        return part_BSHD
    full = part_BSHD.new_zeros((part_BSHD.shape[0], tokens, *part_BSHD.shape[2:]))
    full[:, start:end] = part_BSHD
    return full


def unpacked(packed: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The tensors of these shapes that one flat tensor holds, as views of it: gradients that are
    summed and sent together, such as dk and dv, whose head dims may differ."""
    parts = packed.split([math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
