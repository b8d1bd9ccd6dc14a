"""Figures of synthetic records: contents, error messages, and hostile names."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from made_records import record, run_of
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cpbench.cli.options import PlotKind
from cpbench.core.spec import Spec
from cpbench.reports.collection import Collection, merge_runs
from cpbench.reports.figures import draw as figures
from cpbench.reports.figures import kinds as figure_kinds
from cpbench.reports.figures.sheet import set_log10_ticks
from cpbench.results.record import Record

PILE = "causal_document:corpus=pile"
MACHINE = {"host": "node", "processor": "some", "memory_bytes": 64 * 10**9,
           "peaks": {"float32": 2.0, "copy_gb_s": 100.0}}  # fmt: skip
AXES = {
    "throughput": ("tokens", "TFLOP/s per rank"),
    "memory": ("tokens", "peak MB, max per rank", "device limit 32.0 GB"),
    "scaling": ("ranks", "strong scaling", "weak scaling", "efficiency, %"),
    "heatmap": ("tokens", "ranks"),
    "pareto": ("ms at 4k tokens", "peak MB, max per rank", "Pareto front"),
    "quality": ("ms at 4k tokens", "attention recall, %", "Pareto front"),
    "roofline": ("FLOPs per byte", "TFLOP/s per rank", "matrix product 2.00 TFLOP/s",
                 "copy 100 GB/s"),
    "timeline": ("minutes since the start", "gang-1"),
}  # fmt: skip
HOSTILE = "<b>$x_1$ & %"


def case(operator: str, ms: float | None = None, tflops: float = 0.5, **fields: Any) -> Record:
    """A record on ``MACHINE`` with all that figures show; a failure without ``ms``."""
    fields.setdefault("status", "ok" if ms else "crash")
    peak = fields.pop("peak_mb", 10.0)
    case_record = record(operator, ms, environment="e", **fields)
    case_record.started = case_record.started or 1e9
    case_record.seconds = case_record.seconds or 30.0
    case_record.writer = case_record.writer or "gang-1"
    if ms:
        world_size = case_record.case.world_size
        case_record.flops = {"fwd": round(tflops * ms * 1e9 * world_size)}
        case_record.memory_bytes = {"peak": [round(peak * 1e6)] * world_size}
    return case_record


def collection(*records: Record, **environment: Any) -> Collection:
    run = run_of(*records)
    # Two ranks on the host: each has half of its memory.
    facts = MACHINE | {"ranks": [{"host": "node"}] * 2} | environment
    run.environments = {"e": {"id": "e", **facts}}
    return merge_runs({"night": run})


def varied(kind: str = "") -> Collection:
    """Cases for every kind of figure; for ``quality`` also selectors."""
    records = []
    for mask in ("causal", f"{PILE},seed=0", f"{PILE},seed=1"):
        for n, ms in ((1024, 1.0), (4096, 9.0)):
            records += [case("bands", ms, 1.2, mask=mask, seq_len=n, started=1e9 + 60 + ms),
                     case("sdpa.math", 2 * ms, mask=mask, seq_len=n, peak_mb=n / 50),
                     case("bands", ms, mask=mask, seq_len=n, strategy="ring", world_size=2),
                     case("bands", ms, mask=mask, seq_len=n, strategy="ring", world_size=4,
                          layout="zigzag")]  # fmt: skip
        records.append(case("sdpa.math", mask=mask, seq_len=16384, status="oom", reason="no room"))
        if kind == "quality":
            records += [selector_case("moba", ms, 0.4, mask=mask, seq_len=n)
                     for n, ms in ((1024, 0.5), (4096, 2.0))]  # fmt: skip
    return collection(*records)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """Draws a figure and returns it instead of writing it."""

    def draw(kind: str, cases: Collection, *where: str) -> Figure:
        saved: list[Figure] = []
        monkeypatch.setattr(figures, "_save", lambda figure, path: saved.append(figure))
        figures.draw(cases, kind, Path("x.svg"), where)
        monkeypatch.undo()
        return saved[0]

    return draw


def svg_texts(path: Path) -> list[str]:
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


def points(axes: Axes) -> dict[str, dict[float, float]]:
    """By marker, y of each x."""
    ys_by_marker: dict[str, dict[float, float]] = {}
    for line in axes.lines:
        if line.get_marker() not in ("None", "", "|", "_", None):
            xs, ys = (np.asarray(values, dtype=float).tolist() for values in line.get_data())
            ys_by_marker.setdefault(str(line.get_marker()), {}).update(zip(xs, ys, strict=True))
    return ys_by_marker


def error_bar(axes: Axes) -> list[float]:
    """Both ends of the only error bar."""
    (bars,) = axes.collections
    assert isinstance(bars, LineCollection)
    (segment,) = bars.get_segments()
    return [float(y) for y in segment[:, 1]]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def error_message(cases: Collection, kind: str, *where: str, path: str = "x.svg") -> str:
    with pytest.raises(ValueError) as error:
        figures.draw(cases, kind, Path(path), where)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    boxes = [text.get_window_extent() for text in [*texts, *figure.legends[0].get_texts()]]
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


def selector_case(operator: str, ms: float, recall: float, **fields: Any) -> Record:
    case_record = case(operator, ms, **fields)
    case_record.flags = ["approximate"]
    case_record.quality = {"mass": recall, "density": recall / 2}
    return case_record


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
        case("bands", 1.0, conditions={"clock": "wall"}), crash,
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
        ("pareto", "no case has both a time and a peak memory"),
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
    assert [kind.value for kind in PlotKind] == list(figures.CHARTS)
