"""Comparison of runs: verdicts from launches, the gate, damaged and older directories."""

from __future__ import annotations

import math
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from made_records import launches, noisy, record, write_run
from paths import DATA

from cpbench.reports.collection import collect
from cpbench.reports.compare.statistics import (
    _statistic_counts,
    _trimmed_differences,
    compare_medians,
    decide_verdicts,
    detectable_change,
    launches_to_detect,
    relative_spread,
)
from cpbench.reports.compare.verdicts import compare, comparison_caveats, environment_differences
from cpbench.results.contest import launches_needed
from cpbench.results.store import RecordWriter, read_run


def cpbench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


OLD = DATA / "records_schema_1.jsonl"


def test_the_statistic_matches_scipy() -> None:
    from scipy.stats import mannwhitneyu  # takes a second, which collecting tests need not

    for m, n in ((2, 3), (5, 5), (6, 4)):
        counts = _statistic_counts(m, n)
        assert sum(counts) == math.comb(m + n, n)
        assert counts == counts[::-1]
    a, b = [1.0, 2.0, 3.5, 4.0, 5.0], [2.5, 4.5, 6.0, 7.0, 8.0]
    p_value = mannwhitneyu(b, a, alternative="greater", method="exact").pvalue
    assert compare_medians(a, b, 0.0).slower == pytest.approx(p_value)
    # R: wilcox.test(b, a, conf.int = TRUE) skips two differences at either end of five by five.
    assert [_trimmed_differences(n, n) for n in (3, 4, 5, 6)] == [0, 0, 2, 5]


def test_coverage_of_the_interval() -> None:
    generator = random.Random(0)
    covered = 0
    for _ in range(400):
        a, b = ([math.exp(generator.gauss(mean, 0.05)) for _ in range(6)] for mean in (0.0, 0.1))
        test = compare_medians(a, b, 0.0)
        covered += test.low <= math.exp(0.1) <= test.high
    assert 0.92 <= covered / 400 <= 0.995


def test_false_alarms_and_misses_at_known_noise() -> None:
    alarms = detected = 0
    for repeat in range(10):
        pairs = [
            (
                noisy(1.0, 6, 100 * repeat + i),
                noisy(1.0 if i % 2 else 1.1, 6, 9000 + 100 * repeat + i),
            )
            for i in range(40, 80)
        ]
        verdicts = decide_verdicts([compare_medians(a, b, 0.02) for a, b in pairs], 0.02)
        alarms += sum(verdict in ("SLOWER", "FASTER") for verdict in verdicts[1::2])
        detected += verdicts[0::2].count("SLOWER")
    assert alarms <= 10  # 5 % of 200
    assert detected >= 190


def test_a_single_case_among_many_needs_more_launches() -> None:
    assert [launches_needed(2 * cases) for cases in (1, 6, 48, 100, 1000)] == [5, 5, 7, 8, 9]


def test_verdicts_of_runs(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", [
        *launches("same", noisy(10, 6, 1)), *launches("slow", noisy(10, 6, 2)),
        *launches("fast", noisy(10, 6, 3)), *launches("few", noisy(10, 4, 4)),
        *launches("broke", noisy(10, 6, 5)), *launches("gone", noisy(10, 6, 6)),
    ])  # fmt: skip
    new = write_run(tmp_path / "new", [
        *launches("same", noisy(10, 6, 11)), *launches("slow", noisy(11, 6, 12)),
        *launches("fast", noisy(8, 6, 13)), *launches("few", noisy(20, 6, 14)),
        record("broke", status="crash", reason="killed"), *launches("more", noisy(10, 6, 16)),
    ])  # fmt: skip
    table = compare(base, new, 0.05).set_index("case")
    rows = {case.split()[0]: row for case, row in table.iterrows()}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "same": "SAME", "slow": "SLOWER", "fast": "FASTER", "few": "UNCLEAR", "broke": "FAILS",
        "gone": "MISSING", "more": "ADDED",
    }  # fmt: skip
    assert rows["slow"]["ratio"] == pytest.approx(1.1, rel=0.02)
    assert rows["few"]["why"] == "4 of 5 launches; 10% takes about 5 per side"
    assert rows["broke"]["why"] == "crash: killed"


