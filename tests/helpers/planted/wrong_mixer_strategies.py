"""Strategies of sequence mixers with one defect each, which the checks must find."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch

from cpbench import masks
from cpbench.strategies.scan.strategy import STRATEGY, Scan


class Bent:
    """Stands for a mixer or an operator of which methods are replaced."""

    def __init__(self, straight: Any) -> None:
        self._straight = straight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._straight, name)


class WithMixer(Scan):
    """A scan that receives another mixer than the operator's."""

    mixer: type[Bent] = Bent

    def _bend(self, op: Any) -> Any:
        bent = Bent(op)
        bent.bind = lambda problem: self.mixer(op.bind(problem))  # type: ignore[attr-defined]
        return bent

    def forward(self, qkv: Any, plan: Any, op: Any, comm: Any, need_lse: bool) -> Any:
        return super().forward(qkv, plan, self._bend(op), comm, need_lse)

    def backward(self, dout: Any, saved: Any, plan: Any, op: Any, *rest: Any) -> Any:
        return super().backward(dout, saved, plan, self._bend(op), *rest)


class NoExchange(Scan):
    """Every run starts from an empty state."""

    def _exchange(
        self, order: Any, own: Any, like: Any, mixer: Any, comm: Any, *rest: Any
    ) -> Generator[None, None, Any]:
        yield
        taking = [slot for slot in order.own(comm.rank) if order.taking[slot]]
        return {slot: torch.zeros_like(like.state) for slot in taking}


class NoTransition(WithMixer):
    """The state of the neighbour alone, without what came before it."""

    class mixer(Bent):
        def apply(self, transition: Any, state: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(state)


class GateCutAtShards(WithMixer):
    """The gradient of a gate without the state that its run hands on."""

    class mixer(Bent):
        def backward(self, x: Any, resets: Any, saved: Any, dout: Any, dstate: Any) -> Any:
            found, start = self._straight.backward(x, resets, saved, dout, dstate)
            cut, _ = self._straight.backward(x, resets, saved, dout, None)
            return found._replace(g=cut.g), start


class NoBoundaries(Scan):
    """Documents are dropped."""

    def prepare(self, op: Any, world: Any, rank: int) -> Any:
        mask = masks.build("causal", world.mask.seq_q)
        return super().prepare(op, replace(world, mask=mask), rank)


def _rounded(dtype: torch.dtype) -> type[Bent]:
    class Rounded(Bent):
        def apply(self, transition: Any, state: torch.Tensor) -> torch.Tensor:
            a, s = (x.to(dtype).to(state) for x in (transition, state))
            return a @ s

    return Rounded


class Tf32Fold(WithMixer):
    """Transitions are applied with as many digits of the mantissa as TF32 has."""

    mixer = _rounded(torch.float16)


class Bfloat16Fold(WithMixer):
    """Transitions are applied in bfloat16."""

    mixer = _rounded(torch.bfloat16)


def _info(name: str, load: Any) -> Any:
    return replace(STRATEGY, name=name, load=load)


right = _info("right", Scan)
no_exchange = _info("no_exchange", NoExchange)
no_transition = _info("no_transition", NoTransition)
gate_cut_at_shards = _info("gate_cut_at_shards", GateCutAtShards)
no_boundaries = _info("no_boundaries", NoBoundaries)
tf32_fold = _info("tf32_fold", Tf32Fold)
bfloat16_fold = _info("bfloat16_fold", Bfloat16Fold)
