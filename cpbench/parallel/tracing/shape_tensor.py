"""Tensors that are a shape and a dtype and nothing else, with which strategies are traced.

Tensors of torch on the device ``meta`` are as much, but many of their operations are Python code
that takes a fraction of a millisecond, and a trace of 1,024 ranks has millions.  Here tensors of
one shape and dtype are one object, and the result of an operation is that of ``meta``, remembered;
the most frequent operations are written out.  Strides are not kept: what fails on strided tensors
alone is found by the memory trace, which runs on ``meta``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from cpbench.parallel.meta_ops import MetaOps

META = torch.device("meta")
OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "pow", "neg",
    "matmul", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "invert",
)  # fmt: skip
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv")
MOST_VIEWS = 1024  # of a tensor that are remembered
IN_PLACE_METHODS = ("add_", "copy_", "mul_", "zero_")  # those that are frequent


class ShapeTensor:
    """What strategies use of :class:`torch.Tensor`, without data; made by :func:`shape_tensor`."""

    __slots__ = ("_views", "dtype", "nbytes", "shape")

    device = META

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._views: dict[tuple[int, int], ShapeTensor] = {}

    def __repr__(self) -> str:
        return f"<ShapeTensor {list(self.shape)} {self.dtype}>"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.cat:
            return _cat(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch.Tensor, name)
        if not callable(attribute):
            return _call(getattr, (self, name), {})
        if name.endswith("_") and not name.endswith("__"):
            return self._in_place
        return lambda *args, **kwargs: _call(attribute, (self, *args), kwargs)

    def _in_place(self, *args: Any, **kwargs: Any) -> ShapeTensor:
        return self

    def __getitem__(self, index: Any) -> ShapeTensor:
        items = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(item, slice) for item in items):
            result: ShapeTensor = _call(torch.Tensor.__getitem__, (self, index), {})
            return result
        sizes = [
            len(range(*item.indices(size))) for item, size in zip(items, self.shape, strict=False)
        ]
        return shape_tensor((*sizes, *self.shape[len(items) :]), self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[ShapeTensor]:
        return iter(self.unbind(0))

    def numel(self) -> int:
        return math.prod(self.shape)

    def contiguous(self) -> ShapeTensor:
        return self

    def float(self) -> ShapeTensor:
        return shape_tensor(self.shape, torch.float32)

    def to(self, dtype: Any) -> ShapeTensor:
        if dtype is self.dtype or not isinstance(dtype, torch.dtype):
            return self
        return shape_tensor(self.shape, dtype)

    def new_empty(self, *size: Any, dtype: torch.dtype | None = None) -> ShapeTensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        return shape_tensor(tuple(shape), dtype or self.dtype)

    new_zeros = new_empty

    def narrow(self, dim: int, start: int, length: int) -> ShapeTensor:
        assert start + length <= self.shape[dim]
        view = self._views.get((dim, length))
        if view is None:
            if length == self.shape[dim]:
                return self
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            shape = list(self.shape)
            shape[dim] = length
            view = self._views[dim, length] = shape_tensor(tuple(shape), self.dtype)
        return view

    def transpose(self, dim0: int, dim1: int) -> ShapeTensor:
        shape = list(self.shape)
        shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
        return shape_tensor(tuple(shape), self.dtype)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)
    return lambda self, *args: _call(function, (self, *args), {})


for _name in OPERATORS:
    setattr(ShapeTensor, f"__{_name}__", _operator(f"__{_name}__"))
for _name in IN_PLACE_OPERATORS:
    setattr(ShapeTensor, f"__{_name}__", ShapeTensor._in_place)
for _name in IN_PLACE_METHODS:
    setattr(ShapeTensor, _name, ShapeTensor._in_place)


@functools.lru_cache(maxsize=1 << 16)
def shape_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> ShapeTensor:
    """The tensor of this shape and dtype."""
    return ShapeTensor(torch.Size(shape), dtype)


class _Slice(NamedTuple):
    """A slice, which can be hashed."""

    start: Any
    stop: Any
    step: Any


class _List(tuple[Any, ...]):
    """A list, which can be hashed."""

    __slots__ = ()


def _cat(tensors: Sequence[Any], dim: int = 0) -> ShapeTensor:
    """``torch.cat``."""
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return shape_tensor(tuple(shape), first.dtype)


def _call(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch, in place of whose tensors there are others."""
    return _result(
        function, *map(_frozen, args), **{name: _frozen(x) for name, x in kwargs.items()}
    )


@functools.lru_cache(maxsize=1 << 14, typed=True)
def _result(function: Any, *args: Any, **kwargs: Any) -> Any:
    with MetaOps():
        result = function(*map(_thawed, args), **{name: _thawed(x) for name, x in kwargs.items()})
    return tree_map(without_data, result)


def without_data(x: Any) -> Any:
    """A tensor of torch as one of this module; anything else as it is."""
    return shape_tensor(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


def _frozen(x: Any) -> Any:
    """An argument as something that can be hashed."""
    if isinstance(x, slice):
        return _Slice(x.start, x.stop, x.step)
    if isinstance(x, list | tuple):
        return (_List if isinstance(x, list) else tuple)(map(_frozen, x))
    return without_data(x)


def _thawed(x: Any) -> Any:
    """The inverse of :func:`_frozen`, with tensors of torch."""
    if isinstance(x, ShapeTensor):
        return torch.empty(x.shape, dtype=x.dtype, device=META)
    if isinstance(x, _Slice):
        return slice(*x)
    if isinstance(x, tuple):
        return (list if isinstance(x, _List) else tuple)(map(_thawed, x))
    return x
