"""Operators as the public functions bind them: autograd records those that it differentiates, and
on CPUs NaN and infinities reach exactly what depends on them.

Kernels work on tiles, in which a pair that is not visible has probability 0, and 0 times a NaN is a
NaN: so a NaN in padding reaches real tokens.  Some kernels also drop a NaN.  On a CPU it costs one
sum over q, k and v to know that there is none; otherwise the float64 reference computes instead.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cpbench.core.operator import QKV, BackwardInputs, Unsupported
from cpbench.core.registry import implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.partial_results.accumulators import Planned

if TYPE_CHECKING:
    from cpbench.core.operator import Gradients, OutLse


def are_finite(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether all sums are finite; if they are, so are all values."""
    return all(math.isfinite(float(x.detach().sum(dtype=_sum_dtype(x)))) for x in tensors)


def autograd_records(op: BoundOperator, qkv: QKV, plan: Planned) -> bool:
    """Whether autograd records the forward pass of a :class:`PublicOperator`, if gradients are
    enabled."""
    recordable = hasattr(op.impl, "differentiable_forward") and plan.mask.kind != "empty"
    return recordable and (op.device != "cpu" or are_finite(qkv))


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class PublicOperator(BoundOperator):
    """An operator that leaves inputs that are not finite to the reference, on a CPU."""

    @classmethod
    def load(cls, spec: Spec | str, device: str) -> BoundOperator:
        name = Spec.parse(spec).name
        if operator_info(name).mixer:
            raise Unsupported(f"{name} is a sequence mixer, which cpbench.mix computes")
        return super().load(spec, device)

    def call(self, qkv: QKV, plan: Planned) -> OutLse:
        if torch.is_grad_enabled() and autograd_records(self, qkv, plan):
            result: OutLse = self.impl.differentiable_forward(qkv, plan.plan)  # type: ignore[attr-defined]
            return result
        if self.device != "cpu" or are_finite(qkv):
            return super().call(qkv, plan)
        if self.info.selects:
            return self._attend_to_selection(qkv, plan)
        reference = _reference()
        out, lse = reference.forward(qkv, reference.prepare(plan.mask, plan.problem, self.device))
        has_lse = self.info.mergeable and "cpu" in self.info.lse_on
        return out, lse if has_lse else None

    def call_backward(self, x: BackwardInputs, plan: Planned) -> Gradients:
        if self.device != "cpu" or are_finite((*x.qkv, x.dout)):
            return super().call_backward(x, plan)
        if self.info.selects:
            out, _ = self._attend_to_selection(x.qkv, plan)
            return self.impl.backward(x._replace(out=out), plan.plan)
        reference = _reference()
        reference_plan = reference.prepare(plan.mask, plan.problem, self.device)
        if x.lse is None:
            out, lse = reference.forward(x.qkv, reference_plan)
            x = x._replace(out=out, lse=lse)
        gradients: Gradients = reference.backward(x, reference_plan)
        return gradients

    def _attend_to_selection(self, qkv: QKV, plan: Planned) -> OutLse:
        """Select from inputs with 0 in place of what is not finite, and attend with the true
        ones."""
        selector: Any = self.impl
        finite = QKV(*(x.nan_to_num(0.0, 0.0, 0.0) for x in qkv))
        branches = selector.select_from(finite, plan.plan)
        kernels = dict.fromkeys(plan.plan.kernels, (operator_info("reference"), _reference()))
        result: OutLse = selector.attend_to(qkv, branches, replace(plan.plan, kernels=kernels))
        return result


def _reference() -> Any:
    return implementation(operator_info("reference"), {})
