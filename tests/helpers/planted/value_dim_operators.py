"""Operators for values of another head_dim than queries and keys: a right one, and wrong ones."""

from __future__ import annotations

from typing import Any

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference


class WithoutLanesOfValuesAlone(Reference):
    """Beyond a thousand tokens, lanes of out that queries and keys do not have are 0."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        out[:, 1000:, :, qkv.q.shape[3] :] = 0
        return out, lse


class GradientsWithoutThem(Reference):
    """The same for dv."""

    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        dq, dk, dv = super().backward(x, plan)
        dv[:, 1000:, :, x.q.shape[3] :] = 0
        return dq, dk, dv


class LikeQueries(Reference):
    """out has the shape of q."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out, lse = super().forward(qkv, plan)
        return out[..., : qkv.q.shape[3]].contiguous(), lse


def _info(name: str, load: Any) -> OperatorInfo:
    return OperatorInfo(name=name, summary="for tests", source="tests", load=load, value_dims=True)


right = _info("right", Reference)
out_lanes = _info("out_lanes", WithoutLanesOfValuesAlone)
dv_lanes = _info("dv_lanes", GradientsWithoutThem)
like_queries = _info("like_queries", LikeQueries)
