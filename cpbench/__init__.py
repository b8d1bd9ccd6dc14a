"""cpbench: attention kernels and context-parallel strategies, measured and verified.

``attention``, ``mix`` and their ``distributed_`` namesakes are the public computations; importing
``cpbench`` loads neither torch nor numpy until one of them is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpbench import layout, masks
    from cpbench.api import attention, distributed_attention, distributed_mix, mix
    from cpbench.core.operator import Unsupported
    from cpbench.inputs.rotary import rope
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.reports.frame import load

__version__ = "0.1.0"
__all__ = [
    "AttnMask",
    "Unsupported",
    "attention",
    "distributed_attention",
    "distributed_mix",
    "layout",
    "load",
    "masks",
    "mix",
    "rope",
]

_HOME = {
    "AttnMask": "cpbench.masks.attn_mask",
    "Unsupported": "cpbench.core.operator",
    "attention": "cpbench.api",
    "distributed_attention": "cpbench.api",
    "distributed_mix": "cpbench.api",
    "load": "cpbench.reports.frame",
    "mix": "cpbench.api",
    "rope": "cpbench.inputs.rotary",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("layout", "masks"):
        return importlib.import_module(f"cpbench.{name}")
    raise AttributeError(f"module 'cpbench' has no attribute {name!r}")
