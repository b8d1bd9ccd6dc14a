"""Patches of bfloat16 in Triton's interpreter, which runs the kernels without a GPU.

The interpreter stores bfloat16 as raw bits.  Up to Triton 3.9 it multiplies those bits in
``tl.dot``, and casts to bfloat16 by truncation where hardware rounds to nearest even.  The patches
cover what the kernels of this package do in bfloat16: load, dot, cast, store.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def patch_bfloat16() -> None:
    """Make ``tl.dot`` and casts of bfloat16 in the interpreter behave as on hardware."""
    import numpy as np

    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, convert = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def to_float32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def to_bfloat16(x: Any) -> Any:
        bits = x.data.astype(np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest even
        rounded = np.where(np.isnan(x.data), bits | 0x400000, rounded) >> 16
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, to_float32(a), to_float32(b), d, *rest)

    def rounds(src: Any, dst_type: Any) -> bool:
        return bool(dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        return to_bfloat16(src) if rounds(src, dst_type) else cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, mode: Any) -> Any:
        return to_bfloat16(src) if rounds(src, dst_type) else convert(self, src, dst_type, mode)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
