"""What the commands of the command line share: options, and what is done with their values."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


class Kind(str, Enum):
    operators = "operators"
    strategies = "strategies"
    layouts = "layouts"
    masks = "masks"
    inputs = "inputs"
    sweeps = "sweeps"
    support = "support"


class DeviceName(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class LauncherName(str, Enum):
    local = "local"
    torchrun = "torchrun"
    mpi = "mpi"


class AnyLauncherName(str, Enum):
    local = "local"
    torchrun = "torchrun"
    mpi = "mpi"
    slurm = "slurm"


class ProfilerName(str, Enum):
    nsys = "nsys"
    ncu = "ncu"


class Transport(str, Enum):
    torch = "torch"
    mpi = "mpi"


class Format(str, Enum):
    short = "short"
    table = "table"
    html = "html"
    md = "md"
    latex = "latex"
    csv = "csv"
    parquet = "parquet"
    json = "json"


class CompareFormat(str, Enum):
    table = "table"
    html = "html"
    md = "md"
    latex = "latex"
    csv = "csv"
    json = "json"


class PlotKind(str, Enum):
    throughput = "throughput"
    memory = "memory"
    scaling = "scaling"
    heatmap = "heatmap"
    pareto = "pareto"
    quality = "quality"
    roofline = "roofline"
    timeline = "timeline"


several = partial(typer.Option, metavar="LIST")
folder = partial(typer.Option, metavar="FOLDER")
file = partial(typer.Option, metavar="FILE")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
OnDevice = Annotated[
    DeviceName | None, typer.Option(help="Where to compute.  [default: cuda where there is a GPU]")
]
Launcher = Annotated[LauncherName, typer.Option(help="What starts the ranks.")]
AnyLauncher = Annotated[AnyLauncherName, typer.Option(help="What starts the ranks.")]
Kept = Annotated[Path | None, folder(help="Keep the records here.  [default: a temporary folder]")]

Launches = Annotated[
    int | None,
    typer.Option(
        metavar="TIMES",
        min=1,
        help="Processes that measure each case; 5 to compare.  [default: as the sweep says]",
    ),
]

Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="End a case that takes longer in all: one row with status timeout."
    ),
]


INTERRUPTED = 130  # exit code


class UserError(Exception):
    """Bad input; the message is the one line that the user sees."""


@contextmanager
def user_input() -> Iterator[None]:
    """Errors in here are the user's: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = getattr(error, "strerror", None)
        name = getattr(error, "filename", None)
        raise UserError(f"{name}: {text}" if text and name else str(error)) from error


def device_name(name: DeviceName | None) -> str:
    """The device asked for, or the one there is, found out without torch."""
    if name is not None:
        return name.value
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def run_directory(out: Path) -> Path:
    """A run directory that is there or can be made.

    Raises:
        ValueError: when a file is in its way.
    """
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out}: {nearest} is a file; give a folder, there or not")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {out}: {nearest} is not writable; give another folder")
    return out


def percent(name: str, text: str) -> float:
    """``"5%"`` or ``"0.05"`` as 0.05.

    Raises:
        ValueError: for anything else, or a negative share.
    """
    number, sign, rest = text.strip().partition("%")
    try:
        found = float(number) / (100 if sign else 1)
    except ValueError:
        found = -1.0
    if rest or not 0 <= found < 10:
        raise ValueError(f"{name} {text!r} is not a share such as 5% or 0.05")
    return found


def check_output(path: Path) -> None:
    """See that a file can be at ``path``.

    Raises:
        ValueError: when it cannot.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"-o {path}: {what}; give a file in a folder that is there")


def write_text(path: Path, text: str) -> None:
    """Write what the user wants in a file.

    Raises:
        ValueError: when it cannot be there.
        OSError: when it cannot be written.
    """
    from cpbench.results.store import write_whole

    check_output(path)
    write_whole(path, text)


def complain(text: str, code: int) -> int:
    """Say on stderr, in one line, what went wrong; hands back the exit code."""
    print(f"cpbench: {' '.join(text.split())}", file=sys.stderr)
    return code
