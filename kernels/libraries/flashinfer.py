"""Operators `flashinfer.*`: FlashInfer's prefill kernels; forward only, since it has no backward.

`dense` is the ragged prefill, for full and causal masks, left-bounded windows and documents;
`block_sparse` takes any mask that heads share, as blocks and bits inside them; `variable` takes
entirely visible blocks per head, of equal or varying size.  The library's lse has base two.  Plans
are the library's own and synchronise with the device; the wrappers of a device share a workspace.

Written against flashinfer/prefill.py and flashinfer/sparse.py of flashinfer-python 0.7.2.post1, and
within the signatures of 0.6.18; never run.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim; X
blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import Unsupported
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import (
    LN2,
    Adapter,
    Limits,
    Plan,
    flatten_batch,
    packed_plan,
    plan_fields,
    unflatten_batch,
    unflatten_lse,
)
from cpbench.kernels.libraries.flashinfer_partition import (
    Partition,
    are_rectangles,
    partition_masks,
)
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert_library import Unconvertible, to_bsr, to_varlen
from cpbench.masks.head_masks import HeadMasks, distinct_masks
from cpbench.masks.tiling import tiles
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV
    from cpbench.core.problem import Problem
    from cpbench.masks.head_masks import SlicedMask


def _info(name: str, summary: str, **fields: Any) -> OperatorInfo:
    return OperatorInfo(
        name=f"flashinfer.{name}",
        summary=summary,
        source="FlashInfer, arXiv 2501.01005",
        load=f"{__name__}:{''.join(word.title() for word in name.split('_'))}",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        backward_on=(),
        external_lse=False,
        deterministic=False,
        requires=("torch", "flashinfer"),
        install="pip install flashinfer-python",
        unproven="flashinfer 0.7.2.post1",
        **fields,
    )


OPERATORS = (
    _info("dense", "FlashInfer's ragged prefill: full, causal, left-bounded windows, documents"),
    _info(
        "block_sparse",
        "FlashInfer's block-sparse prefill: any mask as blocks and bits",
        params=("block_q", "block_k"),
    ),
    _info(
        "variable",
        "FlashInfer's block-sparse prefill with entirely visible blocks of any size per head",
        masks=("heads", "blocks"),
    ),
)
WORKSPACE_BYTES = 128 << 20  # recommended by the library
MAX_BITS = (1 << 31) - 1  # the library counts the bits of a mask in int32


@dataclass(frozen=True, kw_only=True, eq=False)
class WrapperPlan(Plan):
    """The library's wrapper with its own plan (None for an empty mask); keys and values of each
    head are repeated ``repeat`` times."""

    wrapper: Any = None
    repeat: int = 1


class _Prefill(Adapter):
    limits = Limits(min_capability=(8, 0), head_dims=(64, 128, 256))

    def __init__(self) -> None:
        self.name = f"flashinfer.{self.member}"

    member: str


class Dense(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    member = "dense"

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        varlen = to_varlen(mask)
        if varlen.right > 0:
            raise Unconvertible(
                f"its queries see {varlen.right} tokens ahead; windows of FlashInfer have only a "
                "left bound, unless they are causal"
            )
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> WrapperPlan:
        fields = plan_fields(mask, problem, device)
        if fields["empty"]:
            return WrapperPlan(**fields)
        plan = packed_plan(mask, problem, device)
        api = importlib.import_module("flashinfer")
        wrapper = api.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), kv_layout="NHD")
        wrapper.plan(
            plan.cu_q,
            plan.cu_k,
            causal=plan.causal,
            window_left=plan.left,
            head_dim_qk=problem.head_dim,
            **_shared_arguments(problem),
        )
        return WrapperPlan(**fields, wrapper=wrapper)

    def _forward(self, qkv: QKV, plan: WrapperPlan) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse_NH = plan.wrapper.run(*map(flatten_batch, qkv), return_lse=True)
        batch = len(qkv.q)
        return unflatten_batch(out, batch), unflatten_lse(lse_NH.T, batch) * LN2


class BlockSparse(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        block_q, block_k: tokens per block; the number of keys must be a multiple of ``block_k``.
    """

    member = "block_sparse"

    def __init__(self, block_q: int = 128, block_k: int = 64) -> None:
        super().__init__()
        if min(block_q, block_k) < 1:
            raise ValueError(
                f"{self.name}: block_q = {block_q} and block_k = {block_k} must be at least 1"
            )
        self._block_q, self._block_k = block_q, block_k

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        if problem.seq_k % self._block_k:
            return (
                f"needs a multiple of block_k = {self._block_k} keys, not {problem.seq_k}; "
                "block_k is a parameter"
            )
        bits = len(tiles(mask, self._block_q, self._block_k)) * self._block_q * self._block_k
        if bits > MAX_BITS:
            return f"takes masks of up to {MAX_BITS:,} bits, not {bits:,}"
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> WrapperPlan:
        import torch

        fields = plan_fields(mask, problem, device)
        if fields["empty"]:
            return WrapperPlan(**fields)
        bsr = to_bsr(mask, self._block_q, self._block_k)
        indptr, indices = (torch.as_tensor(x, device=device) for x in (bsr.indptr, bsr.indices))
        bits = None if bsr.packed is None else torch.as_tensor(bsr.blocks(), device=device)
        dtype = getattr(torch, problem.dtype)
        wrapper = importlib.import_module("flashinfer").BlockSparseAttentionWrapper(
            _workspace(device)
        )
        wrapper.plan(
            indptr,
            indices,
            M=mask.seq_q,
            N=mask.seq_k,
            R=self._block_q,
            C=self._block_k,
            head_dim=problem.head_dim,
            mask=bits,  # unpacked: the library misreads packed bits from the second row on
            o_data_type=dtype,
            **_shared_arguments(problem),
        )
        return WrapperPlan(**fields, wrapper=wrapper)

    def _forward(self, qkv: QKV, plan: WrapperPlan) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        results = [
            plan.wrapper.run(*(x[b].contiguous() for x in (q, k, v)), return_lse=True)
            for b in range(len(q))
        ]
        out, lse_BSH = (torch.stack(x) for x in zip(*results, strict=True))
        return out, lse_BSH.transpose(1, 2) * LN2


