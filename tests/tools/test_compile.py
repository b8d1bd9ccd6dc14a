"""`cpbench compile`: the shipped configurations on real GPU targets, and broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT

from cpbench.cli import main
from cpbench.kernels.triton.configs import KERNELS, kernel_configs
from cpbench.tools.compiler import compilation


def rows(**overrides: object) -> list[dict]:
    arguments = {
        "operators": ["triton_band"],
        "dtypes": ["bfloat16"],
        "head_dims": [128],
        "config": {},
        **overrides,
    }
    return compilation.compile_kernels(compilation.compile_requests(**arguments))


def test_shipped_configurations_spill_nothing_and_use_the_matrix_units() -> None:
    targets = ["cuda:80", "cuda:90", "cuda:100"]
    tiled = ["triton_band", "triton_block_sparse"]
    compiled = rows(targets=targets, head_dims=[64, 128], operators=tiled)
    compiled += rows(targets=targets, dtypes=["float16"], operators=["triton_band"])
    elementwise = 4  # kernels of triton_band that have no matrix product
    assert len(compiled) == len(targets) * (5 * len(KERNELS) + elementwise * 3)
    assert all(map(compilation.compiles_well, compiled))
    assert all(row["hot_local_bytes"] == 0 for row in compiled)
    instructions = {
        target: {
            row["matrix_instruction"]
            for row in compiled
            if row["target"] == target and row["kernel"] in KERNELS
        }
        for target in targets
    }
    assert instructions == {
        "cuda:80": {"mma.sync"}, "cuda:90": {"wgmma.mma_async"}, "cuda:100": {"tcgen05.mma"}
    }  # fmt: skip
    assert all(row["blocks_per_processor"] >= 1 for row in compiled)
    assert all(0 < row["occupancy"] <= 1 for row in compiled)


def test_large_heads_on_hopper_use_its_matrix_units_in_both_launches() -> None:
    """dK and dV at 256 took mma.sync in tiles of 32 rows before they had a launch each."""
    compiled = [row for row in rows(targets=["cuda:90"], head_dims=[256]) if row["tile"][1]]
    assert [row["kernel"] for row in compiled] == [
        "forward", "backward_dq", "backward_dkv.dk", "backward_dkv.dv"
    ]  # fmt: skip
    assert {row["verdict"] for row in compiled} == {"ok"}
    assert {row["matrix_instruction"] for row in compiled} == {"wgmma.mma_async"}


def test_values_of_another_head_dim_compile_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    """As in multi-head latent attention."""
    words = ["compile", "--operator", "triton_band", "--target", "cuda:90", "--head-dim", "192"]
    assert main.invoke([*words, "--head-dim-v", "128", "--dtype", "bfloat16"]) == 0
    table = capsys.readouterr().out
    assert "192/128" in table
    assert "128x64 w8 s2 tma each: ok; wgmma, 14 a warp" in " ".join(table.split())
    assert main.invoke([*words, "--head-dim-v", "512"]) == 2
    assert "--head-dim-v: 512 is not between 8 and 256" in capsys.readouterr().err


def test_two_warpgroups_for_64_rows_repeat_work_on_hopper(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The dK/dV configuration that was shipped once; 128 rows take fewer instructions in all."""
    config = {"rows": 64, "cols": 64, "num_warps": 8, "num_stages": 2}
    by_kernel = {row["kernel"]: row for row in rows(targets=["cuda:90"], config=config)}
    old = by_kernel["backward_dkv"]
    assert old["verdict"] == "repeats work: each exponential 2 times, by 8 warps"
    assert not compilation.compiles_well(old)
    (new,) = [row for row in rows(targets=["cuda:90"]) if row["kernel"] == "backward_dkv"]
    assert new["tile"] == [128, 64]
    assert new["matrix_instructions"] < 0.7 * old["matrix_instructions"]  # for twice the rows
    words = ["compile", "--operator", "triton_band", "--target", "cuda:90", "--head-dim", "128"]
    words += ["--dtype", "bfloat16", "--config", "rows=64,cols=64,num_warps=8,num_stages=2"]
    assert main.invoke(words) == 1
    assert "each exponential 2 times" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("cuda:80", {"rows": 64, "cols": 128, "num_warps": 8, "num_stages": 3}, "shared memory"),
        ("cuda:100", {"rows": 128, "cols": 128, "num_warps": 8}, "broken: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_broken(
    target: str, config: dict[str, int], reason: str
) -> None:
    by_kernel = {row["kernel"]: row for row in rows(targets=[target], config=config)}
    assert reason in by_kernel["backward_dkv"]["verdict"]
    assert by_kernel["backward_dkv"]["verdict"].startswith("broken")


