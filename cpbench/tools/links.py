"""``cpbench links``: latency and bandwidth of the links between ranks, before anything else is run.

Definitions are those of nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth is size / time, bus
bandwidth that times a factor that makes it comparable with the hardware's.  Gigabytes are 1e9
bytes.  Latency is the time of the smallest size.

A time is the median over samples; of several groups (pairs, nodes) measured, their median, and the
slowest group beside it.  Spread is the distance from the 10th to the 90th percentile of all samples
of the group in the middle, relative to its median.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpbench.core.spec import format_size, parse_size
from cpbench.launchers import failure_cause
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command
from cpbench.launchers.registry import LAUNCHERS
from cpbench.launchers.supervisor import PARTING_S, STARTUP_S
from cpbench.results.store import Tail
from cpbench.tools.links_worker import LinkJob, journal_path, results_path

LARGEST = 1 << 30
SECONDS = 0.3
MOST_SECONDS = 600.0
MOST_RANKS = 256  # processes on one machine: beyond, they would only wait for each other
SILENCE_S = 300.0  # without another step begun: then something hangs
POLL_S = 0.05

# Bus bandwidth over algorithm bandwidth, of n ranks.
FACTORS: dict[str, Callable[[int], float]] = {
    "p2p": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}


def sizes(text: str) -> list[int]:
    """Bytes from a list such as ``"8,64k,16m"``.

    Raises:
        ValueError: for anything else, or a size out of bounds.
    """
    found = [parse_size(word) for word in text.split(",")]
    for size in found:
        if not 1 <= size <= LARGEST:
            raise ValueError(f"--sizes: {size} bytes are not between 1 and {LARGEST}")
    return sorted(set(found))


def refuse(world_size: int, ranks_per_node: int, seconds: float) -> None:
    """Raise ``ValueError`` for ranks between which there is nothing to measure, or no time to."""
    if world_size < 2:
        raise ValueError(f"--world-size {world_size}: a link has two ends, so give 2 or more")
    if world_size > MOST_RANKS:
        raise ValueError(f"--world-size {world_size}: at most {MOST_RANKS} ranks on one machine")
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError(f"--seconds {seconds}: give more than 0 and at most {MOST_SECONDS:g}")
    if ranks_per_node < 0 or (ranks_per_node and world_size % ranks_per_node):
        raise ValueError(
            f"--ranks-per-node {ranks_per_node}: must divide the {world_size} ranks, or be 0 to "
            "tell by host names"
        )


def run(
    world_size: int,
    device: str,
    launcher: str,
    sizes: Sequence[int],
    ranks_per_node: int = 0,
    as_json: bool = False,
    seconds: float = SECONDS,
) -> int:
    """Measure the links between ranks and print what they give.

    Args:
        world_size: ranks to start.
        device: ``"cpu"`` or ``"cuda"``.
        launcher: a name in ``LAUNCHERS``.
        sizes: bytes.
        ranks_per_node: 0 to tell by host names.
        seconds: see :class:`LinkJob`.

    Returns:
        The exit code: 1, and a line on stderr, when a rank died, hung or received wrong data.

    Raises:
        ValueError: see :func:`refuse`.
    """
    refuse(world_size, ranks_per_node, seconds)
    folder = Path(tempfile.mkdtemp(prefix="cpbench-links-"))
    job = LinkJob(device, tuple(sizes), ranks_per_node, seconds).save(folder)
    try:
        starter = LAUNCHERS[launcher]
        ranks = starter.commands(job, world_size, module="cpbench.tools.links_worker")
        trouble = _Watch(job, world_size, starter.failures).follow(ranks)
    except OSError as error:
        trouble = f"cannot start ranks: {error}"
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    about, times = _results(job)
    if as_json:
        print(
            json.dumps(
                {**about, "complete": trouble is None, "rows": times, "links": summary(times)}
            )
        )
    elif times:
        _print_tables(about, times)
    if trouble is not None:
        print(f"cpbench: {' '.join(trouble.split())}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


class _Watch:
    """A gang of ranks from start to end."""

    def __init__(self, job: Path, size: int, failures: Any) -> None:
        self._folder, self._failures = job.parent, failures
        self._ranks = [failure_cause.Rank(rank, journal_path(job, rank)) for rank in range(size)]

    def follow(self, commands: Sequence[Command]) -> str | None:
        """Wait for the end of all; why it came too early, in words, or None."""
        oom_kills, progress, limit = failure_cause.oom_kills(), time.monotonic(), STARTUP_S
        gang = Gang(commands)
        try:
            while True:
                if sum(len(rank.catch_up()) for rank in self._ranks):
                    progress, limit = time.monotonic(), SILENCE_S
                codes = gang.codes()
                if any(codes):
                    codes = gang.wait(PARTING_S)
                    gang.kill()
                    return self._why(codes, failure_cause.oom_kills() > oom_kills)
                if None not in codes:
                    for rank in self._ranks:
                        rank.catch_up()
                    early = [rank for rank in self._ranks if not rank.ended]
                    return self._at(f"{early[0].where} and ended early") if early else None
                if time.monotonic() - progress > limit:
                    where = ", ".join(rank.where for rank in self._ranks[:8])
                    return self._at(f"no answer within {limit:g} s: {where}; see {self._folder}")
                time.sleep(POLL_S)
        finally:
            gang.kill()

    def _why(self, codes: Sequence[int | None], oom_killed: bool) -> str:
        for rank in self._ranks:
            rank.catch_up()
        log = self._folder / "rank0.log"
        failure_cause.tell_codes(self._ranks, codes, self._failures, log)
        found = failure_cause.cause(self._ranks, oom_killed)
        if found is None:
            return f"the launcher {failure_cause.describe_end(codes[0])}; see {log}"
        rank, _, reason = found
        if self._failures is None:
            log = log.with_name(f"rank{rank.number}.log")
        return self._at(f"{reason}; see {log}")

    def _at(self, reason: str) -> str:
        """A reason, and what was being measured."""
        case = next((rank.case for rank in self._ranks if rank.case), None)
        return reason if case is None or case in reason else f"{case}: {reason}"


def _results(job: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Who was there, and the rows so far with their figures."""
    tables = Tail(results_path(job)).read()
    about = next((table for table in tables if table["kind"] == "world"), {})
    return about, [{**table, **figures(table)} for table in tables if table["kind"] == "times"]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of samples comes to: microseconds and GB/s, see the module's words."""
    medians = [statistics.median(group["times_us"]) for group in row["groups"]]
    order = sorted(range(len(medians)), key=lambda i: medians[i])
    middle = sorted(row["groups"][order[len(order) // 2]]["times_us"])
    low, high = (middle[round(share * (len(middle) - 1))] for share in (0.1, 0.9))
    found: dict[str, Any] = {"spread": (high - low) / statistics.median(middle)}
    factor = FACTORS[row["operation"]](row["ranks"])
    for name, time_us in (("", statistics.median(medians)), ("slowest_", medians[order[-1]])):
        algorithm = row["bytes"] / time_us / 1e3
        found |= {
            f"{name}us": time_us,
            f"{name}algbw": algorithm,
            f"{name}busbw": algorithm * factor,
        }
    return {**found, "slowest": row["groups"][order[-1]]["ranks"]}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each link class and operation: latency, and the best bus bandwidth at any size."""
    by_link: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_link.setdefault((row["link"], row["operation"]), []).append(row)
    found = []
    for (link, operation), some in by_link.items():
        least = min(some, key=lambda row: row["bytes"])
        best = max(some, key=lambda row: row["busbw"])
        worst = max(some, key=lambda row: row["slowest_busbw"])
        found.append(
            {
                "link": link, "operation": operation, "ranks": least["ranks"],
                "groups": len(least["groups"]), "latency_us": least["us"],
                "slowest_latency_us": least["slowest_us"], "busbw": best["busbw"],
                "at_bytes": best["bytes"], "slowest_busbw": worst["slowest_busbw"],
                "slowest": worst["slowest"],
            }
        )  # fmt: skip
    return found


def _print_tables(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    from cpbench.reports.tables.terminal import listing
    from cpbench.tools.links_operations import named

    hosts = about["hosts"]

    def slowest(row: dict[str, Any], groups: int) -> str:
        """Ranks of the slowest group, and where they are; nothing where there is one group."""
        there = sorted({hosts[rank] for rank in row["slowest"]})
        where = f" {'/'.join(there[:2])}" if len(set(hosts)) > 1 else ""
        return f"{named(row['slowest'])}{where}" if groups > 1 else ""

    print(
        f"{about['ranks']} ranks, {about['ranks_per_node']} a node, on {about['device']['type']}; "
        "node: inside a node, across: one rank of each node, all: all ranks"
    )
    print(f"flagged: {', '.join(about['flags'])}\n" if about["flags"] else "")
    table = [
        {
            "link": row["link"], "operation": row["operation"], "ranks": row["ranks"],
            "bytes": format_size(row["bytes"]), "us": _figure(row["us"]),
            "spread %": f"{100 * row['spread']:.0f}", "alg GB/s": _figure(row["algbw"]),
            "bus GB/s": _figure(row["busbw"]), "slowest": slowest(row, len(row["groups"])),
            "its us": _figure(row["slowest_us"]) if len(row["groups"]) > 1 else "",
        }
        for row in rows
    ]  # fmt: skip
    best = [
        {
            "link": row["link"], "operation": row["operation"], "ranks": row["ranks"],
            "groups": row["groups"], "latency us": _figure(row["latency_us"]),
            "best bus GB/s": _figure(row["busbw"]), "at bytes": format_size(row["at_bytes"]),
            "slowest": slowest(row, row["groups"]),
            "its GB/s": _figure(row["slowest_busbw"]) if row["groups"] > 1 else "",
        }
        for row in summary(rows)
    ]  # fmt: skip
    print(listing(table), end="\n\n")
    print(listing(best))


def _figure(value: float) -> str:
    """Three digits, or all before the point, and none beyond thousandths."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value > 0.001 else "<= 0.001"
