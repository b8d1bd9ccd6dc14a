"""Traffic as torch.distributed passes it to a process group, whoever calls it.

Not a strategy.  :class:`~cpbench.parallel.comm_torch.TorchComm` counts what passes through it;
libraries, and strategies that do not keep to it, call torch.distributed themselves.  Every
communication call (``isend``, ``all_to_all_single``, functional collectives, …) passes through the
dispatcher as an operator of ``c10d``, where the messages of a pass are recorded.  This takes time:
it is done in the first pass of each phase of a library, and in an untimed pass of every strategy.

Attribution is that of :mod:`cpbench.parallel.comm`; a broadcast or scatter is sent from its root to
every other rank, a reduce or gather by every rank to the root.

Source: the operators that ``torch.distributed.tensor.debug.CommDebugMode`` counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Traffic

SENDING = (
    "send", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
    "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
    "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "alltoall_", "alltoall_base_",
    "broadcast_", "scatter_", "reduce_", "gather_",
)  # fmt: skip


class Message(NamedTuple):
    """``num_messages`` messages of ``nbytes`` each to one rank."""

    receiver: int
    nbytes: int
    num_messages: int


class TrafficRecorder:
    """Records the messages of a library on one rank, in the first pass of each phase."""

    def __init__(self) -> None:
        self._messages: dict[str, list[Message]] = {}

    def run(self, phase: str, traffic: Traffic, group: Any, function: Callable[[], Any]) -> Any:
        """Call ``function`` and add the messages that it sends to ``traffic``.

        Args:
            phase: name of the phase, whose passes all send the same messages.
            group: the process group whose ranks index ``traffic``.
        """
        if phase in self._messages:
            result = function()
        else:
            result, self._messages[phase] = record_messages(group, function)
        for message in self._messages[phase]:
            traffic.add(*message)
        return result


def record_messages(group: Any, function: Callable[[], Any]) -> tuple[Any, list[Message]]:
    """Call ``function``; return its result and the messages that this rank sends to others.

    The operators get a kernel in front of the real one, under a dispatch key through which every
    call passes and which ``c10d`` does not use: what is computed meanwhile, and on which thread,
    makes no difference.

    Args:
        group: the process group that numbers the receivers; all of them must be members.
    """
    import torch
    import torch.distributed as dist

    number = {rank: i for i, rank in enumerate(dist.get_process_group_ranks(group))}
    messages: list[Message] = []
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def record(operator: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
        names = (argument.name for argument in operator._schema.arguments)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        process_group = arguments["process_group"]
        if not isinstance(process_group, dist.ProcessGroup):
            process_group = dist.ProcessGroup.unbox(process_group)
        ranks = list(dist.get_process_group_ranks(process_group))
        own_index = ranks.index(dist.get_rank())
        for member, nbytes, num_messages in _sent_messages(
            operator._opname, arguments, len(ranks), own_index
        ):
            if nbytes and member != own_index:
                messages.append(Message(number[ranks[member]], nbytes, num_messages))
        return operator.redispatch(keys & below, *args, **kwargs)

    library = torch.library.Library("c10d", "IMPL")
    try:
        for name in SENDING:
            operator = getattr(torch.ops.c10d, name).default
            kernel = functools.partial(record, operator)
            library.impl(name, kernel, "BackendSelect", with_keyset=True)
        return function(), messages
    finally:
        library._destroy()


def _sent_messages(
    name: str, arguments: dict[str, Any], size: int, own_index: int
) -> Iterator[tuple[int, int, int]]:
    """(member of the group, bytes, number) of the messages of one operator, to itself included."""
    members = range(size)
    if name == "send":
        for x in _flat_tensors(arguments, "tensors"):
            yield arguments["dst"], x.nbytes, 1
    elif "allgather" in name:
        for x in _flat_tensors(arguments, "input_tensors", "input_list", "inputs", "input_tensor"):
            yield from ((member, x.nbytes, 1) for member in members)
    elif name == "alltoall_":
        for member, x in enumerate(arguments["input_tensors"]):
            yield member, x.nbytes, 1
    elif name == "alltoall_base_":
        x = arguments["input"]
        row = x.nbytes // max(x.shape[0], 1)
        rows = list(arguments["input_split_sizes"]) or [x.shape[0] // size] * size
        yield from ((member, n * row, 1) for member, n in enumerate(rows))
    elif "reduce_scatter" in name:
        for x in _flat_tensors(arguments, "input_tensors", "inputs", "input_tensor"):
            yield from ((member, x.nbytes // size, 1) for member in members)
    elif "allreduce" in name:
        for x in _flat_tensors(arguments, "tensors"):
            yield from ((member, -(-x.nbytes // size), 2) for member in members)
    elif name in ("reduce_", "gather_"):
        for x in _flat_tensors(arguments, "input_tensors", "tensors"):
            yield arguments["root_rank"], x.nbytes, 1
    elif arguments["root_rank"] == own_index:  # broadcast_, scatter_
        tensors = _flat_tensors(arguments, "input_tensors", "tensors")
        for index, x in enumerate(tensors):
            to = members if name == "broadcast_" else (index % size,)
            yield from ((member, x.nbytes, 1) for member in to)


def _flat_tensors(arguments: dict[str, Any], *names: str) -> list[torch.Tensor]:
    """The tensors of the first argument among ``names`` that is present; nested lists flattened."""
    remaining = [next(arguments[name] for name in names if name in arguments)]
    tensors = []
    while remaining:
        item = remaining.pop(0)
        if isinstance(item, list | tuple):
            remaining = [*item, *remaining]
        else:
            tensors.append(item)
    return tensors
