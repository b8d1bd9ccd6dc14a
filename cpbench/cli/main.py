"""The command line.  Nothing here imports torch; heavy modules are imported by the command that
needs them, so that ``cpbench --help`` answers at once.

Exit codes: 0 the sweep is complete, every case ok, unsupported or oom; 1 some case wrong, crash or
timeout (or oom with ``--strict``); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from cpbench import __version__
from cpbench.cli import jobs, reports, run, tools
from cpbench.cli.options import (
    INTERRUPTED,
    AsJson,
    Kind,
    OnDevice,
    UserError,
    complain,
    device_name,
    user_input,
)
from cpbench.reports.tables.terminal import print_rows

app = typer.Typer(
    name="cpbench",
    help="Attention kernels and context-parallel strategies, measured and verified.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point: runs the app and turns what it raises into lines and exit codes."""
    try:
        code = invoke()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter tries once more
        code = 0  # a reader that has seen enough
        if error.errno == errno.ENOSPC:
            code = complain(f"cannot write the output: {error.strerror}", 1)
    sys.exit(code)


def invoke(argv: list[str] | None = None) -> int:
    """The exit code of a command line; without words, its help."""
    words = sys.argv[1:] if argv is None else argv
    try:
        code = app(args=words or ["--help"], prog_name="cpbench", standalone_mode=False)
    except UserError as error:
        return complain(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit:  # how typer ends when nobody reads what is printed any more
        return 0
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the parser's own errors have
            raise
        return complain(_usage(error), 2)
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> str:
    """What is wrong with a command line, and where to read what is right."""
    text = error.format_message().replace("Value error, ", "").strip().rstrip(".")
    context = getattr(error, "ctx", None)
    commands = getattr(getattr(context, "command", None), "commands", None)
    if commands:
        return f"{text}; commands: {', '.join(commands)}"
    return f"{text}; see {context.command_path} --help" if context else text


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cpbench {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Start with: cpbench doctor, cpbench run quick. "
    "Each command explains its options: cpbench run --help."
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """Show what there is: operators, strategies, masks, inputs."""
    from cpbench.tools import listing as catalogue
    from cpbench.tools import support_matrix as support

    with user_input():
        here = device_name(device)
        rows = support.rows(here) if kind is Kind.support else catalogue.rows(kind.value, here)
    print_rows(rows, as_json)


for module in (run, reports, tools, jobs):
    app.registered_commands += module.commands.registered_commands
