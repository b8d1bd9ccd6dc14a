"""A cluster file in TOML, with the interval of each fitted constant beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from cpbench.simulator.cluster import Cluster

COMMENT_COLUMN = 42


def to_toml(cluster: Cluster, notes: Mapping[str, str]) -> str:
    """The text of a cluster file, which :func:`cpbench.simulator.cluster.load` reads back.

    Args:
        notes: comments by the path of a constant, such as ``kernels.0.fwd.tflops``.
    """
    lines = [f"name = {_value(cluster.name)}", f"gpus_per_node = {cluster.gpus_per_node}"]
    for name in ("calibrated", "gpu"):
        lines += ["", f"[{name}]", *_rows(getattr(cluster, name), name, notes)]
    for name in ("kernels", "mixers"):
        for index, kernel in enumerate(getattr(cluster, name)):
            path = f"{name}.{index}"
            lines += ["", f"[[{name}]]", *_rows(kernel, path, notes)]
            for phase in ("fwd", "bwd"):
                if (costs := getattr(kernel, phase)) is not None:
                    lines += ["", f"[{name}.{phase}]", *_rows(costs, f"{path}.{phase}", notes)]
    for name, link in cluster.links.items():
        lines += ["", f"[links.{name}]", *_rows(link, f"links.{name}", notes)]
    for item in fields(cluster):
        table = getattr(cluster, item.name)
        if item.name in ("collectives", "memory") and table != item.default:
            lines += ["", f"[{item.name}]", *_rows(table, item.name, notes)]
    return "\n".join(lines) + "\n"


def _rows(table: Any, path: str, notes: Mapping[str, str]) -> Iterator[str]:
    """The values of a dataclass, but for tables."""
    for item in fields(table):
        value = getattr(table, item.name)
        if isinstance(value, bool | int | float | str | tuple):
            row, note = f"{item.name} = {_value(value)}", notes.get(f"{path}.{item.name}", "")
            yield f"{row:{COMMENT_COLUMN}} # {note}" if note else row


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False)  # strings of TOML have the escapes of JSON
