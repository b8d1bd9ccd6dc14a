"""Autotuner of the Triton kernels: find the fastest configuration of each on this GPU.

``python -m cpbench.tools.compiler.tuner``, started by ``cpbench tune``: reads a JSON request from
stdin and prints one JSON line per configuration.  Kernels are tuned one by one, with the others in
their shipped configuration.  Only configurations that compile well are measured (``aot``: a matrix
instruction, enough memory, no spills in loops with matrix instructions, nothing computed twice),
and only if their results agree with those of the shipped configuration.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.core.registry import implementation, operator_info
from cpbench.core.tolerance import LIMITS
from cpbench.inputs import Recipe
from cpbench.kernels.triton import configs as triton_configs
from cpbench.kernels.triton.launch import compile_target, gpu_name, widest_head_dim
from cpbench.masks.head_masks import per_head as per_head_of
from cpbench.measure.device.opening import device_shortage, open_device
from cpbench.measure.device.protocol import Device
from cpbench.results.store import write_atomically
from cpbench.tools.compiler.aot import compile_launch, kernel_launches
from cpbench.tools.compiler.compilation import compiles_well
from cpbench.verify.check import make_inputs

REPEATS = 15
ROWS_PER_WARP = 16  # of Hopper's matrix instruction, whose four warps have 64
GRID = {
    "rows": (64, 128),
    "cols": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "descriptors": (0, 1),
    "launches": (1, 2),  # of backward_dkv
}
SMALL_GRID = {
    **GRID, "rows": (32, 64), "cols": (32,), "num_warps": (2,), "num_stages": (1,), "launches": (1,)
}  # fmt: skip


def tune(
    operator: str,
    mask: str,
    problem: Problem,
    device: Device,
    grid: dict[str, tuple[int, ...]],
    kernels: Sequence[str] = triton_configs.KERNELS,
) -> Iterator[dict[str, Any]]:
    """Measure every configuration and save the fastest of each kernel.

    Args:
        operator: one that compiles ahead of time.
        mask: to measure on.
        problem: to measure; the result is used for its dtype and head_dim.
        grid: values of each field of a configuration.
        kernels: to tune; what was saved of the others is kept.

    Yields:
        A row per configuration, and one per kernel with the fastest (``chosen``).

    Raises:
        ValueError: for a mask that the operator does not take, or a damaged file of results.
    """
    info = operator_info(operator)
    target, gpu = compile_target(device.type), gpu_name(device.type)
    per_head = "heads" in info.masks
    built = masks.build_heads(mask, problem.seq_k, problem.heads_q)
    if (reason := _mask_refusal(operator, info.masks, built)) is not None:
        raise ValueError(reason)
    benchmark = _ConfigBenchmark(implementation(info, {}), built, problem, device)
    itemsize = DTYPE_BYTES[problem.dtype]
    head_dim = widest_head_dim(problem)
    shipped = triton_configs.kernel_configs(target, head_dim, itemsize, per_head)
    key = triton_configs.problem_class(gpu, head_dim, itemsize, per_head)
    best = {**shipped, **triton_configs.tuned_configs().get(key, {})}
    benchmark.set_reference(shipped)
    for kernel in kernels:
        timings: list[tuple[float, Any]] = []
        for config in _candidates(kernel, target, shipped[kernel], grid):
            row: dict[str, Any] = {"kernel": kernel, "config": str(config)}
            reason = _compile_refusal(operator, target, problem, kernel, config)
            if reason is None:
                row |= benchmark.measure({**shipped, kernel: config}, kernel)
                if "us" in row:
                    timings.append((float(row["us"]), config))
            yield row if reason is None else {**row, "skipped": reason}
        if timings:
            best[kernel] = min(timings, key=lambda timing: timing[0])[1]
        yield {"kernel": kernel, "chosen": str(best[kernel]), "table": str(shipped[kernel])}
        _save(key, best)


def _candidates(
    kernel: str, target: str, shipped: Any, grid: dict[str, tuple[int, ...]]
) -> list[Any]:
    """The configurations of a grid for a kernel, without those that repeat work or that the target
    has no copy engine for; the shipped one first, if it is one of them."""
    grid = grid if kernel == "backward_dkv" else {**grid, "launches": (1,)}
    family, _, number = target.partition(":")
    older = family == "cuda" and int(number) < 90
    # Warps without rows of their own share the columns of others, except in Hopper's instruction.
    by_rows = family == "cuda" and 90 <= int(number) < 100
    configs = [
        triton_configs.Config(**dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    configs = [
        config
        for config in configs
        if not (by_rows and config.num_warps * ROWS_PER_WARP > config.rows)
        and not (older and config.descriptors)
    ]
    return sorted(configs, key=lambda config: config != shipped)


def _save(key: str, best: dict[str, Any]) -> None:
    """Save the configurations of a problem class to the file; those of others are kept."""
    path = triton_configs.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another tuner may write another class
        tuned = triton_configs.tuned_configs() | {key: best}
        table = {
            key: {name: dataclasses.asdict(config) for name, config in kernels.items()}
            for key, kernels in tuned.items()
        }
        write_atomically(path, json.dumps(table, indent=1) + "\n")


def _mask_refusal(operator: str, kinds: tuple[str, ...], mask: Any) -> str | None:
    """Why an operator does not take a mask, or None if it does."""
    per_head = per_head_of(mask) is not None
    if per_head == ("heads" in kinds):
        return None
    takes = "per-head masks" if "heads" in kinds else "masks shared by all heads"
    return f"{operator} takes {takes}; give another --mask"


def _compile_refusal(
    operator: str, target: str, problem: Problem, kernel: str, config: Any
) -> str | None:
    """Why a configuration does not compile well, or None if it does."""
    if target == "interpreter":
        return None
    fields = dataclasses.asdict(config)
    launches = kernel_launches(
        operator, target, problem.dtype, problem.head_dim, problem.head_dim_v, **fields
    )
    for launch in launches:
        if launch.kernel.partition(".")[0] == kernel:
            row = compile_launch(launch, target)
            if not compiles_well(row):
                return str(row["verdict"])
    return None


class _ConfigBenchmark:
    """A benchmark of kernel configurations on one problem and device."""

    def __init__(self, operator: Any, mask: Any, problem: Problem, device: Device) -> None:
        import numpy as np

        self._op, self._mask, self._problem, self._device = operator, mask, problem, device
        queries, keys = np.arange(problem.seq_q), np.arange(problem.seq_k)
        inputs = make_inputs(problem, queries, keys, Recipe(), device.type)
        self._qkv, self._dout = QKV.of(inputs), inputs["dout"]
        self._expected: dict[str, Any] = {}

    def set_reference(self, configs: dict[str, Any]) -> None:
        """Compute the results to compare other configurations with."""
        self._expected = self._results(configs)

    def measure(self, configs: dict[str, Any], kernel: str) -> dict[str, Any]:
        """``us``, the median time of the pass with this kernel, or ``failed`` with the reason."""
        try:
            plan = self._plan(configs)
            results = self._results(configs)
            for tensor in results.values():
                tensor.sum().item()  # errors on the device are raised here
        except Exception as error:  # failed launches raise many types
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        limit = LIMITS[self._problem.dtype][0]
        for name, expected in self._expected.items():
            finite = expected.isfinite()  # lse of rows without visible keys is -inf
            if not results[name].isfinite().equal(finite):
                return {"failed": f"{name} is not finite in the same places"}
            difference = (results[name] - expected)[finite].double().norm()
            relative = float(difference / expected[finite].double().norm())
            if not relative <= limit:
                return {
                    "failed": f"{name} differs by {relative:.2g} from the shipped configuration"
                }
        backward_inputs = self._backward_inputs(results["out"], results["lse"])

        def forward() -> None:
            self._op.forward(self._qkv, plan)

        def backward() -> None:
            self._op.backward(backward_inputs, plan)

        timed_pass = forward if kernel == "forward" else backward
        times = []
        for _ in range(REPEATS):
            self._device.flush_cache()
            times.append(self._device.time_us(timed_pass))
        return {"us": statistics.median(times)}

    def _backward_inputs(self, out: Any, lse: Any) -> BackwardInputs:
        return BackwardInputs(self._dout, *self._qkv, out, lse)

    def _plan(self, configs: dict[str, Any]) -> Any:
        return self._op.prepare_with(self._mask, self._problem, self._device.type, configs)

    def _results(self, configs: dict[str, Any]) -> dict[str, Any]:
        plan = self._plan(configs)
        out, lse = self._op.forward(self._qkv, plan)
        grads = self._op.backward(self._backward_inputs(out, lse), plan)
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def main() -> int:
    """Serve one request from stdin; a refused one is a line on stderr and exit code 2."""
    request = json.load(sys.stdin)
    problem = Problem(**request["problem"])
    try:
        if (shortage := device_shortage(request["device"], 1)) is not None:
            raise ValueError(f"tune needs a GPU: {shortage}")
        device = open_device(request["device"], 0, 1)
        kernels = request["kernels"] or triton_configs.KERNELS
        for row in tune(request["operator"], request["mask"], problem, device, GRID, kernels):
            print(json.dumps(row), flush=True)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
