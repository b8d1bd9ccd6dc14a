"""``cpbench links``: latency and bandwidth of the links between ranks.

Definitions are those of nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth (algbw) is size over
time, bus bandwidth (busbw) is algbw times a factor that makes it comparable with the hardware's.
Gigabytes are 1e9 bytes.  Latency is the time of the smallest size.

The time of a group of ranks (a pair, a node) is the median over its samples.  Of several groups,
the median group and the slowest are reported.  Spread is the distance between the 10th and the 90th
percentile of the samples of the median group, relative to its median.
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
from cpbench.launchers import failure_cause, join
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import THIS_MACHINE, GangSpec, Place
from cpbench.launchers.registry import LAUNCHERS
from cpbench.launchers.supervisor import GRACE_S, STARTUP_S
from cpbench.results.store import Tail
from cpbench.tools.links_worker import LinkJob, journal_path, results_path

MAX_BYTES = 1 << 30
DEFAULT_SECONDS = 0.3
MAX_SECONDS = 600.0
MAX_RANKS = 256  # processes on one machine: more would only wait for each other
HANG_TIMEOUT_S = 300.0  # without progress of any rank
POLL_S = 0.05

# busbw / algbw of n ranks.
BUSBW_FACTORS: dict[str, Callable[[int], float]] = {
    "p2p": lambda n: 1.0,
    "ring": lambda n: 1.0,
    "cross": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}


def parse_sizes(text: str) -> list[int]:
    """Sizes in bytes, sorted, from a list such as ``"8,64k,16m"``.

    Raises:
        ValueError: for anything else, or a size out of range.
    """
    sizes = [parse_size(item) for item in text.split(",")]
    for size in sizes:
        if not 1 <= size <= MAX_BYTES:
            raise ValueError(f"--sizes: {size} bytes is not between 1 and {MAX_BYTES}")
    return sorted(set(sizes))


def check_arguments(world_size: int, ranks_per_node: int, seconds: float) -> None:
    """Raise ``ValueError`` for numbers of ranks or a sampling time that are out of range."""
    if world_size < 2:
        raise ValueError(f"--world-size {world_size}: give 2 ranks or more")
    if world_size > MAX_RANKS:
        raise ValueError(f"--world-size {world_size}: at most {MAX_RANKS} ranks on one machine")
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"--seconds {seconds}: give more than 0 and at most {MAX_SECONDS:g}")
    if ranks_per_node < 0 or (ranks_per_node and world_size % ranks_per_node):
        raise ValueError(
            f"--ranks-per-node {ranks_per_node}: must divide the {world_size} ranks, or be 0 to "
            "use host names"
        )


def check_folder(out: Path | None, place: Place) -> None:
    """Raise ``ValueError`` if ranks on several nodes have no folder that all nodes share."""
    if out is None and place.nodes > 1:
        raise ValueError(f"{place.nodes} nodes need --out, a folder on a file system they share")


def run(
    world_size: int,
    device: str,
    launcher: str,
    sizes: Sequence[int],
    ranks_per_node: int = 0,
    as_json: bool = False,
    seconds: float = DEFAULT_SECONDS,
    place: Place = THIS_MACHINE,
    out: Path | None = None,
) -> int:
    """Measure the links between ranks and print the results.

    Args:
        world_size: ranks to start.
        device: ``"cpu"`` or ``"cuda"``.
        launcher: a name in ``LAUNCHERS``.
        sizes: bytes.
        ranks_per_node: 0 to find it from host names, or from the nodes of ``place``.
        as_json: print JSON instead of tables.
        seconds: sampling time, see :class:`LinkJob`.
        place: the nodes; those of torchrun join as in a run (``cpbench join``).
        out: where the files of the ranks are kept, on which the caller is registered as active;
            None for a temporary folder.

    Returns:
        The exit code: 1, with a line on stderr, if a rank died, hung or received wrong data.

    Raises:
        ValueError: see :func:`check_arguments` and :func:`check_folder`.
    """
    check_arguments(world_size, ranks_per_node, seconds)
    check_folder(out, place)
    if ranks_per_node == 0 and place.nodes > 1:
        ranks_per_node = place.ranks_per_node(world_size)
    if out is None:
        folder = Path(tempfile.mkdtemp(prefix="cpbench-links-"))
    else:
        jobs = out.resolve() / "jobs"
        jobs.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"links-{time.strftime('%Y%m%dT%H%M%S')}-", dir=jobs))
        folder.chmod(0o755)
    job = LinkJob(device, tuple(sizes), ranks_per_node, seconds).save(folder)
    spec = GangSpec(job, world_size, place, module="cpbench.tools.links_worker")
    try:
        failure = _GangMonitor(spec, launcher).run()
    except OSError as error:
        failure = f"cannot start ranks: {error}"
    except KeyboardInterrupt:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    world, times = _read_results(job)
    if as_json:
        tables = {"rows": times, "links": summarise_links(times)}
        print(json.dumps({**world, "complete": failure is None, **tables}))
    elif times:
        _print_tables(world, times)
    if failure is not None:
        print(f"cpbench: {' '.join(failure.split())}", file=sys.stderr)
        return 1
    if out is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class _GangMonitor:
    """Supervisor of the gang of ranks of one ``cpbench links``."""

    def __init__(self, spec: GangSpec, launcher: str) -> None:
        self._folder, self._spec, self._launcher = spec.job.parent, spec, LAUNCHERS[launcher]
        self._ranks = [
            failure_cause.RankState(rank, journal_path(spec.job, rank))
            for rank in range(spec.world_size)
        ]
        joined = launcher == "torchrun" and spec.place.nodes > 1
        self._peers = join.Peers(self._folder) if joined else None

    def run(self) -> str | None:
        """Start the ranks and wait until all have ended; the reason of a failure, or None."""
        oom_kills = failure_cause.oom_kill_count()
        if self._peers is not None:
            join.announce_gang(self._spec)
        last_progress, limit = time.monotonic(), STARTUP_S
        gang = Gang(self._launcher.commands(self._spec))
        try:
            while True:
                if self._peers is not None and (lost := self._peers.lost_machine()):
                    return self._with_case(f"machine {lost} sends no heartbeat")
                if sum(len(rank.read_journal()) for rank in self._ranks):
                    last_progress, limit = time.monotonic(), HANG_TIMEOUT_S
                codes = gang.exit_codes()
                if any(codes):
                    codes = gang.wait(GRACE_S)
                    gang.kill()
                    return self._failure_reason(codes, failure_cause.oom_kill_count() > oom_kills)
                if None not in codes:
                    for rank in self._ranks:
                        rank.read_journal()
                    early = [rank for rank in self._ranks if not rank.finished]
                    if not early:
                        return None
                    return self._with_case(f"{early[0].description} and ended early")
                if time.monotonic() - last_progress > limit:
                    phases = ", ".join(rank.description for rank in self._ranks[:8])
                    reason = f"no progress within {limit:g} s: {phases}; see {self._folder}"
                    return self._with_case(reason)
                time.sleep(POLL_S)
        finally:
            if self._peers is not None:
                (self._folder / join.GANG_ENDED_FILE).touch()
            gang.kill()

    def _failure_reason(self, codes: Sequence[int | None], oom_killed: bool) -> str:
        """The reason of a failure, from journals and exit codes, with the log to read."""
        for rank in self._ranks:
            rank.read_journal()
        log, parse_exit_codes = self._spec.log, self._launcher.parse_exit_codes
        failure_cause.assign_exit_codes(self._ranks, codes, parse_exit_codes, log)
        cause = failure_cause.root_cause(self._ranks, oom_killed)
        if cause is None:
            return f"the launcher {failure_cause.describe_exit(codes[0])}; see {log}"
        rank, _, reason = cause
        if parse_exit_codes is None:
            log = log.with_name(f"rank{rank.rank}.log")
        return self._with_case(f"{reason}; see {log}")

    def _with_case(self, reason: str) -> str:
        """A reason, after the operation that was being measured."""
        case = next((rank.case for rank in self._ranks if rank.case), None)
        return reason if case is None or case in reason else f"{case}: {reason}"


def _read_results(job: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The ranks and their hosts, and the measured rows with their statistics."""
    tables = Tail(results_path(job)).read()
    world = next((table for table in tables if table["kind"] == "world"), {})
    times = [table for table in tables if table["kind"] == "times"]
    return world, [{**row, **link_statistics(row)} for row in times]


