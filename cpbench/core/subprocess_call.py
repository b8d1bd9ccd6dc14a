"""Questions to processes of their own, for what needs torch: the parent loads none.

A module is run with a request as JSON on its standard input; it answers on standard output, and
refuses with exit code 2 and the reason as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TextIO


class Refused(ValueError):
    """What is asked for cannot be done; the message says why, in one line."""


class Asked(NamedTuple):
    """A process, and the file with its complaints."""

    process: subprocess.Popen[str]
    said: TextIO


@contextmanager
def asked(
    module: str, requests: Sequence[Any], without: Sequence[str] = ()
) -> Iterator[list[Asked]]:
    """A process for each request; those that still run are ended on leaving.

    Args:
        module: run as ``python -m``.
        without: environment variables that it must not see.
    """
    environment = {key: value for key, value in os.environ.items() if key not in without}
    processes: list[Asked] = []
    complaints = ExitStack()  # files: a pipe that nobody reads meanwhile would fill up
    try:
        for request in requests:
            said = complaints.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
            process = subprocess.Popen(
                (sys.executable, "-m", module),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                stderr=said,
            )  # fmt: skip
            processes.append(Asked(process, said))
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            process.stdin = None
        yield processes
    finally:
        for one in processes:
            one.process.kill()
            one.process.wait()
        complaints.close()


def answer(one: Asked, doing: str) -> str:
    """The rest of what a process prints, once it has ended.

    Raises:
        Refused: with its reason.
        RuntimeError: when it failed; ``doing`` says at what.
    """
    out, _ = one.process.communicate()
    one.said.seek(0)
    err = one.said.read()
    if one.process.returncode == 2:
        raise Refused(err.strip().splitlines()[-1])
    if one.process.returncode:
        raise RuntimeError(f"{doing} failed:\n{err}")
    return out
