"""Initialisation of the math library behind torch's vector functions on CPUs."""

from __future__ import annotations

import functools


@functools.cache
def initialise_vector_math() -> None:
    """Call the functions that torch passes to MKL once, on one thread.

    Where several threads make the first call together, MKL may compute that call with errors of
    4e-5: float32 ``log`` did in about 1 of 1,000 new processes with two threads on a busy machine.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        x = torch.ones(8, dtype=dtype)
        for name in ("log", "log1p", "log2", "exp", "expm1", "sin", "cos", "tanh", "erf", "sqrt"):
            getattr(torch, name)(x)
            getattr(x.clone(), f"{name}_")()
