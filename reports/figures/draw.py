"""Figures for papers: one kind of chart of a run, as SVG, PNG or PDF."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.spec import Spec, format_size
from cpbench.reports.collection import Collection
from cpbench.reports.columns import UNKNOWN
from cpbench.reports.figures import kinds, pareto
from cpbench.reports.figures.sheet import SETTINGS, Sheet
from cpbench.reports.figures.style import looks
from cpbench.reports.labels import counted
from cpbench.reports.tables.summary import competing, methods
from cpbench.results.store import write_whole
from cpbench.sweep.sweep_file import INT_KEYS, KEYS, SPEC_KEYS, number, split_list

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
DPI = 200
LISTED = 20  # values, where a condition leaves nothing
# What a problem is beside mask, tokens and ranks, and what it was measured with.
PROBLEM = (
    "direction", "dtype", "queries", "batch", "num_heads_q", "num_heads_kv", "head_dim",
    "ranks_per_node", "seed", "inputs", "machine", "clock",
)  # fmt: skip
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None}, "png": {}, "pdf": {"CreationDate": None}
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One kind.

    Attributes:
        usable: which rows show something.
        lacking: what to say where none does.
        draw: draws rows (with a column ``method``) on a sheet.
        one_problem, one_size: whether all rows must be of one problem, and on one number of ranks.
    """

    usable: Callable[[pd.DataFrame], pd.Series[bool]]
    lacking: str
    draw: Callable[[pd.DataFrame, Sheet], None]
    one_problem: bool = True
    one_size: bool = True


def _timed(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["status"] == "ok") & table["tflops_per_rank"].notna()


def _known(table: pd.DataFrame, *columns: str) -> pd.Series[bool]:
    return (table["status"] == "ok") & table[list(columns)].notna().all(axis=1)


CHARTS = {
    "throughput": Chart(
        _timed, "no case is ok and timed: there is no throughput", kinds.throughput
    ),
    "memory": Chart(
        lambda table: (table["status"] == "ok") & (table["peak_mb"] > 0)
        | (table["status"] == "oom"),
        "no case has a peak memory or ran out of it", kinds.memory,
    ),
    "scaling": Chart(
        lambda table: _timed(table) & (table["world_size"] > 1), kinds.NO_SCALING,
        kinds.scaling, one_size=False,
    ),
    "heatmap": Chart(
        competing, "no case competes: none was exact, timed and checked", kinds.heatmap,
        one_size=False,
    ),
    "pareto": Chart(
        lambda table: _known(table, "time_ms", "peak_mb"),
        "no case has both a time and a peak memory", pareto.pareto,
    ),
    "quality": Chart(
        pareto.recoverable, "no case is timed and checked", pareto.quality
    ),
    "roofline": Chart(
        lambda table: _known(table, "tflops_per_rank", "intensity", "gemm_tflops", "copy_gb_s"),
        "no timed case has measured peaks (gemm_tflops and copy_gb_s of its machine)",
        kinds.roofline,
    ),
    "timeline": Chart(
        lambda table: (table["started"] > 0) & (table["seconds"] > 0),
        "no case says when it started and how long it took", kinds.timeline,
        one_problem=False, one_size=False,
    ),
}  # fmt: skip


def draw(collection: Collection, kind: str, path: Path, where: Sequence[str]) -> None:
    """Write a figure; where cases of several problems are left, of the one with the most cases,
    and say on stderr which that is.

    Args:
        kind: a key of ``CHARTS``.
        path: ends in one of ``SUFFIXES``.
        where: conditions ``key=value[,value]``, see :func:`chosen`.

    Raises:
        ValueError: in one line, for another suffix or kind, a condition that cannot be met, or
            when there is nothing to draw.
        OSError: when the file cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"-o {path}: a figure is written as {', '.join(SUFFIXES)}")
    if kind not in CHARTS:
        raise ValueError(f"no kind {kind!r} of figure; there are: {', '.join(CHARTS)}")
    table = collection.table.assign(method=methods(collection.table))
    found = looks(table["method"])
    table = chosen(table, where)
    chart = CHARTS[kind]
    if chart.one_problem:
        table = _one_problem(table, chart)
    else:
        table = _each_launch(collection, table)
        if not chart.usable(table).any():
            raise ValueError(chart.lacking)

    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(SETTINGS)
        sheet = Sheet(found)
        chart.draw(table, sheet)
        sheet.finish()
        _save(sheet.figure, path)


def chosen(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows that meet every ``key=value[,value]``.

    Keys are those of a sweep.  An operator, strategy, layout or mask matches by its text or by its
    name before the colon, a mask without its seed too; a number may be written ``4k``.

    Raises:
        ValueError: for a condition that is not of that form, an unknown key, or no row left.
    """
    for condition in conditions:
        key, equals, value = (part.strip() for part in condition.partition("="))
        if not equals:
            raise ValueError(f"{condition!r} is not of the form key=value; keys: {', '.join(KEYS)}")
        if key not in KEYS:
            raise ValueError(f"no key {key!r}; there are: {', '.join(KEYS)}")
        wanted = {_wanted(key, item) for item in split_list(value)}
        cells = table[key].fillna("")
        fits = {cell: not wanted.isdisjoint(_names(key, cell)) for cell in cells.unique()}
        left = table[cells.map(fits)]
        if left.empty:
            there = _listed(key, table["mask_family"] if key == "mask" else cells)
            raise ValueError(f"no case has {condition}; {key} is one of: {there}")
        table = left
    return table


