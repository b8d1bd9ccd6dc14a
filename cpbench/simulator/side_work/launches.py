"""The side work of operators of torch, seen by a dispatch mode."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cpbench.parallel.tracing.meta_ops import MetaOps
from cpbench.simulator.events import Recorder, SideWork

# Operators of torch that move no data, and those that read or write by an index.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"}
GATHERS = {"index_select", "gather", "index", "take_along_dim", "embedding"}
SCATTERS = {"index_copy_", "index_add_", "scatter_", "scatter_add_", "index_put_", "index_fill_"}


class SideWorkMode(MetaOps):
    """Records what torch would launch: each operator that computes is one kernel that reads each of
    its inputs and writes each of its outputs once; views and uninitialised memory are none."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name, is_free = _kind(func)
        if not is_free:
            self._recorder.add(side_work(name, args, kwargs or {}, result))
        return result


@functools.cache
def _kind(func: Any) -> tuple[str, bool]:
    """The name of an operator of torch, and whether it moves no data."""
    arguments = func._schema.arguments
    name: str = func._schema.name.removeprefix("aten::")
    is_view = any(x.alias_info and not x.alias_info.is_write for x in arguments)
    return name, is_view or name in FREE


def side_work(name: str, args: Any, kwargs: Any, result: Any) -> SideWork:
    """The side work of one operator of torch."""
    outputs = _tensors((result,))
    fills = name.startswith("new_") or name.endswith("_like")
    inputs = [] if fills else _tensors((*args, *kwargs.values()))
    if name in GATHERS:  # of the source only what is selected
        return SideWork(gather=2 * sum(x.nbytes for x in outputs), launches=1)
    if name in SCATTERS:
        return SideWork(scatter=2 * inputs[-1].nbytes, launches=1)
    return SideWork(stream=sum(x.nbytes for x in (*inputs, *outputs)), launches=1)


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among arguments of an operator of torch, and in lists of them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
