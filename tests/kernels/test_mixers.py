"""The contract of mixers on runs of tokens, from which context parallelism is built; and faults
that the checks must find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import naive
import naive_mixers
import pytest
import torch
from naive_mixers import DELTA, NAMES, Named

from cpbench.core.problem import Problem
from cpbench.kernels.mixers import backward, chunks, decay, forward
from cpbench.kernels.mixers.chunks import Inputs, Plan
from cpbench.kernels.mixers.forms import FORMS, flops, parity_tokens
from cpbench.kernels.mixers.forward import Summary, apply, combine
from cpbench.measure.process_state import ProcessState

SCALE, CHUNK = 0.5, 16


def make(mixer: str, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Inputs, Named]:
    x = naive_mixers.make_inputs(mixer, 2, tokens, 3, 6, 5, dtype)
    return Inputs(*(x.get(name) for name in ("q", "k", "v", "g", "beta"))), x  # type: ignore[arg-type]


def part(x: Inputs, a: int, b: int) -> Inputs:
    return Inputs(*(None if y is None else y[:, a:b] for y in x))  # type: ignore[arg-type]


def plan_of(mixer: str, resets: tuple[int, ...] = ()) -> Plan:
    return Plan(FORMS[mixer], SCALE, CHUNK, resets)


def edges_of(mixer: str) -> tuple[int, ...]:
    """Ends of runs: inside chunks, but for the form that they would cut; one is of one token."""
    return (0, 32, 48, 112, 117) if mixer == "ttt" else (0, 37, 38, 90, 117)


def transposed(transition: torch.Tensor | None) -> torch.Tensor | None:
    if transition is None or transition.shape[-1] == 1:
        return transition
    return transition.mT


@pytest.mark.parametrize("documents", [(), (48, 96)])
@pytest.mark.parametrize("mixer", NAMES)
def test_runs_are_joined_by_their_summaries(mixer: str, documents: tuple[int, ...]) -> None:
    """Each run is computed by itself, and the states at its ends from summaries alone: outputs and
    all gradients are those of one run."""
    x, named = make(mixer, 117)
    state = named["initial_state"]
    whole = plan_of(mixer, documents)
    out, last, saved = forward.output(x, whole, state)
    assert saved is not None
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    expected = backward.backward(x, whole, saved, dout, dlast)
    runs = []
    for a, b in itertools.pairwise(edges_of(mixer)):
        resets = tuple(start - a for start in documents if a <= start < b)
        runs.append((a, b, part(x, a, b), plan_of(mixer, resets)))
    summaries = [forward.summarise(run, plan) for *_, run, plan in runs]
    states = [state]
    for summary, _ in summaries:
        states.append(apply(summary.transition, states[-1]) + summary.state)
    folded = summaries[0][0]
    for summary, _ in summaries[1:]:
        folded = combine(summary, folded)
    assert naive.error(apply(folded.transition, state) + folded.state, last) < 1e-14

    outs, kept = [], []
    for (*_, run, plan), (_, inverse), given in zip(runs, summaries, states, strict=False):
        local, end, saved = forward.output(run, plan, inverse=inverse)
        assert saved is not None
        end = end + forward.respond(run, plan, given, saved, local)
        outs.append(local)
        kept.append(saved)
    assert naive.error(torch.cat(outs, 1), out) < 1e-14
    assert naive.error(end, last) < 1e-14

    dstate, parts = dlast, []
    for (a, b, run, plan), (summary, inverse), saved in reversed(
        list(zip(runs, summaries, kept, strict=True))
    ):
        found = backward.backward(run, plan, saved, dout[:, a:b], dstate)
        parts.insert(0, found)
        own = backward.summarise_back(run, plan, dout[:, a:b], inverse=inverse)
        transition = transposed(summary.transition)
        dstate = own + apply(transition, dstate)
        assert naive.error(found.state, dstate) < 1e-13
    assert naive.error(dstate, expected.state) < 1e-13
    for *pieces, wanted in zip(*(p[:5] for p in parts), expected[:5], strict=True):
        if wanted is not None:
            assert naive.error(torch.cat(pieces, 1), wanted) < 1e-13


@pytest.mark.parametrize("mixer", NAMES)
def test_slabs_change_nothing(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab holds all chunks, or one."""
    x, named = make(mixer, 75)
    plan = plan_of(mixer, (16, 48))

    def run() -> list[torch.Tensor | None]:
        out, state, saved = forward.output(x, plan, named["initial_state"])
        assert saved is not None
        return [out, state, *backward.backward(x, plan, saved, torch.ones_like(out), state)]

    expected = run()
    monkeypatch.setitem(chunks.SLAB_ELEMENTS, "cpu", 1)
    assert len(chunks.cut_slabs(x, CHUNK)) == 5
    for found, wanted in zip(run(), expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_the_shapes_of_summaries() -> None:
    shapes = {
        "linear": None, "ssd": (2, 3, 1, 1), "gla": (2, 3, 6, 1), "kda": (2, 3, 6, 6),
        "deltanet": (2, 3, 6, 6), "ttt": None,
    }  # fmt: skip
    for mixer, shape in shapes.items():
        x, _ = make(mixer, 40, torch.bfloat16)
        (transition, state), inverse = forward.summarise(x, plan_of(mixer))
        assert state.shape == (2, 3, 6, 5)
        assert state.dtype == torch.float32
        assert (None if transition is None else transition.shape) == shape
        assert (inverse is not None) == (mixer in DELTA)


def test_a_run_in_which_a_document_begins_has_no_transition() -> None:
    for mixer in NAMES:
        x, _ = make(mixer, 40)
        summary, _ = forward.summarise(x, plan_of(mixer, (16,)))
        assert summary.transition is not None
        assert not summary.transition.any()


def test_fast_weights_refuse_what_cuts_their_chunk() -> None:
    with pytest.raises(ValueError, match="once per chunk of 16 tokens: no document may begin"):
        plan_of("ttt", (20,))


def test_states_are_passed_on_in_full_float32() -> None:
    """Whatever the process allows for float32 (``"medium"`` is bfloat16 on CPUs that have it)."""
    named = naive_mixers.make_inputs("gated_deltanet", 1, 320, 2, 32, 32, torch.float32)
    x = Inputs(*(named[name] for name in ("q", "k", "v", "g", "beta")))
    plan = Plan(FORMS["gated_deltanet"], SCALE, 32)
    (slab,) = chunks.cut_slabs(x, 32)
    loaded = forward.load(x, plan, slab, 32)
    inverse, v = forward.invert(loaded), chunks.read(x.v, slab, 32, torch.float32)

    def pass_on() -> list[torch.Tensor]:
        states = torch.zeros(11, 2, 32, 32)
        values = forward.pass_states(states, v, loaded, inverse)
        dstates = torch.ones(11, 2, 32, 32)
        pairs = torch.zeros(10, 2, 2, 32, 32)
        backward.pass_gradients(dstates, v, loaded, pairs, inverse)
        summary = Summary(states[1:2], states[1:2])
        return [states, values, dstates[:-2], combine(summary, summary).state]

    expected = pass_on()
    state = ProcessState()
    try:
        torch.set_float32_matmul_precision("medium")
        allowed = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
        found = pass_on()
        assert torch._C._get_fp32_precision_getter("mkldnn", "matmul") == allowed == "bf16"
    finally:
        assert state.restore()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# --- planted faults -----------------------------------------------------------------------------


def largest_error(mixer: str, dtype: torch.dtype, tokens: int = 100) -> float:
    """Of out, the state and all gradients over documents: what the checks look at."""
    starts = (0, 40, 71)
    x, named = make(mixer, tokens, dtype)
    plan = plan_of(mixer, starts[1:])
    out, state, saved = forward.output(x, plan, named["initial_state"])
    assert saved is not None
    dout, dstate = torch.randn(out.shape).to(out), torch.randn_like(state)
    found = backward.backward(x, plan, saved, dout, dstate)
    wanted, *true = naive_mixers.gradients(named, mixer, SCALE, dout, dstate, starts)
    pairs = [(out, true[0], 2), (state, true[1], 1), (found.state, wanted["initial_state"], 1)]
    pairs += [(getattr(found, name), y, 2) for name, y in wanted.items() if len(name) < 5]
    return max(max(naive_mixers.head_errors(a, b, axis)) for a, b, axis in pairs)


def no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundaries of documents dropped."""
    monkeypatch.setattr(forward, "find_segments", lambda *_: None)


def no_state_in_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's gradient without the state that is handed on."""
    original = backward._gate_gradient

    def cut(dG: Any, handed_on: Any, states: Any, dstates: Any, *rest: Any) -> torch.Tensor:
        return original(dG, handed_on, torch.zeros_like(states), dstates, *rest)

    monkeypatch.setattr(backward, "_gate_gradient", cut)


def exponent_before_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors as exp(G_t) exp(-G_j), which overflow."""

    def between(G: torch.Tensor) -> torch.Tensor:
        return (G.exp() * (-G).exp().mT).tril().unsqueeze(2)

    class Overflowing(decay.ScalarDecay):
        def __init__(self, g: torch.Tensor, segments: Any) -> None:
            super().__init__(g, segments)
            self.between = between(g.cumsum(2))

    monkeypatch.setattr(decay, "ScalarDecay", Overflowing)


def rounded_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state kept in bfloat16."""
    original = forward.pass_states

    def rounding(states: torch.Tensor, *rest: Any) -> torch.Tensor:
        states[0] = states[0].bfloat16()
        values = original(states, *rest)
        states[1:] = states[1:].bfloat16()
        return values

    monkeypatch.setattr(forward, "pass_states", rounding)


def itself_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's output without its own update."""
    original = decay._products

    def strict(readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
        return original(readers, writers).tril(-1)

    monkeypatch.setattr(decay, "_products", strict)


@pytest.mark.parametrize(
    "fault",
    [
        no_documents, no_state_in_the_gate, exponent_before_difference, rounded_state,
        itself_unseen,
    ],
)  # fmt: skip
def test_planted_faults_are_found(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_error("gated_deltanet", torch.float32) < 1e-4
    fault(monkeypatch)
    found = largest_error("gated_deltanet", torch.float32)
    assert math.isnan(found) or found > 1e-3


def test_a_missing_exchange_shows_only_with_long_half_lives() -> None:
    """Two runs, the second from an empty state: within bfloat16's rounding for gates of
    -softplus(normal), plain for half-lives of a run."""
    x, _ = make("gated_deltanet", 512)
    x = x._replace(beta=0.1 * x.beta)  # type: ignore[operator]
    errors = {}
    for kind, g in (
        ("default", -torch.nn.functional.softplus(torch.randn(x.g.shape).double())),  # type: ignore[union-attr]
        ("long", torch.full(x.g.shape, -math.log(2) / 256).double()),  # type: ignore[union-attr]
    ):
        gated = x._replace(g=g)
        out, _, _ = forward.output(gated, plan_of("gated_deltanet"))
        second, _, _ = forward.output(part(gated, 256, 512), plan_of("gated_deltanet"))
        errors[kind] = naive.error(second, out[:, 256:])
    assert errors["default"] < 0.1
    assert errors["long"] > 0.3


def test_summaries_combine_in_any_grouping() -> None:
    x, _ = make("kda", 96)
    parts = [forward.summarise(part(x, a, a + 32), plan_of("kda"))[0] for a in (0, 32, 64)]
    left = combine(parts[2], combine(parts[1], parts[0]))
    right = combine(combine(parts[2], parts[1]), parts[0])
    nothing = Summary(None, torch.zeros_like(left.state))
    for a, b in ((left, right), (combine(nothing, Summary(None, left.state)), left)):
        torch.testing.assert_close(a.state, b.state)
    torch.testing.assert_close(left.transition, right.transition)


def test_flops_by_counting_products() -> None:
    """Of a token: an update and a read, and the gradients of both, over K x V each."""
    for mixer in NAMES:
        delta = mixer in DELTA
        products = {"fwd": 2 + delta, "bwd": 1 + delta + 4 + 2 * delta}
        assert flops(FORMS[mixer], 10, 64, 128) == {
            phase: 10 * 2 * 64 * 128 * count for phase, count in products.items()
        }


@pytest.mark.parametrize(("mixer", "dims"), [("ssd", 2), ("gated_deltanet", 3)])
def test_parity_with_attention_is_at_a_few_head_dims(mixer: str, dims: int) -> None:
    tokens = round(parity_tokens(FORMS[mixer], 64, 64))
    assert tokens == dims * 64 - 1
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=1, heads_kv=1, head_dim=64, dtype="float32"
    )
    attention = problem.flops(tokens * (tokens + 1) / 2)["fwd"]
    assert attention == flops(FORMS[mixer], tokens, 64, 64)["fwd"]
