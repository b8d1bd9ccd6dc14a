"""Sequence mixers on runs of consecutive tokens, as a scan receives them.

A run changes the state by an affine map, ``S -> transition S + state``, its summary; its outputs
are ``out(0) + R S``, and the gradient of the state that it starts from is ``transition^T dS + C``,
where C needs no states.

Legend: B batch, L local tokens, S tokens of a run, H heads, K and V dimensions of keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import MixerInputs

    Mixed = tuple[torch.Tensor, torch.Tensor, Any]  # out, state at the end, saved for backward
    # Gradients of the inputs, like them, and of the state at the start
    MixerGradients = tuple[MixerInputs, torch.Tensor]


class Summary(Protocol):
    """What a run does to the state.

    Attributes:
        transition: None for the identity; ``[B, H, 1, 1]`` for one decay, ``[B, H, K, 1]`` for one
            per key dimension, ``[B, H, K, K]`` under the delta rule.
        state: ``[B, H, K, V]``.
    """

    @property
    def transition(self) -> torch.Tensor | None: ...

    @property
    def state(self) -> torch.Tensor: ...


class BoundMixer(Protocol):
    """A mixer with its parameters.

    ``resets`` are the ascending tokens of a run before which a document begins.

    Attributes:
        name: of the mixer.
        fixed_chunk: tokens that read the state before them together, counted from the start of a
            document, in a mixer where that is part of the definition, so that no run may begin
            inside; 0 for others.
        from_initial: whether every document starts from the initial state, and not only the first.
    """

    @property
    def name(self) -> str: ...

    @property
    def fixed_chunk(self) -> int: ...

    @property
    def from_initial(self) -> bool: ...

    def flops(self, step: str, x: MixerInputs) -> int:
        """FLOPs of a step, named as its method, on a run of tokens."""
        ...

    def summarise(self, x: MixerInputs, resets: tuple[int, ...]) -> tuple[Summary, Any]:
        """The summary of a run, and what :meth:`output` need not compute again."""
        ...

    def empty_summary(self, x: MixerInputs) -> Summary:
        """A summary whose values are not set, for inputs like these."""
        ...

    def summary(self, transition: torch.Tensor | None, state: torch.Tensor) -> Summary:
        """The summary of this transition and this state."""
        ...

    def combine(self, later: Any, earlier: Any) -> Summary:
        """The summary of two runs, one after the other."""
        ...

    def apply(self, transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        """The state after a transition."""
        ...

    def transpose(self, transition: torch.Tensor) -> torch.Tensor:
        """The transition of gradients."""
        ...

    def output(
        self,
        x: MixerInputs,
        resets: tuple[int, ...],
        state: torch.Tensor | None,
        known: Any,
        keep: bool,
    ) -> Mixed:
        """Compute a run from a state ``[B, H, K, V]``; None for 0.

        Args:
            known: of :meth:`summarise`, or None.
            keep: whether :meth:`respond` or :meth:`backward` follows.
        """
        ...

    def respond(
        self,
        x: MixerInputs,
        resets: tuple[int, ...],
        state: torch.Tensor,
        saved: Any,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Add to a result of :meth:`output` from 0, and to what it saved, what the state at the
        start changes; returns what it adds to the state at the end."""
        ...

    def summarise_back(
        self, x: MixerInputs, resets: tuple[int, ...], dout: torch.Tensor, saved: Any
    ) -> torch.Tensor:
        """C, ``[B, H, K, V]``."""
        ...

    def backward(
        self,
        x: MixerInputs,
        resets: tuple[int, ...],
        saved: Any,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> MixerGradients:
        """All gradients of a run; ``dstate`` is that of the state at the end, None for 0."""
        ...


class TracedMixer:
    """A mixer that computes nothing: its results have shapes and dtypes.

    Args:
        mixer: whose shapes, chunks and documents these are.
    """

    def __init__(self, mixer: BoundMixer) -> None:
        self.name, self.fixed_chunk, self.from_initial = (
            mixer.name,
            mixer.fixed_chunk,
            mixer.from_initial,
        )
        self.empty_summary, self.summary = mixer.empty_summary, mixer.summary
        self.flops = mixer.flops

    def summarise(self, x: MixerInputs, *run: Any) -> tuple[Summary, Any]:
        return self.empty_summary(x), None

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return later

    def apply(self, transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        return state

    def transpose(self, transition: torch.Tensor) -> torch.Tensor:
        return transition

    def output(self, x: MixerInputs, *run: Any) -> Mixed:
        return x.v.new_empty(x.v.shape), self.empty_summary(x).state, None

    def respond(
        self, x: MixerInputs, resets: tuple[int, ...], state: torch.Tensor, *run: Any
    ) -> torch.Tensor:
        return state

    def summarise_back(self, x: MixerInputs, *run: Any) -> torch.Tensor:
        return self.empty_summary(x).state

    def backward(self, x: MixerInputs, *run: Any) -> MixerGradients:
        return x.map(lambda y: y.new_empty(y.shape)), self.empty_summary(x).state
