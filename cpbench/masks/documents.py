"""Document lengths: sampled from the histogram of a corpus, given as a list, or read from a file.

All functions return an ``(n,)`` int64 array of positive lengths, in tokens, that sum to
``seq_len``.
"""

from __future__ import annotations

import csv
import functools
import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from cpbench.core.user_files import locate
from cpbench.masks.slices import IntArray

DEFAULT_CORPUS = "pile"
DEFAULT_SEED = 0

MOST_TOKENS = 1 << 40  # of a document, and of all documents
LONG_SHARE = (6, 10)  # of the tokens: 60 %, as a fraction to stay exact
LONG_LOW, LONG_HIGH = 8 * 1024, 30 * 1024  # tokens


class Documents(TypedDict, total=False):
    """The parameters of :func:`lengths`, which a pattern accepts as ``**documents``."""

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
    """Document lengths from one source; from corpus ``pile`` by default.

    Args:
        seq_len: total number of tokens.
        doc_lens: the lengths; see :func:`from_list`.
        corpus: name of a histogram to sample from, with ``seed``; see :func:`from_corpus`.
        seed: only with ``corpus``; 0 by default.
        file: a file of lengths, with ``column`` for tables; see :func:`from_file`.
        column: only with ``file``.

    Raises:
        ValueError: for more than one source, or one that is invalid.
    """
    options = {"doc_lens": doc_lens, "corpus": corpus, "file": file}
    sources = [name for name, value in options.items() if value is not None]
    if len(sources) > 1:
        raise ValueError(
            f"document lengths come from one of {', '.join(options)}, not {' and '.join(sources)}"
        )
    source = sources[0] if sources else "corpus"
    if seed is not None and source != "corpus":
        raise ValueError(f"seed goes with corpus, not with {source}")
    if column is not None and source != "file":
        raise ValueError("column goes with file (a table), and no file is given")
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
    """Lengths from a list, cut to ``seq_len`` tokens or repeated up to that, with a warning.

    Raises:
        ValueError: unless they are positive integers.
    """
    lens = _checked(np.asarray(doc_lens), "doc_lens")
    total = int(lens.sum())
    if total == seq_len:
        return lens
    how = "the list is cut" if total > seq_len else "the list is repeated"
    warnings.warn(f"doc_lens are {total} tokens, seq_len is {seq_len}: {how}", stacklevel=2)
    return _cut_or_repeat(lens, seq_len)


def from_corpus(seq_len: int, corpus: str, seed: int) -> IntArray:
    """Sample lengths from the histogram of a corpus until they sum to ``seq_len``.

    For each document, a bin is sampled by weight, then a length uniformly in ``[max(low, 1),
    high)``; the last document is truncated.  The generator is PCG64(seed) with two uniform numbers
    per document, so a longer sequence of the same seed starts with the same documents.

    Source: token counts of the Pile and of ProLong 64K and 512K (``masks/data``).

    Raises:
        ValueError: for an unknown corpus or a seed that is not an integer >= 0.
    """
    bins = _histogram(corpus)
    low = np.maximum(bins[:, 0], 1)
    width = bins[:, 1] - low
    cumulative = np.cumsum(bins[:, 2]) / bins[:, 2].sum()
    typical = float(np.median(low + width / 2))

    def sample(uniform: npt.NDArray[np.float64]) -> IntArray:
        number = np.searchsorted(cumulative, uniform[:, 0], side="right")
        number = np.minimum(number, len(bins) - 1)
        return (low[number] + np.floor(uniform[:, 1] * width[number])).astype(np.int64)

    return _fill(seq_len, typical, sample, _generator(seed))


def long_mixture(seq_len: int, corpus: str, seed: int) -> IntArray:
    """40 % of tokens as in :func:`from_corpus`, 60 % in documents uniform in [8K, 30K), shuffled.

    The shares are exact at every length: the last document of each is truncated.  If 60 % of
    ``seq_len`` is less than one long document, it is a single truncated one.

    Raises:
        ValueError: as :func:`from_corpus`.
    """
    long_tokens = seq_len * LONG_SHARE[0] // LONG_SHARE[1]
    short = from_corpus(seq_len - long_tokens, corpus, seed)

    def sample(uniform: npt.NDArray[np.float64]) -> IntArray:
        return (LONG_LOW + np.floor(uniform[:, 0] * (LONG_HIGH - LONG_LOW))).astype(np.int64)

    # Independent random streams: the short documents do not affect the long ones.
    long = _fill(long_tokens, (LONG_LOW + LONG_HIGH) / 2, sample, _generator(seed, 1))
    lens = np.concatenate([short, long])
    shuffled: IntArray = lens[np.argsort(_generator(seed, 2).random(len(lens)), kind="stable")]
    return shuffled


