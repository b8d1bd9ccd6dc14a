"""A transport whose slowness is known, and attention over it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.parallel.comm import Comm, Handle, TorchComm
from cpbench.parallel.layout import build
from cpbench.parallel.world import World

TOKENS = 96


class _Late:
    def __init__(self, handle: Handle, when: float) -> None:
        self._handle, self._when = handle, when

    def wait(self) -> None:
        self._handle.wait()
        time.sleep(max(self._when - time.monotonic(), 0.0))


class SlowComm(TorchComm):
    """Every exchange that carries something takes so long."""

    seconds = 0.0

    def exchange(self, sends: Sequence[Any], recvs: Sequence[Any], what: str = "") -> Handle:
        handle = super().exchange(sends, recvs, what)
        return _Late(handle, time.monotonic() + self.seconds) if sends or recvs else handle


def attention(strategy: str, comm: Comm, direction: str = "fwd_bwd") -> Attention:
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=2, heads_kv=2, head_dim=8, dtype="float32",
        direction=direction,
    )  # fmt: skip
    mask = masks.build("causal", TOKENS)
    world = World.of(problem, mask, build("zigzag", TOKENS, comm.size, mask))
    return Attention("reference", strategy, world, comm.rank, "cpu")
