"""A prepared computation of a mixer: a mixer under a strategy, on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench import __version__
from cpbench.core.operator import Unsupported
from cpbench.core.registry import StrategyInfo, implementation, strategies_for
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.tracing.trace import trace_rank

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import MixerInputs
    from cpbench.parallel.comm import Comm, Transport
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.tracing.trace import RankTrace
    from cpbench.parallel.world import World


def find_strategy(name: str) -> StrategyInfo:
    """The declaration of a strategy that distributes mixers.

    Raises:
        ValueError: when there is none of that name; the message lists the names.
    """
    known = {key: info for key, info in strategies_for("mixer").items() if key != "single"}
    if name not in known:
        names = ", ".join(known)
        raise ValueError(f"no strategy {name!r} distributes mixers; there are: {names}")
    return known[name]


class PreparedMixer:
    """One rank's prepared computation: a mixer under a strategy in a world of ranks.

    Unlike :class:`cpbench.api.prepared.Attention`, also in float64, with gates of any dtype, and
    with gradients of states.

    Args:
        mixer, strategy: with their parameters.
        world: with the gates that are given.
        device: as for ``Attention``.
        x: inputs of the local tokens, on the device ``"meta"``.

    Raises:
        Unsupported: with the reason, before anything is computed or sent.
        ValueError: for unknown names or parameters.
    """

    def __init__(
        self, mixer: Spec, strategy: Spec, world: World, rank: int, device: str, x: MixerInputs
    ) -> None:
        info = find_strategy(strategy.name)
        if reason := declared_refusal(info, world):
            raise Unsupported(reason)
        self.strategy: Any = implementation(info, strategy.kwargs, "mixer")
        if reason := self.strategy.unsupported(world):
            raise Unsupported(reason)
        self.op = BoundOperator.load(mixer, device)
        self.world, self.rank, self._local = world, rank, x
        self.plan = self.strategy.prepare(self.op, world, rank)
        self._trace = self.trace_messages()
        layout = f"{world.keys.name} x{world.size} {world.ranks_per_node}"
        text = f"{__version__} {mixer} {strategy} {layout} {world.mask.digest} {world.problem}"
        self.fingerprint = (text, self._trace.checksum)

    def trace_messages(self, log: bool = False) -> RankTrace:
        """See :class:`cpbench.api.prepared.Prepared`."""
        inputs = self._local, self._local.v
        return trace_rank(self.strategy, self.op, self.world, self.rank, log, inputs, need_lse=True)

    def connect(self, comm: Transport) -> None:
        """See :class:`cpbench.api.prepared.Prepared`."""
        comm.connect(self._trace.parts)

    def forward(self, x: MixerInputs, comm: Comm) -> Forward:
        """Return out and the state, and what is saved for the backward pass."""
        forward: Forward = self.strategy.forward(x, self.plan, self.op, comm, need_lse=True)
        return forward

    def backward(
        self, dout: torch.Tensor, dstate: torch.Tensor | None, saved: Any, comm: Comm
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of the given inputs, in order."""
        gradients: tuple[torch.Tensor, ...] = self.strategy.backward(
            dout, saved, self.plan, self.op, comm, dstate
        )
        return gradients
