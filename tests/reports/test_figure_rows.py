"""Which rows a figure draws, what it refuses, and files and settings it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from figure_cases import (
    PILE,
    case,
    collection,
    error_message,
    legend,
    points,
    varied,
)
from made_records import CONDITIONS, record, run_of
from matplotlib.figure import Figure

from cpbench.cli.options import PlotKind
from cpbench.reports.collection import merge_runs
from cpbench.reports.figures import draw as figures
from cpbench.reports.figures import kinds as figure_kinds
from cpbench.reports.figures.sheet import set_log10_ticks


def test_the_problem_with_the_most_cases(
    drawn: Callable[..., Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    cases = collection(
        case("bands", 1.0, 2.0, direction="fwd"),
        case("bands", 1.0, 2.0, direction="fwd", world_size=2),
        case("flex", 1.0, 2.0, direction="fwd"),
        case("bands", 1.0, 3.0, direction="bwd"),
    )
    assert set(points(drawn("throughput", cases).axes[0])) == {"o", "s"}
    assert capsys.readouterr().err == (
        "cpbench: several problems match; drawn: direction=fwd, world_size=1; "
        "select another with --where\n"
    )
    where = ("direction=fwd", "world_size=2")
    assert legend(drawn("throughput", cases, *where)) == ["single/contiguous bands"]
    (axes,) = drawn("throughput", cases, "direction=bwd").axes
    assert points(axes)["o"] == {1024: pytest.approx(3.0)}
    assert capsys.readouterr().err == ""


def test_a_failure_on_an_unknown_machine_is_shown(drawn: Callable[..., Figure]) -> None:
    crash = case("flex")
    crash.environment = None
    cases = collection(
        case("bands", 1.0, conditions=CONDITIONS), crash,
        case("bands", 1.0, ranks_per_node=1),
        case("bands", 1.0, strategy="ring", world_size=2, ranks_per_node=2),
    )  # fmt: skip
    assert legend(drawn("throughput", cases, "world_size=1")) == ["bands", "flex", "failed"]


def test_the_newest_record_of_each_case_is_drawn(
    drawn: Callable[..., Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        case("./op.py:f", 1.0, rate, started=1e9 + rate, content=(("./op.py:f", f"{rate}"),))
        for rate in (2.0, 3.0, 1.0)
    ]
    (axes,) = drawn("throughput", collection(*records), "seed=0").axes
    assert points(axes)["o"] == {1024: pytest.approx(3.0)}
    assert capsys.readouterr().err == "cpbench: 2 older measurements of the same cases left out\n"


@pytest.mark.parametrize(
    ("where", "markers"),
    [
        ("mask=causal", 1), ("mask=causal_document", 1), (f"mask={PILE}", 1),
        (f"mask={PILE},seed=1", 1), ("mask=causal,causal_document:seed=0,corpus=pile", 2),
        ("operator=bands,sdpa.math", 2), ("seq_len=4k", 2), ("placement=", 2), ("dtype=float32", 2),
    ],
)  # fmt: skip
def test_where(where: str, markers: int, drawn: Callable[..., Figure]) -> None:
    assert len(drawn("throughput", varied(), where).axes) == markers


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mask", "'mask' is not of the form key=value; keys: operator, strategy, layout, mask"),
        ("colour=red", "no key 'colour'; keys: operator, strategy"),
        ("mask=full", f"no case has mask=full; mask is one of: causal, {PILE}"),
        ("seq_len=3k", "no case has seq_len=3k; seq_len is one of: 1k, 4k, 16k"),
        ("seq_len=x", "seq_len: 'x' is not a size"),
        ("placement=x", 'no case has placement=x; placement is one of: ""'),
        ("operator=a:b", "no case has operator=a:b; operator is one of: bands, sdpa.math"),
    ],
)
def test_conditions_that_cannot_be_met(where: str, message: str) -> None:
    assert error_message(varied(), "throughput", where).startswith(message)


def test_long_lists_of_values_are_cut() -> None:
    cases = collection(*(case("bands", 1.0, seed=seed) for seed in range(50)))
    assert error_message(cases, "throughput", "seed=99").endswith("18, 19, and 30 more")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("throughput", "no case is ok and timed: there is no throughput"),
        ("memory", "no case has a peak memory or is out of memory"),
        ("scaling", figure_kinds.NO_SCALING),
        ("heatmap", "nothing to compare: no case was exact, timed and checked"),
        ("pareto", "no case has both ms and peak MB, max per rank"),
        ("roofline", "no timed case has measured peaks"),
        ("timeline", "no case has a start and a duration"),
        ("pie", "no kind 'pie' of figure; kinds: throughput, memory"),
    ],
)
def test_nothing_to_draw(kind: str, message: str) -> None:
    assert error_message(
        merge_runs({"night": run_of(record("a", status="crash"))}), kind
    ).startswith(message)


@pytest.mark.parametrize("path", ["x.gif", "x", "svg", "x.svg.gz"])
def test_other_suffixes(path: str) -> None:
    assert error_message(varied(), "memory", path=path) == (
        f"-o {path}: a figure is written as .svg, .png, .pdf"
    )


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.SVG"
    path.write_text("old")

    def disk_full(self: Path, target: Path) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        figures.draw(varied(), "memory", path, [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_settings_of_the_user_are_ignored_and_kept(tmp_path: Path) -> None:
    figures.draw(varied(), "pareto", tmp_path / "a.svg", [])
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        figures.draw(varied(), "pareto", tmp_path / "b.svg", [])
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_many_masks_methods_and_failures(drawn: Callable[..., Figure]) -> None:
    records = [
        case(f"operator_{i}_of_a_long_name", None if i == j else 1.0 + i, seq_len=1024 << j,
             mask=f"sliding_window_causal:window={64 + k}")
        for i in range(12) for j in range(10) for k in range(7)
    ]  # fmt: skip
    figure = drawn("throughput", collection(*records))
    assert len(figure.axes) == 7
    assert len(legend(figure)) == 13
    assert all(points(axes)["x"] for axes in figure.axes)
    assert len(figure.axes[0].get_xticks()) <= 8
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("low", "high", "ends", "labels"),
    [
        (3, 40, (2, 50), ["2", "5", "10", "20", "50"]),
        (7, 7, (5, 10), ["5", "10"]),
        (0.03, 900, (0.01, 1000), ["0.01", "0.1", "1", "10", "100", "1,000"]),
        (1, 2e6, (1, 1e7), ["1", "10", "10²", "10³", "10⁴", "10⁵", "10⁶", "10⁷"]),
    ],
)
def test_ticks(low: float, high: float, ends: tuple[float, float], labels: list[str]) -> None:
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    assert set_log10_ticks(axes.yaxis, low, high) == pytest.approx(ends)
    assert [label.get_text() for label in axes.get_yticklabels()] == labels


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, cpbench.reports.figures.draw\n"
        "assert not {'matplotlib', 'pandas', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_pyplot(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    figures.draw(varied(), "memory", tmp_path / "x.png", [])
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_the_command_line_has_every_kind() -> None:
    assert {kind.value for kind in PlotKind} == set(figures.KINDS)
