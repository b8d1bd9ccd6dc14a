"""Health check of one node: ``python -m cpbench.slurm.node_probe OUT DEVICE RANKS``.

Checks that torch starts, that the GPUs are present, free and compute correctly, and that results
can be written.  Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from cpbench.core.subprocess_call import collect_rarely
from cpbench.results.store import StoreError, check_writable

LINE_PREFIX = "CPBENCH-NODE "
MATRIX_SIZE = 2048
MAX_USED_MEMORY = 0.2  # fraction of a GPU's memory that may be in use before the run


def probe_node(out: Path, device: str, ranks: int) -> dict[str, object]:
    """Check a node: ``{"why": the problem or None, "seconds": time of a fixed matrix product}``, of
    the slowest device."""
    import torch

    from cpbench.measure.device.opening import device_shortage

    why = device_shortage(device, ranks)
    slowest = 0.0
    for index in range(ranks if device == "cuda" and why is None else 1):
        where = torch.device("cuda", index) if device == "cuda" and why is None else "cpu"
        if device == "cuda" and why is None:
            free, total = torch.cuda.mem_get_info(index)
            if 1 - free / total > MAX_USED_MEMORY:
                why = f"GPU {index} is in use: {1 - free / total:.0%} of its memory"
                break
        # Small integers, so that the result does not depend on the order of summation.
        x = (torch.arange(MATRIX_SIZE * 64, device=where).reshape(MATRIX_SIZE, 64) % 7).float()
        expected = (x.double() @ x.double().T).float()
        for _ in range(2):  # the first product loads libraries
            started = time.perf_counter()
            wrong = not torch.equal(x @ x.T, expected)
            seconds = time.perf_counter() - started
        slowest = max(slowest, seconds)
        if wrong:
            why = f"{where} computes wrong products"
            break
    try:
        check_writable(out)
    except StoreError as error:
        why = why or str(error)
    return {"why": why, "seconds": slowest}


def main(argv: list[str]) -> int:
    collect_rarely()
    out, device, ranks = argv
    print(LINE_PREFIX + json.dumps(probe_node(Path(out), device, int(ranks))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
