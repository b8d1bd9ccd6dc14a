"""What cases will cost: order, hours, and what is not even tried."""

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
from cpbench.sweep import runs
from cpbench.sweep.estimate import Estimator, least_bytes, ordered, too_large

SETTINGS = MeasureSettings()


def case(operator: str, seq_len: int, **more: object) -> Case:
    return Case(operator=Spec.parse(operator), seq_len=seq_len, **more)  # type: ignore[arg-type]


def recorded(out: Path, *cases: tuple[Case, float]) -> None:
    """Records with a time of a pass in seconds each."""
    with RecordWriter(out / "records" / "w.jsonl") as writer:
        for one, took in cases:
            area = one.seq_len * (one.seq_len + 1) // 2
            flops = one.problem.flops(area)
            record = Record(
                case=one, status="ok", flops=flops, conditions={"device": "cpu"},
                times_us={"fwd": [[took * 1e6]]}, started=1.0,
            )  # fmt: skip
            writer.append(record.to_json())


def test_times_scale_with_the_work_of_the_nearest_record(tmp_path: Path) -> None:
    recorded(tmp_path, (case("bands", 1024), 0.01), (case("bands", 8192), 0.32))
    known = Estimator("cpu", SETTINGS, [tmp_path])
    # Four times the work at the rate of 8K; 32 * 64 = 2,048 times 0.01 / 0.32 would be otherwise.
    assert known.pass_seconds(case("bands", 16384)) == pytest.approx(4 * 0.32, rel=1e-3)
    assert known.pass_seconds(case("bands", 2048)) == pytest.approx(4 * 0.01, rel=1e-3)
    assert known.rate(case("flex", 2048)) is None
    assert "1 estimated from records, of 1 from a guessed" in known.words(
        [case("bands", 2048), case("flex", 2048)]
    )


def test_a_pass_of_sparse_attention_is_cheaper() -> None:
    known = Estimator("cpu", SETTINGS, [])
    dense = known.pass_seconds(case("bands", 8192))
    window = known.pass_seconds(
        case("bands", 8192, mask=Spec.parse("sliding_window_causal:window=512"))
    )
    assert dense / window == pytest.approx(8192 / 2 / 512, rel=0.1)


def test_what_is_hopeless_by_records_is_told(tmp_path: Path) -> None:
    recorded(tmp_path, (case("bands", 65536), 300.0))
    known = Estimator("cpu", SETTINGS, [tmp_path])
    assert known.hopeless(case("bands", 65536)) is None
    assert known.hopeless(case("flex", 1 << 20)) is None  # never measured: not judged
    assert known.hopeless(case("bands", 262144)) == (
        "not run: about 4800 s a pass by earlier records, and timeout_s is 600"
    )


def test_the_bound_of_memory_is_of_what_any_method_holds() -> None:
    one = case("bands", 1 << 20, dtype="bfloat16", num_heads_q=32, num_heads_kv=8, head_dim=128)
    each = (1 << 20) * 128 * 2
    assert least_bytes(one) == 2 * (2 * 32 + 2 * 8) * each
    assert least_bytes(one) == 8 * least_bytes(
        Case.from_json({**one.to_json(), "world_size": 8, "strategy": "ring"})
    )
    assert too_large(one, 80 << 30, "x") is None
    assert too_large(one, 30 << 30, "gpu_memory of the profile") == (
        "not run: a rank's tensors alone take 40.0 GiB, and there are 30.0 (gpu_memory of the "
        "profile)"
    )


def test_the_cheapest_of_each_contender_comes_first_and_then_by_cost() -> None:
    names, lengths = ("sdpa.math", "bands", "flex"), (4096, 1024, 2048)
    cases = [case(name, n) for name, n in itertools.product(names, lengths)]
    found = ordered(cases, Estimator("cpu", SETTINGS, []), interleave=False)
    assert [c.seq_len for c in found] == [1024] * 3 + [2048] * 3 + [4096] * 3
    slow = case("bands", 65536)
    found = ordered([slow, *cases[:2]], Estimator("cpu", SETTINGS, []), interleave=False)
    assert [c.seq_len for c in found] == [1024, 65536, 4096]  # a first look at each, then by cost


def test_interleaving_keeps_the_contenders_of_a_problem_together() -> None:
    cases = [case(name, n) for n in (4096, 1024) for name in ("bands", "flex")]
    mixed = [cases[0], cases[2], cases[1], cases[3]]
    found = ordered(mixed, Estimator("cpu", SETTINGS, []), interleave=True)
    assert [c.seq_len for c in found] == [1024, 1024, 4096, 4096]
    assert {str(c.operator) for c in found[:2]} == {"bands", "flex"}


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


def test_contenders_are_measured_in_turn(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    words = ["run", str(file), "--out", str(out), "--device", "cpu"]
    assert main.invoke([*words, "--interleave", "3"]) == 0
    found = read_run(out).records.values()
    assert len(found) == 4
    for record in found:
        assert record.turns == [3, 3, 3]
        assert [len(times) for ranks in record.times_us.values() for times in ranks] == [9, 9]
    (journal,) = out.glob("jobs/*/rank0.jsonl")
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    started = [note["case"] for note in notes if note["event"] == "start"]
    assert len(started) == 12
    for group in (started[:6], started[6:]):
        assert group[0::2] == [group[0]] * 3  # A B A B A B
        assert group[1::2] == [group[1]] * 3
        assert group[0] != group[1]
    lines = [line for path in out.glob("records/*.jsonl") for line in path.open()]
    assert Counter(json.loads(line)["kind"] for line in lines)["case"] == 4


def test_what_cannot_fit_is_a_record_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "machine_bytes", lambda: 40 << 10)
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    words = ["run", str(file), "--out", str(out), "--device", "cpu"]
    assert main.invoke(words) == 0
    assert "2 cases cannot fit and are not run" in capsys.readouterr().err
    by_size = {r.case.seq_len: r for r in read_run(out).records.values()}
    assert by_size[64].status == "ok"
    assert (by_size[128].status, by_size[128].flags) == ("oom", ["not-run"])
    assert "a rank's tensors alone take" in str(by_size[128].reason)
    assert not by_size[128].times_us


def test_a_case_under_way_at_every_death_is_given_up(tmp_path: Path) -> None:
    """Its last three gangs left no note that they were over; one that ended well did."""
    a, b = case("bands", 64), case("bands", 128)
    for number in range(runs.DEATHS):
        folder = tmp_path / "jobs" / f"w{number}"
        folder.mkdir(parents=True)
        notes = [
            {"event": "boot", "time": 1, "pid": 1},
            {"event": "start", "time": 2, "case": a.id},
        ]
        (folder / "rank0.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert runs.under_way_at_death(tmp_path) == {a.id: runs.DEATHS}
    request = runs.Request(
        name="x", cases=[a, b], out=tmp_path, launcher="local", device="cpu", settings=SETTINGS
    )
    assert runs.feasible(request, [a, b]) == [b]
    record = read_run(tmp_path).records[a.id]
    assert (record.status, record.reason) == ("crash", "under way when its run died, 3 times")
    (tmp_path / "jobs" / "w0" / "over").touch()
    assert runs.under_way_at_death(tmp_path) == {a.id: runs.DEATHS - 1}
    assert [c.id for c in runs.ordered(request, [a, b])] == [b.id, a.id]  # suspects come last


def test_a_dry_run_tells_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "quick", "--out", str(tmp_path / "run"), "--device", "cuda", "--dry-run"]
    assert main.invoke(words) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("about ")
    assert "GPU-hours: times of 0 estimated from records" in told
