"""Peak memory of device and host, apart, while code runs: on a CPU both are main memory, and
tensors without data take none at all."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from cpbench.parallel.host_memory.allocation import allocates_on_host
from cpbench.parallel.tracing.meta_ops import MetaOps


class PeakBytes(NamedTuple):
    """Peak bytes in device and in host memory; they need not occur at once."""

    device: int
    host: int


class MemoryAccount(MetaOps):
    """Tracks the bytes of live storages that are made inside, by side.

    Args:
        excluded: tensors, in nested containers, that count on no side.
        limit: bytes of device memory.

    Raises:
        torch.OutOfMemoryError: inside, when the device side exceeds the limit.
    """

    def __init__(self, excluded: Any = (), limit: int | None = None) -> None:
        super().__init__()
        tensors = [x for x in tree_leaves(excluded) if _is_tensor(x)]
        self._excluded = {x.untyped_storage()._cdata for x in tensors}
        self._sides: tuple[dict[int, tuple[Any, int]], ...] = ({}, {})
        self._peaks, self._limit = [0, 0], limit
        self._most = [0, 0]  # no less than the live bytes of each side

    @property
    def peak(self) -> PeakBytes:
        return PeakBytes(*self._peaks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view or (args and result is args[0]):  # in place
            return result
        for x in tree_leaves(result):
            if _is_tensor(x) and x.untyped_storage()._cdata not in self._excluded:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        side = int(allocates_on_host())
        other = self._sides[1 - side].get(storage._cdata)
        if other is not None and not other[0].expired():
            return  # a view of the other side
        live = self._sides[side]
        live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._most[side] += storage.nbytes()
        if self._most[side] <= self._peaks[side]:
            return
        for key in [key for key, (reference, _) in live.items() if reference.expired()]:
            del live[key]
        self._most[side] = total = sum(nbytes for _, nbytes in live.values())
        self._peaks[side] = max(self._peaks[side], total)
        if side == 0 and self._limit is not None and total > self._limit:
            raise torch.OutOfMemoryError(
                f"out of memory: {total} bytes of a device that has {self._limit}"
            )


def _is_tensor(x: object) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor)
