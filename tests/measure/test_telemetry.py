"""Telemetry through the real binding (nvidia-ml-py), with a small stand-in for NVML's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S
from paths import HELPERS

from cpbench.measure import telemetry
from cpbench.measure.telemetry import summarize, throttle_reasons
from cpbench.results.store import Tail


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``libnvidia-ml.so.1``."""
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    source = HELPERS / "devices" / "nvml_stand_in.c"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Gpu:
    """The readings of the stand-in's GPUs, which can be changed while a sampler runs."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.path = folder / "readings"
        self.env = {
            **os.environ, "LD_LIBRARY_PATH": str(library), "CPBENCH_TEST_NVML": str(self.path),
        }  # fmt: skip

    def set(self, power_mw: int, energy_mj: int, sm_mhz: int, bits: int = 0) -> None:
        hidden = self.path.with_suffix(".new")
        hidden.write_text(f"{power_mw} {energy_mj} {sm_mhz} {bits}\n")
        hidden.replace(self.path)


@pytest.fixture
def gpu(tmp_path: Path, library: Path) -> Gpu:
    stand_in = Gpu(tmp_path, library)
    stand_in.set(300_000, 1_000, 1980)
    return stand_in


@pytest.fixture
def sampler(tmp_path: Path, gpu: Gpu) -> Iterator[Tail]:
    """The file of a running sampler."""
    path = tmp_path / "samples.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "cpbench.measure.telemetry", str(path), "0.02"], env=gpu.env
    )
    yield Tail(path)
    process.kill()
    process.wait()


def collect(tail: Tail, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Samples from here on, read until there are enough of them."""
    samples: list[dict[str, Any]] = []
    deadline = time.monotonic() + LIMIT_S
    while not enough(samples):
        assert time.monotonic() < deadline
        time.sleep(0.02)
        samples += tail.read()
    return samples


def test_samples_have_the_readings_of_the_gpus(gpu: Gpu, sampler: Tail) -> None:
    first = collect(sampler, lambda samples: len(samples) >= 4)
    assert {sample["uuid"] for sample in first} == {"GPU-stand-in-0", "GPU-stand-in-1"}
    gpu.set(700_000, 61_000, 1200, 0x4 | 0x20)
    # Power is read first: where it is new, so are all readings of the sample.
    later = collect(sampler, lambda samples: any(s["power_mw"] == 701_000 for s in samples))
    samples = [sample for sample in first + later if sample["uuid"] == "GPU-stand-in-1"]
    summary = summarize(samples)
    assert summary["samples"] == len(samples)
    assert summary["power_w"]["min"] == pytest.approx(301.0)
    assert summary["power_w"]["max"] == pytest.approx(701.0)
    assert summary["energy_j"] == pytest.approx(60.0)
    assert summary["sm_mhz"]["min"] == 1200
    assert summary["held_down_by"] == ["power cap", "thermal (software)"]
    assert summary["temperature_c"] == 51
    assert summary["memory_bytes"] == 1 << 30
    assert "memory_mhz" not in summary  # not supported


