"""TransformerEngine: ``DotProductAttention`` with a context-parallel group.

It computes with cuDNN's fused attention, so the operator must be torch's call of the same kernel.
It assigns tokens as layout zigzag does, for any mask.

Written from its documentation and source; untested, as it needs CUDA.

Source: ``transformer_engine.pytorch.DotProductAttention`` of TransformerEngine 2.20,
https://github.com/NVIDIA/TransformerEngine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.core.registry import StrategyInfo
from cpbench.strategies.libraries.call import LibraryStrategy, common_refusal

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="transformer_engine",
    summary="TransformerEngine's DotProductAttention with cuDNN's kernel",
    source="https://github.com/NVIDIA/TransformerEngine",
    load="cpbench.strategies.libraries.transformer_engine:TransformerEngine",
    layouts=("zigzag",),
    params=("comm",),
    traced=False,
    requires=("transformer_engine",),
)
COMM_TYPES = ("p2p", "all_gather", "a2a")
KERNEL = "sdpa.cudnn"
BACKEND_VARIABLES = {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}


@dataclass(frozen=True)
class Plan:
    """The options of a call; ``pairs``: visible pairs of this rank, over all query heads."""

    problem: Problem
    causal: bool
    backward: bool
    pairs: int


class TransformerEngine(LibraryStrategy):
    """The strategy.

    Args:
        comm: how keys are sent: P2P in a ring, by all-gather, or by all-to-all for heads.
    """

    name = "transformer_engine"

    def __init__(self, comm: str = "p2p") -> None:
        super().__init__()
        if comm not in COMM_TYPES:
            raise ValueError(f"{self.name}: comm = {comm!r} is not one of {', '.join(COMM_TYPES)}")
        self.comm = comm
        self._layers: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        problem = world.problem
        if self.comm == "a2a" and (problem.heads_q % world.size or problem.heads_kv % world.size):
            return (
                f"{self.name}: comm = a2a needs query and key/value heads divisible by the "
                f"{world.size} ranks: {problem.heads_q} and {problem.heads_kv}"
            )
        return common_refusal(self.name, world)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        if op.device.partition(":")[0] != "cuda":
            raise Unsupported(f"{self.name} runs on cuda, not on {op.device}")
        if op.info.name != KERNEL:
            raise Unsupported(
                f"{self.name} computes with cuDNN's own kernel: use operator {KERNEL}, "
                f"not {op.info.name}"
            )
        problem = world.problem
        pairs = int(world.areas[rank].sum()) * problem.heads_q
        if self.comm == "a2a":  # a subset of heads of all tokens
            pairs = world.shared_mask.area * problem.heads_q // world.size
        return Plan(problem, world.mask.kind == "causal", problem.backward, pairs)

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        op.pairs += plan.pairs
        return _environment(BACKEND_VARIABLES)

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
        if group not in self._layers:
            self._layers[group] = self._layer(plan, group)
        return self._layers[group](q, k, v).view_as(q), None

    def _layer(self, plan: Plan, group: Any) -> Any:
        import torch
        import torch.distributed as dist

        problem = plan.problem
        layer = importlib.import_module("transformer_engine.pytorch").DotProductAttention(
            problem.heads_q,
            problem.head_dim,
            num_gqa_groups=problem.heads_kv,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal" if plan.causal else "no_mask",
            softmax_scale=problem.softmax_scale,
        )
        ranks = dist.get_process_group_ranks(group)
        layer.set_context_parallel_group(group, ranks, torch.cuda.Stream(), self.comm)
        return layer


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
