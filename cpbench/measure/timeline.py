"""Timelines of all ranks: one traced pass of a case with its operator and communicator wrapped.

A rank's thread computes (operator calls), waits (for a transfer) or does something else (packs,
merges, posts); these add up to the phase.  A transfer lasts from the call that posts it until its
data has arrived: with torch's process groups, a thread waits for each transfer on CPUs, and an
event on a stream of its own follows it on GPUs.  Over MPI, whose completion is only seen by
waiting, a transfer lasts until it has been waited for.

Time marks are host seconds on CPUs and events on GPUs, read after the pass.  Times of ranks on
other machines are converted to rank 0's clock (``cpbench.measure.clocks``).
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
from cpbench.measure.timeline_operator import RecordingOperator
from cpbench.measure.timeline_slices import (
    NVTX_RANGE,
    PHASE,
    TRANSFER,
    WAITING,
    RankTimeline,
    TimelineSlice,
)
from cpbench.measure.timing import Workload
from cpbench.parallel.comm import Comm, CompletedHandle, Handle
from cpbench.parallel.comm_torch import TorchComm, TorchHandle
from cpbench.parallel.host_memory.link import Copy

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.measure.device.protocol import Device
    from cpbench.parallel.comm import Control, Messages

PASSES = 3  # traced; the one with the median time is kept


class _HostClock:
    """Time marks of a CPU: host seconds."""

    uncertainty = 0.0

    def mark(self) -> Any:
        return time.perf_counter()

    def host_seconds(self, mark: Any) -> float:
        return float(mark)

    def thread_cpu_s(self) -> float | None:
        return time.thread_time()

    @contextmanager
    def nvtx_range(self, name: str) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        pass


class _CudaClock:
    """Time marks of a CUDA stream: events.  They are converted to host seconds by a first event,
    which is recorded on an idle device between two readings of the host's clock."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._cuda.synchronize()
        before = time.perf_counter()
        self._zero = self.mark()
        self._zero.synchronize()
        self.uncertainty = (time.perf_counter() - before) / 2
        self._zero_s = before + self.uncertainty

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def host_seconds(self, mark: Any) -> float:
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3

    def thread_cpu_s(self) -> float | None:
        return None

    @contextmanager
    def nvtx_range(self, name: str) -> Iterator[None]:
        self._cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            self._cuda.nvtx.range_pop()

    def synchronize(self) -> None:
        self._cuda.synchronize()


class Recorder:
    """Records the slices of one rank, with time marks of its device as start and end."""

    def __init__(self, device_type: str) -> None:
        self.clock: Any = _CudaClock() if device_type == "cuda" else _HostClock()
        self._slices: list[TimelineSlice] = []

    def clear(self) -> None:
        """Discard all slices."""
        self._slices.clear()

    @contextmanager
    def slice(self, row: str, name: str, **details: Any) -> Iterator[None]:
        """A context whose body, run by the rank's own thread, is recorded as a slice."""
        clock = self.clock
        with clock.nvtx_range(name):
            start, cpu_start = clock.mark(), clock.thread_cpu_s()
            yield
            cpu_s = clock.thread_cpu_s() - cpu_start if cpu_start is not None else None
            self.add(row, name, start, clock.mark(), cpu_s, details)

    def add(
        self, row: str, name: str, start: Any, end: Any, cpu_s: float | None,
        details: dict[str, Any],
    ) -> None:  # fmt: skip
        self._slices.append(TimelineSlice(row, name, start, end, cpu_s, details))

    def slices(self) -> list[TimelineSlice]:
        """The slices in host seconds, sorted by start."""
        self.clock.synchronize()
        for item in self._slices:
            item.start = self.clock.host_seconds(item.start)
            item.end = self.clock.host_seconds(item.end)
        return sorted(self._slices, key=lambda item: (item.start, -item.end))


class _RecordingHandle:
    """A handle that records its transfer, and each ``wait`` as waiting.

    Args:
        post: posts the transfer.
        tensors: kept alive until ``wait``, since torch drops its references once a transfer has
            been waited for on another stream.
        use_thread: whether to wait for the transfer in a thread.

    Attributes:
        posted: the handle of the transfer.
    """

    def __init__(
        self,
        post: Callable[[], Handle],
        tensors: Sequence[torch.Tensor],
        recorder: Recorder,
        name: str,
        details: dict[str, Any],
        use_thread: bool,
    ) -> None:
        self._recorder, self._name, self._details = recorder, name, details
        self._start, self._recorded = recorder.clock.mark(), False
        self._tensors = list(tensors)
        self.posted = handle = post()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if use_thread:
            self._thread = threading.Thread(target=self._wait_in_thread, daemon=True)
            self._thread.start()
        elif isinstance(recorder.clock, _CudaClock) and isinstance(handle, TorchHandle | Copy):
            self._record_on_own_stream(handle)

    def _wait_in_thread(self) -> None:
        try:
            self.posted.wait()
        except BaseException as error:
            self._error = error
        self._record_transfer()

    def _record_on_own_stream(self, works: TorchHandle | Copy) -> None:
        """Record the end by an event that waits for the transfer but not for the compute stream."""
        import torch

        with torch.cuda.stream(torch.cuda.Stream()):
            works.wait_transfers()
            self._record_transfer()

    def _record_transfer(self) -> None:
        end = self._recorder.clock.mark()
        self._recorder.add(TRANSFER, self._name, self._start, end, None, self._details)
        self._recorded = True

    def wait(self) -> None:
        with self._recorder.slice(WAITING, f"wait for {self._name}", **self._details):
            if self._thread is not None:
                self._thread.join()
                self._thread = None
                if self._error is not None:
                    raise self._error
            else:
                self.posted.wait()
        if not self._recorded:
            self._record_transfer()
        self._tensors.clear()


