"""MagiAttention: any mask, keys sent only where somebody needs them.

It computes with a kernel of its own (flex-flash-attention, out of FlashAttention-3), which no
operator here is; operator ``sdpa.flash`` is asked for as the nearest relative, and not called.  Its
dispatcher, which would deal chunks of tokens to ranks by their work, is told to deal them in order,
since here tokens are where the layout puts them: its balancing is not measured.

Written from its documentation and source; no machine of the tests can run it (it needs Hopper).

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
from cpbench.strategies.libraries.call import Library, refusal

if TYPE_CHECKING:
    import torch

    from cpbench.masks.attn_mask import IntArray
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="magi_attention",
    summary="MagiAttention over its own kernel, tokens in order; keys go where they are needed",
    source="MagiAttention, arXiv 2505.13211",
    load="cpbench.strategies.libraries.magi_attention:Magi",
    layouts=("contiguous",),
    params=("chunk_size",),
    traced=False,
    requires=("magi_attention",),
)
KERNEL = "sdpa.flash"
TYPES = {FULL: "full", CAUSAL: "causal", INVERSE: "inv_causal", BICAUSAL: "bi_causal"}
CHUNKS_PER_RANK = 8  # at least: the library cuts larger chunks down to that
HOPPER = 9


@dataclass(frozen=True)
class Plan:
    """What the library plans from.

    Attributes:
        chunk: tokens of a chunk.
        positions: of this rank's tokens.
        pairs: visible ones of this rank, for all query heads.
    """

    problem: Problem
    slices: TypedSlices
    chunk: int
    positions: IntArray
    backward: bool
    pairs: int


class Magi(Library):
    """The strategy.

    Args:
        chunk_size: most tokens of a chunk, the unit of its planning.
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
        return refusal(self.name, world, ("full", "causal", "bands"))

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        import torch

        if op.device.partition(":")[0] != "cuda":
            raise Unsupported(f"{self.name} runs on cuda, not on {op.device}")
        if op.info.name != KERNEL:
            raise Unsupported(
                f"{self.name} computes with its own kernel: use operator {KERNEL}, its nearest "
                f"relative, not {op.info.name}"
            )
        if torch.cuda.get_device_capability()[0] < HOPPER:
            raise Unsupported(f"{self.name}'s kernel needs a Hopper device or a later one")
        problem, tokens = world.problem, world.keys.local_len
        most = min(self.chunk_size, max(tokens // CHUNKS_PER_RANK, 1))
        return Plan(
            problem=problem,
            slices=to_typed_slices(world.shared_mask),
            chunk=largest_divisor(tokens, most),
            positions=world.queries.positions(rank),
            backward=problem.backward,
            pairs=int(world.areas[rank].sum()) * problem.heads_q,
        )

    def within(self, plan: Plan, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        op.pairs += plan.pairs
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
        """The library's plan, under the name it goes by; collective over the group."""
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
        dealt = api.get_position_ids(key).cpu().numpy()
        if not np.array_equal(dealt, plan.positions):
            raise RuntimeError(f"{self.name} deals tokens otherwise than layout contiguous")
        return key
