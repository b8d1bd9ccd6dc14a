"""The group-cast of keys and values, and its dual, the group-reduce of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.strategies.common.collectives import to_token_major
from cpbench.strategies.common.return_results import ResultExchange

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm
    from cpbench.strategies.dispatch.stages import Messages, Plan, Runs, Stage

    Tensors = Sequence[torch.Tensor]


def group_cast(
    plan: Plan, k: torch.Tensor, v: torch.Tensor, comm: Comm
) -> Iterator[tuple[Stage, torch.Tensor, torch.Tensor]]:
    """Iterate over stages with their keys and values, ``[B, tokens, G, …]``, first the local ones.

    Meanwhile the keys of the next stage are in transfer, and those of the one after it on their way
    to relays.
    """
    stages = plan.stages
    inside = comm.lane("node") if plan.by_node else comm
    local = [to_token_major(x) for x in (k, v)] if len(stages) > 1 else []
    buffers: dict[int, list[torch.Tensor]] = {}

    def buffer(number: int) -> list[torch.Tensor]:
        if number not in buffers:
            buffers[number] = kv_buffers(k, v, stages[number].tokens, k.dtype)
        return buffers[number]

    current = (k, v)
    for number, stage in enumerate(stages):
        handles = []
        if number + 1 < len(stages):
            following = stages[number + 1]
            received = buffer(number + 1)
            sends, recvs = _exchanged(following.direct, local, received)
            relay_sends, relay_recvs = _exchanged(following.relayed, received, received)
            handles.append(inside.exchange(sends + relay_sends, recvs + relay_recvs, "keys"))
        if plan.by_node and number + 2 < len(stages):
            across = stages[number + 2].across
            received = buffer(number + 2) if across.receives else []
            handles.append(comm.exchange(*_exchanged(across, local, received), "keys"))
        yield stage, *current
        for handle in handles:
            handle.wait()
        if number + 1 < len(stages):
            keys, values = (
                x.narrow(0, following.passing, following.tokens - following.passing)
                for x in buffers.pop(number + 1)
            )
            current = (keys.transpose(0, 1), values.transpose(0, 1))


class GroupReduce:
    """Returns gradients of received keys to their owners, stage by stage.

    A relay first sums those of its node in float32.

    Args:
        send_dtype: in which gradients are sent.
    """

    def __init__(self, plan: Plan, send_dtype: torch.dtype, comm: Comm) -> None:
        self._send_dtype = send_dtype
        self._inside = ResultExchange(comm, "node results" if plan.by_node else "results")
        self._across = ResultExchange(comm, "results") if plan.by_node else None
        self._relay: tuple[Messages, Tensors] | None = None  # of the last stage

    def start(self, sums: Tensors) -> None:
        """Add what is returned to the gradients of the local keys, ``[B, L, G, …]`` float32."""
        self._templates, self._sums = sums, [x.transpose(0, 1) for x in sums]

    def add(self, stage: Stage, gradients: Tensors) -> None:
        """Return the gradients of one stage, ``[B, tokens, G, …]``; none if it has no keys."""
        import torch

        gradients = [to_token_major(x) for x in gradients]
        needed = stage.tokens_across - stage.passing
        at_relay = [x.narrow(0, 0, needed).float() for x in gradients]
        if stage.passing:
            k, v = self._templates
            zeros = [x.zero_() for x in kv_buffers(k, v, stage.passing, torch.float32)]
            at_relay = (
                [torch.cat(x) for x in zip(zeros, at_relay, strict=True)] if needed else zeros
            )
        for messages, sums in ((stage.direct, self._sums), (stage.relayed, at_relay)):
            self._return(self._inside, messages, gradients, stage.passing, sums)
        self._pass_on()
        self._inside.post()
        self._relay = stage.across, at_relay

    def finish(self) -> None:
        """Wait until all gradients have arrived."""
        self._pass_on()
        if self._across is not None:
            self._across.wait()

    def _pass_on(self) -> None:
        """Complete the sums of the previous stage at relays, and send them to the owners."""
        self._inside.wait()
        if self._across is not None and self._relay is not None:
            messages, at_relay = self._relay
            self._return(self._across, messages, at_relay, 0, self._sums)
            self._across.post()

    def _return(
        self,
        exchange: ResultExchange,
        messages: Messages,
        gradients: Tensors,
        skipped: int,
        sums: Tensors,
    ) -> None:
        """Return gradients the way that keys came, to be added to ``sums`` there.

        Args:
            gradients: of the keys in the buffer, without the first ``skipped``, ``[tokens, B, …]``
                like ``sums``.
        """
        for sender, first, n in messages.receives:
            parts = [x.narrow(0, first - skipped, n) for x in gradients]
            exchange.send([x.to(self._send_dtype) for x in parts], sender)
        for receiver, runs in messages.sends:
            k, v = self._templates
            buffers = kv_buffers(k, v, sum(n for _, n in runs), self._send_dtype)
            exchange.receive(buffers, receiver, _gradient_adder(sums, runs))


def kv_buffers(
    k: torch.Tensor, v: torch.Tensor, tokens: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Make buffers ``[tokens, B, G, …]`` for keys and values like these."""
    return [x.new_empty((tokens, len(x), *x.shape[2:]), dtype=dtype) for x in (k, v)]


def _exchanged(
    messages: Messages, source: Tensors, received: Tensors
) -> tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]:
    """The sends and receives of messages, of token-major keys and values."""
    sends = [(_select_runs(x, runs), peer) for peer, runs in messages.sends for x in source]
    recvs = [
        (x.narrow(0, first, n), peer) for peer, first, n in messages.receives for x in received
    ]
    return sends, recvs


def _select_runs(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Select runs of tokens of ``[L, …]``; a copy unless it is one run."""
    import torch

    if len(runs) == 1:
        return x.narrow(0, *runs[0])
    return torch.cat([x.narrow(0, start, n) for start, n in runs])


def _gradient_adder(sums: Tensors, runs: Runs) -> Any:
    """A function that adds returned dK and dV, ``[tokens, B, G, …]``, to ``[L, B, G, …]`` each."""

    def add(*gradients: torch.Tensor) -> None:
        for local_sum, gradient in zip(sums, gradients, strict=True):
            offset = 0
            for start, n in runs:
                local_sum.narrow(0, start, n).add_(gradient.narrow(0, offset, n))
                offset += n

    return add
