"""Tensors without data that know their strides, and what torch launches for each operation on them.

A recording of hundreds of ranks has millions of operations, of few kinds: each is run once, on
torch's device ``meta``, and its result and its side work are remembered.  The most frequent ones,
whose shapes are many, are written out.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from cpbench.parallel.tracing.shape_tensor import META, DatalessTensor, frozen, on_meta
from cpbench.simulator.events import Program, Recorder, SideWork
from cpbench.simulator.side_work.launches import SideWorkMode


class StridedTensor(DatalessTensor):
    """A shape, strides and a dtype; made by :func:`strided_tensor`.

    Its operations add their side work to the recorder of :func:`recording_side_work`.
    """

    __slots__ = ("is_dense", "strides")

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super().__init__(torch.Size(shape), dtype)
        self.strides = strides
        dense = zip(self.shape, strides, _dense_strides(shape), strict=True)
        self.is_dense = 0 in shape or all(size == 1 or own == other for size, own, other in dense)

    @classmethod
    def _call(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if kwargs or not _HASHABLE.issuperset(map(type, args)):
            args = [frozen(x, strided) for x in args]
            kwargs = {name: frozen(x, strided) for name, x in kwargs.items()}
        result, works = _remembered(function, *args, **kwargs)
        if works and (recorder := _recorder.get()):
            for work in works:
                recorder.add(work)
        return result

    def on_meta(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)

    def __getitem__(self, index: Any) -> Any:
        items = index if type(index) is tuple else (index,)
        shape, strides = list(self.shape), list(self.strides)
        if len(items) > len(shape):
            return self._call(_GET_ITEM, (self, index), {})
        for dim, item in enumerate(items):
            if type(item) is not slice or (item.step or 1) < 1:
                return self._call(_GET_ITEM, (self, index), {})
            start, stop, step = item.indices(shape[dim])
            shape[dim] = len(range(start, stop, step))
            strides[dim] *= step
        return strided_tensor(tuple(shape), tuple(strides), self.dtype)

    def narrow(self, dim: int, start: int, length: int) -> StridedTensor:
        shape = list(self.shape)
        if not 0 <= start <= start + length <= shape[dim]:
            result: StridedTensor = self._call(torch.Tensor.narrow, (self, dim, start, length), {})
            return result
        shape[dim] = length
        return strided_tensor(tuple(shape), self.strides, self.dtype)

    def transpose(self, dim0: int, dim1: int) -> StridedTensor:
        shape, strides = list(self.shape), list(self.strides)
        for values in (shape, strides):
            values[dim0], values[dim1] = values[dim1], values[dim0]
        return strided_tensor(tuple(shape), tuple(strides), self.dtype)

    def new_empty(self, *size: Any, dtype: torch.dtype | None = None) -> StridedTensor:
        shape = tuple(size[0] if size and not isinstance(size[0], int) else size)
        return _dense_tensor(shape, dtype or self.dtype)

    def contiguous(self) -> StridedTensor:
        return self if self.is_dense else self._copied(_dense_tensor(self.shape, self.dtype))

    def float(self) -> StridedTensor:
        return self.to(torch.float32)

    def to(self, dtype: Any) -> StridedTensor:
        if dtype is self.dtype:
            return self
        if isinstance(dtype, torch.dtype) and self.is_dense and self.nbytes:
            return self._copied(strided_tensor(tuple(self.shape), self.strides, dtype))
        result: StridedTensor = self._call(torch.Tensor.to, (self, dtype), {})
        return result

    def _copied(self, result: StridedTensor) -> StridedTensor:
        _add_stream(self.nbytes + result.nbytes)
        return result

    def add_(self, other: Any, **kwargs: Any) -> StridedTensor:
        return self._updated(torch.Tensor.add_, other, kwargs)

    def copy_(self, other: Any, **kwargs: Any) -> StridedTensor:
        return self._updated(torch.Tensor.copy_, other, kwargs)

    def _updated(self, function: Any, other: Any, kwargs: dict[str, Any]) -> StridedTensor:
        """This tensor, in place, from another one."""
        if kwargs or type(other) is not StridedTensor or other.shape != self.shape:
            result: StridedTensor = self._call(function, (self, other), kwargs)
            return result
        _add_stream(2 * self.nbytes + other.nbytes)
        return self


_GET_ITEM = torch.Tensor.__getitem__
# What a remembered argument may be as it is; of others, values of different types may be equal.
_HASHABLE = {StridedTensor, int, float, bool, str, torch.dtype, type(None)}


@functools.lru_cache(maxsize=1 << 14)
def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a tensor whose elements are one after another."""
    sizes = (max(size, 1) for size in shape[:0:-1])
    return tuple(itertools.accumulate(sizes, operator.mul, initial=1))[::-1] if shape else ()


def _dense_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> StridedTensor:
    return strided_tensor(shape, _dense_strides(shape), dtype)


def _add_stream(nbytes: int) -> None:
    """Record an operation that reads and writes so many bytes."""
    if recorder := _recorder.get():
        recorder.add(SideWork(stream=nbytes, launches=1))


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
