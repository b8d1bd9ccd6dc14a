"""``cpbench compile``: what compilers make of the Triton kernels, for GPUs that are not here.

The compiling happens in processes of its own (``cpbench.tools.aot``), without Triton's interpreter:
this one loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cpbench.core import registry
from cpbench.core.environment import usable_cores
from cpbench.core.problem import DTYPES
from cpbench.core.subprocess_call import answer, asked

TARGETS = (
    "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950"
)  # fmt: skip
HEAD_DIMS = (64, 96, 128, 192, 256)
INTERPRETER = ("TRITON_INTERPRET",)
CONFIG = ("rows", "cols", "num_warps", "num_stages", "descriptors")


def requests(
    operators: Sequence[str],
    targets: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    config: dict[str, int],
) -> list[dict[str, Any]]:
    """What to compile: each operator's kernels for each combination.

    Args:
        operators: none for all that compile.
        config: fields of a configuration in place of the table's.

    Raises:
        ValueError: for what there is not, with what there is.
    """
    compiling = sorted(name for name, info in registry.operators().items() if info.compiles)
    for what, given, known in (
        ("operator", operators, compiling),
        ("target", targets, TARGETS),
        ("dtype", dtypes, DTYPES),
        ("config", config, CONFIG),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"--{what}: {name!r} is none of {', '.join(known)}")
    for dim in head_dims:
        if not 8 <= dim <= 256:
            raise ValueError(f"--head-dim: {dim} is not between 8 and 256")
    if registry.missing_package(registry.operator_info(compiling[0])):
        raise ValueError("compile needs the Python package triton: pip install 'cpbench[triton]'")
    return [
        {
            "operator": operator, "target": target, "dtype": dtype, "head_dim": dim,
            "config": config,
        }
        for operator in operators or compiling
        for target in targets
        for dtype in dtypes
        for dim in head_dims
    ]  # fmt: skip


def compiled(wanted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of every kernel, in the order of the requests.

    Raises:
        RuntimeError: when a compiler process dies.
    """
    shares = min(usable_cores(), len(wanted))
    requests = [wanted[share::shares] for share in range(shares)]
    with asked("cpbench.tools.aot", requests, without=INTERPRETER) as processes:
        rows = [
            json.loads(line)
            for process in processes
            for line in answer(process, "compiling").splitlines()
        ]
    order = {_about(request): number for number, request in enumerate(wanted)}
    return sorted(rows, key=lambda row: order[_about(row)])


def _about(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("operator", "target", "dtype", "head_dim"))


def tune(
    operator: str, mask: str, problem: dict[str, Any], device: str
) -> Iterator[dict[str, Any]]:
    """The rows of ``cpbench.tools.tuner`` as they come.

    Raises:
        ValueError: for what the tuner refuses, or where there is no GPU.
        RuntimeError: when it dies.
    """
    if device != "cuda":
        raise ValueError(
            "tune measures on a GPU, and none is here; the table's configurations serve"
        )
    request = {"operator": operator, "mask": mask, "problem": problem, "device": device}
    with asked("cpbench.tools.tuner", [request], without=INTERPRETER) as [one]:
        assert one.process.stdout is not None
        for line in one.process.stdout:
            yield json.loads(line)
        answer(one, "tuning")


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For people."""
    return [
        {
            "target": row["target"], "dtype": row["dtype"], "head_dim": row["head_dim"],
            "kernel": row["kernel"], "config": row["config"],
            "registers": row.get("registers", ""), "spilled B": row.get("spill_bytes", ""),
            "shared KiB": f"{row.get('shared_bytes', 0) / 1024:.0f}",
            "tensor cols": row.get("tensor_columns", "") or "",
            "instruction": row.get("matrix_instruction", "").partition(".")[0],
            "occupancy": f"{100 * row['occupancy']:.0f} %" if "occupancy" in row else "",
            "verdict": row["verdict"],
        }
        for row in rows
    ]  # fmt: skip
