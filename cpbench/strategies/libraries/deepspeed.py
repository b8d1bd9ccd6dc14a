"""DeepSpeed-Ulysses: ``DistributedAttention`` around the operator under test, so with any mask.

It sends q, k, v and the output in an all-to-all each, one after another.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), ``deepspeed.sequence.layer`` of DeepSpeed 0.19.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.libraries.call import Library

if TYPE_CHECKING:
    import torch

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
    """The library's module class."""
    with redirect_stdout(sys.stderr):  # it logs what accelerator it found
        return importlib.import_module("deepspeed.sequence.layer").DistributedAttention


@functools.cache
def communicate(backend: str) -> None:
    """DeepSpeed's own communication layer, once a process, over torch's."""
    comm = importlib.import_module("deepspeed.comm")
    transport: Any = importlib.import_module("deepspeed.comm.torch")
    # It would compile an all-reduce over shared memory, which takes a minute and is not used here.
    build, transport.build_shm_op = transport.build_shm_op, lambda: None
    try:
        with redirect_stdout(sys.stderr):
            comm.init_distributed(backend, dist_init_required=False, verbose=False)
    finally:
        transport.build_shm_op = build


@dataclass(frozen=True)
class Plan:
    """The operator, its plan for all tokens and some heads, and whether gradients are asked for."""

    plan: Any
    backward: bool


class Ulysses(Library):
    """The strategy."""

    name = "deepspeed.ulysses"

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        problem = world.problem
        for heads, what in ((problem.heads_q, "query"), (problem.heads_kv, "key/value")):
            if heads % world.size:
                return f"{self.name}: the {world.size} ranks must divide the {heads} {what} heads"
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        library()
        problem, size = world.problem, world.size
        whole = world.merged(
            (tuple(range(size)),), problem.heads_q // size, problem.heads_kv // size
        )
        return Plan(op.prepare(whole.part([0], [0])), problem.backward)

    def within(self, plan: Plan, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        import torch.distributed as dist

        communicate(dist.get_backend(group))
        return nullcontext()

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if group not in self._layers:
            self._layers[group] = library()(
                _attention().apply, group, scatter_idx=HEAD_AXIS, gather_idx=TOKEN_AXIS
            )
        return self._layers[group](q, k, v, BATCH_AXIS, None, op, plan.plan), None


@functools.cache
def _attention() -> Any:
    """The operator as an ``autograd.Function``: the local attention that the library asks for."""
    import torch

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            op: BoundOperator,
            plan: Any,
        ) -> torch.Tensor:
            out, lse = op.forward(q, k, v, plan)
            ctx.kept, ctx.op, ctx.plan = (q, k, v, out, lse), op, plan
            return out.view_as(out)

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> Any:
            grads = ctx.op.backward(dout.contiguous(), *ctx.kept, ctx.plan)
            return *grads, None, None

    return Attend
