"""Cost estimates: order of cases, hours, and cases that are not run."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from cpbench.cli import main
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter, read_run
from cpbench.sweep import request as sweep_request
from cpbench.sweep import runs
from cpbench.sweep.estimate import Estimator, min_bytes_per_rank, oom_reason, order_cases
from cpbench.sweep.request import Request

SETTINGS = MeasureSettings()


def make_case(operator: str, seq_len: int, **fields: object) -> Case:
    return Case(operator=Spec.parse(operator), seq_len=seq_len, **fields)  # type: ignore[arg-type]


def write_records(out: Path, *cases: tuple[Case, float]) -> None:
    """Write records of cases, each with the seconds of a pass."""
    with RecordWriter(out / "records" / "w.jsonl") as writer:
        for case, seconds in cases:
            flops = case.problem.flops(case.seq_len * (case.seq_len + 1) // 2)
            record = Record(
                case=case, status="ok", flops=flops, conditions={"device": "cpu"},
                times_us={"fwd": [[seconds * 1e6]]}, started=1.0,
            )  # fmt: skip
            writer.append(record.to_json())


def test_times_scale_with_the_work_of_the_nearest_record(tmp_path: Path) -> None:
    write_records(tmp_path, (make_case("bands", 1024), 0.01), (make_case("bands", 8192), 0.32))
    estimates = Estimator("cpu", SETTINGS, [tmp_path])
    # Four times the FLOPs at the rate of 8K, the nearest record.
    assert estimates.pass_seconds(make_case("bands", 16384)) == pytest.approx(4 * 0.32, rel=1e-3)
    assert estimates.pass_seconds(make_case("bands", 2048)) == pytest.approx(4 * 0.01, rel=1e-3)
    assert estimates.rate(make_case("flex", 2048)) is None
    assert "1 cases estimated from records, of 1 from an assumed" in estimates.describe_sources(
        [make_case("bands", 2048), make_case("flex", 2048)]
    )


def test_a_pass_of_sparse_attention_is_cheaper() -> None:
    estimates = Estimator("cpu", SETTINGS, [])
    dense = estimates.pass_seconds(make_case("bands", 8192))
    window = estimates.pass_seconds(
        make_case("bands", 8192, mask=Spec.parse("sliding_window_causal:window=512"))
    )
    assert dense / window == pytest.approx(8192 / 2 / 512, rel=0.1)


def test_timeout_reason_from_records(tmp_path: Path) -> None:
    write_records(tmp_path, (make_case("bands", 65536), 300.0))
    estimates = Estimator("cpu", SETTINGS, [tmp_path])
    assert estimates.timeout_reason(make_case("bands", 65536)) is None
    assert estimates.timeout_reason(make_case("flex", 1 << 20)) is None  # no record of its method
    assert estimates.timeout_reason(make_case("bands", 262144)) == (
        "not run: about 4800 s per pass, estimated from earlier records, and timeout_s is 600"
    )


def test_min_bytes_per_rank() -> None:
    long_case = make_case(
        "bands", 1 << 20, dtype="bfloat16", num_heads_q=32, num_heads_kv=8, head_dim=128
    )
    head_bytes = (1 << 20) * 128 * 2
    assert min_bytes_per_rank(long_case) == 2 * (2 * 32 + 2 * 8) * head_bytes
    assert min_bytes_per_rank(long_case) == 8 * min_bytes_per_rank(
        Case.from_json({**long_case.to_json(), "world_size": 8, "strategy": "ring"})
    )
    assert oom_reason(long_case, 80 << 30, "x") is None
    assert oom_reason(long_case, 30 << 30, "gpu_memory of the profile") == (
        "not run: the tensors of a rank alone take 40.0 GiB, and 30.0 GiB are available "
        "(gpu_memory of the profile)"
    )


def test_the_cheapest_case_of_each_method_comes_first() -> None:
    names, lengths = ("sdpa.math", "bands", "flex"), (4096, 1024, 2048)
    cases = [make_case(name, n) for name, n in itertools.product(names, lengths)]
    ordered = order_cases(cases, Estimator("cpu", SETTINGS, []))
    assert [c.seq_len for c in ordered] == [1024] * 3 + [2048] * 3 + [4096] * 3
    slow = make_case("bands", 65536)
    ordered = order_cases([slow, *cases[:2]], Estimator("cpu", SETTINGS, []))
    assert [c.seq_len for c in ordered] == [
        1024,
        65536,
        4096,
    ]  # the cheapest of each method, then by cost


def test_interleaving_keeps_the_methods_of_a_problem_together() -> None:
    cases = [make_case(name, n) for n in (4096, 1024) for name in ("bands", "flex")]
    mixed = [cases[0], cases[2], cases[1], cases[3]]
    ordered = order_cases(mixed, Estimator("cpu", SETTINGS, []), turns={case.id for case in cases})
    assert [c.seq_len for c in ordered] == [1024, 1024, 4096, 4096]
    assert {str(c.operator) for c in ordered[:2]} == {"bands", "flex"}


SWEEP = """
[sweep]
operator = ["bands", "reference"]
seq_len = [64, 128]
num_heads_q = 1
head_dim = 16
[measure]
min_iterations = 3
max_iterations = 3
"""


def test_interleaved_measurement(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    arguments = ["run", str(file), "--out", str(out), "--device", "cpu"]
    assert main.invoke([*arguments, "--interleave", "3"]) == 0
    records = read_run(out).records.values()
    assert len(records) == 4
    for record in records:
        assert record.turns == [3, 3, 3]
        assert [len(times) for ranks in record.times_us.values() for times in ranks] == [9, 9]
    (journal,) = out.glob("jobs/*/rank0.jsonl")
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    started = [event["case"] for event in events if event["event"] == "start"]
    assert len(started) == 12
    for group in (started[:6], started[6:]):
        turns = [group[:2], group[2:4], group[4:]]
        assert len({frozenset(turn) for turn in turns}) == 1  # A B B A A B, say
        assert len(set(group)) == 2
    lines = [line for path in out.glob("records/*.jsonl") for line in path.open()]
    assert Counter(json.loads(line)["kind"] for line in lines)["case"] == 4


def test_cases_that_do_not_fit_are_recorded_as_oom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_request, "machine_memory_bytes", lambda: 40 << 10)
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    arguments = ["run", str(file), "--out", str(out), "--device", "cpu"]
    assert main.invoke(arguments) == 0
    assert "2 cases cannot succeed and are not run" in capsys.readouterr().err
    by_size = {r.case.seq_len: r for r in read_run(out).records.values()}
    assert by_size[64].status == "ok"
    assert (by_size[128].status, by_size[128].flags) == ("oom", ["not-run"])
    assert "the tensors of a rank alone take" in str(by_size[128].reason)
    assert not by_size[128].times_us


def test_a_case_during_which_runs_were_killed_is_given_up(tmp_path: Path) -> None:
    """Gangs that were killed lack the file that marks their end."""
    a, b = make_case("bands", 64), make_case("bands", 128)
    for number in range(runs.MAX_KILLED_RUNS):
        folder = tmp_path / "jobs" / f"w{number}"
        folder.mkdir(parents=True)
        events = [
            {"event": "boot", "time": 1, "pid": 1},
            {"event": "start", "time": 2, "case": a.id},
        ]
        (folder / "rank0.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert runs.count_killed_runs(tmp_path) == {a.id: runs.MAX_KILLED_RUNS}
    request = Request(
        name="x", cases=[a, b], out=tmp_path, launcher="local", device="cpu", settings=SETTINGS
    )
    assert runs.feasible_cases(request, [a, b]) == [b]
    record = read_run(tmp_path).records[a.id]
    assert (record.status, record.reason) == (
        "crash",
        "not run: 3 runs were killed during this case",
    )
    (tmp_path / "jobs" / "w0" / "over").touch()
    assert runs.count_killed_runs(tmp_path) == {a.id: runs.MAX_KILLED_RUNS - 1}
    assert [c.id for c in runs.order_cases(request, [a, b])] == [
        b.id,
        a.id,
    ]  # cases of killed runs come last


def test_a_dry_run_prints_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "quick", "--out", str(tmp_path / "run"), "--device", "cuda", "--dry-run"]
    assert main.invoke(arguments) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("about ")
    assert "GPU-hours: times of 0 cases estimated from records" in last_line
