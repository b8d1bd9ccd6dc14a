"""Commands that compare versions: compare, gate, race, history."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpbench.cli.options import (
    INTERRUPTED,
    SUFFIXES,
    CompareFormat,
    Metric,
    Output,
    Undecided,
    Where,
    check_output,
    file_option,
    folder_option,
    percent,
    print_error,
    run_directory,
    user_input,
    write_text,
)

if TYPE_CHECKING:
    from cpbench.reports.compare.gate import GateResult
    from cpbench.results.store import Run

commands = typer.Typer()

Base = Annotated[Path, typer.Argument(metavar="BASE", help="Run directory of the baseline.")]
Floor = Annotated[
    str, typer.Option(metavar="SHARE", help="Ignore relative differences up to this.")
]
MaxSlowdown = Annotated[str, typer.Option(metavar="SHARE", help="Allowed slowdown of a case.")]
MaxMemory = Annotated[str, typer.Option(metavar="SHARE", help="Allowed growth of its peak memory.")]
OfUndecided = Annotated[
    Undecided | None,
    typer.Option("--undecided", help="Let undecided cases pass or fail.  [default: exit code 3]"),
]
Junit = Annotated[Path | None, file_option(help="Write JUnit XML to this file.")]


@commands.command()
def compare(
    base: Base,
    new: Annotated[
        list[Path],
        typer.Argument(metavar="NEW...", help="Run directories to compare with the baseline."),
    ],
    floor: Floor = "2%",
    form: Annotated[
        CompareFormat | None,
        typer.Option("--format", help="As for report.  [default: by the suffix of -o, else table]"),
    ] = None,
    output: Output = None,
    where: Where = None,
) -> None:
    """Compare two runs.

    Each case gets a verdict: SAME, FASTER, SLOWER or UNCLEAR.

    The unit of evidence is a launch (cpbench run --launches 5), not an iteration: cases with fewer
    than five launches per side are UNCLEAR. Interleave the launches of the two runs.
    """
    from cpbench.reports.compare import comparison, render

    with user_input():
        name = _text_format(form, output, "compare")
        comparisons = comparison.compare_runs(
            _open_run(base, where),
            [_open_run(folder, where) for folder in new],
            percent("--floor", floor),
        )
        text = render.render(comparisons, name)
        if output is None:
            print(text, end="")
        else:
            write_text(output, text)


@commands.command()
def gate(
    base: Base,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run directory to check.")],
    max_slowdown: MaxSlowdown = "5%",
    max_memory: MaxMemory = "2%",
    undecided: OfUndecided = None,
    junit: Junit = None,
    where: Where = None,
) -> int:
    """Pass or fail a run against a baseline, for CI.

    Exit code 0: passed; 1: failed; 3: undecided; 2: the runs cannot be compared.

    A case fails when it is significantly slower than --max-slowdown allows, needs more memory than
    --max-memory allows, was ok and is not, is missing, or is unchecked. It passes when the interval
    of its slowdown lies below --max-slowdown, and is undecided otherwise.
    """
    from cpbench.reports.compare import gate as gates
    from cpbench.reports.compare import next_launches

    with user_input():
        limits = percent("--max-slowdown", max_slowdown), percent("--max-memory", max_memory)
        if junit is not None:
            check_output(junit)
        (_, base_run), (_, new_run) = _open_run(base, where), _open_run(new, where)
        result = gates.evaluate_gate(base_run, new_run, *limits)
        code = _conclude(result, base_run, new_run, undecided, junit)
    if result.launches is not None:
        undecided_rows = result.table[
            [result.decisions[key].launches is not None for key in result.table["id"]]
        ]
        fewest = int(undecided_rows[["base_launches", "new_launches"]].min().min())
        against = next_launches.commit_of_base(base_run, new_run)
        lines = next_launches.commands(base, new, result.launches, fewest, against)
        print("\n".join(lines))
    return code


@commands.command()
def race(
    versions: Annotated[
        list[str],
        typer.Argument(
            metavar="[OLD NEW] SWEEP",
            help="Two virtual environments with cpbench, unless --against is given; and a sweep.",
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="REVISION", help="Race the working tree against this commit of its repository."
        ),
    ] = "",
    max_slowdown: MaxSlowdown = "5%",
    max_memory: MaxMemory = "2%",
    max_launches: Annotated[
        int, typer.Option(metavar="N", min=5, max=200, help="Launches of each case per version.")
    ] = 20,
    undecided: OfUndecided = None,
    out: Annotated[
        Path | None,
        folder_option(help="Run directories base and new go here.  [default: race/TIME]"),
    ] = None,
    where: Where = None,
    junit: Junit = None,
) -> int:
    """Measure two versions in turn until the gate is decided.

    Launches of both alternate, and cases are run until the new version passes or fails them, so no
    longer than that takes. Exit codes as of gate. The same command with --out and more
    --max-launches goes on.
    """
    from cpbench.reports.compare import gate as gates
    from cpbench.tools.race import side
    from cpbench.tools.race.race import Race

    *environments, sweep = versions
    with user_input():
        limits = percent("--max-slowdown", max_slowdown), percent("--max-memory", max_memory)
        if len(environments) != (0 if against else 2):
            raise ValueError("give OLD_ENV NEW_ENV SWEEP, or --against REVISION SWEEP")
        if junit is not None:
            check_output(junit)
        folder = run_directory(out or Path("race", time.strftime("%Y%m%dT%H%M%S")))
        if against:
            sides = side.of_revision(against, sweep, folder)
        else:
            sides = side.of_environments(
                Path(environments[0]), Path(environments[1]), sweep, folder
            )
        options = tuple(word for text in where or () for word in ("--where", text))
        try:
            result = Race(sides, *limits, max_launches, options).run()
        except KeyboardInterrupt:
            text = f"interrupted; repeat the command with --out {folder} to go on"
            return print_error(text, INTERRUPTED)
        base_run, new_run = (_open_run(one.out, None)[1] for one in sides)
        code = _conclude(result, base_run, new_run, undecided, junit)
    if result.outcome == gates.UNDECIDED and result.launches:
        more = max(result.launches, max_launches + 1)
        print(f"To decide, repeat the command with --out {folder} --max-launches {more}.")
    return code


@commands.command()
def history(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Run directories of many commits.")
    ],
    metric: Annotated[Metric, typer.Option(help="Time, or peak memory.")] = Metric.ms,
    floor: Floor = "2%",
    where: Where = None,
    form: Annotated[
        CompareFormat | None,
        typer.Option("--format", help="As for report.  [default: by the suffix of -o, else table]"),
    ] = None,
    output: Output = None,
) -> None:
    """Find the commits at which cases became slower or faster.

    Each case is a series over commits; a step is a lasting change of its level that is significant
    over launches. -o history.html draws every series.
    """
    from cpbench.reports.history import history as histories
    from cpbench.reports.history import render

    with user_input():
        name = _text_format(form, output, "history")
        found = histories.read_history(
            folders, metric.value, percent("--floor", floor), where or []
        )
        text = render.render(found, name)
        if output is None:
            print(text, end="")
        else:
            write_text(output, text)


def _conclude(
    result: GateResult, base: Run, new: Run, undecided: Undecided | None, junit: Path | None
) -> int:
    """Print the result of a gate and its caveats, write the JUnit file; the exit code."""
    from cpbench.reports.compare import gate as gates
    from cpbench.reports.compare.junit import junit_xml
    from cpbench.reports.compare.verdicts import comparison_caveats

    caveats = comparison_caveats(result.table, base, new, result.max_slowdown, False)
    resolved = result.resolved(undecided.value if undecided else None)
    if junit is not None:
        write_text(junit, junit_xml(resolved, caveats))
    for line in caveats:
        print(f"cpbench: {line}", file=sys.stderr)
    print("\n".join(gates.result_lines(result)))
    code = gates.EXIT_CODES[resolved.outcome]
    if resolved.outcome != result.outcome:
        print(f"--undecided {resolved.outcome}: exit code {code}")
    return code


def _text_format(form: CompareFormat | None, output: Path | None, command: str) -> str:
    """The format of a command that writes those of ``CompareFormat``; the file is checked."""
    name = form.value if form else SUFFIXES.get(output.suffix, "table") if output else "table"
    if output is None and name == "html":
        raise ValueError(f"--format html needs a file: -o {command}.html")
    if name not in CompareFormat.__members__:
        raise ValueError(f"-o {output}: {command} writes {', '.join(CompareFormat.__members__)}")
    if output is not None:
        check_output(output)
    return name


def _open_run(folder: Path, where: list[str] | None) -> tuple[str, Run]:
    """Name and records of a run directory, of the cases that match.

    Raises:
        ValueError: when it is not a run directory, is empty, or no case matches.
    """
    from cpbench.reports import collection

    (item,) = collection.collect([folder], where or []).runs.items()
    return item
