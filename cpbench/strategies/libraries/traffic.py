"""What a library sends, counted where torch.distributed hands it to a process group.

Not a strategy.  Libraries call torch.distributed themselves, so
:class:`~cpbench.parallel.comm.TorchComm` does not see their traffic.  Every way of sending
(``isend``, ``all_to_all_single``, functional collectives, …) passes through the dispatcher as an
operator of ``c10d`` or ``_c10d_functional``: there the first pass of each phase is listened to.
Later passes of the same phase are credited with the same messages, so that timed ones are not
slowed by listening.

Attribution is that of :mod:`cpbench.parallel.comm`; a broadcast goes from its root to every other
rank.

Source: the operators that ``torch.distributed.tensor.debug.CommDebugMode`` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Traffic

NAMESPACES = ("c10d", "_c10d_functional")
SILENT = ("recv_", "recv_any_source_", "irecv", "barrier", "monitored_barrier_")


class Message(NamedTuple):
    """``times`` messages of ``nbytes`` each to one rank."""

    receiver: int
    nbytes: int
    times: int


class Listener:
    """What a library sends in each of its phases on one rank, learnt in the first pass of each."""

    def __init__(self) -> None:
        self._heard: dict[str, list[Message]] = {}

    def run(self, phase: str, traffic: Traffic, group: Any, function: Callable[[], Any]) -> Any:
        """Call ``function`` and add what it sends to ``traffic``.

        Args:
            phase: passes of one name send the same.
            group: the process group in which ``traffic`` numbers its receivers.
        """
        if phase in self._heard:
            result = function()
        else:
            result, self._heard[phase] = listen(group, function)
        for message in self._heard[phase]:
            traffic.add(*message)
        return result


def listen(group: Any, function: Callable[[], Any]) -> tuple[Any, list[Message]]:
    """What ``function`` returns, and what this rank sends to others meanwhile.

    Args:
        group: receivers are numbered in it; whoever is sent to must be a member.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.utils import _python_dispatch

    number = {rank: i for i, rank in enumerate(dist.get_process_group_ranks(group))}
    heard: list[Message] = []
    mode: Any = _python_dispatch.TorchDispatchMode

    class Ear(mode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # DTensor takes it apart, and the parts are heard
            kwargs = kwargs or {}
            if func.namespace in NAMESPACES and func._opname not in SILENT:
                names = (argument.name for argument in func._schema.arguments)
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                ranks = _ranks(given)
                if not ranks:  # a wait, or some wrapping
                    return func(*args, **kwargs)
                me = ranks.index(dist.get_rank())
                for member, nbytes, times in _sent(func._opname, given, len(ranks), me):
                    if nbytes and member != me:
                        heard.append(Message(number[ranks[member]], nbytes, times))
            return func(*args, **kwargs)

    with Ear():
        return function(), heard


def _ranks(given: dict[str, Any]) -> list[int]:
    """The global ranks of the group in which an operator runs; none where it has no group."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    group = given.get("process_group", given.get("group_name"))
    if group is None:
        return []
    if isinstance(group, str):
        group = vars(distributed_c10d)["_resolve_process_group"](group)
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    return list(dist.get_process_group_ranks(group))


def _sent(name: str, given: dict[str, Any], size: int, me: int) -> Iterator[tuple[int, int, int]]:
    """(member of the group, bytes, times) of what one operator sends, to itself included.

    Raises:
        NotImplementedError: for an operator that is not known here, rather than count too little.
    """
    everyone = range(size)
    if name in ("send", "isend"):
        for x in _tensors(given, "tensors", "tensor"):
            yield given["dst"], x.nbytes, 1
    elif "allgather" in name or "all_gather" in name:
        for x in _tensors(given, "input_tensors", "input_list", "inputs", "input_tensor", "input"):
            yield from ((member, x.nbytes, 1) for member in everyone)
    elif name == "alltoall_":
        for member, x in enumerate(given["input_tensors"]):
            yield member, x.nbytes, 1
    elif name in ("alltoall_base_", "all_to_all_single"):
        x = given["input"]
        row = x.nbytes // max(x.shape[0], 1)
        rows = list(given["input_split_sizes"]) or [x.shape[0] // size] * size
        yield from ((member, n * row, 1) for member, n in enumerate(rows))
    elif "reduce_scatter" in name:
        for x in _tensors(given, "input_tensors", "inputs", "input_tensor", "input"):
            yield from ((member, x.nbytes // size, 1) for member in everyone)
    elif "allreduce" in name or "all_reduce" in name:
        for x in _tensors(given, "tensors", "inputs", "input"):
            yield from ((member, -(-x.nbytes // size), 2) for member in everyone)
    elif name == "broadcast_":
        for x in _tensors(given, "tensors") if given["root_rank"] == me else ():
            yield from ((member, x.nbytes, 1) for member in everyone)
    else:
        raise NotImplementedError(f"nobody counts yet what a library sends with {name}")


def _tensors(given: dict[str, Any], *names: str) -> list[torch.Tensor]:
    """The tensors under the first of some names that is there, lists in lists laid flat."""
    todo = [next(given[name] for name in names if name in given)]
    found = []
    while todo:
        one = todo.pop(0)
        if isinstance(one, list | tuple):
            todo = [*one, *todo]
        else:
            found.append(one)
    return found
