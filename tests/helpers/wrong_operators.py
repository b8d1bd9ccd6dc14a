"""Operators with one defect each, to show that the checks find it."""

from __future__ import annotations

from typing import Any

import torch

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference


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


class OtherHeads(Reference):
    """Garbage in all heads but one, beyond a thousand tokens."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        out[:, 1000:, 1:] = 7.0
        return out, lse


class ForgetsTheLastTile(Reference):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        if q.shape[1] > 1000:
            out[:, q.shape[1] // 128 * 128 :] = 0
        return out, lse


class OneHeadOff(Reference):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        out[:, :, 3] *= 1.04
        return out, lse


class OverwritesItsInput(Reference):
    """Right the first time, and never again."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        v.zero_()
        return out, lse


class RightWhenWatched(Reference):
    """Wrong from the third call at one size on, as a stale buffer would be."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> Any:
        out, lse = super().forward(q, k, v, plan)
        self.calls += 1
        return (out if self.calls < 4 else out * 0), lse


far_rows = _info("far_rows", ForgetsFarRows)
far_keys = _info("far_keys", DropsFarKeyGradients)
scales_twice = _info("scales_twice", ScalesTwice)
log_two = _info("log_two", LogTwo)
one_element = _info("one_element", OneBadElement)
not_a_number = _info("not_a_number", NotANumber)
other_heads = _info("other_heads", OtherHeads)
last_tile = _info("last_tile", ForgetsTheLastTile)
one_head = _info("one_head", OneHeadOff)
overwrites = _info("overwrites", OverwritesItsInput)
when_watched = _info("when_watched", RightWhenWatched)
native = OperatorInfo(
    name="native",
    summary="full and causal only",
    source="tests",
    load=Reference,
    masks=("empty", "full", "causal"),
)
right = _info("right", Reference)
