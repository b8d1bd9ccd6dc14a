"""Sequence mixers as registered operators, over whole sequences on one device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.operator import MixerBackwardInputs, MixerInputs, Unsupported
from cpbench.core.output_state import OutputStates
from cpbench.core.registry import OperatorInfo
from cpbench.core.spec import Spec
from cpbench.kernels.mixers import forms
from cpbench.kernels.mixers.bound import BoundMixer
from cpbench.kernels.mixers.chunks import Plan
from cpbench.kernels.mixers.mixer import Mixer, retention_decays
from cpbench.kernels.mixers.triton import launch

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


@dataclass(frozen=True)
class Prepared:
    """A plan.

    Attributes:
        mixer: what computes.
        backward: whether a backward pass follows.
        decays: ``[H]``, log decays of a mixer that has its own; else None.
    """

    mixer: Mixer
    backward: bool
    decays: torch.Tensor | None


class MixerOperator:
    """The operator of a mixer; for the contract see ``cpbench.core.operator.Operator``.

    Args:
        name: of the mixer.
        chunk, kernel: as for ``cpbench.mix``; the chunk of the mixer unless given.

    Raises:
        ValueError: for a chunk or kernel that does not exist.
    """

    def __init__(self, name: str, chunk: int = 0, kernel: str = "torch") -> None:
        given: tuple[tuple[str, int | str], ...] = (("kernel", kernel),)
        given += (("chunk", chunk),) if chunk else ()
        self.form, self._chunk, self._kernel = forms.parse(Spec(name, given))
        self.states = OutputStates(name)

    @property
    def recurrence(self) -> str:
        """What it computes, whatever the chunks: the form, and the chunk where that matters."""
        return f"{self.form.name}:chunk={self._chunk}" if self.form.lagging else self.form.name

    @property
    def fixed_chunk(self) -> int:
        """Tokens of a chunk where that is part of the definition, else 0."""
        return self._chunk if self.form.lagging else 0

    def flops(self, problem: Problem) -> dict[str, int]:
        """FLOPs of the forward and the backward pass."""
        return forms.problem_flops(self.form, problem)

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if self._kernel == "torch":
            return None
        plan, device_type = self._plan(problem), device.partition(":")[0]
        return launch.refusal(plan, problem.head_dim, problem.dtype, device_type)

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Prepared:
        return Prepared(
            make_mixer(self._plan(problem), mask, self._kernel),
            problem.backward,
            self.decays(problem, device),
        )

    def bind(self, problem: Problem, device: str) -> BoundMixer:
        """Its functions of runs of tokens.

        Raises:
            Unsupported: for a kernel that has none.
        """
        if self._kernel != "torch":
            raise Unsupported(
                f"{self.form.name}: kernel={self._kernel} computes no summaries of runs: use "
                "kernel=torch"
            )
        return BoundMixer(self._plan(problem))

    def decays(self, problem: Problem, device: str) -> torch.Tensor | None:
        """``[H]`` log decays of a mixer that has its own where no g is given, else None."""
        given = "g" in dict(problem.gates)
        own = self.form.default_gate and not given
        return retention_decays(problem.heads_q, device) if own else None

    def forward(self, x: MixerInputs, plan: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = x.by_token.with_decays(plan.decays)
        out, state, saved = plan.mixer.forward(inputs, x.initial_state, plan.backward)
        if plan.backward:
            self.states.put(out, saved)
        return out, state

    def backward(self, x: MixerBackwardInputs, plan: Prepared) -> tuple[torch.Tensor, ...]:
        saved, inputs = self.states.get(x.out), x.inputs.by_token.with_decays(plan.decays)
        grads = plan.mixer.backward(inputs, saved, x.dout, x.dstate)
        return x.inputs.gradients(MixerInputs(*grads))

    def _plan(self, problem: Problem) -> Plan:
        return Plan(self.form, problem.softmax_scale, self._chunk)


def make_mixer(plan: Plan, mask: AttnMask, kernel: str = "torch") -> Mixer:
    """The mixer of a mask that is causal in each document, or full."""
    documents = mask.causal_documents
    if documents is None:
        assert mask.kind == "full", "other masks are refused before"
        return Mixer(plan, whole=True)
    return Mixer(plan, documents[1:], kernel=kernel)


def _declare(form: forms.Form) -> OperatorInfo:
    compiled = form.gate != "diagonal" and not form.lagging
    return OperatorInfo(
        name=form.name,
        summary=form.summary,
        source=form.source,
        load=functools.partial(MixerOperator, form.name),
        masks=("causal", "causal_document", *(("full",) if form.name == "linear" else ())),
        value_dims=True,
        external_lse=False,
        mergeable=False,
        lse_on=(),
        params=("chunk", "kernel"),
        variants=("kernel=triton",) if compiled else ("chunk=16",),
        mixer=form.name,
        gates=forms.gates(form),
        initial_states=True,
    )


OPERATORS = tuple(_declare(form) for form in forms.FORMS.values())
