"""Memory of checks: they work on chunks of bounded size, and say so where even those do not fit,
which is no failure of the case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

# Of a tensor of the case, converted to float32 or float64 at a time: 128 MiB in float64.  A check
# has a few such chunks at once.
CHUNK_ELEMENTS = 1 << 24
OOM_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
)
REASON_CHARS = 400

T = TypeVar("T")


class DoesNotFit(Exception):
    """A check ran out of memory, on this rank or another one; the message says where and how."""


def chunks(length: int, elements: int, most: int | None = None) -> Iterator[slice]:
    """Slices of an axis, one at least, of ``CHUNK_ELEMENTS`` each or a single entry.

    Args:
        length: of the axis.
        elements: of one of its entries.
        most: entries of a slice.
    """
    step = max(1, CHUNK_ELEMENTS // max(elements, 1))
    step = min(step, most or step)
    for start in range(0, max(length, 1), step):
        yield slice(start, min(start + step, length))


def row_products(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scalar products of the rows of two tensors ``[B, S, H, D]``: ``[B, H, S]``, ``dtype``."""
    import torch

    batch, tokens, heads, dim = x.shape
    products = torch.empty((batch, heads, tokens), dtype=dtype, device=x.device)
    for part in chunks(tokens, batch * heads * dim):
        rows = x[:, part].to(dtype) * y[:, part].to(dtype)
        products[..., part] = rows.sum(-1).transpose(1, 2)
    return products


def try_to_fit(compute: Callable[[], T]) -> tuple[T | None, str]:
    """The value of ``compute`` and an empty text; or None and, in one line, how it ran out of
    memory, which is free again."""
    try:
        return compute(), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error)
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None, reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, by Python, numpy, torch or CUDA."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(message in text for message in OOM_MESSAGES)


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message, of ``REASON_CHARS`` at most."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    return " ".join(next(line for line in lines if line.strip()).split())[:REASON_CHARS]
