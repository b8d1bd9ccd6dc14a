"""The tuner under Triton's interpreter: its selection and file are checked, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench.cli import main as cli
from cpbench.core.problem import Problem
from cpbench.kernels.triton import configs as triton_configs
from cpbench.kernels.triton.configs import (
    INTERPRETER_CONFIG,
    KERNELS,
    Config,
    kernel_configs,
    problem_class,
)
from cpbench.measure.device.opening import open_device
from cpbench.tools.compiler import tuner

PROBLEM = Problem(
    batch=1, seq_q=48, seq_k=48, heads_q=2, heads_kv=1, head_dim=16, dtype="float32"
)  # fmt: skip
GRID = {**tuner.SMALL_GRID, "descriptors": (0,)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuner, "REPEATS", 1)
    return tmp_path / "cpbench" / "tuned.json"


def test_the_fastest_configurations_are_saved_and_used(cache: Path) -> None:
    device = open_device("cpu", 0, 1)
    rows = list(tuner.tune("triton_band", "causal", PROBLEM, device, GRID))
    for kernel in KERNELS:
        measured = [row for row in rows if row["kernel"] == kernel and "us" in row]
        assert len(measured) == 2
        fastest = min(measured, key=lambda row: row["us"])["config"]
        (chosen,) = [row for row in rows if row["kernel"] == kernel and "chosen" in row]
        assert chosen == {"kernel": kernel, "chosen": fastest, "table": str(INTERPRETER_CONFIG)}
        assert str(kernel_configs("interpreter", 16, 4, gpu="interpreter")[kernel]) == fastest
    assert list(json.loads(cache.read_text())) == [problem_class("interpreter", 16, 4, False)]
    assert kernel_configs("interpreter", 16, 2, gpu="interpreter")["forward"] == INTERPRETER_CONFIG
    assert kernel_configs("interpreter", 16, 4)["forward"] == INTERPRETER_CONFIG


def test_another_class_is_added_and_a_wrong_result_is_not_selected(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"other": {"forward": {**vars(INTERPRETER_CONFIG)}}}))
    device = open_device("cpu", 0, 1)
    results = tuner._ConfigBenchmark._results

    def wrong_forward(self: tuner._ConfigBenchmark, configs: dict[str, Config]) -> dict:
        computed = results(self, configs)
        if configs["forward"].rows == 32:
            computed["out"] = computed["out"] * 1.1
        return computed

    monkeypatch.setattr(tuner._ConfigBenchmark, "_results", wrong_forward)
    rows = list(tuner.tune("triton_block_sparse", "block_sparse_uniform", PROBLEM, device, GRID))
    failed = [row for row in rows if "failed" in row]
    assert [row["kernel"] for row in failed] == ["forward"]
    assert failed[0]["failed"].startswith("out differs by 0.1 from")
    (chosen,) = [row for row in rows if row["kernel"] == "forward" and "chosen" in row]
    assert chosen["chosen"].startswith("64x32")
    assert set(json.loads(cache.read_text())) == {
        "other", problem_class("interpreter", 16, 4, True)
    }  # fmt: skip


def test_one_kernel_is_tuned_and_what_was_saved_of_others_is_kept(cache: Path) -> None:
    device = open_device("cpu", 0, 1)
    key, saved = problem_class("interpreter", 16, 4, False), Config(64, 64, 4, 1)
    cache.parent.mkdir()
    cache.write_text(json.dumps({key: {"forward": vars(saved), "backward_dq": vars(saved)}}))
    grid = {**GRID, "launches": (1, 2)}
    rows = list(tuner.tune("triton_band", "causal", PROBLEM, device, grid, ["backward_dkv"]))
    measured = [row["config"] for row in rows if "us" in row]
    assert sorted(measured) == [
        "32x32 w2 s1", "32x32 w2 s1 each", "64x32 w2 s1", "64x32 w2 s1 each"
    ]  # fmt: skip
    assert {row["kernel"] for row in rows} == {"backward_dkv"}
    tuned = kernel_configs("interpreter", 16, 4, gpu="interpreter")
    assert tuned["forward"] == tuned["backward_dq"] == saved
    assert str(tuned["backward_dkv"]) in measured


def test_candidates_repeat_no_work_and_begin_with_the_shipped_one() -> None:
    shipped = kernel_configs("cuda:90", 128, 2)["backward_dkv"]
    candidates = tuner._candidates("backward_dkv", "cuda:90", shipped, tuner.GRID)
    assert candidates[0] == shipped
    assert {(c.rows, c.num_warps) for c in candidates} == {(64, 4), (128, 4), (128, 8)}
    assert {c.launches for c in candidates} == {1, 2}
    older = tuner._candidates("forward", "cuda:80", shipped, tuner.GRID)
    assert {(c.descriptors, c.launches) for c in older} == {(0, 1)}
    assert (64, 8) in {(c.rows, c.num_warps) for c in older}


def test_a_damaged_file_is_named(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text('{"x": 3}')
    with pytest.raises(ValueError, match=r"tuned\.json is not a valid file of cpbench tune"):
        triton_configs.kernel_configs("cuda:90", 128, 2, gpu="NVIDIA H100")


def test_tune_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["tune", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "cpbench: tune needs a GPU, and there is none; the shipped configurations are used\n"
    )
    assert cli.invoke(["tune", "--kernel", "backward"]) == 2
    assert "--kernel: 'backward' is not one of forward, backward_dq" in capsys.readouterr().err
    assert cli.invoke(["tune", "--operator", "bands"]) == 2
    assert "'bands' is not one of" in capsys.readouterr().err
