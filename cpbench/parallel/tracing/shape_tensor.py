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
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from cpbench.parallel.tracing.meta_ops import MetaOps

META = torch.device("meta")
OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "pow", "neg",
    "matmul", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "invert",
)  # fmt: skip
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv")
MOST_VIEWS = 1024  # of a tensor that are remembered
CHANGE_SHAPE = {
    "as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_",
    "transpose_", "unsqueeze_",
}  # fmt: skip
IN_PLACE_METHODS = ("add_", "copy_", "mul_", "zero_")  # those that are frequent


class DatalessTensor:
    """What strategies use of :class:`torch.Tensor`, without data: every operation is that of a
    tensor on ``meta``, which a subclass calls (``_call``) and remembers."""

    __slots__ = ("dtype", "nbytes", "shape")

    device = META

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self.shape)} {self.dtype}>"

    @classmethod
    def _call(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return cls._call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch.Tensor, name)
        if not callable(attribute):
            return self._call(getattr, (self, name), {})
        return lambda *args, **kwargs: self._call(attribute, (self, *args), kwargs)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def numel(self) -> int:
        return math.prod(self.shape)

    def on_meta(self) -> torch.Tensor:
        """A tensor of torch that has this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device=META)


class ShapeTensor(DatalessTensor):
    """A shape and a dtype; made by :func:`shape_tensor`."""

    __slots__ = ("_views",)

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._views: dict[tuple[int, int], ShapeTensor] = {}

    @classmethod
    def _call(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function is torch.cat:
            return _cat(*args, **kwargs)
        return _result(
            function,
            *(frozen(x, without_data) for x in args),
            **{name: frozen(x, without_data) for name, x in kwargs.items()},
        )

    def __getattr__(self, name: str) -> Any:
        if name in CHANGE_SHAPE:
            raise TypeError(f"{name} changes the shape of a tensor that may be shared")
        if name.endswith("_") and not name.endswith("__"):
            return self._in_place
        return super().__getattr__(name)

    def _in_place(self, *args: Any, **kwargs: Any) -> ShapeTensor:
        return self

    def __getitem__(self, index: Any) -> ShapeTensor:
        items = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(item, slice) for item in items):
            result: ShapeTensor = self._call(torch.Tensor.__getitem__, (self, index), {})
            return result
        sizes = [
            len(range(*item.indices(size))) for item, size in zip(items, self.shape, strict=False)
        ]
        return shape_tensor((*sizes, *self.shape[len(items) :]), self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

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
    return lambda self, *args: self._call(function, (self, *args), {})


for _name in (*OPERATORS, *IN_PLACE_OPERATORS, "getitem", "setitem"):
    setattr(DatalessTensor, f"__{_name}__", _operator(f"__{_name}__"))
for _name in IN_PLACE_OPERATORS:
    setattr(ShapeTensor, f"__{_name}__", ShapeTensor._in_place)
for _name in IN_PLACE_METHODS:
    setattr(ShapeTensor, _name, ShapeTensor._in_place)


@functools.lru_cache(maxsize=1 << 16)
def shape_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> ShapeTensor:
    """The tensor of this shape and dtype."""
    return ShapeTensor(torch.Size(shape), dtype)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A slice, which can be hashed."""

    start: Any
    stop: Any
    step: Any


@dataclass(frozen=True, slots=True)
class _List:
    """A list, which can be hashed, and is equal to no tuple."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in a list or tuple that is equal to none of another type."""

    kind: type
    value: Any


def _cat(tensors: Sequence[Any], dim: int = 0) -> ShapeTensor:
    """``torch.cat``."""
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return shape_tensor(tuple(shape), first.dtype)


@functools.lru_cache(maxsize=1 << 14, typed=True)
def _result(function: Any, *args: Any, **kwargs: Any) -> Any:
    with MetaOps():
        return tree_map(without_data, on_meta(function, args, kwargs))


def without_data(x: Any) -> Any:
    """A tensor of torch as one of this module; anything else as it is."""
    return shape_tensor(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x


def on_meta(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function of torch for :func:`frozen` arguments, on tensors of torch."""
    return function(*map(_thawed, args), **{name: _thawed(x) for name, x in kwargs.items()})


def frozen(x: Any, tensor: Callable[[Any], Any]) -> Any:
    """An argument as something that can be hashed.

    Args:
        tensor: replaces tensors of torch, and returns anything else as it is.
    """
    if isinstance(x, DatalessTensor):
        return x
    if isinstance(x, slice):
        return _Slice(x.start, x.stop, x.step)
    if isinstance(x, list | tuple):
        items = tuple([
            _Number(type(one), one) if isinstance(one, bool | float) else frozen(one, tensor)
            for one in x
        ])  # fmt: skip
        return _List(items) if isinstance(x, list) else items
    return tensor(x)


def _thawed(x: Any) -> Any:
    """The inverse of :func:`frozen`, with tensors of torch."""
    if isinstance(x, DatalessTensor):
        return x.on_meta()
    if isinstance(x, _Slice):
        return slice(x.start, x.stop, x.step)
    if isinstance(x, _List):
        return list(map(_thawed, x.items))
    if isinstance(x, _Number):
        return x.value
    if isinstance(x, tuple):
        return tuple(map(_thawed, x))
    return x
