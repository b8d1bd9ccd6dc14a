"""An operator that computes nothing: it counts the visible pairs of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cpbench.core.operator import MixerBackwardInputs, MixerInputs, state_dtype
from cpbench.core.registry import ANY_MASK, OperatorInfo
from cpbench.parallel.bound_operator import BoundOperator, native_rectangle
from cpbench.parallel.mixing import TracedMixer
from cpbench.parallel.partial_results.accumulators import BackwardAccumulator, ForwardAccumulator
from cpbench.parallel.tracing.shape_tensor import shape_tensor

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.parallel.mixing import BoundMixer
    from cpbench.parallel.world import Chunk, KeySubset, Subproblem


class TracedPlan(NamedTuple):
    """A plan of :class:`TracedOperator`: visible pairs, and ``kv_heads`` as for ``World``."""

    area: int
    kv_heads: tuple[int, ...] = ()


class _ForwardAccumulator(ForwardAccumulator):
    """Counts visible pairs and merges nothing."""

    def add(self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any) -> None:
        self._op.pairs += plan.area * self._q.shape[2]

    def add_partial(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        pass

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.empty_result()


class _BackwardAccumulator(BackwardAccumulator):
    """Counts visible pairs and merges nothing."""

    def add(
        self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._op.pairs += plan.area * self._q.shape[2]
        return k_BTGD, v_BTGD

    def add_partial(self, dq: torch.Tensor) -> None:
        pass

    def finish(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._op.empty(self._q.shape, dtype or self._q.dtype)


# What is traced: a declaration, or an operator with its parameters, which decide what is sent of a
# sequence mixer.
Traceable = OperatorInfo | BoundOperator


class TracedOperator(BoundOperator):
    """An operator that counts the visible pairs of its calls and computes nothing.

    Results of one shape and dtype are one tensor, as nothing is written to them.
    """

    forward_accumulator_type: type[ForwardAccumulator] = _ForwardAccumulator
    backward_accumulator_type: type[BackwardAccumulator] = _BackwardAccumulator

    def __init__(self, operator: Traceable, device: str = "meta") -> None:
        bound = operator if isinstance(operator, BoundOperator) else None
        info = bound.info if bound else cast("OperatorInfo", operator)
        super().__init__(info, bound and bound.impl, device)  # type: ignore[arg-type]
        # A declaration alone has prepared no plans that have shown which masks it takes.
        self._asks = not bound and not {*ANY_MASK} <= {*info.masks}
        self._empty: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and dtype."""
        key = tuple(shape), dtype
        if key not in self._empty:
            self._empty[key] = super().empty(shape, dtype)
        return self._empty[key]

    def bind(self, problem: Problem) -> BoundMixer:
        return TracedMixer(super().bind(problem))

    def prepare(self, subproblem: Subproblem | KeySubset | Chunk) -> TracedPlan:
        if self._asks:
            mask: Any = subproblem.mask
            cropped = mask.kind == "bands" and not (self.info.selects or self.info.paged)
            self.require_kind(native_rectangle(mask)[1] if cropped else mask)
        return TracedPlan(subproblem.area, subproblem.world.kv_heads)

    def sum_float32(
        self, total: torch.Tensor | None, gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        return self.empty_sum(gradients) if total is None else total

    def forward(self, qkv: QKV | MixerInputs, plan: Any) -> OutLse:
        q = qkv.q
        if isinstance(qkv, MixerInputs):
            (B, _, H, K), V = q.shape, qkv.v.shape[3]
            return self.empty(qkv.v.shape, q.dtype), self.empty((B, H, K, V), state_dtype(q))
        self.pairs += plan.area * q.shape[2]
        return self.forward_accumulator(q, qkv.v.shape[3]).empty_result()

    def backward(self, x: BackwardInputs | MixerBackwardInputs, plan: Any) -> Gradients:
        if isinstance(x, MixerBackwardInputs):
            return tuple(self.empty(y.shape, y.dtype) for y in x.inputs.given)
        self.pairs += plan.area * x.q.shape[2]
        dq, dk, dv = (self.empty(tensor.shape, tensor.dtype) for tensor in x.qkv)
        return dq, dk, dv

    @staticmethod
    def output_with_delta(dout_BSHD: torch.Tensor, delta_BSH: torch.Tensor) -> torch.Tensor:
        return dout_BSHD


class ShapeOperator(TracedOperator):
    """A :class:`TracedOperator` whose results are a shape and a dtype."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return cast("torch.Tensor", shape_tensor(tuple(shape), dtype))
