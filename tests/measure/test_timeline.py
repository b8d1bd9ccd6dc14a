"""What ranks did when: sums, stragglers, the file for Perfetto, profilers around one case."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from run_cpbench import cpbench
from slow_comm import SlowComm, attention

from cpbench.inputs import Recipe
from cpbench.measure import clocks, timeline
from cpbench.measure.device import Cpu
from cpbench.measure.timeline_slices import Rank, Slice, chrome_trace, stragglers, sums
from cpbench.parallel.comm import Control
from cpbench.results.store import read_run
from cpbench.verify.check import inputs_of

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


def rank(
    compute: float, wait: float, pairs: int = 100, cpu: float = 1.0, begin: float = 0.0
) -> Rank:
    """One that computes, waits for keys of rank 1 and then packs for a tenth of a second."""
    through = begin + compute + wait
    return Rank("host", "cpu", [
        Slice("phase", "fwd", begin, through + 0.1),
        Slice("compute", "attention", begin, begin + compute, compute * cpu, {"pairs": pairs}),
        Slice("transfer", "keys", begin, through, None, {"receives": {"1": 8}}),
        Slice("waiting", "wait for keys", begin + compute, through, 0.0, {"receives": {"1": 8}}),
    ])  # fmt: skip


def test_what_a_rank_does_adds_up_to_the_phase() -> None:
    (one,) = sums([rank(1.0, 0.5)], "fwd")
    assert one.whole == pytest.approx(1.6)
    assert (one.compute, one.waiting, one.other) == pytest.approx((1.0, 0.5, 0.1))
    assert one.transfer == pytest.approx(1.5)
    assert one.processor == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([rank(1, 1), rank(1, 1), rank(1.02, 0.98)], "no rank is late; waiting takes up to 1e+03"),
        ([rank(1, 1), rank(2, 0, pairs=200), rank(1, 1)],
         "rank 1 (host, cpu) is busy 1e+03 ms longer than the others, of 2.1e+03 ms: it computes "
         "2.00x the pairs"),
        ([rank(1, 1), rank(1, 1), rank(2, 0)], "it is slow: 2.00x the time a pair"),
        ([rank(2, 0, cpu=0.5), rank(1, 1)],
         "it is starved: 2.00x the time a pair, with a processor for 50% of the time"),
        ([rank(1, 1), rank(1, 0.1), rank(1, 0.1)],
         "rank 0 (host, cpu) is through 900 ms after the others, of 2.1e+03 ms: it waits 900 ms "
         "longer, mostly for keys of rank 1"),
        ([rank(1, 1)], "no rank is late"),
    ],
)  # fmt: skip
def test_who_is_late_and_why(ranks: list[Rank], said: str) -> None:
    (line,) = stragglers(ranks)
    assert said in line


def test_transfers_that_overlap_lie_in_rows_of_their_own() -> None:
    one = rank(1.0, 0.5, begin=3.0)
    one.slices.insert(3, Slice("transfer", "gradients", 3.2, 4.0))
    one.slices.insert(4, Slice("transfer", "gradients", 4.0, 4.2))
    found = chrome_trace([one, rank(1.0, 0.5, begin=3.1)], {"case": "x"})
    json.dumps(found, allow_nan=False)
    events = found["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names[key] for key in names if key[0] == 0) == [
        "compute", "phase", "transfer", "transfer 2", "waiting",
    ]  # fmt: skip
    last: dict[Any, float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        key = event["pid"], event["tid"]
        assert event["ts"] >= last.get(key, 0.0) - 1e-3, f"{names[key]}: slices overlap"
        last[key] = event["ts"] + event["dur"]
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def watched(rank: int, size: int, strategy: str) -> tuple[list[Rank], list[float]]:
    """With a slow link and a slower operator; and how long each phase takes without a watch."""
    comm, control, device = SlowComm(), Control(), Cpu(1)
    SlowComm.seconds = 0.35
    work = attention(strategy, comm)
    for name in ("forward", "backward"):
        method = getattr(work.op.impl, name)

        def slowly(*given: Any, method: Any = method) -> Any:
            time.sleep(0.2)
            return method(*given)

        setattr(work.op.impl, name, slowly)
    inputs = inputs_of(work, Recipe(), "cpu")
    ranks = timeline.watch(work, inputs, device, comm, control)
    workload = timeline.Workload(work, inputs, comm)
    took = []
    for phase in ("fwd", "bwd"):
        device.flush_cache()
        control.barrier()
        took.append(device.time_us(lambda phase=phase: workload.call(phase)) / 1e6)  # type: ignore[misc]
    return ranks, took


@pytest.mark.parametrize("strategy", ["ring", "dispatch", "ulysses"])
def test_sums_are_the_measured_times(strategy: str) -> None:
    for attempt in range(3):  # a busy machine stretches one and not the other
        answers = run_ranks(2, watched, strategy)
        ranks = answers[0][0]
        pairs = [
            (one.whole, answers[number][1][at])
            for at, phase in enumerate(("fwd", "bwd"))
            for number, one in enumerate(sums(ranks, phase))
        ]
        if all(whole == pytest.approx(took, rel=0.05) for whole, took in pairs):
            break
        assert attempt < 2, f"watched and measured: {pairs}"
    assert [len(r.slices) for r in ranks] == [len(r.slices) for r in answers[1][0]]
    for phase in ("fwd", "bwd"):
        for one in sums(ranks, phase):
            assert one.compute + one.waiting + one.other == pytest.approx(one.whole)
            assert one.compute >= 0.2
            if strategy != "ulysses":
                assert one.waiting == pytest.approx(0.15 if phase == "fwd" else 0.5, rel=0.2)
                assert one.transfer >= 0.35


def told(rank: int, size: int) -> list[clocks.Offset]:
    """Offsets where rank r is on a machine of its own, 5 r seconds ahead."""
    clocks._machine = lambda: f"machine {rank}"  # type: ignore[assignment]
    real = time.perf_counter
    clocks.time = type("", (), {"perf_counter": staticmethod(lambda: real() + 5.0 * rank)})  # type: ignore[assignment]
    return clocks.offsets(Control())


def test_clocks_of_other_machines_are_put_right() -> None:
    for found in run_ranks(3, told):
        for rank, offset in enumerate(found):
            assert offset.seconds == pytest.approx(-5.0 * rank, abs=max(offset.within, 1e-9))
            assert offset.within < 0.05
    assert run_ranks(2, here) == [[0.0, 0.0], [0.0, 0.0]]


def here(rank: int, size: int) -> list[float]:
    return [offset.seconds for offset in clocks.offsets(Control())]


def test_a_traced_run_writes_what_ranks_did(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    code, said = cpbench("run", file, "--out", out)
    assert code == 0, said
    assert not (out / "traces").exists()
    code, said = cpbench("run", file, "--out", out, "--trace")
    assert code == 0, said
    found = read_run(out)
    traces = sorted((out / "traces").iterdir())
    assert [path.stem for path in traces] == sorted(found.records)
    for path in traces:
        trace = json.loads(path.read_text())
        assert {e["pid"] for e in trace["traceEvents"]} == {0, 1}
        assert {e["cat"] for e in trace["traceEvents"] if e["ph"] == "X"} >= {
            "phase", "compute", "waiting", "transfer",
        }  # fmt: skip
        assert [line[:4] for line in trace["otherData"]["stragglers"]] == ["fwd:", "bwd:"]
    traces[0].unlink()
    code, said = cpbench("run", file, "--out", out, "--trace")
    assert code == 0
    assert "1 of 2 cases are recorded" in said
    assert traces[0].exists()


def test_profilers_wrap_one_case(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    words = ("run", file, "--out", out, "--device", "cpu", "--where", "strategy=ring")
    bare = {"PATH": "/nowhere"}
    code, said = cpbench(*words, "--profiler", "nsys", env=bare)
    assert (code, said) == (2, "cpbench: --profiler nsys: there is no nsys on PATH; it comes with "
                            "CUDA\n")  # fmt: skip
    code, said = cpbench(*words, "--profiler", "ncu", env=bare)
    assert (code, said.count("\n")) == (2, 1)
    assert "needs --device cuda" in said
    code, said = cpbench(*words[:4], "--profiler", "nsys")
    assert code == 2
    assert "is for one case; these are 2" in said
    assert not out.exists()
    stand_in = tmp_path / "bin" / "nsys"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/sh\nfor word in "$@"; do case "$word" in --output=*) echo "$@" > "${word#*=}.txt";;'
        ' esac; done\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'
    )
    stand_in.chmod(0o755)

    env = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    code, said = cpbench(*words, "--profiler", "nsys", env=env)
    assert code == 0, said
    (profiled,) = (out / "profiles").iterdir()  # its times are not those of the case
    reports = sorted(profiled.glob("jobs/*/rank?.txt"))
    assert [path.name for path in reports] == ["rank0.txt", "rank1.txt"]
    assert "profile --trace=cuda,nvtx,osrt" in reports[0].read_text()
    assert len(list((profiled / "traces").iterdir())) == 1
    assert not read_run(out).records
