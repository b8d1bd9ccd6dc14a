"""Operator `triton_block_sparse`: a mask for each head in Triton, and blocks chosen on the device.

As an operator it takes masks that differ from head to head (kept blocks of equal or of varying
size, vertical lines and slashes), planned on the host.  :func:`plan_blocks` plans from booleans
that a selector left on the device, without ever waiting for them: what is kept, and even how much,
stays unknown to the host.  Both run the kernels of `triton_band`.

Legend: B batch, H query heads; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.core.kernel_launch import Launch
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.triton import ahead_of_time as triton_ahead
from cpbench.kernels.triton import launch as triton_launch
from cpbench.kernels.triton.configs import Config
from cpbench.kernels.triton.launch import Pass, Plan, Tuning
from cpbench.kernels.triton.plan import visits
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

LEAST_BLOCK = 16

OPERATORS = (
    OperatorInfo(
        name="triton_block_sparse",
        summary="a mask for each head in Triton; selections may stay on the device; deterministic",
        source="FlashAttention-2, arXiv 2307.08691, over tile lists as in FlexAttention",
        load="cpbench.kernels.triton.block_sparse:TritonBlockSparse",
        masks=("heads", "blocks"),
        requires=("torch", "triton"),
        interpreted_on=("cpu",),
        params=("block_q", "block_k", "num_warps", "num_stages", "descriptors"),
        compiles="cpbench.kernels.triton.block_sparse:launches",
    ),
)


class TritonBlockSparse:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        block_q, block_k, num_warps, num_stages, descriptors: see :class:`triton_launch.Tuning`.
    """

    def __init__(
        self, block_q: int = 0, block_k: int = 0, num_warps: int = 0, num_stages: int = 0,
        descriptors: int = 0,
    ) -> None:  # fmt: skip
        launch = {"num_warps": num_warps, "num_stages": num_stages, "descriptors": descriptors}
        self._tuning = Tuning("triton_block_sparse", True, block_q, block_k, **launch)

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        return self._tuning.refusal(problem, device)

    def prepare(self, mask: HeadMasks | Blocks, problem: Problem, device: str) -> Plan:
        configs = self._tuning.configs(problem, device)
        if isinstance(mask, HeadMasks):
            return self.prepare_with(mask, problem, device, configs)
        block = mask.grid.block_k
        if mask.grid.block_q == block and block >= LEAST_BLOCK and not block & (block - 1):
            return plan_blocks(mask.kept, problem, block, configs, mask.grid.mask)
        return triton_launch.plan(mask.to_heads().masks, problem, device, configs)

    def prepare_with(
        self, mask: HeadMasks, problem: Problem, device: str, configs: dict[str, Config]
    ) -> Plan:
        """As :meth:`prepare`, with configurations of the caller's, by kernel."""
        each = mask.masks * problem.batch  # lists for every head of every batch
        return triton_launch.plan(each, problem, device, configs)

    def plan_blocks(
        self, kept: torch.Tensor, problem: Problem, block_size: int, within: AttnMask | None = None
    ) -> Plan:
        """:func:`plan_blocks` with this operator's configurations."""
        configs = self._tuning.configs(problem, kept.device.type)
        return plan_blocks(kept, problem, block_size, configs, within)

    forward = staticmethod(triton_launch.forward)
    backward = staticmethod(triton_launch.backward)


