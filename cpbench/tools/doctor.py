"""``cpbench doctor``: what this machine can run, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpbench import masks
from cpbench.core import registry
from cpbench.core.environment import commit, usable_cores

_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda
    else [],
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


def check_environment() -> list[dict[str, Any]]:
    """Rows (what, verdict, detail) with verdict ok, missing (some cases are refused) or broken.

    torch is probed in a subprocess; this process does not load it.
    """
    rows = [
        _row("python", "ok", sys.version.split()[0]),
        _row("cpbench", "ok", commit() or "installed"),
        _row("cores", "ok", str(usable_cores())),
    ]
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, encoding="utf-8", errors="replace"
    )
    if probe.returncode:
        last_line = (probe.stderr.strip().splitlines() or ["no output"])[-1]
        rows.append(_row("torch", "broken", last_line))
    else:
        torch_info = json.loads(probe.stdout.strip().splitlines()[-1])
        rows.append(_row("torch", "ok", torch_info["torch"]))
        rows.append(_row("gloo", "ok" if torch_info["gloo"] else "broken", "CPU communication"))
        rows.append(
            _row(
                "CUDA devices",
                "ok" if torch_info["cuda"] else "missing",
                ", ".join(torch_info["cuda"]) or "none: CUDA operators are not available",
            )
        )
        rows.append(_row("nccl", "ok" if torch_info["nccl"] else "missing", "GPU communication"))
    rows.append(
        _row(
            "C++ compiler",
            "ok" if shutil.which("g++") else "missing",
            shutil.which("g++") or "flex is not available on CPUs",
        )
    )
    for module, use in (
        ("pynvml", "GPU clocks and throttling"),
        ("triton", "Triton kernels"),
        ("mpi4py", "MPI launcher and transport"),
        ("pyarrow", "document lengths from parquet"),
    ):
        installed = importlib.util.find_spec(module) is not None
        rows.append(_row(module, "ok" if installed else "missing", use))
    rows.append(_row("shared memory", *_shared_memory()))
    for name, entries in (
        ("operators", registry.operators),
        ("strategies", registry.strategies),
        ("masks", masks.describe),
    ):
        try:
            rows.append(_row(name, "ok", " ".join(sorted(entries()))))
        except registry.RegistrationError as error:
            rows.append(_row(name, "broken", str(error)))
    return rows


def _shared_memory() -> tuple[str, str]:
    """Verdict and detail on the free space in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return "missing", "no /dev/shm"
    free = shutil.disk_usage(path).free
    return ("ok" if free > 64 << 20 else "missing"), f"{free / 1e9:.1f} GB free in /dev/shm"


def _row(what: str, verdict: str, detail: str) -> dict[str, Any]:
    return {"what": what, "verdict": verdict, "detail": detail}
