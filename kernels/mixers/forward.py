"""The forward pass of a run of tokens, a slab of chunks at a time.

With readers r = k and writers w = beta k under the delta rule, w = k without, Q = start * q, R =
start * r, W = end * w, P and M the decayed products of (q, w) and of (r, w) for earlier tokens, the
tokens of a chunk that starts in state S write the values

    X = (I + M)^-1 (V - R S)      (X = V without the delta rule)

and the chunk gives ``out = Q S + P X`` and the next state ``across * S + W^T X`` (Yang et al. 2024,
Gated Delta Networks).  All of it is linear in (S, V): so the transition of a run is its pass over S
= I, V = 0, and ``out(S) = out(0) + R(S)``, where R is its pass over S and V = 0.

Legend: B batch, S tokens, H heads, h = B * H; K, V dimensions of keys and values; C tokens of a
chunk, n chunks of a slab, N chunks of the run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.mixers.chunks import (
    Inputs,
    Plan,
    Slab,
    cut_slabs,
    find_segments,
    read,
    state_dtype,
    write,
)
from cpbench.kernels.mixers.decay import Decay, make_decay, smallest_factor, times
from cpbench.kernels.mixers.precision import full_float32

if TYPE_CHECKING:
    import torch


class Summary(NamedTuple):
    """What a run does to the state, ``S -> transition S + state``; float32 (float64 for float64).

    Attributes:
        transition: None for the identity; ``[B, H, 1, 1]`` for one decay, ``[B, H, K, 1]`` for one
            per key dimension, ``[B, H, K, K]`` under the delta rule.
        state: ``[B, H, K, V]``.
    """

    transition: torch.Tensor | None
    state: torch.Tensor


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
        states: ``[N, h, K, V]``, at the start of each chunk.
        inverse: ``[N, h, C, C]``, (I + M)^-1 of each chunk; None without the delta rule.
    """

    states: torch.Tensor
    inverse: torch.Tensor | None

    def of(self, slab: Slab) -> Saved:
        inverse = None if self.inverse is None else self.inverse[slab.chunks]
        return Saved(self.states[slab.chunks], inverse)


@dataclass
class Chunks:
    """The tokens of a slab.

    Attributes:
        readers: ``[n, h, R, C, K]``: q times scale, and k under the delta rule.
        writers: ``[n, h, C, K]``: k, times beta under the delta rule.
        beta: ``[n, h, C, 1]``, or None.
        decay: the factors between tokens.
    """

    readers: torch.Tensor
    writers: torch.Tensor
    beta: torch.Tensor | None
    decay: Decay

    @property
    def q(self) -> torch.Tensor:
        return self.readers[:, :, 0]

    @property
    def k(self) -> torch.Tensor:
        return self.readers[:, :, 1]

    @functools.cached_property
    def from_start(self) -> torch.Tensor:
        """The readers as they see the state at the start of the chunk: Q and R."""
        start = self.decay.start
        return times(self.readers, None if start is None else start.unsqueeze(2))

    @functools.cached_property
    def to_end(self) -> torch.Tensor:
        """The writers as the state at the end of the chunk sees them: W."""
        return times(self.writers, self.decay.end)


def load(x: Inputs, plan: Plan, slab: Slab, C: int) -> Chunks:
    """The tokens of a slab and the decay between them."""
    B, _, H, K = x.q.shape
    n, R = slab.end - slab.first, 2 if plan.form.delta else 1
    dtype = state_dtype(x.q)
    readers = x.q.new_empty((n, B * H, R, C, K), dtype=dtype)
    read(x.q, slab, C, dtype, readers[:, :, 0]).mul_(plan.scale)
    if plan.form.delta:
        assert x.beta is not None
        beta = read(x.beta.unsqueeze(-1), slab, C, dtype)
        writers = read(x.k, slab, C, dtype, readers[:, :, 1]) * beta
    else:
        beta, writers = None, read(x.k, slab, C, dtype)
    g = None
    if x.g is not None:
        g = read(x.g if plan.form.gate == "diagonal" else x.g.unsqueeze(-1), slab, C, dtype)
    segments = find_segments(plan.resets, slab, C, x.q.device)
    decay = make_decay(g, plan.form.gate == "diagonal", segments)
    return Chunks(readers, writers, beta, decay)


