"""Options and helpers that the commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cpbench.cli.completion import complete


class ListKind(str, Enum):
    """What ``cpbench list`` lists."""

    operators = "operators"
    strategies = "strategies"
    layouts = "layouts"
    masks = "masks"
    inputs = "inputs"
    sweeps = "sweeps"
    support = "support"


class DeviceName(str, Enum):
    """Devices that compute attention."""

    cpu = "cpu"
    cuda = "cuda"


class LauncherName(str, Enum):
    """Launchers that run under the command itself."""

    local = "local"
    torchrun = "torchrun"
    mpi = "mpi"


class AnyLauncherName(str, Enum):
    """All launchers, ``slurm`` included."""

    local = "local"
    torchrun = "torchrun"
    mpi = "mpi"
    slurm = "slurm"


class LinksLauncherName(str, Enum):
    """Launchers of ``cpbench links``; ``srun`` inside an allocation of Slurm."""

    local = "local"
    torchrun = "torchrun"
    mpi = "mpi"
    srun = "srun"


class ProfilerName(str, Enum):
    """NVIDIA's profilers: Nsight Systems and Nsight Compute."""

    nsys = "nsys"
    ncu = "ncu"


class Transport(str, Enum):
    """Libraries that move tensors between ranks: torch.distributed or MPI."""

    torch = "torch"
    mpi = "mpi"


class Format(str, Enum):
    """Output formats of ``cpbench report``."""

    short = "short"
    table = "table"
    html = "html"
    md = "md"
    latex = "latex"
    github = "github"
    csv = "csv"
    parquet = "parquet"
    json = "json"
    tensorboard = "tensorboard"
    wandb = "wandb"


class CompareFormat(str, Enum):
    """Output formats of ``cpbench compare``."""

    table = "table"
    html = "html"
    md = "md"
    latex = "latex"
    csv = "csv"
    json = "json"


class Metric(str, Enum):
    """What ``cpbench history`` follows."""

    ms = "ms"
    peak = "peak"


class Undecided(str, Enum):
    """What ``cpbench gate --undecided`` makes of undecided cases."""

    passes = "pass"
    fails = "fail"


class PlotKind(str, Enum):
    """Figures of ``cpbench plot``."""

    throughput = "throughput"
    memory = "memory"
    scaling = "scaling"
    heatmap = "heatmap"
    pareto = "pareto"
    quality = "quality"
    needles = "needles"
    needle_counts = "needle_counts"
    roofline = "roofline"
    predicted = "predicted"
    timeline = "timeline"


list_option = partial(typer.Option, metavar="LIST")
operator_list = partial(list_option, autocompletion=complete("operators"))
strategy_list = partial(list_option, autocompletion=complete("strategies"))
layout_list = partial(list_option, autocompletion=complete("layouts"))
mask_list = partial(list_option, autocompletion=complete("masks"))
inputs_list = partial(list_option, autocompletion=complete("inputs"))
rope_list = partial(list_option, autocompletion=complete("ropes"))
dtype_list = partial(list_option, autocompletion=complete("dtypes"))
direction_list = partial(list_option, autocompletion=complete("directions"))
mask_option = partial(typer.Option, metavar="MASK", autocompletion=complete("masks"))
dtype_option = partial(typer.Option, metavar="DTYPE", autocompletion=complete("dtypes"))
folder_option = partial(typer.Option, metavar="FOLDER")
file_option = partial(typer.Option, metavar="FILE")

AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]
OnDevice = Annotated[
    DeviceName | None,
    typer.Option(help="Device to use.  [default: cuda if there is a GPU, else cpu]"),
]
Launcher = Annotated[LauncherName, typer.Option(help="How to launch the ranks.")]
AnyLauncher = Annotated[AnyLauncherName, typer.Option(help="How to launch the ranks.")]
Nodes = Annotated[int, typer.Option(metavar="N", min=1, help="torchrun, mpi: number of nodes.")]
Hosts = Annotated[str, list_option(help="mpi: host names, one per node.")]
Interface = Annotated[
    str, typer.Option(metavar="NAME", help="Network interface that the ranks use.")
]
OutFolder = Annotated[
    Path | None, folder_option(help="Run directory.  [default: a temporary folder]")
]

Launches = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Launches of each case, in new processes; use 5 or more to compare runs.  "
        "[default: set by the sweep]",
    ),
]

BenchLaunches = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Launches of each case; use 5 or more to compare runs."),
]

Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="Time limit of a case, in total; beyond it, its status is timeout."
    ),
]


Folders = Annotated[list[Path] | None, typer.Argument(metavar="FOLDER...", help="Run directories.")]
Output = Annotated[
    Path | None,
    file_option("-o", "--output", help="Write to this file; its suffix selects the format."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="Only cases that match, e.g. mask=causal,full; repeatable."
    ),
]
SUFFIXES = {
    ".html": "html", ".htm": "html", ".md": "md", ".tex": "latex", ".csv": "csv",
    ".parquet": "parquet", ".json": "json",
}  # fmt: skip


INTERRUPTED = 130  # exit code on Ctrl-C


class UserError(Exception):
    """Invalid input; the message is one line for the user."""


@contextmanager
def user_input() -> Iterator[None]:
    """Report ``ValueError`` and ``OSError`` of the block as :class:`UserError` (exit code 2)."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None)
        filename = getattr(error, "filename", None)
        message = f"{filename}: {reason}" if reason and filename else str(error)
        raise UserError(message) from error


def device_name(name: DeviceName | None) -> str:
    """The requested device; by default cuda if there is a GPU, else cpu.  Needs no torch."""
    if name is not None:
        return name.value
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def run_directory(out: Path) -> Path:
    """The path of a run directory, checked: it exists or can be created.

    Raises:
        ValueError: if the path, or a parent of it, is a file or not writable.
    """
    for path in (out, *out.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"--out {out}: {path} is a link to {path.readlink()}, which is missing"
            )
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out {out}: {existing} is a file; give a folder, new or existing")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: {existing} is not writable; give another folder")
    return out


def percent(name: str, text: str) -> float:
    """Parse a relative amount: ``"5%"`` or ``"0.05"`` is 0.05.

    Args:
        name: of the option, for the error message.

    Raises:
        ValueError: for anything else, or a negative share.
    """
    number, sign, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if sign else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share < 10 or (share >= 1 and not sign):
        raise ValueError(f"{name} {text!r} is not a share such as 5% or 0.05")
    return share


def check_output(path: Path) -> None:
    """Check that an output file can be created at ``path``.

    Raises:
        ValueError: if it is a folder, or its folder does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ValueError(f"-o {path}: {reason}; give a file in an existing folder")


def write_text(path: Path, text: str) -> None:
    """Write text to an output file, whole or not at all.

    Raises:
        ValueError: see :func:`check_output`.
        OSError: if it cannot be written.
    """
    from cpbench.results.store import write_atomically

    check_output(path)
    write_atomically(path, text)


def print_error(text: str, code: int) -> int:
    """Print an error on stderr, in one line, and return the exit code ``code``."""
    line = _ESCAPED_BYTES.sub(_unescape, " ".join(text.split()))
    print(f"cpbench: {line}", file=sys.stderr)
    return code


# How repr shows bytes of an argument that the locale cannot decode.
_ESCAPED_BYTES = re.compile(r"(?:\\udc[89a-f][0-9a-f])+")


def _unescape(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("\\udc", "")).decode(errors="replace")
