"""Settings of all tests, made before anything is imported.

Triton kernels run under Triton's interpreter, as they must where there is no GPU (benchmarks are of
what is compiled).  Terminals have 100 columns, whatever the tests run in.
"""

from __future__ import annotations

import os
import sys

if "--benchmark-only" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["COLUMNS"] = "100"
