"""Calls to modules that need torch, each in a subprocess: the parent loads no torch.

The module reads a request as JSON from standard input and writes its reply to standard output.  To
refuse a request, it exits with code 2 and the reason as the last line on standard error.

Processes of cpbench's own also look for garbage less often: torch and pandas load half a million
objects that live as long as the process, and looking through them takes a fifth of the time of a
process that does little else.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TextIO

# Options of Python before the name of a module.  The working directory is not searched: a folder
# there that is named like a package would hide it.
MODULE = ("-P", "-m")


def collect_rarely() -> None:
    """Let the garbage collector of this process, which ends soon, hardly run."""
    gc.set_threshold(1_000_000)
    collect_nothing_at_exit()


def collect_nothing_at_exit() -> None:
    """Let this process end without a last garbage collection, of what the system frees anyway."""
    atexit.register(gc.freeze)  # called first, so that it runs last


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection meanwhile, as in a long import; what that loads is old afterwards."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation
        gc.enable()


class RequestRefused(ValueError):
    """The module cannot do what was requested; the message says why, in one line."""


class Subprocess(NamedTuple):
    """A process that works on a request, and the file that collects its standard error."""

    process: subprocess.Popen[str]
    stderr_file: TextIO


@contextmanager
def subprocesses(
    module: str, requests: Sequence[Any], without: Sequence[str] = ()
) -> Iterator[list[Subprocess]]:
    """Start one subprocess per request; those still running are killed when the context is left.

    Args:
        module: run as ``python -P -m``.
        without: environment variables to unset.
    """
    environment = {key: value for key, value in os.environ.items() if key not in without}
    processes: list[Subprocess] = []
    stderr_files = ExitStack()  # not pipes: one that nobody reads would fill up and block
    try:
        for request in requests:
            stderr_file = stderr_files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
            process = subprocess.Popen(
                (sys.executable, *MODULE, module),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace",
                env=environment,
                stderr=stderr_file,
            )  # fmt: skip
            processes.append(Subprocess(process, stderr_file))
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            process.stdin = None
        yield processes
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
        stderr_files.close()


def read_reply(call: Subprocess, task: str) -> str:
    """Wait for a subprocess to end; the rest of its standard output.

    Args:
        task: what it does, for the message of an error (``"tracing"``).

    Raises:
        RequestRefused: with its reason.
        RuntimeError: when it failed.
    """
    process, stderr_file = call
    output, _ = process.communicate()
    stderr_file.seek(0)
    errors = stderr_file.read()
    if process.returncode == 2:
        raise RequestRefused(errors.strip().splitlines()[-1])
    if process.returncode:
        raise RuntimeError(f"{task} failed:\n{errors}")
    return output
