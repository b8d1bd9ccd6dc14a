"""Patches of Triton's interpreter, which runs the kernels without a GPU.

The interpreter stores bfloat16 as raw bits.  Up to Triton 3.9 it multiplies those bits in
``tl.dot``, and casts to bfloat16 by truncation where hardware rounds to nearest even.  The patches
cover what the kernels of this package do in bfloat16: load, dot, cast, store.

It also replaces all functions of the language anew whenever a device function is called, and makes
a table of all dtypes for each operation: half of the time of a launch.
"""

from __future__ import annotations

import functools
from typing import Any

REPLACED = (
    "_patch_lang", "_get_np_dtype", "GridExecutor", "InterpretedFunction", "InterpreterError"
)  # fmt: skip


@functools.cache
def patch_interpreter() -> None:
    """Make bfloat16 behave as on hardware, and device functions start at once."""
    _patch_bfloat16()
    _patch_calls()


def _patch_calls() -> None:
    """Replace the functions of the language once in each launch for each kind of module that has
    device functions, and keep the table of dtypes."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in REPLACED):
        return  # another version of Triton, slower
    replace_language = interpreter._patch_lang
    replaced: set[tuple[bool, bool]] = set()  # in this launch
    launch = interpreter.GridExecutor.__call__

    @functools.cache
    def languages(function: Any) -> tuple[bool, bool]:
        """Whether a function sees ``triton.language``, and its ``core``."""
        seen = list(function.__globals__.values())
        return any(x is tl for x in seen), any(x is tl.core for x in seen)

    look_up = interpreter._get_np_dtype
    of_scalar = functools.cache(look_up)

    def dtype_in_numpy(kind: Any) -> Any:
        hashable = not isinstance(kind.scalar, tl.pointer_type)
        return of_scalar(kind.scalar) if hashable else look_up(kind)

    def run_grid(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        if languages(self.fn) not in replaced:
            replaced.add(languages(self.fn))
            replace_language(self.fn)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = run_grid
    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter._get_np_dtype = dtype_in_numpy


def _patch_bfloat16() -> None:
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
