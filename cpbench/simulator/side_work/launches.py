"""The side work of operators of torch, seen by a dispatch mode."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.parallel.tracing import meta_ops
from cpbench.simulator.events import Recorder, SideWork

# Operators of torch that move no data, those that read or write by an index, and those that change
# their first argument and return it.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"}
GATHERS = {"index_select", "gather", "index", "take_along_dim", "embedding"}
SCATTERS = {"index_copy_", "index_add_", "scatter_", "scatter_add_", "index_put_", "index_fill_"}
IN_PLACE = {"add_", "sub_", "mul_", "div_", "neg_", "exp_", "copy_", "zero_", "fill_"}


class SideWorkMode(TorchDispatchMode):
    """Records what torch would launch: each operator that computes is one kernel that reads each of
    its inputs and writes each of its outputs once; views and uninitialised memory are none.
    In-place operators return their first argument: without data there is nothing to compute."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, which takes seconds, only to disable it inside a mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, is_free, in_place = _kind(func)
        if in_place and args[0].is_meta:
            result = args[0]
            assert all(_fits(x, result) for x in _tensors(args[1:]))
        else:
            result = meta_ops.call(func, args, kwargs or {})
        if not is_free:
            self._recorder.add(side_work(name, args, kwargs or {}, result))
        return result


@functools.cache
def _kind(func: Any) -> tuple[str, bool, bool]:
    """The name of an operator of torch, whether it moves no data, and whether it is in place."""
    arguments = func._schema.arguments
    name: str = func._schema.name.removeprefix("aten::")
    is_view = any(x.alias_info and not x.alias_info.is_write for x in arguments)
    return name, is_view or name in FREE, name in IN_PLACE


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


def _fits(x: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether values of one shape can be written to another in place."""
    return x.shape == target.shape or (
        torch.broadcast_shapes(x.shape, target.shape) == target.shape
    )


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among arguments of an operator of torch, and in lists of them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