def test_code_in_a_file_is_compared_across_versions(tmp_path: Path) -> None:
    old, new = (launches("./k.py:OP", noisy(10, 5, i), content=(("./k.py:OP", str(i)),))
                for i in (1, 2))  # fmt: skip
    table = compare(write_run(tmp_path / "a", old), write_run(tmp_path / "b", new), 0.1)
    assert table["verdict"].tolist() == ["SAME"]


def test_the_pace_of_the_machine_is_divided_out(tmp_path: Path) -> None:
    sides = []
    for seed, stretch in ((1, 1.0), (2, 1.5)):  # a neighbour makes all of the new run slow
        records = launches("a", [ms * stretch for ms in noisy(10, 6, seed)])
        for launch in records:
            launch.pace_us = [[100.0 * stretch] * launch.iterations]
        sides.append(write_run(tmp_path / str(seed), records))
    (row,) = compare(*sides, 0.05).to_dict("records")
    assert row["verdict"] == "SAME"
    assert row["new_ms"] == pytest.approx(15, rel=0.05)


def test_environment_differences(tmp_path: Path) -> None:
    sides = []
    for name, torch in (("a", "2.12"), ("b", "2.13")):
        run = write_run(tmp_path / name, launches("x", noisy(1, 5, 0), environment="e"))
        variables = {"NCCL_ALGO": name, "SLURM_JOB_ID": name}
        run.environments["e"] = {
            "host": "h", "packages": {"torch": torch}, "variables": variables
        }  # fmt: skip
        sides.append(run)
    assert environment_differences(*sides) == [
        "torch differs: 2.12 in the base, 2.13 in the new run",
        "NCCL_ALGO differs: a in the base, b in the new run",
    ]


def test_command_line(tmp_path: Path) -> None:
    write_run(tmp_path / "base", launches("a", noisy(10, 6, 1)))
    write_run(tmp_path / "new", launches("a", noisy(12, 6, 2)))
    write_run(tmp_path / "few", launches("a", noisy(12, 2, 2)))
    base, new, few = (str(tmp_path / name) for name in ("base", "new", "few"))
    done = cpbench("compare", base, new, few)
    assert done.returncode == 0
    assert "new against base: 1 SLOWER" in done.stdout
    assert "few against base: 1 UNCLEAR" in done.stdout
    assert "UNCLEAR, too few launches: 1 case." in done.stdout
    for arguments, line in (
        (("compare", base, str(tmp_path)), "is not a run directory"),
        (("compare", base, new, "--floor", "many"), "is not a share such as 5%"),
        (("compare", base, new, "--where", "mask=ful"), "mask is one of: causal"),
        (("compare", base, new, "-o", str(tmp_path / "no" / "x.html")), "there is no folder"),
        (("report", base, "--format", "html"), "needs a file: -o report.html"),
    ):
        done = cpbench(*arguments)
        assert done.returncode == 2, arguments
        assert line in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_damaged_records_are_reported(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    shutil.copy(OLD, records / "old.jsonl")
    fresh = record("bands", 2.0, environment="lost", seq_len=2048, started=1.9e9)
    write_run(tmp_path, [fresh])
    later = record("flex", 2.0).to_json() | {"schema": 99}
    with RecordWriter(records / "later.jsonl") as writer:
        writer.append(later)
    with open(records / "w.jsonl", "a") as file:
        file.write('{"kind":"case","torn')
    done = cpbench("report", str(tmp_path))
    assert done.returncode == 0
    assert "3 cases, 3 ok" in done.stdout
    for line in (
        "Warning: later.jsonl:1: left out: unknown schema 99; this cpbench reads 1 to 3",
        "Warning: w.jsonl:2: left out: torn or damaged",
        "Warning: 1 environment named in records is missing: their machine is unknown",
    ):
        assert line in done.stdout
    table = collect([tmp_path]).table
    assert sorted(table["clock"].dropna()) == ["wall"] * 3  # the only clock of version 1


def test_several_launches_are_one_row(tmp_path: Path) -> None:
    write_run(tmp_path, launches("a", [10.0, 11.0, 12.0, 10.5, 11.5, 10.2, 11.8]))
    (row,) = collect([tmp_path]).table.to_dict("records")
    assert (row["launches"], row["iterations"], row["time_ms"]) == (7, 63, 11.0)
    assert (row["low_ms"], row["high_ms"]) == (10.0, 12.0)


def test_launches_are_run_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        '[sweep]\nseq_len = 256\nnum_heads_q = 1\nhead_dim = 16\ndirection = "fwd"\n'
        '[measure]\nclock = "cpu"\nmax_seconds = 0.2\nmax_iterations = 8\n'
    )
    for count in (2, 3):
        done = cpbench("run", str(sweep), "--out", str(out), "--launches", str(count), "--json")
        assert done.returncode == 0, done.stderr
        (records,) = read_run(out).launches.values()
        assert len(records) == count == len({launch.writer for launch in records})
        for launch in records:
            assert launch.paced
            assert len(launch.pace_us[0]) == launch.iterations
    sweep.write_text('[sweep]\nworld_size = 2\nstrategy = "ring"\n[measure]\nclock = "cpu"\n')
    done = cpbench("run", str(sweep), "--out", str(tmp_path / "two"))
    assert done.returncode == 2
    assert 'measure.clock = "cpu" is for one rank on a CPU' in done.stderr


