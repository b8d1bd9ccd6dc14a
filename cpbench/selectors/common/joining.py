"""Branches joined by their log-sum-exp into one softmax, and keys that are derived from the inputs.

The outputs of branches that are joined are weighted by ``exp(lse_r - lse)``, with ``lse`` the
log-sum-exp of all ``lse_r``: the softmax over all their keys together, if ``lse_r`` is that of
branch r.  It may be another one, too: a branch whose keys stand for several tokens each has the log
of that number added, and the lse of a branch may be given, as the score of a query with one key
(:class:`KeyScores`).

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; n derived keys.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class KeyScores:
    """Scaled scores of every query with one key each.

    Attributes:
        index: ``[B, H, S]`` integers, the keys; -1 for none, whose score is -inf.
        scale: factor of the scores.
    """

    index: torch.Tensor
    scale: float

    def values(self, q_BSHD: torch.Tensor, k_BTGD: torch.Tensor) -> torch.Tensor:
        """``[B, H, S]``, at least in float32."""
        import torch

        keys = self._gather(k_BTGD, q_BSHD.shape[2])
        q_BHSD = q_BSHD.to(keys.dtype).transpose(1, 2)
        scores = torch.einsum("bhsd,bhsd->bhs", q_BHSD, keys).mul_(self.scale)
        return scores.masked_fill_(self.index < 0, -torch.inf)

    def backward(
        self, dscores: torch.Tensor, q_BSHD: torch.Tensor, k_BTGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dq and dk from the gradient of :meth:`values`, in its dtype, 0 where there is no key."""
        heads_q, (B, T, G, D) = q_BSHD.shape[2], k_BTGD.shape
        keys = self._gather(k_BTGD, heads_q)
        weights = (dscores.to(keys.dtype) * self.scale).masked_fill(self.index < 0, 0.0)[..., None]
        dq_BSHD = (keys * weights).transpose(1, 2)
        dk_BGTD = keys.new_zeros((B, G, T, D))
        index = self.index.clamp(min=0).long().unflatten(1, (G, -1)).flatten(2)
        q_BHSD = q_BSHD.to(keys.dtype).transpose(1, 2)
        values = (q_BHSD * weights).unflatten(1, (G, -1)).flatten(2, 3)
        dk_BGTD.scatter_add_(2, index[..., None].expand(values.shape), values)
        return dq_BSHD, dk_BGTD.transpose(1, 2)

    def _gather(self, k_BTGD: torch.Tensor, heads_q: int) -> torch.Tensor:
        """The key of each query, ``[B, H, S, D]``."""
        G, D = k_BTGD.shape[2:]
        index = self.index.clamp(min=0).long().unflatten(1, (G, -1)).flatten(2)
        k_BGTD = k_BTGD.to(state_dtype(k_BTGD)).transpose(1, 2)
        keys = k_BGTD.gather(2, index[..., None].expand(-1, -1, -1, D))
        gathered: torch.Tensor = keys.unflatten(2, (heads_q // G, -1)).flatten(1, 2)
        return gathered


def branch_lse(branch: Branch, lse_BHS: torch.Tensor, qkv: QKV) -> torch.Tensor:
    """The lse by which a branch is joined, ``[B, H, S]``.

    Args:
        lse_BHS: of its own softmax.
    """
    if branch.scores is None:
        return lse_BHS + math.log(branch.key_weight)
    return branch.scores.values(qkv.q, qkv.k).to(lse_BHS.dtype)


def join(
    qkv: QKV, prepared: tuple[PreparedBranch, ...], results: tuple[BranchResult, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in the dtype of q, and lse float32, of branches joined by their lse."""
    batch = len(qkv.q)
    out = lse = None
    for one, result in zip(prepared, results, strict=True):
        assert result.lse is not None
        part = unfold_batch(result.out, batch).float()
        part_lse = branch_lse(one.branch, unfold_lse(result.lse, batch), qkv)
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

    A branch that is joined by its own lse is a part of one softmax, so its kernel takes the out and
    lse of all.  One whose lse is given is a softmax of its own, and its lse has a gradient.
    """
    total = [grad.new_zeros(grad.shape, dtype=state_dtype(grad)) for grad in x.qkv]
    delta_BHS = _row_products(x.dout, x.out)
    for one, result in zip(prepared, results, strict=True):
        branch = one.branch
        if branch.scores is None:
            of_kernel = _backward(one, result, x.dout, x.out, x.lse - math.log(branch.key_weight))
        else:
            assert result.lse is not None
            own_out = unfold_batch(result.out, len(x.q))
            own_lse = unfold_lse(result.lse, len(x.q))
            weights = _weights(branch_lse(branch, own_lse, x.qkv), x.lse)
            dout = (x.dout * weights.transpose(1, 2)[..., None]).to(x.dout.dtype)
            of_kernel = _backward(one, result, dout, own_out, own_lse)
            dlse = weights * (_row_products(x.dout, own_out) - delta_BHS)
            of_scores = branch.scores.backward(dlse, x.q, x.k)
            for grad, part in zip(total, of_scores, strict=False):
                grad += part
        for grad, part in zip(total, _to_inputs(branch, of_kernel, x.qkv), strict=True):
            grad += part
    return total


def _backward(
    one: PreparedBranch,
    result: BranchResult,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Gradients:
    """dq, dk and dv of the kernel of a branch, given the out and lse that its pairs belong to."""
    batch = len(dout)
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


def _weights(part_lse: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``exp(part_lse - lse)``; 0 for queries that see nothing."""
    import torch

    return (part_lse - lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()


def _row_products(a_BSHD: torch.Tensor, b_BSHD: torch.Tensor) -> torch.Tensor:
    """``[B, H, S]``: sums over D, at least in float32."""
    dtype = state_dtype(a_BSHD)
    products: torch.Tensor = (a_BSHD.to(dtype) * b_BSHD.to(dtype)).sum(-1).transpose(1, 2)
    return products
