"""Traffic of libraries, recorded where torch.distributed passes it to a process group.

Not a strategy.  Libraries call torch.distributed themselves, so
:class:`~cpbench.parallel.comm.TorchComm` does not see their traffic.  Every communication call
(``isend``, ``all_to_all_single``, functional collectives, …) passes through the dispatcher as an
operator of ``c10d`` or ``_c10d_functional``, where the first pass of each phase is recorded.
Later passes of the phase are counted with the same messages, so recording does not slow down timed
passes.

Attribution is that of :mod:`cpbench.parallel.comm`; a broadcast is sent from its root to every
other rank.

Source: the operators that ``torch.distributed.tensor.debug.CommDebugMode`` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Traffic

NAMESPACES = ("c10d", "_c10d_functional")
NOT_SENDING = ("recv_", "recv_any_source_", "irecv", "barrier", "monitored_barrier_")


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

    Args:
        group: the process group that numbers the receivers; all of them must be members.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.utils import _python_dispatch

    number = {rank: i for i, rank in enumerate(dist.get_process_group_ranks(group))}
    messages: list[Message] = []
    mode: Any = _python_dispatch.TorchDispatchMode

    class RecordingMode(mode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # DTensor dispatches its local operators, which are recorded
            kwargs = kwargs or {}
            if func.namespace in NAMESPACES and func._opname not in NOT_SENDING:
                names = (argument.name for argument in func._schema.arguments)
                arguments = {**dict(zip(names, args, strict=False)), **kwargs}
                ranks = _group_ranks(arguments)
                if not ranks:  # a wait or a wrapper
                    return func(*args, **kwargs)
                own_index = ranks.index(dist.get_rank())
                for member, nbytes, num_messages in _sent_messages(
                    func._opname, arguments, len(ranks), own_index
                ):
                    if nbytes and member != own_index:
                        messages.append(Message(number[ranks[member]], nbytes, num_messages))
            return func(*args, **kwargs)

    with RecordingMode():
        return function(), messages


def _group_ranks(arguments: dict[str, Any]) -> list[int]:
    """The global ranks of the group of an operator; empty if it has no group."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    group = arguments.get("process_group", arguments.get("group_name"))
    if group is None:
        return []
    if isinstance(group, str):
        group = vars(distributed_c10d)["_resolve_process_group"](group)
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    return list(dist.get_process_group_ranks(group))


def _sent_messages(
    name: str, arguments: dict[str, Any], size: int, own_index: int
) -> Iterator[tuple[int, int, int]]:
    """(member of the group, bytes, number) of the messages of one operator, to itself included.

    Raises:
        NotImplementedError: for an unknown operator, whose bytes would not be counted.
    """
    members = range(size)
    if name in ("send", "isend"):
        for x in _flat_tensors(arguments, "tensors", "tensor"):
            yield arguments["dst"], x.nbytes, 1
    elif "allgather" in name or "all_gather" in name:
        for x in _flat_tensors(
            arguments, "input_tensors", "input_list", "inputs", "input_tensor", "input"
        ):
            yield from ((member, x.nbytes, 1) for member in members)
    elif name == "alltoall_":
        for member, x in enumerate(arguments["input_tensors"]):
            yield member, x.nbytes, 1
    elif name in ("alltoall_base_", "all_to_all_single"):
        x = arguments["input"]
        row = x.nbytes // max(x.shape[0], 1)
        rows = list(arguments["input_split_sizes"]) or [x.shape[0] // size] * size
        yield from ((member, n * row, 1) for member, n in enumerate(rows))
    elif "reduce_scatter" in name:
        for x in _flat_tensors(arguments, "input_tensors", "inputs", "input_tensor", "input"):
            yield from ((member, x.nbytes // size, 1) for member in members)
    elif "allreduce" in name or "all_reduce" in name:
        for x in _flat_tensors(arguments, "tensors", "inputs", "input"):
            yield from ((member, -(-x.nbytes // size), 2) for member in members)
    elif name == "broadcast_":
        for x in _flat_tensors(arguments, "tensors") if arguments["root_rank"] == own_index else ():
            yield from ((member, x.nbytes, 1) for member in members)
    else:
        raise NotImplementedError(f"the bytes that {name} sends are not counted yet")


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
