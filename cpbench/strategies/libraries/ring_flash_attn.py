"""ring-flash-attn: its ring, zigzag, stripe and llama3 functions, over the operator under test.

Found by the check in 0.1.8, and left as they are: with float32 inputs the backward pass of ring,
zigzag and stripe is wrong, since ``buffer.to(torch.float32)`` returns the buffer itself, which the
next block overwrites; and ring returns dq in bfloat16 whatever the inputs are.

Source: https://github.com/zhuzilin/ring-flash-attention (package ring-flash-attn, 0.1.8).
"""

from __future__ import annotations

import functools
import importlib
import sys
from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import StrategyInfo
from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.strategies.libraries import flash_attn_stand_in as stand_in
from cpbench.strategies.libraries.blocks import Blocks, Packed
from cpbench.strategies.libraries.call import Library, refusal
from cpbench.strategies.libraries.shims import self_sends

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

SOURCE = "https://github.com/zhuzilin/ring-flash-attention"
MODULES = {
    "ring": "ring_flash_attn",
    "zigzag": "zigzag_ring_flash_attn",
    "stripe": "stripe_flash_attn",
    "llama3": "llama3_flash_attn_varlen",
}


def _info(name: str, summary: str, layout: str, kind: str, **more: Any) -> StrategyInfo:
    return StrategyInfo(
        name=f"ring_flash_attn.{name}",
        summary=f"ring-flash-attn: {summary}",
        source=SOURCE,
        load=f"cpbench.strategies.libraries.ring_flash_attn:{kind}",
        layouts=(layout,),
        merges=True,
        traced=False,
        requires=("ring_flash_attn",),
        **more,
    )


STRATEGY = (
    _info("ring", "a ring, keys and their gradients all the way round", "contiguous", "Ring"),
    _info("zigzag", "a ring balanced for causal masks", "zigzag", "Zigzag"),
    _info("stripe", "Striped Attention", "striped", "Stripe"),
    _info(
        "llama3",
        "keys gathered a few heads at a time; documents",
        "contiguous",
        "Llama3",
        params=("heads_k_stride",),
    ),
)


@functools.cache
def library(name: str) -> ModuleType:
    """The module of one of the library's methods."""
    stubs = {}
    if "ring_flash_attn" not in sys.modules:
        # Its package imports adapters for transformers, under names that transformers has moved.
        adapters = ModuleType("ring_flash_attn.adapters")
        names = ("substitute_hf_flash_attn", "update_ring_flash_attn_params")
        vars(adapters).update(dict.fromkeys(names))
        stubs = {adapters.__name__: adapters}
    with stand_in.importable(stubs):
        return importlib.import_module(f"ring_flash_attn.{MODULES[name]}")


@dataclass(frozen=True)
class Plan:
    """The operator's plans, and whether gradients are asked for."""

    blocks: Blocks
    causal: bool
    backward: bool


