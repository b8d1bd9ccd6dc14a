"""What every rank does when: one pass of a case with its operator and communicator watched.

A rank's own thread computes (the operator's calls), waits (for something that was sent) or does
something else (packs, merges, posts): these add up to the phase.  Transfers are what is under way
meanwhile, from the call that posts them until they have arrived: over torch's process groups on
processors a thread of its own waits for each, on GPUs an event on a stream of its own.  Over MPI,
where only waiting tells, they seem to last until they have been waited for.

Marks are host seconds on processors and events on GPUs, read when the pass is over.  Ranks of other
machines are put on rank 0's clock (``cpbench.measure.clocks``).
"""

from __future__ import annotations

import copy
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cpbench.measure import clocks
from cpbench.measure.timeline_slices import (
    COMPUTE,
    PHASE,
    RANGE,
    TRANSFER,
    WAITING,
    Rank,
    Slice,
)
from cpbench.measure.timing import Workload
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import Comm, Done, Handle, TorchComm, Works

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.measure.device import Device
    from cpbench.parallel.bound_operator import Planned
    from cpbench.parallel.comm import Control

PASSES = 3  # of which the middle one is told


class _HostClock:
    """Marks of a processor."""

    within = 0.0

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, mark: Any) -> float:
        return float(mark)

    def cpu(self) -> float | None:
        return time.thread_time()

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        yield

    def settle(self) -> None:
        pass


class _CudaClock:
    """Marks of a CUDA stream: events, told in host seconds by one that was recorded on an idle
    device between two looks at the host's clock.  Ranges are named for NVTX too."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._cuda.synchronize()
        before = time.perf_counter()
        self._zero = self.mark()
        self._zero.synchronize()
        self.within = (time.perf_counter() - before) / 2
        self._host = before + self.within

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        return self._host + float(self._zero.elapsed_time(mark)) / 1e3

    def cpu(self) -> float | None:
        return None

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        self._cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            self._cuda.nvtx.range_pop()

    def settle(self) -> None:
        self._cuda.synchronize()


class Recorder:
    """Slices of one rank, their ends still marks of its device."""

    def __init__(self, device_type: str) -> None:
        self.clock: Any = _CudaClock() if device_type == "cuda" else _HostClock()
        self._slices: list[Slice] = []

    def clear(self) -> None:
        """Forget what has been noted."""
        self._slices.clear()

    @contextmanager
    def slice(self, row: str, name: str, **about: Any) -> Iterator[None]:
        """What is done inside, in the rank's own thread."""
        clock = self.clock
        with clock.named(name):
            start, used = clock.mark(), clock.cpu()
            yield
            spent = clock.cpu() - used if used is not None else None
            self.add(row, name, start, clock.mark(), spent, about)

    def add(
        self, row: str, name: str, start: Any, end: Any, cpu_s: float | None, about: dict[str, Any]
    ) -> None:
        self._slices.append(Slice(row, name, start, end, cpu_s, about))

    def slices(self) -> list[Slice]:
        """In host seconds, by start."""
        self.clock.settle()
        for one in self._slices:
            one.start, one.end = self.clock.seconds(one.start), self.clock.seconds(one.end)
        return sorted(self._slices, key=lambda one: (one.start, -one.end))


class _WatchedHandle:
    """A handle whose transfer is noted when it has ended, and whose ``wait`` is waiting.

    Args:
        post: posts the transfer.
        held: tensors that must live until ``wait``: once it has waited for a transfer on another
            stream, torch holds them no longer.
        threads: whether a thread may wait for it.
    """

    def __init__(
        self,
        post: Callable[[], Handle],
        held: Sequence[torch.Tensor],
        recorder: Recorder,
        name: str,
        about: dict[str, Any],
        threads: bool,
    ) -> None:
        self._recorder, self._name, self._about = recorder, name, about
        self._start, self._noted = recorder.clock.mark(), False
        self._held = list(held)
        self._handle = handle = post()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if threads:
            self._thread = threading.Thread(target=self._finish, daemon=True)
            self._thread.start()
        elif isinstance(recorder.clock, _CudaClock) and isinstance(handle, Works):
            self._follow_on_stream(handle)

    def _finish(self) -> None:
        try:
            self._handle.wait()
        except BaseException as error:
            self._error = error
        self._note()

    def _follow_on_stream(self, works: Works) -> None:
        """An event that follows the transfer alone, not the stream that computes."""
        import torch

        with torch.cuda.stream(torch.cuda.Stream()):
            works.arrive()
            self._note()

    def _note(self) -> None:
        end = self._recorder.clock.mark()
        self._recorder.add(TRANSFER, self._name, self._start, end, None, self._about)
        self._noted = True

    def wait(self) -> None:
        with self._recorder.slice(WAITING, f"wait for {self._name}", **self._about):
            if self._thread is not None:
                self._thread.join()
                self._thread = None
                if self._error is not None:
                    raise self._error
            else:
                self._handle.wait()
        if not self._noted:
            self._note()
        self._held.clear()


