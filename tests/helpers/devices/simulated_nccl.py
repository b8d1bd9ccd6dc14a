"""NCCL's order of execution, simulated: what a strategy issues on every rank, and whether it ends.

Ranks run one after another on tensors without data, over the real ``TorchComm`` with a recorder in
the place of torch.distributed.  Then the rules of NCCL are applied to what they have issued:

- The operations of one communicator run on a stream of each rank, in the order of issue; an
  exchange is one operation, whose messages progress together.
- An operation starts when what the compute stream had to do before its issue is done; ``wait``
  makes the compute stream wait, not the program.
- It ends when all its peers have started: a collective on every member, a message at its other end.
  (Small messages may end earlier, which no program may count on.)
- Messages between two ranks match in the order of issue, by communicator.

While an operation is in flight, nothing may write what it sends, or read or write what it receives;
nor what a copy between host and device reads or writes, but for copies that start after it.
Tensors may be let go: torch keeps them until they have been waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import GroupedComm, Part
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.tracing.trace import empty_inputs, trace_rank
from cpbench.parallel.world import World

METADATA_ONLY = ("empty_like", "new_empty", "zeros_like", "new_zeros", "full_like", "new_full")


@dataclass(eq=False)
class Operation:
    """What one rank has issued on one communicator.

    Attributes:
        group: its communicator: ranks, and the name of a lane.
        name: what all members of a collective must agree on; of an exchange, its content.
        waits: how often the compute stream has waited before the issue.
        messages: of an exchange, (sender, receiver, bytes and content).
        peers: what must have started before this can end.
    """

    rank: int
    group: Part
    name: str
    waits: int
    reads: Sequence[torch.Tensor]
    writes: Sequence[torch.Tensor]
    messages: Sequence[tuple[int, int, str]] = ()
    peers: list[Operation] = field(default_factory=list)

    def __str__(self) -> str:
        lane = f" in lane {self.group[1]}" if self.group[1] else ""
        return f"{self.name} of ranks {', '.join(map(str, self.group[0]))}{lane}"


class Recorder(TorchDispatchMode):
    """One rank: records what it issues and waits for, and finds misused buffers.

    It has the functions of torch.distributed that ``TorchComm`` calls.
    """

    ReduceOp = SimpleNamespace(SUM="sum", MAX="max")
    isend, irecv = "send", "receive"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.content = rank, ""
        self.operations: list[Operation] = []
        self.waited: list[Operation] = []  # by the compute stream, in order
        self.in_flight: list[Operation] = []
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touches_data = not func.is_view and func.overloadpacket.__name__ not in METADATA_ONLY
        if self.in_flight and touches_data:
            arguments = func._schema.arguments
            values = {**dict(zip((one.name for one in arguments), args, strict=False)), **kwargs}
            for one in arguments:
                writes = one.alias_info is not None and one.alias_info.is_write
                self._use(values.get(one.name), writes, str(func))
        return func(*args, **kwargs)

    def _use(self, value: Any, writes: bool, by: str) -> None:
        """A fault if the tensors are in flight in a way that this use spoils."""
        for x in value if isinstance(value, list | tuple) else [value]:
            for operation in self.in_flight if isinstance(x, torch.Tensor) else ():
                spoiled = (*operation.writes, *(operation.reads if writes else ()))
                if any(_overlap(x, buffer) for buffer in spoiled):
                    verb = "writes" if writes else "reads"
                    self._fault(f"{by} {verb} a buffer of {operation}, which is in flight")

    def _fault(self, text: str) -> None:
        self.faults.append(f"rank {self.rank}: {text}")

    def _issue(
        self, group: Part, name: str, reads: Sequence[Any], writes: Sequence[Any], *messages: Any
    ) -> Work:
        for tensors, written in ((reads, False), (writes, True)):
            self._use(tensors, written, name)
        operation = Operation(self.rank, group, name, len(self.waited), reads, writes, messages)
        self.operations.append(operation)
        self.in_flight.append(operation)
        return Work(self, operation)

    def copy(self, out: Any, x: Any, to_device: bool, after: Sequence[Work]) -> Work:
        """A copy between host and device, on a stream for each direction; those after which it
        starts may be in flight."""
        name = f"copy to {'device' if to_device else 'host'}"
        earlier = {work.operation for work in after}
        in_flight = self.in_flight
        self.in_flight = [operation for operation in in_flight if operation not in earlier]
        work = self._issue(((self.rank,), name), name, [x], [out])
        self.in_flight = [*in_flight, work.operation]
        return work

    def start(self, group: Part) -> None:
        """The first operation of a new group, for which its members wait."""
        self._issue(group, "start", (), ()).wait()

    def end_pass(self) -> None:
        """Nothing may be in flight at the end of a forward or backward pass."""
        for operation in self.in_flight:
            self._fault(f"{operation} is never waited for")
        self.in_flight.clear()

    def P2POp(self, kind: str, tensor: torch.Tensor, group: Part, tag: int, group_peer: int) -> Any:
        assert tag == 0, "NCCL has no tags"
        return kind, tensor, group, group[0][group_peer]

    def batch_isend_irecv(self, batch: Sequence[Any]) -> list[Work]:
        (group,) = {group for *_, group, _ in batch}
        messages = [
            (*((self.rank, peer) if kind == "send" else (peer, self.rank)),
             f"{x.nbytes} bytes of {self.content}")
            for kind, x, _, peer in batch
        ]  # fmt: skip
        sent, received = ([x for kind, x, *_ in batch if kind == k] for k in ("send", "receive"))
        return [self._issue(group, f"exchange of {self.content}", sent, received, *messages)]

    def _collective(self, name: str, reads: Any, writes: Any, group: Part) -> Work:
        return self._issue(group, f"{name} of {writes.nbytes} bytes", [reads], [writes])

    def all_to_all_single(self, out: Any, x: Any, group: Part, async_op: bool) -> Work:
        return self._collective("all-to-all", x, out, group)

    def all_gather_into_tensor(self, out: Any, x: Any, group: Part, async_op: bool) -> Work:
        return self._collective("all-gather", x, out, group)

    def reduce_scatter_tensor(self, out: Any, x: Any, group: Part, async_op: bool) -> Work:
        return self._collective("reduce-scatter", x, out, group)

    def all_reduce(self, x: Any, op: str, group: Part, async_op: bool) -> Work:
        return self._collective(f"all-reduce ({op})", x, x, group)


class Work:
    """What torch.distributed returns for an operation."""

    def __init__(self, recorder: Recorder, operation: Operation) -> None:
        self.recorder, self.operation = recorder, operation

    def wait(self) -> None:
        if self.operation in self.recorder.in_flight:
            self.recorder.in_flight.remove(self.operation)
            self.recorder.waited.append(self.operation)


class SimulatedComm(TorchComm):
    """``TorchComm`` as it is on NCCL, over a recorder."""

    def __init__(self, recorder: Recorder, size: int) -> None:
        GroupedComm.__init__(self, recorder.rank, size)
        self._dist, self._serial = recorder, True
        self.group = self._root_group = (tuple(range(size)), "")

    def _own_group(self) -> Part:
        if self.group is None:
            self.group = (tuple(sorted(self._members)), self._lane)
            self._dist.start(self.group)
        return self.group

    def _copy(self, out: Any, x: Any, to_device: bool, after: Any = ()) -> Any:
        return self._dist.copy(out, x, to_device, after)

    def exchange(self, sends: Any, recvs: Any, what: str = "") -> Any:
        self._dist.content = what
        return super().exchange(sends, recvs, what)


class MetaOperator:
    """An operator that reads all that it is given and computes nothing."""

    def unsupported(self, problem: Any, mask: Any, device: str) -> None:
        return None

    def prepare(self, mask: Any, problem: Any, device: str) -> None:
        return None

    def forward(self, qkv: QKV, plan: Any) -> Any:
        out = (qkv.q + (qkv.k.sum() + qkv.v.sum()))[..., :1].repeat(1, 1, 1, qkv.v.shape[3])
        return out, out.float().sum(-1).transpose(1, 2).contiguous()

    def backward(self, x: BackwardInputs, plan: Any) -> Any:
        rest = x.dout.sum() + x.out.sum() + x.lse.sum()
        return x.q + rest, x.k + rest, x.v + rest


def record(size: int, program: Callable[[SimulatedComm, Recorder], Any]) -> list[Recorder]:
    """Run a program on every rank."""
    ranks = [Recorder(rank) for rank in range(size)]
    for recorder in ranks:
        with recorder:
            program(SimulatedComm(recorder, size), recorder)
        recorder.end_pass()
    return ranks


def find_faults(ranks: Sequence[Recorder]) -> list[str]:
    """Descriptions of the faults of what ranks have issued; none if it is right."""
    operations = [operation for recorder in ranks for operation in recorder.operations]
    faults = [fault for recorder in ranks for fault in recorder.faults]
    faults += _match(operations)
    if not faults:
        faults = _run(ranks, lambda operation: operation.group) or _run(ranks, lambda _: None)
    return faults


def record_strategy(strategy: str, world: World) -> list[Recorder] | None:
    """A forward and a backward pass of a strategy; None if it refuses the world."""
    spec = Spec.parse(strategy)
    info = strategy_info(spec.name)
    method = implementation(info, spec.kwargs)
    if declared_refusal(info, world) or method.unsupported(world):
        return None
    op = BoundOperator(operator_info("bands"), MetaOperator(), "meta")  # type: ignore[arg-type]

    def passes(comm: SimulatedComm, recorder: Recorder) -> None:
        plan = method.prepare(op, world, comm.rank)
        qkv, dout = empty_inputs(world)
        comm.connect(trace_rank(method, op.info, world, comm.rank).parts)
        connected = len(recorder.operations)
        _, _, saved = method.forward(qkv, plan, op, comm, need_lse=True)
        recorder.end_pass()
        method.backward(dout, saved, plan, op, comm)
        recorder.end_pass()
        late = [x for x in recorder.operations[connected:] if x.name == "start"]
        recorder.faults += [f"rank {comm.rank}: {x} within a pass" for x in late]

    return record(world.size, passes)


def _match(operations: Iterable[Operation]) -> list[str]:
    """Find the peers of all operations; descriptions of those that have none."""
    ends: dict[Any, list[list[tuple[str, Operation]]]] = {}
    for operation in operations:
        for sender, receiver, content in operation.messages:
            both = ends.setdefault((operation.group, sender, receiver), [[], []])
            both[operation.rank == receiver].append((content, operation))
        if not operation.messages:
            members = operation.group[0]
            of_members = ends.setdefault(operation.group, [[] for _ in members])
            of_members[members.index(operation.rank)].append((operation.name, operation))
    for group, lists in ends.items():
        names = [[name for name, _ in own] for own in lists]
        if any(own != names[0] for own in names):
            return [f"{group}: unmatched: {names}"]
        for matching in zip(*lists, strict=True):
            for _, operation in matching:
                operation.peers += [peer for _, peer in matching if peer is not operation]
    return []


def _run(ranks: Sequence[Recorder], queue_of: Callable[[Operation], Any]) -> list[str]:
    """Let all operations run; a description of the deadlock if they do not all end.

    Args:
        queue_of: what runs one after another on a rank: the operations of a group, or (as NCCL
            advises, for kernels that cannot run side by side) all of them.
    """
    queues: dict[Any, deque[Operation]] = {}
    for recorder in ranks:
        for operation in recorder.operations:
            queues.setdefault((recorder.rank, queue_of(operation)), deque()).append(operation)
    started, ended = set[Operation](), set[Operation]()
    reached = [0 for _ in ranks]  # how many waits of its compute stream are over
    progress = True
    while progress:
        progress = False
        for queue in queues.values():
            while queue:
                head = queue[0]
                waited = ranks[head.rank].waited
                while reached[head.rank] < head.waits and waited[reached[head.rank]] in ended:
                    reached[head.rank] += 1
                if head not in started and reached[head.rank] >= head.waits:
                    started.add(head)
                    progress = True
                if head not in started or any(peer not in started for peer in head.peers):
                    break
                ended.add(queue.popleft())
                progress = True
    stuck = [f"rank {queue[0].rank} at {queue[0]}" for queue in queues.values() if queue]
    return [f"deadlock: {'; '.join(stuck)}"] if stuck else []


def _overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors share memory, each batch taken from its first to its last element."""
    if not x.numel() or not y.numel():
        return False
    return any(
        own == other and start < other_end and other_start < end
        for own, start, end in extents(x)
        for other, other_start, other_end in extents(y)
    )


def extents(x: torch.Tensor) -> list[tuple[int, int, int]]:
    """Of a tensor, or of each of its batches if these are contiguous and it is not."""
    by_batch = not x.is_contiguous() and x.ndim > 1 and x[0].is_contiguous()
    return [_extent(part) for part in x] if by_batch else [_extent(x)]


def _extent(x: torch.Tensor) -> tuple[int, int, int]:
    """The storage of a tensor, and the bytes in it from its first element to its last."""
    start = x.storage_offset()
    last = start + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage()._cdata, start * x.itemsize, (last + 1) * x.itemsize
