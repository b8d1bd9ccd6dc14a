"""Figures for papers: a chart of one kind, as SVG, PNG or PDF."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.collection import Collection
from cpbench.reports.columns import UNKNOWN_MACHINE
from cpbench.reports.figures import kinds, needles, pareto, predicted
from cpbench.reports.figures.sheet import SETTINGS, Sheet
from cpbench.reports.figures.style import method_styles, with_hollow_styles
from cpbench.reports.labels import pluralize
from cpbench.reports.metrics import parse_metric
from cpbench.reports.tables.summary import method_labels, method_names
from cpbench.reports.where import filter_rows
from cpbench.results.store import write_atomically
from cpbench.sweep.sweep_file import KEYS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
DPI = 200
# What is the same throughout a chart: facts of the problem other than mask, tokens and ranks, and
# how it was measured.
CONSTANT_KEYS = (
    "direction", "dtype", "queries", "phase", "key_lens", "page_size", "batch",
    "num_heads_q", "num_heads_kv", "head_dim",
    "head_dim_v", "ranks_per_node", "seed", "inputs", "rope", "machine", "clock",
)  # fmt: skip
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}
}  # fmt: skip


@dataclass(frozen=True)
class ChartKind:
    """A kind of chart.

    Attributes:
        usable: which rows can be shown.
        empty_message: error when no row can.
        draw: draws rows (with a column ``method``) on a sheet.
        one_problem, one_world_size: whether all rows must have equal ``CONSTANT_KEYS``, and the
            same number of ranks.
        labels: label of each row that its points are drawn under: results that may not be compared
            with those of other methods are hollow, and named so in the legend.
        prepare: changes the table before a problem is selected.
        varies: columns beside mask, tokens and ranks that tell cases apart.
    """

    usable: Callable[[pd.DataFrame], pd.Series[bool]]
    empty_message: str
    draw: Callable[[pd.DataFrame, Sheet], None]
    one_problem: bool = True
    one_world_size: bool = True
    labels: Callable[[pd.DataFrame], list[str]] = method_labels
    prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    varies: tuple[str, ...] = ()


def _timed(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["status"] == "ok") & table["tflops_per_rank"].notna()


def _has_values(table: pd.DataFrame, *columns: str) -> pd.Series[bool]:
    return (table["status"] == "ok") & table[list(columns)].notna().all(axis=1)


NO_NEEDLES = "no case has inputs = haystack, whose needles are found or not"
CHARTS = {
    "throughput": ChartKind(
        _timed, "no case is ok and timed: there is no throughput", kinds.throughput
    ),
    "memory": ChartKind(
        lambda table: (table["status"] == "ok") & (table["peak_mb"] > 0)
        | (table["status"] == "oom"),
        "no case has a peak memory or is out of memory", kinds.memory,
    ),
    "scaling": ChartKind(
        lambda table: _timed(table) & (table["world_size"] > 1), kinds.NO_SCALING,
        kinds.scaling, one_world_size=False,
    ),
    "heatmap": ChartKind(
        lambda table: table["competes"],
        "nothing to compare: no case was exact, timed and checked", kinds.heatmap,
        one_world_size=False,
    ),
    "quality": ChartKind(
        pareto.has_recall, "no case is timed and checked", pareto.quality, labels=method_names,
    ),
    "needles": ChartKind(
        needles.has_found, NO_NEEDLES, needles.depths, labels=method_names,
        prepare=needles.with_facts, varies=tuple(needles.DEFAULTS),
    ),
    "needle_counts": ChartKind(
        needles.has_found, NO_NEEDLES, needles.counts, labels=method_names,
        prepare=needles.with_facts, varies=tuple(needles.DEFAULTS),
    ),
    "roofline": ChartKind(
        lambda table: _has_values(
            table, "tflops_per_rank", "intensity", "gemm_tflops", "copy_gb_s"
        ),
        "no timed case has measured peaks (gemm_tflops and copy_gb_s of its machine)",
        kinds.roofline,
    ),
    "predicted": ChartKind(
        lambda table: table["predicted_ms"].notna(),
        "no case was predicted: cpbench run SWEEP --predict CLUSTER", predicted.predicted,
        one_world_size=False, labels=method_names,
    ),
    "timeline": ChartKind(
        lambda table: (table["started"] > 0) & (table["seconds"] > 0),
        "no case has a start and a duration", kinds.timeline,
        one_problem=False, one_world_size=False, labels=method_names,
    ),
}  # fmt: skip


KINDS = (*CHARTS, "pareto")
DEFAULT_AXES = ("ms", "peak")


def _pareto_chart(axes: tuple[str, str]) -> ChartKind:
    """The chart of two metrics, by their names.

    Raises:
        ValueError: for an unknown one.
    """
    if axes[0] == axes[1]:
        raise ValueError(f"--x and --y are both {axes[0]}: give two metrics")
    x, y = (parse_metric(f"--{axis}", name) for axis, name in zip("xy", axes, strict=True))
    return ChartKind(
        lambda table: _has_values(table, x.column, y.column),
        f"no case has both {x.heading} and {y.heading}",
        lambda table, sheet: pareto.pareto(table, sheet, (x, y)),
    )


def draw(
    collection: Collection, kind: str, path: Path, where: Sequence[str],
    axes: tuple[str, str] = DEFAULT_AXES,
) -> None:  # fmt: skip
    """Write a figure.  Where cases of several problems are left, those of the problem with the most
    cases are drawn, and a line on stderr says which one.

    Args:
        kind: one of ``KINDS``.
        path: ends in one of ``SUFFIXES``.
        where: conditions ``key=value[,value]``, see ``cpbench.reports.where``.
        axes: metrics of a Pareto chart, across and up.

    Raises:
        ValueError: in one line, for another suffix or kind, a condition that cannot be met, or
            when there is nothing to draw.
        OSError: when the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"-o {path}: a figure is written as {', '.join(SUFFIXES)}")
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r} of figure; kinds: {', '.join(KINDS)}")
    table = collection.table
    if kind == "predicted":  # of one cluster, wherever the measured ones ran
        table = collection.predicted.assign(machine="", clock="")
    table = table.assign(method=method_names(table))
    styles = method_styles(table["method"])
    table = filter_rows(table, where)
    chart = CHARTS[kind] if kind in CHARTS else _pareto_chart(axes)
    table = chart.prepare(table)
    if chart.one_problem:
        table = _select_problem(table, chart)
    else:
        table = _expand_launches(collection, table)
        if not chart.usable(table).any():
            raise ValueError(chart.empty_message)

    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(SETTINGS)
        labels = chart.labels(table)
        sheet = Sheet(with_hollow_styles(styles, dict(zip(labels, table["method"], strict=True))))
        chart.draw(table.assign(method=labels), sheet)
        sheet.draw_legend()
        save(sheet.figure, path)


