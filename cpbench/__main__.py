"""``python -m cpbench``: the command line."""

import sys
from pathlib import Path

if Path(sys.path[0]) == Path.cwd():  # where a folder named like a package would hide it
    del sys.path[0]

from cpbench.cli.main import main

main()