class WatchedComm:
    """A :class:`~cpbench.parallel.comm.Comm` whose transfers and waits are noted."""

    def __init__(self, comm: Comm, recorder: Recorder, members: Sequence[int] = ()) -> None:
        self._comm, self._recorder = comm, recorder
        self._members = members or range(comm.size)  # ranks of the whole job
        self.rank, self.size = comm.rank, comm.size
        self.traffic, self.pause_s = comm.traffic, 0.0
        self._threads = isinstance(comm, TorchComm) and isinstance(recorder.clock, _HostClock)

    def sub(self, ranks: Sequence[int]) -> Comm:
        members = [self._members[rank] for rank in ranks]
        return WatchedComm(self._comm.sub(ranks), self._recorder, members)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        if not sends and not recvs:
            return Done()
        about = {"sends": self._by_peer(sends), "receives": self._by_peer(recvs)}
        held = [tensor for tensor, _ in (*sends, *recvs)]
        post = self._comm.exchange
        return self._watched(what or "exchange", about, held, lambda: post(sends, recvs, what))

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        return self._collective("all-to-all", (x, out), lambda: self._comm.all_to_all(out, x))

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        return self._collective("all-gather", (x, out), lambda: self._comm.all_gather(out, x))

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        post = self._comm.reduce_scatter
        return self._collective("reduce-scatter", (x, out), lambda: post(out, x))

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        return self._collective("all-reduce", (x,), lambda: self._comm.all_reduce(x, largest))

    def _collective(
        self, name: str, tensors: Sequence[torch.Tensor], post: Callable[[], Handle]
    ) -> Handle:
        about = {"bytes": tensors[0].nbytes, "ranks": list(self._members)}
        return self._watched(name, about, tensors, post)

    def _watched(
        self,
        name: str,
        about: dict[str, Any],
        held: Sequence[torch.Tensor],
        post: Callable[[], Handle],
    ) -> Handle:
        return _WatchedHandle(post, held, self._recorder, name, about, self._threads)

    def _by_peer(self, messages: Sequence[tuple[torch.Tensor, int]]) -> dict[str, int]:
        """Bytes by rank of the whole job."""
        found: dict[str, int] = {}
        for tensor, peer in messages:
            name = str(self._members[peer])
            found[name] = found.get(name, 0) + tensor.nbytes
        return found


class WatchedOperator(BoundOperator):
    """An operator whose calls are noted."""

    def __init__(self, op: BoundOperator, recorder: Recorder) -> None:
        super().__init__(op.info, op.impl, op.device)
        self._recorder = recorder

    def forward_cropped(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Planned
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._recorder.slice(COMPUTE, "attention", pairs=plan.area * q.shape[2]):
            return super().forward_cropped(q, k, v, plan)

    def backward_cropped(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs = given[-1].area * given[1].shape[2]
        with self._recorder.slice(COMPUTE, "attention backward", pairs=pairs):
            return super().backward_cropped(*given)


def watch(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
) -> list[Rank]:
    """What all ranks did in the pass that took the middle time, on every rank; collective."""
    passes: list[tuple[float, list[Slice], float]] = []
    _pass(work, inputs, device, comm, control)  # the first one is slower
    for _ in range(PASSES):
        slices, within = _pass(work, inputs, device, comm, control)
        took = sum(one.end - one.start for one in slices if one.row == PHASE)
        passes.append((control.slowest(took), slices, within))
    passes.sort(key=lambda one: one[0])
    _, slices, within = passes[PASSES // 2]
    about = device.describe()
    named = str(about.get("name") or about["type"])
    ranks: list[Rank] = control.gather(Rank(platform.node(), named, slices, within))
    for rank, offset in zip(ranks, clocks.offsets(control), strict=True):
        rank.within += offset.within
        for one in rank.slices:
            one.start, one.end = one.start + offset.seconds, one.end + offset.seconds
    return ranks


def _pass(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
) -> tuple[list[Slice], float]:
    """What this rank did, and by how many seconds its device's clock may be off the host's."""
    recorder = Recorder(device.type)
    watched = copy.copy(work)
    watched.op = WatchedOperator(work.op, recorder)
    workload = Workload(watched, inputs, WatchedComm(comm, recorder))
    workload.ready()
    recorder.clock.settle()
    recorder.clear()
    with recorder.clock.named(RANGE):
        for phase in workload.phases:
            device.flush_cache()
            recorder.clock.settle()
            control.barrier()
            with recorder.slice(PHASE, phase):
                workload.call(phase)
    return recorder.slices(), recorder.clock.within
