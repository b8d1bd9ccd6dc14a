"""Operators that are right and distort what is measured of them, or of operators after them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from cpbench.core.operator import QKV
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference

MIB = 1 << 20


class SetsThreads(Reference):
    """Gives itself a second thread, and the operators after it."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        torch.set_num_threads(2)
        return super().forward(qkv, plan)


class UsesThreads(Reference):
    """Computes with a second thread and leaves no trace in the state."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        for _ in range(20):
            torch.ones(1 << 20).exp_()
        torch.set_num_threads(threads)
        return super().forward(qkv, plan)


class SetsVariable(Reference):
    def prepare(self, mask: Any, problem: Any, device: str) -> Any:
        os.environ["OMP_PROC_BIND"] = "close"
        return super().prepare(mask, problem, device)


class SeesDefaults(Reference):
    """Refuses where an operator before it has left something."""

    def unsupported(self, problem: Any, mask: Any, device: str) -> str | None:
        if (torch.get_num_threads(), os.environ.get("OMP_PROC_BIND")) != (1, None):
            return "the state of the process has changed"
        return super().unsupported(problem, mask, device)


class HoldsWorkspace(Reference):
    """Has a workspace of 64 MiB from the start, and one of 32 MiB since its first call."""

    def __init__(self) -> None:
        self.workspace = torch.zeros(64 * MIB // 4)
        self.later: Any = None

    def forward(self, qkv: QKV, plan: Any) -> Any:
        if self.later is None:
            self.later = torch.zeros(32 * MIB // 4)
        return super().forward(qkv, plan)


WORKSPACES: list[torch.Tensor] = []  # of a module, which is imported once


class HoldsInModule(Reference):
    def forward(self, qkv: QKV, plan: Any) -> Any:
        if not WORKSPACES:
            WORKSPACES.append(torch.zeros(16 * MIB // 4))
        return super().forward(qkv, plan)


class SeesItsGroup(Reference):
    """Refuses where there is more than one process group of some ranks, that of its own case."""

    def unsupported(self, problem: Any, mask: Any, device: str) -> str | None:
        from torch.distributed import distributed_c10d as c10d

        names = [name for name in c10d._world.pg_names.values() if name.startswith("cpbench part")]
        return f"there are {names}" if names[1:] else super().unsupported(problem, mask, device)


class HoldsArray(Reference):
    def __init__(self) -> None:
        self.buffers = [np.zeros(48 * MIB, dtype=np.uint8)]


class AllocatesArrays(Reference):
    """Computes on 256 MiB that torch has not allocated."""

    def forward(self, qkv: QKV, plan: Any) -> Any:
        np.ones(256 * MIB, dtype=np.uint8).sum()
        return super().forward(qkv, plan)


def _info(name: str, load: Any) -> OperatorInfo:
    return OperatorInfo(name=name, summary="distorts measurements", source="tests", load=load)


sets_threads = _info("sets_threads", SetsThreads)
uses_threads = _info("uses_threads", UsesThreads)
sets_variable = _info("sets_variable", SetsVariable)
sees_defaults = _info("sees_defaults", SeesDefaults)
sees_its_group = _info("sees_its_group", SeesItsGroup)
holds_workspace = _info("holds_workspace", HoldsWorkspace)
holds_in_module = _info("holds_in_module", HoldsInModule)
holds_array = _info("holds_array", HoldsArray)
allocates_arrays = _info("allocates_arrays", AllocatesArrays)
honest = _info("honest", Reference)