def from_file(seq_len: int, file: str, column: str | None = None, shuffle: int = 0) -> IntArray:
    """Lengths in the order of a file, repeated if they are fewer than ``seq_len`` tokens.

    The last document is truncated.

    Args:
        shuffle: 0 for the order of the file, else the seed of another one.

    Raises:
        ValueError: see :func:`read_file`.
    """
    lens = read_file(file, column)
    if shuffle:
        lens = _generator(shuffle).permutation(lens)
    return _cut_or_repeat(lens, seq_len)


def read_file(file: str, column: str | None = None) -> IntArray:
    """All lengths in a file.

    Files are ``.txt`` (one length per line, empty lines skipped),
    ``.json`` (a list), ``.jsonl`` (a length per line, or objects that have it under ``column``),
    ``.npy`` (a 1-D integer array), or tables: ``.csv`` with a head, or ``.parquet`` (an integer
    column: ``column``, or the only one).

    Raises:
        ValueError: for a file that is missing, empty, of another type, or that holds anything but
            integers >= 1.
    """
    path = locate(file)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"file {file!r} must end in one of {', '.join(_READERS)}")
    if column is not None and path.suffix.lower() not in _TABLES:
        raise ValueError(f"column goes with {', '.join(_TABLES)} files, not with {file!r}")
    if not path.is_file():
        raise ValueError(f"there is no file {file!r}; give a path to document lengths")
    try:
        raw = reader(path, column)
    except _BadFileError:
        raise
    except Exception as error:  # json, numpy and pyarrow raise many types for broken files
        raise ValueError(f"file {file!r} cannot be read: {_one_line(error)}") from error
    return _checked(raw, f"file {file!r}")


def starts(doc_lens: IntArray) -> IntArray:
    """``(n,)`` first token of each document."""
    first: IntArray = np.cumsum(doc_lens) - doc_lens
    return first


@functools.cache
def corpora() -> tuple[str, ...]:
    """Names of the corpora with a histogram."""
    return tuple(_histograms())


# --- sampling ---------------------------------------------------------------------------------


def _fill(
    total: int,
    typical: float,
    sample: Callable[[npt.NDArray[np.float64]], IntArray],
    generator: np.random.Generator,
) -> IntArray:
    """Sample lengths until they sum to ``total``; the last one is truncated.

    Args:
        total: tokens.
        typical: length of a document, tokens, for the number of samples per round.
        sample: ``(n, 2)`` uniform numbers to ``(n,)`` lengths.
    """
    rounds: list[IntArray] = []
    remaining = total
    while remaining > 0:  # usually one round
        rounds.append(sample(generator.random((int(remaining / typical) + 16, 2))))
        remaining -= int(rounds[-1].sum())
    return _truncate(np.concatenate([np.zeros(0, np.int64), *rounds]), total)


