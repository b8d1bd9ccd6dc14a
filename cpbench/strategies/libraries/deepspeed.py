"""DeepSpeed-Ulysses: ``DistributedAttention`` around the operator under test, with any mask.

It sends q, k, v and the output in one all-to-all each, sequentially.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), ``deepspeed.sequence.layer`` of DeepSpeed 0.19.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.registry import StrategyInfo
from cpbench.strategies.libraries.call import LibraryStrategy

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="deepspeed.ulysses",
    summary="DeepSpeed's DistributedAttention: all-to-all to head shards and back",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.libraries.deepspeed:Ulysses",
    traced=False,
    requires=("deepspeed",),
)
BATCH_AXIS, TOKEN_AXIS, HEAD_AXIS = 0, 1, 2


@functools.cache
def library() -> Any:
    """The library's attention module class."""
    with redirect_stdout(sys.stderr):  # it logs the detected accelerator
        return importlib.import_module("deepspeed.sequence.layer").DistributedAttention


@functools.cache
def init_deepspeed_comm(backend: str) -> None:
    """Initialise DeepSpeed's communication layer over torch.distributed, once per process."""
    comm = importlib.import_module("deepspeed.comm")
    transport: Any = importlib.import_module("deepspeed.comm.torch")
    # Skip compiling an all-reduce over shared memory, which takes a minute and is not used here.
    build, transport.build_shm_op = transport.build_shm_op, lambda: None
    try:
        with redirect_stdout(sys.stderr):
            comm.init_distributed(backend, dist_init_required=False, verbose=False)
    finally:
        transport.build_shm_op = build


@dataclass(frozen=True)
class Plan:
    """The operator's plan for all tokens of the local heads, and whether gradients are needed."""

    plan: Any
    backward: bool


class Ulysses(LibraryStrategy):
    """The strategy."""

    name = "deepspeed.ulysses"

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        problem = world.problem
        for heads, kind in ((problem.heads_q, "query"), (problem.heads_kv, "key/value")):
            if heads % world.size:
                return f"{self.name}: the {world.size} ranks must divide the {heads} {kind} heads"
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        library()
        problem, size = world.problem, world.size
        merged = world.merged(
            (tuple(range(size)),), problem.heads_q // size, problem.heads_kv // size
        )
        return Plan(op.prepare(merged.subproblem([0], [0])), problem.backward)

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        import torch.distributed as dist

        init_deepspeed_comm(dist.get_backend(group))
        return nullcontext()

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
        if group not in self._layers:
            self._layers[group] = library()(
                _attention_function().apply, group, scatter_idx=HEAD_AXIS, gather_idx=TOKEN_AXIS
            )
        return self._layers[group](q, k, v, BATCH_AXIS, None, op, plan.plan), None


@functools.cache
def _attention_function() -> Any:
    """The operator as an ``autograd.Function``, the local attention of the library."""
    import torch

    class OperatorAttention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            op: BoundOperator,
            plan: Any,
        ) -> torch.Tensor:
            out, lse = op.forward(QKV(q, k, v), plan)
            ctx.saved, ctx.op, ctx.plan = (q, k, v, out, lse), op, plan
            return out.view_as(out)

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> Any:
            grads = ctx.op.backward(BackwardInputs(dout.contiguous(), *ctx.saved), ctx.plan)
            return *grads, None, None

    return OperatorAttention
