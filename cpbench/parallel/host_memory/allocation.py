"""Allocation of tensors in host memory.

On a CPU and on tensors without data both sides are the same kind of memory; what is allocated
inside :func:`on_host` counts as host memory there (see ``cpbench.parallel.host_memory.account``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ON_HOST = ContextVar("on_host", default=False)


@contextmanager
def on_host() -> Iterator[None]:
    """A context in which what is allocated counts as host memory."""
    token = _ON_HOST.set(True)
    try:
        yield
    finally:
        _ON_HOST.reset(token)


def allocates_on_host() -> bool:
    """Whether what is allocated now counts as host memory."""
    return _ON_HOST.get()


def home_of(device: str) -> str:
    """The device type of tensors in the host memory of a device: ``"cpu"``, but for tensors without
    data."""
    return "meta" if device == "meta" else "cpu"


def empty(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Uninitialised host memory beside ``device``: pinned beside a GPU, so that copies overlap."""
    import torch

    pinned = device.startswith("cuda")
    with on_host():
        return torch.empty(tuple(shape), dtype=dtype, device=home_of(device), pin_memory=pinned)
