"""An operator as strategies receive it: bound to a device, its partial results merged in float32.

Strategies say *what* to compute (queries, keys, plan); how partial results add up is here.  A
single part passes through untouched, so a strategy with one call per rank pays nothing.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import Operator, Unsupported
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.masks.head_masks import per_head

if TYPE_CHECKING:
    import torch

    from cpbench.masks.attn_mask import AttnMask
    from cpbench.parallel.world import Part, Piece


def merge(
    out_BSHD: torch.Tensor, lse_BHS: torch.Tensor, part_BSHD: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 partial results over disjoint keys as one, in place of the first.

    The lse becomes ``logaddexp(lse, part)`` and the outputs are weighted by the sigmoids of the
    difference, which sum to 1 however large the lse are (``exp(lse - both)`` does not: a float32
    near 5000 is 5e-4 coarse).  Where both are -inf the output stays 0 and the lse -inf.  Source:
    FlashAttention's online softmax (arXiv 2205.14135), as used between blocks by Ring Attention
    (arXiv 2310.01889).
    """
    import torch

    difference = part_lse - lse_BHS
    for x_BSHD, sign in ((out_BSHD, -1), (part_BSHD, 1)):
        weight = torch.sigmoid(sign * difference).nan_to_num_(0.0)
        x_BSHD.mul_(weight.transpose(1, 2).unsqueeze(-1))
    return out_BSHD.add_(part_BSHD), torch.logaddexp(lse_BHS, part_lse)


def row_delta(dout_BSHD: torch.Tensor, out_BSHD: torch.Tensor) -> torch.Tensor:
    """``[B, S, H]`` float32, sum(dout * out): all that a backward pass needs of the output."""
    return (dout_BSHD.float() * out_BSHD.float()).sum(-1)


def stand_in(dout_BSHD: torch.Tensor, delta_BSH: torch.Tensor) -> torch.Tensor:
    """An output that has this delta, for operators that take outputs; 0 where dout is 0.

    Of all such it is the shortest, a multiple of dout, so that rounding it to the dtype of dout
    costs no more than rounding the output did.
    """
    square = dout_BSHD.float().square().sum(-1)
    factor = (delta_BSH / square).masked_fill_(square == 0, 0.0)
    made: torch.Tensor = (dout_BSHD.float() * factor.unsqueeze(-1)).to(dout_BSHD.dtype)
    return made


