"""The command that fits a cluster file: calibrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli.options import AsJson, Folders, check_output, file_option, user_input
from cpbench.reports.tables.terminal import print_rows, wrap

commands = typer.Typer()


@commands.command()
def calibrate(
    folders: Folders = None,
    links: Annotated[
        Path | None,
        file_option(help="File of cpbench links --json; without, the cluster has one rank."),
    ] = None,
    output: Annotated[
        Path | None, file_option("-o", "--output", help="Cluster file to write, .toml.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a cluster file, for predict, to this machine.

    Kernels are fitted to what single ranks of run directories took (cpbench run calibration), links
    to cpbench links, side work has the measured peaks. Cases of several ranks are predicted, never
    fitted to.
    """
    from cpbench.tools.calibration import tables
    from cpbench.tools.calibration.calibrate import calibrate as fit

    with user_input():
        if not folders or output is None:
            raise ValueError("calibrate needs run directories and a file: -o cluster.toml")
        if output.suffix != ".toml":
            raise ValueError(f"-o {output}: the name must end in .toml")
        check_output(output)
        fitted = fit(folders, links, output)
    if as_json:
        print(json.dumps(fitted.to_json()))
        return
    print_rows(tables.constant_rows(fitted))
    print()
    if rows := tables.method_rows(fitted):
        print_rows(rows)
        print()
    for line in tables.error_lines(fitted):
        print("\n".join(wrap(line)))
    print(f"\ncluster file: {output}")
