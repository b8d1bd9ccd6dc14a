"""Mixers with one defect each, which the checks must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cpbench.core.registry import operators
from cpbench.kernels.mixers import backward, decay, forward
from cpbench.kernels.mixers.operator import MixerOperator

NAME = "gated_deltanet"


class Right(MixerOperator):
    def __init__(self) -> None:
        super().__init__(NAME)


class NoDocuments(Right):
    """States go on from document to document."""

    def prepare(self, mask: Any, problem: Any, device: str) -> Any:
        plan = super().prepare(mask, problem, device)
        return replace(plan, mixer=replace(plan.mixer, documents=()))


class NoExchange(Right):
    """Every chunk starts from an empty state."""

    def prepare(self, mask: Any, problem: Any, device: str) -> Any:
        plan = super().prepare(mask, problem, device)
        return replace(plan, mixer=replace(plan.mixer, documents=tuple(range(64, mask.seq_q, 64))))


class OtherFarTokens(Right):
    """Right for a thousand tokens, so that only the check at size finds it."""

    def forward(self, x: Any, plan: Any) -> Any:
        out, state = super().forward(x, plan)
        out[:, 1000:] *= 1.5
        return out, state


class LooksAhead(Right):
    """A token reads what the next one has written."""

    def forward(self, x: Any, plan: Any) -> Any:
        out, state = super().forward(x, plan)
        out[:, :-1] = out[:, 1:].clone()
        return out, state


class Patched(Right):
    """A mixer of which a function is replaced while it computes."""

    def _patch(self) -> tuple[Any, str, Callable[..., Any]]:
        raise NotImplementedError

    @contextmanager
    def _patched(self) -> Iterator[None]:
        module, name, function = self._patch()
        original = getattr(module, name)
        setattr(module, name, function)
        try:
            yield
        finally:
            setattr(module, name, original)

    def forward(self, x: Any, plan: Any) -> Any:
        with self._patched():
            return super().forward(x, plan)

    def backward(self, x: Any, plan: Any) -> Any:
        with self._patched():
            return super().backward(x, plan)


class NoStateInTheGate(Patched):
    """The gate's gradient lacks the sum over the state that a chunk hands on."""

    def _patch(self) -> Any:
        original = backward._gate_gradient

        def cut(dG: Any, handed_on: Any, states: Any, dstates: Any, *rest: Any) -> Any:
            return original(dG, handed_on, torch.zeros_like(states), dstates, *rest)

        return backward, "_gate_gradient", cut


class ItselfUnseen(Patched):
    """A token's output lacks its own update."""

    def _patch(self) -> Any:
        original = decay._products
        return decay, "_products", lambda readers, writers: original(readers, writers).tril(-1)


class RoundedState(Patched):
    """States are kept in bfloat16."""

    def _patch(self) -> Any:
        original = forward.pass_states

        def rounding(states: Any, *rest: Any) -> Any:
            states[0] = states[0].bfloat16()
            values = original(states, *rest)
            states[1:] = states[1:].bfloat16()
            return values

        return forward, "pass_states", rounding


class UnlikeGate(Right):
    """The gradient of g has an axis more."""

    def backward(self, x: Any, plan: Any) -> Any:
        dq, dk, dv, dg, dbeta = super().backward(x, plan)
        return dq, dk, dv, dg.unsqueeze(-1), dbeta


class NoInitialState(Right):
    """Starts from 0, whatever it is given."""

    def forward(self, x: Any, plan: Any) -> Any:
        return super().forward(x.by_token, plan)


class HalfInitialGradient(Right):
    """The gradient of the initial state is half of what it is."""

    def backward(self, x: Any, plan: Any) -> Any:
        *grads, of_state = super().backward(x, plan)
        return (*grads, of_state / 2)


def _info(name: str, load: Any) -> Any:
    return replace(operators()[NAME], name=name, load=load, params=(), variants=())


right = _info("right", Right)
no_documents = _info("no_documents", NoDocuments)
no_exchange = _info("no_exchange", NoExchange)
other_far_tokens = _info("other_far_tokens", OtherFarTokens)
looks_ahead = _info("looks_ahead", LooksAhead)
no_state_in_the_gate = _info("no_state_in_the_gate", NoStateInTheGate)
itself_unseen = _info("itself_unseen", ItselfUnseen)
rounded_state = _info("rounded_state", RoundedState)
unlike_gate = _info("unlike_gate", UnlikeGate)
no_initial_state = _info("no_initial_state", NoInitialState)
half_initial_gradient = _info("half_initial_gradient", HalfInitialGradient)
