"""What may be compared with other results: one predicate, and everything that goes by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from figure_cases import case, collection, legend, points, selector_case
from made_records import CONDITIONS, record, report_text, run_of, section_lines, table_of
from matplotlib.figure import Figure
from run_cpbench import cpbench

from cpbench.reports.collection import Collection, collect, merge_runs
from cpbench.reports.compare.gate import FAIL, UNDECIDED, evaluate_gate, result_lines
from cpbench.reports.compare.verdicts import compare
from cpbench.reports.page.data import chart_data
from cpbench.reports.tables.mask_seeds import split_seed_groups
from cpbench.reports.tables.overview import correctness_rows
from cpbench.reports.tables.selection import break_even_rows, recall_rows
from cpbench.reports.tables.summary import method_names, rank_methods
from cpbench.results.record import DISQUALIFYING, Record
from cpbench.results.store import Run

Drawn = Callable[..., Figure]
UNCHECKED = CONDITIONS | {"checked": False}


def disqualified(**fields: Any) -> tuple[str, ...]:
    return record("a", 2.0, **fields).disqualifications


def test_the_predicate() -> None:
    assert disqualified() == ()
    assert disqualified(flags=["contended"]) == ()
    assert disqualified(conditions=UNCHECKED) == ("unchecked",)
    assert disqualified(conditions={}) == ("unchecked",)  # not known to be checked
    assert disqualified(status="wrong", reason="x") == ("wrong",)
    assert record("a").disqualifications == ("untimed",)
    for flag in DISQUALIFYING:
        assert disqualified(flags=["contended", flag]) == (flag,)


@pytest.mark.parametrize("flag", DISQUALIFYING)
def test_no_flag_that_disqualifies_competes(flag: str) -> None:
    table = table_of(record("a", 1.0, flags=[flag]), record("b", 2.0), record("c", 3.0))
    assert table["competes"].tolist() == [False, True, True]
    assert table["disqualified"].tolist() == [flag, None, None]
    (ranking,) = rank_methods(table)
    assert ranking.rows["operator"].tolist() == ["b", "c"]
    seeded = [
        record(name, ms, mask=f"causal_document:corpus=pile,seed={seed}", flags=flags)
        for name, ms, flags in (("a", 1.0, [flag]), ("b", 2.0, []))
        for seed in range(6)
    ]
    _, (group,) = split_seed_groups(table_of(*seeded))
    assert [spread.method for spread in group.compared] == ["b"]


def test_one_launch_that_does_not_count_is_enough() -> None:
    good, bad = record("a", 1.0, writer="w0"), record("a", 1.0, writer="w1", flags=["unchecked"])
    run = Run({good.case.id: bad}, {good.case.id: [good, bad]})
    assert merge_runs({"x": run}).table["competes"].tolist() == [False]


def test_checks_are_counted_truthfully() -> None:
    """A run with one check off has errors, but was not checked."""
    half = [record(name, 2.0, conditions=UNCHECKED, flags=["unchecked"]) for name in "abcd"]
    assert "Checked against float64: 0 of 4 cases that are ok." in report_text(*half)
    whole = record("e", 2.0)
    assert "0 of 1" in report_text(record("f", 2.0, flags=["unchecked"]))
    assert "Checked against float64: 1 of 5 cases" in report_text(*half, whole)
    table = table_of(half[0], whole)
    counts = {row["method"]: row["checked"] for row in correctness_rows(table, method_names(table))}
    assert counts == {"a": "0", "e": "1"}


def selectors(flags: list[str]) -> list[Record]:
    made = []
    for n in (1024, 4096):
        moba = selector_case("moba", 1.0, 0.5, seq_len=n)
        moba.flags = ["approximate", *flags]
        made += [moba, case("bands", 3.0, seq_len=n)]
    return made


def test_a_selector_that_was_not_checked_pays_nowhere() -> None:
    (row,) = break_even_rows(collection(*selectors([])).table, ["tokens"])
    assert row["faster from"] == "at most 1k"
    unchecked = collection(*selectors(["unchecked"])).table
    assert break_even_rows(unchecked, ["tokens"]) == []
    for row in recall_rows(unchecked, ["tokens"]):
        assert row["method"] == "moba (unchecked)"
        assert row["vs exact"] == ""


def mixed() -> Collection:
    """An unchecked method that would win everything, and checked ones."""
    records = []
    for n, ms in ((1024, 1.0), (4096, 9.0)):
        for world_size in (1, 2):
            shape: dict[str, Any] = {"seq_len": n}
            if world_size > 1:
                shape |= {"strategy": "ring", "world_size": 2, "layout": "zigzag"}
            records += [
                case("quick", ms / 3, 1.5, peak_mb=1.0, flags=["unchecked"], **shape),
                case("bands", ms, 1.2, **shape),
                case("flex", 2 * ms, 0.6, **shape),
            ]
    return collection(*records)


@pytest.mark.parametrize("kind", ["throughput", "memory", "pareto", "roofline", "scaling"])
def test_figures_mark_what_may_not_be_compared(kind: str, drawn: Drawn) -> None:
    figure = drawn(kind, mixed())
    names = [name.replace("\n", "") for name in legend(figure)]
    assert any("(unchecked)" in name and "quick" in name for name in names)
    assert not [name for name in names if "quick" in name and "(unchecked)" not in name]
    faces = {
        str(line.get_markerfacecolor())
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() not in ("None", "", None)
    }
    assert "white" in faces
    assert len(faces) > 1


def test_an_unchecked_point_is_not_on_the_front(drawn: Drawn) -> None:
    (axes,) = drawn("pareto", mixed(), "world_size=1").axes
    front = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert min(front.get_xdata()) == pytest.approx(9.0)
    assert len(points(axes)) == 3


def test_an_unchecked_rate_is_no_baseline(drawn: Drawn) -> None:
    one = case("bands", 10.0, 9.9, flags=["unchecked"])
    two, four = (
        case("bands", 10.0, 1.0, strategy="ring", layout="zigzag", world_size=n) for n in (2, 4)
    )
    (axes,) = drawn("scaling", collection(one, two, four)).axes
    efficiencies = [y for ys in points(axes).values() for y in ys.values()]
    assert efficiencies == pytest.approx([100, 100])  # of two ranks


def test_the_quality_figure_and_heatmap_leave_them_out(drawn: Drawn) -> None:
    unchecked = selector_case("oracle", 1.0, 0.9, seq_len=4096)
    unchecked.flags = ["approximate", "unchecked"]
    figure = drawn("quality", collection(*selectors([]), unchecked))
    assert legend(figure) == ["bands", "moba", "Pareto front"]
    assert not [name for name in legend(drawn("heatmap", mixed())) if "quick" in name]


def test_the_page_marks_them() -> None:
    data = chart_data(mixed())
    assert "quick (unchecked)" in data["texts"]["method"]["values"]
    assert data["texts"]["disqualified"]["values"] == ["unchecked"]
    style = data["styles"]["quick (unchecked)"]
    assert (style["hollow"], style["symbol"]) == (True, f"{data['styles']['quick']['symbol']}-open")


def launches(count: int, ms: float = 10.0, **fields: Any) -> Run:
    made = [
        record("a", ms + i / 100, writer=f"w{i}", started=float(i), **fields) for i in range(count)
    ]
    run = run_of(made[-1])
    run.launches[made[0].case.id] = made
    return run


def test_an_unchecked_run_fails_the_gate() -> None:
    good, bad = launches(6), launches(6, flags=["unchecked"], conditions=UNCHECKED)
    result = evaluate_gate(good, bad, 0.05, 0.02)
    assert [decision.kinds for decision in result.decisions.values()] == ["unchecked"]
    assert result_lines(result)[0].endswith("unchecked: the result of the new run is unchecked")
    assert evaluate_gate(bad, bad, 0.05, 0.02).outcome == FAIL
    (decision,) = evaluate_gate(bad, good, 0.05, 0.02).decisions.values()
    assert (decision.outcome, decision.text) == (
        UNDECIDED, "unchecked in the base: times of the base do not count",
    )  # fmt: skip
    rows = {
        name: (row["verdict"], row["why"])
        for name, sides in (("new", (good, bad)), ("base", (bad, good)), ("both", (bad, bad)))
        for row in compare(*sides).to_dict("records")
    }
    assert rows == {
        "new": ("FAILS", "unchecked in the new run"),
        "base": ("WORKS", "unchecked in the base"),
        "both": ("NEITHER", "unchecked in the base and the new run"),
    }


def test_selectors_are_compared_with_themselves() -> None:
    runs = [launches(6, ms, flags=["approximate"]) for ms in (10.0, 12.0)]
    assert compare(*runs)["verdict"].tolist() == ["SLOWER"]


def test_a_run_without_checks_end_to_end(tmp_path: Path) -> None:
    sweep, out = tmp_path / "s.toml", tmp_path / "run"
    sweep.write_text(
        '[sweep]\noperator = ["bands", "reference"]\nseq_len = 64\nnum_heads_q = 1\n'
        'head_dim = 16\ndirection = "fwd"\n[measure]\ncheck_sampled = false\nmemory = false\n'
        "max_iterations = 7\n"
    )
    code, stderr = cpbench("run", sweep, "--out", out, "--device", "cpu")
    assert code == 0, stderr
    table = collect([out]).table
    assert table["disqualified"].tolist() == ["unchecked"] * 2
    for path in out.glob("records/*.jsonl"):
        for line in path.read_text().splitlines():
            made = json.loads(line)
            assert made["kind"] != "case" or not made["conditions"]["checked"]
    assert cpbench("gate", out, out)[0] == 1
    assert section_lines(report_text(*collect([out]).runs[str(out)].records.values()), "All cases")