class ForwardParts:
    """Accumulates a forward pass over disjoint sets of keys for one set of queries."""

    def __init__(self, op: BoundOperator, q_BSHD: torch.Tensor) -> None:
        self._op, self._q = op, q_BSHD
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any) -> None:
        """Attend to some more keys."""
        if self._out is None or not isinstance(plan, Planned) or plan.crop is None:
            self.add_result(*self._op.forward(self._q, k_BTGD, v_BTGD, plan))
            return
        q0, q1, _, _ = plan.crop  # the other queries see none of these keys
        out, lse = self._op.forward_cropped(self._q, k_BTGD, v_BTGD, plan)
        assert lse is not None
        assert self._lse is not None
        self._out = self._out.float()
        some = self._lse[:, :, q0:q1]
        some.copy_(merge(self._out[:, q0:q1], some, out.float(), lse)[1])

    def add_result(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """What somebody else found for the same queries and some more keys; overwritten."""
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            assert lse is not None
            assert self._lse is not None
            # .float() copies bfloat16 and hands float32 through: both are ours to overwrite.
            self._out, self._lse = merge(self._out.float(), self._lse, out.float(), lse)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out in the dtype of q, and lse; zeros and -inf when nothing was added."""
        import torch

        if self._out is None:
            b, s, h, _ = self._q.shape
            lse = torch.full((b, h, s), -torch.inf, dtype=torch.float32, device=self._q.device)
            return torch.zeros_like(self._q), lse
        return self._out.to(self._q.dtype), self._lse


class BackwardParts:
    """Accumulates dq over disjoint sets of keys; hands back dk and dv of each set."""

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
        """dk and dv of these keys, in their dtype; dq is kept."""
        given = (self._dout, self._q, k_BTGD, v_BTGD, self._out, self._lse, plan)
        if self._dq is None or not isinstance(plan, Planned) or plan.crop is None:
            dq, dk, dv = self._op.backward(*given)
            self.add_result(dq)
            return dk, dv
        q0, q1, k0, k1 = plan.crop
        dq, dk, dv = self._op.backward_cropped(*given)
        self._dq = self._dq.float()
        self._dq[:, q0:q1].add_(dq)
        return padded(dk, k_BTGD, k0, k1), padded(dv, v_BTGD, k0, k1)

    def add_result(self, dq: torch.Tensor) -> None:
        """What somebody else found for dq from some more keys; the first one is overwritten."""
        self._dq = dq if self._dq is None else self._dq.float().add_(dq)

    def finish(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """dq in the dtype of q, or another."""
        import torch

        dtype = dtype or self._q.dtype
        if self._dq is None:
            return torch.zeros_like(self._q, dtype=dtype)
        return self._dq.to(dtype)


@dataclass(frozen=True)
class Planned:
    """An operator's plan for one part of the work.

    Attributes:
        plan: the operator's own.
        area: visible pairs in it.
        crop: ``(q0, q1, k0, k1)`` where the plan is for these queries and keys alone, since no
            others see or are seen; None where it is for all.
    """

    plan: Any
    area: int
    crop: tuple[int, int, int, int] | None = None


def padded(part: torch.Tensor, like: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Tokens ``start`` to ``end`` of a tensor that is 0 elsewhere, in the shape of ``like``."""
    import torch

    if part.shape == like.shape:
        return part
    whole = torch.zeros(like.shape, dtype=part.dtype, device=part.device)
    whole[:, start:end] = part
    return whole


def native_part(mask: AttnMask) -> tuple[tuple[int, int, int, int] | None, AttnMask]:
    """The rectangle that holds all that is visible and its mask, where that is full or causal,
    which operators compute natively; else None and the mask itself."""
    if mask.kind == "bands":
        inner = mask.crop(*mask.hull)
        if inner.kind in ("full", "causal"):
            return mask.hull, inner
    return None, mask


class BoundOperator:
    """An operator loaded with its parameters for one device, as strategies receive it.

    Attributes:
        pairs: visible pairs computed so far, each once for every query head.
    """

    def __init__(self, info: OperatorInfo, impl: Operator, device: str) -> None:
        self.info, self.impl, self.device = info, impl, device
        self.pairs = 0

    @classmethod
    def load(cls, spec: Spec | str, device: str) -> BoundOperator:
        """The operator that ``spec`` names, its modules imported.

        Raises:
            ValueError: for an unknown name or parameter.
        """
        spec = Spec.parse(spec)
        info = operator_info(spec.name)
        return cls(info, implementation(info, spec.kwargs), device)

    def prepare(self, part: Part | Piece) -> Any:
        """The operator's plan for one part of the work.

        Where all that is visible is one rectangle, full or causal (a step of a zigzag or striped
        ring is), the plan is for that rectangle, which operators compute natively.

        Raises:
            Unsupported: when the operator does not take such a mask or problem.
        """
        mask: Any = part.mask  # of a kind that the operator's declaration names
        problem, crop = part.problem, None
        if mask.kind == "bands" and not self.info.selects:
            crop, mask = native_part(mask)
            problem = replace(problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
        if mask.kind not in self.info.masks:
            takes = ", ".join(self.info.masks)
            this = "differs from head to head" if per_head(mask) else f"is {mask.kind}"
            raise Unsupported(f"{self.info.name} takes {takes} masks; this one {this}")
        reason = self.impl.unsupported(problem, mask, self.device)
        if reason is not None:
            raise Unsupported(reason)
        return Planned(self.impl.prepare(mask, problem, self.device), part.area, crop)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Operator.forward`."""
        import torch

        out, lse = self.forward_cropped(q, k, v, plan)
        if plan.crop is None or out.shape == q.shape:
            return out, lse
        q0, q1, _, _ = plan.crop
        if lse is not None:
            found, (b, h, _) = lse, lse.shape
            lse = torch.full((b, h, q.shape[1]), -torch.inf, dtype=lse.dtype, device=lse.device)
            lse[:, :, q0:q1] = found
        return padded(out, q, q0, q1), lse

    def forward_cropped(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Planned
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`forward`, of the queries of ``plan.crop`` alone."""
        self.pairs += plan.area * q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            q, k, v = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1]
        return self.impl.forward(q, k, v, plan.plan)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        plan: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`Operator.backward`."""
        dq, dk, dv = self.backward_cropped(dout, q, k, v, out, lse, plan)
        if plan.crop is None:
            return dq, dk, dv
        q0, q1, k0, k1 = plan.crop
        return padded(dq, q, q0, q1), padded(dk, k, k0, k1), padded(dv, v, k0, k1)

    def backward_cropped(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        plan: Planned,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`backward`, of the queries and keys of ``plan.crop`` alone."""
        self.pairs += plan.area * q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            dout, q, out = dout[:, q0:q1], q[:, q0:q1], out[:, q0:q1]
            k, v = k[:, k0:k1], v[:, k0:k1]
            lse = lse[:, :, q0:q1].contiguous() if lse is not None else None
        return self.impl.backward(dout, q, k, v, out, lse, plan.plan)

    def add_up(self, total: torch.Tensor | None, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """The float32 sum of gradients, stacked: ``total``, added to in place, or a new one."""
        import torch

        if total is None:
            total = torch.empty(
                (len(found), *found[0].shape), dtype=torch.float32, device=self.device
            )
            for into, x in zip(total, found, strict=True):
                into.copy_(x)
        else:
            for into, x in zip(total, found, strict=True):
                into.add_(x)
        return total

    def forward_parts(self, q: torch.Tensor) -> ForwardParts:
        """An accumulator for attention of these queries over several sets of keys."""
        return ForwardParts(self, q)

    def backward_parts(
        self, dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> BackwardParts:
        """The accumulator of the matching backward pass, given the global out and lse."""
        return BackwardParts(self, dout, q, out, lse)

    def lent_parts(
        self, dout: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor
    ) -> BackwardParts:
        """As :meth:`backward_parts` for somebody else's queries, given :func:`row_delta` in place
        of the output that it stands for."""
        return BackwardParts(self, dout, q, stand_in(dout, delta), lse)
