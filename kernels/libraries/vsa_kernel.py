"""Operator `vsa.kernel`: the block-sparse kernel of Video Sparse Attention, in fastvideo-kernel.

It takes entirely visible blocks of 64 queries by 64 keys per head: masks per head and selections.
Of its two backends, `sm90` is the ThunderKittens kernel for Hopper, and `triton` runs on any GPU;
each is called directly, below autograd, since their forms of the lse differ.  Neither supports GQA
in both passes, so keys and values are repeated inside the call.  Tokens are padded to whole blocks,
as the library requires.

Written against python/fastvideo_kernel/block_sparse_attn.py and csrc/attention/block_sparse_h100.cu
of fastvideo-kernel 0.3.5; never run.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim; X
blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import Unsupported
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries import adapter
from cpbench.kernels.libraries.adapter import LN2, Adapter, Limits, Plan
from cpbench.masks.head_masks import HeadMasks, distinct_masks
from cpbench.masks.tiling import tiles
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.masks.head_masks import SlicedMask

OPERATORS = (
    OperatorInfo(
        name="vsa.kernel",
        summary="Video Sparse Attention's kernel: blocks of 64 x 64 per head",
        source="VSA, arXiv 2505.13389; fastvideo-kernel",
        load="cpbench.kernels.libraries.vsa_kernel:VsaKernel",
        masks=("heads", "blocks"),
        dtypes=("bfloat16",),
        devices=("cuda",),
        deterministic=False,
        requires=("torch", "fastvideo_kernel"),
        params=("backend",),
        install="pip install fastvideo-kernel",
        unproven="fastvideo-kernel 0.3.5",
    ),
)
BLOCK = 64
BACKENDS = ("auto", "sm90", "triton")
HOPPER = (9, 0)
SM90_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lists(Plan):
    """The visible blocks of keys of each block of queries.

    Attributes:
        index: ``[B, H, X, Y]`` int32, blocks of keys, the visible ones first.
        count: ``[B, H, X]`` int32, the number of visible ones, at least one since `sm90` needs one.
        sizes: ``[Y]`` int32, tokens of each block of keys.
        sm90: whether to use the backend `sm90`.
    """

    index: torch.Tensor
    count: torch.Tensor
    sizes: torch.Tensor
    sm90: bool


class VsaKernel(Adapter):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        backend: ``"sm90"``, ``"triton"``, or ``"auto"``: `sm90` on Hopper where head_dim is 64 or
            128.
    """

    name = "vsa.kernel"
    limits = Limits(min_capability=(8, 0), head_dims=(16, 32, 64, 128, 256))

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f"{self.name}: backend = {backend!r} is not one of {', '.join(BACKENDS)}"
            )
        self._backend = backend

    def format_refusal(self, problem: Problem, mask: SlicedMask) -> str | None:
        if not math.isclose(problem.softmax_scale, problem.head_dim**-0.5):
            return f"needs the scale {problem.head_dim**-0.5:.6g}, not {problem.softmax_scale:.6g}"
        return None if _only_full_blocks(mask) else _partial_blocks_refusal()

    def device_refusal(self, problem: Problem, mask: SlicedMask) -> str | None:
        fits = adapter.compute_capability() == HOPPER and problem.head_dim in SM90_DIMS
        if self._backend == "sm90" and not fits:
            return "backend = sm90 needs compute capability 9.0 and head_dim 64 or 128"
        return None

    def prepare(self, mask: HeadMasks | Blocks, problem: Problem, device: str) -> Lists:
        import torch

        kept = _kept_of_blocks(mask) if isinstance(mask, Blocks) else _kept_of_heads(mask, device)
        kept = kept.expand(problem.batch, -1, -1, -1)
        count = kept.sum(-1, dtype=torch.int32)
        starts = torch.arange(0, problem.seq_k, BLOCK, device=device)
        index = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return Lists(
            scale=problem.softmax_scale,
            empty_rows=(count == 0).repeat_interleave(BLOCK, 2)[..., : problem.seq_q],
            index=index.to(torch.int32),
            count=count.clamp(min=1),
            sizes=(problem.seq_k - starts).clamp(max=BLOCK).to(torch.int32),
            sm90=self._uses_sm90(problem),
        )

    def _uses_sm90(self, problem: Problem) -> bool:
        if self._backend != "auto":
            return self._backend == "sm90"
        fits = problem.head_dim in SM90_DIMS
        return fits and adapter.compute_capability() == HOPPER and _sm90_is_built()

    def _forward(self, qkv: QKV, plan: Lists) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        api = _api()
        inputs = _pad(q, k, v, heads=q.shape[2])
        if plan.sm90:
            results = [
                api.block_sparse_attn_sm90(*(x[b : b + 1] for x in inputs), *_batch_lists(plan, b))
                for b in range(len(q))
            ]
            out, aux = (torch.cat(x) for x in zip(*results, strict=True))
            lse = aux.squeeze(-1) * -(q.shape[3] ** -0.5)
        else:
            out, aux = api.block_sparse_attn_triton(*inputs, plan.index, plan.count, plan.sizes)
            lse = aux * LN2
        S = q.shape[1]
        return out[:, :, :S].transpose(1, 2), lse[..., :S]

    def _backward(self, x: BackwardInputs, plan: Lists) -> Gradients:
        import torch

        dout, q, k, v, out, lse = x
        api = _api()
        S, T, heads_kv = q.shape[1], k.shape[1], k.shape[2]
        # Queries that see nothing have one listed block, which must not contribute.
        if plan.empty_rows is not None:
            lse = lse.masked_fill(plan.empty_rows, torch.inf)
        inputs = _pad(dout, q, k, v, out, heads=q.shape[2])
        lse = torch.nn.functional.pad(lse, (0, -S % BLOCK), value=torch.inf)
        if plan.sm90:
            aux = (lse * -(q.shape[3] ** 0.5)).unsqueeze(-1).contiguous()
            results = [
                api.block_sparse_attn_backward_sm90(
                    *(x[b : b + 1] for x in inputs), aux[b : b + 1], *_batch_lists(plan, b)
                )
                for b in range(len(q))
            ]
            grads = [torch.cat(x) for x in zip(*results, strict=True)]
        else:
            lists = plan.index, plan.count, plan.sizes
            grads = api.block_sparse_attn_backward_triton(*inputs, (lse / LN2).contiguous(), *lists)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        dk, dv = (grad[:, :T].unflatten(2, (heads_kv, -1)).float().sum(3) for grad in (dk, dv))
        return dq[:, :S], dk.to(k.dtype), dv.to(v.dtype)


