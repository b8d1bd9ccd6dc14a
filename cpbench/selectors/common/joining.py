"""Branches joined by their log-sum-exp into one softmax, and keys that are derived from the inputs.

The outputs of branches that are joined are weighted by ``exp(lse_r - lse)``, with ``lse`` the
log-sum-exp of all ``lse_r``: the softmax over all their keys together, if ``lse_r`` is that of
branch r.  A branch whose keys stand for several tokens each has the log of that number added.

Legend: B batch, D head dim; n derived keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV, BackwardInputs, state_dtype
from cpbench.parallel.partial_results.merge import merge
from cpbench.selectors.common.folding import fold_batch, fold_lse, unfold_batch, unfold_lse

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.selectors.common.base import Branch, BranchResult, PreparedBranch


class KeyPool(ABC):
    """Keys and values that are derived from the inputs, one for each run of ``size`` tokens; a last
    run that is shorter has none.

    Attributes:
        size: tokens of a run.
    """

    size: int

    def num_keys(self, tokens: int) -> int:
        """Number of derived keys of so many tokens."""
        return tokens // self.size

    @abstractmethod
    def num_heads(self, heads_q: int, heads_kv: int) -> int:
        """Number of heads of the derived keys."""

    @abstractmethod
    def derive(self, qkv: QKV) -> tuple[torch.Tensor, torch.Tensor]:
        """Derived keys and values ``[B, n, heads, D]``, in the dtype of k and v."""

    @abstractmethod
    def derive_backward(self, dk: torch.Tensor, dv: torch.Tensor, qkv: QKV) -> Gradients:
        """dq, dk and dv of the inputs, from the gradients of the derived keys and values; at least
        in float32."""


def join(
    qkv: QKV, prepared: tuple[PreparedBranch, ...], results: tuple[BranchResult, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in the dtype of q, and lse float32, of branches joined by their lse."""
    batch = len(qkv.q)
    out = lse = None
    for one, result in zip(prepared, results, strict=True):
        assert result.lse is not None
        part = unfold_batch(result.out, batch).float()
        part_lse = unfold_lse(result.lse, batch) + math.log(one.branch.key_weight)
        if out is None or lse is None:
            out, lse = part.clone(), part_lse
        else:
            # Into new memory: a float32 result is kept for the backward pass.
            out, lse = merge(out, lse, part.clone() if part is result.out else part, part_lse)
    assert out is not None
    assert lse is not None
    return out.to(qkv.q.dtype), lse


def join_backward(
    x: BackwardInputs, prepared: tuple[PreparedBranch, ...], results: tuple[BranchResult, ...]
) -> list[torch.Tensor]:
    """dq, dk and dv of branches joined by their lse, at least in float32.

    All are parts of one softmax, so their kernels take its out and lse.
    """
    total = [grad.new_zeros(grad.shape, dtype=state_dtype(grad)) for grad in x.qkv]
    for one, result in zip(prepared, results, strict=True):
        of_kernel = _backward(one, result, x, x.lse - math.log(one.branch.key_weight))
        for grad, part in zip(total, _to_inputs(one.branch, of_kernel, x.qkv), strict=True):
            grad += part
    return total


def _backward(
    one: PreparedBranch, result: BranchResult, x: BackwardInputs, lse: torch.Tensor
) -> Gradients:
    """dq, dk and dv of the kernel of a branch.

    Args:
        x: dout, and the out of all branches.
        lse: of all branches, in its own keys.
    """
    dout, out, batch = x.dout, x.out, len(x.q)
    if one.folded:
        dout, out, lse = fold_batch(dout), fold_batch(out), fold_lse(lse)
    inputs = BackwardInputs(dout, result.q, result.k, result.v, out, lse)
    dq, dk, dv = one.kernel.backward(inputs, one.plan)
    if one.folded:
        dq, dk, dv = (unfold_batch(grad, batch) for grad in (dq, dk, dv))
    return dq, dk, dv


def _to_inputs(branch: Branch, grads: Gradients, qkv: QKV) -> list[torch.Tensor]:
    """Gradients of the inputs, from those of the queries, keys and values of a branch."""
    dq, dk, dv = (grad.to(state_dtype(grad)) for grad in grads)
    if branch.derived is not None:
        more_dq, dk, dv = branch.derived.derive_backward(dk, dv, qkv)
        return [dq + more_dq, dk, dv]
    pool, tokens = branch.pool_k, qkv.k.shape[1]
    dk, dv = pool.mean_backward(dk, tokens), pool.mean_backward(dv, tokens)
    if branch.turn_q is not None:
        dq = branch.turn_q.transposed(dq)
    if branch.turn_k is not None:
        dk = branch.turn_k.transposed(dk)
    return [dq, dk, dv]
