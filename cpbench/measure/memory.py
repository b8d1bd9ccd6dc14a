"""Memory that operators keep between passes, and memory that torch's allocators do not see."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SMALLEST_BYTES = 64 << 10  # smaller ones are not counted: scalars, sums and the like
MEASURING_CODE = ("cpbench.inputs", "cpbench.verify", "cpbench.measure")  # whose caches are its own
# glibc keeps up to 64 MiB of free memory; fragmentation grows with what is allocated.
MAX_GAP_BYTES, MAX_GAP_SHARE = 64 << 20, 0.25
PROCESS = Path("/proc/self")
CACHE = type(functools.lru_cache(lambda: None))
Storage = tuple[int, int]  # address and bytes


class HeldMemory:
    """Finds the tensors that an operator keeps beside its plan: on itself, in its module, in a
    cache.  Those alive before it is loaded are not its own, unless an earlier case of it made them.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[weakref.ref[Any]]] = {}
        self._before: list[tuple[weakref.ref[Any], int]] = []
        self._operator = ""

    def begin(self, operator: str) -> None:
        """Note which tensors are alive before a case of this operator."""
        self._operator = operator
        kept = {id(reference()) for reference in self._kept.get(operator, ())}
        self._before = [
            (weakref.ref(tensor), address)
            for tensor, (address, _) in _live_tensors()
            if id(tensor) not in kept
        ]

    def held_bytes(self, operator: Any, counted: set[int]) -> int:
        """Bytes of what is alive now and was not before, in storages of 64 KiB or more, together
        with the numpy arrays of the operator and its module.

        Args:
            operator: its implementation.
            counted: addresses of storages that are counted elsewhere, or are not the operator's.
        """
        counted = set(counted)
        for cache in _caches_of_measuring_code():
            tensor_bytes(gc.get_referents(cache), counted)
        if self._new_tensors(counted):
            gc.collect()  # what only cycles hold is not kept
        new = self._new_tensors(counted)
        self._kept[self._operator] = [weakref.ref(tensor) for tensor, _ in new]
        sizes = {**_array_sizes(vars(operator)), **_array_sizes(vars(_module_of(operator)))}
        return sum({**sizes, **dict(storage for _, storage in new)}.values())

    def _new_tensors(self, counted: set[int]) -> list[tuple[Any, Storage]]:
        before = {address for reference, address in self._before if reference() is not None}
        return [
            (tensor, storage)
            for tensor, storage in _live_tensors()
            if storage[0] not in counted | before
        ]


def memory_gap(memory: Mapping[str, int]) -> bool:
    """Whether the process used much more memory than torch allocated, in one pass."""
    if "process" not in memory:
        return False
    return memory["process"] - memory["peak"] > MAX_GAP_BYTES + MAX_GAP_SHARE * memory["peak"]


def tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of the tensors in a nested object, such as a plan; each storage counts once.

    Args:
        seen: data pointers of storages not to be counted; those found are added.
    """
    import torch

    if isinstance(value, torch.Tensor):
        address, nbytes = _storage(value)
        if address in seen:
            return 0
        seen.add(address)
        return nbytes
    if isinstance(value, dict):
        return sum(tensor_bytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple | set):
        return sum(tensor_bytes(item, seen) for item in value)
    return tensor_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


def _storage(tensor: Any) -> Storage:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _live_tensors() -> Iterator[tuple[Any, Storage]]:
    import torch

    kinds = (torch.Tensor, torch.nn.Parameter)  # others, such as fake ones, have no storage
    for item in gc.get_objects():
        if type(item) in kinds and item.layout is torch.strided and item.device.type != "meta":
            storage = _storage(item)
            if storage[1] >= SMALLEST_BYTES:
                yield item, storage


def _caches_of_measuring_code() -> Iterator[Any]:
    for item in gc.get_objects():
        if type(item) is CACHE and str(item.__module__).startswith(MEASURING_CODE):
            yield item


def _array_sizes(value: Any) -> dict[int, int]:
    """Bytes of the memory of the numpy arrays in nested tables and lists, by its address.  The
    garbage collector does not know arrays, so they are looked for where operators keep them."""
    import numpy as np

    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        owned = value.nbytes >= SMALLEST_BYTES and value.base is None
        return {value.ctypes.data: value.nbytes} if owned else {}
    if isinstance(value, dict):
        value = list(value.values())
    sizes: dict[int, int] = {}
    for item in value if isinstance(value, list | tuple | set) else ():
        sizes |= _array_sizes(item)
    return sizes


def _module_of(operator: Any) -> Any:
    return sys.modules[type(operator).__module__]


def resident_bytes(peak: bool = False) -> int | None:
    """Bytes of main memory that this process uses, or has used at most since
    :func:`reset_resident_peak`; None where the system does not tell."""
    name = "VmHWM:" if peak else "VmRSS:"
    with suppress(OSError):
        for line in (PROCESS / "status").read_text("utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return None


def reset_resident_peak() -> bool:
    """Give free memory back to the system, so that its next use is seen, and start a new peak;
    False where that cannot be done."""
    with suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5", "utf-8")
        return True
    return False
