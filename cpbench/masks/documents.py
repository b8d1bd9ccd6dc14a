"""Document lengths: drawn from the histogram of a corpus, given as a list, or read from a file.

Everything returns an ``(n,)`` int64 array of positive lengths, in tokens, that sum to ``seq_len``.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import IntArray

DEFAULT_CORPUS = "pile"
DEFAULT_SEED = 0

LONG_SHARE = (6, 10)  # of the tokens, in exact integers: 60 %
LONG_LOW, LONG_HIGH = 8 * 1024, 30 * 1024


class Documents(TypedDict, total=False):
    """The parameters of :func:`lengths`: what ``**documents`` of a pattern stands for."""

    doc_lens: Sequence[int] | None
    corpus: str | None
    seed: int | None
    file: str | None
    column: str | None


def lengths(
    seq_len: int,
    *,
    doc_lens: Sequence[int] | None = None,
    corpus: str | None = None,
    seed: int | None = None,
    file: str | None = None,
    column: str | None = None,
) -> IntArray:
    """Document lengths from exactly one source; from corpus ``pile`` if none is given.

    Args:
        seq_len: tokens to fill.
        doc_lens: the lengths themselves; they must sum to ``seq_len``.
        corpus: name of a histogram, drawn from with ``seed`` (0 unless given);
            see :func:`from_corpus`.
        seed: goes with ``corpus`` only.
        file: a file of lengths, with ``column`` for parquet; see :func:`from_file`.
        column: goes with ``file`` only.

    Raises:
        ValueError: for two sources at once, and for what the source itself refuses.
    """
    given = {"doc_lens": doc_lens, "corpus": corpus, "file": file}
    sources = [name for name, value in given.items() if value is not None]
    if len(sources) > 1:
        raise ValueError(
            f"document lengths come from one of {', '.join(given)}, not {' and '.join(sources)}"
        )
    source = sources[0] if sources else "corpus"
    if seed is not None and source != "corpus":
        raise ValueError(f"seed goes with corpus, not with {source}, which needs no seed")
    if column is not None and source != "file":
        raise ValueError("column goes with file (a .parquet file), and no file is given")
    if doc_lens is not None:
        return from_list(seq_len, doc_lens)
    if file is not None:
        return from_file(seq_len, file, column)
    return from_corpus(
        seq_len,
        DEFAULT_CORPUS if corpus is None else corpus,
        DEFAULT_SEED if seed is None else seed,
    )


def from_list(seq_len: int, doc_lens: Sequence[int]) -> IntArray:
    """The given lengths, checked.

    Raises:
        ValueError: unless they are positive integers that sum to ``seq_len``.
    """
    found = _checked(np.asarray(doc_lens), "doc_lens")
    total = int(found.sum())
    if total != seq_len:
        raise ValueError(f"doc_lens must sum to seq_len = {seq_len}, not to {total}")
    return found


def from_corpus(seq_len: int, corpus: str, seed: int) -> IntArray:
    """Lengths drawn from a corpus's histogram until ``seq_len`` is full, the last one cut.

    A bin is drawn by weight, then a length uniform in ``[max(low, 1), high)``.  The generator is
    PCG64(seed), two uniform numbers a document, so a longer sequence of the same seed starts with
    the same documents.

    Source: token counts of the Pile and of ProLong 64K and 512K (``masks/data``).

    Raises:
        ValueError: for an unknown corpus or a seed that is no integer >= 0.
    """
    bins = _histogram(corpus)
    low = np.maximum(bins[:, 0], 1)
    width = bins[:, 1] - low
    edges = np.cumsum(bins[:, 2]) / bins[:, 2].sum()
    middle = float(np.median(low + width / 2))

    def draw(uniform: npt.NDArray[np.float64]) -> IntArray:
        chosen = np.minimum(np.searchsorted(edges, uniform[:, 0], side="right"), len(bins) - 1)
        return (low[chosen] + np.floor(uniform[:, 1] * width[chosen])).astype(np.int64)

    return _fill(seq_len, middle, draw, _generator(seed))


def long_mixture(seq_len: int, corpus: str, seed: int) -> IntArray:
    """40 % of the tokens as :func:`from_corpus`, 60 % in documents uniform in [8K, 30K), shuffled.

    Each part is filled exactly, so its last document is cut.  Where 60 % of ``seq_len`` is less
    than one document of 8K tokens, that one cut document is the whole long part, so the shares
    hold at every length.

    Raises:
        ValueError: as :func:`from_corpus`.
    """
    long_tokens = seq_len * LONG_SHARE[0] // LONG_SHARE[1]
    short = from_corpus(seq_len - long_tokens, corpus, seed)

    def draw(uniform: npt.NDArray[np.float64]) -> IntArray:
        return (LONG_LOW + np.floor(uniform[:, 0] * (LONG_HIGH - LONG_LOW))).astype(np.int64)

    # Own streams, so that how many numbers one part takes does not change the other.
    long = _fill(long_tokens, (LONG_LOW + LONG_HIGH) / 2, draw, _generator(seed, 1))
    both = np.concatenate([short, long])
    shuffled: IntArray = both[np.argsort(_generator(seed, 2).random(len(both)), kind="stable")]
    return shuffled


def from_file(seq_len: int, file: str, column: str | None = None) -> IntArray:
    """Lengths in the order of a file: cut where ``seq_len`` is full, else repeated from the start.

    Files are ``.txt`` (a length per line, empty lines skipped), ``.json`` (a list), ``.npy`` (a
    1-D integer array) or ``.parquet`` (an integer column: ``column``, or the only one there is).

    Raises:
        ValueError: for a file that is missing, empty, of another kind, or that holds anything but
            integers >= 1.
    """
    path = Path(file)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"file {file!r} must end in one of {', '.join(_READERS)}")
    if column is not None and path.suffix.lower() != ".parquet":
        raise ValueError(f"column goes with a .parquet file, not with {file!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {file!r}; give a path to document lengths")
    try:
        raw = reader(path, column)
    except _BadFileError:
        raise
    except Exception as error:  # whatever json, numpy and pyarrow raise for broken files
        raise ValueError(f"file {file!r} cannot be read: {_one_line(error)}") from error
    found = _checked(raw, f"file {file!r}")
    times = -(-seq_len // int(found.sum()))
    return _cut(np.tile(found, times), seq_len)


def starts(doc_lens: IntArray) -> IntArray:
    """``(n,)`` first token of each document."""
    first: IntArray = np.cumsum(doc_lens) - doc_lens
    return first


@functools.cache
def corpora() -> tuple[str, ...]:
    """Names of the corpora there are histograms of."""
    return tuple(_histograms())


# --- drawing ----------------------------------------------------------------------------------


def _fill(
    total: int,
    typical: float,
    draw: Callable[[npt.NDArray[np.float64]], IntArray],
    generator: np.random.Generator,
) -> IntArray:
    """Draw lengths until they sum to ``total``, the last one cut."""
    parts: list[IntArray] = []
    left = total
    while left > 0:  # a round or two: the draws of a round usually suffice
        parts.append(draw(generator.random((int(left / typical) + 16, 2))))
        left -= int(parts[-1].sum())
    return _cut(np.concatenate([np.zeros(0, np.int64), *parts]), total)


def _cut(found: IntArray, total: int) -> IntArray:
    """The first documents that fill ``total`` tokens, the last one shortened."""
    ends = np.cumsum(found)
    kept = found[: int(np.searchsorted(ends, total, side="left")) + 1].copy()
    if len(kept):
        kept[-1] -= int(kept.sum()) - total
    return kept


def _generator(seed: int, *stream: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, not {seed!r}")
    return np.random.Generator(np.random.PCG64([int(seed), *stream] if stream else int(seed)))


@functools.cache
def _histograms() -> dict[str, list[list[float]]]:
    text = (files("cpbench.masks") / "data" / "doc_length_histograms.json").read_text()
    found: dict[str, list[list[float]]] = json.loads(text)["histograms"]
    return found


def _histogram(corpus: str) -> npt.NDArray[np.float64]:
    """``(bins, 3)``: low, high, weight."""
    if not isinstance(corpus, str) or corpus not in _histograms():
        raise ValueError(f"no corpus {corpus!r}; there are: {', '.join(corpora())}")
    return np.array(_histograms()[corpus])


# --- reading ----------------------------------------------------------------------------------


class _BadFileError(ValueError):
    """A message that says all there is to say about a file."""


def _read_text(path: Path, _: str | None) -> npt.NDArray[Any]:
    numbered = enumerate(path.read_text().splitlines(), start=1)
    lines = [(number, line.strip()) for number, line in numbered if line.strip()]
    try:
        return np.array([line for _, line in lines], dtype=np.str_).astype(np.int64)
    except (ValueError, OverflowError):
        pass  # say which line it is
    for number, line in lines:
        try:
            int(line)
        except ValueError:
            raise _BadFileError(
                f"file {str(path)!r}, line {number}: {line[:40]!r} is not an integer; "
                "write one length per line"
            ) from None
    raise _BadFileError(f"file {str(path)!r} holds a length that does not fit 64 bits")


def _read_json(path: Path, _: str | None) -> npt.NDArray[Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, list) or not all(type(item) is int for item in found):
        raise _BadFileError(f"file {str(path)!r} must hold one JSON list of integers")
    return np.array(found)


def _read_npy(path: Path, _: str | None) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return found


def _read_parquet(path: Path, column: str | None) -> npt.NDArray[Any]:
    parquet = importlib.import_module("pyarrow.parquet")  # optional, and without type stubs
    there = list(parquet.read_schema(path).names)
    if column is None and len(there) != 1:
        raise _BadFileError(f"file {str(path)!r} needs column=…, one of: {', '.join(there)}")
    if column is not None and column not in there:
        raise _BadFileError(
            f"file {str(path)!r} has no column {column!r}; it has {', '.join(there)}"
        )
    name = there[0] if column is None else column
    values = parquet.read_table(path, columns=[name]).column(name)
    if values.null_count:
        raise _BadFileError(f"file {str(path)!r}, column {name!r} holds {values.null_count} nulls")
    return np.asarray(values.to_numpy())


_READERS: dict[str, Callable[[Path, str | None], npt.NDArray[Any]]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
}


def _checked(found: npt.NDArray[Any], what: str) -> IntArray:
    """Positive int64 lengths, or a ``ValueError`` that names the first wrong one."""
    if found.ndim == 1 and found.size == 0:
        raise ValueError(f"{what} holds no lengths; give at least one")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        kind = f"{found.ndim}-D {found.dtype}"
        raise ValueError(f"{what} must be a flat list of integers >= 1, not {kind}")
    wrong = np.flatnonzero(found < 1)
    if len(wrong):
        raise ValueError(
            f"{what} must hold integers >= 1; number {wrong[0] + 1} is {found[wrong[0]]}"
        )
    return found.astype(np.int64)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
