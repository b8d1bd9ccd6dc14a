"""Masks by name, such as ``build("causal_document:corpus=pile,seed=3", seq_len=65536)``.

The name of a mask is a pattern of ``cpbench.masks.patterns``, a pattern that another package
registers in the entry-point group ``cpbench.masks``, or ``path/file.py:function``.  torch is not
needed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from cpbench.core import registry
from cpbench.core.spec import Spec, Value
from cpbench.core.untraced import untraced
from cpbench.core.user_files import load_from_file, locate
from cpbench.masks import head_patterns, sparse_patterns  # noqa: F401  register their patterns
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.documents import MOST_TOKENS
from cpbench.masks.head_masks import Mask, distinct_masks
from cpbench.masks.patterns import PATTERNS, WIDE, Pattern, pattern

__all__ = [
    "Pattern",
    "build",
    "build_heads",
    "content_files",
    "describe",
    "from_cu_seqlens",
    "names",
    "pattern",
    "pattern_info",
]

GROUP = "cpbench.masks"


@untraced
def build(mask: str | Mapping[str, Any] | Spec, seq_len: int, **params: Any) -> AttnMask:
    """Build a mask that all heads share.

    Args:
        mask, seq_len, params: see :func:`build_heads`.

    Raises:
        ValueError: for a per-head pattern; otherwise as :func:`build_heads`.
    """
    built = build_heads(mask, seq_len, 1, **params)
    if not isinstance(built, AttnMask):
        raise ValueError(
            f"mask {str(Spec.parse(mask))!r} differs from head to head; use build_heads"
        )
    return built


@untraced
def build_heads(
    mask: str | Mapping[str, Any] | Spec, seq_len: int, num_heads: int, **params: Any
) -> Mask:
    """Build a mask from its name and parameters.

    Args:
        mask: a name, a text such as ``"sliding_window:window=512"``, a table or a spec.
        seq_len: number of keys, and of queries unless the pattern says otherwise.
        num_heads: query heads, for per-head patterns.
        params: parameters of the pattern, in addition to those in ``mask``.

    Returns:
        The mask.  Masks are cached: the same arguments may give the same object, which must not be
        modified (its arrays are read-only).

    Raises:
        ValueError: for an unknown name or parameter, or an invalid value, in one line.
    """
    spec = Spec.parse(mask)
    for key in params:
        if key in spec.kwargs:
            raise ValueError(f"{key!r} is given both in {str(spec)!r} and as an argument")
    extra = {key: _spec_value(key, value) for key, value in params.items() if value is not None}
    spec = Spec.of(spec.name, **spec.kwargs, **extra)
    if isinstance(seq_len, bool) or not isinstance(seq_len, int | np.integer) or seq_len < 1:
        raise ValueError(f"seq_len must be an integer >= 1, not {seq_len!r}")
    pattern_info(spec)
    # The text distinguishes equal values (1, 1.0, true); a file that has changed is read again.
    cache_key = (str(spec), *content_files(spec).items())
    built = _build_cached(spec, int(seq_len), num_heads, cache_key)
    built.digest  # noqa: B018  computed once, so that compiled graphs can name the mask
    return built


@untraced
def from_cu_seqlens(
    cu_seqlens_q: npt.ArrayLike, cu_seqlens_k: npt.ArrayLike | None = None, causal: bool = True
) -> AttnMask:
    """The mask of packed documents, from the cumulative lengths of FlashAttention's calls.

    Args:
        cu_seqlens_q: ``(documents + 1,)`` integers: 0, and the end of each document's queries.
        cu_seqlens_k: the same of its keys; those of the queries unless given.
        causal: whether a query sees no later key; the last query and key of a document are aligned,
            as in flash_attn from version 2.1.

    Raises:
        ValueError: for anything but integers that start at 0 and never fall.
    """
    ends = []
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        raw = _to_numpy(cu_seqlens_q if given is None else given)
        if raw.ndim != 1 or raw.dtype.kind not in "iu" or len(raw) < 2 or (raw > MOST_TOKENS).any():
            raise ValueError(f"{name} must be a flat list of integers up to 2**40, at least two")
        values = raw.astype(np.int64)
        if values[0] or (np.diff(values) < 0).any():
            raise ValueError(f"{name} must start at 0 and never fall, unlike {raw[:8].tolist()}")
        ends.append(values)
    if len(ends[0]) != len(ends[1]):
        raise ValueError(
            f"cu_seqlens_q is of {len(ends[0]) - 1} documents, cu_seqlens_k of {len(ends[1]) - 1}"
        )
    (q0, q1), (k0, k1) = ((x[:-1], x[1:]) for x in ends)
    last = k1 - q1 if causal else np.full_like(q0, WIDE)
    slices = np.column_stack([q0, q1, k0, k1, np.full_like(q0, -WIDE), last])
    return AttnMask.from_slices(int(q1[-1]), int(k1[-1]), slices)


def _to_numpy(values: Any) -> npt.NDArray[Any]:
    """An array of numbers, of a tensor on any device too."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def rebuild(mask: Spec, seq_len: int, num_heads: int) -> Mask:
    """Build a mask like :func:`build_heads`, but never from the cache: for timing."""
    return _build_cached.__wrapped__(mask, seq_len, num_heads, ())


