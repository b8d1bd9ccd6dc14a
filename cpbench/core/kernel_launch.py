"""Launches of Triton kernels as data, to compile them ahead of time without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel with its argument types and configuration.

    Attributes:
        kernel: name of the kernel in its operator.
        function: ``"module:attribute"`` of the ``@triton.jit`` function.
        types: types of the non-constant arguments by name (``"*bf16"``, ``"i32"``).
        constants: values of the constant arguments by name.
        aligned: names of arguments that Triton may assume to be multiples of 16.
        num_warps, num_stages: launch parameters of Triton.
        config: description of the configuration.
        multiplies: whether it is expected to use the matrix units.
    """

    kernel: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    config: str
    multiplies: bool = True
