"""Checks of tables that were read from a run directory: types, signs and shapes.

A wrong value is a ``ValueError`` that names it: ``times_us.fwd[0][3] = 'x' is not a number``.  All
numbers are finite, since the parser refuses others.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

PHASES = frozenset(("fwd", "bwd"))
VARIANTS = frozenset(("whole", "compute", "transfer"))  # of exposure_us
PARTS = frozenset(("select", "plan", "kernel"))  # of parts_us
MIXER_PARTS = frozenset(("summarise",))  # of those of sequence mixers
PER_RANK = (
    "memory_bytes", "bytes_sent", "bytes_across", "messages", "predicted_bytes", "allgather_bytes",
    "bytes_to_device", "bytes_to_host", "predicted_to_device", "predicted_to_host",
)  # fmt: skip
LATEST_S = 253_402_300_799  # the end of the year 9999, in seconds since the epoch

Fault = Callable[[Any], str]  # what is wrong with a value: "" if nothing
Rule = tuple[frozenset[type], Fault]  # types whose empty values are right, and the fault of others

_KINDS: dict[Any, frozenset[type]] = {int: frozenset((int,)), float: frozenset((int, float))}


def rule(hint: Any) -> Rule:
    """The rule for values of a declared type, such as ``dict[str, list[float]]``; no number may be
    negative, and no bool is a number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # with None
        kinds, fault = rule(arguments[0])
        return kinds | {types.NoneType}, lambda value: "" if value is None else fault(value)
    if hint in _KINDS:
        return _KINDS[hint], _number(hint)
    if origin is list:
        items = typing.get_args(arguments[0])
        kinds = _KINDS.get(items[0] if items else arguments[0], frozenset())
        return frozenset((list,)), _list(rule(arguments[0])[1], kinds, rows=bool(items))
    if origin is dict:
        fault_of_item = None if arguments[1] is Any else rule(arguments[1])[1]
        return frozenset((dict,)), _dict(fault_of_item)
    return frozenset((hint,)), (
        lambda value: "" if type(value) is hint else f" = {value!r} is no {hint.__name__}"
    )


def _number(hint: Any) -> Fault:
    kinds, name = _KINDS[hint], "a whole number" if hint is int else "a number"

    def fault(value: Any) -> str:
        if type(value) not in kinds:
            return f" = {value!r} is not {name}"
        return f" = {value!r} is negative" if value < 0 else ""

    return fault


def _list(fault_of_item: Fault, kinds: frozenset[type], rows: bool) -> Fault:
    """The fault of lists: of numbers of these types, of rows of such numbers, or of others."""

    def fault(value: Any) -> str:
        if type(value) is not list:
            return f" = {value!r} is no list"
        if kinds and value and (not rows or ({*map(type, value)} == {list} and all(value))):
            numbers = [*chain.from_iterable(value)] if rows else value
            if kinds.issuperset(map(type, numbers)) and min(numbers) >= 0:
                return ""  # fast: most of a record are numbers
        for i, item in enumerate(value):
            if text := fault_of_item(item):
                return f"[{i}]{text}"
        return ""

    return fault


def _dict(fault_of_item: Fault | None) -> Fault:
    """The fault of tables, of any values if their fault is None."""

    def fault(value: Any) -> str:
        if type(value) is not dict:
            return f" = {value!r} is no table"
        for key, item in value.items() if fault_of_item else ():
            if fault_of_item and (text := fault_of_item(item)):
                return f".{key}{text}"
        return ""

    return fault


