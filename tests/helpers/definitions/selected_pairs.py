"""Attention to selected pairs in float64, and what a plan on the device may not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.core.problem import Problem

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations that bring values from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in SYNCHRONISING, f"{func} synchronises"
        return func(*args, **(kwargs or {}))


def problem_of(seq_q: int, seq_k: int, **changes: Any) -> Problem:
    shape = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim": 32, "dtype": "float32"}
    return Problem(seq_q=seq_q, seq_k=seq_k, **{**shape, **changes})


def reference(tensors: list[torch.Tensor], visible: np.ndarray) -> dict[str, torch.Tensor]:
    """The results of q, k, v and dout for ``[B, H, S, T]`` visible pairs, in float64."""
    q, k, v, dout = (x.double().transpose(1, 2) for x in tensors)  # [B, H or G, tokens, D]
    scale, heads_kv = q.shape[3] ** -0.5, k.shape[1]
    keys, values = (x.repeat_interleave(q.shape[1] // heads_kv, 1) for x in (k, v))
    scores = (q @ keys.mT * scale).masked_fill(~torch.as_tensor(visible), -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    dp = dout @ values.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (heads_kv, -1)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
    results = {"out": p @ values, "dq": ds @ keys, "dk": dk, "dv": dv}
    return {"lse": lse} | {name: x.transpose(1, 2) for name, x in results.items()}
