"""A mixer on runs of tokens, as a scan receives it (see ``cpbench.parallel.mixing``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cpbench.kernels.mixers import backward as backwards
from cpbench.kernels.mixers import forward as forwards
from cpbench.kernels.mixers.chunks import Inputs, Plan, state_dtype
from cpbench.kernels.mixers.forms import step_flops
from cpbench.kernels.mixers.forward import Saved, Summary

if TYPE_CHECKING:
    import torch

    from cpbench.kernels.mixers.backward import Gradients


@dataclass(frozen=True)
class BoundMixer:
    """A mixer on runs of tokens.

    Args:
        plan: of a run in which no document begins.
    """

    plan: Plan

    summary = staticmethod(Summary)
    combine = staticmethod(forwards.combine)
    apply = staticmethod(forwards.apply)

    @property
    def name(self) -> str:
        return self.plan.form.name

    @property
    def fixed_chunk(self) -> int:
        return self.plan.chunk if self.plan.form.lagging else 0

    @property
    def from_initial(self) -> bool:
        return self.plan.form.lagging

    def flops(self, step: str, x: Inputs) -> int:
        B, S, H, K = x.q.shape
        return B * H * step_flops(self.plan.form, step, S, K, x.v.shape[3])

    def empty_summary(self, x: Inputs) -> Summary:
        B, _, H, K = x.q.shape
        form, dtype = self.plan.form, state_dtype(x.q)
        rows, columns = (K, K) if form.delta else (K if form.gate == "diagonal" else 1, 1)
        transition = None
        if form.delta or form.gate is not None:
            transition = x.q.new_empty((B, H, rows, columns), dtype=dtype)
        return Summary(transition, x.q.new_empty((B, H, K, x.v.shape[3]), dtype=dtype))

    def transpose(self, transition: torch.Tensor) -> torch.Tensor:
        return transition if transition.shape[-1] == 1 else transition.mT

    def summarise(self, x: Inputs, resets: tuple[int, ...]) -> tuple[Summary, torch.Tensor | None]:
        return forwards.summarise(x, self._of_run(resets))

    def output(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        state: torch.Tensor | None,
        known: torch.Tensor | None,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Saved | None]:
        return forwards.output(x, self._of_run(resets), state, inverse=known, keep=keep)

    def respond(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        state: torch.Tensor,
        saved: Saved,
        out: torch.Tensor,
    ) -> torch.Tensor:
        return forwards.respond(x, self._of_run(resets), state, saved, out)

    def summarise_back(
        self, x: Inputs, resets: tuple[int, ...], dout: torch.Tensor, saved: Saved
    ) -> torch.Tensor:
        return backwards.summarise_back(x, self._of_run(resets), dout, inverse=saved.inverse)

    def backward(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        saved: Saved,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> tuple[Inputs, torch.Tensor]:
        return _split(backwards.backward(x, self._of_run(resets), saved, dout, dstate))

    def _of_run(self, resets: tuple[int, ...]) -> Plan:
        return replace(self.plan, resets=resets)


def _split(found: Gradients) -> tuple[Inputs, torch.Tensor]:
    return Inputs(found.q, found.k, found.v, found.g, found.beta), found.state
