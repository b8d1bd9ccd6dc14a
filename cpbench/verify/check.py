"""The small check: operator and strategy run on about 320 tokens of the measured mask (windows of
tokens around the corners of its slices), and every output and gradient is compared in full with
float64.

No time is reported without it and those at the measured size: lines in ``verify.at_size``, tiles in
``verify.tiles``, every timed call in ``verify.fingerprint``.  For errors and their limits see
``core.tolerance``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from cpbench.core.operator import QKV, BackwardInputs, state_dtype
from cpbench.core.problem import INITIAL_STATE, Problem
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask
from cpbench.masks.slices import IntArray
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World
from cpbench.verify.errors import Errors, ErrorSums, TensorErrorSums, combined_errors
from cpbench.verify.fit import DoesNotFit, try_to_fit

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.parallel.comm import Comm, Control

SMALL_TOKENS = 320
SELECTION_TOKENS = 1024  # for selectors, which need more blocks to select from
WINDOW_TOKENS = 32
MOST_CHUNKED_TOKENS = 1024  # on one rank, of mixers whose chunks are part of their definition

Tensors = dict[str, "torch.Tensor"]
T = TypeVar("T")


@dataclass(frozen=True)
class RankContext:
    """The device of a rank and its communicators, which are None in a single process."""

    device: str
    comm: Comm | None = None
    control: Control | None = None

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        return self.control.all_gather(value) if self.control else [value]

    def compute(self, function: Callable[[], T]) -> T:
        """What a check computes on this rank without communication; collective.

        Raises:
            DoesNotFit: on all ranks, where any of them ran out of memory.
        """
        value, failure = try_to_fit(function)
        self.require_fit(failure)
        return cast(T, value)

    def require_fit(self, failure: str) -> None:
        """Agree whether a check fitted in the memory of all ranks; collective.

        Args:
            failure: how this rank ran out of memory; empty if it did not.

        Raises:
            DoesNotFit: on all ranks, where any of them has a failure.
        """
        for rank, reason in enumerate(self.gather(failure)):
            if reason:
                raise DoesNotFit(f"rank {rank}: {reason}")


STATES = ("state", f"d{INITIAL_STATE}")  # results without tokens, which all ranks have
MOST_KEPT_BYTES = 256 << 20  # of a set of inputs


def make_inputs(
    problem: Problem,
    queries: IntArray,
    keys: IntArray,
    recipe: Recipe,
    device: str,
    keep_on: str | None = None,
    kv_heads: Sequence[int] | None = None,
) -> Tensors:
    """The inputs and (with a backward pass) dout of the given tokens, ``[B, tokens, heads, D]``.

    Args:
        queries: global positions of the tokens of q, dout and gates.
        keys: global positions of the tokens of k and v.
        device: on which they are computed.
        keep_on: to which each is moved then, if another one.
        kv_heads: heads of k and v, if not all.
    """
    of_keys = range(problem.heads_kv) if kv_heads is None else kv_heads

    def make(name: str) -> torch.Tensor:
        return recipe.make(
            name,
            problem,
            keys if name in "kv" else queries,
            batches=range(problem.batch),
            heads=of_keys if name in "kv" else range(problem.heads_q),
            device=device,
            keep_on=keep_on,
        )

    return {name: make(name) for name in _names(problem)}


def _names(problem: Problem) -> tuple[str, ...]:
    """Names of the tensors of :func:`make_inputs`."""
    return (*problem.inputs, "dout") if problem.backward else problem.inputs


def rank_inputs(
    work: Attention, recipe: Recipe, device: str, keep_on: str | None = None
) -> Tensors:
    """The inputs of the tokens of the rank that ``work`` is planned for: :func:`make_inputs`.

    On CPUs the last two sets are kept, unless they are large: methods that are measured in turn
    have the same.
    """
    problem = replace(work.problem, direction="fwd_bwd")
    queries = work.world.queries.positions(work.rank)
    keys, kv_heads = work.world.held_keys(work.rank)
    nbytes = problem.q_bytes(len(queries)) + problem.out_bytes(len(queries))  # q and dout
    nbytes += problem.kv_bytes(len(keys)) + problem.gate_bytes(len(queries))
    if device != "cpu" or keep_on is not None or nbytes > MOST_KEPT_BYTES:
        inputs = make_inputs(work.problem, queries, keys, recipe, device, keep_on, kv_heads)
    else:
        of_rank = queries.tobytes(), keys.tobytes(), tuple(kv_heads)
        kept = _kept_inputs(problem, *of_rank, recipe)
        inputs = {name: kept[name].clone() for name in _names(work.problem)}
    pinned = work.offloaded and keep_on is None and work.op.device.startswith("cuda")
    return {name: x.pin_memory() if pinned else x for name, x in inputs.items()}


@functools.lru_cache(maxsize=2)
def _kept_inputs(
    problem: Problem, queries: bytes, keys: bytes, kv_heads: tuple[int, ...], recipe: Recipe
) -> Tensors:
    """:func:`make_inputs` on a CPU; positions are bytes, so that they can be compared."""
    q_positions, k_positions = (np.frombuffer(x, np.int64).copy() for x in (queries, keys))
    return make_inputs(problem, q_positions, k_positions, recipe, "cpu", kv_heads=kv_heads)


class WrongResult(ValueError):
    """A result that needs no comparison to be wrong; the message says why."""


def run_pass(work: Attention, inputs: Tensors, comm: Comm | None) -> Tensors:
    """Run one pass; returns out, lse if the operator has one (of mixers, the last state), and
    gradients if asked for."""
    *forward, saved = work.forward(work.inputs_of(inputs), comm)
    grads = work.backward(inputs["dout"], saved, comm) if work.problem.backward else ()
    results = dict(zip(work.result_names, (*forward, *grads), strict=bool(grads)))
    return {name: x for name, x in results.items() if x is not None}


def sum_over_ranks(results: Tensors, context: RankContext) -> Tensors:
    """These results with the gradient of the initial state, to which each rank contributes that
    of its own tokens, added up; collective."""
    import torch

    own = results.get(f"d{INITIAL_STATE}")
    if own is None:
        return results
    total = sum(context.gather(own.double().cpu().numpy()))
    return {**results, f"d{INITIAL_STATE}": torch.as_tensor(total, device=own.device)}


def run_checked_pass(work: Attention, inputs: Tensors, context: RankContext) -> Tensors:
    """Run one pass as :func:`run_pass` and check the contract of its results; collective.

    Raises:
        WrongResult: on all ranks, where a result of any rank breaks the contract.
    """
    results = run_pass(work, inputs, context.comm)
    reasons = [reason for reason in context.gather(contract_breach(results, inputs)) if reason]
    if reasons:
        raise WrongResult(reasons[0])
    return results


def contract_breach(results: Tensors, inputs: Tensors) -> str | None:
    """The first result that is not a plain tensor of the shape, dtype and device that operators
    must return (those of the inputs, and float32 for lse and states), in one line; None if there is
    none."""
    import torch

    q, k, v = QKV.of(inputs)
    b, s, h, _ = q.shape
    likes = {"out": ([b, s, h, v.shape[3]], q.dtype), "lse": ([b, h, s], torch.float32)}
    likes["state"] = [b, h, k.shape[3], v.shape[3]], state_dtype(q)
    likes |= {f"d{name}": (list(x.shape), x.dtype) for name, x in inputs.items()}
    for name, result in results.items():
        if type(result) is not torch.Tensor:
            kind = f"{type(result).__module__}.{type(result).__qualname__}"
            return f"{name} is a {kind}; it must be a plain torch.Tensor"
        shape, dtype = likes[name]
        for what, actual, expected in (
            ("shape", list(result.shape), shape),
            ("dtype", result.dtype, dtype),
            ("device", result.device, q.device),
        ):
            if actual != expected:
                return f"{name} has {what} {actual}; it must be {expected}"
    return None


# --- small --------------------------------------------------------------------------------------


def reduced_mask(mask: Mask, tokens: int = SMALL_TOKENS) -> Mask:
    """The mask restricted to windows of tokens around the corners of its slices, spread over the
    sequence, or the mask itself if it is small.  Of the same kind, and equal on all ranks."""
    if max(mask.seq_q, mask.seq_k) <= tokens:
        return mask
    if isinstance(mask, DilatedMask):
        return mask.resized(tokens)
    q0, q1, k0, k1, lo, hi = mask.slices.T
    at_queries, at_keys = [q0, q1, k0 - hi, k1 - lo], [k0, k1, q0 + lo, q0 + hi]
    if mask.seq_q == mask.seq_k:
        at_queries = at_keys = [q0, q1, *at_keys]
    queries = _token_windows(mask.seq_q, np.concatenate(at_queries), tokens)
    keys = _token_windows(mask.seq_k, np.concatenate(at_keys), tokens)
    # Simplified, so that a causal mask stays causal and takes the code path that is measured.
    return mask.restrict(queries, keys).simplify()


def _token_windows(n: int, corners: IntArray, tokens: int) -> IntArray:
    """``(m, 2)`` starts and lengths of windows out of ``n`` tokens, at corners and between."""
    if n <= tokens:
        return np.array([[0, n]])
    corners = np.unique(np.append(corners[(corners >= 0) & (corners <= n)], [0, n]))
    count = tokens // WINDOW_TOKENS
    at_corners = corners[np.unique(np.linspace(0, len(corners) - 1, count).astype(int))]
    evenly = np.linspace(0, n, count - len(at_corners) + 2).astype(int)[1:-1]
    starts = np.concatenate([at_corners, evenly]) - WINDOW_TOKENS // 2
    starts = np.unique(np.clip(starts, 0, n - WINDOW_TOKENS))
    ends = np.minimum(starts + WINDOW_TOKENS, np.append(starts[1:], n))
    return np.column_stack([starts, ends - starts])


def reduced_world(work: Attention) -> World:
    """The world for :func:`check_small`: that of ``work`` with a reduced mask, same layout."""
    world = work.world
    tokens = SELECTION_TOKENS if work.op.info.selects else SMALL_TOKENS
    chunk = getattr(work.op.impl, "fixed_chunk", 0)
    tokens = max(tokens, min(2 * chunk, MOST_CHUNKED_TOKENS))
    # A multiple that layouts split evenly, since some strategies do not pad.
    unit = 2 * world.size * _selected_together(work)
    mask = reduced_mask(work.mask, max(tokens - tokens % unit, unit))
    excess = mask.seq_k % unit  # windows that overlap have fewer tokens together
    if work.op.info.selects and isinstance(mask, AttnMask) and mask is not work.mask and excess:
        mask = mask.crop(0, mask.seq_q - excess, 0, mask.seq_k - excess).simplify()
    if chunk and (world.size > 1 or world.keys.name != "contiguous"):
        # Chunks are counted from the starts of documents, and a layout may cut none.
        tokens = max(tokens - tokens % (unit * chunk), unit * chunk)
        mask = work.mask
        if mask.seq_q > tokens:
            assert isinstance(mask, AttnMask)
            mask = mask.crop(0, tokens, 0, tokens).simplify()
    problem = replace(world.problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
    shared_mask = mask if isinstance(mask, AttnMask) else None
    layout = layouts.build(world.keys.name, mask.seq_k, world.size, shared_mask)
    return World.of(problem, mask, layout, world.ranks_per_node, world.placement)


def _selected_together(work: Attention) -> int:
    """Adjacent tokens that no layout may cut: those that a selector selects, or selects for."""
    impl = work.op.impl
    if not work.op.info.selects or work.world.size == 1:
        return 1
    key_block = impl.key_block if work.info.selectors == "pooled" else 1  # type: ignore[attr-defined]
    return math.lcm(impl.query_block, key_block)  # type: ignore[attr-defined]


def check_small(
    work: Attention,
    recipe: Recipe,
    context: RankContext,
    reference: Callable[[Attention, Recipe, str], Tensors] | None = None,
) -> Errors:
    """Errors of every output and gradient of a problem of :func:`reduced_world`.

    Args:
        reference: the global results in float64, ``[B, heads, S, …]``; those of attention unless
            given.

    Raises:
        WrongResult: for a result that breaks the contract of operators.
        DoesNotFit: see :meth:`RankContext.compute`, as from the other checks.
    """
    results = run_checked_pass(work, rank_inputs(work, recipe, work.home), context)
    expected = reference or _attention_results
    results = sum_over_ranks(results, context)
    compare = functools.partial(_sums_of_small, work, results, recipe, work.home, expected)
    return combined_errors(context.gather(context.compute(compare)))


def _sums_of_small(
    work: Attention,
    results: Tensors,
    recipe: Recipe,
    device: str,
    expected_results: Callable[[Attention, Recipe, str], Tensors],
) -> ErrorSums:
    """Error sums of the results of a rank."""
    reference = expected_results(work, recipe, device)
    sums = {}
    for name, value in results.items():
        if name in STATES:
            sums[name] = TensorErrorSums.between(
                value, reference[name].to(device), value[..., 0, 0].numel()
            )
            continue
        layout = work.world.keys if name in ("dk", "dv") else work.world.queries
        positions = layout.positions(work.rank)
        real = np.flatnonzero(positions < layout.seq_len)
        heads_first = value if name == "lse" else as_matrices(value).transpose(1, 2)
        own = heads_first.index_select(2, as_index(real, device))
        expected = reference[name].to(device)
        expected = expected.index_select(2, as_index(positions[real], device))
        groups = own.shape[0] * own.shape[1]
        sums[name] = TensorErrorSums.between(own, expected, groups)
    return sums


def as_matrices(x: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, D]``; of a tensor without the last axis, D = 1."""
    return x.unsqueeze(3) if x.ndim == 3 else x


def _attention_results(work: Attention, recipe: Recipe, device: str) -> Tensors:
    return _reference_results(work.mask, work.problem, recipe, device)


@functools.lru_cache(maxsize=16)
def _reference_results(mask: Mask, problem: Problem, recipe: Recipe, device: str) -> Tensors:
    """The float64 results ``[B, heads, S, …]`` for the inputs as rounded to the problem's dtype;
    cached in host memory, to leave device memory to the measurement."""
    from cpbench.kernels.reference import backward64, forward64

    scale = problem.softmax_scale
    x = make_inputs(problem, np.arange(mask.seq_q), np.arange(mask.seq_k), recipe, device)
    out, lse = forward64(QKV.of(x), mask, scale)
    results = {"out": out.transpose(1, 2), "lse": lse}
    if problem.backward:
        grads = backward64(BackwardInputs(x["dout"], *QKV.of(x), out, lse), mask, scale)
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            results[name] = grad.transpose(1, 2)
    return {name: value.cpu() for name, value in results.items()}


def as_index(values: object, device: str) -> torch.Tensor:
    """An index tensor on ``device``."""
    import torch

    return torch.as_tensor(values, device=device)
