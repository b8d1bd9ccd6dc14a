"""``pytest tests/microbench --benchmark-only``: benchmarks of operators with cpbench's own timer.

Saved runs, ``--benchmark-compare`` and ``--benchmark-compare-fail=median:5%`` are those of
pytest-benchmark.  Without ``--benchmark-only`` these benchmarks are deselected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cpbench.core import registry
from cpbench.core.environment import usable_cores
from cpbench.core.operator import declared_refusal
from cpbench.core.problem import Case
from cpbench.core.spec import format_size
from cpbench.measure.device.opening import open_device
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.sweep import sweep_file
from cpbench.worker.evaluate import Evaluator

FOLDER = Path(__file__).parent
MASKS = ["causal", "sliding_window_causal:window=256", "causal_document:corpus=pile"]
SWEEP = pytest.StashKey[sweep_file.Sweep]()
SETTINGS = {"max_seconds": 3.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sweep",
        metavar="SWEEP",
        help="Sweep to time, packaged or a file, of one rank.  Default: all available operators on "
        "a few masks.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_only", default=False):
        config.stash[SWEEP] = _load_sweep(config.getoption("--sweep", default=None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only", default=False):
        return
    benchmarks = [item for item in items if FOLDER in item.path.parents]
    config.hook.pytest_deselected(items=benchmarks)
    items[:] = [item for item in items if FOLDER not in item.path.parents]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    sweep = metafunc.config.stash.get(SWEEP, None)
    cases = sweep.cases if sweep else ()
    metafunc.parametrize("case", cases, ids=[benchmark_name(case) for case in cases])


def _load_sweep(name: str | None) -> sweep_file.Sweep:
    try:
        sweep = sweep_file.load(name) if name else _default_sweep()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if any(case.world_size > 1 for case in sweep.cases):
        raise pytest.UsageError(f"{name}: only cases of one rank can be timed here")
    return sweep


def _default_sweep() -> sweep_file.Sweep:
    """All available operators on a few masks."""
    device = _device()
    case = Case(dtype="bfloat16" if device == "cuda" else "float32")
    names = [
        info.name
        for info in registry.operators().values()
        if declared_refusal(info, case.problem, device) is None
        and not info.mixer
        and {"causal", "full"} & set(info.masks)
        and info.name != "reference"
    ]
    table = {
        "operator": sorted(names), "mask": MASKS, "seq_len": "2k", "dtype": case.dtype,
    }  # fmt: skip
    return sweep_file.expand({"sweep": table, "measure": SETTINGS}, "operators")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def benchmark_name(case: Case) -> str:
    """The name of a case in pytest-benchmark, by which it is compared between runs."""
    heads = f"{case.num_heads_q}:{case.num_heads_kv}x{case.head_dim}"
    words = [case.operator, case.mask, format_size(case.seq_len), heads, case.dtype, case.direction]
    if case.queries:
        words.append(f"last{case.queries}")
    return "-".join(map(str, [*words, case.inputs]))


@pytest.fixture(scope="session")
def evaluator(request: pytest.FixtureRequest) -> Iterator[Evaluator]:
    """Evaluates cases in this process, like a worker of one rank."""
    settings = request.config.stash[SWEEP].settings
    name = _device()
    device = open_device(name, 0, settings.threads or usable_cores(), settings.clock)
    store, hook = dist.HashStore(), sys.excepthook
    dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
    try:
        yield Evaluator(
            device, TorchComm(), Control(timeout_s=600.0), settings, 1, 0, lambda _: None
        )
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch's hook prefixes every line of a traceback
