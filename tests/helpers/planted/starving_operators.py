"""An operator after whose call little memory is left: ``starving_operators.py:starves:call=2``."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

from cpbench.core.operator import QKV
from cpbench.core.registry import OperatorInfo, implementation, operator_info

M_MMAP_THRESHOLD = -3  # of mallopt
SMALL_TOKENS = 320


class Starves:
    """``bands``, which limits the memory of rank 1 between one call and the next.

    Args:
        call: number of the call at the measured size after which the memory is limited.
        mib: how much is left then.
    """

    def __init__(self, call: int, mib: int) -> None:
        self._bands: Any = implementation(operator_info("bands"), {})
        self._call, self._mib, self._calls = call, mib, 0
        # Freed blocks go back to the system, so that none are left to be used again.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bands, name)

    def forward(self, qkv: QKV, plan: Any) -> Any:
        unlimited = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
        result = self._bands.forward(qkv, plan)
        self._calls += qkv.k.shape[1] > SMALL_TOKENS
        if os.environ["RANK"] == "1" and self._calls == self._call:
            pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
            limit = pages * resource.getpagesize() + (self._mib << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited))
        return result


starves = OperatorInfo(
    name="starves", summary="leaves little memory", source="tests", load=Starves,
    params=("call", "mib"), masks=operator_info("bands").masks,
    lse_error=operator_info("bands").lse_error,
)  # fmt: skip
