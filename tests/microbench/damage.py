"""How much damage of single bits in a run directory would go unnoticed: none should.

    python tests/microbench/damage.py [--flips 1000] [--seed 0]

Flips random bits of a run directory of real records, one at a time, over all its files, and reads
it as all commands do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

from bit_flips import make_run, silent_damage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        silent, named = silent_damage(make_run(Path(folder) / "run"), given.flips, given.seed)
    harmless = given.flips - named - len(silent)
    print(f"{given.flips} flips: {named} named, {harmless} changed nothing, {len(silent)} silent")
    for flip in silent:
        print(f"  {flip}")
    return bool(silent)


if __name__ == "__main__":
    sys.exit(main())
