"""The base class of the adapters to libraries of sequence mixers.

Legend: B batch, S tokens, H heads, K and V dimensions of keys and values; N = B * S tokens.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.operator import MixerInputs
from cpbench.kernels.autograd_op import GraphStore
from cpbench.kernels.mixers import forms

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import MixerBackwardInputs, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


@dataclass(frozen=True)
class Plan:
    """What does not depend on the inputs.

    Attributes:
        scale: multiplies q.
        lengths: tokens of each document, in order.
        backward: whether a backward pass follows.
    """

    scale: float
    lengths: tuple[int, ...]
    backward: bool


class LibraryMixer(ABC):
    """An operator around a library, differentiated by autograd; see
    ``cpbench.core.operator.Operator`` for its methods.

    Args:
        name: of the operator.
        mixer: the recurrence, a name in ``forms.FORMS``.
    """

    def __init__(self, name: str, mixer: str) -> None:
        self.name, self.form = name, forms.FORMS[mixer]
        self._graphs = GraphStore(name)
        self.states = self._graphs.states

    @property
    def recurrence(self) -> str:
        """What it computes."""
        return self.form.name

    def flops(self, problem: Problem) -> dict[str, int]:
        """FLOPs of the forward and the backward pass."""
        return forms.problem_flops(self.form, problem)

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        reason = self.refusal(problem, _document_lengths(mask))
        return f"{self.name} {reason}" if reason else None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        return Plan(problem.softmax_scale, _document_lengths(mask), problem.backward)

    def forward(self, x: MixerInputs, plan: Plan) -> OutLse:
        def compute(leaves: MixerInputs) -> OutLse:
            out, state = self.call(leaves, plan)
            return out.to(x.v.dtype), None if state is None else state.float()

        return self._graphs.forward(compute, x, plan.backward)

    def backward(self, x: MixerBackwardInputs, plan: Plan) -> tuple[torch.Tensor, ...]:
        return self._graphs.backward(x.dout, x.out)

    @abstractmethod
    def refusal(self, problem: Problem, lengths: tuple[int, ...]) -> str | None:
        """Why the library does not take a problem, to follow the operator's name; None if it does.

        Args:
            lengths: tokens of each document.
        """

    @abstractmethod
    def call(self, x: MixerInputs, plan: Plan) -> OutLse:
        """Return out ``[B, S, H, V]`` and the state of the last document ``[B, H, K, V]``, both in
        any dtype; None for a state that the library does not return."""


def default_scale_refusal(problem: Problem) -> str | None:
    """Why a library that always scales q by ``K ** -0.5`` does not take a problem, or None."""
    default = problem.head_dim**-0.5
    if math.isclose(problem.softmax_scale, default):
        return None
    return f"needs the scale {default:.6g}, not {problem.softmax_scale:.6g}"


def by_document(
    function: Callable[[MixerInputs], OutLse], x: MixerInputs, plan: Plan, multiple: int = 1
) -> OutLse:
    """Call a function that knows no documents for each of them.

    Args:
        multiple: of tokens that the function takes; the tokens added are zeros, which leave the
            state as it is.
    """
    import torch

    outs, state, edges = [], None, itertools.accumulate(plan.lengths, initial=0)
    for start, stop in itertools.pairwise(edges):
        out, state = function(_padded(x.tokens(start, stop), -(stop - start) % multiple))
        outs.append(out[:, : stop - start])
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)), state


def _padded(x: MixerInputs, tokens: int) -> MixerInputs:
    import torch

    if not tokens:
        return x
    pad = torch.nn.functional.pad
    return x.map(lambda y: pad(y, (0, 0) * (y.ndim - 2) + (0, tokens)))


def _document_lengths(mask: AttnMask) -> tuple[int, ...]:
    starts = mask.causal_documents
    assert starts is not None, "other masks are refused before"
    return tuple(b - a for a, b in itertools.pairwise((*starts, mask.seq_q)))
