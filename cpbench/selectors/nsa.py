"""Selector `nsa`: compressed keys, the blocks that they point to, and a window, added up by gates.

Source: Native Sparse Attention, arXiv 2502.11089: means of ``compress`` keys every ``stride`` are
attended to once for their own sake; the probabilities they get, added up over a group of query
heads and spread over the blocks they overlap, choose the blocks.  The paper learns how to compress
and how to gate; here keys are averaged and gates are constants, so the output error says little,
but the mass that its blocks and window recover says what they are worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.patterns import WIDE, causal, sliding_window_causal
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.pooling import Pool
from cpbench.selectors.common.ranking import (
    at_least,
    counts,
    first,
    products,
    spans,
    top_of_rows,
    working,
)
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="nsa",
        summary="compressed keys, top-n blocks shared by a group of heads, and a window",
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
    ),
)
THIRD = 1 / 3


class Nsa(Selecting):
    """Every query its own blocks; the first and its own two last ones always, and counted.

    Args:
        block_size: keys of a block that is chosen.
        top_k: blocks of each query.
        compress: keys of a mean; ``stride``: tokens from one to the next, which divides both.
        window: keys that the window holds, the query's own among them.
        gate_compressed, gate_chosen, gate_window: what each attention is multiplied by.
        kernel: see :class:`Selecting`.
    """

    name = "nsa"
    forms = ("rows", "mask")

    def __init__(
        self,
        block_size: int = 64,
        top_k: int = 16,
        compress: int = 32,
        stride: int = 16,
        window: int = 512,
        gate_compressed: float = THIRD,
        gate_chosen: float = THIRD,
        gate_window: float = THIRD,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size, compress=compress, stride=stride)
        at_least(self.name, 1, window=window)
        at_least(self.name, 3, top_k=top_k)
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
        cells = plan.cells(1, self.block_size)
        by_compressed, by_blocks, by_window = self.gates
        window = sliding_window_causal(n, window=self.window - 1) if self.window < n else causal(n)
        found = [
            Branch(seen=Blocks(cells, self._kept(q, k, plan)), gate=by_blocks),
            Branch(seen=window, gate=by_window),
        ]
        if pool.count(n):
            seen = past_windows(n, pool)
            found.append(Branch(seen=seen, gate=by_compressed, pool_k=pool))
        return tuple(found)

    def _kept(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> torch.Tensor:
        """``[B, H, S, Y]``, alike for the query heads of a key/value head."""
        import torch

        groups, each = k.shape[2], plan.problem.group
        cells = plan.cells(1, self.block_size)
        means = working(self.pool.mean(k))
        n = means.shape[1]
        share = torch.as_tensor(overlaps(k.shape[1], self.pool, self.block_size), device=q.device)
        share = share.to(means.dtype)
        ends = torch.arange(n, device=q.device) * self.pool.stride + self.pool.size - 1

        def scores(begin: int, end: int) -> torch.Tensor:
            if not n:  # too short for a window
                return means.new_zeros((len(q), groups, end - begin, share.shape[1]))
            parts = []
            for a, b in spans(end - begin, len(q) * q.shape[2] * n, q.device):
                rows = slice(begin + a, begin + b)
                logits = products(working(q[:, rows]), means).mul_(plan.problem.softmax_scale)
                row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                probs = torch.softmax(logits.masked_fill_(ends > row, -torch.inf), -1)
                parts.append(probs.nan_to_num_(0.0).unflatten(1, (groups, each)).sum(2) @ share)
            return torch.cat(parts, 2)

        local = cells.own | torch.nn.functional.pad(cells.own, (0, 1))[:, 1:]  # and the one before
        wanted = counts(cells.visible, self.top_k, 0.0)
        always = first(cells) | local
        kept = top_of_rows(scores, (len(q), groups), wanted, cells, always)
        return kept.repeat_interleave(each, 1)


def overlaps(tokens: int, pool: Pool, block: int) -> np.typing.NDArray[np.float64]:
    """``[windows, Y]``: how much of each block each window covers, in strides."""
    begin = np.arange(pool.count(tokens))[:, None] * pool.stride
    block_begin = np.arange(0, tokens, block)
    shared = np.minimum(begin + pool.size, block_begin + block) - np.maximum(begin, block_begin)
    found: np.typing.NDArray[np.float64] = np.maximum(shared, 0) / pool.stride
    return found


def past_windows(tokens: int, pool: Pool) -> AttnMask:
    """Every query sees the windows that end before or at it: steps of ``stride`` queries."""
    count = pool.count(tokens)
    number = np.arange(count)
    begin = number * pool.stride + pool.size - 1
    end = np.minimum(begin + pool.stride, tokens)
    end[-1] = tokens
    wide = np.full(count, WIDE)
    rows = np.column_stack([begin, end, np.zeros(count, np.int64), number + 1, -wide, wide])
    return AttnMask.from_slices(tokens, count, rows)
