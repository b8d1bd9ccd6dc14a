"""What cases only point at, a file of lengths, code or tensors, by the hash of what is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cpbench import masks
from cpbench.core.problem import Case


def with_content(cases: Sequence[Case]) -> list[Case]:
    """The cases, each with the hashes of its files, of which each is read once.

    Raises:
        OSError: for a file that cannot be read.
    """
    # Texts as keys: they tell apart what compares equal, such as 1 and true.
    known: dict[tuple[str, ...], dict[str, str]] = {}
    found = []
    for case in cases:
        key = tuple(map(str, (case.operator, case.strategy, case.mask, case.inputs)))
        if key not in known:
            known[key] = _content(case)
        found.append(case.with_content(known[key]))
    return found


def _content(case: Case) -> dict[str, str]:
    """Hashes of the files that a case points at, by the text that stands for them in the case."""
    content = dict(masks.content_files(case.mask))
    captured = case.inputs.kwargs.get("file")
    if captured is not None:
        content[str(captured)] = hashlib.sha256(Path(str(captured)).read_bytes()).hexdigest()
    for name in (*case.code, case.mask.name):
        path, colon, attribute = name.rpartition(":")
        if colon:  # one file may hold several
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            content[name] = f"{digest}:{attribute}"
    return content