def kept_of_indices(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Kept blocks as booleans from lists of them.

    Args:
        indices: ``[B, H, X, n]`` integers, of blocks of keys; -1 stands for none, and the same
            twice for once.
        blocks: Y.

    Returns:
        ``[B, H, X, Y]`` booleans.

    Raises:
        ValueError: for an index out of bounds.  (Looking waits for the device; a selector that
            knows its indices builds the booleans itself.)
    """
    import torch

    if indices.ndim != 4 or torch.is_floating_point(indices):
        raise ValueError(f"indices must be [B, H, X, n] integers, not {_told(indices)}")
    low, high = (int(x) for x in indices.aminmax()) if indices.numel() else (-1, -1)
    if low < -1 or high >= blocks:
        raise ValueError(
            f"indices are between {low} and {high}; with {blocks} blocks of keys they may be 0 to "
            f"{blocks - 1}, or -1 for none"
        )
    kept = torch.zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool, device=indices.device)
    kept.scatter_(3, torch.where(indices < 0, blocks, indices).long(), True)
    return kept[..., :blocks]


def plan_blocks(
    kept: torch.Tensor,
    problem: Problem,
    block_size: int,
    configs: dict[str, Config],
    within: AttnMask | None = None,
) -> Plan:
    """The passes of blocks that were chosen on the device; nothing waits for it.

    Args:
        kept: ``[B, H, X, Y]`` booleans on the device: which blocks of ``block_size`` queries see
            which blocks of ``block_size`` keys.
        block_size: a power of two from 16 on.
        configs: of the kernels; tiles larger than a block are cut down to it.
        within: what is visible inside kept blocks, for all heads alike; all of it unless given.

    Raises:
        ValueError: for booleans of another shape, or another block size.
    """
    import torch

    if block_size < LEAST_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size = {block_size} must be a power of two from {LEAST_BLOCK} on")
    rows, cols = -(-problem.seq_q // block_size), -(-problem.seq_k // block_size)
    shape = (problem.batch, problem.heads_q, rows, cols)
    if kept.shape != shape or kept.dtype != torch.bool:
        raise ValueError(f"kept must be {list(shape)} booleans, not {_told(kept)}")
    everything = [(0, problem.seq_q, 0, problem.seq_k, -problem.seq_q, problem.seq_k)]
    mask = within or AttnMask.from_slices(problem.seq_q, problem.seq_k, everything)
    if (mask.seq_q, mask.seq_k) != (problem.seq_q, problem.seq_k):
        raise ValueError(
            f"within is a mask of {mask.seq_q} x {mask.seq_k} tokens; the problem has "
            f"{problem.seq_q} x {problem.seq_k}"
        )

    def a_pass(name: str, turned: bool) -> Pass:
        config = configs[name]
        config = replace(
            config, rows=min(config.rows, block_size), cols=min(config.cols, block_size)
        )
        given = kept.transpose(2, 3) if turned else kept
        finer = given.repeat_interleave(block_size // config.rows, 2)
        finer = finer.repeat_interleave(block_size // config.cols, 3)
        inside = mask.transpose() if turned else mask
        static = _static(inside, config.rows, config.cols, finer.shape[3], kept.device)
        return _chosen(finer.flatten(0, 1), static, config, problem.group if turned else 1)

    forward = a_pass("forward", turned=False)
    if not problem.backward:
        return Plan(problem.softmax_scale, forward, None, None)
    dq = a_pass("backward_dq", turned=False)
    return Plan(problem.softmax_scale, forward, dq, a_pass("backward_dkv", turned=True))


class _Static(NamedTuple):
    """What a mask makes of each tile, on the device.

    Attributes:
        full: ``[rows, Y]`` which tiles are entirely visible.
        entry: ``[rows, Y]`` int32 the number of a partial tile, -1 for others.
        tile_layers, layers, pieces: of these, see ``triton_plan.Lists``.
    """

    full: torch.Tensor
    entry: torch.Tensor
    tile_layers: torch.Tensor
    layers: torch.Tensor
    pieces: torch.Tensor


@functools.lru_cache(maxsize=32)
def _static(mask: AttnMask, rows: int, cols: int, width: int, device: torch.device) -> _Static:
    """Once for a mask, whatever is chosen within it; ``width`` tiles a row, some beyond its end."""
    import torch

    lists = visits([mask], rows, cols).lists
    count = lists.items.shape[1]
    row, run0, run1, tile0, tile1, _ = lists.items[0].T
    edges = np.zeros((count, width + 1), dtype=np.int32)
    of_run = np.repeat(row, run1 - run0)
    np.add.at(edges, (of_run, lists.runs[:, 0]), 1)
    np.add.at(edges, (of_run, lists.runs[:, 1]), -1)
    entry = np.full((count, width), -1, dtype=np.int32)
    entry[np.repeat(row, tile1 - tile0), lists.tiles] = np.arange(len(lists.tiles))
    made = (edges.cumsum(1)[:, :width] > 0, entry, lists.tile_layers, lists.layers, lists.pieces)
    return _Static(*(torch.as_tensor(x, device=device) for x in made))


def _chosen(kept: torch.Tensor, static: _Static, config: Config, group: int) -> Pass:
    """The lists of the chosen tiles among those that a mask visits.

    Args:
        kept: ``[plans, X, Y]`` of tiles, perhaps some rows beyond the mask's end.
        group: plans that are ordered together.
    """
    import torch

    rows, width = static.full.shape
    kept, device = kept[:, :rows], kept.device
    plans = len(kept)
    whole, cut = kept & static.full, kept & (static.entry >= 0)

    columns = torch.arange(width, dtype=torch.int32, device=device).expand(kept.shape)
    runs, run_starts = _packed(whole, columns)
    tiles, tile_starts = _packed(cut, columns)
    which, _ = _packed(cut, static.entry.expand(kept.shape))
    pairs = static.tile_layers
    tile_layers = pairs[which] if len(pairs) else pairs.new_zeros((len(which), 2))
    number = torch.arange(rows, dtype=torch.int32, device=device).expand(plans, rows)
    items = torch.stack(
        [
            number, run_starts[:, :-1], run_starts[:, 1:], tile_starts[:, :-1], tile_starts[:, 1:],
            torch.full_like(number, -1),
        ],
        dim=-1,
    )  # fmt: skip
    work = kept.sum(-1, dtype=torch.int32).view(plans // group, group, rows).sum(1)
    order = work.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    lists = (items, order, runs, tiles, tile_layers, static.layers, static.pieces)
    tensors = tuple(x.contiguous() for x in lists)
    nothing = torch.zeros((0, 3), dtype=torch.int32, device=device)
    return Pass(config, tensors, rows, nothing, 0, per_head=True, listed=True)


def _packed(chosen: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of what is chosen, one after another in a buffer that would hold all, and where
    those of each row begin and end, ``[plans, rows + 1]``."""
    import torch

    flat = chosen.reshape(-1)
    place = flat.cumsum(0, dtype=torch.int64)
    buffer = torch.zeros(len(flat) + 1, dtype=torch.int32, device=chosen.device)
    target = torch.where(flat, place - 1, len(flat))
    buffer.scatter_(0, target, values.reshape(-1).to(torch.int32))
    counts = chosen.sum(-1, dtype=torch.int64)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    starts = torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1)
    return buffer, starts.to(torch.int32)


def _told(x: torch.Tensor) -> str:
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def launches(target: str, dtype: str, head_dim: int, **config: int) -> list[Launch]:
    """See :func:`triton_ahead.launches`."""
    return triton_ahead.launches(target, dtype, head_dim, True, False, **config)