def _select_problem(table: pd.DataFrame, chart: ChartKind) -> pd.DataFrame:
    """The rows of the problem with the most usable ones (ok, if some are), the newest of each case;
    of the fewest ranks where the chart takes one number of ranks.

    A failure on an unknown machine, or before a clock was read, belongs to every problem.  Ranks
    per node are ignored for a single rank.

    Raises:
        ValueError: when no row is usable.
    """
    ranks_per_node = table.loc[table["world_size"] > 1, "ranks_per_node"]
    table = table.assign(clock=table["clock"].fillna(""))
    if len(ranks_per_node):
        most_frequent = ranks_per_node.mode().iloc[0]
        nodes = table["ranks_per_node"].where(table["world_size"] > 1, most_frequent)
        table = table.assign(ranks_per_node=nodes)
    usable = table[chart.usable(table)]
    if usable.empty:
        raise ValueError(chart.empty_message)
    if (usable["status"] == "ok").any():
        usable = usable[usable["status"] == "ok"]
    sizes = usable.groupby(list(CONSTANT_KEYS), sort=True).size()
    largest = sizes.index[int(sizes.to_numpy().argmax())]
    problem = dict(zip(CONSTANT_KEYS, largest, strict=True))
    varying = [key for key in CONSTANT_KEYS if usable[key].nunique() > 1]
    for key, value in problem.items():
        unknown = (table["status"] != "ok") & table[key].isin(["", UNKNOWN_MACHINE])
        table = table[(table[key] == value) | unknown]
    if chart.one_world_size:
        world_sizes = table.loc[chart.usable(table), "world_size"]
        problem["world_size"] = world_sizes.min()
        varying += ["world_size"] if world_sizes.nunique() > 1 else []
        table = table[table["world_size"] == world_sizes.min()]
    count = len(table)
    # A case may be present several times, with different files behind its names.
    table = table.sort_values("started", kind="stable").drop_duplicates(
        ["method", "mask", "seq_len", "world_size", *chart.varies], keep="last"
    )
    if varying:
        values = ", ".join(f"{key}={problem[key]}" for key in varying)
        hint = "; select another with --where" if not {*varying}.isdisjoint(KEYS) else ""
        print(f"cpbench: several problems match; drawn: {values}{hint}", file=sys.stderr)
    if older := count - len(table):
        print(
            f"cpbench: {pluralize(older, 'older measurement')} of the same cases left out",
            file=sys.stderr,
        )
    return table.sort_index()


def _expand_launches(collection: Collection, table: pd.DataFrame) -> pd.DataFrame:
    """A row for each launch of a case, with its start, duration, writer and flags."""
    import pandas as pd

    several = table[table["launches"].fillna(0) > 1]
    rows = [
        {**row, "started": launch.started, "seconds": launch.seconds, "writer": launch.writer,
         "flags": " ".join(launch.flags)}
        for row in several.to_dict("records")
        for launch in collection.runs[row["run"]].launches[row["id"]]
    ]  # fmt: skip
    others = table.drop(index=several.index)
    return pd.concat([others, pd.DataFrame(rows)], ignore_index=True) if rows else others


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the form of the suffix, one of ``SUFFIXES``."""
    form, content = path.suffix[1:].lower(), io.BytesIO()
    figure.savefig(content, format=form, dpi=DPI, metadata=_METADATA[form])
    write_atomically(path, content.getvalue())
