"""The public functions, and the only ``autograd.Function`` of the project.

Shapes: q ``[B, S, H, D]``; k, v ``[B, T, G, D]``, ``H % G == 0``; out like q; lse ``[B, H, S]``
float32, natural logarithm, -inf for queries that see nothing (whose output is 0).
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cpbench import __version__
from cpbench.core.operator import QKV, Unsupported, declared_refusal
from cpbench.core.problem import Problem
from cpbench.core.registry import OperatorInfo, implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import Mask, per_head
from cpbench.parallel import layout as layouts
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import Comm, Control, TorchComm
from cpbench.parallel.strategy import declared_refusal as strategy_refusal
from cpbench.parallel.trace import MODULUS, RankTrace, describe_mismatch, trace_rank
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.operator import Gradients
    from cpbench.parallel.strategy import Forward, Strategy


class Attention:
    """One rank's prepared computation: an operator under a strategy in a world of ranks.

    Args:
        operator, strategy: specs, as objects or text.
        world: the global computation.
        rank: this rank.
        device: ``"cpu"``, ``"cuda"`` (the current one) or ``"cuda:1"``.

    Raises:
        Unsupported: with the reason, before anything is computed or sent.
        ValueError: for unknown names or parameters.
    """

    def __init__(
        self, operator: Spec | str, strategy: Spec | str, world: World, rank: int, device: str
    ) -> None:
        strategy_spec, operator_spec = Spec.parse(strategy), Spec.parse(operator)
        self.info, op_info = strategy_info(strategy_spec.name), operator_info(operator_spec.name)
        device_type = device.partition(":")[0]
        reason = declared_refusal(op_info, world.problem, device_type)
        reason = reason or strategy_refusal(self.info, world)
        if reason is None and op_info.selects and self.info.name != "single":
            reason = (
                f"{op_info.name} selects from whole sequences: it runs on 1 rank, under the "
                "strategy single"
            )
        if reason is None and self.info.merges and world.size > 1:
            reason = _merge_refusal(op_info, self.info.name, world.problem, device_type)
        if reason is not None:
            raise Unsupported(reason)
        self.op = BoundOperator.load(operator_spec, device)
        self.strategy: Strategy = implementation(self.info, strategy_spec.kwargs)
        self.world, self.rank = world, rank
        self.mask, self.layout, self.problem = world.mask, world.keys, world.problem
        reason = self.strategy.unsupported(world)
        if reason is not None:
            raise Unsupported(reason)
        self._specs = f"{operator_spec} {strategy_spec}"
        start = time.perf_counter()
        self.plan = self.strategy.prepare(self.op, world, rank)
        self.plan_us = (time.perf_counter() - start) * 1e6

    @functools.cached_property
    def fingerprint(self) -> tuple[str, int]:
        """What ranks compare before anything is sent: a text, the same on all ranks, and a checksum
        of their messages, whose sum over ranks is 0 (see ``cpbench.parallel.trace``)."""
        world = self.world
        nodes = f"{world.ranks_per_node} {world.placement}"
        layout_names = f"{world.queries.name} {world.keys.name} x{world.size} {nodes}"
        text = f"{__version__} {self._specs} {layout_names} {world.mask.digest} {world.problem}"
        return text, self.trace.checksum if self.trace else 0

    @functools.cached_property
    def trace(self) -> RankTrace | None:
        """The communication and work of this rank; None for strategies of libraries."""
        return self.trace_messages() if self.info.traced else None

    def trace_messages(self, log: bool = False) -> RankTrace:
        """Trace this rank again, with a log of every message if requested."""
        return trace_rank(self.strategy, self.op.info, self.world, self.rank, log)

    def forward(self, qkv: QKV, comm: Comm | None, need_lse: bool = True) -> Forward:
        """Return out, lse (None if the operator returns none) and the values saved for backward."""
        assert comm is not None or self.world.size == 1
        return self.strategy.forward(qkv, self.plan, self.op, comm, need_lse)  # type: ignore[arg-type]

    def backward(self, dout: torch.Tensor, saved: Any, comm: Comm | None) -> Gradients:
        """Return dq, dk, dv of the local shards."""
        return self.strategy.backward(dout, saved, self.plan, self.op, comm)  # type: ignore[arg-type]


def find_disagreement(fingerprints: Sequence[tuple[str, int]]) -> str | None:
    """Compare the :attr:`Attention.fingerprint` of all ranks: what they disagree on, or None."""
    texts = sorted({text for text, _ in fingerprints})
    if len(texts) > 1:
        return f"ranks disagree on the problem: {' vs. '.join(texts)}"
    if sum(checksum for _, checksum in fingerprints) % MODULUS:
        return "ranks disagree on the communication schedule"
    return None


def _merge_refusal(
    operator: OperatorInfo, strategy: str, problem: Problem, device: str
) -> str | None:
    if not operator.mergeable or device not in operator.lse_on:
        return f"{strategy} merges partial results and {operator.name} returns no log-sum-exp"
    if problem.backward and not operator.external_lse:
        return (
            f"{strategy} needs a backward that takes the global lse, which {operator.name} "
            "does not have; use direction fwd or a strategy that does not merge"
        )
    return None


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        work: Attention,
        comm: Comm | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse, ctx.saved = work.forward(QKV(q, k, v), comm)
        ctx.work, ctx.comm = work, comm
        ctx.inputs = [(x, x._version) for x in (q, k, v)]
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out.view_as(out), lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: Any) -> tuple[Any, ...]:
        if any(x._version != version for x, version in ctx.inputs):
            raise RuntimeError("q, k or v was changed in place after attention was computed")
        dq, dk, dv = ctx.work.backward(dout.contiguous(), ctx.saved, ctx.comm)
        return dq, dk, dv, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: Spec | str = "bands",
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention on one device with any registered operator, differentiable in out.

    Args:
        q: ``[B, S, H, D]``; k, v: ``[B, T, G, D]`` with ``H % G == 0``.
        mask: ``[S, T]`` mask, e.g. ``cpbench.masks.build("causal", seq_len=S)``, or one per query
            head, e.g. ``cpbench.masks.build_heads("vertical_slash", S, num_heads=H)``.
        operator: name, with parameters (``"bands"``, ``"sdpa.cpu_flash"``, ``"./mine.py:op"``).
        scale: multiplies the scores; ``D ** -0.5`` unless given.

    Returns:
        out ``[B, S, H, D]`` and lse ``[B, H, S]`` (None from operators that return none).  No
        gradient flows through lse.

    Raises:
        ValueError: if shapes, dtype or mask do not match, or the operator is unknown.
        Unsupported: if the operator does not support the problem or the device.
    """
    if q.ndim != 4 or k.ndim != 4 or (mask.seq_q, mask.seq_k) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} do not fit a mask of {mask.seq_q} queries "
            f"and {mask.seq_k} keys; shapes are [B, S, H, D]"
        )
    problem = _make_problem(q, k, v, q.shape[1], k.shape[1], scale)
    head_masks = per_head(mask)
    if head_masks is not None and head_masks.heads != q.shape[2]:
        raise ValueError(f"masks of {head_masks.heads} heads do not fit {q.shape[2]} query heads")
    work = _prepare_on_one_rank(Spec.parse(operator), mask, problem, str(q.device))
    return _Autograd.apply(q, k, v, work, None)  # type: ignore[no-any-return, no-untyped-call]