class _Blockwise(Library):
    """The three methods that send blocks of keys round a ring."""

    name = ""
    masks: tuple[str, ...] = ("causal",)

    def unsupported(self, world: World) -> str | None:
        return refusal(f"ring_flash_attn.{self.name}", world, self.masks)

    @abstractmethod
    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        """(queries, keys, causal) of the blocks that a rank may compute."""

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        library(self.name)
        blocks, problem = Blocks(world.problem), world.problem
        causal = world.mask.kind == "causal"
        for seq_q, seq_k, cut in self.shapes(world.keys.local_len):
            if cut <= causal:
                blocks.plan(op, seq_q, seq_k, cut, problem.heads_q, problem.heads_kv)
        return Plan(blocks, causal, problem.backward)

    def within(self, plan: Plan, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(stand_in.routed(op, plan.blocks, [library(self.name)]))
        stack.enter_context(self_sends(group))
        return stack

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        function = getattr(library(self.name), f"{MODULES[self.name]}_func")
        out, lse, _ = function(
            q,
            k,
            v,
            softmax_scale=plan.blocks.problem.softmax_scale,
            causal=plan.causal,
            return_attn_probs=True,
            group=group,
        )
        return out, lse


class Ring(_Blockwise):
    name = "ring"
    masks = ("full", "causal")

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        return [(tokens, tokens, False), (tokens, tokens, True)]


class Zigzag(_Blockwise):
    name = "zigzag"

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        half = tokens // 2
        return [(tokens, tokens, True), (tokens, half, False), (half, tokens, False)]


class Stripe(_Blockwise):
    name = "stripe"

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        return [(tokens, tokens, True), (tokens - 1, tokens - 1, True)]


@dataclass(frozen=True)
class PackedPlan:
    """As :class:`Plan`, and how the documents lie between this rank's queries and all keys.

    Attributes:
        lengths: of the documents, cumulated: of the queries and of the keys they see.
        longest: of them, queries and keys.
        keys: of all the gathered ones.
    """

    blocks: Blocks
    backward: bool
    lengths: tuple[torch.Tensor, torch.Tensor]
    longest: tuple[int, int]
    keys: slice


class Llama3(Library):
    """Gathers keys, and so takes documents too; padding is one more of them.

    Args:
        heads_k_stride: key/value heads that are gathered at a time.
    """

    name = "ring_flash_attn.llama3"

    def __init__(self, heads_k_stride: int = 1) -> None:
        super().__init__()
        if heads_k_stride < 1:
            raise ValueError(f"{self.name}: heads_k_stride = {heads_k_stride} must be 1 or more")
        self.stride = heads_k_stride

    def unsupported(self, world: World) -> str | None:
        problem = world.problem
        if documents(world.shared_mask) is None:
            return f"{self.name} takes full and causal masks, of documents too, and no others"
        if problem.batch > 1:
            return f"{self.name} packs its documents into batch 1, not {problem.batch}"
        if problem.heads_kv % self.stride:
            return (
                f"{self.name}: heads_k_stride = {self.stride} must divide num_heads_kv, "
                f"{problem.heads_kv}"
            )
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> PackedPlan:
        import torch

        found = documents(world.shared_mask)
        assert found is not None
        bounds, causal = found
        bounds = np.unique(np.append(bounds, world.keys.padded_len))
        lengths = torch.as_tensor(bounds, dtype=torch.int32, device=op.device)
        q, k, longest_q, longest_k, keys = library("llama3").llama3_flash_attn_prepare_cu_seqlens(
            lengths, causal, rank, world.size
        )
        packed = Packed(tuple(q.tolist()), tuple(k.tolist()), causal)
        blocks, problem = Blocks(world.problem, packed), world.problem
        blocks.plan_packed(op, self.stride * problem.group, self.stride)
        return PackedPlan(blocks, problem.backward, (q, k), (longest_q, longest_k), keys)

    def within(
        self, plan: PackedPlan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        return stand_in.routed(op, plan.blocks, [library("llama3")])

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: PackedPlan,
        op: BoundOperator,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert plan.blocks.packed is not None
        out, lse, _ = library("llama3").llama3_flash_attn_varlen_func(
            *(x.squeeze(0) for x in (q, k, v)),
            *plan.lengths,
            *plan.longest,
            heads_k_stride=self.stride,
            local_k_slice=plan.keys,
            softmax_scale=plan.blocks.problem.softmax_scale,
            causal=plan.blocks.packed.causal,
            return_attn_probs=True,
            group=group,
        )
        return out.unsqueeze(0), lse.unsqueeze(0)


def documents(mask: AttnMask) -> tuple[IntArray, bool] | None:
    """Where the documents of a mask begin and end, and whether they are causal; None for a mask
    that is not one of full or of causal documents."""
    if mask.seq_q != mask.seq_k:
        return None
    bounds = np.append(mask.diagonal_blocks(), mask.seq_q)
    lengths = np.diff(bounds)
    # The mask lies inside its blocks, so it is what has the same area there.
    if mask.area == int((lengths * (lengths + 1) // 2).sum()) and (mask.slices[:, 5] <= 0).all():
        return bounds, True
    return (bounds, False) if mask.area == int((lengths**2).sum()) else None
