"""Power, energy, clocks, temperature and memory of GPUs beside a measurement, through NVML.

One process a node samples all of its GPUs into a file on that node (``python -m
cpbench.measure.telemetry FILE SECONDS``): what is measured shares no interpreter with it.  Each
rank reads what was sampled of its GPU while it measured.  Where there is no NVML, that is said and
nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.results.store import Tail

if TYPE_CHECKING:
    from cpbench.parallel.comm import Control

# NVML's clock event (throttle) reasons that hold a clock down, by bit (nvml.h).
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x2: "application clocks",
    0x10: "sync boost",
}
STOP_S = 2.0


def reasons(bits: int) -> list[str]:
    """Names of what holds a clock down."""
    return sorted(name for bit, name in REASONS.items() if bits & bit)


class Nvml:
    """NVML through nvidia-ml-py.

    Raises:
        OSError: when it is not there, in a few words.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise OSError("not available: no Python package nvidia-ml-py") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            self.handles = {_text(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
        except pynvml.NVMLError as error:
            raise OSError(f"not available: {error}") from error

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def sample(self, uuid: str) -> dict[str, Any]:
        """What a GPU says of itself now; what it does not support is left out."""
        nvml, handle = self._nvml, self.handles[uuid]
        ask: dict[str, Callable[[], Any]] = {
            "power_mw": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "reasons": lambda: _reasons(nvml, handle),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        }
        found: dict[str, Any] = {"uuid": uuid, "time": time.time()}
        for name, question in ask.items():
            with suppress(nvml.NVMLError):
                found[name] = int(question())
        return found

    def topology(self) -> dict[str, Any]:
        """GPUs of this machine and how each pair is joined: ``{"gpus": [...], "links": [[...]]}``,
        with NVML's common ancestors, and ``"nvlink"`` where memory is reached over that."""
        nvml, gpus, handles = self._nvml, [], list(self.handles.values())
        for uuid, handle in self.handles.items():
            about = {"uuid": uuid}
            with suppress(nvml.NVMLError):
                about["name"] = _text(nvml.nvmlDeviceGetName(handle))
            with suppress(nvml.NVMLError):
                about["bus"] = _text(nvml.nvmlDeviceGetPciInfo(handle).busId)
            gpus.append(about)
        return {"gpus": gpus, "links": [[self._link(a, b) for b in handles] for a in handles]}

    def _link(self, a: Any, b: Any) -> str:
        nvml = self._nvml
        if a is b:
            return "self"
        with suppress(nvml.NVMLError):
            if nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == 0:
                return "nvlink"
        with suppress(nvml.NVMLError):
            level = nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
            return _ANCESTORS.get(int(level), str(level))
        return "unknown"


_ANCESTORS = {0: "internal", 10: "switch", 20: "switches", 30: "host bridge", 40: "numa node",
              50: "system"}  # fmt: skip


def _reasons(nvml: Any, handle: Any) -> int:
    for name in (
        "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    ):  # fmt: skip
        with suppress(AttributeError, nvml.NVMLError_FunctionNotFound):
            return int(getattr(nvml, name)(handle))
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Telemetry:
    """The samples of a rank's GPU; collective to make, since ranks of a node share a sampler.

    Args:
        uuid: of this rank's GPU.
        seconds: between samples.
        host: of this rank, and ``first`` whether it is the first rank there.
    """

    def __init__(self, uuid: str, seconds: float, control: Control, host: str, first: bool) -> None:
        self._uuid, self._process = uuid, None
        path = None
        if first:
            handle, path = tempfile.mkstemp(prefix="cpbench-telemetry-", suffix=".jsonl")
            os.close(handle)
            self._process = subprocess.Popen(
                (sys.executable, "-m", "cpbench.measure.telemetry", path, str(seconds)),
                stdin=subprocess.DEVNULL,
            )
        self._made = path
        known = dict(pair for pair in control.gather((host, path)) if pair[1] is not None)
        self._tail = Tail(Path(known[host]))
        self._samples: list[dict[str, Any]] = []

    def between(self, begun: float, ended: float) -> dict[str, Any]:
        """What was sampled from one time to another (seconds since the epoch), summed up by
        :func:`summary`."""
        self._samples += self._tail.read()
        missing = [sample["missing"] for sample in self._samples if "missing" in sample]
        if missing:
            return {"missing": missing[0]}
        mine = [sample for sample in self._samples if sample.get("uuid") == self._uuid]
        self._samples = [sample for sample in mine if sample["time"] > begun]
        return summary([sample for sample in mine if begun <= sample["time"] <= ended])

    def close(self) -> None:
        """End the sampler."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        if self._made is not None:
            Path(self._made).unlink(missing_ok=True)


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a stretch of samples of one GPU: watts, joules, MHz, degrees, bytes."""
    if not samples:
        return {"missing": "no sample fell into the measurement"}

    def of(name: str) -> list[int]:
        return [sample[name] for sample in samples if name in sample]

    found: dict[str, Any] = {"samples": len(samples)}
    for name, key, scale in (
        ("power_w", "power_mw", 1e-3), ("sm_mhz", "sm_mhz", 1), ("memory_mhz", "memory_mhz", 1)
    ):  # fmt: skip
        if scaled := [value * scale for value in of(key)]:
            found[name] = {
                "min": min(scaled), "median": statistics.median(scaled), "max": max(scaled)
            }  # fmt: skip
    if len(energy := of("energy_mj")) > 1:
        found["energy_j"] = (energy[-1] - energy[0]) * 1e-3
        found["energy_seconds"] = samples[-1]["time"] - samples[0]["time"]
    for name in ("temperature_c", "memory_bytes"):
        if values := of(name):
            found[name] = max(values)
    bits = 0
    for value in of("reasons"):
        bits |= value
    found["held_down_by"] = reasons(bits)
    return found


def main(argv: list[str]) -> int:
    """Sample all GPUs into a file until told to stop."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    path, seconds = argv[0], float(argv[1])
    with open(path, "a", buffering=1) as file:
        try:
            nvml = Nvml()
        except OSError as error:
            file.write(json.dumps({"missing": str(error)}) + "\n")
            return 0
        due = time.monotonic()
        while True:
            for uuid in nvml.handles:
                file.write(json.dumps(nvml.sample(uuid)) + "\n")
            due = max(due + seconds, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
