"""Sequence mixers as strategies of several ranks receive them, and their traces.

Strategies work on runs of consecutive tokens.  A run changes the state by an affine map,
``S -> transition S + state``, its summary; the outputs of a run are ``out(0) + R S``, and the
gradient of the state that it starts from is ``transition^T dS + C``, where C needs no states.

Legend: B batch, L local tokens, S tokens of a run, H heads, K and V dimensions of keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cpbench.parallel.tracing.trace import RankTrace, TraceComm, take_phase

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

    # Of a mixer's q, k, v, g and beta, each ``[B, S, H, …]`` or None: a named tuple.
    Inputs = Any
    Mixed = tuple[torch.Tensor, torch.Tensor, Any]  # out, state at the end, saved for backward
    # Gradients of the inputs, like them, and of the state at the start
    MixerGradients = tuple[Inputs, torch.Tensor]


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
        runs_refusal: why it does not compute the functions of runs, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def fixed_chunk(self) -> int: ...

    @property
    def from_initial(self) -> bool: ...

    @property
    def runs_refusal(self) -> str | None: ...

    def summarise(self, x: Inputs, resets: tuple[int, ...]) -> tuple[Summary, Any]:
        """The summary of a run, and what :meth:`output` need not compute again."""
        ...

    def empty_summary(self, x: Inputs) -> Summary:
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
        x: Inputs,
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
        x: Inputs,
        resets: tuple[int, ...],
        state: torch.Tensor,
        saved: Any,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Add to a result of :meth:`output` from 0, and to what it saved, what the state at the
        start changes; returns what it adds to the state at the end."""
        ...

    def summarise_back(
        self, x: Inputs, resets: tuple[int, ...], dout: torch.Tensor, saved: Any
    ) -> torch.Tensor:
        """C, ``[B, H, K, V]``."""
        ...

    def backward(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        saved: Any,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> MixerGradients:
        """All gradients of a run; ``dstate`` is that of the state at the end, None for 0."""
        ...

    def mix(
        self,
        x: Inputs,
        documents: tuple[int, ...] | None,
        state: torch.Tensor | None,
        keep: bool,
    ) -> Mixed:
        """Compute whole sequences.

        Args:
            documents: first tokens of all documents; None if every token sees all.
            state: of the first document, or of all if ``from_initial``.
        """
        ...

    def mix_backward(
        self,
        x: Inputs,
        documents: tuple[int, ...] | None,
        saved: Any,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> MixerGradients:
        """The gradients of :meth:`mix`."""
        ...


class MixerStrategy(Protocol):
    """The methods of a strategy that distributes mixers."""

    def unsupported(self, world: World) -> str | None:
        """See :meth:`cpbench.parallel.strategy.Strategy.unsupported`."""
        ...

    def prepare(self, mixer: BoundMixer, world: World, rank: int) -> Any:
        """Make the immutable plan of one rank, without communication.

        Raises:
            Unsupported: for a mixer that cannot be cut as the layout cuts it.
        """
        ...

    def forward(
        self,
        x: Inputs,
        plan: Any,
        mixer: BoundMixer,
        comm: Comm,
        need_state: bool,
        state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Mix local shards.

        Args:
            x: ``[B, L, H, …]`` each.
            need_state: whether to return the state even if that costs communication.
            state: ``[B, H, K, V]`` before the first token, the same on all ranks; None for 0.

        Returns:
            out ``[B, L, H, V]``, the state after the last token ``[B, H, K, V]`` on every rank or
            None, and what is saved for :meth:`backward`.
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        saved: Any,
        plan: Any,
        mixer: BoundMixer,
        comm: Comm,
        dstate: torch.Tensor | None = None,
    ) -> MixerGradients:
        """The gradients of the local shards, and what the local tokens contribute to that of the
        initial state: its sum over ranks is the gradient.

        Args:
            dstate: of the state as this rank has it, whose sum over ranks is the gradient; None on
                all ranks if nothing depends on it.
        """
        ...


class TracedMixer:
    """A mixer that computes nothing: its results have shapes and dtypes.

    Attributes:
        pairs: 0: of mixers, none are counted.
    """

    pairs = 0

    def __init__(self, mixer: BoundMixer) -> None:
        self._mixer = mixer
        self.name, self.fixed_chunk, self.from_initial = (
            mixer.name,
            mixer.fixed_chunk,
            mixer.from_initial,
        )
        self.runs_refusal = mixer.runs_refusal
        self.empty_summary, self.summary = mixer.empty_summary, mixer.summary

    def summarise(self, x: Inputs, resets: tuple[int, ...]) -> tuple[Summary, Any]:
        return self.empty_summary(x), None

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return later

    def apply(self, transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        return state

    def transpose(self, transition: torch.Tensor) -> torch.Tensor:
        return transition

    def output(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        state: torch.Tensor | None,
        known: Any,
        keep: bool,
    ) -> Mixed:
        return x.v, self.empty_summary(x).state, None

    def respond(
        self, x: Inputs, resets: tuple[int, ...], state: torch.Tensor, saved: Any, out: torch.Tensor
    ) -> torch.Tensor:
        return state

    def summarise_back(
        self, x: Inputs, resets: tuple[int, ...], dout: torch.Tensor, saved: Any
    ) -> torch.Tensor:
        return self.empty_summary(x).state

    def backward(
        self,
        x: Inputs,
        resets: tuple[int, ...],
        saved: Any,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> MixerGradients:
        return x, self.empty_summary(x).state

    def mix(
        self,
        x: Inputs,
        documents: tuple[int, ...] | None,
        state: torch.Tensor | None,
        keep: bool,
    ) -> Mixed:
        return x.v, self.empty_summary(x).state, None

    def mix_backward(
        self,
        x: Inputs,
        documents: tuple[int, ...] | None,
        saved: Any,
        dout: torch.Tensor,
        dstate: torch.Tensor | None,
    ) -> MixerGradients:
        return x, self.empty_summary(x).state


def trace_mixer(
    strategy: MixerStrategy,
    mixer: BoundMixer,
    world: World,
    rank: int,
    x: Inputs,
    need_state: bool,
    log: bool = False,
) -> RankTrace:
    """Trace one rank in the phases of the problem's direction, without gradients of the state.

    Args:
        x: inputs of the local tokens, on the device ``"meta"``.
        need_state: whether the forward pass returns the state.
        log: whether to log every message.
    """
    traced, comm = TracedMixer(mixer), TraceComm(rank, world.size, log)
    plan = strategy.prepare(traced, world, rank)
    out, _, saved = strategy.forward(x, plan, traced, comm, need_state)
    phases = {"fwd": take_phase(traced, comm)}
    if world.problem.backward:
        strategy.backward(out, saved, plan, traced, comm)
        phases["bwd"] = take_phase(traced, comm)
    return RankTrace(phases, comm.checksum, comm.parts, comm.log or [])