def checked_values(table: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The values of a table for which there are rules; some may be absent.

    Raises:
        ValueError: for the first wrong one.
    """
    values = {}
    for name, value in table.items():
        if name in rules:
            kinds, fault = rules[name]
            if (value or type(value) not in kinds) and (text := fault(value)):
                raise ValueError(f"{name}{text}")
            values[name] = value
    return values


ENVIRONMENT = {
    name: rule(hint)
    for name, hint in {
        "id": str,
        "host": str,
        "memory_bytes": int,
        "packages": dict[str, str],
        "variables": dict[str, str],
        "device": dict[str, Any],
        "peaks": dict[str, float],
        "ranks": list[dict[str, Any]],
        "nodes": list[dict[str, Any]],
    }.items()
}
DEVICE = {"memory_bytes": rule(int)}
TELEMETRY = {
    "power_w": rule(dict[str, float]),
    "sm_mhz": rule(dict[str, float]),
    "held_down_by": rule(list[str]),
}


def check_environment(table: Mapping[str, Any]) -> None:
    """Check an environment record.

    Raises:
        ValueError: for a value of the wrong type.
    """
    checked_values(table, ENVIRONMENT)
    checked_values(table.get("device", {}), DEVICE)


def check_shapes(values: Mapping[str, Any], world_size: int) -> None:
    """Check the values of a record, whose types are right: known names, one item for each rank,
    equally many iterations on each.

    Raises:
        ValueError: for the first wrong one.
    """
    get = values.get
    iterations = 0
    if times_us := get("times_us"):
        _check_names("times_us", times_us, PHASES)
        iterations = _check_samples("times_us", times_us.values(), world_size)
    if pace_us := get("pace_us"):
        paced = _check_samples("pace_us", (pace_us,), world_size)
        if iterations and paced != iterations:
            raise ValueError(f"pace_us has {paced} iterations, times_us {iterations}")
    if parts_us := get("parts_us"):
        known = MIXER_PARTS if MIXER_PARTS.issuperset(parts_us) else PARTS
        _check_names("parts_us", parts_us, known, all_of_them=True)
        for name, ranks in parts_us.items():
            _check_samples(f"parts_us.{name}", (ranks,), world_size)
    if exposure_us := get("exposure_us"):
        _check_names("exposure_us", exposure_us, VARIANTS, all_of_them=True)
        for name, times in exposure_us.items():
            _check_names(f"exposure_us.{name}", times, PHASES)
        samples = [ranks for times in exposure_us.values() for ranks in times.values()]
        _check_samples("exposure_us", samples, world_size)
    for name in PER_RANK:
        if by_kind := get(name):
            _check_ranks(name, by_kind.values(), world_size)
    for name in ("balance", "threads_after"):
        if by_rank := get(name):
            _check_ranks(name, (by_rank,), world_size)
    if flops := get("flops"):
        _check_names("flops", flops, PHASES)
    for check, errors in get("errors", {}).items():
        for tensor, error in errors.items():
            if "rel_l2" not in error:
                raise ValueError(f"errors.{check}.{tensor} has no rel_l2")
    for rank in get("telemetry", ()):
        checked_values(rank, TELEMETRY)
    if (started := get("started", 0)) > LATEST_S:
        raise ValueError(f"started = {started} is no time")


def _check_names(
    name: str, table: Mapping[str, Any], known: frozenset[str], all_of_them: bool = False
) -> None:
    if not known.issuperset(table) or (all_of_them and len(table) < len(known)):
        has, takes = (", ".join(sorted(names)) or "nothing" for names in (table, known))
        raise ValueError(f"{name} has {has}, not {takes}")


def _check_samples(name: str, samples: Collection[Sequence[Any]], world_size: int) -> int:
    """Check samples ``[rank][iteration]`` of phases; the number of iterations."""
    _check_ranks(name, samples, world_size)
    lengths = {*map(len, chain.from_iterable(samples))}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"{name} has {' and '.join(map(str, sorted(lengths)))} iterations")
    return max(lengths, default=0)


def _check_ranks(name: str, lists: Iterable[Sequence[Any]], world_size: int) -> None:
    for ranks in lists:
        if len(ranks) != world_size:
            raise ValueError(f"{name} has {len(ranks)} ranks, the case {world_size}")
