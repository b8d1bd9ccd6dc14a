"""The environment of a measurement: host, processor, versions and environment variables.

Only variables in an allow-list are recorded: records are shared, and environments hold secrets.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpbench.core.git import git
from cpbench.core.user_files import counted_from

VARIABLE_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "PYTORCH_",
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "TRITON_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
    "MALLOC_",
    "CUDA_",
    "NVIDIA_",
)
VARIABLE_NAMES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "LD_PRELOAD",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
)
_SECRET = re.compile(r"TOKEN|PASSW|SECRET|CREDENTIAL|(^|_)(API_?)?(KEYS?|AUTH|PASS|PWD)(_|$)")
_LOGIN = re.compile(r"://[^/\s]*@")  # in an address
_OF_JOBS = (  # prefixes of variables that differ between jobs, or that launchers set
    "SLURM_",
    "GLOO_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
)


def concerns_job(name: str) -> bool:
    """Whether an environment variable concerns the job, not what it measures."""
    return name.startswith(_OF_JOBS)


def _is_recorded(name: str, value: str) -> bool:
    """Whether an environment variable is recorded: one on the list that holds no secret."""
    listed = name in VARIABLE_NAMES or name.startswith(VARIABLE_PREFIXES)
    return listed and not (_SECRET.search(name.upper()) or _LOGIN.search(value))


def interpreting() -> bool:
    """Whether Triton kernels imported now run under Triton's interpreter (TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


_SOURCES = ("cpbench", "kernels", "launchers", "reports", "slurm")  # folders of the package
RECORDED_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "mpi4py",
    "ring-flash-attn",
    "flash-attn",
    "nvidia-ml-py",
)


def collect_environment(variables: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The environment as plain values, collected without importing torch.

    Args:
        variables: environment variables.
    """
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": usable_cores(),
        "affinity": format_ranges(os.sched_getaffinity(0)),
        "memory_bytes": machine_memory_bytes(),
        "python": platform.python_version(),
        "executable": Path(sys.executable).name,
        "packages": {
            name: installed for name in RECORDED_PACKAGES if (installed := _version(name))
        },
        "cpbench": _version("cpbench"),
        "commit": commit(),
        "files_commit": files_commit(counted_from()),
        "variables": {
            name: value for name, value in sorted(variables.items()) if _is_recorded(name, value)
        },
    }


def machine_memory_bytes() -> int:
    """Main memory of this machine, or the memory limit of its container (cgroup v2 or v1)."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" means no limit
            memory_bytes = min(memory_bytes, int(Path("/sys/fs/cgroup", name).read_text("utf-8")))
    return memory_bytes


def node_facts() -> dict[str, Any]:
    """This machine: host and Slurm names, cores by NUMA node, clocks, memory, load."""
    numa_nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    numa = {}
    for node in numa_nodes:
        with suppress(OSError):
            numa[node.name] = (node / "cpulist").read_text("utf-8").strip()
    clocks = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return {
        "host": platform.node(),
        "slurm_node": os.environ.get("SLURMD_NODENAME"),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": machine_memory_bytes(),
        "numa": numa,
        "cpu_mhz": {"min": min(clocks), "max": max(clocks)} if clocks else None,
        "load": os.getloadavg()[0],
    }


def environment_id(environment: dict[str, Any]) -> str:
    """Hash of an environment, twelve hex digits."""
    text = json.dumps(environment, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def format_ranges(numbers: Iterable[int]) -> str:
    """``0-3,8``: numbers in order, consecutive ones as a range."""
    ordered = sorted(numbers)
    starts = [n for i, n in enumerate(ordered) if i == 0 or ordered[i - 1] != n - 1]
    ends = [n for i, n in enumerate(ordered) if i + 1 == len(ordered) or ordered[i + 1] != n + 1]
    return ",".join(
        str(start) if start == end else f"{start}-{end}"
        for start, end in zip(starts, ends, strict=True)
    )


@functools.cache
def commit() -> str | None:
    """The commit of the source tree, such as ``1a2b3c4d5e6f``; None without a git tree.

    Where the source differs from it, ``+`` and a hash of the difference follow: of changed files,
    and of Python files that git does not track (or ignores), which may be imported.
    """
    source_tree = Path(__file__).resolve().parents[2]
    if not (source_tree / ".git").exists():
        return None
    return _tree_commit(source_tree, _SOURCES, ("--others",))


@functools.cache
def files_commit(folder: Path) -> str | None:
    """The commit of the repository of a folder, as :func:`commit`, with changes in the folder; None
    without git, and for the repository of cpbench itself."""
    source_tree = Path(__file__).resolve().parents[2]
    if folder.resolve().is_relative_to(source_tree):
        return None
    return _tree_commit(folder, (".",), ("--others", "--exclude-standard"))


def _tree_commit(tree: Path, folders: Sequence[str], others: Sequence[str]) -> str | None:
    """The commit of a tree, with a hash of changes in folders; None without git.

    Args:
        others: options of ``git ls-files`` for files that git does not track.
    """
    head = git(tree, "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    difference = git(tree, "diff", "HEAD", "--", *folders) or ""
    untracked = git(tree, "ls-files", *others, "--", *(f"{name}/**.py" for name in folders))
    for name in (untracked or "").splitlines():
        with suppress(OSError):
            difference += f"{name}\n{(tree / name).read_text('utf-8', 'replace')}"
    changes = hashlib.sha256(difference.encode()).hexdigest()[:6]
    return f"{head}+{changes}" if difference else head


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
