"""Questions to processes of their own, for what needs torch: the parent loads none.

A module is run with a request as JSON on its standard input; it answers on standard output, and
refuses with exit code 2 and the reason as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Refused(ValueError):
    """What is asked for cannot be done; the message says why, in one line."""


@contextmanager
def asked(
    module: str, requests: Sequence[Any], without: Sequence[str] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each request; those that still run are ended on leaving.

    Args:
        module: run as ``python -m``.
        without: environment variables that it must not see.
    """
    environment = {key: value for key, value in os.environ.items() if key not in without}
    processes: list[subprocess.Popen[str]] = []
    try:
        for request in requests:
            process = subprocess.Popen(
                (sys.executable, "-m", module),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            process.stdin = None
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def answer(process: subprocess.Popen[str], doing: str) -> str:
    """The rest of what a process prints, once it has ended.

    Raises:
        Refused: with its reason.
        RuntimeError: when it failed; ``doing`` says at what.
    """
    out, err = process.communicate()
    if process.returncode == 2:
        raise Refused(err.strip().splitlines()[-1])
    if process.returncode:
        raise RuntimeError(f"{doing} failed:\n{err}")
    return out
