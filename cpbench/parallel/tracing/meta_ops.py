"""Results of torch's operators on tensors without data.

On the device ``meta`` torch computes most results by Python code, the first time after it has
imported its compiler, which takes a second of every process.  The operators that strategies use are
written out here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ARITHMETIC = {
    "add", "sub", "rsub", "mul", "div", "neg", "pow", "exp", "log", "log1p", "sigmoid", "maximum",
    "minimum", "logaddexp", "nan_to_num",
}  # fmt: skip
FILLS = {"copy_", "zero_", "fill_"}
LIKE = {"empty_like", "zeros_like"}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}


def call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` of an operator of ATen, some of whose arguments are tensors."""
    result = None
    kind = _kind(func)
    if kind == "like":
        result = _like(*args, **kwargs)
    elif kind and not kwargs:
        known = KNOWN.get(kind)
        result = known(*args) if known else _pointwise(kind, args)
    return func(*args, **kwargs) if result is None else result


@functools.cache
def _kind(func: Any) -> str:
    """A key of ``KNOWN``, ``"like"``, ``"in place"``, ``"arithmetic"`` or ``"comparison"``; else
    ""."""
    name: str = func._schema.name.removeprefix("aten::")
    if name in KNOWN:
        return name
    if name in LIKE:
        return "like"
    if name in FILLS or name.removesuffix("_") in ARITHMETIC:
        return "in place" if name.endswith("_") else "arithmetic"
    return "comparison" if name in COMPARISONS else ""


def _pointwise(kind: str, args: Sequence[Any]) -> torch.Tensor | None:
    """The result for floating-point tensors and numbers."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    first = tensors[0]
    if any(not x.is_meta or not x.is_floating_point() for x in tensors):
        return None
    if any(isinstance(x, complex) for x in args):
        return None
    shape = _broadcast(*tensors)
    if shape is None:
        return None
    if kind == "in place":
        return first if first is args[0] and first.shape == shape else None
    dtypes = {x.dtype for x in tensors if x.dim()} or {x.dtype for x in tensors}
    dtype = torch.bool if kind == "comparison" else functools.reduce(torch.promote_types, dtypes)
    if all(map(_in_order, tensors)):
        return first.new_empty(shape, dtype=dtype)
    like = first if first.dim() else tensors[-1]
    if all(x.shape == shape or not x.dim() for x in tensors) and _is_dense(like):
        return like.new_empty_strided(shape, like.stride(), dtype=dtype)
    return None


def _broadcast(*tensors: torch.Tensor) -> tuple[int, ...] | None:
    """As ``torch.broadcast_shapes``, which imports sympy; None where they do not fit."""
    try:
        return np.broadcast_shapes(*(x.shape for x in tensors))
    except ValueError:
        return None


def _masked_fill_(x: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor | None:
    """In place, with a number."""
    known = x.is_meta and mask.dtype == torch.bool and isinstance(value, int | float)
    return x if known and x.is_floating_point() and _broadcast(x, mask) == x.shape else None


def _like(x: torch.Tensor, dtype: torch.dtype | None = None, **others: Any) -> torch.Tensor | None:
    """A dense tensor of this shape, whose dimensions lie in memory in the same order."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if not x.is_meta or any(others.values()) or len({*strides} - {0}) < len(strides):
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dense = x.new_empty([x.shape[i] for i in order], dtype=dtype or x.dtype)
    return dense.permute([order.index(i) for i in range(x.dim())])


def _sum(
    x: torch.Tensor, dims: Sequence[int] | None = None, keepdim: bool = False
) -> torch.Tensor | None:
    """Over dimensions of a floating-point tensor; over all of them without any."""
    wrong = any(not -x.dim() <= i < x.dim() for i in dims or ())
    if wrong or not x.is_meta or not x.is_floating_point():
        return None
    summed = {i % x.dim() for i in dims or range(x.dim())}
    shape = [1 if i in summed else size for i, size in enumerate(x.shape)]
    return x.new_empty(shape if keepdim else [n for i, n in enumerate(shape) if i not in summed])


def _in_order(x: torch.Tensor) -> bool:
    """Whether indices that are next to one another in memory are those of the last dimensions."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return strides == sorted(strides, reverse=True)


def _is_dense(x: torch.Tensor) -> bool:
    """Whether its elements fill a part of memory, each once."""
    steps = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.numel() == 1 + sum(steps) and all(
        step or size == 1 for step, size in zip(steps, x.shape, strict=True)
    )


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    """Tensors of one dtype and number of dimensions."""
    first = tensors[0]
    shape = list(first.shape)
    if not -len(shape) <= dim < len(shape) or not _alike(tensors):
        return None
    others = {(*x.shape[:dim], *x.shape[dim % len(shape) + 1 :]) for x in tensors}
    shape[dim] = sum(x.shape[dim] for x in tensors)
    if len(others) > 1 or all(len(shape) > 3 and x.stride(1) == 1 for x in tensors):
        return None  # where the channels are last, they are in the result
    return first.new_empty(shape)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    """Tensors of one dtype and shape."""
    first = tensors[0]
    shape = list(first.shape)
    if (
        not -len(shape) <= dim <= len(shape)
        or not _alike(tensors)
        or not all(map(_in_order, tensors))
    ):
        return None
    if any(x.shape != first.shape for x in tensors):
        return None
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return first.new_empty(shape)


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are without data, of one dtype and number of dimensions."""
    first = tensors[0]
    return all(x.is_meta and x.dtype == first.dtype and x.dim() == first.dim() for x in tensors)


KNOWN: dict[str, Callable[..., torch.Tensor | None]] = {
    "cat": _cat, "stack": _stack, "sum": _sum, "masked_fill_": _masked_fill_
}  # fmt: skip


class MetaOps(TorchDispatchMode):
    """A mode in which :func:`call` computes all results; those that watch them are subclasses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, which takes seconds, only to disable it inside a mode."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})
