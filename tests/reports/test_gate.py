"""The gate: pass, fail or undecided, as an exit code, as text and as JUnit XML."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from limits import LIMIT_S
from made_records import launches, noisy, record, write_run

from cpbench.reports.compare.gate import (
    FAIL,
    MAX_LAUNCHES,
    PASS,
    UNDECIDED,
    GateResult,
    evaluate_gate,
    result_lines,
)
from cpbench.reports.compare.junit import junit_xml
from cpbench.reports.compare.next_launches import commit_of_base
from cpbench.reports.compare.statistics import launches_to_decide
from cpbench.results.record import Record


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpbench", "gate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def gate_of(folder: Path, base: list[Record], new: list[Record]) -> GateResult:
    number = len(list(folder.iterdir()))
    sides = (write_run(folder / f"{number}-{name}", records)
             for name, records in (("base", base), ("new", new)))  # fmt: skip
    return evaluate_gate(*sides, 0.05, 0.02)


def outcomes(result: GateResult) -> dict[str, str]:
    """Outcome by operator."""
    names = [case.split()[0] for case in result.table["case"]]
    return dict(zip(names, (d.outcome for d in result.decisions.values()), strict=True))


def test_every_case_passes_fails_or_is_undecided(tmp_path: Path) -> None:
    base = [
        *launches("same", noisy(10, 6, 1)), *launches("slow", noisy(10, 6, 2)),
        *launches("fast", noisy(10, 6, 3)), *launches("few", noisy(10, 4, 4)),
        *launches("broke", noisy(10, 6, 5)), *launches("gone", noisy(10, 6, 6)),
        *launches("loud", noisy(10, 6, 7, 0.06)), record("never", status="crash", reason="killed"),
    ]  # fmt: skip
    new = [
        *launches("same", noisy(10, 6, 11)), *launches("slow", noisy(11, 6, 12)),
        *launches("fast", noisy(8, 6, 13)), *launches("few", noisy(20, 6, 14)),
        record("broke", status="crash", reason="killed"), *launches("more", noisy(10, 6, 16)),
        *launches("loud", noisy(10, 6, 17, 0.06)), record("never", status="crash", reason="killed"),
        record("late", status="crash", reason="killed"),
    ]  # fmt: skip
    result = gate_of(tmp_path, base, new)
    assert outcomes(result) == {
        "same": PASS, "slow": FAIL, "fast": PASS, "few": UNDECIDED, "broke": FAIL, "gone": FAIL,
        "loud": UNDECIDED, "never": UNDECIDED, "more": PASS, "late": FAIL,
    }  # fmt: skip
    assert result.outcome == FAIL
    lines = result_lines(result)
    assert lines[-1] == (
        "gate failed: 10 cases: 4 failed, 3 undecided, 3 passed; limits 5.0% time, 2.0% memory"
    )
    (few,) = (line for line in lines if line.startswith("UNDECIDED few "))
    assert "4 and 6 launches; the test takes 5 per side" in few
    (loud,) = (line for line in lines if line.startswith("UNDECIDED loud "))
    assert "the interval has the limit of 5.0% in it; about " in loud

    suite = ElementTree.fromstring(junit_xml(result, ["a\x00b"])).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("10", "4", "3")
    assert len(suite.findall("testcase/failure")) == 4
    skipped = [case.get("message", "") for case in suite.findall("testcase/skipped")]
    assert [message.startswith("undecided: ") for message in skipped] == [True] * 3


@pytest.mark.parametrize("slowdown", [1.26, 1.44])
def test_a_slow_operator_never_passes(tmp_path: Path, slowdown: float) -> None:
    """Whatever the number of launches; enough of them fail it."""
    found = {}
    for count in (1, 3, 6, 9):
        base, new = noisy(10, count, 1, 0.03), noisy(10 * slowdown, count, 2, 0.03)
        others = (
            launches("fine", noisy(10, count, 3, 0.01)),
            launches("fine", noisy(10, count, 4, 0.01)),
        )
        result = gate_of(
            tmp_path, [*launches("a", base), *others[0]], [*launches("a", new), *others[1]]
        )
        found[count] = outcomes(result)
        if count < 5:
            assert result.launches is not None
            assert result.launches >= 5
    assert found == {
        1: {"a": UNDECIDED, "fine": UNDECIDED}, 3: {"a": UNDECIDED, "fine": UNDECIDED},
        6: {"a": FAIL, "fine": PASS}, 9: {"a": FAIL, "fine": PASS},
    }  # fmt: skip


def test_memory_alone_can_fail_the_gate(tmp_path: Path) -> None:
    grown = launches("a", noisy(10, 6, 2))
    for launch in grown:
        launch.memory_bytes["peak"] = [1_030_000]
    base = write_run(tmp_path / "base", launches("a", noisy(10, 6, 1)))
    new = write_run(tmp_path / "new", grown)
    (decision,) = evaluate_gate(base, new, 0.5, 0.02).decisions.values()
    assert (decision.outcome, decision.kinds) == (FAIL, "memory")
    assert evaluate_gate(base, new, 0.5, 0.05).outcome == PASS


def test_what_one_run_did_not_measure_is_undecided(tmp_path: Path) -> None:
    """A gate does not pass by measuring less."""
    full, no_memory = launches("a", noisy(10, 6, 1)), launches("a", noisy(10, 6, 2))
    for launch in no_memory:
        launch.memory_bytes = {}
    untimed = [record("a")]
    for base, new, text in (
        (full, no_memory, "peak memory in the base only"),
        (no_memory, full, "peak memory in the new run only"),
        (full, untimed, "time in the base only; peak memory in the base only"),
        (untimed, no_memory, "time in the new run only"),
    ):
        (decision,) = gate_of(tmp_path, base, new).decisions.values()
        assert (decision.outcome, decision.text) == (UNDECIDED, text)
        assert decision.launches is None
    assert gate_of(tmp_path, untimed, untimed).outcome == PASS
    assert gate_of(tmp_path, no_memory, no_memory).outcome == PASS


def test_the_launches_that_are_asked_for_decide() -> None:
    """About 80 % of the cases are decided with the launches that are given for them."""
    generator = random.Random(0)
    for ratio in (1.0, 1.12):
        count, decided = launches_to_decide(ratio, 0.03, 0.05, cases=1), 0
        assert count is not None
        assert count < 30
        for _ in range(60):
            base, new = (
                [mean * generator.lognormvariate(0, 0.03) for _ in range(count)]
                for mean in (10.0, 10 * ratio)
            )
            runs = []
            for times in (base, new):
                made = launches("a", times)
                run = type("Run", (), {})
                run.records = {made[-1].case.id: made[-1]}
                run.launches = {made[-1].case.id: made}
                runs.append(run)
            decided += evaluate_gate(*runs, 0.05, 0.02).outcome == (PASS if ratio == 1 else FAIL)
        assert decided >= 38
    assert launches_to_decide(1.05, 0.03, 0.05, cases=1) is None
    near = launches_to_decide(1.06, 0.1, 0.05, cases=1)
    assert near is not None
    assert near > MAX_LAUNCHES


def test_exit_codes_and_the_commands_that_decide(tmp_path: Path) -> None:
    sides = {
        "base": noisy(10, 6, 1), "slow": noisy(12, 6, 2), "few": noisy(12, 2, 2),
        "same": noisy(10, 6, 3),
    }  # fmt: skip
    for name, times in sides.items():
        write_run(tmp_path / name, launches("a", times))
    command = ["run", "my sweep.toml", "--out", "few", "--launches", "2", "--where", "batch=1"]
    (tmp_path / "few" / "sweep.json").write_text(json.dumps({"command": command}))
    base, slow, few, same = (str(tmp_path / name) for name in sides)

    done = gate(base, slow, "--junit", str(tmp_path / "gate.xml"))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        1, "gate failed: 1 case: 1 failed, 0 undecided, 0 passed; limits 5.0% time, 2.0% memory",
    )  # fmt: skip
    assert ElementTree.parse(tmp_path / "gate.xml").find("testsuite/testcase/failure") is not None
    assert gate(base, same).returncode == 0
    done = gate(base, few)
    assert done.returncode == 3
    assert "gate undecided: 1 case: 0 failed, 1 undecided, 0 passed" in done.stdout
    assert f"    cpbench run SWEEP --out {base} --launches 5\n" in done.stdout
    again = "    cpbench run 'my sweep.toml' --out few --where batch=1 --launches 5\n"
    assert again in done.stdout
    assert "cpbench race OLD_ENV NEW_ENV 'my sweep.toml' --max-launches 5" in done.stdout
    assert "repeat these with 3, … 5" in done.stdout
    for name, words in (("base", ["--out", base]), ("few", [])):
        command = ["bench", "--seq-len", "1k", *words]
        (tmp_path / name / "sweep.json").write_text(json.dumps({"command": command}))
    last = gate(base, few).stdout.splitlines()[-2:]
    assert last == [
        f"    cpbench bench --seq-len 1k --out {name} --launches 5" for name in (base, few)
    ]
    for choice, code in (("pass", 0), ("fail", 1)):
        done = gate(base, few, "--undecided", choice, "--junit", str(tmp_path / "x.xml"))
        assert done.returncode == code
        assert f"--undecided {choice}: exit code {code}\n" in done.stdout
        suite = ElementTree.parse(tmp_path / "x.xml").find("testsuite")
        assert suite is not None
        assert (suite.get("failures"), suite.get("skipped")) == (str(code), "0")
        assert gate(base, slow, "--undecided", choice).returncode == 1
    for arguments, line in (
        ((base, str(tmp_path)), "is not a run directory"),
        ((base, slow, "--max-slowdown", "many"), "is not a share such as 5%"),
        ((base, slow, "--max-slowdown", "5"), "is not a share such as 5%"),
        ((base, slow, "--undecided", "maybe"), "maybe"),
        ((base, slow, "--where", "mask=full"), "no case has mask=full; mask is one of: causal"),
    ):
        done = gate(*arguments)
        assert done.returncode == 2, arguments
        assert line in done.stderr


def test_many_cases_with_few_launches(tmp_path: Path) -> None:
    """Five launches a side show nothing of a single one of thirty cases, and that is no crash."""
    sides = [
        [launch for i in range(30) for launch in launches(f"a{i}", noisy(10, 5, 7 * i + side))]
        for side in (1, 2)
    ]
    result = gate_of(tmp_path, *sides)
    assert result.counts[FAIL] == 0
    assert result.table["detectable"].isna().all()


def test_times_of_different_clocks_are_not_compared(tmp_path: Path) -> None:
    sides = []
    for clock, ms in (("cpu", 8.0), ("wall", 10.0)):
        conditions = {"device": "cpu", "threads": 1, "checked": True, "timed": True, "clock": clock}
        sides.append(launches("a", noisy(ms, 6, 1), conditions=conditions))
    for base, new in (sides, sides[::-1]):
        (decision,) = gate_of(tmp_path, base, new).decisions.values()
        assert decision.outcome == UNDECIDED
        assert decision.text.startswith("not comparable: clock ")


def test_a_race_is_suggested_against_the_commit_of_the_base(tmp_path: Path) -> None:
    runs = []
    for name in ("base", "new"):
        run = write_run(tmp_path / name, launches("a", [10.0]))
        run.environments["e"] = {"commit": "0123456789ab", "files_commit": f"commit of {name}"}
        runs.append(run)
    assert commit_of_base(*runs) == "commit of base"
    runs[0].environments["e"]["files_commit"] = "0123+changed"
    assert commit_of_base(*runs) == ""