def distributed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: AttnMask,
    strategy: Spec | str = "ring",
    layout: Spec | str = "zigzag",
    operator: Spec | str = "bands",
    group: Any = None,
    scale: float | None = None,
    placement: str = "",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Context-parallel attention on local shards, differentiable in out.

    Every rank of ``group`` calls it with the tokens that ``layout`` assigns to it: see
    ``cpbench.layout.build(layout, seq_len, world_size, mask)`` and its ``shard``,
    ``unshard`` and ``positions``.

    Args:
        q: ``[B, L, H, D]``; k, v: ``[B, L, G, D]``; L is the layout's ``local_len``.
        mask: the global mask; if it has fewer queries than keys, the layout assigns both, each by
            its own length.
        strategy, layout, operator: names, with parameters.
        group: a torch.distributed group; the default group unless given.
        scale: multiplies the scores; ``D ** -0.5`` unless given.
        placement: the axis of the strategy's mesh to place inside nodes.

    Returns:
        out ``[B, L, H, D]`` and lse ``[B, H, L]``.  No gradient flows through lse.

    Raises:
        ValueError: if shapes do not match the layout, or a name is unknown.
        Unsupported: with the reason, before anything is sent.
        RuntimeError: if ranks disagree on the problem, at its first call.
    """
    comm, control, ranks_per_node = _communicators(group)
    problem = _make_problem(q, k, v, mask.seq_q, mask.seq_k, scale)
    method = (Spec.parse(operator), Spec.parse(strategy), Spec.parse(layout), placement)
    work = _prepare_on_all_ranks(control, *method, mask, problem, ranks_per_node, str(q.device))
    world = work.world
    for name, tensor, tensor_layout in (
        ("q", q, world.queries),
        ("k", k, world.keys),
        ("v", v, world.keys),
    ):
        if tensor.shape[1] != tensor_layout.local_len:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens; layout {tensor_layout.name} assigns "
                f"{tensor_layout.local_len} of {tensor_layout.seq_len} to each of {comm.size} ranks"
            )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return _Autograd.apply(q, k, v, work, comm)  # type: ignore[no-any-return, no-untyped-call]


@functools.lru_cache(maxsize=64)
def _prepare_on_one_rank(operator: Spec, mask: Mask, problem: Problem, device: str) -> Attention:
    world = World(
        problem,
        mask,
        layouts.build("contiguous", mask.seq_q, 1),
        layouts.build("contiguous", mask.seq_k, 1),
        ranks_per_node=1,
    )
    return Attention(operator, "single", world, 0, device)


@functools.lru_cache(maxsize=64)
def _prepare_on_all_ranks(
    control: Control,
    operator: Spec,
    strategy: Spec,
    layout: Spec,
    placement: str,
    mask: AttnMask,
    problem: Problem,
    ranks_per_node: int,
    device: str,
) -> Attention:
    """Prepare the computation on every rank; all of them raise if one refuses or disagrees."""
    work, refusal = None, ""
    try:
        keys = layouts.build(layout, mask.seq_k, control.size, mask)
        world = World.of(problem, mask, keys, ranks_per_node, placement)
        work = Attention(operator, strategy, world, control.rank, device)
    except ValueError as error:
        refusal = str(error)
    ranks = control.all_gather((refusal, work.fingerprint if work else ("", 0)))
    refusals = [reason for reason, _ in ranks if reason]
    if refusals:
        raise Unsupported(refusals[0])
    assert work is not None
    require_agreement(control, work, [fingerprint for _, fingerprint in ranks])
    return work


def require_agreement(
    control: Control, work: Attention, fingerprints: Sequence[tuple[str, int]]
) -> None:
    """Raise a RuntimeError on every rank if their problems or communication schedules differ.

    Args:
        fingerprints: of all ranks.
    """
    message = find_disagreement(fingerprints)
    if message is None:
        return
    if len({text for text, _ in fingerprints}) == 1:
        logs = control.all_gather(work.trace_messages(log=True).log)
        message += f": {describe_mismatch(logs)}"
    raise RuntimeError(message)


# Ranks compare a problem at its first call only: a rank that has it cached does not take part.
AGREEMENT_TIMEOUT_S = 60.0
_COMMUNICATORS: weakref.WeakKeyDictionary[Any, tuple[TorchComm, Control, int]] = (
    weakref.WeakKeyDictionary()
)


def _communicators(group: Any) -> tuple[TorchComm, Control, int]:
    """The communicators of a process group and its ranks per node, cached; the first call is
    collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: call init_process_group first")
    group = dist.group.WORLD if group is None else group
    if group not in _COMMUNICATORS:
        control = Control(group, AGREEMENT_TIMEOUT_S)
        _COMMUNICATORS[group] = (TorchComm(group), control, control.ranks_per_node())
    return _COMMUNICATORS[group]


def _make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_q: int,
    seq_k: int,
    scale: float | None,
) -> Problem:
    if k.shape != v.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must have the same shape")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head_dim, and the "
            "heads of q must be a multiple of those of k; shapes are [B, S, H, D]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return Problem(
        batch=q.shape[0],
        seq_q=seq_q,
        seq_k=seq_k,
        heads_q=q.shape[2],
        heads_kv=k.shape[2],
        head_dim=q.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        direction="fwd_bwd" if needs_grad else "fwd",
        scale=scale,
    )
