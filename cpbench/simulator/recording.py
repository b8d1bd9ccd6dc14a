"""Recordings of a rank: what its strategy does in order, from its own code on tensors
without data.

Everything but the operator's kernels runs as it would on a GPU: :class:`RecordingOperator` is the
real :class:`~cpbench.parallel.bound_operator.BoundOperator` around an implementation that computes
nothing, and what torch would launch for the strategy is remembered by its tensors (``side_work``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cpbench.core.operator import QKV, state_dtype
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.host_memory.link import contiguous_pairs
from cpbench.parallel.mixing import TracedMixer
from cpbench.parallel.tracing.trace import COLLECTIVES, CountingComm, empty_inputs
from cpbench.simulator.events import Copy, Kernel, Mix, Post, Program, Recorder, SideWork, Wait
from cpbench.simulator.side_work.strided_tensor import recording_side_work, strided
from cpbench.simulator.tiles import Tiling

if TYPE_CHECKING:
    from cpbench.core.operator import (
        BackwardInputs,
        Gradients,
        MixerBackwardInputs,
        MixerInputs,
        OutLse,
    )
    from cpbench.core.problem import Problem
    from cpbench.core.registry import OperatorInfo
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.parallel.comm import Handle, Messages
    from cpbench.parallel.mixing import BoundMixer, Mixed, MixerGradients, Summary
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.traced_operator import Traceable
    from cpbench.parallel.world import Chunk, KeySubset, Subproblem, World


class RecordingComm(CountingComm):
    """A :class:`~cpbench.parallel.tracing.trace.CountingComm` that keeps posts, copies and waits,
    too."""

    def __init__(self, rank: int, size: int, recorder: Recorder) -> None:
        self._recorder = recorder
        self._posts = 0
        self._last_to_host: Handle = CompletedHandle()
        super().__init__(rank, size)

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        super().exchange(sends, recvs, what)
        sent, received = (
            tuple((self._members[peer], x.nbytes) for x, peer in side if peer != self.rank)
            for side in (sends, recvs)
        )
        return self._post("exchange", sent, received)

    def _collective(self, kind: int, nbytes: int, messages: int = 1) -> Handle:
        super()._collective(kind, nbytes, messages)
        peers = [member for member in self._members if member != self._root.rank]
        rows = tuple((peer, nbytes * messages) for peer in peers) if nbytes else ()
        return self._post(COLLECTIVES[kind], rows, rows)

    def _copy(
        self, out: torch.Tensor, x: torch.Tensor, to_device: bool, after: Sequence[Any] = ()
    ) -> Handle:
        if not x.nbytes:
            return CompletedHandle()
        root = self._root
        root._posts += 1
        pieces = sum(1 for _ in contiguous_pairs(out, x))
        before = (one.number for one in after if isinstance(one, _RecordedHandle))
        root._recorder.add(
            Copy(root._posts, to_device, x.nbytes, pieces, tuple(filter(None, before)))
        )
        handle = _RecordedHandle(root._recorder, root._posts)
        if not to_device:
            root._last_to_host = handle
        return handle

    def finish_copies(self) -> None:
        self._root._last_to_host.wait()

    def _post(self, operation: str, sends: Any, receives: Any) -> Handle:
        if not sends and not receives:
            return CompletedHandle()
        root = self._root
        root._posts += 1
        root._recorder.add(Post(root._posts, operation, self._members, self._lane, sends, receives))
        return _RecordedHandle(root._recorder, root._posts)


class _RecordedHandle:
    """Records that its operation is waited for, once.

    Attributes:
        number: of the operation; 0 once it has been waited for.
    """

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self.number = recorder, number

    def wait(self) -> None:
        if self.number:
            self._recorder.add(Wait(self.number))
            self.number = 0


class _Kernels:
    """An operator that records its calls and computes nothing."""

    def __init__(self, recorder: Recorder, tiling: Tiling) -> None:
        self._recorder, self._tiling = recorder, tiling

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> AttnMask:
        return mask

    def forward(self, qkv: QKV, plan: AttnMask) -> OutLse:
        self._record("fwd", qkv, plan)
        b, s, h, _ = qkv.q.shape
        out = qkv.q.new_empty((b, s, h, qkv.v.shape[3]))
        return out, qkv.q.new_empty((b, h, s), dtype=torch.float32)

    def backward(self, x: BackwardInputs, plan: AttnMask) -> Gradients:
        self._record("bwd", x.qkv, plan)
        return x.q.new_empty(x.q.shape), x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)

    def _record(self, phase: str, qkv: QKV, mask: AttnMask) -> None:
        batch, _, heads_q, head_dim = qkv.q.shape
        heads, head_dims = (heads_q, qkv.k.shape[2]), (head_dim, qkv.v.shape[3])
        itemsize = qkv.q.element_size()
        self._recorder.add(
            Kernel.of_mask(phase, mask, self._tiling, batch, heads, head_dims, itemsize)
        )


class RecordingOperator(BoundOperator):
    """A bound operator that records its kernels; partial results are merged as on a GPU."""

    def __init__(self, info: OperatorInfo, recorder: Recorder, tiling: Tiling) -> None:
        super().__init__(info, _Kernels(recorder, tiling), "meta")
        self._recorder = recorder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = strided(super().empty(shape, dtype))
        return tensor

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One kernel that reads every element once and writes the merged ones."""
        merged = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        merged_lse = torch.empty_like(lse)
        tensors = (out, lse, partial, partial_lse, merged, merged_lse)
        self._recorder.add(SideWork(stream=sum(x.nbytes for x in tensors), launches=1))
        return merged, merged_lse


