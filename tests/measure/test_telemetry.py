"""Telemetry through the real binding (nvidia-ml-py), against a small library like NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from paths import HELPERS

from cpbench.measure.telemetry import reasons, summary
from cpbench.results.store import Tail


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``libnvidia-ml.so.1``."""
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    source = HELPERS / "nvml_stand_in.c"
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Gpu:
    """What the stand-in's GPUs say, to be changed while a sampler runs."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.path = folder / "says"
        self.env = {
            **os.environ, "LD_LIBRARY_PATH": str(library), "CPBENCH_TEST_NVML": str(self.path),
        }  # fmt: skip

    def says(self, power_mw: int, energy_mj: int, sm_mhz: int, bits: int = 0) -> None:
        hidden = self.path.with_suffix(".new")
        hidden.write_text(f"{power_mw} {energy_mj} {sm_mhz} {bits}\n")
        hidden.replace(self.path)


@pytest.fixture
def gpu(tmp_path: Path, library: Path) -> Gpu:
    made = Gpu(tmp_path, library)
    made.says(300_000, 1_000, 1980)
    return made


@pytest.fixture
def sampler(tmp_path: Path, gpu: Gpu) -> Iterator[Tail]:
    """A running sampler's file."""
    path = tmp_path / "samples.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "cpbench.measure.telemetry", str(path), "0.02"], env=gpu.env
    )
    yield Tail(path)
    process.kill()
    process.wait()


def collected(tail: Tail, enough: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + 20
    while len(found) < enough:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        found += tail.read()
    return found


def test_samples_tell_what_the_gpus_say(gpu: Gpu, sampler: Tail) -> None:
    first = collected(sampler, 4)
    assert {sample["uuid"] for sample in first} == {"GPU-stand-in-0", "GPU-stand-in-1"}
    gpu.says(700_000, 61_000, 1200, 0x4 | 0x20)
    later = first + collected(sampler, 8)
    told = summary([sample for sample in later if sample["uuid"] == "GPU-stand-in-1"])
    assert told["power_w"]["min"] == pytest.approx(301.0)
    assert told["power_w"]["max"] == pytest.approx(701.0)
    assert told["energy_j"] == pytest.approx(60.0)
    assert told["sm_mhz"]["min"] == 1200
    assert told["held_down_by"] == ["power cap", "thermal (software)"]
    assert told["temperature_c"] == 51
    assert told["memory_bytes"] == 1 << 30
    assert "memory_mhz" not in told  # not supported, and so not there


def test_the_sampler_keeps_its_pace(gpu: Gpu, sampler: Tail) -> None:
    times = [s["time"] for s in collected(sampler, 80) if s["uuid"] == "GPU-stand-in-0"]
    gaps = sorted(b - a for a, b in pairwise(times))
    assert 0.015 < gaps[len(gaps) // 2] < 0.1


def test_topology(gpu: Gpu) -> None:
    code = (
        "import json; from cpbench.measure.telemetry import Nvml\n"
        "print(json.dumps(Nvml().topology()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=gpu.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["links"] == [["self", "host bridge"], ["host bridge", "self"]]
    assert told["gpus"][0] == {"uuid": "GPU-stand-in-0", "name": "Stand-in"}


@pytest.mark.parametrize("driver", [True, False])
def test_what_is_missing_is_said(tmp_path: Path, gpu: Gpu, driver: bool) -> None:
    """No library, or a library without a driver."""
    env = {
        k: v
        for k, v in gpu.env.items()
        if k != ("LD_LIBRARY_PATH" if driver else "CPBENCH_TEST_NVML")
    }
    path = tmp_path / "samples.jsonl"
    command = [sys.executable, "-m", "cpbench.measure.telemetry", str(path), "0.02"]
    assert subprocess.run(command, env=env, timeout=60).returncode == 0
    (said,) = Tail(path).read()
    assert said["missing"].startswith("not available: ")


EVALUATED = """
import json, sys, tempfile, time
import torch.distributed as dist
from cpbench.parallel.comm import Control, TorchComm
from cpbench.measure.device import Cpu
from cpbench.worker.evaluate import Evaluation
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.measure.telemetry import Telemetry

class Gpu(Cpu):
    def gpu(self):
        return "GPU-stand-in-1"

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
control = Control()
settings = MeasureSettings(max_seconds=0.5, min_iterations=20, max_iterations=10000, precision=0.0)
evaluation = Evaluation(Gpu(1), TorchComm(), control, settings, 1, lambda word: None)
evaluation.telemetry = Telemetry("GPU-stand-in-1", 0.02, control, "here", True)
time.sleep(1.0)
record = evaluation.record(Case(seq_len=256))
print(json.dumps([record.to_json(), evaluation.telemetry._made]))
evaluation.telemetry.close()
"""


def test_a_record_holds_what_its_gpu_said_meanwhile(gpu: Gpu) -> None:
    env = {**gpu.env, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATED], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    record, path = json.loads(done.stdout.splitlines()[-1])
    assert record["status"] == "ok"
    (told,) = record["telemetry"]
    assert told["power_w"]["median"] == pytest.approx(301.0)
    assert 3 <= told["samples"] <= 200
    assert not Path(path).exists()


def test_summaries_of_nothing_and_names_of_bits() -> None:
    assert "missing" in summary([])
    assert reasons(0) == []
    assert reasons(0x8 | 0x80) == ["hardware slowdown", "power brake"]


def test_reports_have_power_and_what_held_clocks_down() -> None:
    from cpbench.core.problem import Case
    from cpbench.reports.frame import frame
    from cpbench.results.record import Record
    from cpbench.results.store import Run

    told = [
        {"power_w": {"median": 300.0}, "held_down_by": ["power cap"]},
        {"power_w": {"median": 500.0}, "held_down_by": []},
    ]
    records = [
        Record(case=Case(), status="ok", telemetry=told),
        Record(case=Case(seq_len=2048), status="ok"),
    ]
    table = frame(Run({record.case.id: record for record in records}), "")
    assert table["power_w"].tolist()[0] == 400.0
    assert table["held_down_by"].tolist() == ["power cap", None]
    assert table["power_w"].isna().tolist() == [False, True]
