"""Sweep files: TOML tables whose values may be lists, expanded to cases.

::

    [sweep]                       # the Cartesian product of all lists
    operator = ["bands", "sdpa.cpu_flash"]
    mask = ["causal", {name = "causal_document", corpus = "pile", seed = [0, 1, 2]}]
    seq_len = ["4k", "16k"]

    [[include]]                   # another product; its keys replace those of [sweep]
    strategy = ["ring", "ulysses"]
    world_size = [2, 4]

    [[exclude]]                   # cases that match every key are dropped
    strategy = "ulysses"
    world_size = 4

    [measure]                     # see cpbench.core.settings.MeasureSettings
    precision = 0.02

All values are checked here, before anything starts; each error is one line.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from cpbench import inputs, masks
from cpbench.core.problem import DIRECTIONS, DTYPES, PHASES, Case
from cpbench.core.registry import (
    check_params,
    operator_info,
    strategy_info,
)
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec, Value, format_size, parse_size
from cpbench.core.user_files import count_from
from cpbench.inputs import rope
from cpbench.parallel import layout
from cpbench.sweep import decoding
from cpbench.sweep.cases import build_case
from cpbench.sweep.content_hash import with_content_hashes
from cpbench.sweep.refusals import leave_out_refused

SPEC_KEYS = ("operator", "strategy", "layout", "mask", "inputs", "rope")
INT_KEYS = (
    "batch",
    "seq_len",
    "queries",
    "num_heads_q",
    "num_heads_kv",
    "head_dim",
    "head_dim_v",
    "page_size",
    "world_size",
    "ranks_per_node",
    "seed",
)
CHOICES = {"dtype": DTYPES, "direction": DIRECTIONS, "phase": PHASES}
KEYS = (*SPEC_KEYS, *INT_KEYS, *CHOICES, "key_lens", "placement")
ZERO_ALLOWED = ("seed", "ranks_per_node", "queries", "head_dim_v", "page_size")
PACKAGED = resources.files("cpbench.sweep") / "packaged"
TABLES = ("sweep", "include", "exclude", "measure", "description")

# Above these limits, which only typing errors exceed, planning alone would exhaust the machine.
MAX_CASES = 100_000
MAX_VALUES = {
    "batch": 1 << 16,
    "seq_len": 1 << 26,
    "queries": 1 << 26,
    "num_heads_q": 1 << 12,
    "num_heads_kv": 1 << 12,
    "head_dim": 1 << 14,
    "head_dim_v": 1 << 14,
    "page_size": 1 << 14,
    "world_size": 1 << 14,
    "ranks_per_node": 1 << 14,
    "seed": (1 << 63) - 1,
}


class SweepError(ValueError):
    """A sweep that cannot be run as written; the message is one line and says what is allowed."""


@dataclass(frozen=True)
class Sweep:
    """An expanded sweep.

    Attributes:
        name: of the file, for people.
        cases: without duplicates, in the order written.
        settings: how the cases are measured.
        left_out: number of combinations that no machine can run, by reason.
    """

    name: str
    cases: tuple[Case, ...]
    settings: MeasureSettings
    left_out: Counter[str] = field(default_factory=Counter)


def packaged_sweeps() -> dict[str, str]:
    """Descriptions of the sweeps that come with cpbench, by name."""
    descriptions = {}
    for file in sorted(PACKAGED.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            table = tomllib.loads(file.read_text("utf-8-sig"))
            descriptions[file.name.removesuffix(".toml")] = str(table.get("description", ""))
    return descriptions


def load(name: str) -> Sweep:
    """Load a sweep from a file, or a packaged one by name.

    Raises:
        SweepError: when it cannot be read or is not valid.
    """
    path = Path(name)
    try:
        if path.suffix == ".toml" or path.is_file():
            text, title = path.read_text(encoding="utf-8-sig"), path.stem
        elif name in packaged_sweeps():
            text = PACKAGED.joinpath(f"{name}.toml").read_text("utf-8")
            title = name
        else:
            raise SweepError(
                f"no sweep {name!r}: neither a file nor one of {', '.join(packaged_sweeps())}"
            )
        table = tomllib.loads(text)
    except OSError as error:
        raise SweepError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SweepError(f"cannot read {name}: it is not UTF-8 text") from None
    except RecursionError:
        raise SweepError(f"{name} is nested too deeply") from None
    except SweepError:
        raise
    except ValueError as error:  # TOMLDecodeError, or an integer of too many digits
        raise SweepError(f"{name} is not TOML: {' '.join(str(error).split())}") from None
    count_from(path.parent if path.is_file() else Path())
    try:
        return expand(table, title)
    except ValueError as error:
        raise SweepError(f"{name}: {error}") from None


def expand(table: Mapping[str, Any], name: str) -> Sweep:
    """Expand the parsed tables of a sweep file.

    Raises:
        ValueError: for what is not valid, in one line.
    """
    for key in table:
        if key not in TABLES:
            raise ValueError(f"no table {key!r}; there are: {', '.join(TABLES)}")
    if not isinstance(table.get("description", ""), str):
        raise ValueError(f"description = {table['description']!r} is not a string")
    base = _checked_table("sweep", table.get("sweep", {}))
    includes = _checked_tables("include", table.get("include", []))
    excludes = _checked_tables("exclude", table.get("exclude", []))
    settings = MeasureSettings.from_table(_checked_table("measure", table.get("measure", {})))
    if not base and not includes:
        raise ValueError("there is neither a [sweep] nor an [[include]] table: nothing to run")
    tables = [base] if base else []
    tables += [{**base, **include} for include in includes]
    all_cases = list(itertools.chain.from_iterable(map(expand_table, tables)))
    rules = [{key: parse_values(key, value) for key, value in rule.items()} for rule in excludes]
    for rule, written in zip(rules, excludes, strict=True):
        if not any(matches(case, rule) for case in all_cases):
            raise ValueError(f"[[exclude]] {written!r} matches no case")
    cases: dict[str, Case] = {}
    for case in all_cases:
        if not any(matches(case, rule) for rule in rules):
            cases.setdefault(case.id, case)
    if not cases:
        raise ValueError("every case is excluded: nothing to run")
    kept, left_out = leave_out_refused(cases.values())
    if not kept:
        raise ValueError(f"nothing to run: {', '.join(left_out)}; give a strategy for more ranks")
    return Sweep(name, tuple(kept), settings, left_out)


def expand_table(table: Mapping[str, Any]) -> list[Case]:
    """The Cartesian product of one table of lists as cases, checked without torch.

    Raises:
        ValueError: for what no machine could run, in one line.
    """
    for key in SPEC_KEYS:
        if key not in table:  # the default must be valid too
            _CHECKS[key](getattr(Case(), key))
    keys = [key for key in KEYS if key in table]
    columns = [parse_values(key, table[key]) for key in keys]
    size = math.prod(map(len, columns))
    if size > MAX_CASES:
        raise ValueError(f"the lists multiply to {size} cases; at most {MAX_CASES} are allowed")
    cases = [build_case(dict(zip(keys, row, strict=True))) for row in itertools.product(*columns)]
    distinct_masks = {(str(case.mask), case.seq_len): case for case in cases}
    for case in distinct_masks.values():
        _check_mask(case.mask, case.seq_len)
    return with_content_hashes(cases)


def parse_integer(key: str, item: Any) -> int:
    """The value of one of ``INT_KEYS``, given as an integer or a text such as ``"64k"``.

    Raises:
        ValueError: for anything else, or a value out of bounds.
    """
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise ValueError(f"{key} = {item!r} is not an integer")
    try:
        value = parse_size(item)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if value < (0 if key in ZERO_ALLOWED else 1):
        raise ValueError(
            f"{key} = {value} must be {'0 or more' if key in ZERO_ALLOWED else 'positive'}"
        )
    if value > MAX_VALUES[key]:
        raise ValueError(f"{key} = {item} is too large: at most {format_size(MAX_VALUES[key])}")
    return value


def split_list(text: str) -> list[str]:
    """Split ``"a,b:x=1,y=2,c"`` into ``["a", "b:x=1,y=2", "c"]``: a comma before ``key=`` or inside
    brackets belongs to the item."""
    items = re.split(r",(?![^\[]*\])(?!\s*\w+=)", text)
    return [item.strip() for item in items]


def parse_values(key: str, value: Any) -> list[Any]:
    """The list of values of one key, each converted and checked."""
    _check_key(key)
    if key == "key_lens":
        return list(decoding.parse_key_lens(value))
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"{key} = [] is an empty list; give at least one value")
    if key in SPEC_KEYS:
        specs = [spec for item in items for spec in parse_specs(key, item)]
        for spec in specs:
            _CHECKS[key](spec)
        return specs
    return [_parse_scalar(key, item) for item in items]


def _parse_scalar(key: str, item: Any) -> Any:
    if key in CHOICES:
        if item not in CHOICES[key]:
            raise ValueError(f"{key} = {item!r} is not one of {', '.join(CHOICES[key])}")
        return item
    if key == "placement":
        if not isinstance(item, str):
            raise ValueError(f"placement = {item!r} is not the name of a mesh axis")
        return item
    return parse_integer(key, item)


def parse_specs(key: str, item: Any) -> list[Spec]:
    """The specs of one item, which need not be registered; a parameter with a list of values (such
    as mask seeds) is another axis of the product, except where the parameter is itself a list."""
    parse_spec: Callable[[Any], Spec] = _PARSERS.get(key, Spec.parse)
    try:
        spec = parse_spec(item)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    columns: list[list[tuple[str, Value]]] = []
    for name, value in spec.params:
        values = value if isinstance(value, tuple) and name != "doc_lens" else (value,)
        if not values:
            raise ValueError(f"{key} {spec.name}: {name} = [] is an empty list; give a value")
        columns.append([(name, value) for value in values])
    return [parse_spec(Spec(spec.name, params)) for params in itertools.product(*columns)]


def _check_operator(spec: Spec) -> None:
    check_params("operator", spec.name, spec.kwargs, operator_info(spec.name).params)


def _check_strategy(spec: Spec) -> None:
    check_params("strategy", spec.name, spec.kwargs, strategy_info(spec.name).params)


def _check_mask(spec: Spec, seq_len: int) -> None:
    mask = masks.build_heads(spec, seq_len, 1)
    if (mask.seq_q, mask.seq_k) != (seq_len, seq_len):
        raise ValueError(f"mask {spec} is {mask.seq_q} x {mask.seq_k}; a sweep takes square masks")


_CHECKS: dict[str, Callable[[Spec], object]] = {
    "operator": _check_operator,
    "strategy": _check_strategy,
    "layout": lambda spec: layout.build(spec, 1, 1, masks.build("causal", 1)),
    "mask": masks.pattern_info,
    "inputs": inputs.input_kind,
    "rope": rope.check_names,
}
_PARSERS: dict[str, Callable[[Any], Spec]] = {"inputs": inputs.parse, "rope": rope.parse}


def matches(case: Case, rule: Mapping[str, Sequence[Any]]) -> bool:
    """Whether each key of a case has one of the values that a rule lists for it."""
    for key, allowed in rule.items():
        value = getattr(case, key)
        name_only = Spec(value.name) if isinstance(value, Spec) else value
        if value not in allowed and name_only not in allowed:
            return False
    return True


def _check_key(key: str) -> None:
    if key not in KEYS:
        raise ValueError(f"no key {key!r}; there are: {', '.join(KEYS)}")


def _checked_table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a table: write [{name}]")
    if name != "measure":
        for key in value:
            _check_key(key)
    return value


def _checked_tables(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list of tables: write [[{name}]]")
    if {} in value:  # an exclude without a key would match every case
        raise ValueError(f"an [[{name}]] is empty; it takes {', '.join(KEYS)}")
    return [_checked_table(name, item) for item in value]


assert set(KEYS) | {"content"} == {item.name for item in fields(Case)}
