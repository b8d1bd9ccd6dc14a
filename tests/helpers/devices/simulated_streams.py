"""Streams and events of a GPU, simulated: which operations are ordered, and which race.

A program runs on tensors without data.  Every operation belongs to the stream that is current, or
to the host if it touches host memory only; copies of ``HostLink`` are on its streams.  An operation
is after those before it on its stream, after what its stream has waited for, and after what the
host had done when it queued it.  Two that are not ordered race if both use the same memory and one
of them writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from simulated_nccl import METADATA_ONLY, extents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.parallel.comm import GroupedComm
from cpbench.parallel.host_memory.allocation import allocates_on_host
from cpbench.parallel.host_memory.link import HostLink

Clock = dict["Actor", int]  # operations of every actor that are over


class Actor:
    """A stream, or the host.

    Attributes:
        done: own operations; seen: operations of others that come before its next one.
    """

    def __init__(self) -> None:
        self.done, self.seen = 0, Clock()

    def clock(self) -> Clock:
        return {**self.seen, self: self.done}

    def follow(self, clock: Clock) -> None:
        for actor, count in clock.items():
            self.seen[actor] = max(self.seen.get(actor, 0), count)


class SimulatedCuda(TorchDispatchMode):
    """What ``HostLink`` uses of ``torch.cuda``, and a finder of races.

    Args:
        host: tensors in host memory; those that are allocated there are found.
    """

    def __init__(self, host: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.races: list[str] = []
        self._host, self._current, cuda = Actor(), Actor(), self
        self._on_host = {x.untyped_storage()._cdata: x for x in host}  # kept alive
        self._kept: list[torch.Tensor] = []
        self._accesses: dict[int, list[tuple[int, int, Actor, int, bool, str]]] = {}

        class Stream(Actor):
            def wait_stream(self, other: Actor) -> None:
                self.follow(other.clock())

            def wait_event(self, event: Any) -> None:
                self.follow(event.clock)

            def synchronize(self) -> None:
                cuda._host.follow(self.clock())

        class Event:
            clock: Clock

            def record(self, stream: Actor) -> None:
                self.clock = stream.clock()

        self.Stream, self.Event = Stream, Event
        self._current = Stream()

    def current_stream(self) -> Actor:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: Actor) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._kept.append(x)  # so that no storage is found again as another
                if allocates_on_host():
                    self._on_host[x.untyped_storage()._cdata] = x
        if func.is_view or name in METADATA_ONLY or name == "empty":
            return result
        arguments = func._schema.arguments
        values = {**dict(zip((one.name for one in arguments), args, strict=False)), **kwargs}
        uses = [
            (x, one.alias_info is not None and one.alias_info.is_write)
            for one in arguments
            for x in tree_leaves(values.get(one.name))
            if isinstance(x, torch.Tensor)
        ]
        at_host = all(x.untyped_storage()._cdata in self._on_host for x, _ in uses)
        actor = self._host if at_host else self._current
        actor.follow(self._host.clock())
        actor.done += 1
        for x, writes in uses:
            self._use(x, writes, actor, name)
        return result

    def _use(self, x: torch.Tensor, writes: bool, actor: Actor, name: str) -> None:
        for storage, start, end in extents(x) if x.numel() else ():
            earlier = self._accesses.setdefault(storage, [])
            for other_start, other_end, other, count, wrote, what in earlier:
                shared = start < other_end and other_start < end and (writes or wrote)
                if shared and other is not actor and count > actor.seen.get(other, 0):
                    self.races.append(f"{name} races with {what}")
            earlier.append((start, end, actor, actor.done, writes, name))


class StreamComm(GroupedComm):
    """One rank whose copies go through :class:`HostLink` on simulated streams."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__(0, 1)
        self._link = HostLink(cuda)

    def _copy(self, out: Any, x: Any, to_device: bool, after: Any = ()) -> Any:
        return self._link.copy(out, x, to_device, after)
