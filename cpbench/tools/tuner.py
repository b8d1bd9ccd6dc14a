"""Measure which configuration of each Triton kernel is fastest on the GPU that is here.

``python -m cpbench.tools.tuner``, started by ``cpbench tune``: a JSON request on stdin, a JSON line
for every configuration on stdout.  Only configurations that the compiler finds sound are measured
(``cpbench.tools.aot``: matrix instruction there, memory enough, at most ``MOST_SPILLED`` bytes
spilled); the others of the operator's kernels stay as they are meanwhile.  Each is held against the
result of the table's configuration before its time counts.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from cpbench import masks
from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.core.registry import implementation, operator_info
from cpbench.inputs import Recipe
from cpbench.kernels.triton import configs as triton_configs
from cpbench.kernels.triton.launch import gpu_of, target_of
from cpbench.masks.head_masks import per_head as per_head_of
from cpbench.measure.device import Device, open_device
from cpbench.results.store import write_whole
from cpbench.tools.aot import compile_launch, launches
from cpbench.verify.check import TOLERANCE, make_inputs

MOST_SPILLED = 64  # bytes: a few spills outside the inner loop cost nothing
REPEATS = 15
GRID = {
    "rows": (64, 128),
    "cols": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
    "descriptors": (0, 1),
}
SMALL_GRID = {**GRID, "rows": (32, 64), "cols": (32,), "num_warps": (4,), "num_stages": (1,)}


def tune(
    operator: str, mask: str, problem: Problem, device: Device, grid: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """A row for every configuration; afterwards the fastest of each kernel are in the file.

    Args:
        operator: one that compiles ahead of time.
        mask: that is measured.
        problem: its dtype and head_dim are the class that is tuned.
        grid: values of each field of a configuration.

    Raises:
        ValueError: for a mask or file that cannot be read.
    """
    info = operator_info(operator)
    target, gpu = target_of(device.type), gpu_of(device.type)
    per_head = "heads" in info.masks
    built = masks.build_heads(mask, problem.seq_k, problem.heads_q)
    if (reason := _unfit(operator, info.masks, built)) is not None:
        raise ValueError(reason)
    bench = _Bench(implementation(info, {}), built, problem, device)
    item = DTYPE_BYTES[problem.dtype]
    base = triton_configs.choose(target, problem.head_dim, item, per_head)
    best = dict(base)
    bench.reference(base)
    for kernel in triton_configs.KERNELS:
        found: list[tuple[float, Any]] = []
        for values in itertools.product(*grid.values()):
            config = triton_configs.Config(**dict(zip(grid, values, strict=True)))
            if config.descriptors and target.startswith("cuda") and int(target[5:]) < 90:
                continue
            row: dict[str, Any] = {"kernel": kernel, "config": str(config)}
            reason = _refused(operator, target, problem, kernel, config)
            if reason is None:
                row |= bench.measured({**base, kernel: config}, kernel)
                if "us" in row:
                    found.append((float(row["us"]), config))
            yield row if reason is None else {**row, "skipped": reason}
        if found:
            best[kernel] = min(found, key=lambda pair: pair[0])[1]
        yield {"kernel": kernel, "chosen": str(best[kernel]), "table": str(base[kernel])}
        _keep(triton_configs.problem_class(gpu, problem.head_dim, item, per_head), best)


def _keep(key: str, best: dict[str, Any]) -> None:
    """Put what was found so far into the file, beside what is there of other problem classes."""
    path = triton_configs.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another tuner may be at another class
        everything = triton_configs.tuned() | {key: best}
        table = {
            key: {name: dataclasses.asdict(config) for name, config in kernels.items()}
            for key, kernels in everything.items()
        }
        write_whole(path, json.dumps(table, indent=1) + "\n")


def _unfit(operator: str, kinds: tuple[str, ...], mask: Any) -> str | None:
    """Why an operator cannot take a mask, or None."""
    heads = per_head_of(mask) is not None
    if heads == ("heads" in kinds):
        return None
    takes = "a mask that differs from head to head" if "heads" in kinds else "one for all heads"
    return f"{operator} takes {takes}: give another --mask"


def _refused(operator: str, target: str, problem: Problem, kernel: str, config: Any) -> str | None:
    """What the compiler has against a configuration, or None."""
    if target == "interpreter":
        return None
    told = launches(operator, target, problem.dtype, problem.head_dim, **dataclasses.asdict(config))
    row = compile_launch(next(x for x in told if x.kernel == kernel), target)
    if row["verdict"].startswith("broken"):
        return str(row["verdict"])
    spilled = row["spill_bytes"]
    return f"{spilled} bytes spilled" if spilled > MOST_SPILLED else None


class _Bench:
    """One problem on one device, with whatever configurations."""

    def __init__(self, operator: Any, mask: Any, problem: Problem, device: Device) -> None:
        import numpy as np

        self._op, self._mask, self._problem, self._device = operator, mask, problem, device
        queries, keys = np.arange(problem.seq_q), np.arange(problem.seq_k)
        self._inputs = make_inputs(problem, queries, keys, Recipe(), device.type)
        self._want: dict[str, Any] = {}

    def reference(self, configs: dict[str, Any]) -> None:
        """What other configurations are held against."""
        self._want = self._results(configs)

    def measured(self, configs: dict[str, Any], kernel: str) -> dict[str, Any]:
        """``us``, the median time of the pass that the kernel is in; or ``failed``, and why."""
        x = self._inputs
        try:
            plan = self._plan(configs)
            found = self._results(configs)
            for tensor in found.values():
                tensor.sum().item()  # what fails on the device is told here
        except Exception as error:  # whatever a kernel that cannot be launched raises
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        limit = TOLERANCE[self._problem.dtype][0]
        for name, want in self._want.items():
            told = want.isfinite()  # lse of rows that see nothing is -inf
            if not found[name].isfinite().equal(told):
                return {"failed": f"{name} is finite elsewhere than by the table's configuration"}
            off = float((found[name] - want)[told].double().norm() / want[told].double().norm())
            if not off <= limit:
                return {"failed": f"{name} differs by {off:.2g} from the table's configuration"}
        out, lse = found["out"], found["lse"]

        def forward() -> None:
            self._op.forward(x["q"], x["k"], x["v"], plan)

        def backward() -> None:
            self._op.backward(x["dout"], x["q"], x["k"], x["v"], out, lse, plan)

        run = forward if kernel == "forward" else backward
        times = []
        for _ in range(REPEATS):
            self._device.flush_cache()
            times.append(self._device.time_us(run))
        return {"us": statistics.median(times)}

    def _plan(self, configs: dict[str, Any]) -> Any:
        return self._op.prepare_with(self._mask, self._problem, self._device.type, configs)

    def _results(self, configs: dict[str, Any]) -> dict[str, Any]:
        x, plan = self._inputs, self._plan(configs)
        out, lse = self._op.forward(x["q"], x["k"], x["v"], plan)
        grads = self._op.backward(x["dout"], x["q"], x["k"], x["v"], out, lse, plan)
        return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def main() -> int:
    """One request from stdin; a refusal is one line and exit code 2."""
    wanted = json.load(sys.stdin)
    problem = Problem(**wanted["problem"])
    try:
        device = open_device(wanted["device"], 0, 1)
        for row in tune(wanted["operator"], wanted["mask"], problem, device, GRID):
            print(json.dumps(row), flush=True)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
