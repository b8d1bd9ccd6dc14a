"""Whole runs of operators and strategies that would distort what is measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from neighbours import neighbours
from paths import HELPERS

from cpbench.results.record import Record
from cpbench.sweep import runs, sweep_file
from cpbench.sweep.request import Request

OPERATORS = HELPERS / "planted" / "distorting_operators.py"
MIB = 1 << 20


def _run(out: Path, names: list[str], measure: Any = None, **sweep_table: Any) -> list[Record]:
    """The records, in the order of the cases; all of them right."""
    table = {
        "seq_len": 400, "num_heads_q": 2, "head_dim": 16, "direction": "fwd",
        "operator": [f"{OPERATORS}:{name}" for name in names], **sweep_table,
    }  # fmt: skip
    settings = {"max_seconds": 0.2, "max_iterations": 7, **(measure or {})}
    loaded = sweep_file.expand({"sweep": table, "measure": settings}, "distortion")
    request = Request(
        name="distortion", cases=list(loaded.cases), out=out, launcher="local", device="cpu",
        settings=loaded.settings,
    )  # fmt: skip
    runs.execute(request, quiet=True)
    records = runs.results(request).records
    found = [records[case.id] for case in loaded.cases]
    for record in found:
        assert record.status == "ok", f"{record.case.label}: {record.reason}"
    return found


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    names = [
        "sets_threads", "uses_threads", "sets_variable", "sees_defaults", "holds_workspace",
        "holds_array", "allocates_arrays", "honest",
    ]  # fmt: skip
    found = _run(tmp_path_factory.mktemp("distortion"), names)
    return dict(zip(names, found, strict=True))


def distortions(record: Record) -> list[str]:
    """The flags but those of the machine."""
    return sorted({*record.flags} - {"contended", "oversubscribed"})


def test_threads_that_an_operator_sets_are_flagged(records: dict[str, Record]) -> None:
    assert set(distortions(records["sets_threads"])) >= {"changed-state", "more-threads"}
    assert records["sets_threads"].notes == ["changed-state: threads 1 -> 2"]


def test_threads_that_leave_no_trace_are_flagged(records: dict[str, Record]) -> None:
    assert "more-threads" in distortions(records["uses_threads"])


def test_a_changed_variable_is_flagged(records: dict[str, Record]) -> None:
    assert distortions(records["sets_variable"]) == ["changed-state"]
    assert records["sets_variable"].notes == ["changed-state: environment OMP_PROC_BIND"]


def test_the_next_operator_sees_the_state_from_before(records: dict[str, Record]) -> None:
    assert distortions(records["sees_defaults"]) == []
    assert distortions(records["honest"]) == []


def test_process_groups_end_with_the_cases_that_use_them(tmp_path: Path) -> None:
    """Those of NCCL hold memory of the GPU.  Each case has other pairs of ranks."""
    methods = {"strategy": "usp:ulysses=2", "placement": ["ring", "ulysses"]}
    measure = {"interleave": 1, "memory": False, "max_iterations": 1, "min_iterations": 1}
    _run(tmp_path, ["sees_its_group"], measure, **methods, world_size=4)


def test_what_an_operator_keeps_is_part_of_its_peak(records: dict[str, Record]) -> None:
    honest, workspace = records["honest"], records["holds_workspace"]
    assert honest.memory_bytes["held"] == [0]
    assert workspace.memory_bytes["held"] == [96 * MIB]
    assert records["holds_array"].memory_bytes["held"] == [48 * MIB]
    assert honest.peak_bytes is not None
    assert workspace.peak_bytes == honest.peak_bytes + 96 * MIB
    assert not distortions(workspace)


def test_memory_that_torch_has_not_allocated_is_flagged(records: dict[str, Record]) -> None:
    record = records["allocates_arrays"]
    assert distortions(record) == ["memory-gap"]
    assert record.memory_bytes["process"][0] > 250 * MIB
    assert record.memory_bytes["peak"][0] < 64 * MIB


def test_what_a_module_keeps_counts_in_all_cases_of_its_operator(tmp_path: Path) -> None:
    found = _run(tmp_path, ["holds_in_module", "honest"], seq_len=[300, 400])
    for record in found:
        held = 16 * MIB if record.case.operator.name.endswith("holds_in_module") else 0
        assert record.memory_bytes["held"] == [held]


def test_honest_operators_are_not_flagged(tmp_path: Path) -> None:
    """Where others take the cores, a case may look distorted once, but not each time."""
    common = ["bands", "sdpa.cpu_flash"]
    for threads, slow in ((1, "triton_band"), (2, "flex")):
        flagged: list[tuple[str, list[str]]] = []
        for attempt in range(5):
            found = _run(
                tmp_path / f"{threads}-{attempt}", [], {"threads": threads},
                operator=[*common, slow], seq_len=300, mask="sliding_window:window=100",
            )  # fmt: skip
            assert all(record.memory_bytes["held"] == [0] for record in found)
            flagged = [(record.case.label, distortions(record)) for record in found]
            flagged = [(label, found_flags) for label, found_flags in flagged if found_flags]
            if not flagged:
                break
        assert not flagged


def test_delays_of_every_phase_and_neighbours(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks on one core are oversubscribed")
    with neighbours(cores, 0.37):
        (record,) = _run(
            tmp_path, [], {"exposure": False}, operator="bands", strategy="ring", world_size=2,
            direction="fwd_bwd", seq_len=2048,
        )  # fmt: skip
    assert record.flags == ["contended"]
    assert {phase: [len(rank) for rank in ranks] for phase, ranks in record.delay_us.items()} == {
        phase: [record.iterations] * 2 for phase in ("fwd", "bwd")
    }
    assert max(map(max, record.delay_us["bwd"])) > 0


def test_traffic_behind_the_communicator_is_flagged_and_counted(tmp_path: Path) -> None:
    strategies = ["ring", f"{HELPERS / 'planted' / 'distorting_strategies.py'}:sends_behind_comm"]
    ring, behind = _run(
        tmp_path, [], {"exposure": False}, operator="bands", strategy=strategies, world_size=2,
        direction="fwd_bwd",
    )  # fmt: skip
    assert distortions(ring) == []
    assert distortions(behind) == ["mispredicted", "untracked-traffic"]
    assert behind.bytes_sent["bwd"] == ring.bytes_sent["bwd"]
    # An all-reduce sends twice a rank's share of the tensor to every other rank.
    extra = [b - r for b, r in zip(behind.bytes_sent["fwd"], ring.bytes_sent["fwd"], strict=True)]
    assert extra == [4000, 4000]
