"""Timelines: time per activity, stragglers, the file for Perfetto, profilers around one case."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S
from ranks import run_ranks
from run_cpbench import cpbench
from slow_comm import (
    SimulatedClock,
    SimulatedComm,
    SimulatedDevice,
    attention,
    run_before_calls,
)

from cpbench.inputs import Recipe
from cpbench.measure import clocks, timeline
from cpbench.measure.device.cpu import Cpu
from cpbench.measure.timeline_slices import (
    RankTimeline,
    TimelineSlice,
    chrome_trace,
    phase_times,
    straggler_lines,
)
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.results.store import read_run
from cpbench.verify.check import rank_inputs

SWEEP = """
[sweep]
strategy = ["ring", "ulysses"]
layout = "contiguous"
mask = "causal"
seq_len = 256
num_heads_q = 4
head_dim = 16
world_size = 2
[measure]
min_iterations = 1
max_iterations = 2
exposure = false
"""


Pair = tuple[float, float]


def rank(
    compute: float, wait: float, pairs: int = 100, cpu: float = 1.0, start: float = 0.0
) -> RankTimeline:
    """A rank that computes, waits for keys of rank 1 and then packs for a tenth of a second."""
    arrival = start + compute + wait
    keys = {"receives": {"1": 8}}
    return RankTimeline("host", "cpu", [
        TimelineSlice("phase", "fwd", start, arrival + 0.1),
        TimelineSlice("compute", "attention", start, start + compute, compute * cpu,
                      {"pairs": pairs}),
        TimelineSlice("transfer", "keys", start, arrival, None, keys),
        TimelineSlice("waiting", "wait for keys", start + compute, arrival, 0.0, keys),
    ])  # fmt: skip


def test_activities_add_up_to_the_phase() -> None:
    (times,) = phase_times([rank(1.0, 0.5)], "fwd")
    assert times.whole == pytest.approx(1.6)
    assert (times.compute, times.waiting, times.other) == pytest.approx((1.0, 0.5, 0.1))
    assert times.transfer == pytest.approx(1.5)
    assert times.cpu_share == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([rank(1, 1), rank(1, 1), rank(1.02, 0.98)], "no straggler; ranks wait up to 1e+03 ms"),
        ([rank(1, 1), rank(2, 0, pairs=200), rank(1, 1)],
         "rank 1 (host, cpu) is busy 1e+03 ms longer than the others, of 2.1e+03 ms: it computes "
         "2.00x the pairs"),
        ([rank(1, 1), rank(1, 1), rank(2, 0)], "it is slow: 2.00x the time per pair"),
        ([rank(2, 0, cpu=0.5), rank(1, 1)],
         "it is starved: 2.00x the time per pair, on a core for 50% of the time"),
        ([rank(1, 1), rank(1, 0.1), rank(1, 0.1)],
         "rank 0 (host, cpu) ends 900 ms after the others, of 2.1e+03 ms: it waits 900 ms longer, "
         "mostly for keys from rank 1"),
        ([rank(1, 1)], "no straggler"),
    ],
)  # fmt: skip
def test_the_straggler_and_its_cause_are_named(ranks: list[RankTimeline], expected: str) -> None:
    (line,) = straggler_lines(ranks)
    assert expected in line


def test_overlapping_transfers_get_rows_of_their_own() -> None:
    first = rank(1.0, 0.5, start=3.0)
    first.slices.insert(3, TimelineSlice("transfer", "gradients", 3.2, 4.0))
    first.slices.insert(4, TimelineSlice("transfer", "gradients", 4.0, 4.2))
    trace = chrome_trace([first, rank(1.0, 0.5, start=3.1)], {"case": "x"})
    json.dumps(trace, allow_nan=False)
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names[key] for key in names if key[0] == 0) == [
        "compute", "phase", "transfer", "transfer 2", "waiting",
    ]  # fmt: skip
    row_ends: dict[Any, float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        key = event["pid"], event["tid"]
        assert event["ts"] >= row_ends.get(key, 0.0) - 1e-3, f"{names[key]}: slices overlap"
        row_ends[key] = event["ts"] + event["dur"]
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def simulated_timelines(
    rank: int, size: int, strategy: str
) -> tuple[list[RankTimeline], list[float]]:
    """Timelines on a simulated clock, with an operator that takes 0.2 s and a link with a latency
    of 0.35 s; and the seconds of each phase without recording."""
    clock = SimulatedClock()
    timeline._HostClock.mark = lambda self: clock.now_s  # type: ignore[method-assign]
    comm, device = SimulatedComm(TorchComm(), clock, 0.35), SimulatedDevice(clock)
    work = attention(strategy, comm)
    run_before_calls(work, functools.partial(clock.advance, 0.2))
    inputs = rank_inputs(work, Recipe(), "cpu")
    ranks = timeline.record_timelines(work, inputs, device, comm, Control())
    workload = timeline.Workload(work, inputs, comm)
    phase_us = [
        device.time_us(functools.partial(workload.run_phase, phase)) for phase in workload.phases
    ]
    return ranks, [us / 1e6 for us in phase_us]


@pytest.mark.parametrize(
    ("strategy", "compute", "waiting", "transfer"),
    [  # seconds of (forward, backward)
        ("ring", (0.4, 0.4), (0.15, 0.5), (0.35, 0.7)),
        ("dispatch", (0.4, 0.4), (0.15, 0.5), (0.35, 0.7)),
        ("ulysses", (0.2, 0.2), (0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_recorded_times_are_the_measured_times(
    strategy: str, compute: Pair, waiting: Pair, transfer: Pair
) -> None:
    results = run_ranks(2, simulated_timelines, strategy)
    ranks = results[0][0]
    assert ranks == results[1][0]  # every rank has the timelines of all
    for number, phase in enumerate(("fwd", "bwd")):
        for times, (_, measured) in zip(phase_times(ranks, phase), results, strict=True):
            assert times.whole == pytest.approx(measured[number])
            assert times.compute == pytest.approx(compute[number])
            assert times.waiting == pytest.approx(waiting[number])
            assert times.transfer == pytest.approx(transfer[number])
            assert times.other == pytest.approx(0.0)


def overlapping_timelines(rank: int, size: int) -> tuple[list[RankTimeline], float, float]:
    """Timelines of real transfers, and the times just before and after recording.  Operator calls
    return only after all transfers in flight have arrived and been recorded."""
    post, add = timeline.RecordingComm._record, timeline.Recorder.add
    changed, counts = threading.Condition(), {"posted": 0, "recorded": 0}

    def post_and_count(self: timeline.RecordingComm, *args: Any) -> Any:
        counts["posted"] += 1
        return post(self, *args)

    def add_and_count(self: timeline.Recorder, row: str, *args: Any) -> None:
        add(self, row, *args)
        with changed:
            counts["recorded"] += row == "transfer"
            changed.notify()

    timeline.RecordingComm._record = post_and_count  # type: ignore[method-assign]
    timeline.Recorder.add = add_and_count  # type: ignore[method-assign]

    def wait_for_transfers() -> None:
        with changed:
            done = changed.wait_for(lambda: counts["recorded"] == counts["posted"], LIMIT_S)
        assert done, "a transfer was not recorded while the operator computed"

    comm = TorchComm()
    work = attention("ring", comm)
    run_before_calls(work, wait_for_transfers)
    inputs = rank_inputs(work, Recipe(), "cpu")
    start = time.perf_counter()
    ranks = timeline.record_timelines(work, inputs, Cpu(1), comm, Control())
    return ranks, start, time.perf_counter()


def test_transfers_are_recorded_while_a_rank_computes() -> None:
    for ranks, start, end in run_ranks(2, overlapping_timelines):
        for timelines in ranks:
            for phase in ("fwd", "bwd"):
                whole, thread = timelines.thread_slices(phase)
                assert start < whole.start < whole.end < end
                assert sum(item.seconds for item in thread) == pytest.approx(whole.seconds)
                first_call = next(item for item in thread if item.row == "compute")
                keys = timelines.transfers(phase)[0]
                assert keys.start <= first_call.start
                assert keys.end <= first_call.end
                wait = next(item for item in thread if item.row == "waiting")
                assert first_call.end <= wait.start


def distant_offsets(rank: int, size: int) -> tuple[list[clocks.Offset], float]:
    """Offsets where rank r is on a machine of its own whose clock is 5 r seconds ahead, and the
    seconds that estimating them took."""
    clocks._clock_domain = lambda: f"machine {rank}"  # type: ignore[assignment]
    real = time.perf_counter
    ahead = staticmethod(lambda: real() + 5.0 * rank)
    clocks.time = type("", (), {"perf_counter": ahead})  # type: ignore[assignment]
    start = real()
    offsets = clocks.offsets(Control())
    return offsets, real() - start


def test_clock_offsets_of_other_machines() -> None:
    ranks = run_ranks(3, distant_offsets)
    _, seconds = ranks[0]  # on rank 0, which waits for every reply
    for offsets, _ in ranks:
        for rank, offset in enumerate(offsets):
            assert offset.seconds == pytest.approx(-5.0 * rank, abs=max(offset.uncertainty, 1e-9))
            # Half the shortest of the round trips, which together took no longer than all of it.
            assert offset.uncertainty <= seconds / clocks.ROUND_TRIPS / 2
    assert run_ranks(2, local_offsets) == [[0.0, 0.0], [0.0, 0.0]]


def local_offsets(rank: int, size: int) -> list[float]:
    return [offset.seconds for offset in clocks.offsets(Control())]


def test_a_traced_run_writes_timelines(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    code, output = cpbench("run", file, "--out", out)
    assert code == 0, output
    assert not (out / "traces").exists()
    code, output = cpbench("run", file, "--out", out, "--trace")
    assert code == 0, output
    run = read_run(out)
    traces = sorted((out / "traces").iterdir())
    assert [path.stem for path in traces] == sorted(run.records)
    for path in traces:
        trace = json.loads(path.read_text())
        assert {e["pid"] for e in trace["traceEvents"]} == {0, 1}
        assert {e["cat"] for e in trace["traceEvents"] if e["ph"] == "X"} >= {
            "phase", "compute", "waiting", "transfer",
        }  # fmt: skip
        assert [line[:4] for line in trace["otherData"]["stragglers"]] == ["fwd:", "bwd:"]
    traces[0].unlink()
    code, output = cpbench("run", file, "--out", out, "--trace")
    assert code == 0
    assert "1 of 2 cases are recorded" in output
    assert traces[0].exists()


def test_profilers_wrap_one_case(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    words = ("run", file, "--out", out, "--device", "cpu", "--where", "strategy=ring")
    bare = {"PATH": "/nowhere"}
    code, output = cpbench(*words, "--profiler", "nsys", env=bare)
    message = "cpbench: --profiler nsys: nsys is not on PATH; it comes with CUDA\n"
    assert (code, output) == (2, message)
    code, output = cpbench(*words, "--profiler", "ncu", env=bare)
    assert (code, output.count("\n")) == (2, 1)
    assert "needs --device cuda" in output
    code, output = cpbench(*words[:4], "--profiler", "nsys")
    assert code == 2
    assert "is for one case, not 2" in output
    assert not out.exists()
    stand_in = tmp_path / "bin" / "nsys"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/sh\nfor word in "$@"; do case "$word" in --output=*) echo "$@" > "${word#*=}.txt";;'
        ' esac; done\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'
    )
    stand_in.chmod(0o755)

    env = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    code, output = cpbench(*words, "--profiler", "nsys", env=env)
    assert code == 0, output
    (profiled,) = (out / "profiles").iterdir()  # its times are not those of the case
    reports = sorted(profiled.glob("jobs/*/rank?.txt"))
    assert [path.name for path in reports] == ["rank0.txt", "rank1.txt"]
    assert "profile --trace=cuda,nvtx,osrt" in reports[0].read_text()
    assert len(list((profiled / "traces").iterdir())) == 1
    assert not read_run(out).records
