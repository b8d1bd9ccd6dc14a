"""The entry point of the command line.

It imports no torch, and each command imports heavy modules itself, so that ``cpbench --help`` is
fast.

Exit codes: 0 if every case of the sweep is ok, unsupported or oom; 1 if one is wrong, crash or
timeout (or oom, with ``--strict``); 2 for invalid input; 130 if interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from cpbench import __version__
from cpbench.cli import calibration, compare, jobs, plan, recommend, reports, run, tools
from cpbench.cli.options import (
    INTERRUPTED,
    AsJson,
    ListKind,
    OnDevice,
    UserError,
    device_name,
    print_error,
    user_input,
)
from cpbench.core.subprocess_call import collect_rarely
from cpbench.reports.tables.terminal import print_rows

app = typer.Typer(
    name="cpbench",
    help="Benchmark and verify attention kernels and context-parallel strategies.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Run the command line and exit; exceptions become one-line messages and exit codes."""
    if sys.stdout is None:
        sys.exit(print_error("standard output is closed: redirect it to a file or /dev/null", 2))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale says
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    warnings.showwarning = _show_warning
    collect_rarely()
    try:
        code = invoke()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter flushes again at exit
        code = 0  # the reader of a pipe has closed it, as head does
        if error.errno == errno.ENOSPC:
            code = print_error(f"cannot write the output: {error.strerror}", 1)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Warnings in one line, like errors."""
    print(f"cpbench: {' '.join(str(message).split())}", file=sys.stderr)


def invoke(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code; without arguments, print the help."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(args=arguments or ["--help"], prog_name="cpbench", standalone_mode=False)
    except UserError as error:
        return print_error(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return print_error("interrupted", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit:  # raised by typer on a broken pipe
        return 0
    except Exception as error:
        if not hasattr(error, "format_message"):  # only errors of the parser have it
            raise
        return print_error(_usage_error(error), 2)
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> str:
    """One line for an error of the command-line parser, with the help to read."""
    text = error.format_message().replace("Value error, ", "").strip().rstrip(".")
    context = getattr(error, "ctx", None)
    commands = getattr(getattr(context, "command", None), "commands", None)
    if commands:
        return f"{text}; commands: {', '.join(commands)}"
    return f"{text}; see {context.command_path} --help" if context else text


def _print_version(requested: bool) -> None:
    if requested:
        print(f"cpbench {__version__}, torch {metadata.version('torch')}")
        raise typer.Exit


@app.callback(
    epilog="Start with: cpbench doctor, then cpbench run quick. "
    "For the options of a command: cpbench COMMAND --help."
)
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the versions."
        ),
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    kind: Annotated[ListKind, typer.Argument(metavar="KIND", help="What to list.")],
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """List operators, strategies, layouts, masks, inputs or sweeps.

    KIND support shows the masks that each operator supports.
    """
    from cpbench.tools import listing, support_matrix

    with user_input():
        name = device_name(device)
        if kind is ListKind.support:
            rows = support_matrix.rows(name)
        else:
            rows = listing.rows(kind.value, name)
    print_rows(rows if as_json else listing.table(rows), as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An existing folder.")] = Path(),
) -> int:
    """Write a commented sweep and Slurm profile to start from.

    They are sweep.toml and site.toml.
    """
    from cpbench.sweep.templates import write_templates

    with user_input():
        for path in write_templates(folder):
            print(f"wrote {path}")
    print(f"next: cpbench run {shlex.quote(str(folder / 'sweep.toml'))} --dry-run")
    return 0


for module in (run, reports, compare, plan, recommend, calibration, tools, jobs):
    app.registered_commands += module.commands.registered_commands
