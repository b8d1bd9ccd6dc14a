"""The commands that read results: report, compare, gate, plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpbench.cli.options import (
    CompareFormat,
    Format,
    PlotKind,
    UserError,
    check_output,
    file,
    percent,
    user_input,
    write_text,
)

if TYPE_CHECKING:
    from cpbench.results.store import Run

commands = typer.Typer()

Folders = Annotated[list[Path] | None, typer.Argument(metavar="FOLDER...", help="Run directories.")]
Output = Annotated[
    Path | None, file("-o", "--output", help="Write here instead of printing; says the format.")
]
Base = Annotated[Path, typer.Argument(metavar="BASE", help="Run directory to compare with.")]
SUFFIXES = {
    ".html": "html", ".htm": "html", ".md": "md", ".tex": "latex", ".csv": "csv",
    ".parquet": "parquet", ".json": "json",
}  # fmt: skip


@commands.command()
def report(
    folders: Folders = None,
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="short, table, html, md and latex for people; csv, parquet and json for "
            "programs.  [default: as -o ends, else short]",
        ),
    ] = None,
    output: Output = None,
    columns: Annotated[
        bool, typer.Option("--columns", help="Explain the columns of csv, parquet and json.")
    ] = False,
) -> None:
    """Show who won where, what failed and why.

    As a page (-o report.html): with charts of everything.

    Several run directories, from several machines, are shown as one.
    """
    from cpbench.reports import collection, export
    from cpbench.reports.tables import render

    if columns:
        print(render.columns(), end="")
        return
    if not folders:
        raise UserError("report needs a run directory, or --columns")
    name = form.value if form else SUFFIXES.get(output.suffix, "short") if output else "short"
    with user_input():
        if output is None and name in ("html", "parquet"):
            raise ValueError(f"--format {name} needs a file: -o report.{name}")
        if output is not None:
            check_output(output)
        found = collection.collect(folders)
        if name == "html":
            from cpbench.reports.page import write

            assert output is not None
            write.write(found, output)
        elif name == "parquet":
            assert output is not None
            export.parquet(found, output)
        elif output is None:
            print(render.render(found, name), end="")
        else:
            write_text(output, render.render(found, name))


@commands.command()
def compare(
    base: Base,
    new: Annotated[
        list[Path], typer.Argument(metavar="NEW...", help="What to compare with it, each.")
    ],
    floor: Annotated[
        str, typer.Option(metavar="SHARE", help="Relative difference that does not matter.")
    ] = "2%",
    form: Annotated[
        CompareFormat | None,
        typer.Option("--format", help="As of report.  [default: as -o ends, else table]"),
    ] = None,
    output: Output = None,
) -> None:
    """Tell what is faster or slower in one run than in another.

    A verdict for each case: SAME, FASTER, SLOWER or UNCLEAR.

    Evidence is launches (cpbench run --launches 5), not iterations: fewer than five of a side are
    UNCLEAR. Runs in turn (launch by launch) compare best.
    """
    from cpbench.reports.compare import comparison, render

    name = form.value if form else SUFFIXES.get(output.suffix, "table") if output else "table"
    with user_input():
        if output is None and name == "html":
            raise ValueError("--format html needs a file: -o compare.html")
        if name not in CompareFormat.__members__:
            raise ValueError(f"-o {output}: compare writes {', '.join(CompareFormat.__members__)}")
        if output is not None:
            check_output(output)
        found = comparison.compare_runs(_opened(base), [_opened(one) for one in new], percent(
            "--floor", floor
        ))  # fmt: skip
        text = render.render(found, name)
        if output is None:
            print(text, end="")
        else:
            write_text(output, text)


@commands.command()
def gate(
    base: Base,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run directory to judge.")],
    max_slowdown: Annotated[
        str, typer.Option(metavar="SHARE", help="A case may be slower by so much.")
    ] = "5%",
    max_memory: Annotated[
        str, typer.Option(metavar="SHARE", help="Its peak memory may grow by so much.")
    ] = "2%",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where it cannot be told, too.")
    ] = False,
    junit: Annotated[Path | None, file(help="Write JUnit XML here.")] = None,
) -> int:
    """Pass or fail a run against a base, for CI.

    Exit code 0 or 1, and 2 when they cannot be compared.

    A case fails when it is slower, with confidence, than --max-slowdown allows, needs more memory,
    was ok and is not, or is missing.
    """
    from cpbench.reports.compare import gate as gates
    from cpbench.reports.compare.verdicts import cautions

    with user_input():
        limits = percent("--max-slowdown", max_slowdown), percent("--max-memory", max_memory)
        if junit is not None:
            check_output(junit)
        (_, there), (_, here) = _opened(base), _opened(new)
        found = gates.judge(there, here, *limits, strict)
        notes = cautions(found.table, there, here)
        if junit is not None:
            write_text(junit, gates.junit(found, notes))
    for line in notes:
        print(f"cpbench: {line}", file=sys.stderr)
    print("\n".join(gates.words(found)))
    return 0 if found.passed else 1


@commands.command()
def plot(
    folders: Folders = None,
    kind: Annotated[PlotKind, typer.Option(help="What to draw.")] = PlotKind.throughput,
    output: Annotated[
        Path | None, file("-o", "--output", help="Write here: .svg, .png or .pdf.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only such cases, e.g. mask=causal; repeat."),
    ] = None,
) -> None:
    """Draw a figure for a paper."""
    from cpbench.reports import collection
    from cpbench.reports.figures import draw

    with user_input():
        if not folders or output is None:
            raise ValueError("plot needs a run directory and a file: -o figure.svg")
        check_output(output)
        found = collection.collect(folders)
        draw.draw(found, kind.value, output, where or [])


def _opened(folder: Path) -> tuple[str, Run]:
    """A run and its name.

    Raises:
        ValueError: when there is none, or it is empty.
    """
    from cpbench.reports import collection

    (item,) = collection.collect([folder]).runs.items()
    return item