def _pad(*tensors: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Convert ``[B, S, H or G, D]`` to contiguous ``[B, H, S, D]``, padded to whole blocks."""
    import torch

    padded = []
    for x in tensors:
        repeated = x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)
        padding = (0, 0, 0, -x.shape[1] % BLOCK)
        padded.append(torch.nn.functional.pad(repeated, padding).contiguous())
    return padded


def _batch_lists(plan: Lists, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lists of one batch; `sm90` takes a single batch."""
    return plan.index[b : b + 1], plan.count[b : b + 1], plan.sizes


def _only_full_blocks(mask: SlicedMask) -> bool:
    """Whether every block is either entirely visible or entirely hidden."""
    return all(
        bool(tiles(head_mask, BLOCK, BLOCK).run_full.all()) for head_mask in distinct_masks(mask)
    )


def _partial_blocks_refusal() -> str:
    return (
        f"computes blocks of {BLOCK} x {BLOCK} that are entirely visible, and this mask cuts some "
        "of them (a causal one does); use one that does not"
    )


def _kept_of_heads(mask: HeadMasks, device: str) -> torch.Tensor:
    """The visible blocks of masks per head, ``[1, H, X, Y]``."""
    import torch

    kept = np.stack([_visible_blocks(head_mask) for head_mask in mask.masks])
    return torch.as_tensor(kept[None], device=device)


def _kept_of_blocks(selection: Blocks) -> torch.Tensor:
    """The blocks of a selection in blocks of 64, ``[B, H, X, Y]``.

    Raises:
        Unsupported: for unsupported block sizes, or blocks that the mask cuts.
    """
    import torch

    name, grid = VsaKernel.name, selection.grid
    if grid.block_q % BLOCK or grid.block_k % BLOCK:
        raise Unsupported(
            f"{name} takes blocks of multiples of {BLOCK} tokens, not {grid.block_q} x "
            f"{grid.block_k}"
        )
    if not _only_full_blocks(grid.mask):
        raise Unsupported(f"{name} {_partial_blocks_refusal()}")
    visible = torch.as_tensor(_visible_blocks(grid.mask), device=selection.kept.device)
    kept = selection.kept.repeat_interleave(grid.block_q // BLOCK, 2)
    kept = kept.repeat_interleave(grid.block_k // BLOCK, 3)
    return kept[:, :, : visible.shape[0], : visible.shape[1]] & visible


def _visible_blocks(mask: AttnMask) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """``[X, Y]`` booleans: blocks with at least one visible pair."""
    return tiles(mask, BLOCK, BLOCK).to_dense() > 0


def _sm90_is_built() -> bool:
    """Whether the installed package has the kernel for Hopper; without it, it silently falls
    back."""
    try:
        ops = importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops")
    except ImportError:
        return False
    return hasattr(ops, "block_sparse_fwd") and hasattr(ops, "block_sparse_bwd")


def _api() -> Any:
    return importlib.import_module("fastvideo_kernel.block_sparse_attn")
