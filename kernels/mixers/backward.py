"""The backward pass of a run of tokens, a slab of chunks at a time, the last one first.

In the notation of the forward pass, with dS the gradient of the state at the end of a chunk:

    dX = P^T dO + W dS,  dE = (I + M)^-T dX (dX without the delta rule),  dV = dE
    dS at the start = across * dS + Q^T dO - R^T dE
    dQ = dO S^T,  dR = -dE S^T,  dW = X dS^T,  dP = dO X^T,  dM = -dE X^T

The gradient of the log decay at token i is the sum over all that crosses it: with a += of what a
token reads and a -= of what it writes, G_t gets q dq + r dr - w dw without the pair of a token with
itself, which no decay separates; at the end of a chunk also the state that is handed on.

Legend: as in the forward pass; R readers, q and (under the delta rule) k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.mixers.chunks import Inputs, Plan, Slab, cut_slabs, read, write
from cpbench.kernels.mixers.decay import sum_decays_backward, times
from cpbench.kernels.mixers.forward import Chunks, Saved, initial_state, invert, load
from cpbench.kernels.mixers.precision import full_float32

if TYPE_CHECKING:
    import torch


class Gradients(NamedTuple):
    """The gradients of the inputs, in their shapes and dtypes, and of the state at the start.

    Attributes:
        state: ``[B, H, K, V]``, float32 (float64 for float64).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None
    state: torch.Tensor


