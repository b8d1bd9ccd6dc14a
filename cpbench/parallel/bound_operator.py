"""An operator bound to a device, as strategies receive it, and the float32 merge of its partial
results.

Strategies choose what to compute (queries, keys, plan); this module merges the partial results.  A
single partial result is returned unchanged, so a strategy with one call per rank pays nothing.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import (
    QKV,
    BackwardInputs,
    Operator,
    Unsupported,
    nothing_visible,
)
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.masks.head_masks import per_head

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.output_state import OutputStates
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.parallel.world import KeySubset, Subproblem


def merge(
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    partial_BSHD: torch.Tensor,
    partial_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two float32 partial results over disjoint keys, in place of the first.

    The lse becomes ``logaddexp(lse, partial_lse)`` and the outputs are weighted by the sigmoids of
    the difference, which sum to 1 however large the lse are (``exp(lse - merged)`` does not: a
    float32 near 5000 is 5e-4 coarse).  Where both are -inf the output stays 0 and the lse -inf.

    Source: FlashAttention's online softmax (arXiv 2205.14135), as used between blocks by Ring
    Attention (arXiv 2310.01889).
    """
    import torch

    difference = partial_lse - lse_BHS
    for x_BSHD, sign in ((out_BSHD, -1), (partial_BSHD, 1)):
        weight = torch.sigmoid(sign * difference).nan_to_num_(0.0)
        x_BSHD.mul_(weight.transpose(1, 2).unsqueeze(-1))
    return out_BSHD.add_(partial_BSHD), torch.logaddexp(lse_BHS, partial_lse)


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
    """Accumulates a forward pass over disjoint sets of keys for one set of queries."""

    def __init__(self, op: BoundOperator, q_BSHD: torch.Tensor) -> None:
        self._op, self._q = op, q_BSHD
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
        cropped_lse.copy_(merge(self._out[:, q0:q1], cropped_lse, out.float(), lse)[1])

    def add_partial(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge the partial result of another subset of keys; its tensors may be overwritten."""
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            assert lse is not None
            assert self._lse is not None
            # .float() copies bfloat16 and returns float32 itself: both may be overwritten.
            self._out, self._lse = merge(self._out.float(), self._lse, out.float(), lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return out in the dtype of q, and lse; zeros and -inf when nothing was added."""
        if self._out is None:
            return nothing_visible(self._q)
        return self._out.to(self._q.dtype), self._lse


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
        return padded(dk, k_BTGD, k0, k1), padded(dv, v_BTGD, k0, k1)

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
    """

    plan: Any
    problem: Problem
    mask: Any
    area: int
    crop: tuple[int, int, int, int] | None = None


def padded(part: torch.Tensor, like: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Pad ``part``, the tokens from ``start`` to ``end``, with zeros to the shape of ``like``."""
    import torch

    if part.shape == like.shape:
        return part
    full = torch.zeros(like.shape, dtype=part.dtype, device=part.device)
    full[:, start:end] = part
    return full


def native_rectangle(mask: AttnMask) -> tuple[tuple[int, int, int, int] | None, AttnMask]:
    """Return the rectangle that holds all visible pairs and its mask, where that mask is full or
    causal, which operators compute natively; else None and the mask itself."""
    if mask.kind == "bands":
        inner = mask.crop(*mask.hull)
        if inner.kind in ("full", "causal"):
            return mask.hull, inner
    return None, mask


class BoundOperator:
    """An operator with its parameters, bound to a device.

    Attributes:
        pairs: visible pairs computed so far, counted once per query head.
    """

    forward_accumulator_type: type[ForwardAccumulator] = ForwardAccumulator
    backward_accumulator_type: type[BackwardAccumulator] = BackwardAccumulator

    def __init__(self, info: OperatorInfo, impl: Operator, device: str) -> None:
        self.info, self.impl, self.device = info, impl, device
        self.pairs = 0

    @classmethod
    def load(cls, spec: Spec | str, device: str) -> BoundOperator:
        """Import and construct the operator named by ``spec``.

        Raises:
            ValueError: for an unknown name or parameter.
        """
        spec = Spec.parse(spec)
        info = operator_info(spec.name)
        return cls(info, implementation(info, spec.kwargs), device)

    def prepare(self, subproblem: Subproblem | KeySubset) -> Any:
        """Plan one subproblem.

        If all visible pairs form one full or causal rectangle, as in a step of a zigzag or striped
        ring, the plan is for that rectangle, which operators compute natively.

        Raises:
            Unsupported: if the operator does not take this mask or problem.
        """
        mask: Any = subproblem.mask  # of the kinds that the operator declares
        problem, crop = subproblem.problem, None
        if mask.kind == "bands" and not self.info.selects:
            crop, rectangle = native_rectangle(mask)
            if crop is not None and self._knows_outputs and crop[:2] != (0, mask.seq_q):
                crop, rectangle = None, mask  # its backward pass takes the output it returned
            mask = rectangle
            problem = replace(problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
        if mask.kind not in self.info.masks:
            takes = ", ".join(self.info.masks)
            kind = "differs from head to head" if per_head(mask) else f"is {mask.kind}"
            raise Unsupported(f"{self.info.name} takes {takes} masks; this one {kind}")
        reason = self.impl.unsupported(problem, mask, self.device)
        if reason is not None:
            raise Unsupported(reason)
        plan = self.impl.prepare(mask, problem, self.device)
        return Planned(plan, problem, mask, subproblem.area, crop)

    def forward(self, qkv: QKV, plan: Any) -> OutLse:
        """See :meth:`Operator.forward`."""
        import torch

        q = qkv.q
        out, lse = self.forward_cropped(qkv, plan)
        if plan.crop is None or out.shape == q.shape:
            return out, lse
        q0, q1, _, _ = plan.crop
        if lse is not None:
            cropped_lse, (b, h, _) = lse, lse.shape
            lse = torch.full((b, h, q.shape[1]), -torch.inf, dtype=lse.dtype, device=lse.device)
            lse[:, :, q0:q1] = cropped_lse
        return padded(out, q, q0, q1), lse

    def forward_cropped(self, qkv: QKV, plan: Planned) -> OutLse:
        """As :meth:`forward`, for the queries of ``plan.crop`` only."""
        q, k, v = qkv
        self.pairs += plan.area * q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            qkv = QKV(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1])
        return self._forward(qkv, plan)

    def _forward(self, qkv: QKV, plan: Planned) -> OutLse:
        return self.impl.forward(qkv, plan.plan)

    def backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        """See :meth:`Operator.backward`."""
        dq, dk, dv = self.backward_cropped(x, plan)
        if plan.crop is None:
            return dq, dk, dv
        q0, q1, k0, k1 = plan.crop
        return padded(dq, x.q, q0, q1), padded(dk, x.k, k0, k1), padded(dv, x.v, k0, k1)

    def backward_cropped(self, x: BackwardInputs, plan: Planned) -> Gradients:
        """As :meth:`backward`, for the queries and keys of ``plan.crop`` only."""
        self.pairs += plan.area * x.q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            dout, q, out = (_rows(tensor, q0, q1) for tensor in (x.dout, x.q, x.out))
            lse: Any = x.lse  # None for operators that return none
            lse = lse[:, :, q0:q1].contiguous() if lse is not None else None
            x = BackwardInputs(dout, q, x.k[:, k0:k1], x.v[:, k0:k1], out, lse)
        return self._backward(x, plan)

    def _backward(self, x: BackwardInputs, plan: Planned) -> Gradients:
        return self.impl.backward(x, plan.plan)

    @property
    def _knows_outputs(self) -> bool:
        """Whether the operator keeps states of its outputs (see ``OutputStates``)."""
        return getattr(self.impl, "states", None) is not None

    def take_state(self, x: torch.Tensor) -> Any:
        """Take what the operator keeps for the backward pass of the output ``x``, or None."""
        states: OutputStates | None = getattr(self.impl, "states", None)
        return None if states is None else states.take(x)

    def restore_state(self, out: torch.Tensor, state: Any) -> None:
        """Give back what :meth:`take_state` took, for another tensor with the same values."""
        self.impl.states.put(out, state)  # type: ignore[attr-defined]

    def sum_float32(
        self, total: torch.Tensor | None, gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Add gradients to their stacked float32 sum in place; None starts a new one."""
        import torch

        if total is None:
            total = torch.empty(
                (len(gradients), *gradients[0].shape), dtype=torch.float32, device=self.device
            )
            for accumulated, gradient in zip(total, gradients, strict=True):
                accumulated.copy_(gradient)
        else:
            for accumulated, gradient in zip(total, gradients, strict=True):
                accumulated.add_(gradient)
        return total

    output_with_delta = staticmethod(output_with_delta)

    def forward_accumulator(self, q: torch.Tensor) -> ForwardAccumulator:
        """Accumulate attention of these queries over disjoint subsets of keys."""
        return self.forward_accumulator_type(self, q)

    def backward_accumulator(
        self, dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> BackwardAccumulator:
        """Accumulate the matching backward pass, given the global out and lse."""
        return self.backward_accumulator_type(self, dout, q, out, lse)

    def backward_accumulator_from_delta(
        self, dout: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor
    ) -> BackwardAccumulator:
        """As :meth:`backward_accumulator`, given :func:`row_delta` instead of out: for queries of
        another rank, whose out is not sent."""
        out = self.output_with_delta(dout, delta)
        return self.backward_accumulator_type(self, dout, q, out, lse)


def _rows(x: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Tokens of ``[B, S, H, D]``; ``x`` itself if those are all, which an operator may know."""
    return x if (start, end) == (0, x.shape[1]) else x[:, start:end]