class RecordingComm:
    """A :class:`~cpbench.parallel.comm.Comm` that records its transfers and waits."""

    def __init__(self, comm: Comm, recorder: Recorder, members: Sequence[int] = ()) -> None:
        self._comm, self._recorder = comm, recorder
        self._members = members or range(comm.size)  # global ranks
        self.rank, self.size = comm.rank, comm.size
        self.traffic, self.pause_s, self.meet = comm.traffic, 0.0, comm.meet
        self._use_threads = isinstance(comm, TorchComm) and isinstance(recorder.clock, _HostClock)

    def sub(self, ranks: Sequence[int]) -> Comm:
        members = [self._members[rank] for rank in ranks]
        return RecordingComm(self._comm.sub(ranks), self._recorder, members)

    def lane(self, name: str) -> Comm:
        return RecordingComm(self._comm.lane(name), self._recorder, self._members)

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        if not sends and not recvs:
            return CompletedHandle()
        details = {"sends": self._bytes_by_peer(sends), "receives": self._bytes_by_peer(recvs)}
        tensors = [tensor for tensor, _ in (*sends, *recvs)]
        post = self._comm.exchange
        return self._record(what or "exchange", details, tensors, lambda: post(sends, recvs, what))

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        return self._collective("all-to-all", (x, out), lambda: self._comm.all_to_all(out, x))

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        return self._collective("all-gather", (x, out), lambda: self._comm.all_gather(out, x))

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        post = self._comm.reduce_scatter
        return self._collective("reduce-scatter", (x, out), lambda: post(out, x))

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        return self._collective("all-reduce", (x,), lambda: self._comm.all_reduce(x, largest))

    def to_device(self, out: torch.Tensor, x: torch.Tensor, after: Sequence[Handle] = ()) -> Handle:
        posted = [handle.posted for handle in after if isinstance(handle, _RecordingHandle)]
        return self._copy("to device", out, x, lambda: self._comm.to_device(out, x, posted))

    def to_host(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        return self._copy("to host", out, x, lambda: self._comm.to_host(out, x))

    def finish_copies(self) -> None:
        with self._recorder.slice(WAITING, "wait for copies to host"):
            self._comm.finish_copies()

    def _copy(
        self, name: str, out: torch.Tensor, x: torch.Tensor, post: Callable[[], Handle]
    ) -> Handle:
        details = {"bytes": x.nbytes}
        return _RecordingHandle(post, (out, x), self._recorder, name, details, use_thread=False)

    def _collective(
        self, name: str, tensors: Sequence[torch.Tensor], post: Callable[[], Handle]
    ) -> Handle:
        details = {"bytes": tensors[0].nbytes, "ranks": list(self._members)}
        return self._record(name, details, tensors, post)

    def _record(
        self,
        name: str,
        details: dict[str, Any],
        tensors: Sequence[torch.Tensor],
        post: Callable[[], Handle],
    ) -> Handle:
        return _RecordingHandle(post, tensors, self._recorder, name, details, self._use_threads)

    def _bytes_by_peer(self, messages: Sequence[tuple[torch.Tensor, int]]) -> dict[str, int]:
        """Bytes by global rank of the peer."""
        nbytes: dict[str, int] = {}
        for tensor, peer in messages:
            rank = str(self._members[peer])
            nbytes[rank] = nbytes.get(rank, 0) + tensor.nbytes
        return nbytes


def record_timelines(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
) -> list[RankTimeline]:
    """The timelines of all ranks in the traced pass of median time, on every rank; collective."""
    passes: list[tuple[float, list[TimelineSlice], float]] = []
    _trace_pass(work, inputs, device, comm, control)  # warmup
    for _ in range(PASSES):
        slices, uncertainty = _trace_pass(work, inputs, device, comm, control)
        seconds = sum(item.seconds for item in slices if item.row == PHASE)
        passes.append((control.max(seconds), slices, uncertainty))
    passes.sort(key=lambda traced: traced[0])
    _, slices, uncertainty = passes[PASSES // 2]
    facts = device.describe()
    device_name = str(facts.get("name") or facts["type"])
    own = RankTimeline(platform.node(), device_name, slices, uncertainty)
    ranks: list[RankTimeline] = control.all_gather(own)
    for rank, offset in zip(ranks, clocks.offsets(control), strict=True):
        rank.uncertainty += offset.uncertainty
        for item in rank.slices:
            item.start, item.end = item.start + offset.seconds, item.end + offset.seconds
    return ranks


def _trace_pass(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    device: Device,
    comm: Comm,
    control: Control,
) -> tuple[list[TimelineSlice], float]:
    """The slices of this rank in one pass, and the uncertainty in seconds of its device's clock
    against the host's."""
    recorder = Recorder(device.type)
    recorded = copy.copy(work)
    recorded.op = RecordingOperator(work.op, recorder)
    workload = Workload(recorded, inputs, RecordingComm(comm, recorder))
    workload.reset()
    recorder.clock.synchronize()
    recorder.clear()
    with recorder.clock.nvtx_range(NVTX_RANGE):
        for phase in workload.phases:
            device.flush_cache()
            recorder.clock.synchronize()
            control.barrier()
            with recorder.slice(PHASE, phase):
                workload.run_phase(phase)
    return recorder.slices(), recorder.clock.uncertainty
