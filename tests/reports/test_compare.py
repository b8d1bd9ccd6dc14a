"""Verdicts from launches, the gate, and what a damaged or older directory still tells."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_records import record
from paths import DATA
from scipy.stats import mannwhitneyu

from cpbench.reports.collection import collect
from cpbench.reports.compare.gate import judge, junit, words
from cpbench.reports.compare.statistics import _outside, _ways, enough, verdicts, weigh
from cpbench.reports.compare.verdicts import compare, differences
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter, Run, read_run


def cpbench(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpbench", *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


OLD = DATA / "records_schema_1.jsonl"


def launches(operator: str, times: list[float], **given: Any) -> list[Record]:
    """A record a launch, of a median of so many ms."""
    found = []
    for number, ms in enumerate(times):
        made = record(operator, ms, writer=f"w{number}", started=float(number), **given)
        made.memory_bytes = {"inputs": [1], "peak": [10**6]}
        found.append(made)
    return found


def run_of(folder: Path, records: list[Record]) -> Run:
    with RecordWriter(folder / "records" / "w.jsonl") as writer:
        for made in records:
            writer.append(made.to_json())
    return read_run(folder)


def noisy(mean: float, count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [mean * math.exp(draw.gauss(0, 0.01)) for _ in range(count)]


def test_the_statistic_is_that_of_scipy() -> None:
    for m, n in ((2, 3), (5, 5), (6, 4)):
        ways = _ways(m, n)
        assert sum(ways) == math.comb(m + n, n)
        assert ways == ways[::-1]
    a, b = [1.0, 2.0, 3.5, 4.0, 5.0], [2.5, 4.5, 6.0, 7.0, 8.0]
    wanted = mannwhitneyu(b, a, alternative="greater", method="exact").pvalue
    assert weigh(a, b, 0.0).slower == pytest.approx(wanted)
    # R: wilcox.test(b, a, conf.int = TRUE) skips two differences at either end of five by five.
    assert [_outside(n, n) for n in (3, 4, 5, 6)] == [0, 0, 2, 5]


def test_an_interval_holds_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        a, b = ([math.exp(draw.gauss(mean, 0.05)) for _ in range(6)] for mean in (0.0, 0.1))
        evidence = weigh(a, b, 0.0)
        held += evidence.low <= math.exp(0.1) <= evidence.high
    assert 0.92 <= held / 400 <= 0.995


def test_false_alarms_and_misses_where_the_noise_is_known() -> None:
    alarms = found = 0
    for repeat in range(10):
        pairs = [
            (
                noisy(1.0, 6, 100 * repeat + i),
                noisy(1.0 if i % 2 else 1.1, 6, 9000 + 100 * repeat + i),
            )
            for i in range(40, 80)
        ]
        told = verdicts([weigh(a, b, 0.02) for a, b in pairs], 0.02)
        alarms += sum(verdict in ("SLOWER", "FASTER") for verdict in told[1::2])
        found += told[0::2].count("SLOWER")
    assert alarms <= 10  # 5 % of 200
    assert found >= 190


def test_a_lone_case_among_many_takes_more_launches() -> None:
    assert [enough(cases) for cases in (1, 6, 48, 100, 1000)] == [5, 5, 7, 8, 9]


def test_verdicts_of_runs(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", [
        *launches("same", noisy(10, 6, 1)), *launches("slow", noisy(10, 6, 2)),
        *launches("fast", noisy(10, 6, 3)), *launches("few", noisy(10, 4, 4)),
        *launches("broke", noisy(10, 6, 5)), *launches("gone", noisy(10, 6, 6)),
    ])  # fmt: skip
    new = run_of(tmp_path / "new", [
        *launches("same", noisy(10, 6, 11)), *launches("slow", noisy(11, 6, 12)),
        *launches("fast", noisy(8, 6, 13)), *launches("few", noisy(20, 6, 14)),
        record("broke", status="crash", reason="killed"), *launches("more", noisy(10, 6, 16)),
    ])  # fmt: skip
    table = compare(base, new, 0.05).set_index("case")
    told = {case.split()[0]: row for case, row in table.iterrows()}
    assert {name: row["verdict"] for name, row in told.items()} == {
        "same": "SAME", "slow": "SLOWER", "fast": "FASTER", "few": "UNCLEAR", "broke": "FAILS",
        "gone": "MISSING", "more": "ADDED",
    }  # fmt: skip
    assert told["slow"]["ratio"] == pytest.approx(1.1, rel=0.02)
    assert told["few"]["why"] == "4 of 5 launches"
    assert told["broke"]["why"] == "crash: killed"

    found = judge(base, new, 0.05, 0.02)
    assert {kind for wrong in found.failures.values() for kind, _ in wrong} == {
        "slowdown", "status"
    }  # fmt: skip
    assert len(found.failures) == 3
    assert words(found)[-1] == "gate failed: 7 cases, 3 failed, 1 unclear"
    suite = ElementTree.fromstring(junit(found, ["a\x00b"])).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("7", "3", "1")
    assert len(suite.findall("testcase/failure")) == 3


def test_memory_alone_can_fail_the_gate(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", launches("a", noisy(10, 6, 1)))
    grown = launches("a", noisy(10, 6, 2))
    for made in grown:
        made.memory_bytes["peak"] = [1_030_000]
    new = run_of(tmp_path / "new", grown)
    assert [
        kind for wrong in judge(base, new, 0.5, 0.02).failures.values() for kind, _ in wrong
    ] == ["memory"]
    assert judge(base, new, 0.5, 0.05).passed


def test_code_in_a_file_is_compared_across_versions(tmp_path: Path) -> None:
    old, new = (launches("./k.py:OP", noisy(10, 5, i), content=(("./k.py:OP", str(i)),))
                for i in (1, 2))  # fmt: skip
    table = compare(run_of(tmp_path / "a", old), run_of(tmp_path / "b", new), 0.1)
    assert table["verdict"].tolist() == ["SAME"]


def test_the_pace_of_the_machine_is_divided_out(tmp_path: Path) -> None:
    sides = []
    for seed, stretch in ((1, 1.0), (2, 1.5)):  # a neighbour makes all of the new run slow
        made = launches("a", [ms * stretch for ms in noisy(10, 6, seed)])
        for one in made:
            one.pace_us = [[100.0 * stretch] * one.iterations]
        sides.append(run_of(tmp_path / str(seed), made))
    (row,) = compare(*sides, 0.05).to_dict("records")
    assert row["verdict"] == "SAME"
    assert row["new_ms"] == pytest.approx(15, rel=0.05)


def test_what_differs_is_told(tmp_path: Path) -> None:
    sides = []
    for name, torch in (("a", "2.12"), ("b", "2.13")):
        run = run_of(tmp_path / name, launches("x", noisy(1, 5, 0), environment="e"))
        variables = {"NCCL_ALGO": name, "SLURM_JOB_ID": name}
        run.environments["e"] = {
            "host": "h", "packages": {"torch": torch}, "variables": variables
        }  # fmt: skip
        sides.append(run)
    assert differences(*sides) == [
        "torch differs: 2.12 in the base, 2.13 in the new run",
        "NCCL_ALGO differs: a in the base, b in the new run",
    ]


def test_command_line(tmp_path: Path) -> None:
    run_of(tmp_path / "base", launches("a", noisy(10, 6, 1)))
    run_of(tmp_path / "new", launches("a", noisy(12, 6, 2)))
    run_of(tmp_path / "few", launches("a", noisy(12, 2, 2)))
    base, new, few = (str(tmp_path / name) for name in ("base", "new", "few"))
    done = cpbench("compare", base, new, few)
    assert done.returncode == 0
    assert "new against base: 1 SLOWER" in done.stdout
    assert "few against base: 1 UNCLEAR" in done.stdout
    assert "UNCLEAR for want of launches: 1 case." in done.stdout
    done = cpbench("gate", base, new, "--junit", str(tmp_path / "gate.xml"))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        1, "gate failed: 1 case, 1 failed, 0 unclear",
    )  # fmt: skip
    assert ElementTree.parse(tmp_path / "gate.xml").find("testsuite/testcase/failure") is not None
    assert cpbench("gate", base, base).returncode == 0
    for words_, line in (
        (("gate", base, few), "no case has 5 launches on both sides"),
        (("gate", base, str(tmp_path)), "is not a run directory"),
        (("gate", base, new, "--max-slowdown", "many"), "is not a share such as 5%"),
        (("compare", base, new, "-o", str(tmp_path / "no" / "x.html")), "there is no folder"),
        (("report", base, "--format", "html"), "needs a file: -o report.html"),
    ):
        done = cpbench(*words_)
        assert done.returncode == 2, words_
        assert line in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_damage_is_told_and_the_rest_reported(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    shutil.copy(OLD, records / "old.jsonl")
    fresh = record("bands", 2.0, environment="lost", seq_len=2048, started=1.9e9)
    run_of(tmp_path, [fresh])
    later = record("flex", 2.0).to_json() | {"schema": 99}
    with RecordWriter(records / "later.jsonl") as writer:
        writer.append(later)
    with open(records / "w.jsonl", "a") as file:
        file.write('{"kind":"case","torn')
    done = cpbench("report", str(tmp_path))
    assert done.returncode == 0
    assert "3 cases, 3 ok" in done.stdout
    for line in (
        "Warning: later.jsonl:1: schema 99 is not known here (1 to 2 are)",
        "Warning: w.jsonl:2: torn or damaged line left out",
        "Warning: 1 environment that records name is missing: their machine is unknown",
    ):
        assert line in done.stdout
    found = collect([tmp_path])
    assert sorted(found.table["clock"].dropna()) == ["wall", "wall"]  # version 1 knew no other


def test_several_launches_are_one_row(tmp_path: Path) -> None:
    run_of(tmp_path, launches("a", [10.0, 11.0, 12.0, 10.5, 11.5, 10.2, 11.8]))
    (row,) = collect([tmp_path]).table.to_dict("records")
    assert (row["launches"], row["iterations"], row["time_ms"]) == (7, 63, 11.0)
    assert (row["low_ms"], row["high_ms"]) == (10.0, 12.0)


def test_launches_are_made_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        '[sweep]\nseq_len = 256\nnum_heads_q = 1\nhead_dim = 16\ndirection = "fwd"\n'
        '[measure]\nclock = "cpu"\nmax_seconds = 0.2\nmax_iterations = 8\n'
    )
    for count in (2, 3):
        done = cpbench("run", str(sweep), "--out", str(out), "--launches", str(count), "--json")
        assert done.returncode == 0, done.stderr
        (made,) = read_run(out).launches.values()
        assert len(made) == count == len({one.writer for one in made})
        assert all(one.paced and len(one.pace_us[0]) == one.iterations for one in made)
    sweep.write_text('[sweep]\nworld_size = 2\nstrategy = "ring"\n[measure]\nclock = "cpu"\n')
    done = cpbench("run", str(sweep), "--out", str(tmp_path / "two"))
    assert done.returncode == 2
    assert 'measure.clock = "cpu" is for one rank on a CPU' in done.stderr
