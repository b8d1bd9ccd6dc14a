"""Mask patterns: functions that return an ``AttnMask``.

To add one, write a function of ``seq_len`` (tokens) and keyword parameters with defaults, with a
docstring whose first line says when query i sees key j, and decorate it with ``@pattern``.  A
pattern that takes ``**documents: Unpack[Documents]`` has the parameters of ``documents.lengths``:
one of ``doc_lens``, ``corpus`` (with ``seed``) or ``file`` (with ``column``); by default corpus
``pile``.

Notation: i is a query, j a key, N = ``seq_len``, T(x) = x(x+1)/2, and l the document lengths.
Parameters that exceed the sequence are clamped if that does not change the mask (window, prefix,
block size); other invalid values raise a ``ValueError`` that says what is allowed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

import numpy as np

from cpbench.core.registry import RegistrationError
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.documents import (
    DEFAULT_CORPUS,
    DEFAULT_SEED,
    Documents,
    lengths,
    long_mixture,
    starts,
)
from cpbench.masks.head_masks import Mask
from cpbench.masks.slices import IntArray

Build = TypeVar("Build", bound=Callable[..., Mask])

MAX_BLOCKS = 1 << 22  # one slice each: some hundred MB
WIDE = 1 << 40  # an offset without effect; slices are made tight when the mask is built


@dataclass(frozen=True)
class Pattern:
    """The declaration of a mask pattern.

    Attributes:
        name: name of the function.
        summary: first line of its docstring.
        params: names and defaults of its parameters; None if the default depends on others.
        build: the function.
        per_head: whether it takes ``num_heads``, too, and returns a mask that differs between
            heads.
    """

    name: str
    summary: str
    params: Mapping[str, Any]
    build: Callable[..., Any]
    per_head: bool = False

    @classmethod
    def of(cls, function: Callable[..., Mask]) -> Pattern:
        """The declaration in the signature and docstring of a pattern function.

        Raises:
            RegistrationError: unless it is ``f(seq_len, *, key=default, …)`` or
                ``f(seq_len, num_heads, *, …)``, with a docstring.
        """
        name = getattr(function, "__name__", repr(function))
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        try:
            signature = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            signature = []
        if not summary or not signature or signature[0].name != "seq_len":
            raise RegistrationError(
                f"mask pattern {name!r} must be a function of seq_len with a docstring"
            )
        params: dict[str, Any] = {}
        per_head = len(signature) > 1 and signature[1].name == "num_heads"
        for param in signature[2 if per_head else 1 :]:
            if param.kind is param.VAR_KEYWORD:
                params |= _DOCUMENT_PARAMS
            elif param.kind is param.KEYWORD_ONLY and param.default is not param.empty:
                params[param.name] = param.default
            else:
                raise RegistrationError(
                    f"mask pattern {name!r}: {param.name!r} must be a keyword with a default"
                )
        return cls(name, summary, params, function, per_head)


_DOCUMENT_PARAMS: dict[str, Any] = {
    **dict.fromkeys(Documents.__annotations__),
    "corpus": DEFAULT_CORPUS,
    "seed": DEFAULT_SEED,
}

PATTERNS: dict[str, Pattern] = {}


def pattern(function: Build) -> Build:
    """Register a pattern function under its name, and return it unchanged.

    Raises:
        RegistrationError: if the name is taken or the function is not a pattern.
    """
    info = Pattern.of(function)
    if info.name in PATTERNS:
        raise RegistrationError(f"mask pattern {info.name!r} is registered twice")
    PATTERNS[info.name] = info
    return function


# --- without documents ------------------------------------------------------------------------


@pattern
def full(seq_len: int, *, seq_q: int | None = None) -> AttnMask:
    """Every query sees every key.

    ``seq_q`` queries (by default ``seq_len``) by ``seq_len`` keys; area seq_q · N.
    """
    rows = seq_len if seq_q is None else checked_int("seq_q", seq_q, low=1)
    return AttnMask.from_slices(rows, seq_len, [(0, rows, 0, seq_len, -WIDE, WIDE)])


@pattern
def causal(seq_len: int, *, seq_q: int | None = None, offset: int | None = None) -> AttnMask:
    """j <= i + offset.

    ``seq_q`` queries (by default ``seq_len``) by ``seq_len`` keys.  ``offset`` is ``seq_len -
    seq_q`` by default, which is bottom-right alignment: the last query sees the last key.  0 is
    top-left alignment.  With a negative offset, the first queries see no keys.  Area T(N) if
    square.
    """
    rows = seq_len if seq_q is None else checked_int("seq_q", seq_q, low=1)
    shift = seq_len - rows if offset is None else checked_int("offset", offset, low=None)
    return AttnMask.from_slices(rows, seq_len, [(0, rows, 0, seq_len, -WIDE, shift)])


@pattern
def sliding_window(seq_len: int, *, window: int = 1024) -> AttnMask:
    """|i - j| <= window: up to 2 · window + 1 keys.

    Area (2w+1)N - w(w+1) for w < N.  Source: Longformer (arXiv:2004.05150).
    """
    w = checked_int("window", window, low=0)
    return AttnMask.from_slices(seq_len, seq_len, [(0, seq_len, 0, seq_len, -w, w)])


@pattern
def sliding_window_causal(seq_len: int, *, window: int = 1024) -> AttnMask:
    """0 <= i - j <= window: up to window + 1 keys.

    Area (w+1)N - w(w+1)/2 for w < N.  Source: Mistral 7B (arXiv:2310.06825), where the window
    includes the query's own key; here it does not.
    """
    w = checked_int("window", window, low=0)
    return AttnMask.from_slices(seq_len, seq_len, [(0, seq_len, 0, seq_len, -w, 0)])


@pattern
def prefix_lm_causal(seq_len: int, *, prefix_len: int = 1024) -> AttnMask:
    """j <= i or j < prefix_len.

    Area p² + (N-p)(N+p+1)/2, with p clamped to N.  Source: T5 (arXiv:1910.10683).
    """
    p = min(checked_int("prefix_len", prefix_len, low=1), seq_len)
    slices = [(0, p, 0, p, -WIDE, WIDE), (p, seq_len, 0, seq_len, -WIDE, 0)]
    return AttnMask.from_slices(seq_len, seq_len, slices)


@pattern
def global_sliding_window(seq_len: int, *, num_global: int = 64, window: int = 1024) -> AttnMask:
    """i < num_global or j < num_global or |i - j| <= window.

    Area N² - r² + (2w+1)r - w(w+1) with r = N - g, for w < r.  Source: Longformer
    (arXiv:2004.05150), BigBird (arXiv:2007.14062).
    """
    g = checked_int("num_global", num_global, low=0, high=seq_len)
    w = checked_int("window", window, low=0)
    slices = [
        (0, g, 0, seq_len, -WIDE, WIDE),
        (g, seq_len, 0, g, -WIDE, WIDE),
        (g, seq_len, g, seq_len, -w, w),
    ]
    return AttnMask.from_slices(seq_len, seq_len, slices)


@pattern
def streaming(seq_len: int, *, num_sinks: int = 4, window: int = 1024) -> AttnMask:
    """j <= i and (j < num_sinks or i - j <= window).

    Area (w+1)N - w(w+1)/2 + s(N-w-1) - s(s-1)/2 for s <= N - w.  Source: StreamingLLM
    (arXiv:2309.17453); also called Λ-shaped (LM-Infinite) and A-shape (MInference).
    """
    s = checked_int("num_sinks", num_sinks, low=0, high=seq_len)
    w = checked_int("window", window, low=0)
    slices = [(0, seq_len, 0, s, -WIDE, 0), (0, seq_len, s, seq_len, -w, 0)]
    return AttnMask.from_slices(seq_len, seq_len, slices)


# --- with documents ---------------------------------------------------------------------------


@pattern
def full_document(seq_len: int, **documents: Unpack[Documents]) -> AttnMask:
    """Same document.

    Area Σ l².  Source: packed pre-training, e.g. Krell et al. (arXiv:2107.02027).
    """
    return _block_diagonal(seq_len, lengths(seq_len, **documents), hi=WIDE)


@pattern
def causal_document(seq_len: int, **documents: Unpack[Documents]) -> AttnMask:
    """Same document and j <= i.

    Area Σ T(l).  Source: Llama 3 (arXiv:2407.21783), section 3.2.
    """
    return _block_diagonal(seq_len, lengths(seq_len, **documents), hi=0)


@pattern
def full_document_long(
    seq_len: int, *, corpus: str = DEFAULT_CORPUS, seed: int = DEFAULT_SEED
) -> AttnMask:
    """Same document, where 60 % of the tokens are in documents of 8K to 30K tokens.

    Area Σ l²; lengths from ``documents.long_mixture``.
    """
    return _block_diagonal(seq_len, long_mixture(seq_len, corpus, seed), hi=WIDE)


@pattern
def causal_document_long(
    seq_len: int, *, corpus: str = DEFAULT_CORPUS, seed: int = DEFAULT_SEED
) -> AttnMask:
    """Same document and j <= i, where 60 % of the tokens are in documents of 8K to 30K tokens.

    Area Σ T(l); lengths from ``documents.long_mixture``.
    """
    return _block_diagonal(seq_len, long_mixture(seq_len, corpus, seed), hi=0)


@pattern
def prefix_lm_document(
    seq_len: int, *, prefix_len: int = 256, **documents: Unpack[Documents]
) -> AttnMask:
    """Same document, and j <= i or j among its first prefix_len tokens.

    Area Σ p² + (l-p)(l+p+1)/2, with p clamped to each l.  Source: T5 (arXiv:1910.10683), packed.
    """
    length = checked_int("prefix_len", prefix_len, low=1)
    lens = lengths(seq_len, **documents)
    first, end = starts(lens), np.cumsum(lens)
    prefix_end = first + np.minimum(lens, length)
    return AttnMask.from_slices(
        seq_len,
        seq_len,
        np.concatenate(
            [
                _slices_up_to(first, prefix_end, first, prefix_end, hi=WIDE),
                _slices_up_to(prefix_end, end, first, end, hi=0),
            ]
        ),
    )


@pattern
def share_question(seq_len: int, **documents: Unpack[Documents]) -> AttnMask:
    """j <= i, and same document or j in the first document (at least 2 documents).

    Several answers share one question, the first document.  Area
    T(l₁+l₂) + (N-l₁-l₂) · l₁ + Σ_{m>=3} T(l_m).  Source: reward models and DPO with a shared
    prompt, as in FlashMask (arXiv:2410.01359).
    """
    lens = lengths(seq_len, **documents)
    if len(lens) < 2:
        raise ValueError(
            "share_question needs at least 2 documents, not 1: give doc_lens, or another corpus, "
            "seed or file"
        )
    question_end, first_answer_end = int(lens[0]), int(lens[0] + lens[1])
    first, end = starts(lens)[2:], np.cumsum(lens)[2:]
    slices = np.concatenate(
        [
            [
                (0, first_answer_end, 0, first_answer_end, -WIDE, 0),
                (first_answer_end, seq_len, 0, question_end, -WIDE, WIDE),
            ],
            _slices_up_to(first, end, first, end, hi=0),
        ]
    )
    return AttnMask.from_slices(seq_len, seq_len, slices)


@pattern
def causal_blockwise(seq_len: int, **documents: Unpack[Documents]) -> AttnMask:
    """Same document and j <= i, but the last document sees all before it.

    Demonstrations that do not see each other, followed by a test example.  Area
    Σ_{m<D} T(l_m) + l_D(2N-l_D+1)/2.  Source: block attention for in-context learning, as in
    FlashMask (arXiv:2410.01359).
    """
    lens = lengths(seq_len, **documents)
    first, end = starts(lens), np.cumsum(lens)
    visible_from = first.copy()
    visible_from[-1] = 0
    slices = _slices_up_to(first, end, visible_from, end, hi=0)
    return AttnMask.from_slices(seq_len, seq_len, slices)


@pattern
def block_causal_document(
    seq_len: int, *, block_size: int = 1024, **documents: Unpack[Documents]
) -> AttnMask:
    """Same document, and j's block <= i's block (blocks counted from the document's start).

    Area Σ b² · m(m+1)/2 + r · l with l = m · b + r.  Source: autoregressive video generation,
    MAGI-1 (arXiv:2505.13211).
    """
    b = min(checked_int("block_size", block_size, low=1), seq_len)
    lens = lengths(seq_len, **documents)
    blocks = -(-lens // b)
    if blocks.sum() > MAX_BLOCKS:
        raise ValueError(
            f"block_size {b} cuts {seq_len} tokens into {blocks.sum()} blocks; "
            f"at most {MAX_BLOCKS} are allowed"
        )
    number = np.arange(int(blocks.sum())) - np.repeat(starts(blocks), blocks)
    first, end = np.repeat(starts(lens), blocks), np.repeat(np.cumsum(lens), blocks)
    block = first + number * b
    block_end = np.minimum(block + b, end)
    slices = _slices_up_to(block, block_end, first, block_end, hi=WIDE)
    return AttnMask.from_slices(seq_len, seq_len, slices)


# --- helpers ----------------------------------------------------------------------------------


def _block_diagonal(seq_len: int, lens: IntArray, hi: int) -> AttnMask:
    """Same document and j - i <= hi."""
    first, end = starts(lens), np.cumsum(lens)
    return AttnMask.from_slices(seq_len, seq_len, _slices_up_to(first, end, first, end, hi))


def _slices_up_to(q0: IntArray, q1: IntArray, k0: IntArray, k1: IntArray, hi: int) -> IntArray:
    """``(n, 6)`` slices with the upper offset ``hi`` and no lower one."""
    return np.column_stack([q0, q1, k0, k1, np.full_like(q0, -WIDE), np.full_like(q0, hi)])


def checked_int(name: str, value: object, *, low: int | None, high: int | None = None) -> int:
    """Check an integer parameter; values beyond ``WIDE`` are clamped to it."""
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    number = int(value) if is_int else 0  # type: ignore[call-overload]
    if not is_int or (low is not None and number < low) or (high is not None and number > high):
        bounds = "" if low is None else f" >= {low}"
        bounds += "" if high is None else f" and <= {high} (seq_len)"
        raise ValueError(f"{name} must be an integer{bounds}, not {value!r}")
    return max(-WIDE, min(number, WIDE))
