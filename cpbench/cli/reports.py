"""Commands that show results: report, plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpbench.cli.options import (
    SUFFIXES,
    Folders,
    Format,
    Output,
    PlotKind,
    UserError,
    Where,
    check_output,
    file_option,
    run_directory,
    user_input,
    write_text,
)

if TYPE_CHECKING:
    from cpbench.reports.collection import Collection
    from cpbench.reports.mixers.hybrid import Ratio

commands = typer.Typer()


@commands.command()
def report(
    folders: Folders = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="short, table, html, md and latex for people; github: a step summary; csv, "
            "parquet and json for programs; tensorboard and wandb: -o is a folder.  [default: by "
            "the suffix of -o, else short]",
        ),
    ] = None,
    output: Output = None,
    where: Where = None,
    pivot: Annotated[
        str,
        typer.Option(
            metavar="DOWN,ACROSS", help="A table of one metric instead, e.g. seq_len,operator."
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            metavar="METRIC",
            help="Of --pivot: ms, fwd, bwd, tflops, peak, sent, across, exposed, imbalance, "
            "recall, error, or a column.",
        ),
    ] = "ms",
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help="Of --pivot: divide by the figures of this one.")
    ] = "",
    hybrid: Annotated[
        str,
        typer.Option(
            metavar="A:N",
            help="Stacks of A attention layers for every N mixer layers instead, e.g. 1:7.",
        ),
    ] = "",
    columns: Annotated[
        bool, typer.Option("--columns", help="Explain the columns of csv, parquet and json.")
    ] = False,
) -> None:
    """Show the fastest method per problem, and what failed and why.

    -o report.html writes a page with charts.

    Several run directories, from several machines, are merged into one report.
    """
    from cpbench.reports import collection, export, trackers
    from cpbench.reports.mixers import hybrid as hybrids
    from cpbench.reports.tables import github, render

    if columns:
        print(render.explain_columns(), end="")
        return
    if not folders:
        raise UserError("report needs a run directory, or --columns")
    name = form.value if form else SUFFIXES.get(output.suffix, "short") if output else "short"
    with user_input():
        if baseline and not pivot:
            raise ValueError("--baseline goes with --pivot, e.g. --pivot seq_len,operator")
        if hybrid and pivot:
            raise ValueError("--hybrid and --pivot are two tables: give one of them")
        ratio = _hybrid_ratio(hybrid, name) if hybrid else None
        if output is None and name in ("html", "parquet"):
            raise ValueError(f"--format {name} needs a file: -o report.{name}")
        if output is None and name in trackers.WRITERS:
            raise ValueError(f"--format {name} needs a folder: -o FOLDER")
        if output is not None and name not in trackers.WRITERS:
            check_output(output)
        results = collection.collect(folders, where or [])
        if name in ("csv", "json", "parquet") or pivot or ratio:  # the others show them
            _print_warnings(results)
        if pivot or ratio:
            if ratio is None:
                text = _pivot(results, name, pivot, metric, baseline)
            else:
                facts = render.ReportContents.from_collection(results).varying_facts
                text = hybrids.render(results, ratio, facts, name)
            print(text, end="") if output is None else write_text(output, text)
            return
        if name == "html":
            from cpbench.reports.page.write import write_page

            assert output is not None
            write_page(results, output)
        elif name in trackers.WRITERS:
            assert output is not None
            trackers.WRITERS[name](results, run_directory(output))
        elif name == "parquet":
            assert output is not None
            export.write_parquet(results, output)
        else:
            if name == "github":
                text = github.render_summary(results)
            else:
                text = render.render(results, name)
            print(text, end="") if output is None else write_text(output, text)


@commands.command()
def plot(
    folders: Folders = None,
    kind: Annotated[
        PlotKind,
        typer.Option(
            metavar="KIND", help=f"Kind of chart: {', '.join(kind.value for kind in PlotKind)}."
        ),
    ] = PlotKind.throughput,
    output: Annotated[
        Path | None, file_option("-o", "--output", help="Write to this .svg, .png or .pdf file.")
    ] = None,
    where: Where = None,
    x: Annotated[
        str | None, typer.Option("--x", metavar="METRIC", help="pareto: across.  [default: ms]")
    ] = None,
    y: Annotated[
        str | None, typer.Option("--y", metavar="METRIC", help="pareto: up.  [default: peak]")
    ] = None,
) -> None:
    """Draw a figure for a paper.

    Metrics are those of report --metric.
    """
    from cpbench.reports import collection
    from cpbench.reports.figures import draw

    with user_input():
        if not folders or output is None:
            raise ValueError("plot needs a run directory and a file: -o figure.svg")
        check_output(output)
        results = collection.collect(folders)
        _print_warnings(results)
        if (x or y) and kind is not PlotKind.pareto:
            raise ValueError("--x and --y are for --kind pareto")
        axes = x or draw.DEFAULT_AXES[0], y or draw.DEFAULT_AXES[1]
        draw.draw(results, kind.value, output, where or [], axes)


def _require_table(option: str, form: str) -> None:
    """Raise a ValueError for a form in which a table of an option is not written."""
    if form not in ("short", "table", "md", "latex", "csv", "json"):
        raise ValueError(f"{option} is not written as {form}; use table, md, latex, csv or json")


def _hybrid_ratio(text: str, form: str) -> Ratio:
    from cpbench.reports.mixers.hybrid import Ratio

    _require_table("--hybrid", form)
    return Ratio.parse(text)


def _pivot(results: Collection, form: str, pivot: str, metric: str, baseline: str) -> str:
    from cpbench.reports.tables import pivot as pivots

    _require_table("--pivot", form)
    made = pivots.make_pivot(results, pivot, metric, baseline)
    return pivots.render(made, results.title, form)


def _print_warnings(results: Collection) -> None:
    for warning in results.warnings:
        print(f"cpbench: {warning}", file=sys.stderr)
