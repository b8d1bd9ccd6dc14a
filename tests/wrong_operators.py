"""Operators with one defect each, to show that the checks find it."""

from __future__ import annotations

from typing import Any

import torch

from cpbench.kernels.reference import Reference
from cpbench.registry import OperatorInfo


def _info(name: str, load: Any) -> OperatorInfo:
    return OperatorInfo(name=name, summary="wrong on purpose", source="tests", load=load)


class ForgetsFarRows(Reference):
    """Right for the first thousand queries: only a check at size can tell."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        out[:, 1000:] *= 1.01
        return out, lse


class DropsFarKeyGradients(Reference):
    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, plan: Any) -> Any:
        dq, dk, dv = super().backward(dout, q, k, v, out, lse, plan)
        dk[:, 1000:] = 0
        return dq, dk, dv


class ScalesTwice(Reference):
    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, plan: Any) -> Any:
        dq, dk, dv = super().backward(dout, q, k, v, out, lse, plan)
        return dq * plan.scale, dk, dv


class LogTwo(Reference):
    """lse in base two, as some libraries return it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        return out, lse / 0.6931471805599453


class OneBadElement(Reference):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        out[0, out.shape[1] // 2, 0, 0] += 0.5 * out.std()
        return out, lse


class NotANumber(Reference):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        out[0, 0, 0, 0] = torch.nan
        return out, lse


far_rows = _info("far_rows", ForgetsFarRows)
far_keys = _info("far_keys", DropsFarKeyGradients)
scales_twice = _info("scales_twice", ScalesTwice)
log_two = _info("log_two", LogTwo)
one_element = _info("one_element", OneBadElement)
not_a_number = _info("not_a_number", NotANumber)
right = _info("right", Reference)
