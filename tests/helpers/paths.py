"""Where things lie that tests run or read."""

from pathlib import Path

HELPERS = Path(__file__).parent
DATA = HELPERS.parent / "data"
ROOT = HELPERS.parents[1]
