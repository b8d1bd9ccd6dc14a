"""The dtype in which gradients travel between ranks.  Not a strategy.

Sums on a rank are float32 always.  In bfloat16 they take half the bytes, and every hop rounds:
measured up to 64 ranks by ``tests/microbench/error_growth.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

GRAD_DTYPES = ("float32", "bfloat16")


def checked(name: str, grad_dtype: str) -> str:
    """The parameter ``grad_dtype`` of strategy ``name``.

    Raises:
        ValueError: for a dtype that gradients do not travel in.
    """
    if grad_dtype not in GRAD_DTYPES:
        raise ValueError(f"{name}: grad_dtype = {grad_dtype!r} is not float32 or bfloat16")
    return grad_dtype


def refusal(name: str, grad_dtype: str, problem: Problem) -> str | None:
    """Why gradients of a problem cannot travel in ``grad_dtype``, or None."""
    if grad_dtype != "float32" and problem.dtype in ("float32", "float64"):
        return f"{name}: grad_dtype = {grad_dtype} is too coarse for gradients in {problem.dtype}"
    return None


def dtype(grad_dtype: str) -> torch.dtype:
    """As torch names it."""
    import torch

    found: torch.dtype = getattr(torch, grad_dtype)
    return found