PLANTED = """
import triton
import triton.language as tl
from cpbench.core.kernel_launch import Launch
from cpbench.tools.compiler.aot import compile_launch


@triton.jit
def copy(Sources, Out):
    x = Sources[0].load([0, 0]) + Sources[1].load([0, 0])
    rows, cols = tl.arange(0, 16), tl.arange(0, 32)
    tl.store(Out + rows[:, None] * 32 + cols[None, :], x)


if __name__ == "__main__":
    tile = "tensordesc<fp32[16, 32]>"
    types = {"Sources": (tile, tile), "Out": "*fp32"}
    launch = Launch("copy", "planted:copy", types, {}, ("Out",), 4, 1, "planted", multiplies=False)
    print(compile_launch(launch, "cuda:90")["verdict"])
"""


def test_a_kernel_that_compiles_and_cannot_be_launched_is_broken(tmp_path: Path) -> None:
    """Triton's launcher expands no descriptors in a tuple."""
    (tmp_path / "planted.py").write_text(PLANTED)
    environ = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "planted.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.startswith("broken: takes ")
    assert done.stdout.strip().endswith("arguments, and is launched with others")


def test_amd_targets_use_matrix_instructions() -> None:
    compiled = rows(targets=["hip:gfx942"], head_dims=[64])
    used = {row["matrix_instruction"] for row in compiled if row["kernel"] in KERNELS}
    assert used == {"v_mfma"}


def test_the_command_prints_json_and_exits_with_1_on_broken_kernels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compile", "--operator", "triton_band", "--target", "cuda:80"]
    words += ["--dtype", "float16", "--head-dim", "128"]
    assert main.invoke([*words, "--json"]) == 0
    assert [row["kernel"] for row in json.loads(capsys.readouterr().out)] == [
        *KERNELS, "row_terms", "merge_partials", "sum_partials", "merge_results"
    ]  # fmt: skip
    assert main.invoke([*words, "--config", "rows=64,cols=128,num_warps=8,num_stages=3"]) == 1
    assert "broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "cuda:99"], "--target: 'cuda:99' is not one of cuda:80"),
        (
            ["--operator", "bands"],
            "--operator: 'bands' is not one of mixers, paged.triton, triton_band, "
            "triton_block_sparse, triton_query_sparse",
        ),
        (["--config", "rows"], "--config: 'rows' is not of the form rows=128"),
        (["--config", "tiles=3"], "--config: 'tiles' is not one of rows, cols"),
        (["--head-dim", "1k"], "--head-dim: 1024 is not between 8 and 256"),
    ],
)
def test_invalid_options_give_one_line_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.invoke(["compile", *words]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("cpbench: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_targets_without_a_table_use_that_of_the_next_older_one() -> None:
    assert kernel_configs("cuda:103", 128, 2) == kernel_configs("cuda:100", 128, 2)
    assert kernel_configs("cuda:89", 64, 2) == kernel_configs("cuda:86", 64, 2)
    assert kernel_configs("hip:gfx950", 64, 2) == kernel_configs("hip:gfx942", 64, 2)
    assert kernel_configs("cuda:90", 72, 2) == kernel_configs("cuda:90", 96, 2)
