"""Step summaries, and the formats of experiment trackers, read back by their own packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from made_records import launches, record, write_run

from cpbench.reports import trackers
from cpbench.reports.collection import Collection, collect
from cpbench.reports.tables.github import render_summary


@pytest.fixture
def results(tmp_path: Path) -> Collection:
    records = [
        one
        for length in range(1024, 1024 * 300, 1024)
        for operator, ms in (("bands", 2.0), ("sdpa.cpu_flash", 3.0))
        for one in launches(operator, [ms * length / 1024], seq_len=length)
    ]
    records.append(record("flex", status="crash", reason="line one\nline two"))
    write_run(tmp_path / "run", records)
    return collect([tmp_path / "run"])


def test_a_summary_has_the_answer_and_keeps_to_its_size(results: Collection) -> None:
    text = render_summary(results)
    lines = text.splitlines()
    assert lines[2] == "**bands is fastest on 299 of 299 problems, by up to 1.50x.**"
    assert "- **crash** flex" in text
    assert "299 more" not in text
    for size in (60_000, 8_000, 2_000):
        text = render_summary(results, size)
        assert len(text.encode()) <= size
        assert "**bands is fastest" in text
        assert ("more problems." in text) == (size < 60_000)


def test_tensorboard(results: Collection, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers.write_tensorboard(results, tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"tensors": 0})
    events.Reload()
    tag = "time_ms/bands, causal, world size 1"
    assert tag in events.Tags()["tensors"]
    points = events.Tensors(tag)
    assert [(p.step, p.tensor_proto.float_val[0]) for p in points[:2]] == [(1024, 2), (2048, 4)]
    assert len(points) == 299


def test_wandb(results: Collection, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    trackers.write_wandb(results, tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert table.read_text().count("sdpa.cpu_flash") == 299


def test_the_command(results: Collection, tmp_path: Path) -> None:
    run = next(iter(results.runs))

    def report(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "cpbench", "report", run, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, _ = report("--format", "github", "--where", "seq_len=1k")
    assert code == 0
    assert "**bands is fastest on 1 of 1 problem, by 1.50x.**" in out
    code, _, err = report("--format", "tensorboard")
    assert (code, err) == (2, "cpbench: --format tensorboard needs a folder: -o FOLDER\n")