def _wanted(key: str, item: str) -> object:
    if key in INT_KEYS:
        return number(key, item)
    try:
        return str(Spec.parse(item)) if key in SPEC_KEYS else item
    except ValueError:
        return item  # as it may stand in a record of somebody's own


def _names(key: str, cell: Any) -> set[object]:
    """What a value answers to."""
    if key not in SPEC_KEYS:
        return {cell}
    try:
        spec = Spec.parse(cell)
    except ValueError:
        return {cell, str(cell).partition(":")[0]}
    seedless = tuple((name, value) for name, value in spec.params if name != "seed")
    return {cell, spec.name, *([str(Spec(spec.name, seedless))] if key == "mask" else [])}


def _listed(key: str, cells: pd.Series[Any]) -> str:
    values = sorted(cells.unique())
    sized = key in ("seq_len", "queries")
    texts = [format_size(int(v)) if sized else str(v) or '""' for v in values[:LISTED]]
    more = [f"and {len(values) - LISTED} more"] if len(values) > LISTED else []
    return ", ".join([*texts, *more])


def _one_problem(table: pd.DataFrame, chart: Chart) -> pd.DataFrame:
    """The rows of the problem that has the most usable ones (ok, if some are), the newest of each
    case; of those on the fewest ranks where the chart takes one number of ranks.

    A failure on a machine that nobody noted, or before a clock was read, is of every problem.  How
    many ranks share a node does not matter to a single one.

    Raises:
        ValueError: when none is usable.
    """
    several = table.loc[table["world_size"] > 1, "ranks_per_node"]
    table = table.assign(clock=table["clock"].fillna(""))
    if len(several):
        nodes = table["ranks_per_node"].where(table["world_size"] > 1, several.mode().iloc[0])
        table = table.assign(ranks_per_node=nodes)
    usable = table[chart.usable(table)]
    if usable.empty:
        raise ValueError(chart.lacking)
    if (usable["status"] == "ok").any():
        usable = usable[usable["status"] == "ok"]
    sizes = usable.groupby(list(PROBLEM), sort=True).size()
    problem = dict(zip(PROBLEM, sizes.index[int(sizes.to_numpy().argmax())], strict=True))
    told = [key for key in PROBLEM if usable[key].nunique() > 1]
    for key, value in problem.items():
        unsaid = (table["status"] != "ok") & table[key].isin(["", UNKNOWN])
        table = table[(table[key] == value) | unsaid]
    if chart.one_size:
        there = table.loc[chart.usable(table), "world_size"]
        problem["world_size"] = there.min()
        told += ["world_size"] if there.nunique() > 1 else []
        table = table[table["world_size"] == there.min()]
    whole = len(table)
    # Of one case there may be several with other files behind its names.
    table = table.sort_values("started", kind="stable").drop_duplicates(
        ["method", "mask", "seq_len", "world_size"], keep="last"
    )
    if told:
        only = ", ".join(f"{key}={problem[key]}" for key in told)
        hint = "; --where chooses" if not {*told}.isdisjoint(KEYS) else ""
        print(f"cpbench: of several, this is drawn: {only}{hint}", file=sys.stderr)
    if older := whole - len(table):
        print(
            f"cpbench: {counted(older, 'older measurement')} of the same cases left out",
            file=sys.stderr,
        )
    return table.sort_index()


def _each_launch(collection: Collection, table: pd.DataFrame) -> pd.DataFrame:
    """A row for every launch of a case: when, for how long, by whom, with which caveats."""
    import pandas as pd

    several = table[table["launches"].fillna(0) > 1]
    rows = [
        {**row, "started": one.started, "seconds": one.seconds, "writer": one.writer,
         "flags": " ".join(one.flags)}
        for row in several.to_dict("records")
        for one in collection.runs[row["run"]].launches[row["id"]]
    ]  # fmt: skip
    left = table.drop(index=several.index)
    return pd.concat([left, pd.DataFrame(rows)], ignore_index=True) if rows else left


def _save(figure: Figure, path: Path) -> None:
    form, content = path.suffix[1:].lower(), io.BytesIO()
    figure.savefig(content, format=form, dpi=DPI, metadata=_METADATA[form])
    write_whole(path, content.getvalue())
