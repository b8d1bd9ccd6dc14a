"""Nothing that a command prints as a table is wider than a terminal of 80 columns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from limits import LIMIT_S
from made_records import launches, noisy, write_run

from cpbench.cli import main
from cpbench.simulator.cluster import load
from cpbench.tools import links
from cpbench.tools.calibration import calibrate as calibration
from cpbench.tools.calibration import tables
from cpbench.tools.compiler import compilation
from cpbench.tools.verification_table import summary_lines

WIDTH = 80
MASKS = ("causal", "global_sliding_window:num_global=64,window=1024", "block_causal_document:"
         "block_size=1024,doc_lens=[300,200,524]")  # fmt: skip
SELECTOR = "minference.vertical_slash:last=64,slashes=1024,verticals=1024"
METHODS = (
    {"operator": SELECTOR},
    {"operator": SELECTOR, "strategy": "ring_allgather", "layout": "zigzag_document"},
    {"operator": "bands"},
    {"operator": "bands", "strategy": "usp:ulysses=8", "layout": "zigzag_document"},
    {"operator": "sdpa.cpu_flash", "strategy": "ring_flash_attn.zigzag", "layout": "zigzag"},
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs with long names, of which nothing is common to all cases."""
    folder, names = tmp_path_factory.mktemp("wide"), []
    for name, factor in (("base", 1.0), ("new", 1.3)):
        records = [
            one
            for i, mask in enumerate(MASKS)
            for k, method in enumerate(METHODS)
            for dtype in ("float32", "bfloat16")
            for one in launches(
                method["operator"], noisy(10.0 * (i + k + 1) * factor, 6, k), mask=mask,
                dtype=dtype, world_size=16 if "strategy" in method else 1, seq_len=1024 << i,
                num_heads_q=8 * (i + 1), num_heads_kv=8, batch=i + 1,
                flags=["oversubscribed"] if k == 3 else [],
                **{key: value for key, value in method.items() if key != "operator"},
            )
        ]  # fmt: skip
        for one in records:
            if str(one.case.operator) == SELECTOR:
                one.flags.append("approximate")
                one.quality = {
                    "mass": 0.9, "density": 0.5, "best_mass": 0.95, "out_error": 0.1, "found": 0.5,
                    "solved": 0.2, "index_recall": 0.9, "index_build_us": 1e6, "index_bytes": 1e8,
                }  # fmt: skip
                times = [[12345.0] * 9] * one.case.world_size
                one.parts_us = {"select": times, "plan": times, "kernel": times}
                one.bytes_sent = {"fwd": [12345678] * one.case.world_size}
                one.allgather_bytes = one.bytes_sent
        write_run(folder / name, records)
        names.append(str(folder / name))
    return names


def widest(text: str) -> str:
    return max(text.splitlines(), key=len, default="")


def output(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cpbench", *words], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": str(WIDTH)}, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("list", "operators"), ("list", "operators", "--device", "cuda"), ("list", "strategies"),
        ("list", "layouts"), ("list", "masks"), ("list", "inputs"), ("list", "sweeps"),
        ("list", "support"), ("doctor",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_listings(words: tuple[str, ...]) -> None:
    assert len(widest(output(*words))) <= WIDTH


@pytest.mark.parametrize(
    "words",
    [
        ("report",), ("report", "--format", "table"), ("report", "--pivot", "mask,method"),
        ("report", "--pivot", "seq_len,operator", "--metric", "peak"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_reports(runs: list[str], words: tuple[str, ...]) -> None:
    text = output(words[0], runs[0], *words[1:])
    assert MASKS[1] in text  # in full, if only in a legend
    if "--pivot" not in words:
        assert "all-gather" in text
    assert len(widest(text.replace(runs[0], "RUN"))) <= WIDTH


@pytest.mark.parametrize("command", ["compare", "history"])
def test_comparisons(runs: list[str], command: str) -> None:
    text = output(command, *runs)
    for name in runs:
        text = text.replace(name, "RUN")
    assert len(widest(text)) <= WIDTH


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    main.invoke(["--help"])
    listed = capsys.readouterr().out.split("\nCommands:\n")[1].split("\n\n")[0]
    assert not [line for line in listed.splitlines() if line.endswith("...")], "a cut summary"
    for line in listed.splitlines():
        main.invoke([line.split()[0], "--help"])
        assert len(widest(capsys.readouterr().out)) <= WIDTH


def test_tables_of_tools(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpbench.reports.tables.terminal import print_rows

    monkeypatch.setenv("COLUMNS", str(WIDTH))
    verified = {
        "operator": "minference.vertical_slash:last=64,slashes=1024", "ranks": "1 2 3 4",
        "strategy/layout": "usp:ulysses=8/zigzag_document", "dtype": "bfloat16", "ok": 1000,
        "refused": 1000, "failed": 0, **dict.fromkeys(("out", "lse", "dq", "dk", "dv"), "3.0e-03"),
        "of limit": "100%", "why": "unsupported: a reason that takes more than one line " * 3,
    }  # fmt: skip
    print("\n".join(summary_lines([verified, verified | {"dtype": "float32"}])))
    compiled = {
        "target": "cuda:100", "dtype": "bfloat16", "head_dim": 192, "head_dim_v": 128,
        "kernel": "backward_dkv",
        "config": "rows=128,cols=128,num_warps=8,num_stages=3", "registers": 255, "spill_bytes": 0,
        "shared_bytes": 200 << 10, "tensor_columns": 512, "matrix_instruction": "tcgen05.mma",
        "occupancy": 0.125, "verdict": "ok",
    }  # fmt: skip
    of_mixers = {"head_dim": 64, "head_dim_v": 0, "kernel": "gated_deltanet.chunk_gradients",
                 "config": "chunk 32 w8", "matrix_instructions": 12, "tile": (0, 0)}  # fmt: skip
    print_rows(compilation.table([compiled, compiled | of_mixers]))
    groups = [{"ranks": list(range(8)), "times_us": [1.0, 2.0]}] * 2
    row = {"link": "across", "operation": "reduce_scatter", "ranks": 16, "bytes": 1 << 26,
           "groups": groups}  # fmt: skip
    world = {"ranks": 16, "ranks_per_node": 8, "hosts": ["a-long-host-name"] * 16, "flags": [],
             "device": {"type": "cuda"}}  # fmt: skip
    links._print_tables(world, [{**row, **links.link_statistics(row)}])
    constants = [
        calibration.Constant("kernels.0.bwd", "sdpa.cpu_flash bfloat16 128 bwd", "full_rate", 0.91,
                             (0.000123, 12345678.0)),
        calibration.Constant("collectives", "collectives", "reduce_scatter.across", 3.0, None),
    ]  # fmt: skip
    judged = [
        calibration.Judged(
            "-", "usp:inner=allgather,ulysses=8/zigzag_document x128", "bwd", 1.0, 9.0
        )
    ]
    cluster = load("h100-ib")
    fitted = calibration.Calibration(
        cluster, constants, ["bands bfloat16 128 fwd grid"] * 30, [0.1], [], judged, []
    )
    print_rows(tables.constant_rows(fitted))
    print_rows(tables.method_rows(fitted))
    text = capsys.readouterr().out
    assert "slowest: ranks 0-7" in text
    assert "reduce_scatter.across" in text
    assert len(widest(text)) <= WIDTH
