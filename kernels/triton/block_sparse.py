"""Operator `triton_block_sparse`: masks per head, and block selections on the device, in Triton.

Masks that differ between heads (kept blocks of equal or varying size, vertical lines and slashes)
are planned on the host.  Block selections are planned by :func:`plan_blocks` on the device, without
synchronisation: the host learns neither the selected blocks nor their number.  Both run the kernels
of `triton_band`.

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
from cpbench.kernels.triton.launch import ConfigOverrides, Pass, Plan
from cpbench.kernels.triton.plan import plan_tiles
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

MIN_BLOCK = 16

OPERATORS = (
    OperatorInfo(
        name="triton_block_sparse",
        summary="masks per head, and selections on the device, in Triton; deterministic",
        source="FlashAttention-2, arXiv 2307.08691, over tile lists as in FlexAttention",
        load="cpbench.kernels.triton.block_sparse:TritonBlockSparse",
        masks=("heads", "blocks"),
        requires=("torch", "triton"),
        value_dims=True,
        interpreted_on=("cpu",),
        params=("block_q", "block_k", "num_warps", "num_stages", "descriptors", "launches"),
        compiles="cpbench.kernels.triton.block_sparse:launches",
    ),
)


class TritonBlockSparse:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        block_q, block_k, num_warps, num_stages, descriptors, launches: see
            :class:`ConfigOverrides`.
    """

    def __init__(
        self, block_q: int = 0, block_k: int = 0, num_warps: int = 0, num_stages: int = 0,
        descriptors: int = 0, launches: int = 0,
    ) -> None:  # fmt: skip
        launch = {
            "num_warps": num_warps, "num_stages": num_stages, "descriptors": descriptors,
            "launches": launches,
        }  # fmt: skip
        self._overrides = ConfigOverrides("triton_block_sparse", True, block_q, block_k, **launch)

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        return self._overrides.refusal(problem, device)

    def prepare(self, mask: HeadMasks | Blocks, problem: Problem, device: str) -> Plan:
        configs = self._overrides.configs(problem, device)
        if isinstance(mask, HeadMasks):
            return self.prepare_with(mask, problem, device, configs)
        block = mask.grid.block_k
        if mask.grid.block_q == block and block >= MIN_BLOCK and not block & (block - 1):
            return plan_blocks(mask.kept, problem, block, configs, mask.grid.mask)
        return triton_launch.plan(mask.to_heads().masks, problem, device, configs)

    def prepare_with(
        self, mask: HeadMasks, problem: Problem, device: str, configs: dict[str, Config]
    ) -> Plan:
        """As :meth:`prepare`, with given configurations by kernel."""
        masks = mask.masks * problem.batch  # one per head of each batch
        return triton_launch.plan(masks, problem, device, configs)

    def plan_blocks(
        self, kept: torch.Tensor, problem: Problem, block_size: int, within: AttnMask | None = None
    ) -> Plan:
        """:func:`plan_blocks` with this operator's configurations."""
        configs = self._overrides.configs(problem, kept.device.type)
        return plan_blocks(kept, problem, block_size, configs, within)

    forward = staticmethod(triton_launch.forward)
    backward = staticmethod(triton_launch.backward)


