"""Sending one number a query in place of its output.  Not a strategy.

The backward pass needs the output only through delta = sum(dout * out).  Operators take the output
itself, so the receiver makes one up with the same delta: the multiple of dout, which is the
shortest such vector, so that rounding it costs no more than rounding the output did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def of(dout_BSHD: torch.Tensor, out_BSHD: torch.Tensor) -> torch.Tensor:
    """delta, ``[B, S, H]`` float32."""
    return (dout_BSHD.float() * out_BSHD.float()).sum(-1)


def stand_in(dout_BSHD: torch.Tensor, delta_BSH: torch.Tensor) -> torch.Tensor:
    """An output that has this delta, in the dtype of dout; 0 where dout is 0 (and so is delta)."""
    square = dout_BSHD.float().square().sum(-1)
    factor = (delta_BSH / square).masked_fill_(square == 0, 0.0)
    made: torch.Tensor = (dout_BSHD.float() * factor.unsqueeze(-1)).to(dout_BSHD.dtype)
    return made
