"""yunchang: USP (Ulysses inside groups of ranks, a ring across them), over the operator under test.

The library's own zigzag assigns chunks to rings and splits them inside Ulysses groups.  Layout
zigzag assigns them to ranks, so with ``ulysses`` above 1 the tokens of a group arrive unordered:
they are sorted before the ring and restored after it, a local copy of q, k, v and out that the
library's own layout does not need.

Its ring is that of ring-flash-attn, with the same known defects in 0.6.4, not corrected: float32
gradients are wrong (a buffer is overwritten), and the basic ring returns dq in bfloat16.

Source: USP (arXiv 2405.07719), https://github.com/feifeibear/long-context-attention (package
yunchang, 0.6.4).
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.libraries import flash_attn_stand_in as stand_in
from cpbench.strategies.libraries.blocks import BlockPlans
from cpbench.strategies.libraries.call import LibraryStrategy, common_refusal, subgroup
from cpbench.strategies.libraries.shims import gloo_self_sends

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="yunchang.usp",
    summary="yunchang: Ulysses inside groups of ranks, a ring across them",
    source="USP, arXiv 2405.07719; https://github.com/feifeibear/long-context-attention",
    load="cpbench.strategies.libraries.yunchang:Usp",
    layouts=("contiguous", "zigzag"),
    merges=True,
    params=("ulysses",),
    traced=False,
    requires=("yunchang",),
)
RING_TYPES = {"contiguous": "basic", "zigzag": "zigzag"}


@functools.cache
def library() -> ModuleType:
    """The library, imported."""
    with stand_in.importable_flash_attn(), redirect_stdout(sys.stderr):  # it prints at import
        return importlib.import_module("yunchang")


@dataclass(frozen=True)
class Plan:
    """The groups and the ring of one rank.

    Attributes:
        ulysses, ring: ranks of the groups.
        kind: ring type, as named by the library.
        order: permutation that sorts the tokens of the Ulysses group, and its inverse; None if they
            are sorted.
    """

    blocks: BlockPlans
    causal: bool
    backward: bool
    ulysses: tuple[int, ...]
    ring: tuple[int, ...]
    kind: str
    order: tuple[torch.Tensor, torch.Tensor] | None


class Usp(LibraryStrategy):
    """The strategy.

    Args:
        ulysses: ranks that exchange heads; 0 for as many of a node's as the heads allow.
    """

    name = "yunchang.usp"

    def __init__(self, ulysses: int = 0) -> None:
        super().__init__()
        if ulysses < 0:
            raise ValueError(
                f"{self.name}: ulysses = {ulysses} must be a number of ranks, or 0 to choose"
            )
        self.ulysses = ulysses
        self._layers: dict[Any, Any] = {}

    def _ulysses_size(self, world: World) -> int:
        """Ranks that exchange heads."""
        if self.ulysses:
            return self.ulysses
        problem = world.problem
        sizes = range(min(world.size, world.ranks_per_node), 0, -1)
        counts = (world.size, problem.heads_q, problem.heads_kv)
        return next(n for n in sizes if not any(count % n for count in counts))

    def unsupported(self, world: World) -> str | None:
        problem, size = world.problem, self._ulysses_size(world)
        for count, kind in (
            (world.size, "ranks"),
            (problem.heads_q, "query heads"),
            (problem.heads_kv, "key/value heads (it replicates none)"),
        ):
            if count % size:
                return f"{self.name}: ulysses = {size} must divide the {count} {kind}"
        masks = ("causal",) if world.keys.name == "zigzag" else ("full", "causal")
        return common_refusal(f"{self.name} with layout {world.keys.name}", world, masks)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        import torch

        library()
        size, problem = self._ulysses_size(world), world.problem
        mesh = world.mesh(ring=world.size // size, ulysses=size)
        members = mesh.group(rank, "ulysses")
        positions = np.concatenate([world.keys.positions(member) for member in members])
        order = np.argsort(positions)
        tokens, causal = len(order), world.mask.kind == "causal"
        kind = RING_TYPES[world.keys.name]
        shapes = [(tokens, tokens, True), (tokens, tokens, False)]
        if kind == "zigzag":
            shapes[1:] = [(tokens, tokens // 2, False), (tokens // 2, tokens, False)]
        blocks = BlockPlans(problem)
        for seq_q, seq_k, causal_block in shapes:
            if causal_block <= causal:
                blocks.plan(
                    op,
                    seq_q,
                    seq_k,
                    causal_block,
                    problem.heads_q // size,
                    problem.heads_kv // size,
                )
        permutation = None
        if (order[1:] < order[:-1]).any():
            permutation = (
                torch.as_tensor(order, device=op.device),
                torch.as_tensor(np.argsort(order), device=op.device),
            )
        return Plan(
            blocks, causal, problem.backward, members, mesh.group(rank, "ring"), kind, permutation
        )

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        stack = ExitStack()
        kernels = importlib.import_module("yunchang.kernels.attention")
        stack.enter_context(stand_in.route_flash_attn(op, plan.blocks, [kernels]))
        stack.enter_context(gloo_self_sends(subgroup(group, plan.ring)))
        return stack

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
        if group not in self._layers:
            self._layers[group] = self._layer(plan, group)
        scale = plan.blocks.problem.softmax_scale
        out = self._layers[group](q, k, v, softmax_scale=scale, causal=plan.causal)
        return out, None

    def _layer(self, plan: Plan, group: Any) -> Any:
        """Construct the library's module, which reads its process groups from global variables."""
        groups = library().globals.PROCESS_GROUP
        before = groups.ULYSSES_PG, groups.RING_PG
        groups.ULYSSES_PG, groups.RING_PG = (
            subgroup(group, plan.ulysses),
            subgroup(group, plan.ring),
        )
        try:
            layer = library().LongContextAttention(ring_impl_type=plan.kind)
        finally:
            groups.ULYSSES_PG, groups.RING_PG = before
        if plan.order is not None:
            layer.ring_attn_fn = _with_token_order(layer.ring_attn_fn, *plan.order)
        return layer


def _with_token_order(function: Any, order: torch.Tensor, inverse: torch.Tensor) -> Any:
    """Wrap the library's ring to run on tokens in another order."""

    def ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor = function(*(x.index_select(1, order) for x in (q, k, v)), **options)
        return out.index_select(1, inverse)

    return ring
