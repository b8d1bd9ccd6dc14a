"""One rank, no communication: the operator alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved, SavedMixer

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, MixerInputs
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="single",
    summary="one rank, no communication",
    source="the operator alone",
    load="cpbench.strategies.single:Single",
    layouts=("contiguous",),
    kinds=("attention", "mixer"),
    selectors="any",
    value_dims=True,
    params=("offload", "chunk"),
    variants=("offload=host,chunk=16",),
    offloaded="cpbench.strategies.offload.single:OffloadedSingle",
)


class Single:
    """The strategy."""

    def unsupported(self, world: World) -> str | None:
        if world.size != 1:
            return f"single runs on 1 rank, not on {world.size}"
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        return op.prepare(world.subproblem([0], [0]))

    def forward(
        self, qkv: QKV | MixerInputs, plan: Any, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        if not isinstance(qkv, QKV):
            mixed = SavedMixer.mix(qkv, plan, op)
            return mixed.out, mixed.state, mixed
        out, lse = op.forward(qkv, plan)
        return out, lse, Saved(*qkv, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> Gradients:
        if isinstance(saved, SavedMixer):
            return saved.differentiate(dout, plan, op)
        return op.backward(saved.backward_inputs(dout), plan)