def names() -> tuple[str, ...]:
    """Names of all registered patterns, sorted."""
    return tuple(sorted(_registered()))


def describe() -> dict[str, Pattern]:
    """All registered patterns by name, with their summaries, parameters and defaults."""
    return {name: _registered()[name] for name in names()}


def pattern_info(mask: str | Mapping[str, Any] | Spec) -> Pattern:
    """The pattern of a mask; the names of its parameters are checked.

    Raises:
        ValueError: for an unknown name or parameter; the message lists the known ones.
    """
    spec = Spec.parse(mask)
    if ".py:" in spec.name:
        info = Pattern.of(load_from_file(spec.name, FunctionType, "mask"))
    elif spec.name in _registered():
        info = _registered()[spec.name]
    else:
        raise ValueError(f"no mask {spec.name!r}; there are: {', '.join(names())}")
    registry.check_params("mask", spec.name, spec.kwargs, info.params)
    return info


def content_files(mask: str | Mapping[str, Any] | Spec) -> dict[str, str]:
    """SHA-256 of each file that a mask is built from, by its path in the spec.

    These are the parameter ``file`` and the Python file of ``path/file.py:function``; most masks
    have neither.

    Raises:
        ValueError: for a file that does not exist.
    """
    spec = Spec.parse(mask)
    paths = [spec.name.rpartition(":")[0]] if ".py:" in spec.name else []
    file = spec.kwargs.get("file")
    if file is not None:
        paths.append(str(file))
    return {path: _sha256(path) for path in paths}


def _registered() -> dict[str, Pattern]:
    return PATTERNS | _plugins()


@functools.cache
def _plugins() -> dict[str, Pattern]:
    """Patterns of other packages.

    Raises:
        RegistrationError: for a name that is registered twice.
    """
    plugins: dict[str, Pattern] = {}
    for source, function in registry.plugins(GROUP):
        if not callable(function):
            raise registry.RegistrationError(f"{source} of {GROUP} is not a function: {function!r}")
        info = Pattern.of(function)
        existing = (PATTERNS | plugins).get(info.name)
        # The same function may be registered by @pattern, too.
        if existing is not None and existing.build is not function:
            raise registry.RegistrationError(
                f"{info.name!r} is registered twice in {GROUP}: by {existing.build.__module__} "
                f"and by {source}"
            )
        plugins[info.name] = info
    return plugins


@functools.lru_cache(maxsize=64)
def _build_cached(spec: Spec, seq_len: int, num_heads: int, cache_key: tuple[object, ...]) -> Mask:
    """Build a mask; those of other packages and files are checked."""
    info = pattern_info(spec)
    arguments = spec.kwargs | ({"num_heads": num_heads} if info.per_head else {})
    if info.name in PATTERNS:
        mask: Mask = info.build(seq_len, **arguments)
        return mask
    try:
        built = info.build(seq_len, **arguments)
    except Exception as error:  # code of other authors may raise anything
        raise ValueError(f"mask {str(spec)!r}: {type(error).__name__}: {error}") from error
    if not isinstance(built, Mask):
        raise ValueError(f"mask {str(spec)!r} returned {type(built).__name__}, not AttnMask")
    if not isinstance(built, DilatedMask) and any(
        head.overlap_area() for head in distinct_masks(built)
    ):
        raise ValueError(f"mask {str(spec)!r} returned slices that overlap")
    return built


def _spec_value(key: str, value: Any) -> Value:
    """A parameter as one of the types that specs hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | np.ndarray):
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if all(isinstance(item, int | np.integer) for item in items):
            return tuple(int(item) for item in items)
    raise ValueError(
        f"{key} must be a number, a string, a boolean or a list of integers, not {value!r}"
    )


def _sha256(path: str) -> str:
    try:
        return hashlib.sha256(locate(path).read_bytes()).hexdigest()
    except OSError:
        raise ValueError(f"there is no file {path!r} to read a mask from") from None
