"""Clock offsets between ranks.

Processes on one machine share a monotonic clock.  For ranks on other machines, rank 0 requests the
time repeatedly and assumes that the reply with the shortest round trip was taken halfway through.

Source: Cristian, "Probabilistic clock synchronization" (1989).
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpbench.parallel.comm import Control

ROUND_TRIPS = 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Offset:
    """Seconds to add to a rank's ``time.perf_counter`` to get rank 0's, plus or minus
    ``uncertainty`` seconds."""

    seconds: float
    uncertainty: float


def offsets(control: Control) -> list[Offset]:
    """The offset of every rank, returned on every rank; collective."""
    domains = control.all_gather(_clock_domain())
    estimates = [Offset(0.0, 0.0)]
    for rank in range(1, control.size):
        same_clock = domains[rank] == domains[0]
        estimates.append(Offset(0.0, 0.0) if same_clock else _estimate_offset(control, rank))
    return list(control.all_gather(estimates)[0])


def _clock_domain() -> str:
    """An identifier that is equal for processes that read the same clock."""
    with suppress(OSError):
        return BOOT_ID.read_text("utf-8").strip() + str(Path("/proc/self/ns/time").readlink())
    return socket.gethostname()


def _estimate_offset(control: Control, rank: int) -> Offset:
    """The offset of ``rank`` as estimated by rank 0; meaningful on rank 0 only."""
    best = Offset(0.0, float("inf"))
    for _ in range(ROUND_TRIPS):
        if control.rank == 0:
            sent = time.perf_counter()
            remote = control.request_value(rank)
            received = time.perf_counter()
            half_trip = (received - sent) / 2
            if half_trip < best.uncertainty:
                best = Offset(sent + half_trip - remote, half_trip)
        elif control.rank == rank:
            control.reply_value(time.perf_counter)
    return best
