"""Mixers on ranks that are threads, against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import naive_mixers
import torch
from naive_mixers import DIAGONAL, SCALAR, Named
from threads import run_threads

from cpbench import masks
from cpbench.core.operator import MixerInputs, Unsupported
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.kernels.mixers.operator import MixerOperator
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World

SCALE, CHUNK, TOKENS = 0.5, 8, 96
SCANS = ("scan", "scan:by=ring", "scan:by=ring,blocks=3", "scan:by=doubling")
MIXERS = ("linear", "ssd", "gla", "gated_deltanet", "kda", "ttt")
SIZES = (1, 2, 3, 4, 8)
# Ranks cut the first document, which alone starts from the initial state.  The boundaries of
# documents are at edges of chunks, where a mixer's definition has chunks.
DOCUMENTS = {"causal": (0,), "documents": (0, 40, 41, 77, 90), "documents of ttt": (0, 16, 24, 80)}


def mask_of(starts: tuple[int, ...], tokens: int = TOKENS) -> Any:
    lengths = [b - a for a, b in zip(starts, (*starts[1:], tokens), strict=True)]
    return masks.build("causal_document", tokens, doc_lens=lengths)


def operator_of(mixer: str, **params: Any) -> BoundOperator:
    implemented = MixerOperator(mixer, **{"chunk": CHUNK, **params})
    return BoundOperator(operator_info(mixer), implemented, "cpu")


def world_of(
    size: int,
    layout: str = "contiguous",
    starts: tuple[int, ...] = (0,),
    tokens: int = TOKENS,
    mixer: str = "gated_deltanet",
    **changes: Any,
) -> World:
    """A computation of a mixer with every gate that it can take given."""
    values: dict[str, Any] = {
        "batch": 1,
        "heads_q": 4,
        "heads_kv": 4,
        "head_dim": 6,
        "head_dim_v": 5,
    }
    values |= {"dtype": "float64", "scale": SCALE, **changes}
    gates = operator_info(mixer).gate_lanes(values["head_dim"])
    if mixer in SCALAR + DIAGONAL and "g" not in dict(gates):
        gates = (("g", 0), *gates)
    problem = Problem(seq_q=tokens, seq_k=tokens, gates=gates, **values)
    mask = mask_of(starts, tokens)
    return World.of(problem, mask, build_layout(layout, tokens, size, mask))


def made(text: str) -> Any:
    spec = Spec.parse(text)
    return implementation(strategy_info(spec.name), spec.kwargs, "mixer")


class Distributed:
    """A mixer on ranks that are threads, forward and backward.

    Attributes:
        results: out, the state on every rank, and gradients by name.
        bytes_sent: of each rank, in each pass.
    """

    def __init__(self, x: Named, mixer: str, text: str, world: World, dout: Any, dstate: Any):
        layout, size = world.keys, world.size
        op, chosen = operator_of(mixer), made(text)

        def shards(rank: int) -> Named:
            return {
                name: y if name == "initial_state" else layout.shard(y, rank)
                for name, y in x.items()
            }

        def run(comm: Any) -> Any:
            plan, own = chosen.prepare(op, world, comm.rank), shards(comm.rank)
            out, last, saved = chosen.forward(MixerInputs.of(own), plan, op, comm, True)
            shard = layout.shard(dout, comm.rank)
            # Ranks share the gradient of the state, as they share what depends on it.
            found = chosen.backward(shard, saved, plan, op, comm, dstate / size)
            return out, last, MixerInputs.of(own).named(found)

        outs, self.states, gradients = zip(*run_threads(size, run), strict=True)
        self.results = {"out": layout.unshard(outs), "state": self.states[0]}
        for name in x:
            own = [getattr(of_rank, name) for of_rank in gradients]
            whole = sum(own) if name == "initial_state" else layout.unshard(own)
            self.results[f"d{name}"] = whole


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
    found = Distributed(x, mixer, text, world_of(size, layout, starts, mixer=mixer), dout, dstate)
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


def keeps_chunks_whole(size: int, layout: str, starts: tuple[int, ...]) -> bool:
    try:
        made("scan").prepare(operator_of("ttt"), world_of(size, layout, starts, mixer="ttt"), 0)
    except Unsupported:
        return False
    return True
