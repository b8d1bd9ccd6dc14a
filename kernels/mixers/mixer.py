"""A mixer on one rank: what :func:`cpbench.mix` computes, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.kernels.mixers.backward import Gradients, backward
from cpbench.kernels.mixers.chunks import Inputs, Plan, state_dtype
from cpbench.kernels.mixers.forward import Saved, output
from cpbench.kernels.mixers.recurrence import recur

if TYPE_CHECKING:
    import torch

    # out, the state at the end, and what backward needs; None if none follows.
    Forward = tuple[torch.Tensor, torch.Tensor, Any]


SHORTEST = 16  # tokens that the Triton kernels take: the smallest side of a matrix product


@dataclass(frozen=True)
class Mixer:
    """A mixer over whole sequences.

    Args:
        plan: of one document.
        documents: first tokens of the documents, but for the first one.
        whole: whether every token sees all, before and after it (linear attention alone).
        kernel: what computes: ``"torch"`` or ``"triton"``.
    """

    plan: Plan
    documents: tuple[int, ...] = ()
    whole: bool = False
    kernel: str = "torch"

    def forward(self, x: Inputs, state: torch.Tensor | None, keep: bool) -> Forward:
        """Compute out ``[B, S, H, V]`` and the state of the last document ``[B, H, K, V]``.

        Args:
            state: of the first document, or of every one (the fast weights before any update) if
                the form is lagging; 0 unless given.
            keep: whether a backward pass follows.
        """
        import torch

        if self.whole:
            return _see_all(x, self.plan.scale, state)
        runs = self.runs(x)
        if self._launches(x):
            from cpbench.kernels.mixers.triton import launch

            return launch.output(*runs[0], state)
        results = [output(run, plan, state, keep=keep) for run, plan in runs]
        if len(results) == 1:
            return results[0]
        outs, states, saved = zip(*results, strict=True)
        return torch.cat(outs, 1), states[-1], saved

    def backward(
        self, x: Inputs, saved: Any, dout: torch.Tensor, dstate: torch.Tensor | None
    ) -> Gradients:
        """The gradients of the inputs and of the state that :meth:`forward` was given."""
        import torch

        if self.whole:
            return _see_all_backward(x, self.plan.scale, saved, dout, dstate)
        if isinstance(saved, Saved) and self._launches(x):
            from cpbench.kernels.mixers.triton import launch

            return launch.backward(x, self.runs(x)[0][1], saved, dout, dstate)
        if isinstance(saved, Saved):
            return backward(x, self.runs(x)[0][1], saved, dout, dstate)
        runs, start, parts = self.runs(x), 0, []
        for (run, plan), kept in zip(runs, saved, strict=True):
            stop = start + run.q.shape[1]
            last = dstate if stop == x.q.shape[1] else None
            parts.append(backward(run, plan, kept, dout[:, start:stop], last))
            start = stop
        *grads, states = zip(*parts, strict=True)
        whole = (None if y[0] is None else torch.cat(y, 1) for y in grads)
        return Gradients(*whole, torch.stack(states).sum(0))  # type: ignore[arg-type, call-arg]

    def recur(self, x: Inputs, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, token by token; for inputs that are not finite."""
        import torch

        outs, states = zip(*(recur(run, plan, state) for run, plan in self.runs(x)), strict=True)
        return torch.cat(outs, 1), states[-1]

    def _launches(self, x: Inputs) -> bool:
        return self.kernel == "triton" and x.q.shape[1] >= SHORTEST

    def runs(self, x: Inputs) -> list[tuple[Inputs, Plan]]:
        """What is computed at once: all documents, or one if the form is lagging, for which every
        document begins with a chunk and with the same fast weights."""
        if not (self.plan.form.lagging and self.documents):
            return [(x, replace(self.plan, resets=self.documents))]
        edges = [0, *self.documents, x.q.shape[1]]
        return [(x.tokens(a, b), self.plan) for a, b in itertools.pairwise(edges)]


def retention_decays(heads: int, device: torch.device | str) -> torch.Tensor:
    """``[H]`` float64 log decays of RetNet: log(1 - 2^(-5-h)) (Sun et al. 2023)."""
    import torch

    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device=device, dtype=torch.float64))))


def _see_all(x: Inputs, scale: float, state: torch.Tensor | None) -> Forward:
    """Linear attention without a mask: one state, of all tokens, which all read."""
    q, k, v = _by_head(x)
    total = k.mT @ v
    if state is not None:
        total = total + state.to(total.dtype)
    out = (scale * q) @ total
    return out.transpose(1, 2).to(x.v.dtype), total, total


def _see_all_backward(
    x: Inputs, scale: float, total: torch.Tensor, dout: torch.Tensor, dstate: torch.Tensor | None
) -> Gradients:
    q, k, v = _by_head(x)
    d = scale * dout.transpose(1, 2).to(q.dtype)
    dtotal = q.mT @ d
    if dstate is not None:
        dtotal = dtotal + dstate.to(dtotal.dtype)
    grads = (d @ total.mT, v @ dtotal.mT, k @ dtotal)
    dq, dk, dv = (y.transpose(1, 2).to(like.dtype) for y, like in zip(grads, x[:3], strict=True))
    return Gradients(dq, dk, dv, None, None, dtotal)


def _by_head(x: Inputs) -> tuple[torch.Tensor, ...]:
    """q, k and v as ``[B, H, S, …]`` in the dtype of states."""
    return tuple(y.transpose(1, 2).to(state_dtype(x.q)) for y in (x.q, x.k, x.v))
