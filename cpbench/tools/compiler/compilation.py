"""``cpbench compile``: ahead-of-time compilation of the Triton kernels, for any GPU.

Compilation runs in subprocesses (``aot``), without Triton's interpreter; this one loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cpbench.core import registry
from cpbench.core.environment import usable_cores
from cpbench.core.problem import DTYPES
from cpbench.core.subprocess_call import read_reply, subprocesses
from cpbench.kernels.triton.configs import KERNELS

TARGETS = (
    "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950"
)  # fmt: skip
HEAD_DIMS = (64, 96, 128, 192, 256)
INTERPRETER_VARIABLES = ("TRITON_INTERPRET",)  # unset in subprocesses
TUNABLE = ("triton_band", "triton_block_sparse")  # operators with a table of configurations
CONFIG_FIELDS = ("rows", "cols", "num_warps", "num_stages", "descriptors", "launches")

MIXERS = "mixers"
SPILLS_OUTSIDE = "spills outside of its loops"
_AOT, _TUNER = (f"cpbench.tools.compiler.{name}" for name in ("aot", "tuner"))


def compile_requests(
    operators: Sequence[str],
    targets: Sequence[str],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    config: dict[str, int],
    head_dim_v: int = 0,
) -> list[dict[str, Any]]:
    """The requests to compile each operator for each target, dtype and head_dim.

    Args:
        operators: empty for all Triton operators; ``"mixers"`` are those of the mixers.
        config: fields that replace those of the shipped configuration.
        head_dim_v: of values; 0 for that of queries and keys.

    Raises:
        ValueError: for an unknown value (the message lists the known ones), or without Triton.
    """
    compilable = sorted(launch_lists())
    for option, values, allowed in (
        ("operator", operators, compilable),
        ("target", targets, TARGETS),
        ("dtype", dtypes, DTYPES),
        ("config", config, CONFIG_FIELDS),
    ):
        for name in values:
            if name not in allowed:
                raise ValueError(f"--{option}: {name!r} is not one of {', '.join(allowed)}")
    for option, dims in (("head-dim", head_dims), ("head-dim-v", (head_dim_v or 8,))):
        for dim in dims:
            if not 8 <= dim <= 256:
                raise ValueError(f"--{option}: {dim} is not between 8 and 256")
    if registry.missing_package(registry.operator_info("triton_band")):
        raise ValueError("compile needs the Python package triton: pip install 'cpbench[triton]'")
    return [
        {
            "operator": operator, "target": target, "dtype": dtype, "head_dim": dim,
            "head_dim_v": head_dim_v, "config": config,
        }
        for operator in operators or sorted(set(compilable) - {MIXERS})
        for target in targets
        for dtype in dtypes
        for dim in head_dims
    ]  # fmt: skip


def launch_lists() -> dict[str, str]:
    """``"module:attribute"`` of the function that lists the kernel launches, by operator, and of
    the mixers, which are no operators."""
    found = {name: info.compiles for name, info in registry.operators().items() if info.compiles}
    return found | {MIXERS: "cpbench.kernels.mixers.triton.launch:launches"}


def compile_kernels(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile in parallel; one row for each kernel, in the order of the requests.

    Raises:
        RuntimeError: if a compiler process dies.
    """
    workers = min(usable_cores(), len(requests))
    batches = [requests[worker::workers] for worker in range(workers)]
    with subprocesses(_AOT, batches, without=INTERPRETER_VARIABLES) as processes:
        rows = [
            json.loads(line)
            for process in processes
            for line in read_reply(process, "compiling").splitlines()
        ]
    order = {_request_key(request): number for number, request in enumerate(requests)}
    return sorted(rows, key=lambda row: order[_request_key(row)])


def _request_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a request and the rows of its kernels have in common."""
    return tuple(row[key] for key in ("operator", "target", "dtype", "head_dim"))


def tune(
    operator: str, mask: str, problem: dict[str, Any], device: str, kernels: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Run ``cpbench.tools.compiler.tuner`` and yield its rows as they are measured.

    Args:
        kernels: to tune; all of ``KERNELS`` if empty.

    Raises:
        ValueError: for a request that the tuner refuses, or without a GPU.
        RuntimeError: if the tuner dies.
    """
    if operator not in TUNABLE:
        raise ValueError(f"--operator: {operator!r} is not one of {', '.join(TUNABLE)}")
    for kernel in kernels:
        if kernel not in KERNELS:
            raise ValueError(f"--kernel: {kernel!r} is not one of {', '.join(KERNELS)}")
    if device != "cuda":
        raise ValueError("tune needs a GPU, and there is none; the shipped configurations are used")
    request = {"operator": operator, "mask": mask, "problem": problem, "device": device}
    request["kernels"] = list(kernels)
    with subprocesses(_TUNER, [request], without=INTERPRETER_VARIABLES) as [tuner]:
        assert tuner.process.stdout is not None
        for line in tuner.process.stdout:
            yield json.loads(line)
        read_reply(tuner, "tuning")


def compiles_well(row: dict[str, Any]) -> bool:
    """Whether a kernel is as it should be; registers spilled outside of its loops cost next to
    nothing."""
    return row["verdict"] in ("ok", SPILLS_OUTSIDE)


def _head_dims(row: dict[str, Any]) -> int | str:
    """The head dimension, with that of values where it is another one: ``"192/128"``."""
    dim, of_values = row["head_dim"], row["head_dim_v"]
    return f"{dim}/{of_values}" if of_values else int(dim)


def _matrix_use(row: dict[str, Any]) -> str:
    """The matrix instruction of a kernel, and how many a warp issues in the hot loop for each tile
    of 64 x 64 scores."""
    name: str = row.get("matrix_instruction", "").partition(".")[0]
    if not row.get("matrix_instructions"):
        return name
    rows, cols = row["tile"]
    if not rows * cols:  # no tile of scores
        return name
    return (
        f"{name}, {row['matrix_instructions'] * 64 / rows * 64 / cols:.3g} a warp for 64x64 scores"
    )


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a terminal, of rows of :func:`compile_kernels`."""
    return [
        {
            "target": row["target"], "dtype": row["dtype"], "head_dim": _head_dims(row),
            "kernel": row["kernel"].rpartition(".")[2],
            "registers": row.get("registers", ""), "spilled bytes": row.get("spill_bytes", ""),
            "shared KiB": f"{row.get('shared_bytes', 0) / 1024:.0f}",
            "tensor cols": row.get("tensor_columns", "") or "",
            "summary": "; ".join(filter(None, [
                " ".join(filter(None, (row["kernel"].rpartition(".")[0], row["config"])))
                + f": {row['verdict']}",
                _matrix_use(row),
                f"occupancy {100 * row['occupancy']:.0f} %" if "occupancy" in row else "",
            ])),
        }
        for row in rows
    ]  # fmt: skip
