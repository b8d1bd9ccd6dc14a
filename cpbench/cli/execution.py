"""How commands run a request, print its report, and predict it instead."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cpbench.cli.options import INTERRUPTED, UserError, print_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cpbench.core.problem import Case
    from cpbench.sweep.request import Request


def execute(request: Request, as_json: bool) -> int:
    """Run a request, print its report and return the exit code."""
    code = run_request(request, quiet=as_json)
    print_report(request, as_json)
    return code


def print_warnings(cases: Sequence[Case], as_json: bool) -> None:
    """Print on stderr, unless only JSON is wanted, what speaks against the values of cases."""
    from cpbench.inputs.rope import warnings_of

    for text in () if as_json else warnings_of(cases):
        print(f"cpbench: warning: {text}", file=sys.stderr)


def predict_cases(cases: Sequence[Case], cluster: str, out: Path, as_json: bool) -> int:
    """Keep predictions of cases in a run directory, and print its report."""
    from cpbench.reports import collection
    from cpbench.reports.tables import render
    from cpbench.results.store import read_run
    from cpbench.tools.sweep_prediction import predict_sweep

    try:
        predict_sweep(cases, cluster, out)
    except KeyboardInterrupt:
        kept = len(read_run(out).predictions.keys() & {case.id for case in cases})
        text = (
            f"interrupted: {kept} of {len(cases)} predictions are kept in {out}; repeat the "
            "command for the others"
        )
        raise typer.Exit(print_error(text, INTERRUPTED)) from None
    results = collection.collect([out])
    print(render.render(results, "json" if as_json else "short"), end="")
    return 0


def print_report(request: Request, as_json: bool) -> int:
    """Print the report of all results so far and return the exit code."""
    from cpbench.reports import collection
    from cpbench.reports.tables import render
    from cpbench.sweep import runs

    run = runs.results(request)
    results = collection.merge_runs({str(request.out): run})
    if as_json:
        print(render.render(results, "json"), end="")
    elif run.records:
        print()
        print(render.render(results, "table"), end="")
        lines = runs.describe_timelines(request)
        print("".join(f"{line}\n" for line in ([""] if lines else []) + lines), end="")
    return runs.exit_code(request)


def run_request(request: Request, quiet: bool) -> int:
    """Run a request and return the exit code; errors and Ctrl-C become one-line messages."""
    from cpbench.launchers.supervisor import LaunchError
    from cpbench.results.store import StoreError
    from cpbench.sweep import runs
    from cpbench.sweep.remaining import remaining_cases

    try:
        return runs.execute(request, quiet)
    except (StoreError, LaunchError) as error:
        raise typer.Exit(print_error(str(error), 1)) from None
    except ValueError as error:  # another process is running the same cases
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        recorded = len(request.cases) - len(remaining_cases(request))
        temporary = request.out.parent == Path(tempfile.gettempdir())  # the default may be new
        with_out = f" with --out {shlex.quote(str(request.out))}" if temporary else ""
        text = (
            f"interrupted: {recorded} of {len(request.cases)} cases are recorded in {request.out}; "
            f"repeat the command{with_out} to resume"
        )
        raise typer.Exit(print_error(text, INTERRUPTED)) from None
