"""Strategies that are right and distort what is measured of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.strategies.ring import STRATEGY, Ring


class SendsBehindComm(Ring):
    """Also reduces 4000 bytes over all ranks, which neither its communicator nor its trace sees."""

    def forward(self, qkv: QKV, plan: Any, op: Any, comm: Any, need_lse: bool) -> Any:
        if qkv.q.device.type != "meta":
            dist.all_reduce(torch.ones(1000))
        return super().forward(qkv, plan, op, comm, need_lse)


sends_behind_comm = StrategyInfo(
    name="sends_behind_comm", summary="sends more than it counts", source="tests",
    load=SendsBehindComm, layouts=STRATEGY.layouts, merges=STRATEGY.merges,
)  # fmt: skip
