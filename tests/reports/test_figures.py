"""Figures of synthetic records: contents, error messages, and hostile names."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_cases import (
    AXES,
    HOSTILE,
    PILE,
    case,
    collection,
    error_bar,
    error_message,
    legend,
    needle_case,
    points,
    selector_case,
    varied,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cpbench.core.spec import Spec
from cpbench.reports.collection import merge_runs
from cpbench.reports.figures import draw as figures
from cpbench.reports.figures import kinds as figure_kinds
from cpbench.reports.page.figures import needle_figures
from cpbench.results.record import Record


def svg_texts(path: Path) -> list[str]:
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("kind", figures.CHARTS)
def test_every_kind_is_written(kind: str, tmp_path: Path) -> None:
    cases = varied(kind)
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        path = tmp_path / f"figure{suffix}"
        figures.draw(cases, kind, path, [])
        content = path.read_bytes()
        assert content.startswith(start)
        figures.draw(cases, kind, path, [])
        assert path.read_bytes() == content, "not deterministic"
    assert {item.name for item in tmp_path.iterdir()} == {"figure.svg", "figure.png", "figure.pdf"}
    texts = svg_texts(tmp_path / "figure.svg")
    for label in AXES[kind]:
        assert any(label in text for text in texts), label
    names = {"ring/contiguous bands", "ring/zigzag bands"} if kind == "scaling" else {"bands"}
    assert names <= set(texts)
    if kind != "timeline":
        assert {"causal", PILE} <= set(texts)


def drawn_texts(axes: Axes) -> list[Text]:
    """Texts of a panel, without labels of ticks outside of it, which are not drawn."""
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    for axis, side, (low, high) in (
        (axes.xaxis, "labelbottom", axes.get_xlim()),
        (axes.yaxis, "labelleft", sorted(axes.get_ylim())),
    ):
        if axis.get_tick_params()[side]:
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for tick, label in ticks if low <= tick <= high]
    return [text for text in texts if text.get_text()]


@pytest.mark.parametrize("kind", figures.CHARTS)
def test_texts_do_not_overlap_or_leave_the_figure(kind: str, drawn: Callable[..., Figure]) -> None:
    figure = drawn(kind, varied(kind))
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in drawn_texts(axes)]
    named = figure.legends[0].get_texts() if figure.legends else []  # else by titles
    boxes = [text.get_window_extent() for text in [*texts, *named]]
    assert len(boxes) > 5
    whole = Bbox.union([figure.bbox, *boxes])
    assert whole.bounds == figure.bbox.bounds
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("kind", figures.CHARTS)
def test_hostile_names_are_drawn_as_text(kind: str, tmp_path: Path) -> None:
    records: list[Record] = []
    for name in (HOSTILE, "_hidden", "a\x00b"):
        for ranks in (1, 2):
            for n in (1024, 2048):
                hostile = case("x", 1.0 + len(records), seq_len=n, world_size=ranks, writer=HOSTILE,
                               strategy="ring" if ranks > 1 else "single")  # fmt: skip
                hostile.case = replace(hostile.case, operator=Spec(name), mask=Spec(HOSTILE))
                records.append(hostile)
    if kind == "quality":
        for hostile in records[:4]:
            hostile.flags, hostile.quality = ["approximate"], {"mass": 0.4}
    if kind.startswith("needle"):
        for number, hostile in enumerate(records):
            inputs = Spec.of("haystack", hops=1 + number % 2)
            hostile.case = replace(hostile.case, inputs=inputs, seq_len=1024, world_size=1)
            hostile.quality = {"found": 0.4, "solved": 0.3}
    figures.draw(collection(*records), kind, tmp_path / "x.svg", [])
    figures.draw(collection(*records), kind, tmp_path / "x.png", [])
    texts = svg_texts(tmp_path / "x.svg")
    assert HOSTILE in texts
    if kind != "heatmap":
        prefix = "ring/contiguous " if kind == "scaling" else ""
        names = (HOSTILE, "_hidden", "a�b")
        assert {f"{prefix}{name}" for name in names} <= set(texts)


def test_throughput(drawn: Callable[..., Figure]) -> None:
    cases = collection(
        case("bands", 2.0, 4.0, noise=0.1),
        case("flex", status="crash", reason="x"),
        case("sdpa.math", status="unsupported", reason="x"),
        *(case("bands", 1.0, rate, mask=f"{PILE},seed={i}", seq_len=4096)
          for i, rate in enumerate((1.0, 2.0, 6.0))),
        case("bands", mask=f"{PILE},seed=3", seq_len=4096, status="timeout"),
    )  # fmt: skip
    figure = drawn("throughput", cases)
    causal, pile = figure.axes
    assert points(causal) == {"o": {1024: pytest.approx(4.0)}, "s": {1024: 0}, "x": {1024: 0}}
    ends = error_bar(causal)
    assert ends == pytest.approx([4 / 1.1, 4 / 0.9])
    assert [label.get_text() for label in causal.get_xticklabels()] == ["4k", "1k"]
    assert error_bar(pile) == pytest.approx([1, 6])
    assert points(pile)["x"] == {4096: 0}
    assert legend(figure) == ["bands", "flex", "failed"]
    slow = drawn("throughput", collection(case("bands", 2.0, 0.5)))
    assert slow.axes[0].get_ylabel() == "GFLOP/s per rank"
    assert points(slow.axes[0])["o"] == {1024: pytest.approx(500)}


def test_memory(drawn: Callable[..., Figure]) -> None:
    records = [case("bands", 1.0, peak_mb=50), case("flex", status="oom", reason="x", seq_len=4096),
            case("sdpa.math", status="crash", seq_len=2048)]  # fmt: skip
    (axes,) = drawn("memory", collection(*records)).axes
    limit = 32_000.0  # per rank, of two on the host
    assert points(axes)["o"] == {1024: 50}
    assert points(axes)["x"] == {4096: limit}
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] > limit
    (axes,) = drawn("memory", collection(*records, memory_bytes=None)).axes
    assert points(axes)["x"] == {4096: 50}
    assert not axes.texts


def test_scaling(drawn: Callable[..., Figure]) -> None:
    ring: dict[str, Any] = {"strategy": "ring", "layout": "zigzag"}
    records = [
        case("bands", 1.0, 4.0, seq_len=4096),
        case("bands", 1.0, 3.0, seq_len=4096, world_size=2, **ring),
        case("bands", 1.0, 1.0, seq_len=4096, world_size=4, **ring),
        case("bands", 1.0, 3.0, seq_len=8192, world_size=4, **ring),
        case("flex", 1.0, 2.0, seq_len=4096, world_size=2, **ring),
        case("flex", 1.0, 1.0, seq_len=4096, world_size=4, **ring),
        case("flex", seq_len=4096, world_size=8, **ring),
        case("bands", 1.0, 9.0, seq_len=64, world_size=1),
        case("bands", 1.0, 9.0, seq_len=65536, world_size=2, **ring),
    ]
    figure = drawn("scaling", collection(*records))
    strong, weak = figure.axes
    assert strong.get_title() == "causal\n4k tokens"
    handles = dict(zip(legend(figure), figure.legends[0].get_lines(), strict=False))
    bands, flex = (str(handles[f"ring/zigzag {name}"].get_marker()) for name in ("bands", "flex"))
    assert points(strong)[bands] == {2: pytest.approx(75), 4: pytest.approx(25)}
    assert points(strong)[flex] == {2: pytest.approx(100), 4: pytest.approx(50), 8: 0}
    assert points(strong)["x"] == {8: 0}
    assert weak.get_title() == "causal\n2k tokens per rank"
    assert points(weak)[bands] == {2: pytest.approx(100), 4: pytest.approx(100)}
    assert (
        error_message(collection(*records[:1], *records[-2:]), "scaling") == figure_kinds.NO_SCALING
    )


def test_heatmap(drawn: Callable[..., Figure]) -> None:
    records = [
        case("bands", 2.0), case("flex", 3.0),
        case("bands", 2.0, seq_len=4096), case("flex", 2.01, seq_len=4096),
        case("bands", 2.0, strategy="ring", world_size=2),
        case("bands", 3.0, strategy="ring", layout="zigzag", world_size=2),
        case("bands", 3.0, strategy="ring", world_size=4),
        case("bands", 2.0, strategy="ring", layout="zigzag", world_size=4),
    ]  # fmt: skip
    figure = drawn("heatmap", collection(*records))
    (axes,) = figure.axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {
        (0, 0): "bands\n1.50x", (0, 1): "bands\ntie", (1, 0): "ring/contiguous\n1.50x",
        (2, 0): "ring/zigzag\n1.50x", (1, 1): "–", (2, 1): "–",
    }  # fmt: skip
    (tied,) = (patch for patch in axes.patches if patch.get_hatch())
    assert isinstance(tied, Rectangle)
    assert tied.get_xy() == (-0.5, 0.5)
    assert legend(figure) == ["bands", "ring/contiguous bands", "ring/zigzag bands", "tie"]


def test_pareto(drawn: Callable[..., Figure]) -> None:
    records = [
        case("a", 1.0, peak_mb=30), case("b", 2.0, peak_mb=20), case("c", 3.0, peak_mb=25),
        case("a", 9.0, peak_mb=99, seq_len=4096),
    ]  # fmt: skip
    (axes,) = drawn("pareto", collection(*records)).axes
    front = np.asarray(axes.lines[0].get_xydata())
    assert axes.lines[0].get_drawstyle() == "steps-post"
    assert front[1:-1].tolist() == [[1, 30], [2, 20]]
    assert points(axes) == {"o": {1: 30}, "s": {2: 20}, "^": {3: 25}}
    assert axes.get_xlabel() == "ms at 1k tokens"


def test_quality(drawn: Callable[..., Figure]) -> None:
    records = [
        case("bands", 8.0), case("reference", 9.0), selector_case("moba", 2.0, 0.5),
        selector_case("oracle", 20.0, 0.9), selector_case("nsa", 1.0, 0.1),
    ]  # fmt: skip
    (axes,) = drawn("quality", collection(*records)).axes
    front = np.asarray(axes.lines[0].get_xydata())
    assert front[:-1].tolist() == [[1, 0], [1, 10], [2, 50], [8, 100]]
    assert front[-1, 1] == 100
    assert {(x, y) for ys in points(axes).values() for x, y in ys.items()} == {
        (8, 100), (9, 100), (2, 50), (20, 90), (1, 10)
    }  # fmt: skip


def test_needles_by_depth_and_length(drawn: Callable[..., Figure]) -> None:
    records = [
        needle_case(operator, f"depth={depth}", found, seq_len=n)
        for operator, lost in (("bands", 0.0), ("moba", 0.5))
        for n, depth, found in ((1024, 0.0, 1.0 - lost), (1024, 1.0, 1.0), (4096, 1.0, 0.25))
    ]
    chain = needle_case("bands", "depth=1.0,hops=3", 0.0, seq_len=1024)  # not of single needles
    stopped = needle_case("bands", "depth=0.0", seq_len=4096)
    stopped.status, stopped.quality = "timeout", {}
    bands, moba, bar = drawn("needles", collection(*records, chain, stopped)).axes
    for axes, first in ((bands, 100.0), (moba, 50.0)):
        cells = np.ma.filled(axes.images[0].get_array(), np.nan)
        assert np.array_equal(cells, [[first, np.nan], [100.0, 25.0]], equal_nan=True)
        assert [text.get_text() for text in axes.texts] == [f"{first:.0f}", "–", "100", "25"]
    assert bar.get_ylabel() == "needles found, %"


def test_methods_without_a_case_that_is_ok_have_no_panel_of_needles(
    drawn: Callable[..., Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    records = [needle_case("bands", f"depth={depth}") for depth in (0.0, 0.5)]
    records += [needle_case("moba", "depth=0.5,hops=2"), needle_case("bands", "depth=0.5,hops=2")]
    for operator, statuses in (("moba", ["crash"]), ("quest", ["unsupported", "timeout"])):
        for depth, status in enumerate(statuses):
            failed = needle_case(operator, f"depth={depth}.0")
            failed.status, failed.quality = status, {}
            records.append(failed)
    figure = drawn("needles", collection(*records))
    assert [axes.get_title() for axes in figure.axes[:-1]] == ["bands"]
    missing = "not drawn, since no case is ok: moba (crash), quest (timeout, unsupported)"
    assert capsys.readouterr().err == f"cpbench: {missing}\n"
    ((_, note, _), (_, of_counts, _)) = needle_figures(collection(*records))
    assert note == missing
    assert of_counts == "not drawn, since no case is ok: quest (timeout, unsupported)"


def test_needles_by_their_number(drawn: Callable[..., Figure]) -> None:
    records = [needle_case("moba", f"depth={depth},hops={hops}", 1 / hops)
               for depth in (0.0, 0.5) for hops in (1, 2, 4)]  # fmt: skip
    other = needle_case("moba", "depth=1.0", 0.0)  # of a depth without chains
    (axes,) = drawn("needle_counts", collection(*records, other)).axes
    assert points(axes) == {"o": {1: 50, 2: 25, 4: 12.5}}
    with pytest.raises(ValueError, match="no keys, values or hops"):
        drawn("needle_counts", collection(other))
    with pytest.raises(ValueError, match="no case has inputs = haystack"):
        drawn("needles", collection(case("bands", 8.0)))


def test_quality_needs_a_selector(drawn: Callable[..., Figure]) -> None:
    with pytest.raises(ValueError, match="no selector"):
        drawn("quality", collection(case("bands", 8.0)))


def test_roofline(drawn: Callable[..., Figure]) -> None:
    bands = case("bands", 1.0, 1.0)
    (axes,) = drawn("roofline", collection(bands)).axes
    ridge = np.asarray(axes.lines[0].get_xydata())[1]
    assert ridge.tolist() == pytest.approx([20, 2])  # 2 TFLOP/s over 0.1 TB/s
    (row,) = collection(bands).table.to_dict("records")
    assert points(axes)["o"] == {row["intensity"]: pytest.approx(1.0)}
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_timeline(drawn: Callable[..., Figure]) -> None:
    cases = collection(
        case("bands", 1.0, started=1e9, seconds=120),
        case("flex", started=1e9 + 180, seconds=60, writer="gang-2", reason="x"),
        case("bands", 1.0, seq_len=2048, started=1e9 + 120, seconds=60, flags=["throttled"]),
        case("bands", status="unsupported", seq_len=4096, started=1e9 + 181, seconds=0.001),
    )
    figure = drawn("timeline", cases)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gang-1", "gang-2"]
    spans = {}
    for bars in axes.collections:
        for path in bars.get_paths():
            xs = np.asarray(path.vertices)[:, 0].round(2).tolist()
            spans[min(xs), max(xs)] = bars.get_hatch()
    assert set(spans) == {(3.01, 3.02), (0, 2), (2, 3), (3, 4)}
    assert spans[3, 4] == "xxxxxx"
    assert points(axes)["*"] == {2.5: pytest.approx(-0.43)}
    assert legend(figure) == ["bands", "unsupported", "failed", "throttled"]


def test_each_launch_has_its_bar(drawn: Callable[..., Figure]) -> None:
    first, last = (case("bands", 1.0, started=1e9 + at, writer=f"gang-{at}") for at in (0, 90))
    run = collection(last).runs["night"]
    run.launches[last.case.id] = [first, last]
    (axes,) = drawn("timeline", merge_runs({"night": run})).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gang-0", "gang-90"]
    assert sum(len(bars.get_paths()) for bars in axes.collections) == 2
