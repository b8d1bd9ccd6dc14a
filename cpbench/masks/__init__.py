"""Named masks: ``build("causal_document:corpus=pile,seed=3", seq_len=65536)`` and what there is.

A mask's name is a pattern of ``cpbench.masks.patterns``, a pattern that another package registers
in the entry-point group ``cpbench.masks``, or ``path/file.py:function``.  Nothing here needs torch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from cpbench.core import registry
from cpbench.core.spec import Spec, Value
from cpbench.masks import head_patterns  # noqa: F401  it registers its patterns
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask, distinct
from cpbench.masks.patterns import PATTERNS, Pattern, pattern

__all__ = [
    "Pattern",
    "build",
    "build_heads",
    "content_files",
    "describe",
    "names",
    "pattern",
    "pattern_info",
]

GROUP = "cpbench.masks"


def build(mask: str | Mapping[str, Any] | Spec, seq_len: int, **params: Any) -> AttnMask:
    """The mask of a name and its parameters, alike for all heads.

    Args, errors: as for :func:`build_heads`.

    Raises:
        ValueError: for a pattern that differs from head to head.
    """
    made = build_heads(mask, seq_len, 1, **params)
    if not isinstance(made, AttnMask):
        raise ValueError(
            f"mask {str(Spec.parse(mask))!r} differs from head to head; build_heads makes it"
        )
    return made


def build_heads(
    mask: str | Mapping[str, Any] | Spec, seq_len: int, num_heads: int, **params: Any
) -> Mask:
    """The mask of a name and its parameters.

    Args:
        mask: a name, a text such as ``"sliding_window:window=512"``, a table or a spec.
        seq_len: number of keys, and of queries unless the pattern says otherwise.
        num_heads: query heads, for patterns that differ from head to head.
        params: parameters of the pattern, in addition to those in ``mask``.

    Returns:
        The mask; the same object for the same arguments while they are remembered, so it must not
        be changed (its arrays are read-only).

    Raises:
        ValueError: for an unknown name or parameter, or a value that is not allowed, in one line.
    """
    spec = Spec.parse(mask)
    for key in params:
        if key in spec.kwargs:
            raise ValueError(f"{key!r} is given both in {str(spec)!r} and as an argument")
    given = {key: _plain(key, value) for key, value in params.items() if value is not None}
    spec = Spec.of(spec.name, **spec.kwargs, **given)
    if isinstance(seq_len, bool) or not isinstance(seq_len, int | np.integer) or seq_len < 1:
        raise ValueError(f"seq_len must be an integer >= 1, not {seq_len!r}")
    pattern_info(spec)
    # The text tells apart what compares equal (1, 1.0 and true); a file that changed is read again.
    told = (str(spec), *content_files(spec).items())
    return _built(spec, int(seq_len), num_heads, told)


def rebuild(mask: Spec, seq_len: int, num_heads: int) -> Mask:
    """As :func:`build_heads`, never from memory: for timing it."""
    return _built.__wrapped__(mask, seq_len, num_heads, ())


def names() -> tuple[str, ...]:
    """Names of the registered patterns, sorted."""
    return tuple(sorted(_registered()))


def describe() -> dict[str, Pattern]:
    """Every registered pattern by name: its summary, and its parameters with their defaults."""
    return {name: _registered()[name] for name in names()}


def pattern_info(mask: str | Mapping[str, Any] | Spec) -> Pattern:
    """The pattern that a spec names, once the names of its parameters are found right.

    Raises:
        ValueError: for an unknown name or parameter; the message lists what there is.
    """
    spec = Spec.parse(mask)
    if ".py:" in spec.name:
        info = Pattern.of(registry.from_file(spec.name, FunctionType, "mask"))
    elif spec.name in _registered():
        info = _registered()[spec.name]
    else:
        raise ValueError(f"no mask {spec.name!r}; there are: {', '.join(names())}")
    registry.check_params("mask", spec.name, spec.kwargs, info.params)
    return info


def content_files(mask: str | Mapping[str, Any] | Spec) -> dict[str, str]:
    """SHA-256 of each file a mask is made from, by path as given.

    That is the value of a parameter named ``file``, and the Python file of a pattern given as
    ``path/file.py:function``.  Most masks have none.

    Raises:
        ValueError: for a file that is not there.
    """
    spec = Spec.parse(mask)
    paths = [spec.name.rpartition(":")[0]] if ".py:" in spec.name else []
    given = spec.kwargs.get("file")
    if given is not None:
        paths.append(str(given))
    return {path: _sha256(path) for path in paths}


def _registered() -> dict[str, Pattern]:
    return PATTERNS | _plugins()


@functools.cache
def _plugins() -> dict[str, Pattern]:
    """Patterns of other packages.

    Raises:
        RegistrationError: for a name that is registered twice.
    """
    found: dict[str, Pattern] = {}
    for where, function in registry.plugins(GROUP):
        if not callable(function):
            raise registry.RegistrationError(f"{where} of {GROUP} is not a function: {function!r}")
        info = Pattern.of(function)
        known = (PATTERNS | found).get(info.name)
        if known is not None and known.build is not function:  # the same one: it had @pattern
            raise registry.RegistrationError(
                f"{info.name!r} is registered twice in {GROUP}: by {known.build.__module__} "
                f"and by {where}"
            )
        found[info.name] = info
    return found


@functools.lru_cache(maxsize=64)
def _built(spec: Spec, seq_len: int, num_heads: int, key: tuple[object, ...]) -> Mask:
    info = pattern_info(spec)
    given = spec.kwargs | ({"num_heads": num_heads} if info.per_head else {})
    if info.name in PATTERNS:
        known: Mask = info.build(seq_len, **given)
        return known
    try:
        built = info.build(seq_len, **given)
    except Exception as error:  # somebody else's code: whatever it raises
        raise ValueError(f"mask {str(spec)!r}: {type(error).__name__}: {error}") from error
    if not isinstance(built, Mask):
        raise ValueError(f"mask {str(spec)!r} returned {type(built).__name__}, not AttnMask")
    if not isinstance(built, DilatedMask) and any(x.overlap_area() for x in distinct(built)):
        raise ValueError(f"mask {str(spec)!r} returned slices that overlap")
    return built


def _plain(key: str, value: Any) -> Value:
    """A parameter value as a spec holds it."""
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
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        raise ValueError(f"there is no file {path!r} to read a mask from") from None
