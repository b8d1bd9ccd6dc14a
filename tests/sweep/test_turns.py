"""Methods measured in turn: by default where that adds little, and without losing what is done."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from made_records import record
from run_cpbench import cpbench, leftover_processes, start_cpbench, wait_until

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.reports.collection import collect
from cpbench.reports.tables.render import render
from cpbench.results.record import UNFINISHED
from cpbench.results.store import RecordWriter, read_run
from cpbench.sweep.estimate import Estimator

SWEEP = """
[sweep]
operator = {operators}
mask = ["causal", "full"]
seq_len = 64
num_heads_q = 1
head_dim = 16
direction = "fwd"
[measure]
max_iterations = 24
memory = false
"""
# It makes its worker save every turn, and from its third turn on waits for a file, or dies.
SLOW = """
import os, signal, sys, time
from pathlib import Path
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.reference import Reference

sys.modules["__main__"].UNSAVED_S = 0.0


class Slow(Reference):
    turns = 0

    def prepare(self, *given):
        type(self).turns += 1
        return super().prepare(*given)

    def forward(self, *given):
        while type(self).turns > 6 and not Path("OPEN").exists():
            time.sleep(0.05)
        return super().forward(*given)


class Dying(Slow):
    def forward(self, *given):
        if type(self).turns > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return Reference.forward(self, *given)


slow = OperatorInfo(name="slow", summary="waits", source="tests", load=Slow)
dying = OperatorInfo(name="dying", summary="dies", source="tests", load=Dying)
"""


def make_case(operator: str, seq_len: int, **fields: Any) -> Case:
    return Case(operator=Spec.parse(operator), seq_len=seq_len, **fields)


def turns(*cases: Case, folders: list[Path] | None = None, **settings: Any) -> list[int]:
    planned = Estimator("cpu", MeasureSettings(**settings), folders or []).turns(cases)
    return [planned.get(case.id, 1) for case in cases]


def test_contending_methods_take_turns() -> None:
    bands, flash = make_case("bands", 256), make_case("sdpa.cpu_flash", 256)
    alone = make_case("bands", 512)
    elsewhere = make_case("flash_attn.2", 512)  # does not run on CPUs
    assert turns(bands, alone, flash, elsewhere) == [6, 1, 6, 1]
    assert turns(bands, alone, flash, interleave=1) == [1, 1, 1]
    assert turns(bands, alone, flash, interleave=3) == [3, 3, 3]
    assert turns(bands, flash, time=False) == [1, 1]
    ranks = [make_case("bands", 256, world_size=n, strategy=Spec("ring")) for n in (2, 4)]
    assert turns(*ranks) == [1, 1]  # other problems


def test_turns_are_left_out_where_they_cost_much(tmp_path: Path) -> None:
    cases = [make_case(name, 4096) for name in ("bands", "sdpa.cpu_flash")]
    for ms, expected in ((10.0, [6, 6]), (5000.0, [1, 1])):
        with RecordWriter(tmp_path / f"{ms}" / "records" / "w.jsonl") as writer:
            for case in cases:
                known = record(str(case.operator), ms, seq_len=4096)
                known.flops = case.problem.flops(4096 * 4097 / 2)
                writer.append(known.to_json())
        assert turns(*cases, folders=[tmp_path / f"{ms}"], max_seconds=1.0) == expected


def test_automatic_turns_share_the_iterations() -> None:
    settings = MeasureSettings(min_iterations=7, max_iterations=50, max_seconds=6.0)
    first, later = settings.of_turn(6, 0), settings.of_turn(6, 10)
    assert (first.warmup, first.min_iterations, first.max_iterations) == (1, 2, 9)
    assert (later.warmup, later.min_iterations, later.max_iterations) == (1, 12, 19)
    assert first.max_seconds == later.max_seconds == 1.0
    assert settings.of_turn(1, 0) == settings
    requested = MeasureSettings(interleave=3, min_iterations=7).of_turn(3, 10)
    assert (requested.warmup, requested.min_iterations) == (2, 17)


def test_a_run_decides_in_turn_by_default(tmp_path: Path) -> None:
    sweep, out = tmp_path / "s.toml", tmp_path / "run"
    sweep.write_text(SWEEP.format(operators='["bands", "reference", "flash_attn.2"]'))
    code, stderr = cpbench("run", sweep, "--out", out, "--device", "cpu")
    assert code == 0, stderr
    ok = [made for made in read_run(out).records.values() if made.status == "ok"]
    assert len(ok) == 4
    for made in ok:
        assert len(made.turns) == 6
        assert all(2 <= n <= 4 for n in made.turns)
        assert sum(made.turns) == made.iterations
        assert made.flags.count(UNFINISHED) == 0
    text = render(collect([out]), "short")
    assert "launch, 5 needed" not in text
    job = json.loads(next(out.glob("jobs/*/job.json")).read_text())
    assert set(job["turns"].values()) == {6}


def test_a_crash_between_turns_costs_its_own_case_only(tmp_path: Path) -> None:
    sweep, out = tmp_path / "s.toml", tmp_path / "run"
    (tmp_path / "slow.py").write_text(SLOW)
    sweep.write_text(SWEEP.format(operators=f'["reference", "{tmp_path}/slow.py:dying"]'))
    arguments = ("run", sweep, "--out", out, "--device", "cpu", "--where", "mask=causal")
    assert cpbench(*arguments)[0] == 1
    run = read_run(out)
    by_operator = {made.case.operator.name: made for made in run.records.values()}
    dead = by_operator.pop(f"{tmp_path}/slow.py:dying")
    assert (dead.status, dead.reason) == ("crash", "rank 0 was killed by SIGKILL")
    (other,) = by_operator.values()
    assert (other.status, len(other.turns)) == ("ok", 6)
    assert UNFINISHED not in other.flags
    assert len(run.launches[other.case.id]) == 1


def test_a_killed_run_keeps_the_turns_that_were_measured(tmp_path: Path) -> None:
    sweep, out, gate = tmp_path / "s.toml", tmp_path / "run", tmp_path / "open"
    (tmp_path / "slow.py").write_text(SLOW.replace("OPEN", str(gate)))
    sweep.write_text(SWEEP.format(operators=f'["reference", "{tmp_path}/slow.py:slow"]'))
    arguments = ("run", sweep, "--out", out, "--device", "cpu", "--where", "mask=causal")
    process = start_cpbench(*arguments)

    def saved() -> bool:
        records = read_run(out).records.values()
        return len(records) == 2 and all(len(made.turns) > 1 for made in records)

    try:
        wait_until(saved)
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert "interrupted: 0 of 2 cases are recorded" in stderr
    assert not leftover_processes(out)
    records = list(read_run(out).records.values())
    assert {made.status for made in records} == {"ok"}
    assert all(UNFINISHED in made.flags and made.errors for made in records)
    text = render(collect([out]), "short")
    assert "2 of 2 timed cases are unfinished (interrupted between its turns" in text
    gate.touch()
    code, stderr = cpbench(*arguments)
    assert code == 0, stderr
    run = read_run(out)
    assert all(len(made.turns) == 6 for made in run.records.values())
    assert not [made for made in run.records.values() if UNFINISHED in made.flags]
    assert [len(launches) for launches in run.launches.values()] == [1, 1]
    assert cpbench(*arguments)[1].startswith("2 of 2 cases are recorded")
