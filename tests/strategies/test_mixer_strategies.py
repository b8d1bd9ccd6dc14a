"""Mixers on several ranks: against the recurrence in float64, what is sent, and planted faults.

Ranks are threads here; ``tests/api/test_distributed_mix.py`` has those of Gloo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive_mixers
import pytest
import torch
from naive_mixers import NAMES, Named
from simulated_nccl import find_faults, record
from threads import run_threads

import cpbench
from cpbench import masks
from cpbench.api.prepared_mixer import STRATEGIES
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation
from cpbench.core.spec import Spec
from cpbench.kernels.mixers.bound import BoundMixer
from cpbench.kernels.mixers.chunks import Inputs, Plan
from cpbench.kernels.mixers.forms import FORMS
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.mixing import TracedMixer, trace_mixer
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.tracing.trace import MODULUS, RankTrace
from cpbench.parallel.world import World
from cpbench.strategies.scan import gather, strategy
from cpbench.strategies.scan.slots import find_slots

SCALE, CHUNK, TOKENS = 0.5, 8, 96
SCANS = ("scan", "scan:by=ring", "scan:by=ring,blocks=3", "scan:by=doubling")
MIXERS = ("linear", "ssd", "gla", "gated_deltanet", "kda", "ttt")
SIZES = (1, 2, 3, 4, 8)
# The boundaries of documents are at edges of chunks, where a mixer's definition has chunks.
DOCUMENTS = {"causal": (0,), "documents": (0, 13, 14, 50, 90), "documents of ttt": (0, 16, 24, 80)}


def mask_of(starts: tuple[int, ...], tokens: int = TOKENS) -> Any:
    lengths = [b - a for a, b in zip(starts, (*starts[1:], tokens), strict=True)]
    return masks.build("causal_document", tokens, doc_lens=lengths)


def bound_mixer(mixer: str, chunk: int = CHUNK) -> BoundMixer:
    return BoundMixer(Plan(FORMS[mixer], SCALE, chunk))


def world_of(
    size: int,
    layout: str = "contiguous",
    starts: tuple[int, ...] = (0,),
    tokens: int = TOKENS,
    **changes: Any,
) -> World:
    values: dict[str, Any] = {
        "batch": 1,
        "heads_q": 4,
        "heads_kv": 4,
        "head_dim": 6,
        "head_dim_v": 5,
    }
    values |= {"dtype": "float64", **changes}
    problem = Problem(seq_q=tokens, seq_k=tokens, **values)
    mask = mask_of(starts, tokens)
    return World.of(problem, mask, build_layout(layout, tokens, size, mask))


def made(text: str) -> Any:
    spec = Spec.parse(text)
    return implementation(STRATEGIES[spec.name], spec.kwargs)


class Distributed:
    """A mixer on ranks that are threads, forward and backward.

    Attributes:
        results: out, the state on every rank, and gradients by name.
        bytes_sent: of each rank, in each pass.
    """

    def __init__(self, x: Named, mixer: str, text: str, world: World, dout: Any, dstate: Any):
        layout, size = world.keys, world.size
        one, chosen = bound_mixer(mixer), made(text)
        inputs = [
            Inputs(*(layout.shard(x[n], rank) if n in x else None for n in Inputs._fields))  # type: ignore[arg-type]
            for rank in range(size)
        ]

        def run(comm: Any) -> Any:
            plan = chosen.prepare(one, world, comm.rank)
            state = x["initial_state"]
            out, last, saved = chosen.forward(inputs[comm.rank], plan, one, comm, True, state)
            shard = layout.shard(dout, comm.rank)
            # Ranks share the gradient of the state, as they share what depends on it.
            found = chosen.backward(shard, saved, plan, one, comm, dstate / size)
            return out, last, *found

        outs, self.states, gradients, initial = zip(*run_threads(size, run), strict=True)
        self.results = {"out": layout.unshard(outs), "state": self.states[0]}
        for name in Inputs._fields:
            if name in x:
                shards = [getattr(of_rank, name) for of_rank in gradients]
                self.results[f"d{name}"] = layout.unshard(shards)
        self.results["dinitial_state"] = sum(initial)


def errors(
    mixer: str,
    text: str,
    size: int,
    layout: str = "contiguous",
    starts: tuple[int, ...] = (0,),
    dtype: torch.dtype = torch.float64,
) -> dict[str, float]:
    """The largest relative error of a head of each result."""
    x = naive_mixers.make_inputs(mixer, 1, TOKENS, 4, 6, 5, dtype)
    random = torch.Generator().manual_seed(1)
    dout = torch.randn(1, TOKENS, 4, 5, generator=random).to(dtype)
    dstate = torch.randn(1, 4, 6, 5, generator=random).to(x["initial_state"])
    found = Distributed(x, mixer, text, world_of(size, layout, starts), dout, dstate)
    assert all(torch.equal(state, found.states[0]) for state in found.states)
    gradients, out, state = truth(mixer, dtype, starts)
    wanted = {"out": out, "state": state} | {f"d{n}": y for n, y in gradients.items()}
    return {
        name: max(naive_mixers.head_errors(found.results[name], y, 1 if "state" in name else 2))
        for name, y in wanted.items()
    }


_TRUTHS: dict[Any, Any] = {}


def truth(mixer: str, dtype: torch.dtype, starts: tuple[int, ...]) -> Any:
    """Gradients, out and state of the recurrence in float64."""
    key = mixer, dtype, starts
    if key not in _TRUTHS:
        x = naive_mixers.make_inputs(mixer, 1, TOKENS, 4, 6, 5, dtype)
        random = torch.Generator().manual_seed(1)
        dout = torch.randn(1, TOKENS, 4, 5, generator=random).to(dtype)
        dstate = torch.randn(1, 4, 6, 5, generator=random).to(x["initial_state"])
        _TRUTHS[key] = naive_mixers.gradients(x, mixer, SCALE, dout, dstate, starts, CHUNK)
    return _TRUTHS[key]


def starts_for(mixer: str, name: str) -> tuple[int, ...]:
    return DOCUMENTS["documents of ttt" if (mixer, name) == ("ttt", "documents") else name]


@pytest.mark.parametrize("name", ["causal", "documents"])
@pytest.mark.parametrize("mixer", NAMES)
def test_every_way_is_exact_in_float64(mixer: str, name: str) -> None:
    starts = starts_for(mixer, name)
    for size in SIZES:
        for layout in ("contiguous", "zigzag"):
            if mixer == "ttt" and not keeps_chunks_whole(size, layout, starts):
                continue
            for text in (*SCANS, "ulysses:pad=true"):
                found = errors(mixer, text, size, layout, starts)
                assert max(found.values()) < 2e-13, (size, layout, text, found)


def keeps_chunks_whole(size: int, layout: str, starts: tuple[int, ...]) -> bool:
    try:
        made("scan").prepare(bound_mixer("ttt"), world_of(size, layout, starts), 0)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_lower_precision(mixer: str, dtype: torch.dtype) -> None:
    """In bfloat16 the error is that of rounding out twice: from state 0, and what that lacks."""
    starts, tolerance = starts_for(mixer, "documents"), {torch.float32: 1e-5}.get(dtype, 1e-2)
    for text, layout in ((SCANS[0], "zigzag"), (SCANS[2], "zigzag"), (SCANS[3], "contiguous")):
        for size in (3, 4):
            if mixer == "ttt" and not keeps_chunks_whole(size, layout, starts):
                continue
            found = errors(mixer, text, size, layout, starts, dtype)
            gates = found.pop("dg", 0.0)  # those of 20 nats a token lose digits in sums
            assert gates < 10 * tolerance, (size, layout, text, gates)
            assert max(found.values()) < tolerance, (size, layout, text, found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_document", "dispatch"])
@pytest.mark.parametrize("tokens", [5, 53])
def test_padding_and_ranks_without_tokens(layout: str, tokens: int) -> None:
    starts = (0, 2)
    x = naive_mixers.make_inputs("gated_deltanet", 1, tokens, 4, 6, 5)
    dout, dstate = torch.ones(1, tokens, 4, 5).double(), torch.ones(1, 4, 6, 5).double()
    gradients, out, state = naive_mixers.gradients(
        x, "gated_deltanet", SCALE, dout, dstate, starts, CHUNK
    )
    wanted = {"out": out, "state": state} | {f"d{n}": y for n, y in gradients.items()}
    for text in (*SCANS[:2], SCANS[3], "ulysses"):
        world = world_of(4, layout, starts, tokens)
        found = Distributed(x, "gated_deltanet", text, world, dout, dstate)
        for name, y in wanted.items():
            torch.testing.assert_close(found.results[name], y, msg=lambda m: f"{text} {name}: {m}")  # noqa: B023


def test_linear_without_a_mask() -> None:
    x = naive_mixers.make_inputs("linear", 1, TOKENS, 4, 6, 5)
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    out, state = cpbench.mix(**leaves, mixer="linear", mask="full", scale=SCALE)
    dout, dstate = torch.ones_like(out), torch.ones_like(state)
    gradients = torch.autograd.grad((out, state), tuple(leaves.values()), (dout, dstate))
    wanted = {"out": out, "state": state}
    wanted |= {f"d{name}": y for name, y in zip(leaves, gradients, strict=True)}
    full = replace(world_of(4, "zigzag"), mask=masks.build("full", TOKENS))
    found = Distributed(x, "linear", "ulysses", full, dout, dstate)
    for name, y in wanted.items():
        torch.testing.assert_close(found.results[name], y.detach())


# --- what is sent ---------------------------------------------------------------------------------

GDN = {"heads_q": 32, "heads_kv": 32, "head_dim": 128, "head_dim_v": 0, "dtype": "bfloat16"}


def local_inputs(world: World, mixer: str) -> Inputs:
    """The inputs of one rank, without data."""
    problem = world.problem
    shape = (problem.batch, world.keys.local_len, problem.heads_q)
    q, v = (
        torch.empty((*shape, dim), dtype=getattr(torch, problem.dtype), device="meta")
        for dim in (problem.head_dim, problem.value_dim)
    )
    form = FORMS[mixer]
    g = torch.empty(q.shape if form.gate == "diagonal" else shape, device="meta")
    x = Inputs(q, q, v, g if form.gate else None, g[..., 0] if g.ndim == 4 else g)
    return x if form.delta else x._replace(beta=None)


def traces(text: str, world: World, mixer: str = "gated_deltanet") -> list[RankTrace]:
    """Of all ranks, whose checksums match; the state is not asked for."""
    assert declared_refusal(STRATEGIES[Spec.parse(text).name], world) is None
    chosen, x = made(text), local_inputs(world, mixer)
    ranks = [
        trace_mixer(chosen, bound_mixer(mixer), world, rank, x, need_state=False)
        for rank in range(world.size)
    ]
    assert sum(trace.checksum for trace in ranks) % MODULUS == 0
    return ranks


def sent(ranks: list[RankTrace], phase: str) -> list[int]:
    return [sum(trace.phases[phase].bytes_to) for trace in ranks]


@pytest.mark.parametrize(("size", "gathered", "doubled"), [(8, 28, 10), (64, 252, 22)])
def test_a_gated_deltanet_of_32_heads(size: int, gathered: int, doubled: int) -> None:
    """MiB of the rank that sends most, forward."""
    world = world_of(size, tokens=64 * size, **GDN)
    for text, mebibytes in (
        ("scan", gathered), ("scan:by=ring", 2), ("scan:by=ring,blocks=8", 2),
        ("scan:by=doubling", doubled),
    ):  # fmt: skip
        assert max(sent(traces(text, world), "fwd")) == mebibytes << 20


TRANSITIONS = {"linear": 0, "ssd": 1, "gla": 6, "kda": 36, "gated_deltanet": 36}


@pytest.mark.parametrize("mixer", TRANSITIONS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_closed_formulas(mixer: str, size: int) -> None:
    """4 heads of 6 x 5 in float32: a state, and a transition by the kind of mixer."""
    state, transition = 4 * 4 * 6 * 5, 4 * 4 * TRANSITIONS[mixer]
    both, last = state + transition, size - 1
    world = world_of(size, dtype="float32")
    ranks = traces("scan", world, mixer)
    assert sent(ranks, "fwd") == [last * both] * size
    assert sent(ranks, "bwd") == [last * state] * size
    for text in ("scan:by=ring", "scan:by=ring,blocks=5"):
        ranks = traces(text, world, mixer)
        assert sent(ranks, "fwd") == [state] * last + [0]
        assert sent(ranks, "bwd") == [0] + [state] * last
    ranks = traces("scan:by=doubling", world, mixer)
    distances = [1 << i for i in range(last.bit_length())]
    expected = [
        sum(both if rank >= d else state for d in distances if rank + d <= last)
        for rank in range(size)
    ]
    assert sent(ranks, "fwd") == sent(ranks, "bwd")[::-1] == expected
    rounds = len(distances)
    assert max(expected) <= (rounds - 1) * both + state

    zigzag = world_of(size, "zigzag", dtype="float32")
    ranks = traces("scan", zigzag, mixer)
    assert sent(ranks, "fwd") == [2 * last * both] * size
    assert sent(ranks, "bwd") == [2 * last * state] * size
    ranks = traces("scan:by=ring", zigzag, mixer)
    assert sent(ranks, "fwd") == [state] + [2 * state] * (last - 1) + [state]


def test_documents_stop_what_nobody_needs() -> None:
    """On 4 ranks of 24 tokens: documents from 0, 24 (a rank's first token) and 60 (inside)."""
    world = world_of(4, starts=(0, 24, 60), dtype="float32")
    state, transition = 4 * 4 * 6 * 5, 4 * 4 * 6 * 6
    for text in ("scan", "scan:by=ring", "scan:by=doubling"):
        ranks = traces(text, world)
        # Rank 1 is read by rank 2, and rank 2, in which a document begins, by rank 3.
        assert sent(ranks, "fwd") == [0, state, state, 0]
        assert sent(ranks, "bwd") == [0, 0, state, state]
    # One more rank in the middle of a document: its transition is sent forward and back.
    world = world_of(4, starts=(0, 24), dtype="float32")
    ranks = traces("scan", world)
    assert sent(ranks, "fwd") == [0, 2 * state, state + 2 * transition, 0]
    assert sent(ranks, "bwd") == [0, 0, state, 2 * state]


def test_ulysses_sends_gates_too() -> None:
    world, n = world_of(4, "striped", dtype="bfloat16"), 3
    ranks = traces("ulysses", world)
    element = 24 * 4  # of a number per token and head
    inputs, out = element * (2 * (6 + 6 + 5) + 4 * (1 + 1)), element * 2 * 5
    assert sent(ranks, "fwd") == sent(ranks, "bwd") == [(inputs + out) * n // 4] * 4


# --- refusals -------------------------------------------------------------------------------------


def refusal(text: str, mixer: BoundMixer, world: World) -> str:
    chosen = made(text)
    reason = declared_refusal(STRATEGIES[Spec.parse(text).name], world) or chosen.unsupported(world)
    if reason is not None:
        return str(reason)
    with pytest.raises(Unsupported) as caught:
        chosen.prepare(mixer, world, 0)
    return str(caught.value)


def test_refusals() -> None:
    mixer = bound_mixer("gated_deltanet")
    assert refusal("scan", mixer, world_of(2, "striped")) == (
        "scan takes layouts contiguous, zigzag, zigzag_document, dispatch, not striped"
    )
    full = replace(world_of(2), mask=masks.build("full", TOKENS))
    assert refusal("scan", mixer, full).startswith("scan takes masks that are causal, also within")
    assert refusal("scan:by=ring,blocks=6", mixer, world_of(2)) == (
        "scan: blocks = 6 are more than the 5 columns of a state"
    )
    assert refusal("ulysses", mixer, world_of(3)).startswith("ulysses needs num_heads_q divisible")
    triton = replace(mixer, kernel="triton")
    assert "kernel=triton computes no summaries of runs" in refusal("scan", triton, world_of(2))
    assert refusal("scan", bound_mixer("ttt", 64), world_of(3)) == (
        "ttt updates once per chunk of 64 tokens: layout contiguous cuts one after 32 tokens, at "
        "token 32; use a layout, a number of ranks or a chunk that cuts none"
    )
    for text, message in (
        ("scan:by=tree", "scan: by = 'tree' is not one of allgather, ring, doubling"),
        ("scan:by=ring,blocks=0", "scan: blocks = 0 must be 1 or more"),
        ("scan:blocks=2", "scan: blocks = 2 is for by=ring, not by=allgather"),
    ):
        with pytest.raises(ValueError, match=message):
            made(text)


# --- planted faults -------------------------------------------------------------------------------


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is received, and every rank starts from an empty state."""

    def keep_own(order: Any, by_slot: Any, like: torch.Tensor, comm: Any) -> CompletedHandle:
        for slot in range(len(order.ranks)):
            by_slot.setdefault(slot, torch.zeros_like(like))
        return CompletedHandle()

    monkeypatch.setattr(gather, "_gather", keep_own)


def no_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the neighbour alone, without what came before it."""
    monkeypatch.setattr(BoundMixer, "apply", lambda self, a, state: torch.zeros_like(state))


def gate_cut_at_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a gate without the state that its run hands on."""
    original = BoundMixer.backward

    def cut(self: Any, x: Any, resets: Any, saved: Any, dout: Any, dstate: Any) -> Any:
        _, start = original(self, x, resets, saved, dout, dstate)
        return original(self, x, resets, saved, dout, None)[0], start

    monkeypatch.setattr(BoundMixer, "backward", cut)


def no_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that begin inside a run are dropped."""
    monkeypatch.setattr(
        strategy, "find_slots", lambda layout, documents, split: find_slots(layout, (0,), split)
    )


def transitions_in(dtype: torch.dtype) -> Callable[[pytest.MonkeyPatch], None]:
    def fold(monkeypatch: pytest.MonkeyPatch) -> None:
        def apply(transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
            assert transition is not None
            return (transition.to(dtype).to(state) @ state.to(dtype).to(state)).to(state)

        monkeypatch.setattr(BoundMixer, "apply", staticmethod(apply))

    return fold


FAULTS = {
    "no exchange": no_exchange, "no transition": no_transition, "gate": gate_cut_at_shards,
    "boundaries": no_boundaries, "bfloat16 fold": transitions_in(torch.bfloat16),
    # As many digits of the mantissa as TF32 has.
    "tf32 fold": transitions_in(torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = (0, 60) if fault == "boundaries" else (0,)
    args: Any = ("gated_deltanet", "scan", 4, "contiguous", starts, torch.float32)
    assert max(errors(*args).values()) < 1e-5
    FAULTS[fault](monkeypatch)
    assert max(errors(*args).values()) > (1e-4 if "fold" in fault else 1e-2)


@pytest.mark.parametrize("fault", ["no exchange", "no transition"])
def test_a_fault_in_bfloat16_shows_with_long_half_lives(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args: Any = ("ssd", "scan", 4, "contiguous", (0,), torch.bfloat16)
    assert max(errors(*args).values()) < 1e-1
    FAULTS[fault](monkeypatch)
    assert max(errors(*args).values()) > 0.2


# --- NCCL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_is_issued_on_nccl_ends_and_leaves_buffers_alone(layout: str, size: int) -> None:
    for starts in ((0,), (0, 13, 50, 90)):
        world = world_of(size, layout, starts)
        for text in (*SCANS, "ulysses:pad=true"):
            chosen, mixer = made(text), TracedMixer(bound_mixer("gated_deltanet"))
            x = local_inputs(world, "gated_deltanet")

            def passes(comm: Any, recorder: Any) -> None:
                plan = chosen.prepare(mixer, world, comm.rank)  # noqa: B023
                comm.connect(trace_mixer(chosen, mixer, world, comm.rank, x, True).parts)  # noqa: B023
                _, state, saved = chosen.forward(x, plan, mixer, comm, True)  # noqa: B023
                recorder.end_pass()
                chosen.backward(x.v, saved, plan, mixer, comm, state)  # noqa: B023
                recorder.end_pass()

            assert not find_faults(record(size, passes)), (text, starts)
