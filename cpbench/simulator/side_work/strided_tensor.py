"""Tensors without data that know their strides, and what torch launches for each operation on them.

A recording of hundreds of ranks has millions of operations, of few kinds: each is run once, on
torch's device ``meta``, and its result and its side work are remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from cpbench.parallel.tracing.shape_tensor import META, DatalessTensor, frozen, on_meta
from cpbench.simulator.events import Program, Recorder
from cpbench.simulator.side_work.launches import SideWorkMode


class StridedTensor(DatalessTensor):
    """A shape, strides and a dtype; made by :func:`strided_tensor`.

    Its operations add their side work to the recorder of :func:`recording_side_work`.
    """

    __slots__ = ("strides",)

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super().__init__(torch.Size(shape), dtype)
        self.strides = strides

    @classmethod
    def _call(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result, works = _remembered(
            function,
            *[frozen(x, strided) for x in args],
            **{name: frozen(x, strided) for name, x in kwargs.items()},
        )
        if recorder := _recorder.get():
            for work in works:
                recorder.add(work)
        return result

    def on_meta(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)


def strided(x: Any) -> Any:
    """A tensor of torch as a :class:`StridedTensor`; anything else as it is."""
    if isinstance(x, torch.Tensor):
        return strided_tensor(tuple(x.shape), x.stride(), x.dtype)
    return x


@functools.lru_cache(maxsize=1 << 16)
def strided_tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> StridedTensor:
    """The tensor of this shape, strides and dtype."""
    return StridedTensor(shape, strides, dtype)


@functools.lru_cache(maxsize=1 << 14, typed=True)
def _remembered(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Program]:
    """The result of a function of torch, and its side work."""
    recorder = Recorder()
    with _disable_current_modes(), SideWorkMode(recorder):
        result = on_meta(function, args, kwargs)
    return tree_map(strided, result), recorder.take()


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording_side_work(recorder: Recorder) -> Iterator[None]:
    """A context in which what torch would launch is recorded, of tensors on ``meta`` too."""
    token = _recorder.set(recorder)
    try:
        with SideWorkMode(recorder):
            yield
    finally:
        _recorder.reset(token)
