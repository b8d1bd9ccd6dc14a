"""Operators with one defect each, which the checks must find."""

from __future__ import annotations

from typing import Any

import torch

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference


def _info(name: str, load: Any) -> OperatorInfo:
    return OperatorInfo(name=name, summary="deliberately wrong", source="tests", load=load)


class WrongFarRows(Reference):
    """Right for the first thousand queries, so only a check at size finds it."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, 1000:] *= 1.01
        return out, lse


class ZeroFarKeyGradients(Reference):
    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        dq, dk, dv = super().backward(x, plan)
        dk[:, 1000:] = 0
        return dq, dk, dv


class ScaledTwice(Reference):
    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        dq, dk, dv = super().backward(x, plan)
        return dq * plan.scale, dk, dv


class BaseTwoLse(Reference):
    """lse in base two, as some libraries return it."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return out, lse / 0.6931471805599453


class OneWrongElement(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[0, out.shape[1] // 2, 0, 0] += 0.5 * out.std()
        return out, lse


class NanElement(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[0, 0, 0, 0] = torch.nan
        return out, lse


class WrongOtherHeads(Reference):
    """A constant in all heads but one, beyond a thousand tokens."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, 1000:, 1:] = 7.0
        return out, lse


class ZeroLastTile(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        queries = qkv.q.shape[1]
        if queries > 1000:
            out[:, queries // 128 * 128 :] = 0
        return out, lse


class OneWrongHead(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, :, 3] *= 1.04
        return out, lse


class OverwritesInput(Reference):
    """Overwrites v, so only the first call is right."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        qkv.v.zero_()
        return out, lse


class WrongLaterCalls(Reference):
    """Wrong from the third call at one size on, as a stale buffer would be."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        self.calls += 1
        return (out if self.calls < 4 else out * 0), lse


far_rows = _info("far_rows", WrongFarRows)
far_keys = _info("far_keys", ZeroFarKeyGradients)
scales_twice = _info("scales_twice", ScaledTwice)
log_two = _info("log_two", BaseTwoLse)
one_element = _info("one_element", OneWrongElement)
not_a_number = _info("not_a_number", NanElement)
other_heads = _info("other_heads", WrongOtherHeads)
last_tile = _info("last_tile", ZeroLastTile)
one_head = _info("one_head", OneWrongHead)
overwrites = _info("overwrites", OverwritesInput)
when_watched = _info("when_watched", WrongLaterCalls)
native = OperatorInfo(
    name="native",
    summary="full and causal only",
    source="tests",
    load=Reference,
    masks=("empty", "full", "causal"),
)
right = _info("right", Reference)
