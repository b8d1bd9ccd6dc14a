"""Settings of all tests, made before anything is imported.

Triton kernels run under Triton's interpreter, as they must where there is no GPU (benchmarks are of
what is compiled).  Terminals have 100 columns, whatever the tests run in.
"""

from __future__ import annotations

import gc
import os
import sys

import pytest

pytest.register_assert_rewrite("malformed")

if "--benchmark-only" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["COLUMNS"] = "100"

# Where containers switch it off, each of a thousand processes would compile cpbench anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

gc.disable()  # it took two thirds of the time of collecting tests, which each worker does

# The files that take longest.  Workers take them first: pytest-xdist orders files by how many tests
# they have, and one of a few long tests, taken last, would leave the other workers idle.
SLOWEST_FILES = (
    "test_slurm.py", "test_nodes.py", "test_faults.py", "test_strategies.py",
    "test_quick_verification.py", "test_distortion.py", "test_transformers.py", "test_race.py",
    "test_batch_jobs.py", "test_every_operator.py", "test_selector_run.py", "test_microbench.py",
    "test_compile.py", "test_value_dims.py", "test_mixers.py", "test_mixer_strategies.py",
    "test_on_ranks.py", "test_libraries.py", "test_offload.py", "test_distributed_mix.py",
    "test_autograd.py", "test_operators.py", "test_worlds.py", "test_first_run.py",
    "test_memory.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.unfreeze()  # all of it is old
    gc.enable()
