"""`cpbench compile`: the shipped configurations for real GPU targets, and what would be broken."""

from __future__ import annotations

import json

import pytest

from cpbench.cli import main
from cpbench.kernels.triton.configs import KERNELS, choose
from cpbench.tools import compilation


def rows(**wanted: object) -> list[dict]:
    asked = {
        "operators": ["triton_band"],
        "dtypes": ["bfloat16"],
        "head_dims": [128],
        "config": {},
        **wanted,
    }
    return compilation.compiled(compilation.requests(**asked))


@pytest.mark.timeout(900)
def test_shipped_configurations_spill_nothing_and_use_the_matrix_units() -> None:
    targets = ["cuda:80", "cuda:90", "cuda:100"]
    found = rows(targets=targets, head_dims=[64, 128], operators=[])
    found += rows(targets=targets, dtypes=["float16"], operators=["triton_band"])
    others = 3  # of triton_band: they only read and write
    assert len(found) == len(targets) * (5 * len(KERNELS) + others * 3)
    assert {row["verdict"] for row in found} == {"ok"}
    assert all(row["spill_bytes"] == 0 for row in found)
    instructions = {
        target: {
            row["matrix_instruction"]
            for row in found
            if row["target"] == target and row["kernel"] in KERNELS
        }
        for target in targets
    }
    assert instructions == {
        "cuda:80": {"mma.sync"}, "cuda:90": {"wgmma.mma_async"}, "cuda:100": {"tcgen05.mma"}
    }  # fmt: skip
    assert all(row["blocks_per_processor"] >= 1 for row in found)
    assert all(0 < row["occupancy"] <= 1 for row in found)


@pytest.mark.parametrize(
    ("target", "config", "words"),
    [
        ("cuda:80", {"rows": 64, "cols": 128, "num_warps": 8, "num_stages": 3}, "shared memory"),
        ("cuda:100", {"rows": 128, "cols": 128, "num_warps": 8}, "broken: "),
    ],
)
def test_what_does_not_fit_is_caught(target: str, config: dict[str, int], words: str) -> None:
    found = {row["kernel"]: row for row in rows(targets=[target], config=config)}
    assert words in found["backward_dkv"]["verdict"]
    assert found["backward_dkv"]["verdict"].startswith("broken")


def test_amd_has_matrix_instructions_too() -> None:
    found = rows(targets=["hip:gfx942"], head_dims=[64])
    used = {row["matrix_instruction"] for row in found if row["kernel"] in KERNELS}
    assert used == {"v_mfma"}


def test_the_command_prints_json_and_tells_broken_by_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["compile", "--operator", "triton_band", "--target", "cuda:80"]
    words += ["--dtype", "float16", "--head-dim", "128"]
    assert main.invoke([*words, "--json"]) == 0
    assert [row["kernel"] for row in json.loads(capsys.readouterr().out)] == [
        *KERNELS, "row_terms", "merge_parts", "add_parts"
    ]  # fmt: skip
    assert main.invoke([*words, "--config", "rows=64,cols=128,num_warps=8,num_stages=3"]) == 1
    assert "broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "cuda:99"], "--target: 'cuda:99' is none of cuda:80"),
        (
            ["--operator", "bands"],
            "--operator: 'bands' is none of triton_band, triton_block_sparse",
        ),
        (["--config", "rows"], "--config: 'rows' is not of the form rows=128"),
        (["--config", "tiles=3"], "--config: 'tiles' is none of rows, cols"),
        (["--head-dim", "1k"], "--head-dim: 1024 is not between 8 and 256"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.invoke(["compile", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("cpbench: ")
    assert said in told
    assert told.count("\n") == 1


def test_targets_without_a_table_take_that_of_the_newest_older_one() -> None:
    assert choose("cuda:103", 128, 2) == choose("cuda:100", 128, 2)
    assert choose("cuda:89", 64, 2) == choose("cuda:86", 64, 2)
    assert choose("hip:gfx950", 64, 2) == choose("hip:gfx942", 64, 2)
    assert choose("cuda:90", 96, 2) == choose("cuda:90", 128, 2)
