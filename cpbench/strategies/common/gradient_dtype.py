"""The dtype in which gradients are sent between ranks.  Not a strategy.

Sums on a rank are always float32.  Sending bfloat16 takes half the bytes but rounds at every hop:
``tests/microbench/error_growth.py`` measures the error up to 64 ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

GRAD_DTYPES = ("float32", "bfloat16")


def validate(name: str, grad_dtype: str) -> str:
    """Return the parameter ``grad_dtype`` of strategy ``name``.

    Raises:
        ValueError: if gradients cannot be sent in this dtype.
    """
    if grad_dtype not in GRAD_DTYPES:
        raise ValueError(f"{name}: grad_dtype = {grad_dtype!r} is not float32 or bfloat16")
    return grad_dtype


def refusal(name: str, grad_dtype: str, problem: Problem) -> str | None:
    """The reason why gradients of a problem cannot be sent in ``grad_dtype``, or None."""
    if grad_dtype != "float32" and problem.dtype in ("float32", "float64"):
        return f"{name}: grad_dtype = {grad_dtype} is too coarse for gradients in {problem.dtype}"
    return None


def torch_dtype(grad_dtype: str) -> torch.dtype:
    """The torch dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, grad_dtype)
    return dtype
