"""The table of compiled kernels in docs/kernels.md, from what ``cpbench compile --json`` prints.

    cpbench compile --head-dim 64,96,128,192,256 --target cuda:80,cuda:90,cuda:100 --json > new.json
    python tests/microbench/kernel_table.py new.json

A cell has the tile, its warps and stages, the matrix instructions of a warp in the hot loop for
64 x 64 scores, registers, and resident warps as a share of what the processor holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KERNELS = ("forward", "backward_dq", "backward_dkv", "backward_dkv.dk", "backward_dkv.dv")


def cell(row: dict[str, Any]) -> str:
    rows, cols = row.get("tile") or map(int, row["config"].split()[0].split("x"))
    each = row["matrix_instructions"] * 64 / rows * 64 / cols
    hot = f", **{row['hot_local_bytes']} bytes spilled**" if row["hot_local_bytes"] else ""
    repeats = ", **repeated**" if row["verdict"].startswith("repeats") else ""
    warps = f"w{row['warps']} s{row['stages']}"
    return (
        f"{rows}×{cols} {warps}: {each:.3g}, {row['registers']}, "
        f"{100 * row['occupancy']:.0f} %{hot}{repeats}"
    )


def main(path: str) -> None:
    compiled = [
        row
        for row in json.loads(Path(path).read_text("utf-8"))
        if row["kernel"] in KERNELS and row["operator"] == "triton_band"
    ]
    print("| target | head_dim | forward | dQ | dK, dV |\n| --- | --- | --- | --- | --- |")
    keys = dict.fromkeys((row["target"], row["head_dim"]) for row in compiled)
    for target, head_dim in keys:
        cells = {
            row["kernel"]: cell(row)
            for row in compiled
            if (row["target"], row["head_dim"]) == (target, head_dim)
        }
        dkv = [cells[name] for name in KERNELS[2:] if name in cells]
        name = target.replace("cuda:", "sm_")
        print(f"| {name} | {head_dim} | {cells['forward']} | {cells['backward_dq']} "
              f"| {'; '.join(dkv)} |")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
