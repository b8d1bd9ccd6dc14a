"""How a Triton kernel is launched, as data: what compiles it ahead of time, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel in one configuration.

    Attributes:
        kernel: its name in the operator.
        function: ``"module:attribute"`` of the ``@triton.jit`` function.
        types: of the arguments that are not constants, by name (``"*bf16"``, ``"i32"``).
        constants: the others.
        aligned: names of arguments that are multiples of 16, as Triton finds them to be.
        num_warps, num_stages: as Triton takes them.
        config: the configuration in words.
        multiplies: whether it is to use the matrix units.
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
