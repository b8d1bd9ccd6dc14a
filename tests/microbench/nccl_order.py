"""Every strategy on NCCL's rules of order, simulated: all combinations of the matrix of tests.

``python tests/microbench/nccl_order.py [--ranks 2,3,4,5,6,7,8] [--strategy ring]``

The rules are in ``tests/helpers/devices/simulated_nccl.py``; a share of it is in
``tests/strategies/test_nccl_order.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

import matrix
from simulated_nccl import find_faults, record_strategy


def main() -> int:
    """Print the faults of each combination, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,3,4,5,6,7,8")
    parser.add_argument("--strategy", default="")
    options = parser.parse_args()
    faulty = 0
    for size in map(int, options.ranks.split(",")):
        started, simulated, refused = time.monotonic(), 0, 0
        for case in matrix.combinations(size, reduced=False):
            if not case.strategy.startswith(options.strategy):
                continue
            ranks = record_strategy(case.strategy, matrix.world_of(case, size))
            refused += ranks is None
            simulated += ranks is not None
            if ranks is not None and (faults := find_faults(ranks)):
                faulty += 1
                print(case, *faults[:3], sep="\n    ")
        seconds = time.monotonic() - started
        print(
            f"{size} ranks: {simulated} simulated, {refused} refused, {seconds:.0f} s", flush=True
        )
    print(f"faulty: {faulty}")
    return min(faulty, 1)


if __name__ == "__main__":
    sys.exit(main())
