"""``pytest tests/microbench --benchmark-only``: saved runs, comparisons, regressions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from cpbench import masks
from cpbench.core.problem import Case

# The kernel of a user who edits it: SLOW is what changes from run to run.
KERNEL = '''
"""bands, and a pause."""
from cpbench.core.registry import OperatorInfo

SLOW_S = 0.0


class Mine:
    def __init__(self):
        from cpbench.kernels.bands.operator import Bands
        self.inner = Bands()
        self.unsupported, self.prepare = self.inner.unsupported, self.inner.prepare
        self.backward = self.inner.backward

    def forward(self, q, k, v, plan):
        import time
        time.sleep(SLOW_S)
        return self.inner.forward(q, k, v, plan)


OP = OperatorInfo(name="mine", summary="bands", source="here", load=Mine)
'''


@pytest.fixture
def bench(tmp_path: Path):
    """Runs the benchmarks of two operators, one of them in a file, with more options."""
    (tmp_path / "mine.py").write_text(KERNEL)
    (tmp_path / "s.toml").write_text(
        f"[sweep]\noperator = ['bands', '{tmp_path}/mine.py:OP', 'flex']\nseq_len = 256\n"
        "[measure]\nmax_seconds = 0.5\nmin_iterations = 5\nmax_iterations = 9\n"
    )

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "pytest", "tests/microbench", "-q", "--benchmark-only",
            "-p", "no:xdist", "-p", "no:cacheprovider", "--sweep", str(tmp_path / "s.toml"),
            f"--benchmark-storage={tmp_path / 'saved'}", *options,
        ]  # fmt: skip
        # A worker of pytest-xdist says in its environment that it is one: nothing is timed there.
        alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=alone
        )
        return done

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


def test_a_slower_kernel_fails_the_comparison_with_the_saved_run(bench) -> None:
    first = bench("--benchmark-save=before")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 passed, 1 skipped" in first.stdout
    (file,) = (bench.folder / "saved").rglob("*before.json")
    saved = {row["name"]: row for row in json.loads(file.read_text())["benchmarks"]}
    (name,) = (name for name in saved if "[bands-causal-256-4:4x64" in name)
    told = saved[name]
    # pytest-benchmark's median is cpbench's: the rate that cpbench tells follows from it.
    flops = sum(Case(seq_len=256).problem.flops(masks.build("causal", 256).area).values())
    rate = flops / told["stats"]["median"] / 1e12
    assert rate == pytest.approx(told["extra_info"]["tflops"], rel=1e-6)
    assert told["extra_info"]["worst_error"] < 1e-5
    assert 5 <= told["stats"]["rounds"] <= 9

    same = bench("--benchmark-compare", "--benchmark-compare-fail=median:2000%")
    assert same.returncode == 0, same.stdout + same.stderr
    kernel = bench.folder / "mine.py"
    kernel.write_text(kernel.read_text().replace("SLOW_S = 0.0", "SLOW_S = 0.4"))
    slower = bench("--benchmark-compare", "--benchmark-compare-fail=median:2000%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_a_wrong_kernel_is_no_benchmark(bench) -> None:
    kernel = bench.folder / "mine.py"
    kernel.write_text(kernel.read_text().replace("inner.forward(q,", "inner.forward(q * 1.01,"))
    found = bench("-k", "mine")
    assert found.returncode == 1
    assert "differs from float64" in found.stdout


def test_a_bad_sweep_is_one_line(bench) -> None:
    (bench.folder / "s.toml").write_text("[sweep]\noperator = 'bnads'\n")
    found = bench()
    assert found.returncode == 4
    assert "no operator 'bnads'" in found.stdout + found.stderr
    assert "Traceback" not in found.stdout + found.stderr


def test_nothing_is_timed_without_being_asked() -> None:
    command = [sys.executable, "-m", "pytest", "tests/microbench", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "passed" not in found.stdout
    assert found.returncode == 5, found.stdout + found.stderr  # nothing collected
