"""Garbage collection in processes of cpbench's own."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from limits import LIMIT_S

from cpbench.core.subprocess_call import collection_paused


def test_collection_goes_on_after_a_pause_and_sees_everything() -> None:
    made: list[object] = []
    with collection_paused():
        assert not gc.isenabled()
        made.append([])
    with pytest.raises(ImportError, match="none"), collection_paused():
        raise ImportError("none")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0  # what is frozen, gc.get_objects() does not list
    assert any(item is made for item in gc.get_objects())


CODE = """
import atexit, gc
from cpbench.core.subprocess_call import collect_nothing_at_exit
atexit.register(lambda: print("last:", gc.get_freeze_count() > 0))
collect_nothing_at_exit()
atexit.register(lambda: print("first:", gc.get_freeze_count() > 0))
"""


def test_nothing_is_left_to_collect_once_other_exit_functions_have_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout == "first: False\nlast: True\n"