@pytest.mark.parametrize("spread", [0.02, 0.08])
def test_the_launches_that_a_change_takes_find_it(spread: float) -> None:
    """About 80 % of slowdowns are found with the launches that are given for them."""
    n = launches_to_detect(0.1, spread, floor=0.02, cases=1)
    change = detectable_change(spread, (n, n), floor=0.02, cases=1)
    assert change is not None
    assert change <= 0.1
    generator, found, spreads = random.Random(0), 0, []
    for _ in range(100):
        base, new = (
            [mean * math.exp(generator.gauss(0, spread)) for _ in range(n)] for mean in (1.0, 1.1)
        )
        found += decide_verdicts([compare_medians(base, new, 0.02)], 0.02) == ["SLOWER"]
        spreads.append(relative_spread(base, new))
    assert statistics.median(spreads) == pytest.approx(spread, rel=0.1)
    assert 68 <= found <= 100
    assert spread < 0.05 or found <= 95  # no more launches than it takes
    assert detectable_change(spread, (4, 9), floor=0.02, cases=1) is None
    assert detectable_change(spread, (6, 6), floor=0.02, cases=48) is None  # it takes seven


def test_unclear_cases_say_what_it_takes(tmp_path: Path) -> None:
    """Wall time of one rank, disturbed by other processes."""
    conditions = {"device": "cpu", "clock": "wall", "checked": True}
    sides = []
    for name, seed in (("base", 1), ("new", 2)):
        generator = random.Random(seed)
        times = [10 * math.exp(generator.gauss(0, 0.15)) for _ in range(6)]
        loud = launches("a", times, flags=["contended"], conditions=conditions)
        sides.append(write_run(tmp_path / name, loud))
    (row,) = compare(*sides).to_dict("records")
    assert row["verdict"] == "UNCLEAR"
    assert row["detectable"] > 0.2
    assert row["needed_launches"] > 20
    shown = f"shows {row['detectable']:.0%} or more; 10% takes about "
    assert row["why"] == f"{shown}{row['needed_launches']:.0f} per side"
    base, new = (str(tmp_path / name) for name in ("base", "new"))
    text = cpbench("compare", base, new).stdout
    assert "a change of 10% takes about" in text
    assert 'with clock = "cpu" under [measure]' in text
    quiet = [write_run(tmp_path / f"{seed}", launches("a", noisy(10, 6, seed))) for seed in (3, 4)]
    assert not [line for line in comparison_caveats(compare(*quiet), *quiet, 0.02) if "cpu" in line]
