"""Hashes of the files that cases refer to: document lengths, code, tensors, frequencies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

from cpbench import masks
from cpbench.core.problem import Case
from cpbench.core.user_files import locate


def with_content_hashes(cases: Sequence[Case]) -> list[Case]:
    """The cases with the hashes of their files, each of which is read once.

    Raises:
        OSError: for a file that cannot be read.
    """
    sha256 = functools.cache(_sha256)
    # Keys are texts, which tell apart values that compare equal, such as 1 and true.
    hashes: dict[tuple[str, ...], dict[str, str]] = {}
    hashed_cases = []
    for case in cases:
        key = tuple(map(str, (case.operator, case.strategy, case.mask, case.inputs, case.rope)))
        if key not in hashes:
            hashes[key] = _content_hashes(case, sha256)
        hashed_cases.append(case.with_content(hashes[key]))
    return hashed_cases


def _content_hashes(case: Case, sha256: Callable[[str], str]) -> dict[str, str]:
    """Hashes of the files that a case refers to, by the text that names them in the case."""
    content = dict(masks.content_files(case.mask))
    named = (case.inputs.kwargs.get("file"), case.rope.kwargs.get("file"))
    for file in (*named, *(case.operator.kwargs.get(key) for key in ("gates", "scores"))):
        if file:
            content[str(file)] = sha256(str(file))
    for name in (*case.code, case.mask.name):
        path, colon, attribute = name.rpartition(":")
        if colon:  # a file may define several attributes
            content[name] = f"{sha256(path)}:{attribute}"
    return content


def _sha256(path: str) -> str:
    with locate(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
