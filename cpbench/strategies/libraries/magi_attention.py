"""MagiAttention: any mask; keys are sent only to ranks that need them.

It computes with its own kernel (flex-flash-attention, derived from FlashAttention-3), which is not
available as an operator; the operator ``sdpa.flash`` is required as the closest one and not called.
Its dispatcher, which assigns chunks of tokens to ranks by work, is set to sequential order, since
the layout assigns tokens here: its load balancing is not measured.

Written from its documentation and source; untested, as it needs a Hopper GPU.

Source: MagiAttention (arXiv 2505.13211), https://github.com/SandAI-org/MagiAttention, v1.1.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.core.registry import StrategyInfo
from cpbench.masks.convert import BICAUSAL, CAUSAL, FULL, INVERSE, TypedSlices, to_typed_slices
from cpbench.parallel.mesh import largest_divisor
from cpbench.strategies.libraries.call import LibraryStrategy, common_refusal

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, OutLse
    from cpbench.masks.slices import IntArray
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="magi_attention",
    summary="MagiAttention with its own kernel, sequential tokens; keys sent only where needed",
    source="MagiAttention, arXiv 2505.13211",
    load="cpbench.strategies.libraries.magi_attention:Magi",
    layouts=("contiguous",),
    params=("chunk_size",),
    traced=False,
    requires=("magi_attention",),
)
KERNEL = "sdpa.flash"
TYPES = {FULL: "full", CAUSAL: "causal", INVERSE: "inv_causal", BICAUSAL: "bi_causal"}
CHUNKS_PER_RANK = 8  # at least: the library reduces larger chunks
HOPPER = 9  # major compute capability


@dataclass(frozen=True)
class Plan:
    """The inputs of the library's plan.

    Attributes:
        chunk: tokens per chunk.
        positions: global positions of the local tokens.
        pairs: visible pairs of this rank, over all query heads.
    """

    problem: Problem
    slices: TypedSlices
    chunk: int
    positions: IntArray
    backward: bool
    pairs: int


class Magi(LibraryStrategy):
    """The strategy.

    Args:
        chunk_size: maximum tokens per chunk, the unit of its planning.
    """

    name = "magi_attention"

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"{self.name}: chunk_size = {chunk_size} must be 1 or more")
        self.chunk_size = chunk_size
        self._keys: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        if world.problem.batch > 1:
            return f"{self.name} takes batch 1, not {world.problem.batch}"
        return common_refusal(self.name, world, ("full", "causal", "bands"))

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        import torch

        if op.device.partition(":")[0] != "cuda":
            raise Unsupported(f"{self.name} runs on cuda, not on {op.device}")
        if op.info.name != KERNEL:
            raise Unsupported(
                f"{self.name} computes with its own kernel: use operator {KERNEL}, the "
                f"closest one, not {op.info.name}"
            )
        if torch.cuda.get_device_capability()[0] < HOPPER:
            raise Unsupported(f"the kernel of {self.name} needs a Hopper GPU or newer")
        problem, tokens = world.problem, world.keys.local_len
        max_chunk = min(self.chunk_size, max(tokens // CHUNKS_PER_RANK, 1))
        return Plan(
            problem=problem,
            slices=to_typed_slices(world.shared_mask),
            chunk=largest_divisor(tokens, max_chunk),
            positions=world.queries.positions(rank),
            backward=problem.backward,
            pairs=int(world.areas[rank].sum()) * problem.heads_q,
        )

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        op.pairs += plan.pairs
        return nullcontext()

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
        api = importlib.import_module("magi_attention.api")
        if group not in self._keys:
            self._keys[group] = self._key(plan, group)
        out, meta = api.calc_attn(
            *(x.squeeze(0) for x in (q, k, v)),
            self._keys[group],
            softmax_scale=plan.problem.softmax_scale,
        )
        return out.unsqueeze(0), meta.lse.transpose(0, 1).unsqueeze(0)

    def _key(self, plan: Plan, group: Any) -> Any:
        """The key of the library's plan; collective over the group."""
        api = importlib.import_module("magi_attention.api")
        problem, rows = plan.problem, plan.slices.ranges.tolist()
        key = api.magi_attn_flex_key(
            q_ranges=api.AttnRanges.from_ranges([row[:2] for row in rows]),
            k_ranges=api.AttnRanges.from_ranges([row[2:] for row in rows]),
            attn_mask_type=[TYPES[code] for code in plan.slices.types.tolist()],
            total_seqlen_q=problem.seq_q,
            total_seqlen_k=problem.seq_k,
            num_heads_q=problem.heads_q,
            num_heads_kv=problem.heads_kv,
            head_dim=problem.head_dim,
            pad_size=0,
            cp_group_or_mesh=group,
            dist_attn_config=api.DistAttnConfig(
                dispatch_config=api.DispatchConfig(
                    chunk_size=plan.chunk, alg=api.SequentialDispatchAlg()
                )
            ),
        )
        positions = api.get_position_ids(key).cpu().numpy()
        if not np.array_equal(positions, plan.positions):
            raise RuntimeError(f"{self.name} does not assign tokens as layout contiguous does")
        return key
