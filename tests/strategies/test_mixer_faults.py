"""Mixers on several ranks: refusals, and planted faults, which are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixers_on_ranks import TOKENS, errors, made, operator_of, world_of

from cpbench import masks
from cpbench.core.operator import Unsupported
from cpbench.core.registry import strategy_info
from cpbench.core.spec import Spec
from cpbench.kernels.mixers.bound import BoundMixer
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.world import World
from cpbench.strategies.scan import gather, strategy
from cpbench.strategies.scan.slots import find_slots


def refusal(text: str, op: BoundOperator, world: World) -> str:
    chosen = made(text)
    reason = declared_refusal(strategy_info(Spec.parse(text).name), world) or chosen.unsupported(
        world
    )
    if reason is not None:
        return str(reason)
    with pytest.raises(Unsupported) as caught:
        chosen.prepare(op, world, 0)
    return str(caught.value)


def test_refusals() -> None:
    mixer = operator_of("gated_deltanet")
    assert refusal("scan", mixer, world_of(2, "striped")) == (
        "scan takes layouts contiguous, zigzag, zigzag_document, dispatch, not striped"
    )
    full = replace(world_of(2), mask=masks.build("full", TOKENS))
    assert refusal("scan", mixer, full).startswith("scan takes masks that are causal, also within")
    assert refusal("scan:by=ring,blocks=6", mixer, world_of(2)) == (
        "scan: blocks = 6 are more than the 5 columns of a state"
    )
    assert refusal("ulysses", mixer, world_of(3)).startswith("ulysses needs num_heads_q divisible")
    triton = operator_of("gated_deltanet", kernel="triton")
    assert "kernel=triton computes no summaries of runs" in refusal("scan", triton, world_of(2))
    assert refusal("scan", operator_of("ttt", chunk=64), world_of(3, mixer="ttt")) == (
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