class Variable(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Batches are folded into heads.  The library has one pattern per key/value head: if query heads
    that share one differ, keys and values are repeated for them, inside the call.
    """

    member = "variable"

    def format_refusal(self, problem: Problem, mask: SlicedMask) -> str | None:
        if isinstance(mask, AttnMask):  # the mask that a selection will be a subset of
            full_blocks = mask.kind == "full"
        else:
            full_blocks = are_rectangles(distinct_masks(mask))
        if not full_blocks:
            return (
                "computes blocks that are entirely visible, and this mask cuts some of them (a "
                "causal one does); use one that does not"
            )
        return None

    def prepare(self, mask: HeadMasks | Blocks, problem: Problem, device: str) -> WrapperPlan:
        if isinstance(mask, Blocks):
            partition = _selection_partition(mask)
        else:
            partition = _mask_partition(mask, device)
        kept = partition.kept  # [1 or B, H, X, Y]
        nonempty = kept.any(-1)
        if not bool(nonempty.any()):
            return WrapperPlan(scale=problem.softmax_scale, empty=True)
        empty_rows = partition.to_tokens(~nonempty)[..., : problem.seq_q]
        heads_per_pattern = problem.group if partition.is_shared(problem.heads_kv) else 1
        kept = kept.expand(problem.batch, -1, -1, -1)[:, ::heads_per_pattern].flatten(0, 1)
        wrapper = importlib.import_module("flashinfer").VariableBlockSparseAttentionWrapper(
            _workspace(device)
        )
        heads = {"num_qo_heads": problem.batch * problem.heads_q, "num_kv_heads": len(kept)}
        wrapper.plan(
            kept.contiguous(),
            partition.rows[::heads_per_pattern].repeat(problem.batch, 1),
            partition.cols[::heads_per_pattern].repeat(problem.batch, 1),
            head_dim=problem.head_dim,
            **{**_shared_arguments(problem), **heads},
        )
        return WrapperPlan(
            scale=problem.softmax_scale,
            empty_rows=empty_rows if bool(empty_rows.any()) else None,
            wrapper=wrapper,
            repeat=problem.group // heads_per_pattern,
        )

    def _forward(self, qkv: QKV, plan: WrapperPlan) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        k, v = (x.repeat_interleave(plan.repeat, 2) for x in (k, v))
        inputs = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # [B * H, S, D]
        out, lse = plan.wrapper.run(*inputs, return_lse=True)
        out, lse = (x.unflatten(0, (len(q), -1)) for x in (out, lse))
        return out.transpose(1, 2), lse * LN2


def _mask_partition(mask: HeadMasks, device: str) -> Partition:
    """The partition of masks per head, which have been checked to be rectangles."""
    partition = partition_masks(mask.masks)
    assert partition is not None
    return partition.to(device)


def _selection_partition(selection: Blocks) -> Partition:
    """The partition of a selection, with the blocks of its grid.

    Raises:
        Unsupported: for blocks that the mask cuts.
    """
    import torch

    kept = selection.kept & selection.grid.allowed
    if bool((kept & ~selection.grid.full).any()):
        raise Unsupported(
            "flashinfer.variable computes blocks that are entirely visible, and the mask cuts some "
            "of the selected ones (a causal one does)"
        )
    rows, cols = (
        lengths.to(torch.int32).expand(selection.heads, -1).contiguous()
        for lengths in selection.grid.block_lengths
    )
    return Partition(kept, rows, cols)


def _shared_arguments(problem: Problem) -> dict[str, Any]:
    """Arguments of all plans; the library's default dtype is float16."""
    import torch

    dtype = getattr(torch, problem.dtype)
    return {
        "num_qo_heads": problem.heads_q,
        "num_kv_heads": problem.heads_kv,
        "sm_scale": problem.softmax_scale,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


@functools.lru_cache(maxsize=8)
def _workspace(device: str) -> torch.Tensor:
    """The workspace shared by all wrappers of a device."""
    import torch

    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
