"""``pytest tests/microbench --benchmark-only``: saved runs, comparisons, regressions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT

from cpbench import masks
from cpbench.core.problem import Case

# A user's kernel, edited between runs: SLOW_S changes.
KERNEL = '''
"""bands with a pause."""
from cpbench.core.registry import OperatorInfo

SLOW_S = 0.1


class Mine:
    def __init__(self):
        from cpbench.kernels.bands.operator import Bands
        self.inner = Bands()
        self.unsupported, self.prepare = self.inner.unsupported, self.inner.prepare
        self.backward = self.inner.backward

    def forward(self, qkv, plan):
        import time
        time.sleep(SLOW_S)
        return self.inner.forward(qkv, plan)


OP = OperatorInfo(name="mine", summary="bands", source="this file", load=Mine)
'''


@pytest.fixture
def bench(tmp_path: Path):
    """A function that runs the benchmarks of three operators, one of them in a file."""
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
        # Without the variables of a pytest-xdist worker, in which nothing is timed.
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")
        }
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, env=environment
        )

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


def test_a_slower_kernel_fails_the_comparison_with_the_saved_run(bench) -> None:
    first = bench("--benchmark-save=before")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 passed, 1 skipped" in first.stdout
    (file,) = (bench.folder / "saved").rglob("*before.json")
    saved = {row["name"]: row for row in json.loads(file.read_text())["benchmarks"]}
    (name,) = (name for name in saved if "[bands-causal-256-4:4x64" in name)
    benchmark = saved[name]
    # The median of pytest-benchmark is that of cpbench: it gives the same TFLOP/s.
    flops = sum(Case(seq_len=256).problem.flops(masks.build("causal", 256).area).values())
    rate = flops / benchmark["stats"]["median"] / 1e12
    assert rate == pytest.approx(benchmark["extra_info"]["tflops"], rel=1e-6)
    assert benchmark["extra_info"]["worst_error"] < 1e-5
    assert 5 <= benchmark["stats"]["rounds"] <= 9

    # The pause is most of its time, so that what else the machine does is little of it.
    compare = ("-k", "mine", "--benchmark-compare", "--benchmark-compare-fail=median:400%")
    same = bench(*compare)
    assert same.returncode == 0, same.stdout + same.stderr
    kernel = bench.folder / "mine.py"
    kernel.write_text(kernel.read_text().replace("SLOW_S = 0.1", "SLOW_S = 0.8"))
    slower = bench(*compare)
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr


def test_a_wrong_kernel_fails(bench) -> None:
    kernel = bench.folder / "mine.py"
    kernel.write_text(
        kernel.read_text().replace(
            "inner.forward(qkv,", "inner.forward(qkv._replace(q=qkv.q * 1.01),"
        )
    )
    result = bench("-k", "mine")
    assert result.returncode == 1
    assert "differs from float64" in result.stdout


def test_a_bad_sweep_is_one_line(bench) -> None:
    (bench.folder / "s.toml").write_text("[sweep]\noperator = 'bnads'\n")
    result = bench()
    assert result.returncode == 4
    assert "no operator 'bnads'" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_nothing_is_timed_without_benchmark_only() -> None:
    command = [sys.executable, "-m", "pytest", "tests/microbench", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert "passed" not in result.stdout
    assert result.returncode == 5, result.stdout + result.stderr  # nothing collected
