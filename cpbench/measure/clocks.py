"""How far the clocks of ranks are apart.

Processes of one machine read one monotonic clock.  Of other machines, rank 0 asks for the time and
takes the answer of the quickest of many questions to be from the middle of its way there and back.

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

QUESTIONS = 20
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Offset:
    """Seconds to add to a rank's ``time.perf_counter`` for rank 0's, and how sure that is."""

    seconds: float
    within: float


def offsets(control: Control) -> list[Offset]:
    """Of every rank, on every rank; collective."""
    machines = control.gather(_machine())
    found = [Offset(0.0, 0.0)]
    for rank in range(1, control.size):
        same = machines[rank] == machines[0]
        found.append(Offset(0.0, 0.0) if same else _asked(control, rank))
    return list(control.gather(found)[0])


def _machine() -> str:
    """The same for processes that read the same clock."""
    with suppress(OSError):
        return BOOT.read_text().strip() + str(Path("/proc/self/ns/time").readlink())
    return socket.gethostname()


def _asked(control: Control, rank: int) -> Offset:
    """What rank 0 finds out; nothing of worth on others."""
    best = Offset(0.0, float("inf"))
    for _ in range(QUESTIONS):
        if control.rank == 0:
            asked = time.perf_counter()
            there = control.ask(rank)
            answered = time.perf_counter()
            within = (answered - asked) / 2
            if within < best.within:
                best = Offset(asked + within - there, within)
        elif control.rank == rank:
            control.answer(time.perf_counter)
    return best
