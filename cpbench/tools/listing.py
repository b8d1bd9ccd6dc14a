"""What ``cpbench list`` shows, read from declarations alone."""

from __future__ import annotations

from typing import Any

from cpbench import inputs, masks
from cpbench.core import registry
from cpbench.core.operator import declared_refusal
from cpbench.core.problem import DTYPES, Problem
from cpbench.parallel import layout
from cpbench.sweep import sweep_file


def rows(kind: str, device: str) -> list[dict[str, Any]]:
    """One row for each registered thing of a kind (operators, strategies, layouts, …)."""
    return {
        "operators": _operators,
        "strategies": _strategies,
        "layouts": _layouts,
        "masks": _masks,
        "inputs": _inputs,
        "sweeps": _sweeps,
    }[kind](device)


def _operators(device: str) -> list[dict[str, Any]]:
    return [
        {
            "operator": info.name,
            "here": _here(info, device),
            "masks": _masks_of(info),
            "dtypes": _dtypes_of(info),
            "dim": info.max_head_dim,
            "backward": [d for d in info.devices if d in info.backward_on] or ["no"],
            "merges": _merges(info, device),
            "stable": "yes" if info.deterministic else "no",
            "summary": _summary(info),
        }
        for _, info in sorted(registry.operators().items())
    ]


def _summary(info: registry.OperatorInfo) -> str:
    """With what was never run, and how to get what is not there."""
    told = [f"never run; written against {info.unproven}"] if info.unproven else []
    if info.install and registry.missing_package(info):
        told.append(info.install)
    return f"{info.summary} ({'; '.join(told)})" if told else info.summary


def _dtypes_of(info: registry.OperatorInfo) -> list[str]:
    kinds = set(info.dtypes)
    if kinds >= set(DTYPES):
        return ["any", "f64"] if "float64" in kinds else ["any"]
    return ["half"] if kinds == {"bfloat16", "float16"} else list(info.dtypes)


def _masks_of(info: registry.OperatorInfo) -> list[str]:
    kinds = set(info.masks)
    shared = [kind for kind in info.masks if kind not in ("empty", "heads")]
    named = ["any"] if kinds >= set(registry.ANY_MASK) else shared
    return named + (["heads"] if "heads" in kinds else [])


def _here(info: registry.OperatorInfo, device: str) -> str:
    """``yes``, ``forward only`` (``never run``, where it never was), or why not."""
    if device in info.devices and (missing := registry.missing_package(info)):
        return f"no: needs {missing}"
    for direction, answer in (("fwd_bwd", "yes"), ("fwd", "forward only")):
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
            return f"{answer}, never run" if info.unproven else answer
    return f"no: {(reason or '').removeprefix(f'{info.name} ')}"


def _merges(info: registry.OperatorInfo, device: str) -> str:
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
            "operators": "merging" if info.merges else "any",
            "here": _here_or_missing(info),
            "summary": info.summary,
            "source": info.source,
        }
        for _, info in sorted(registry.strategies().items())
    ]


def _here_or_missing(info: registry.StrategyInfo) -> str:
    missing = registry.missing_package(info)
    return f"no: needs {missing}" if missing else "yes"


def _layouts(device: str) -> list[dict[str, Any]]:
    return [{"layout": name, "summary": layout.summary(name)} for name in layout.names()]


def _masks(device: str) -> list[dict[str, Any]]:
    return [
        {
            "mask": name,
            "parameters": [
                key if value is None else f"{key}={value}" for key, value in info.params.items()
            ],
            "summary": info.summary,
        }
        for name, info in masks.describe().items()
    ]


def _inputs(device: str) -> list[dict[str, Any]]:
    return [
        {
            "inputs": name,
            "parameters": [
                key if value is None else f"{key}={value}" for key, value in kind.params.items()
            ],
            "summary": kind.summary,
        }
        for name, kind in inputs.KINDS.items()
    ]


def _sweeps(device: str) -> list[dict[str, Any]]:
    return [
        {"sweep": name, "cases": len(sweep_file.load(name).cases), "description": text}
        for name, text in sweep_file.packaged().items()
    ]
