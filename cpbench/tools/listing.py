"""Rows of ``cpbench list``, read from declarations; no operator or strategy is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpbench import inputs, masks
from cpbench.core import registry
from cpbench.core.operator import declared_refusal
from cpbench.core.problem import DTYPES, Problem
from cpbench.parallel import layout
from cpbench.sweep import sweep_file

# Headings of printed tables whose keys in JSON differ.
HEADINGS = {
    "here": "available",
    "of all heads alike": "shared masks",
    "of each head": "per-head masks",
    "backward": "bwd",
    "of selectors": "selections",
    "": "note",
}


# Notes on what operators a strategy takes, where that is not all of attention.
_OPERATORS = {
    "merging": "needs an operator that merges",
    "mixer": "takes no attention",
    "any": "also sequence mixers",
}


def rows(kind: str, device: str) -> list[dict[str, Any]]:
    """The rows of a listing, one for each registered entry.

    Args:
        kind: operators, strategies, layouts, masks, inputs or sweeps.
        device: ``"cpu"`` or ``"cuda"``.
    """
    return {
        "operators": _operators,
        "strategies": _strategies,
        "layouts": _layouts,
        "masks": _masks,
        "inputs": _inputs,
        "sweeps": _sweeps,
    }[kind](device)


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a listing for a terminal.

    Why an operator or strategy is not available, and that it is a sequence mixer, is moved to the
    line below it, its summary.
    """
    shown = []
    for row in rows:
        cells = dict(row)
        if "here" in row:
            verdict, _, reason = row["here"].partition(": ")
            cells["here"] = verdict.removesuffix(", never run")
            if reason:
                cells["summary"] = f"{row['summary']}; not available: {reason}"
        if cells.pop("kind", "") == "mixer":
            cells["summary"] = f"sequence mixer: {cells['summary']}"
        if note := _OPERATORS.get(cells.pop("operators", "")):
            cells["summary"] = f"{cells['summary']}; {note}"
        if cells.pop("stable", "yes") == "no":
            cells["summary"] = f"{cells['summary']}; not deterministic"
        shown.append({HEADINGS.get(key, key): value for key, value in cells.items()})
    return shown


def _operators(device: str) -> list[dict[str, Any]]:
    return [
        {
            "operator": info.name,
            "kind": "selector" if info.selects else info.kind,
            "here": _operator_availability(info, device),
            "masks": _mask_names(info),
            "dtypes": _dtype_names(info),
            "dim": info.max_head_dim,
            "backward": [name for name in info.devices if name in info.backward_on] or ["no"],
            "merges": _merges(info, device),
            "stable": "yes" if info.deterministic else "no",
            "summary": _summary(info),
        }
        for _, info in sorted(registry.operators().items())
    ]


def _summary(info: registry.OperatorInfo) -> str:
    """The summary of an operator, with a note if it was never run or is not installed."""
    notes = [f"never run; written against {info.unproven}"] if info.unproven else []
    if info.install and registry.missing_package(info):
        notes.append(info.install)
    return f"{info.summary} ({'; '.join(notes)})" if notes else info.summary


def _dtype_names(info: registry.OperatorInfo) -> list[str]:
    """The dtypes of an operator, abbreviated: ``any``, ``half`` or single ones."""
    dtypes = set(info.dtypes)
    if dtypes >= set(DTYPES):
        return ["any", "f64"] if "float64" in dtypes else ["any"]
    return ["half"] if dtypes == {"bfloat16", "float16"} else list(info.dtypes)


def _mask_names(info: registry.OperatorInfo) -> list[str]:
    """The kinds of masks of an operator, abbreviated: ``any`` or single ones (``docs`` are causal
    documents), then ``heads``."""
    kinds = set(info.masks)
    shared = [kind for kind in info.masks if kind not in ("empty", "heads")]
    shared = ["docs" if kind == "causal_document" else kind for kind in shared]
    names = ["any"] if kinds >= set(registry.ANY_MASK) else shared
    return names + (["heads"] if "heads" in kinds else [])


def _operator_availability(info: registry.OperatorInfo, device: str) -> str:
    """``yes``, ``forward only`` (either with ``, never run``), or ``no: `` with the reason."""
    if device in info.devices and (missing := registry.missing_package(info)):
        return f"no: needs {missing}"
    for direction, verdict in (("fwd_bwd", "yes"), ("fwd", "forward only")):
        dtype = next((name for name in DTYPES if name in info.dtypes), info.dtypes[0])
        problem = Problem(
            batch=1,
            seq_q=1,
            seq_k=1,
            heads_q=1,
            heads_kv=1,
            head_dim=64,
            dtype=dtype,
            direction=direction,
        )
        reason = declared_refusal(info, problem, device)
        if reason is None:
            return f"{verdict}, never run" if info.unproven else verdict
    return f"no: {(reason or '').removeprefix(f'{info.name} ')}"


def _merges(info: registry.OperatorInfo, device: str) -> str:
    """Whether partial results of an operator can be merged: ``yes``, ``forward`` or ``no``."""
    if info.selects or not info.mergeable or device not in info.lse_on:
        return "no"
    return "yes" if info.external_lse else "forward"


def _strategies(device: str) -> list[dict[str, Any]]:
    return [
        {
            "strategy": info.name,
            "layouts": ["any"] if info.layouts == registry.ANY_LAYOUT else list(info.layouts),
            "parameters": list(info.params),
            "placements": list(info.axes),
            "operators": _operators_of(info),
            "here": _strategy_availability(info),
            "summary": info.summary,
            "source": info.source,
        }
        for _, info in sorted(registry.strategies().items())
    ]


def _operators_of(info: registry.StrategyInfo) -> str:
    """``attention``, ``mixer``, ``any`` of both, or ``merging`` operators of attention."""
    if info.merges:
        return "merging"
    return "any" if len(info.kinds) > 1 else info.kinds[0]


def _strategy_availability(info: registry.StrategyInfo) -> str:
    """``yes``, or ``no: `` with the missing package."""
    missing = registry.missing_package(info)
    return f"no: needs {missing}" if missing else "yes"


def _parameters(params: Mapping[str, Any]) -> list[str]:
    """Parameters with their defaults, where they have one."""
    return [key if value is None else f"{key}={value}" for key, value in params.items()]


def _layouts(device: str) -> list[dict[str, Any]]:
    return [{"layout": name, "summary": layout.summary(name)} for name in layout.names()]


def _masks(device: str) -> list[dict[str, Any]]:
    return [
        {
            "mask": name,
            "parameters": _parameters(info.params),
            "summary": info.summary,
        }
        for name, info in masks.describe().items()
    ]


def _inputs(device: str) -> list[dict[str, Any]]:
    return [
        {
            "inputs": name,
            "parameters": _parameters(kind.params),
            "summary": kind.summary,
        }
        for name, kind in inputs.KINDS.items()
    ]


def _sweeps(device: str) -> list[dict[str, Any]]:
    return [
        {"sweep": name, "cases": len(sweep_file.load(name).cases), "description": text}
        for name, text in sweep_file.packaged_sweeps().items()
    ]