def pass_gradients(
    dstates: torch.Tensor,
    dout: torch.Tensor,
    chunks: Chunks,
    pairs: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """Pass the gradient of a state back through the chunks of a slab.

    Args:
        dstates: ``[n + 1, h, K, V]``, at the starts of chunks and the end of the last, which is
            given; the others are written.
        dout: ``[n, h, C, V]``.

    Returns:
        dE, the gradient of v, ``[n, h, C, V]``.
    """
    import torch

    decay = chunks.decay
    writers = chunks.to_end
    dvalues = torch.zeros_like(dout) if pairs is None else pairs[:, :, 0].mT @ dout
    readers = None if inverse is None else chunks.from_start[:, :, 1].mT
    with full_float32(dstates.device):
        torch.matmul(chunks.from_start[:, :, 0].mT, dout, out=dstates[:-1])
        for i in reversed(range(len(dout))):
            if decay.across is None:
                dstates[i].add_(dstates[i + 1])
            else:
                dstates[i].addcmul_(dstates[i + 1], decay.across[i])
            if inverse is not None and readers is not None:
                dx = torch.baddbmm(dvalues[i], writers[i], dstates[i + 1])
                torch.bmm(inverse[i].mT, dx, out=dvalues[i])
                dstates[i].baddbmm_(readers[i], dvalues[i], alpha=-1)
        if inverse is None:
            dvalues.flatten(0, 1).baddbmm_(writers.flatten(0, 1), dstates[1:].flatten(0, 1))
    return dvalues


def summarise_back(
    x: Inputs, plan: Plan, dout: torch.Tensor, *, inverse: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the state at the start through the outputs of the run alone.

    With the transition of the run, the whole gradient is ``transition^T dstate + this``.

    Args:
        dout: ``[B, S, H, V]``.
        inverse: of ``summarise``; computed unless given.

    Returns:
        ``[B, H, K, V]``.
    """
    B, S, H, _ = x.q.shape
    C = plan.tokens_per_chunk(S)
    current = initial_state(x, None)
    for slab in reversed(cut_slabs(x, C)):
        chunks = load(x, plan, slab, C)
        pairs = None if plan.form.lagging else chunks.decay.pairs(chunks.readers, chunks.writers)
        slab_inverse = None
        if plan.form.delta:
            slab_inverse = invert(chunks, pairs) if inverse is None else inverse[slab.chunks]
        dstates = _gradients_of_states(current, slab)
        pass_gradients(dstates, read(dout, slab, C, current.dtype), chunks, pairs, slab_inverse)
        current = dstates[0]
    gradient: torch.Tensor = current.unflatten(0, (B, H))
    return gradient


def backward(
    x: Inputs,
    plan: Plan,
    saved: Saved,
    dout: torch.Tensor,
    dstate: torch.Tensor | None = None,
) -> Gradients:
    """The gradients of a run.

    Args:
        saved: of the forward pass.
        dout: ``[B, S, H, V]``.
        dstate: ``[B, H, K, V]``, of the state at the end; None for 0.
    """
    B, S, H, _ = x.q.shape
    C = plan.tokens_per_chunk(S)
    dq, dk, dv = (y.new_empty(y.shape) for y in (x.q, x.k, x.v))
    dg, dbeta = (None if y is None else y.new_empty(y.shape) for y in (x.g, x.beta))
    current = initial_state(x, dstate)
    for slab in reversed(cut_slabs(x, C)):
        chunks = load(x, plan, slab, C)
        rows = current.new_empty((*chunks.readers.shape[:4], x.v.shape[3]))
        read(dout, slab, C, current.dtype, rows[:, :, 0])
        values = read(x.v, slab, C, current.dtype)
        found = _differentiate(chunks, plan, saved.of(slab), values, rows, current, slab)
        current = found.state
        write(found.q.mul_(plan.scale), slab, dq)
        write(found.k, slab, dk)
        write(found.v, slab, dv)
        if dg is not None and found.g is not None:
            write(found.g, slab, dg if plan.form.gate == "diagonal" else dg.unsqueeze(-1))
        if dbeta is not None and found.beta is not None:
            write(found.beta, slab, dbeta.unsqueeze(-1))
    return Gradients(dq, dk, dv, dg, dbeta, current.unflatten(0, (B, H)))


def _gradients_of_states(last: torch.Tensor, slab: Slab) -> torch.Tensor:
    dstates = last.new_empty((slab.end - slab.first + 1, *last.shape))
    dstates[-1] = last
    return dstates


def _differentiate(
    chunks: Chunks,
    plan: Plan,
    saved: Saved,
    v: torch.Tensor,
    rows: torch.Tensor,
    dstate: torch.Tensor,
    slab: Slab,
) -> Gradients:
    """The gradients of a slab's chunks, ``[n, h, C, …]``, and of the state at its start.

    Args:
        v: ``[n, h, C, V]``.
        rows: ``[n, h, R, C, V]``, of what readers read, of which that of q is given: dout.
        dstate: ``[h, K, V]``, of the state at its end.
    """
    import torch

    decay, readers, writers = chunks.decay, chunks.readers, chunks.writers
    R, C = readers.shape[2:4]
    pairs = None if plan.form.lagging else decay.pairs(readers, writers)
    dstates = _gradients_of_states(dstate, slab)
    dv = pass_gradients(dstates, rows[:, :, 0], chunks, pairs, saved.inverse)

    values = v
    if saved.inverse is not None:
        torch.neg(dv, out=rows[:, :, 1])
        v.flatten(0, 1).baddbmm_(
            chunks.from_start[:, :, 1].flatten(0, 1), saved.states.flatten(0, 1), alpha=-1
        )
        values = saved.inverse @ v
    flat = rows.flatten(2, 3)  # [n, h, R * C, V]
    dreaders = (flat @ saved.states.mT).unflatten(2, (R, C))
    if decay.start is not None:
        dreaders.mul_(decay.start.unsqueeze(2))
    dwriters = times(values @ dstates[1:].mT, decay.end)  # what later chunks read
    dg = None
    if pairs is not None:
        dpairs = (flat @ values.mT).unflatten(2, (R, C))
        own = dpairs[:, :, 0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
        inner = decay.pairs_backward(dpairs, readers, writers)
        dreaders.add_(inner[0])
        if plan.form.gate is not None:
            handed_on = dwriters * writers
            dG = dreaders[:, :, 0] * chunks.q
            if R == 2:
                dG.addcmul_(dreaders[:, :, 1], chunks.k)
            dG.addcmul_(inner[1], writers, value=-1)
            dg = _gate_gradient(dG, handed_on, saved.states, dstates, chunks, plan, slab)
        dwriters.add_(inner[1])
        dreaders[:, :, 0].addcmul_(own, writers)
        dwriters.addcmul_(own, chunks.q)
    if chunks.beta is None:
        return Gradients(dreaders[:, :, 0], dwriters, dv, dg, None, dstates[0])
    dbeta = (dwriters * chunks.k).sum(-1, keepdim=True)
    dk = torch.addcmul(dreaders[:, :, 1], dwriters, chunks.beta)
    return Gradients(dreaders[:, :, 0], dk, dv, dg, dbeta, dstates[0])


def _gate_gradient(
    dG: torch.Tensor,
    handed_on: torch.Tensor,
    states: torch.Tensor,
    dstates: torch.Tensor,
    chunks: Chunks,
    plan: Plan,
    slab: Slab,
) -> torch.Tensor:
    """The gradient of the log decay ``[n, h, C, 1 or K]``.

    Args:
        dG: ``[n, h, C, K]``, of the sums of log decays, by pairs and by the states at the starts.
        handed_on: ``[n, h, C, K]``, writers times their gradients through the states at the ends;
            the decay to the end of the chunk divides each by that of its token.
    """
    C = dG.shape[2]
    last = (slab.stop - 1) % C  # no decay follows it
    handed_on[:-1, :, -1] = 0
    handed_on[-1, :, last] = 0
    dG.sub_(handed_on)
    across = chunks.decay.across
    assert across is not None
    through = (states * dstates[1:]).sum(-1).mul_(across.squeeze(-1))  # [n, h, K]
    through.add_(handed_on.sum(2))
    dG[:-1, :, -1].add_(through[:-1])
    dG[-1, :, last].add_(through[-1])
    if plan.form.gate == "scalar":
        dG = dG.sum(-1, keepdim=True)
    return sum_decays_backward(dG, chunks.decay.segments)
