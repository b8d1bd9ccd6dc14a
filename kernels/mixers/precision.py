"""Products of float32 in float32, whatever the process allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BACKEND = {"cpu": "mkldnn", "cuda": "cuda"}


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, matrix products of float32 use neither TF32 nor bfloat16: a state is folded thousands
    of times, and errors of 4e-4 (TF32) add up."""
    import torch

    if device.type == "meta":  # computes nothing
        yield
        return
    backend = BACKEND[device.type]
    read, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = read(backend, "matmul")
    if before == "ieee":
        yield
        return
    set_(backend, "matmul", "ieee")
    try:
        yield
    finally:
        set_(backend, "matmul", before)