def invert(chunks: Chunks, pairs: torch.Tensor | None = None) -> torch.Tensor:
    """(I + M)^-1 of chunks, ``[n, h, C, C]``.

    Args:
        pairs: of all readers, ``[n, h, R, C, C]``; computed unless given.
    """
    import torch

    if pairs is None:
        pairs = chunks.decay.pairs(chunks.readers[:, :, 1:], chunks.writers)
    products = pairs[:, :, -1]  # solve_triangular reads what is below the diagonal alone
    identity = torch.eye(products.shape[-1], dtype=pairs.dtype, device=pairs.device)
    inverse = torch.linalg.solve_triangular(
        products, identity.expand(products.shape), upper=False, unitriangular=True
    )
    return torch.nn.functional.hardshrink(inverse, smallest_factor(inverse.dtype))


def pass_states(
    states: torch.Tensor,
    v: torch.Tensor | None,
    chunks: Chunks,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    """Pass a state through the chunks of a slab.

    Args:
        states: ``[n + 1, h, K, V]``, of which the first is given and the others are written.
        v: ``[n, h, C, V]``; None for 0.
        inverse: ``[n, h, C, C]`` under the delta rule.

    Returns:
        X, the values that are written, ``[n, h, C, V]``.
    """
    import torch

    writers = chunks.to_end.mT
    across = chunks.decay.across
    with full_float32(states.device):
        if inverse is None:
            if v is None:
                states[1:] = 0
                v = states.new_zeros((*writers.shape[:2], writers.shape[3], states.shape[3]))
            else:
                torch.matmul(writers, v, out=states[1:])
            for i in range(len(writers)):
                if across is None:
                    states[i + 1].add_(states[i])
                else:
                    states[i + 1].addcmul_(states[i], across[i])
            return v
        readers = chunks.from_start[:, :, 1]
        x = states.new_empty((*readers.shape[:3], states.shape[3]))
        for i in range(len(readers)):
            if v is None:
                rest = torch.bmm(readers[i], states[i]).neg_()
            else:
                rest = torch.baddbmm(v[i], readers[i], states[i], alpha=-1)
            torch.bmm(inverse[i], rest, out=x[i])
            if across is None:
                torch.baddbmm(states[i], writers[i], x[i], out=states[i + 1])
            else:
                torch.mul(states[i], across[i], out=states[i + 1])
                states[i + 1].baddbmm_(writers[i], x[i])
        return x


def initial_state(x: Inputs, state: torch.Tensor | None) -> torch.Tensor:
    """``[h, K, V]`` of ``[B, H, K, V]``; zeros unless given."""
    B, _, H, K = x.q.shape
    shape, dtype = (B * H, K, x.v.shape[3]), state_dtype(x.q)
    if state is None:
        return x.q.new_zeros(shape, dtype=dtype)
    return state.to(dtype).reshape(shape)


def _states(first: torch.Tensor, slab: Slab) -> torch.Tensor:
    """``[n + 1, h, K, V]``, of which the first is given."""
    states = first.new_empty((slab.end - slab.first + 1, *first.shape))
    states[0] = first
    return states


def _empty_inverse(x: Inputs, plan: Plan, C: int) -> torch.Tensor | None:
    B, S, H, _ = x.q.shape
    if not plan.form.delta:
        return None
    return x.q.new_empty((-(-S // C), B * H, C, C), dtype=state_dtype(x.q))


def _outputs(
    chunks: Chunks, pairs: torch.Tensor | None, states: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """out ``[n, h, C, V]`` of the states at the starts of chunks and the values written in them."""
    out = chunks.from_start[:, :, 0] @ states
    if pairs is not None:
        out.flatten(0, 1).baddbmm_(pairs[:, :, 0].flatten(0, 1), values.flatten(0, 1))
    return out


def combine(later: Summary, earlier: Summary) -> Summary:
    """The summary of two runs, one after the other."""
    if earlier.transition is None:
        transition = later.transition
    else:
        transition = apply(later.transition, earlier.transition)
    return Summary(transition, apply(later.transition, earlier.state) + later.state)


def apply(transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """The state after a transition."""
    if transition is None:
        return state
    if transition.shape[-1] == 1:
        return transition * state
    with full_float32(state.device):
        return transition @ state


def summarise(x: Inputs, plan: Plan) -> tuple[Summary, torch.Tensor | None]:
    """What a run does to the state, and the inverses of its chunks, for :func:`output`."""
    import torch

    B, S, H, K = x.q.shape
    V, C = x.v.shape[3], plan.tokens_per_chunk(S)
    slabs = cut_slabs(x, C)
    dtype = state_dtype(x.q)
    inverse, product = _empty_inverse(x, plan, C), None
    state = x.q.new_zeros((B * H, K, V), dtype=dtype)
    if plan.form.delta:  # the transition is the pass over the identity, beside that over 0
        state = torch.cat(
            [torch.eye(K, dtype=dtype, device=state.device).expand(B * H, K, K), state], 2
        )
    for slab in slabs:
        chunks = load(x, plan, slab, C)
        v = read(x.v, slab, C, state_dtype(x.q))
        if inverse is not None:
            inverse[slab.chunks] = invert(chunks)
            v = torch.nn.functional.pad(v, (K, 0))
        states = _states(state, slab)
        pass_states(states, v, chunks, None if inverse is None else inverse[slab.chunks])
        state = states[-1]
        if chunks.decay.across is not None and inverse is None:
            across = chunks.decay.across.to(dtype).expand(-1, B * H, -1, -1).prod(0)
            product = across if product is None else product * across
    if plan.form.delta:
        product, state = state[..., :K], state[..., K:]
    split = (B, H)
    transition = None if product is None else product.contiguous().unflatten(0, split)
    return Summary(transition, state.contiguous().unflatten(0, split)), inverse


def output(
    x: Inputs,
    plan: Plan,
    state: torch.Tensor | None = None,
    *,
    inverse: torch.Tensor | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, Saved | None]:
    """Compute a run from a state.

    Args:
        state: ``[B, H, K, V]`` at the start; None for 0.
        inverse: of :func:`summarise`, which is computed again unless given.
        keep: whether a backward pass follows.

    Returns:
        out ``[B, S, H, V]`` in the dtype of v, the state at the end ``[B, H, K, V]``, and what the
        backward pass needs.
    """
    B, S, H, _ = x.q.shape
    C = plan.tokens_per_chunk(S)
    out = x.v.new_empty(x.v.shape)
    current = initial_state(x, state)
    saved = None
    if keep:
        states = current.new_empty((-(-S // C), *current.shape))
        saved = Saved(states, _empty_inverse(x, plan, C) if inverse is None else inverse)
    for slab in cut_slabs(x, C):
        chunks = load(x, plan, slab, C)
        pairs = None if plan.form.lagging else chunks.decay.pairs(chunks.readers, chunks.writers)
        slab_inverse = None
        if plan.form.delta:
            slab_inverse = invert(chunks, pairs) if inverse is None else inverse[slab.chunks]
        passed = _states(current, slab)
        values = pass_states(passed, read(x.v, slab, C, state_dtype(x.q)), chunks, slab_inverse)
        write(_outputs(chunks, pairs, passed[:-1], values), slab, out)
        if saved is not None:
            saved.states[slab.chunks] = passed[:-1]
            if saved.inverse is not None and inverse is None and slab_inverse is not None:
                saved.inverse[slab.chunks] = slab_inverse
        current = passed[-1]
    return out, current.unflatten(0, (B, H)), saved


def respond(
    x: Inputs, plan: Plan, state: torch.Tensor, saved: Saved, out: torch.Tensor
) -> torch.Tensor:
    """Add to a computation from state 0 what the true state at the start changes.

    Args:
        state: ``[B, H, K, V]``.
        saved, out: of :func:`output` from 0; both are changed in place.

    Returns:
        What to add to the state at the end, ``[B, H, K, V]``.
    """
    import torch

    C = plan.tokens_per_chunk(x.q.shape[1])
    current = initial_state(x, state)
    for slab in cut_slabs(x, C):
        chunks = load(x, plan, slab, C)
        inverse = None if saved.inverse is None else saved.inverse[slab.chunks]
        passed = _states(current, slab)
        values = pass_states(passed, None, chunks, inverse)
        pairs = None
        if plan.form.delta:
            pairs = chunks.decay.pairs(chunks.readers, chunks.writers)
        change = _outputs(chunks, pairs, passed[:-1], values)
        part = torch.empty_like(out[:, slab.start : slab.stop], dtype=change.dtype)
        write(change, Slab(0, slab.end - slab.first, 0, slab.stop - slab.start), part)
        out[:, slab.start : slab.stop] += part
        saved.states[slab.chunks] += passed[:-1]
        current = passed[-1]
    change_of_state: torch.Tensor = current.unflatten(0, (x.q.shape[0], x.q.shape[2]))
    return change_of_state
