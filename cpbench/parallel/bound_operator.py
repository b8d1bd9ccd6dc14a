"""An operator bound to a device, as strategies receive it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import (
    QKV,
    BackwardInputs,
    MixerBackwardInputs,
    MixerInputs,
    Operator,
    Unsupported,
    is_deterministic,
)
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import Mask, per_head
from cpbench.parallel import bound_selector
from cpbench.parallel.partial_results.accumulators import (
    BackwardAccumulator,
    ForwardAccumulator,
    Planned,
    output_with_delta,
    padded,
    unpacked,
)
from cpbench.parallel.partial_results.merge import merge
from cpbench.parallel.partial_results.repeated_heads import repeat_heads, sum_repeated_heads

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.output_state import OutputStates
    from cpbench.core.problem import Problem
    from cpbench.masks.slices import IntArray
    from cpbench.parallel.mixing import BoundMixer
    from cpbench.parallel.world import Chunk, KeySubset, Subproblem


def native_rectangle(mask: AttnMask) -> tuple[tuple[int, int, int, int] | None, AttnMask]:
    """Return the rectangle that holds all visible pairs and its mask, where that mask is full or
    causal, which operators compute natively; else None and the mask itself."""
    core = mask.native_core
    return (None, mask) if core is None else (mask.hull, core)


def declared_kind(info: OperatorInfo, mask: Mask) -> str:
    """The kind of a mask, in the words in which an operator declares those that it takes: mixers
    tell masks that are causal in each document from others."""
    if info.mixer and isinstance(mask, AttnMask) and mask.causal_documents is not None:
        return "causal" if len(mask.causal_documents) == 1 else "causal_document"
    return str(mask.kind)


class BoundOperator:
    """An operator with its parameters, bound to a device.

    Attributes:
        pairs: visible pairs computed so far, counted once per query head.
        selected: of a selector: a list to which every call appends its queries, number of heads and
            selection; None to record none.
    """

    forward_accumulator_type: type[ForwardAccumulator] = ForwardAccumulator
    backward_accumulator_type: type[BackwardAccumulator] = BackwardAccumulator

    def __init__(self, info: OperatorInfo, impl: Operator, device: str) -> None:
        self.info, self.impl, self.device = info, impl, device
        self.pairs = 0
        self.selected: list[tuple[IntArray, int, Any]] | None = None

    def is_deterministic(self, problem: Problem) -> bool:
        """Whether two runs are bitwise equal."""
        return is_deterministic(self.info, self.impl, problem, self.device)

    @property
    def returns_lse(self) -> bool:
        """Whether its forward pass returns a log-sum-exp on this device."""
        return self.info.mergeable and self.device.partition(":")[0] in self.info.lse_on

    @classmethod
    def load(cls, spec: Spec | str, device: str) -> BoundOperator:
        """Import and construct the operator named by ``spec``.

        Raises:
            ValueError: for an unknown name or parameter.
        """
        spec = Spec.parse(spec)
        info = operator_info(spec.name)
        return cls(info, implementation(info, spec.kwargs), device)

    def prepare(self, subproblem: Subproblem | KeySubset | Chunk) -> Any:
        """Plan one subproblem.

        If all visible pairs form one full or causal rectangle, as in a step of a zigzag or striped
        ring, the plan is for that rectangle, which operators compute natively.

        Raises:
            Unsupported: if the operator does not take this mask or problem.
        """
        selects = self.info.selects  # from the whole sequence
        mask: Any = subproblem.world.mask if selects else subproblem.mask
        problem, crop = subproblem.problem, None
        if mask.kind == "bands" and not (selects or self.info.mixer or self.info.paged):
            crop, rectangle = native_rectangle(mask)
            if crop is not None and self._knows_outputs and crop[:2] != (0, mask.seq_q):
                crop, rectangle = None, mask  # its backward pass takes the output it returned
            mask = rectangle
            problem = replace(problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
        self.require_kind(mask)
        if selects:
            return bound_selector.prepare(self, subproblem)
        reason = self.impl.unsupported(problem, mask, self.device)
        if reason is not None:
            raise Unsupported(reason)
        plan = self.impl.prepare(mask, problem, self.device)
        return Planned(plan, problem, mask, subproblem.area, crop, subproblem.world.kv_heads)

    def require_local_kind(self, mask: Mask) -> None:
        """:meth:`require_kind` of the mask that :meth:`prepare` would plan for this one."""
        if isinstance(mask, AttnMask) and not (self.info.selects or self.info.paged):
            _, mask = native_rectangle(mask)
        self.require_kind(mask)

    def require_kind(self, mask: Mask) -> None:
        """Raise an Unsupported if the declaration rules out masks of this kind."""
        if declared_kind(self.info, mask) not in self.info.masks:
            takes = ", ".join(self.info.masks)
            kind = "differs from head to head" if per_head(mask) else f"is {mask.kind}"
            raise Unsupported(f"{self.info.name} takes {takes} masks; this one {kind}")

    def forward(self, qkv: QKV | MixerInputs, plan: Any) -> OutLse:
        """See :meth:`Operator.forward`."""
        import torch

        if isinstance(qkv, MixerInputs):
            return self.mix(qkv, plan)
        q = qkv.q
        out, lse = self.forward_cropped(qkv, plan)
        if plan.crop is None or out.shape[1] == q.shape[1]:
            return out, lse
        q0, q1, _, _ = plan.crop
        if lse is not None:
            cropped_lse, (b, h, _) = lse, lse.shape
            lse = torch.full((b, h, q.shape[1]), -torch.inf, dtype=lse.dtype, device=lse.device)
            lse[:, :, q0:q1] = cropped_lse
        return padded(out, q.shape[1], q0, q1), lse

    def bind(self, problem: Problem) -> BoundMixer:
        """The functions of runs of tokens of a sequence mixer.

        Raises:
            Unsupported: if it has none.
        """
        bind = getattr(self.impl, "bind", None)
        if bind is None:
            raise Unsupported(f"{self.info.name} computes no summaries of runs of tokens")
        mixer: BoundMixer = bind(problem, self.device)
        return mixer

    def decays(self, problem: Problem) -> torch.Tensor | None:
        """``[H]`` log decays of a mixer that has its own where no g is given, else None."""
        decays = getattr(self.impl, "decays", None)
        found: torch.Tensor | None = None if decays is None else decays(problem, self.device)
        return found

    def mix(self, x: MixerInputs, plan: Planned) -> OutLse:
        """The forward pass of a sequence mixer: out and the last state."""
        return self.impl.forward(x, plan.plan)  # type: ignore[arg-type]

    def mix_backward(self, x: MixerBackwardInputs, plan: Planned) -> Gradients:
        """Its backward pass: a gradient for each input."""
        return self.impl.backward(x, plan.plan)  # type: ignore[arg-type]

    def forward_cropped(self, qkv: QKV, plan: Planned) -> OutLse:
        """As :meth:`forward`, for the queries of ``plan.crop`` only."""
        q, k, v = qkv
        self.pairs += plan.area * q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            q, k, v = q[:, q0:q1], k[:, k0:k1], v[:, k0:k1]
        k, v = (repeat_heads(x, plan.kv_heads) for x in (k, v))
        if plan.order is not None:
            return bound_selector.forward(self, QKV(q, k, v), plan)
        return self.call(QKV(q, k, v), plan)

    def call(self, qkv: QKV, plan: Planned) -> OutLse:
        return self.impl.forward(qkv, plan.plan)

    def backward(self, x: BackwardInputs | MixerBackwardInputs, plan: Any) -> Gradients:
        """See :meth:`Operator.backward`."""
        if isinstance(x, MixerBackwardInputs):
            return self.mix_backward(x, plan)
        dq, dk, dv = self.backward_cropped(x, plan)
        if plan.crop is None:
            return dq, dk, dv
        q0, q1, k0, k1 = plan.crop
        tokens = x.k.shape[1]
        dk, dv = padded(dk, tokens, k0, k1), padded(dv, tokens, k0, k1)
        return padded(dq, x.q.shape[1], q0, q1), dk, dv

    def backward_cropped(self, x: BackwardInputs, plan: Planned) -> Gradients:
        """As :meth:`backward`, for the queries and keys of ``plan.crop`` only."""
        self.pairs += plan.area * x.q.shape[2]
        if plan.crop is not None:
            q0, q1, k0, k1 = plan.crop
            dout, q, out = (_rows(tensor, q0, q1) for tensor in (x.dout, x.q, x.out))
            lse: Any = x.lse  # None for operators that return none
            lse = lse[:, :, q0:q1].contiguous() if lse is not None else None
            x = BackwardInputs(dout, q, x.k[:, k0:k1], x.v[:, k0:k1], out, lse)
        if not plan.kv_heads:
            return self._backward(x, plan)
        k, v = (repeat_heads(kv, plan.kv_heads) for kv in (x.k, x.v))
        dq, dk, dv = self._backward(x._replace(k=k, v=v), plan)
        dk, dv = (sum_repeated_heads(dkv, plan.kv_heads) for dkv in (dk, dv))
        return dq, dk, dv

    def _backward(self, x: BackwardInputs, plan: Planned) -> Gradients:
        if plan.order is not None:
            return bound_selector.backward(self, x, plan)
        return self.call_backward(x, plan)

    def call_backward(self, x: BackwardInputs, plan: Planned) -> Gradients:
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
        """Add gradients to their float32 sum in place, a flat tensor that holds all of them (see
        :func:`unpacked`); None starts a new one."""
        starts = total is None
        total = self.empty_sum(gradients) if total is None else total
        sums = unpacked(total, [gradient.shape for gradient in gradients])
        for accumulated, gradient in zip(sums, gradients, strict=True):
            accumulated.copy_(gradient) if starts else accumulated.add_(gradient)
        return total

    def empty_sum(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Uninitialised memory for :meth:`sum_float32`."""
        import torch

        return self.empty((sum(gradient.numel() for gradient in gradients),), torch.float32)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory for partial results."""
        import torch

        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    output_with_delta = staticmethod(output_with_delta)

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`cpbench.parallel.partial_results.merge.merge`."""
        return merge(out, lse, partial, partial_lse)

    def forward_accumulator(self, q: torch.Tensor, value_dim: int = 0) -> ForwardAccumulator:
        """Accumulate attention of these queries over disjoint subsets of keys, whose values have
        this head_dim (0: that of q)."""
        return self.forward_accumulator_type(self, q, value_dim)

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