class SimulatedNvml:
    """One GPU.  Reading it takes ``cost_s`` on a simulated clock, which also stands in for the
    module ``time``."""

    def __init__(self, cost_s: list[float]) -> None:
        self.now_s, self.sample_times = 0.0, list[float]()
        self.handles = {"GPU-simulated": None}
        self._cost_s = cost_s

    def sample(self, uuid: str) -> dict[str, Any]:
        if not self._cost_s:
            raise InterruptedError("enough samples")
        self.sample_times.append(self.now_s)
        self.now_s += self._cost_s.pop(0)
        return {"uuid": uuid}

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_the_sampler_keeps_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not drift, and does not catch up after it was delayed."""
    simulated = SimulatedNvml([0.25, 0.5, 0.25, 4.5, 0.0, 0.0])
    monkeypatch.setattr(telemetry, "Nvml", lambda: simulated)
    monkeypatch.setattr(telemetry, "time", simulated)
    monkeypatch.setattr(telemetry.ctypes, "CDLL", lambda name: object())
    path = tmp_path / "samples.jsonl"
    with pytest.raises(InterruptedError):
        telemetry.main([str(path), "1.0"])
    assert simulated.sample_times == [0.0, 1.0, 2.0, 3.0, 7.5, 8.5]
    assert len(Tail(path).read()) == 6


def test_topology(gpu: Gpu) -> None:
    code = (
        "import json; from cpbench.measure.telemetry import Nvml\n"
        "print(json.dumps(Nvml().topology()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=gpu.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    topology = json.loads(done.stdout)
    assert topology["links"] == [["self", "host bridge"], ["host bridge", "self"]]
    assert topology["gpus"][0] == {"uuid": "GPU-stand-in-0", "name": "Stand-in"}


@pytest.mark.parametrize("driver", [True, False])
def test_unavailable_nvml_is_reported(tmp_path: Path, gpu: Gpu, driver: bool) -> None:
    """Without a library, or with a library but no driver."""
    env = {
        k: v
        for k, v in gpu.env.items()
        if k != ("LD_LIBRARY_PATH" if driver else "CPBENCH_TEST_NVML")
    }
    path = tmp_path / "samples.jsonl"
    command = [sys.executable, "-m", "cpbench.measure.telemetry", str(path), "0.02"]
    assert subprocess.run(command, env=env, timeout=LIMIT_S).returncode == 0
    (sample,) = Tail(path).read()
    assert sample["missing"].startswith("not available: ")


EVALUATION = """
import json, tempfile, time
from pathlib import Path
import torch.distributed as dist
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.measure.device.cpu import Cpu
from cpbench.worker.evaluate import Evaluator
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.measure.telemetry import Telemetry

class Gpu(Cpu):
    def gpu_uuid(self):
        return "GPU-stand-in-1"

    def pace_us(self):
        # Called around each timed iteration, which thus lasts at least one sample of each GPU.
        lines = path.read_text().count("\\n")
        while path.read_text().count("\\n") < lines + 2:
            time.sleep(0.005)

class RecordingTelemetry(Telemetry):
    def between(self, start, end):
        self.interval = start, end
        return super().between(start, end)

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
control = Control()
settings = MeasureSettings(max_seconds=600.0, min_iterations=8, max_iterations=8)
evaluator = Evaluator(Gpu(1), TorchComm(), control, settings, 1, 0, lambda phase: None)
telemetry = RecordingTelemetry("GPU-stand-in-1", 0.02, control, "host", True)
path = Path(telemetry._own_path)
evaluator.telemetry = telemetry
record = evaluator.evaluate(Case(seq_len=256))
samples = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if "\\n" in line]
print(json.dumps([record.to_json(), str(path), samples, telemetry.interval]))
telemetry.close()
"""


def test_a_record_holds_the_samples_of_its_gpu_during_the_measurement(gpu: Gpu) -> None:
    env = {**gpu.env, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATION], env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    record, path, samples, (start, end) = json.loads(done.stdout.splitlines()[-1])
    assert record["status"] == "ok"
    (summary,) = record["telemetry"]
    assert summary["power_w"]["median"] == pytest.approx(301.0)
    own_samples = [sample for sample in samples if sample["uuid"] == "GPU-stand-in-1"]
    during = sum(start <= sample["time"] <= end for sample in own_samples)
    assert during >= 8  # of nine waits for a sample; the first may have been taken before
    # The last one may have been taken in time and written too late.
    assert during - 1 <= summary["samples"] <= during
    assert not Path(path).exists()


def test_summary_without_samples_and_names_of_throttle_reasons() -> None:
    assert "missing" in summarize([])
    assert throttle_reasons(0) == []
    assert throttle_reasons(0x8 | 0x80) == ["hardware slowdown", "power brake"]


def test_reports_have_power_and_throttle_reasons() -> None:
    from cpbench.core.problem import Case
    from cpbench.reports.frame import tidy_table
    from cpbench.results.record import Record
    from cpbench.results.store import Run

    telemetry_of_ranks = [
        {"power_w": {"median": 300.0}, "held_down_by": ["power cap"]},
        {"power_w": {"median": 500.0}, "held_down_by": []},
    ]
    records = [
        Record(case=Case(), status="ok", telemetry=telemetry_of_ranks),
        Record(case=Case(seq_len=2048), status="ok"),
    ]
    table = tidy_table(Run({record.case.id: record for record in records}), "")
    assert table["power_w"].tolist()[0] == 400.0
    assert table["held_down_by"].tolist() == ["power cap", None]
    assert table["power_w"].isna().tolist() == [False, True]
