"""What one node can do, as one JSON line: ``python -m cpbench.slurm.node_probe OUT DEVICE RANKS``.

Short and blunt: does torch start, are the GPUs there and free, do they compute what they should,
can results be written from here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cpbench.results.store import StoreError, check_writable

MARK = "CPBENCH-NODE "
SIZE = 2048
BUSY_SHARE = 0.2  # of a GPU's memory in use before anything of ours is


def probe(out: Path, device: str, ranks: int) -> dict[str, object]:
    """``{"why": None or what is wrong, "seconds": ...}``, the time of a fixed piece of work on the
    slowest device."""
    import torch

    from cpbench.measure.device import shortage

    why = shortage(device, ranks)
    slowest = 0.0
    for index in range(ranks if device == "cuda" and why is None else 1):
        where = torch.device("cuda", index) if device == "cuda" and why is None else "cpu"
        if device == "cuda" and why is None:
            free, total = torch.cuda.mem_get_info(index)
            if 1 - free / total > BUSY_SHARE:
                why = f"GPU {index} is in use: {1 - free / total:.0%} of its memory"
                break
        # Whole numbers, so that every order of adding gives the same.
        x = (torch.arange(SIZE * 64, device=where).reshape(SIZE, 64) % 7).float()
        want = (x.double() @ x.double().T).float()
        for _ in range(2):  # the first one loads libraries
            begun = time.perf_counter()
            wrong = not torch.equal(x @ x.T, want)
            took = time.perf_counter() - begun
        slowest = max(slowest, took)
        if wrong:
            why = f"{where} computes wrong products"
            break
    try:
        check_writable(out)
    except StoreError as error:
        why = why or str(error)
    return {"why": why, "seconds": slowest}


def main(argv: list[str]) -> int:
    out, device, ranks = argv
    print(MARK + json.dumps(probe(Path(out), device, int(ranks))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
