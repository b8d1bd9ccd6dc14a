"""Triton kernels run under Triton's interpreter here, as they must where there is no GPU.

Triton reads this when it is first imported, so it stands before anything else.  Benchmarks are of
what is compiled.
"""

from __future__ import annotations

import os
import sys

if "--benchmark-only" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
