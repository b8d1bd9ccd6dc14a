"""Triton's interpreter, where there is no GPU: its bfloat16 mended.

The interpreter keeps bfloat16 as raw bits.  Up to 3.9 it multiplies those bits in ``tl.dot`` and
truncates casts to bfloat16 that hardware rounds to nearest even; both are put right here, for as
much as the kernels of this package do in bfloat16: load, dot, cast, store.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def mend() -> None:
    """Make ``tl.dot`` and casts of bfloat16 do in the interpreter what they do on hardware."""
    import numpy as np

    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, convert = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def rounded(x: Any) -> Any:
        bits = x.data.astype(np.float32).view(np.uint32)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        nearest = np.where(np.isnan(x.data), bits | 0x400000, even) >> 16
        return TensorHandle(nearest.astype(np.uint16), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *rest)

    def to_bfloat16(src: Any, dst_type: Any) -> bool:
        return bool(dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        return rounded(src) if to_bfloat16(src, dst_type) else cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, mode: Any) -> Any:
        return rounded(src) if to_bfloat16(src, dst_type) else convert(self, src, dst_type, mode)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