def _cut_or_repeat(lens: IntArray, seq_len: int) -> IntArray:
    """Lengths that sum to ``seq_len``: repeated as often as it takes, the last one truncated."""
    repeats = -(-seq_len // int(lens.sum()))
    return _truncate(np.tile(lens, repeats), seq_len)


def _truncate(lens: IntArray, total: int) -> IntArray:
    """The first documents up to ``total`` tokens, the last one truncated."""
    ends = np.cumsum(lens)
    kept = lens[: int(np.searchsorted(ends, total, side="left")) + 1].copy()
    if len(kept):
        kept[-1] -= int(kept.sum()) - total
    return kept


def _generator(seed: int, *stream: int) -> np.random.Generator:
    """PCG64 of a seed and, optionally, the number of an independent stream."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, not {seed!r}")
    return np.random.Generator(np.random.PCG64([int(seed), *stream] if stream else int(seed)))


@functools.cache
def _histograms() -> dict[str, list[list[float]]]:
    text = (files("cpbench.masks") / "data" / "doc_length_histograms.json").read_text("utf-8")
    histograms: dict[str, list[list[float]]] = json.loads(text)["histograms"]
    return histograms


def _histogram(corpus: str) -> npt.NDArray[np.float64]:
    """``(bins, 3)``: low and high, tokens, and weight of each bin."""
    if not isinstance(corpus, str) or corpus not in _histograms():
        raise ValueError(f"no corpus {corpus!r}; there are: {', '.join(corpora())}")
    return np.array(_histograms()[corpus])


# --- reading ----------------------------------------------------------------------------------


class _BadFileError(ValueError):
    """An invalid file; the message already names it."""


def _read_text(path: Path, _: str | None) -> npt.NDArray[Any]:
    numbered = enumerate(path.read_text("utf-8-sig").splitlines(), start=1)
    lines = [(number, line.strip()) for number, line in numbered if line.strip()]
    try:
        return np.array([line for _, line in lines], dtype=np.str_).astype(np.int64)
    except (ValueError, OverflowError):
        pass  # find the line to report
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
    lens = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(lens, list) or not all(type(item) is int for item in lens):
        raise _BadFileError(f"file {str(path)!r} must hold one JSON list of integers")
    return np.array(lens)


def _read_json_lines(path: Path, column: str | None) -> npt.NDArray[Any]:
    lens: list[int] = []
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        if line.strip():
            value = json.loads(line)
            if isinstance(value, dict):
                value = value[_chosen_column(path, list(value), column)]
            if type(value) is not int:
                raise _BadFileError(f"file {str(path)!r}, line {number}: {value!r} is no integer")
            lens.append(value)
    return np.array(lens)


def _read_csv(path: Path, column: str | None) -> npt.NDArray[Any]:
    rows = csv.DictReader(path.read_text("utf-8-sig").splitlines())
    name = _chosen_column(path, list(rows.fieldnames or ()), column)
    lens: list[int] = []
    for row in rows:
        text = row[name]
        try:
            lens.append(int(text))
        except (TypeError, ValueError):
            raise _BadFileError(
                f"file {str(path)!r}, line {rows.line_num}: {name} = {text!r} is no integer"
            ) from None
    return np.array(lens)


def _chosen_column(path: Path, columns: list[str], column: str | None) -> str:
    """The given column of a table, or its only one."""
    if column is None and len(columns) != 1:
        raise _BadFileError(f"file {str(path)!r} needs column=…, one of: {', '.join(columns)}")
    if column is not None and column not in columns:
        raise _BadFileError(
            f"file {str(path)!r} has no column {column!r}; it has {', '.join(columns)}"
        )
    return columns[0] if column is None else column


def _read_npy(path: Path, _: str | None) -> npt.NDArray[Any]:
    lens: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return lens


def _read_parquet(path: Path, column: str | None) -> npt.NDArray[Any]:
    parquet = importlib.import_module("pyarrow.parquet")  # optional, and without type stubs
    name = _chosen_column(path, list(parquet.read_schema(path).names), column)
    values = parquet.read_table(path, columns=[name]).column(name)
    if values.null_count:
        raise _BadFileError(f"file {str(path)!r}, column {name!r} holds {values.null_count} nulls")
    return np.asarray(values.to_numpy())


_READERS: dict[str, Callable[[Path, str | None], npt.NDArray[Any]]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".npy": _read_npy,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_TABLES = (".jsonl", ".csv", ".parquet")  # have columns


def _checked(lens: npt.NDArray[Any], name: str) -> IntArray:
    """Positive lengths as int64, or a ``ValueError`` that names the first invalid one."""
    if lens.ndim == 1 and lens.size == 0:
        raise ValueError(f"{name} holds no lengths; give at least one")
    if lens.ndim != 1 or lens.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a flat list of integers >= 1, not {_kind(lens)}")
    invalid = np.flatnonzero((lens < 1) | (lens > MOST_TOKENS))
    if len(invalid):
        raise ValueError(
            f"{name} must hold integers from 1 to 2**40; number {invalid[0] + 1} is "
            f"{lens[invalid[0]]}"
        )
    if lens.sum(dtype=np.float64) > MOST_TOKENS:
        raise ValueError(f"{name} must sum to at most 2**40, not to {lens.sum(dtype=np.float64):g}")
    return lens.astype(np.int64)


def _kind(lens: npt.NDArray[Any]) -> str:
    """What an array holds, in words."""
    kinds = {"f": "floats", "U": "text", "S": "text", "b": "booleans", "c": "complex numbers"}
    kind = kinds.get(lens.dtype.kind, "integers" if lens.dtype.kind in "iu" else "other objects")
    if lens.dtype.kind == "O" and all(isinstance(one, str) for one in lens.flat):
        kind = "text"
    if lens.ndim == 0:
        return f"a single value ({lens})"
    return kind if lens.ndim == 1 else f"a {lens.ndim}-D array of {kind}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
