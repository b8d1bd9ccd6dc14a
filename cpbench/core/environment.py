"""What a measurement depended on: host, processor, versions, and an allow-list of variables.

Only names in the allow-list are read from the process environment: a record is shared with
others, and secrets live in environments.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PREFIXES = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "TORCH_NCCL_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
)
NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def interpreting() -> bool:
    """Whether Triton kernels imported now are interpreted, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


PACKAGES = ("torch", "triton", "numpy", "mpi4py", "ring-flash-attn", "flash-attn", "nvidia-ml-py")


def collect() -> dict[str, Any]:
    """The environment as plain values, without importing torch."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": machine_bytes(),
        "python": platform.python_version(),
        "executable": Path(sys.executable).name,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cpbench": _version("cpbench"),
        "commit": commit(),
        "variables": {
            key: value
            for key, value in sorted(os.environ.items())
            if key in NAMES or key.startswith(PREFIXES)
        },
    }


def machine_bytes() -> int:
    """Main memory of this machine, or of its container where that has less (cgroup v2 or v1)."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number
            found = min(found, int(Path("/sys/fs/cgroup", name).read_text()))
    return found


def node_facts() -> dict[str, Any]:
    """What tells this machine from others: name, cores and where they are, load, Slurm's name."""
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    numa = {}
    for node in nodes:
        with suppress(OSError):
            numa[node.name] = (node / "cpulist").read_text().strip()
    clocks = []
    with suppress(OSError, ValueError):
        text = Path("/proc/cpuinfo").read_text()
        clocks = [float(x.partition(":")[2]) for x in text.splitlines() if x.startswith("cpu MHz")]
    return {
        "host": platform.node(),
        "slurm_node": os.environ.get("SLURMD_NODENAME"),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": machine_bytes(),
        "numa": numa,
        "cpu_mhz": {"min": min(clocks), "max": max(clocks)} if clocks else None,
        "load": os.getloadavg()[0],
    }


def environment_id(environment: dict[str, Any]) -> str:
    """Hash of an environment's content."""
    text = json.dumps(environment, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


@functools.cache
def commit() -> str | None:
    """The commit of the source tree cpbench runs from, with ``+`` when it has changes."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    return head + ("+" if changed else "") if head else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
