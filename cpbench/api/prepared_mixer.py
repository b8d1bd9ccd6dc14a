"""A prepared computation of a mixer: a mixer under a strategy, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench import __version__
from cpbench.core.operator import Unsupported
from cpbench.core.registry import StrategyInfo, implementation
from cpbench.core.spec import Spec
from cpbench.parallel.mixing import trace_mixer
from cpbench.parallel.strategy import declared_refusal
from cpbench.strategies import ulysses_mixers
from cpbench.strategies.scan import strategy as scan

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Transport
    from cpbench.parallel.mixing import BoundMixer, Inputs, MixerGradients, MixerStrategy
    from cpbench.parallel.tracing.trace import RankTrace
    from cpbench.parallel.world import World

STRATEGIES = {info.name: info for info in (scan.INFO, ulysses_mixers.INFO)}


def find_strategy(name: str) -> StrategyInfo:
    """The declaration of a strategy that distributes mixers.

    Raises:
        ValueError: when there is none of that name; the message lists the names.
    """
    if name not in STRATEGIES:
        names = ", ".join(sorted(STRATEGIES))
        raise ValueError(f"no strategy {name!r} distributes mixers; there are: {names}")
    return STRATEGIES[name]


class PreparedMixer:
    """One rank's prepared computation: a mixer under a strategy in a world of ranks.

    Args:
        name: of the mixer with its parameters, and what else ranks must have in common.
        x: inputs of the local tokens, on the device ``"meta"``.

    Raises:
        Unsupported: with the reason, before anything is computed or sent.
        ValueError: for unknown names or parameters.
    """

    def __init__(
        self, name: str, mixer: BoundMixer, strategy: Spec, world: World, rank: int, x: Inputs
    ) -> None:
        info = find_strategy(strategy.name)
        if reason := declared_refusal(info, world):
            raise Unsupported(reason)
        self.strategy: MixerStrategy = implementation(info, strategy.kwargs)
        if reason := self.strategy.unsupported(world):
            raise Unsupported(reason)
        self.mixer, self.world, self.rank, self._local = mixer, world, rank, x
        self.plan = self.strategy.prepare(mixer, world, rank)
        self._trace = self.trace_messages()
        layout = f"{world.keys.name} x{world.size} {world.ranks_per_node}"
        text = f"{__version__} {name} {strategy} {layout} {world.mask.digest} {world.problem}"
        self.fingerprint = (text, self._trace.checksum)

    def trace_messages(self, log: bool = False) -> RankTrace:
        """See :class:`cpbench.api.prepared.Prepared`."""
        args = self.mixer, self.world, self.rank, self._local
        return trace_mixer(self.strategy, *args, need_state=True, log=log)

    def connect(self, comm: Transport) -> None:
        """See :class:`cpbench.api.prepared.Prepared`."""
        comm.connect(self._trace.parts)

    def forward(
        self, x: Inputs, state: torch.Tensor | None, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """Return out and the state, and what is saved for the backward pass."""
        return self.strategy.forward(x, self.plan, self.mixer, comm, True, state)

    def backward(
        self, dout: torch.Tensor, dstate: torch.Tensor | None, saved: Any, comm: Comm
    ) -> MixerGradients:
        """Return the gradients of the inputs and of the initial state."""
        return self.strategy.backward(dout, saved, self.plan, self.mixer, comm, dstate)
