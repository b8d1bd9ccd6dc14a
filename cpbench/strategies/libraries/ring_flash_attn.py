"""ring-flash-attn: its ring, zigzag, stripe and llama3 functions, over the operator under test.

Known defects of 0.1.8, detected by the check and not corrected: with float32 inputs the backward
pass of ring, zigzag and stripe is wrong, since ``buffer.to(torch.float32)`` returns the buffer
itself, which the next block overwrites; and ring returns dq in bfloat16 for any input dtype.

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
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray
from cpbench.strategies.libraries import flash_attn_stand_in as stand_in
from cpbench.strategies.libraries.blocks import BlockPlans, PackedDocuments
from cpbench.strategies.libraries.call import LibraryStrategy, common_refusal
from cpbench.strategies.libraries.shims import gloo_self_sends

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

SOURCE = "https://github.com/zhuzilin/ring-flash-attention"
MODULES = {
    "ring": "ring_flash_attn",
    "zigzag": "zigzag_ring_flash_attn",
    "stripe": "stripe_flash_attn",
    "llama3": "llama3_flash_attn_varlen",
}


def _info(name: str, summary: str, layout: str, kind: str, **options: Any) -> StrategyInfo:
    return StrategyInfo(
        name=f"ring_flash_attn.{name}",
        summary=f"ring-flash-attn: {summary}",
        source=SOURCE,
        load=f"cpbench.strategies.libraries.ring_flash_attn:{kind}",
        layouts=(layout,),
        merges=True,
        traced=False,
        requires=("ring_flash_attn",),
        **options,
    )


STRATEGY = (
    _info("ring", "a ring of keys and their gradients, all hops sent", "contiguous", "Ring"),
    _info("zigzag", "a ring balanced for causal masks", "zigzag", "Zigzag"),
    _info("stripe", "Striped Attention", "striped", "Stripe"),
    _info(
        "llama3",
        "all-gather of a few key/value heads at a time; documents",
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
        # The package imports adapters for transformers from names that transformers has moved.
        adapters = ModuleType("ring_flash_attn.adapters")
        names = ("substitute_hf_flash_attn", "update_ring_flash_attn_params")
        vars(adapters).update(dict.fromkeys(names))
        stubs = {adapters.__name__: adapters}
    with stand_in.importable_flash_attn(stubs):
        return importlib.import_module(f"ring_flash_attn.{MODULES[name]}")


@dataclass(frozen=True)
class Plan:
    """The operator's plans, and whether gradients are needed."""

    blocks: BlockPlans
    causal: bool
    backward: bool


class _BlockRing(LibraryStrategy):
    """Base of the three methods that send blocks of keys in a ring."""

    name = ""
    masks: tuple[str, ...] = ("causal",)

    def unsupported(self, world: World) -> str | None:
        return common_refusal(f"ring_flash_attn.{self.name}", world, self.masks)

    @abstractmethod
    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        """The (queries, keys, causal) of all blocks that a rank may compute."""

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        library(self.name)
        blocks, problem = BlockPlans(world.problem), world.problem
        causal = world.mask.kind == "causal"
        for seq_q, seq_k, causal_block in self.shapes(world.keys.local_len):
            if causal_block <= causal:
                blocks.plan(op, seq_q, seq_k, causal_block, problem.heads_q, problem.heads_kv)
        return Plan(blocks, causal, problem.backward)

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(stand_in.route_flash_attn(op, plan.blocks, [library(self.name)]))
        stack.enter_context(gloo_self_sends(group))
        return stack

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
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


class Ring(_BlockRing):
    name = "ring"
    masks = ("full", "causal")

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        return [(tokens, tokens, False), (tokens, tokens, True)]


class Zigzag(_BlockRing):
    name = "zigzag"

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        half = tokens // 2
        return [(tokens, tokens, True), (tokens, half, False), (half, tokens, False)]


class Stripe(_BlockRing):
    name = "stripe"

    def shapes(self, tokens: int) -> list[tuple[int, int, bool]]:
        return [(tokens, tokens, True), (tokens - 1, tokens - 1, True)]


@dataclass(frozen=True)
class PackedPlan:
    """The operator's plans and the documents between local queries and all keys.

    Attributes:
        lengths: cumulative lengths of the documents, of queries and of the keys that they see.
        longest: longest queries and keys of a document.
        keys: slice of the gathered keys that this rank sees.
    """

    blocks: BlockPlans
    backward: bool
    lengths: tuple[torch.Tensor, torch.Tensor]
    longest: tuple[int, int]
    keys: slice


class Llama3(LibraryStrategy):
    """All-gathers keys, and therefore takes documents; padding is one more document.

    Args:
        heads_k_stride: key/value heads gathered at a time.
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
            return f"{self.name} takes full and causal masks, also of documents, and no others"
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

        document_bounds = documents(world.shared_mask)
        assert document_bounds is not None
        bounds, causal = document_bounds
        bounds = np.unique(np.append(bounds, world.keys.padded_len))
        lengths = torch.as_tensor(bounds, dtype=torch.int32, device=op.device)
        q, k, longest_q, longest_k, keys = library("llama3").llama3_flash_attn_prepare_cu_seqlens(
            lengths, causal, rank, world.size
        )
        packed = PackedDocuments(tuple(q.tolist()), tuple(k.tolist()), causal)
        blocks, problem = BlockPlans(world.problem, packed), world.problem
        blocks.plan_packed(op, self.stride * problem.group, self.stride)
        return PackedPlan(blocks, problem.backward, (q, k), (longest_q, longest_k), keys)

    def pass_context(
        self, plan: PackedPlan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        return stand_in.route_flash_attn(op, plan.blocks, [library("llama3")])

    def call(self, qkv: QKV, plan: PackedPlan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
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
    """The cumulative lengths of the documents of a mask, and whether they are causal; None for a
    mask that does not consist of full or of causal documents."""
    if mask.seq_q != mask.seq_k:
        return None
    bounds = np.append(mask.diagonal_blocks(), mask.seq_q)
    lengths = np.diff(bounds)
    # The mask lies inside its diagonal blocks, so equal area means equality.
    if mask.area == int((lengths * (lengths + 1) // 2).sum()) and (mask.slices[:, 5] <= 0).all():
        return bounds, True
    return (bounds, False) if mask.area == int((lengths**2).sum()) else None