def kept_of_indices(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Convert indices of kept blocks to booleans.

    Args:
        indices: ``[B, H, X, n]`` integers, indices of blocks of keys; -1 stands for none, and
            duplicates count once.
        blocks: Y.

    Returns:
        ``[B, H, X, Y]`` booleans.

    Raises:
        ValueError: for an index out of bounds.  (The check synchronises with the device; code that
            knows its indices to be valid can build the booleans itself.)
    """
    import torch

    if indices.ndim != 4 or torch.is_floating_point(indices):
        raise ValueError(f"indices must be [B, H, X, n] integers, not {_describe(indices)}")
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
    """Plan the passes of blocks that were selected on the device, without synchronisation.

    Args:
        kept: ``[B, H, X, Y]`` booleans on the device: the blocks of ``block_size`` keys that each
            block of ``block_size`` queries attends to.
        block_size: a power of two from 16 on.
        configs: of the kernels, by name; tiles larger than a block are reduced to it.
        within: mask inside the kept blocks, for all heads; without it all of a block is visible.

    Raises:
        ValueError: for booleans of another shape, or an unsupported block size.
    """
    import torch

    if block_size < MIN_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size = {block_size} must be a power of two from {MIN_BLOCK} on")
    rows, cols = -(-problem.seq_q // block_size), -(-problem.seq_k // block_size)
    shape = (problem.batch, problem.heads_q, rows, cols)
    if kept.shape != shape or kept.dtype != torch.bool:
        raise ValueError(f"kept must be {list(shape)} booleans, not {_describe(kept)}")
    full = [(0, problem.seq_q, 0, problem.seq_k, -problem.seq_q, problem.seq_k)]
    mask = within or AttnMask.from_slices(problem.seq_q, problem.seq_k, full)
    if (mask.seq_q, mask.seq_k) != (problem.seq_q, problem.seq_k):
        raise ValueError(
            f"within is a mask of {mask.seq_q} x {mask.seq_k} tokens; the problem has "
            f"{problem.seq_q} x {problem.seq_k}"
        )

    def block_pass(name: str, transposed: bool) -> Pass:
        config = configs[name]
        config = replace(
            config, rows=min(config.rows, block_size), cols=min(config.cols, block_size)
        )
        blocks = kept.transpose(2, 3) if transposed else kept
        tiles = blocks.repeat_interleave(block_size // config.rows, 2)
        tiles = tiles.repeat_interleave(block_size // config.cols, 3)
        pass_mask = mask.transpose() if transposed else mask
        static = _static_tiles(pass_mask, config.rows, config.cols, tiles.shape[3], kept.device)
        group = problem.group if transposed else 1
        return _selected_pass(tiles.flatten(0, 1), static, config, group)

    forward = block_pass("forward", transposed=False)
    if not problem.backward:
        return Plan(problem.softmax_scale, forward, None, None)
    dq = block_pass("backward_dq", transposed=False)
    return Plan(problem.softmax_scale, forward, dq, block_pass("backward_dkv", transposed=True))


class _StaticTiles(NamedTuple):
    """The tiles of a static mask, on the device.

    Attributes:
        full: ``[rows, Y]`` booleans, entirely visible tiles.
        entry: ``[rows, Y]`` int32, the number of a partial tile; -1 for others.
        tile_layers, layers, slices: of the partial tiles, see ``triton.plan.TileLists``.
    """

    full: torch.Tensor
    entry: torch.Tensor
    tile_layers: torch.Tensor
    layers: torch.Tensor
    slices: torch.Tensor


@functools.lru_cache(maxsize=32)
def _static_tiles(
    mask: AttnMask, rows: int, cols: int, width: int, device: torch.device
) -> _StaticTiles:
    """The tiles of a mask, computed once for all selections.

    Args:
        rows, cols: of a tile.
        width: tiles per row, possibly more than the mask has.
    """
    import torch

    lists = plan_tiles([mask], rows, cols).lists
    count = lists.items.shape[1]
    row, run0, run1, tile0, tile1, _ = lists.items[0].T
    edges = np.zeros((count, width + 1), dtype=np.int32)
    run_row = np.repeat(row, run1 - run0)
    np.add.at(edges, (run_row, lists.runs[:, 0]), 1)
    np.add.at(edges, (run_row, lists.runs[:, 1]), -1)
    full = edges.cumsum(1)[:, :width] > 0
    entry = np.full((count, width), -1, dtype=np.int32)
    entry[np.repeat(row, tile1 - tile0), lists.tiles] = np.arange(len(lists.tiles))
    arrays = (full, entry, lists.tile_layers, lists.layers, lists.slices)
    return _StaticTiles(*(torch.as_tensor(array, device=device) for array in arrays))


def _selected_pass(kept: torch.Tensor, static: _StaticTiles, config: Config, group: int) -> Pass:
    """The pass over the selected tiles of a mask.

    Args:
        kept: ``[plans, X, Y]`` booleans of tiles, possibly with more rows than the mask has.
        group: consecutive plans whose items are ordered together.
    """
    import torch

    rows, width = static.full.shape
    kept, device = kept[:, :rows], kept.device
    plans = len(kept)
    full, partial = kept & static.full, kept & (static.entry >= 0)

    columns = torch.arange(width, dtype=torch.int32, device=device).expand(kept.shape)
    runs, run_starts = compact(full, columns)
    tiles, tile_starts = compact(partial, columns)
    entries, _ = compact(partial, static.entry.expand(kept.shape))
    all_layers = static.tile_layers
    if len(all_layers):
        tile_layers = all_layers[entries]
    else:
        tile_layers = all_layers.new_zeros((len(entries), 2))
    row = torch.arange(rows, dtype=torch.int32, device=device).expand(plans, rows)
    items = torch.stack(
        [
            row, run_starts[:, :-1], run_starts[:, 1:], tile_starts[:, :-1], tile_starts[:, 1:],
            torch.full_like(row, -1),
        ],
        dim=-1,
    )  # fmt: skip
    work = kept.sum(-1, dtype=torch.int32).view(plans // group, group, rows).sum(1)
    order = work.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    lists = (items, order, runs, tiles, tile_layers, static.layers, static.slices)
    tensors = tuple(x.contiguous() for x in lists)
    no_splits = torch.zeros((0, 3), dtype=torch.int32, device=device)
    return Pass(config, tensors, rows, no_splits, 0, per_head=True, listed=True)


def compact(selected: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact the selected values at the beginning of a buffer of full size.

    Returns:
        the buffer; ``[plans, rows + 1]``, where the values of each row begin and end.
    """
    import torch

    flat = selected.reshape(-1)
    position = flat.cumsum(0, dtype=torch.int64)
    buffer = torch.zeros(len(flat) + 1, dtype=torch.int32, device=selected.device)
    target = torch.where(flat, position - 1, len(flat))
    buffer.scatter_(0, target, values.reshape(-1).to(torch.int32))
    counts = selected.sum(-1, dtype=torch.int64)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    starts = torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1)
    return buffer, starts.to(torch.int32)


def _describe(x: torch.Tensor) -> str:
    """Shape and dtype of a tensor, for messages."""
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def launches(
    target: str, dtype: str, head_dim: int, head_dim_v: int = 0, **config: int
) -> list[Launch]:
    """See :func:`triton_ahead.launches`."""
    return triton_ahead.launches(target, dtype, head_dim, True, False, head_dim_v, **config)