class RecordingMixer(BoundOperator):
    """A mixer that records its steps and computes nothing; what a scan does to states beside, as
    combining two summaries, is side work."""

    def __init__(self, operator: BoundOperator, recorder: Recorder) -> None:
        super().__init__(operator.info, operator.impl, "meta")
        self._recorder = recorder

    def prepare(self, subproblem: Subproblem | KeySubset | Chunk) -> Problem:
        return subproblem.problem

    def bind(self, problem: Problem) -> BoundMixer:
        return _RecordingSteps(super().bind(problem), self._recorder)

    def mix(self, x: MixerInputs, plan: Any) -> OutLse:
        self._record("fwd", plan)
        (b, _, h, k), v = x.q.shape, x.v.shape[3]
        return x.v.new_empty(x.v.shape), x.q.new_empty((b, h, k, v), dtype=state_dtype(x.q))

    def mix_backward(self, x: MixerBackwardInputs, plan: Any) -> Gradients:
        self._record("bwd", plan)
        return tuple(y.new_empty(y.shape) for y in x.inputs.given)

    def _record(self, phase: str, problem: Problem) -> None:
        flops: int = self.impl.flops(problem)[phase]  # type: ignore[attr-defined]
        self._recorder.add(Mix(phase, phase, problem.seq_q, flops))


class _RecordingSteps(TracedMixer):
    """The steps of a scan.

    Args:
        mixer: whose shapes and FLOPs these are.
    """

    def __init__(self, mixer: BoundMixer, recorder: Recorder) -> None:
        super().__init__(mixer)
        self._mixer, self._recorder = mixer, recorder

    def combine(self, later: Summary, earlier: Summary) -> Summary:
        return self._mixer.combine(later, earlier)

    def apply(self, transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        return self._mixer.apply(transition, state)

    def transpose(self, transition: torch.Tensor) -> torch.Tensor:
        return self._mixer.transpose(transition)

    def summarise(self, x: MixerInputs, *run: Any) -> tuple[Summary, Any]:
        self._record("fwd", "summarise", x)
        return super().summarise(x, *run)

    def output(self, x: MixerInputs, *run: Any) -> Mixed:
        self._record("fwd", "output", x)
        return super().output(x, *run)

    def respond(
        self, x: MixerInputs, resets: tuple[int, ...], state: torch.Tensor, *run: Any
    ) -> torch.Tensor:
        self._record("fwd", "respond", x)
        return self.empty_summary(x).state

    def summarise_back(self, x: MixerInputs, *run: Any) -> torch.Tensor:
        self._record("bwd", "summarise_back", x)
        return super().summarise_back(x, *run)

    def backward(self, x: MixerInputs, *run: Any) -> MixerGradients:
        self._record("bwd", "backward", x)
        return super().backward(x, *run)

    def _record(self, phase: str, step: str, x: MixerInputs) -> None:
        self._recorder.add(Mix(phase, step, x.q.shape[1], self.flops(step, x)))


def record_rank(
    strategy: Strategy, operator: Traceable, world: World, rank: int, tiling: Tiling
) -> dict[str, Program]:
    """Record the phases of one rank, ``"fwd"`` and ``"bwd"``; the forward pass is always recorded.

    The log-sum-exp is not requested, as in timed runs.
    """
    recorder = Recorder()
    op: BoundOperator
    if isinstance(operator, BoundOperator):
        op = RecordingMixer(operator, recorder)
    else:
        op = RecordingOperator(operator, recorder, tiling)
    comm = RecordingComm(rank, world.size, recorder)
    plan = strategy.prepare(op, world, rank)
    qkv, dout = empty_inputs(world, op.info.kind)
    if isinstance(qkv, QKV):
        qkv, dout = QKV(*map(strided, qkv)), strided(dout)
    programs = {}
    with recording_side_work(recorder):
        _, _, saved = strategy.forward(qkv, plan, op, comm, need_lse=False)
        programs["fwd"] = recorder.take()
        if world.problem.backward:
            strategy.backward(dout, saved, plan, op, comm)
            programs["bwd"] = recorder.take()
    return programs
