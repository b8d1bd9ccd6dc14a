"""Selector `nsa`: gated sum of attention to compressed keys, to selected blocks and to a window.

Source: Native Sparse Attention, arXiv 2502.11089: means of ``compress`` keys every ``stride`` are
attended to as a branch of their own; their probabilities, summed over a group of query heads and
distributed over the blocks that they overlap, select the blocks.  The paper learns compression and
gates; here keys are averaged and gates are constants, so the output error says little, but the
attention recall of its blocks and window is meaningful.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.patterns import WIDE, causal, sliding_window_causal
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.block_budget import block_budget
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import (
    check_minimum,
    first_blocks,
    qk_scores,
    row_chunks,
    top_blocks_in_chunks,
    upcast,
)
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="nsa",
        summary="compressed keys, top-k blocks per query shared by a group of heads, and a window",
        source="Native Sparse Attention, arXiv 2502.11089",
        load="cpbench.selectors.nsa:Nsa",
        masks=("causal",),
        params=(
            "block_size",
            "top_k",
            "compress",
            "stride",
            "window",
            "gate_compressed",
            "gate_chosen",
            "gate_window",
            "kernel",
        ),
        external_lse=False,
        mergeable=False,
        lse_on=(),
        variants=("block_size=16,top_k=4,compress=8,stride=4,window=24",),
        selects=True,
        selects_from="keys",
        selects_for="group",
    ),
)
DEFAULT_GATE = 1 / 3


class Nsa(Selector):
    """Blocks per query, of which the first one and the last two are forced, and counted.

    Args:
        block_size: keys per selected block.
        top_k: blocks per query.
        compress: keys per mean.
        stride: tokens from one mean to the next; divides ``compress`` and ``block_size``.
        window: keys in the window, including the query's own.
        gate_compressed, gate_chosen, gate_window: factors of compressed, selected and window
            attention.
        kernel: see :class:`Selector`.
    """

    name = "nsa"
    branch_kinds = ("rows", "mask")

    def __init__(
        self,
        block_size: int = 64,
        top_k: int = 16,
        compress: int = 32,
        stride: int = 16,
        window: int = 512,
        gate_compressed: float = DEFAULT_GATE,
        gate_chosen: float = DEFAULT_GATE,
        gate_window: float = DEFAULT_GATE,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, block_size=block_size, compress=compress, stride=stride)
        check_minimum(self.name, 1, window=window)
        check_minimum(self.name, 3, top_k=top_k)
        if block_size % stride or compress % stride:
            raise ValueError(
                f"nsa: stride = {stride} must divide block_size = {block_size} and "
                f"compress = {compress}"
            )
        self.block_size, self.top_k, self.window = block_size, top_k, window
        self.pool = Pool(compress, stride)
        self.gates = float(gate_compressed), float(gate_chosen), float(gate_window)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        n, pool = plan.mask.seq_k, self.pool
        grid = plan.grid(1, self.block_size)
        gate_compressed, gate_blocks, gate_window = self.gates
        window = sliding_window_causal(n, window=self.window - 1) if self.window < n else causal(n)
        branches = [
            Branch(mask=Blocks(grid, self._select_blocks(q, k, plan)), gate=gate_blocks),
            Branch(mask=plan.of_queries(window), gate=gate_window),
        ]
        if pool.num_windows(n):
            mask = plan.of_queries(past_window_mask(n, pool))
            branches.append(Branch(mask=mask, gate=gate_compressed, pool_k=pool))
        return tuple(branches)

    def _select_blocks(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The selected blocks ``[B, H, S, Y]``, equal for the query heads of a key/value head."""
        import torch

        groups, group_size = k.shape[2], plan.problem.group
        grid = plan.grid(1, self.block_size)
        num_blocks = grid.areas.shape[1]
        means = upcast(self.pool.mean(k))
        past = (plan.positions + 1 - self.pool.size) // self.pool.stride + 1
        past = past.clip(0, means.shape[1])  # windows of each query
        past_of = torch.as_tensor(past, device=q.device)[:, None]

        def score_rows(begin: int, end: int) -> torch.Tensor:
            mass = means.new_zeros((len(q), groups, end - begin, num_blocks))
            row_size = len(q) * q.shape[2] * int(past[end - 1])
            for a, b in row_chunks(end - begin, row_size, q.device):
                rows = slice(begin + a, begin + b)
                least, most = int(past[rows.start]), int(past[rows.stop - 1])
                if not most:
                    continue
                scores = qk_scores(upcast(q[:, rows]) * plan.problem.softmax_scale, means[:, :most])
                hidden = torch.arange(least, most, device=q.device) >= past_of[rows]
                scores[..., least:].masked_fill_(hidden, -torch.inf)
                probs = torch.softmax(scores, -1)
                if not least:
                    probs.nan_to_num_(0.0)
                group_probs = probs.unflatten(1, (groups, group_size)).sum(2)
                of_blocks = mass_by_block(group_probs, self.pool, self.block_size)
                mass[:, :, a:b, : of_blocks.shape[-1]] = of_blocks
            return mass

        previous = torch.nn.functional.pad(grid.diagonal, (0, 1))[:, 1:]
        forced = first_blocks(grid) | grid.diagonal | previous
        counts = block_budget(grid, self.top_k, 0.0)
        kept = top_blocks_in_chunks(score_rows, (len(q), groups), counts, grid, forced)
        return kept.repeat_interleave(group_size, 1)


def mass_by_block(mass_of_windows: torch.Tensor, pool: Pool, block: int) -> torch.Tensor:
    """Sums over blocks of tokens ``[…, Y]`` of values of windows ``[…, n]``, each times its overlap
    with the block, in strides."""
    n, strides_per_window = mass_of_windows.shape[-1], pool.size // pool.stride
    num_blocks = -(-(n + strides_per_window - 1) * pool.stride // block)
    shape = (*mass_of_windows.shape[:-1], num_blocks, block // pool.stride)
    by_stride = mass_of_windows.new_zeros(shape)
    flat = by_stride.flatten(-2)
    for shift in range(strides_per_window):
        flat[..., shift : shift + n] += mass_of_windows
    return by_stride.sum(-1)


def past_window_mask(tokens: int, pool: Pool) -> AttnMask:
    """Mask of queries by windows: each query sees the windows that end at or before it.  It has
    steps of ``stride`` queries."""
    count = pool.num_windows(tokens)
    window = np.arange(count)
    begin = window * pool.stride + pool.size - 1
    end = np.minimum(begin + pool.stride, tokens)
    end[-1] = tokens
    wide = np.full(count, WIDE)
    rows = np.column_stack([begin, end, np.zeros(count, np.int64), window + 1, -wide, wide])
    return AttnMask.from_slices(tokens, count, rows)