def link_statistics(row: dict[str, Any]) -> dict[str, Any]:
    """Microseconds, GB/s and spread of a row of samples, as defined above in this module."""
    medians = [statistics.median(group["times_us"]) for group in row["groups"]]
    order = sorted(range(len(medians)), key=lambda i: medians[i])
    middle = sorted(row["groups"][order[len(order) // 2]]["times_us"])
    low, high = (middle[round(share * (len(middle) - 1))] for share in (0.1, 0.9))
    values: dict[str, Any] = {"spread": (high - low) / statistics.median(middle)}
    factor = BUSBW_FACTORS[row["operation"]](row["ranks"])
    for name, time_us in (("", statistics.median(medians)), ("slowest_", medians[order[-1]])):
        algbw = row["bytes"] / time_us / 1e3
        values |= {
            f"{name}us": time_us,
            f"{name}algbw": algbw,
            f"{name}busbw": algbw * factor,
        }
    return {**values, "slowest": row["groups"][order[-1]]["ranks"]}


def summarise_links(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Latency and best bus bandwidth over sizes, for each link class and operation."""
    by_link: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_link.setdefault((row["link"], row["operation"]), []).append(row)
    summary = []
    for (link, operation), link_rows in by_link.items():
        smallest = min(link_rows, key=lambda row: row["bytes"])
        best = max(link_rows, key=lambda row: row["busbw"])
        slowest = max(link_rows, key=lambda row: row["slowest_busbw"])
        summary.append(
            {
                "link": link, "operation": operation, "ranks": smallest["ranks"],
                "groups": len(smallest["groups"]), "latency_us": smallest["us"],
                "slowest_latency_us": smallest["slowest_us"], "busbw": best["busbw"],
                "at_bytes": best["bytes"], "slowest_busbw": slowest["slowest_busbw"],
                "slowest": slowest["slowest"],
            }
        )  # fmt: skip
    return summary


def _print_tables(world: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print the times of every operation and size, then the summary."""
    from cpbench.reports.tables.terminal import listing
    from cpbench.tools.links_operations import format_ranks

    hosts = world["hosts"]

    def slowest(row: dict[str, Any], groups: int, figure: str) -> str:
        """The slowest of several groups of ranks, with its hosts and figure; "" for one group."""
        group_hosts = sorted({hosts[rank] for rank in row["slowest"]})
        suffix = f" ({'/'.join(group_hosts[:2])})" if len(set(hosts)) > 1 else ""
        ranks = format_ranks(row["slowest"])
        return f"slowest: ranks {ranks}{suffix}, {figure}" if groups > 1 else ""

    device = world["device"]["type"]
    print(
        f"{world['ranks']} ranks, {world['ranks_per_node']} per node, on {device}; "
        "bandwidths in GB/s\nnode: inside a node, across: one rank of each node, all: all ranks"
    )
    print(f"flags: {', '.join(world['flags'])}\n" if world["flags"] else "")
    times = [
        {
            "link": row["link"], "operation": row["operation"], "ranks": row["ranks"],
            "bytes": format_size(row["bytes"]), "us": _format_number(row["us"]),
            "spread %": f"{100 * row['spread']:.0f}", "algbw": _format_number(row["algbw"]),
            "busbw": _format_number(row["busbw"]),
            "summary": slowest(row, len(row["groups"]), f"{_format_number(row['slowest_us'])} us"),
        }
        for row in rows
    ]  # fmt: skip
    summary = [
        {
            "link": row["link"], "operation": row["operation"], "ranks": row["ranks"],
            "groups": row["groups"], "latency us": _format_number(row["latency_us"]),
            "best busbw": _format_number(row["busbw"]), "at bytes": format_size(row["at_bytes"]),
            "summary": slowest(
                row, row["groups"], f"busbw {_format_number(row['slowest_busbw'])}"
            ),
        }
        for row in summarise_links(rows)
    ]  # fmt: skip
    print(listing(times), end="\n\n")
    print(listing(summary))


def _format_number(value: float) -> str:
    """Three significant digits, or whole numbers from 100 on; at least 0.001."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value > 0.001 else "<= 0.001"
