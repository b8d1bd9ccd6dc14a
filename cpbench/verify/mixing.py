"""Checks of sequence mixers against their own recurrence in float64.

At a small size, a mixer is compared in full with the recurrence token by token, differentiated by
autograd.  At the measured size every output, gradient and state is compared with the chunked
computation in float64, a head at a time; and that one with the recurrence, over chunks taken at
random, from the states that it has at their starts.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.operator import MixerInputs
from cpbench.core.problem import INITIAL_STATE
from cpbench.core.tolerance import MIXER_CHUNK
from cpbench.inputs import Recipe
from cpbench.kernels.mixers.chunks import Plan
from cpbench.kernels.mixers.forms import Form, parse
from cpbench.kernels.mixers.forward import Saved
from cpbench.kernels.mixers.mixer import Mixer, retention_decays
from cpbench.kernels.mixers.operator import make_mixer
from cpbench.kernels.mixers.recurrence import recur
from cpbench.verify import check
from cpbench.verify.check import (
    RankContext,
    Tensors,
    WrongResult,
    as_index,
    as_matrices,
    make_inputs,
)
from cpbench.verify.errors import Errors, ErrorSums, TensorErrorSums, combined_errors, worst_errors

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

SHORT, LONG = 16, 128  # tokens of a chunk, other ones than those of the mixers
LONG_FROM = 1 << 14  # tokens from which the states of short chunks are too many
RECURRED_CHUNKS = 4  # of each head, at the measured size
RECURRENCE_ERROR = 1e-9  # of the chunked computation in float64, relative to the largest value
MOST_STATES = 1 << 25  # elements that autograd keeps of a recurrence


class FullErrors(NamedTuple):
    """Errors at the measured size, and the share of heads that were compared."""

    errors: Errors
    covered: float


def _float64_mixer(work: Attention) -> Mixer:
    """What computes the mixer of a problem in chunks."""
    form, chunk, _ = parse(work.computes)
    if not form.lagging:
        chunk = SHORT if work.mask.seq_q < LONG_FROM else LONG
    plan = Plan(form, work.problem.softmax_scale, chunk)
    return make_mixer(plan, work.world.shared_mask)


def _own_decays(
    form: Form, heads: range, problem: Problem, device: torch.device
) -> torch.Tensor | None:
    """The log decays of some heads of a mixer that has its own."""
    if not form.default_gate:
        return None
    return retention_decays(problem.heads_q, device)[heads.start : heads.stop]


# --- small --------------------------------------------------------------------------------------


def check_small(work: Attention, recipe: Recipe, context: RankContext) -> Errors:
    """As :func:`cpbench.verify.check.check_small`, against the recurrence."""
    errors = check.check_small(work, recipe, context, small_results)
    return _with_nats(errors, work, recipe, context)


def _with_nats(errors: Errors, work: Attention, recipe: Recipe, context: RankContext) -> Errors:
    """The errors with the nats by which limits of dg grow (see ``core.tolerance``)."""
    if "dg" not in errors:
        return errors
    problem = work.problem
    g = recipe.make(
        "g", problem, work.world.keys.positions(work.rank), batches=range(problem.batch),
        heads=range(problem.heads_q), device=work.home,
    )  # fmt: skip
    nats = MIXER_CHUNK * max(context.gather(float(g.abs().max())))
    return {**errors, "dg": {**errors["dg"], "nats": nats}}


def small_results(work: Attention, recipe: Recipe, device: str) -> Tensors:
    """The results by the recurrence."""
    return _small_results(work.computes, work.world.shared_mask, work.problem, recipe, device)


@functools.lru_cache(maxsize=16)
def _small_results(
    recurrence: str, mask: AttnMask, problem: Problem, recipe: Recipe, device: str
) -> Tensors:
    """float64 results ``[B, heads, S, …]`` and the state ``[B, heads, K, V]``, in host memory."""
    import torch

    form, chunk, _ = parse(recurrence)
    mixer = make_mixer(Plan(form, problem.softmax_scale, chunk), mask)
    positions = np.arange(mask.seq_q)
    x = make_inputs(problem, positions, positions, recipe, device)
    kept = 4 * problem.batch * mask.seq_q * problem.head_dim * problem.value_dim
    step = max(1, MOST_STATES // kept)
    parts = []
    for head in range(0, problem.heads_q, step):
        heads = range(head, min(head + step, problem.heads_q))
        own = {
            name: y.narrow(1 if name == INITIAL_STATE else 2, heads.start, len(heads)).double()
            for name, y in x.items()
        }
        parts.append(_recur(mixer, own, heads, problem))
    return {name: torch.cat([part[name] for part in parts], 1).cpu() for name in parts[0]}


def _recur(mixer: Mixer, x: Tensors, heads: range, problem: Problem) -> Tensors:
    """The results of some heads by the recurrence, and gradients by autograd."""
    import torch

    leaves = {name: x[name].requires_grad_(problem.backward) for name in problem.inputs}
    decays = _own_decays(mixer.plan.form, heads, problem, x["q"].device)
    inputs = MixerInputs.of(leaves).with_decays(decays)
    with torch.set_grad_enabled(problem.backward):
        out, state = (
            _see_all(inputs, mixer)
            if mixer.whole
            else mixer.recur(inputs.by_token, inputs.initial_state)
        )
    results = {"out": out.detach()}
    if problem.backward:
        product = (out * x["dout"]).sum()  # to be given dout, autograd imports sympy
        grads = torch.autograd.grad(product, tuple(leaves.values()), materialize_grads=True)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    by_head = {
        name: y if name in check.STATES else as_matrices(y).transpose(1, 2)
        for name, y in results.items()
    }
    return {**by_head, "state": state.detach()}


def _see_all(x: MixerInputs, mixer: Mixer) -> tuple[torch.Tensor, torch.Tensor]:
    """out and state where every token reads the state of all."""
    import torch

    state = torch.einsum("bshk,bshv->bhkv", x.k, x.v)
    if x.initial_state is not None:
        state = state + x.initial_state
    return torch.einsum("bshk,bhkv->bshv", mixer.plan.scale * x.q, state), state


# --- at the measured size -----------------------------------------------------------------------


def check_in_full(
    work: Attention,
    results: Tensors,
    recipe: Recipe,
    seed: int,
    limit_s: float,
    context: RankContext,
) -> FullErrors:
    """Errors of every result at the measured size, of the heads that the time allows; collective.

    Args:
        results: what ``check.run_pass`` returned for the inputs of ``recipe``.
        seed: of the order of heads.
        limit_s: after which no other head is begun.

    Raises:
        WrongResult: where the float64 computation differs from the recurrence.
        DoesNotFit: see :meth:`RankContext.compute`.
    """
    problem = work.problem
    heads = [(b, h) for b in range(problem.batch) for h in range(problem.heads_q)]
    order = [heads[i] for i in np.random.default_rng(seed).permutation(len(heads))]
    begun, found = time.monotonic(), list[Errors]()
    results = check.sum_over_ranks(results, context)
    for number, (b, h) in enumerate(order):
        compare = functools.partial(_compare_head, work, results, recipe, b, h, seed + number)
        ranks = context.gather(context.compute(compare))
        reason = next((reason for _, reason in ranks if reason), None)
        if reason:
            raise WrongResult(reason)
        found.append(combined_errors([sums for sums, _ in ranks]))
        if max(context.gather(time.monotonic() - begun)) > limit_s:
            break
    errors = _with_nats(worst_errors(found), work, recipe, context)
    return FullErrors(errors, len(found) / len(order))


def _compare_head(
    work: Attention, results: Tensors, recipe: Recipe, b: int, h: int, seed: int
) -> tuple[ErrorSums, str]:
    """Error sums of one batch and head on this rank; and how the float64 computation differs from
    the recurrence, or an empty text."""
    problem, layout, device = work.problem, work.world.keys, work.home
    mixer, tokens = _float64_mixer(work), np.arange(layout.seq_len)

    def make(name: str) -> torch.Tensor:
        rows = recipe.make(name, problem, tokens, batches=[b], heads=[h], device=device)
        return rows.double()

    x = MixerInputs.of({name: make(name) for name in problem.inputs})
    x = x.with_decays(_own_decays(mixer.plan.form, range(h, h + 1), problem, x.q.device))
    out, state, saved = mixer.forward(x.by_token, x.initial_state, True)
    reason = "" if mixer.whole else _differs_from_recurrence(mixer, x.by_token, out, saved, seed)
    expected = {"out": out[0], "state": state[0]}
    if problem.backward:
        grads = MixerInputs(*mixer.backward(x.by_token, saved, make("dout"), None))
        expected |= {f"d{name}": getattr(grads, name)[0] for name in problem.inputs}
    positions = layout.positions(work.rank)
    real = np.flatnonzero(positions < layout.seq_len)
    local, own = as_index(real, device), as_index(positions[real], device)
    sums = {}
    for name, value in results.items():
        if name in check.STATES:
            sums[name] = TensorErrorSums.between(value[b, h], expected[name][0])
        else:
            rows = as_matrices(value[b : b + 1])[0, :, h]
            wanted = as_matrices(expected[name].unsqueeze(0))[0, :, 0]
            sums[name] = TensorErrorSums.between(rows[local], wanted[own])
    return sums, reason


def _differs_from_recurrence(
    mixer: Mixer, x: MixerInputs, out: torch.Tensor, saved: Any, seed: int
) -> str:
    """How a computation in chunks differs from the recurrence in chunks taken at random, each from
    the state at its start; or an empty text."""
    rng, start = np.random.default_rng(seed), 0
    runs = list(zip(mixer.runs(x), [saved] if isinstance(saved, Saved) else saved, strict=True))
    starts = np.cumsum([0, *(run.q.shape[1] for (run, _), _ in runs)])
    for _ in range(RECURRED_CHUNKS):
        number = int(rng.integers(len(runs)))
        (run, plan), kept = runs[number]
        tokens, size = run.q.shape[1], plan.tokens_per_chunk(run.q.shape[1])
        chunk = int(rng.integers(len(kept.states)))
        start, stop = chunk * size, min((chunk + 1) * size, tokens)
        inside = tuple(token - start for token in plan.resets if start <= token < stop)
        part = run.tokens(start, stop)
        state = kept.states[chunk].unsqueeze(0)
        expected, end = recur(part, replace(plan, resets=inside), state)
        first = int(starts[number]) + start
        pairs = [(out[:, first : first + stop - start], expected)]
        if chunk + 1 < len(kept.states):
            pairs.append((kept.states[chunk + 1], end[0]))
        for found, true in pairs:
            error = float((found - true).abs().max())
            if not error <= RECURRENCE_ERROR * max(float(true.abs().max()), 1e-30):
                return (
                    "the recurrence is too ill-conditioned to be checked in chunks: at token "
                    f"{first} they differ by {error:.2g} in float64; give keys of length 1"
                )
    return ""
