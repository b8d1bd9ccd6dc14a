"""Power, energy, clocks, temperature and memory of GPUs during a measurement, through NVML.

One process per node samples all of its GPUs into a file on that node (``python -m
cpbench.measure.telemetry FILE SECONDS``), so that sampling shares no interpreter with the measured
code.  Each rank reads the samples of its GPU that were taken while it measured.  Where NVML is not
available, the file holds the reason.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.subprocess_call import MODULE
from cpbench.results.store import Tail

if TYPE_CHECKING:
    from cpbench.parallel.comm import Control

# NVML's clock event (throttle) reasons, by bit (nvml.h).
THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x2: "application clocks",
    0x10: "sync boost",
}
STOP_TIMEOUT_S = 2.0


def throttle_reasons(bits: int) -> list[str]:
    """Names of the throttle reasons that are set in ``bits``."""
    return sorted(name for bit, name in THROTTLE_REASONS.items() if bits & bit)


def telemetry_flags(summary: Mapping[str, Any]) -> set[str]:
    """The record flags of a :func:`summarize`: ``throttled`` by heat or a power brake, or
    ``power-capped``, in any sample of the measurement."""
    reasons = set(summary.get("held_down_by", ()))
    throttled = {"hardware slowdown", "thermal (software)", "thermal (hardware)", "power brake"}
    flags = {"throttled"} if reasons & throttled else set()
    return flags | {"power-capped"} if "power cap" in reasons else flags


class Nvml:
    """NVML through nvidia-ml-py.

    Raises:
        OSError: when NVML is not available, with the reason.
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
            self.handles = {
                _decoded(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles
            }
        except pynvml.NVMLError as error:
            raise OSError(f"not available: {error}") from error

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def sample(self, uuid: str) -> dict[str, Any]:
        """Current readings of a GPU, without those that it does not support."""
        nvml, handle = self._nvml, self.handles[uuid]
        queries: dict[str, Callable[[], Any]] = {
            "power_mw": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
            "energy_mj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "reasons": lambda: _throttle_bits(nvml, handle),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        }
        readings: dict[str, Any] = {"uuid": uuid, "time": time.time()}
        for name, query in queries.items():
            with suppress(nvml.NVMLError):
                readings[name] = int(query())
        return readings

    def topology(self) -> dict[str, Any]:
        """GPUs of this machine and the link of each pair: ``{"gpus": [...], "links": [[...]]}``.
        A link is ``"nvlink"`` where P2P goes over NVLink, else NVML's common ancestor."""
        nvml, gpus, handles = self._nvml, [], list(self.handles.values())
        for uuid, handle in self.handles.items():
            facts = {"uuid": uuid}
            with suppress(nvml.NVMLError):
                facts["name"] = _decoded(nvml.nvmlDeviceGetName(handle))
            with suppress(nvml.NVMLError):
                facts["bus"] = _decoded(nvml.nvmlDeviceGetPciInfo(handle).busId)
            gpus.append(facts)
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
            return _COMMON_ANCESTORS.get(int(level), str(level))
        return "unknown"


_COMMON_ANCESTORS = {0: "internal", 10: "switch", 20: "switches", 30: "host bridge",
                     40: "numa node", 50: "system"}  # fmt: skip


def _throttle_bits(nvml: Any, handle: Any) -> int:
    for name in (
        "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
    ):  # fmt: skip
        with suppress(AttributeError, nvml.NVMLError_FunctionNotFound):
            return int(getattr(nvml, name)(handle))
    raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)


def _decoded(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Telemetry:
    """The samples of a rank's GPU.  The constructor is collective: ranks of a node share a sampler.

    Args:
        uuid: of this rank's GPU.
        seconds: interval between samples.
        host: name of this rank's machine.
        starts_sampler: whether this rank starts the sampler of its machine; one rank there does.
    """

    def __init__(
        self, uuid: str, seconds: float, control: Control, host: str, starts_sampler: bool
    ) -> None:
        self._uuid, self._process = uuid, None
        path = None
        if starts_sampler:
            handle, path = tempfile.mkstemp(prefix="cpbench-telemetry-", suffix=".jsonl")
            os.close(handle)
            self._process = subprocess.Popen(
                (sys.executable, *MODULE, "cpbench.measure.telemetry", path, str(seconds)),
                stdin=subprocess.DEVNULL,
            )
        self._own_path = path
        paths = {name: path for name, path in control.all_gather((host, path)) if path is not None}
        self._tail = Tail(Path(paths[host]))
        self._samples: list[dict[str, Any]] = []

    def between(self, start: float, end: float) -> dict[str, Any]:
        """:func:`summarize` the samples between two times (seconds since the epoch)."""
        self._samples += self._tail.read()
        missing = [sample["missing"] for sample in self._samples if "missing" in sample]
        if missing:
            return {"missing": missing[0]}
        own_samples = [sample for sample in self._samples if sample.get("uuid") == self._uuid]
        self._samples = [sample for sample in own_samples if sample["time"] > start]
        return summarize([sample for sample in own_samples if start <= sample["time"] <= end])

    def close(self) -> None:
        """Stop the sampler and delete its file, on the rank that started it."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        if self._own_path is not None:
            Path(self._own_path).unlink(missing_ok=True)


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summary of consecutive samples of one GPU: watts, joules, MHz, degrees Celsius, bytes."""
    if not samples:
        return {"missing": "no sample was taken during the measurement"}

    def readings(name: str) -> list[int]:
        return [sample[name] for sample in samples if name in sample]

    figures: dict[str, Any] = {"samples": len(samples)}
    for name, key, scale in (
        ("power_w", "power_mw", 1e-3), ("sm_mhz", "sm_mhz", 1), ("memory_mhz", "memory_mhz", 1)
    ):  # fmt: skip
        if scaled := [value * scale for value in readings(key)]:
            figures[name] = {
                "min": min(scaled), "median": statistics.median(scaled), "max": max(scaled)
            }  # fmt: skip
    if len(energy := readings("energy_mj")) > 1:
        figures["energy_j"] = (energy[-1] - energy[0]) * 1e-3
        figures["energy_seconds"] = samples[-1]["time"] - samples[0]["time"]
    for name in ("temperature_c", "memory_bytes"):
        if values := readings(name):
            figures[name] = max(values)
    bits = 0
    for value in readings("reasons"):
        bits |= value
    figures["held_down_by"] = throttle_reasons(bits)
    return figures


def main(argv: list[str]) -> int:
    """Sample all GPUs into the file ``argv[0]`` every ``argv[1]`` seconds, until terminated."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    path, seconds = argv[0], float(argv[1])
    with open(path, "a", buffering=1, encoding="utf-8") as file:
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
