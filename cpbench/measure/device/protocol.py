"""What the measuring code asks of a rank's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from cpbench.measure.processor_use import ProcessorUse


class HostTime(NamedTuple):
    """How long the host took to queue a call.

    Attributes:
        us: microseconds.
        bound: whether the device had nothing to do for part of that time, and ended about when the
            host did: a faster host would have given another time.
    """

    us: float
    bound: bool


class Device(Protocol):
    """One rank's device.

    Attributes:
        last_use: of the last call of :meth:`time_us`; None where work runs on another processor.
        last_host: of that call: how long the host took to queue it; None where the host computes.
        warmup_s: seconds at load after which clocks are those of a long run.
    """

    type: str
    backend: str
    last_use: ProcessorUse | None
    last_host: HostTime | None
    warmup_s: float

    def time_us(self, work: Callable[[], Any], meet: Callable[[], None] | None = None) -> float:
        """Microseconds that ``work`` takes on the device, which is idle at the start.

        Args:
            meet: queues an operation in which the devices of all ranks wait for each other, so that
                they start together however late a host is; not timed.
        """
        ...

    def works_late(self) -> bool:
        """Whether the work of the last call of :meth:`time_us` went on after its end; to be asked
        right after it."""
        ...

    def pace_us(self) -> float | None:
        """Microseconds of a fixed reference computation, as a measure of the current machine speed.
        None unless times are CPU times, which other processes on the same core inflate too."""
        ...

    def flush_cache(self) -> None:
        """Evict the data of earlier iterations from the last-level cache."""
        ...

    def peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """Peak bytes that ``work`` allocates beyond those allocated before (``peak``); on devices
        that report them, also the allocator's ``reserved`` bytes and the whole ``device``'s use."""
        ...

    def process_peak_bytes(self, work: Callable[[], Any]) -> dict[str, int]:
        """As :meth:`peak_bytes`, with what torch's allocator does not see (``process``); empty
        where the system does not tell."""
        ...

    def describe(self) -> dict[str, Any]:
        """Properties of the device for the environment record."""
        ...

    def gpu_uuid(self) -> str | None:
        """The UUID of the rank's GPU as NVML has it; None on a CPU."""
        ...

    def flags(self, local_world_size: int, uses: Sequence[ProcessorUse] | None = None) -> list[str]:
        """Record flags that apply now, such as ``throttled``, or to timed work (``contended``).

        Args:
            uses: of the timed work; a reference computation unless given.
        """
        ...
