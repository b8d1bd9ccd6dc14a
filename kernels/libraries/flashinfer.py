"""Operators `flashinfer.*`: FlashInfer's prefill kernels; forward only, for it has no backward.

`dense` takes full and causal masks, windows behind and documents (its ragged prefill);
`block_sparse` any mask of all heads, as blocks and the bits inside them; `variable` blocks that are
entirely visible, chosen for each head, of equal or of varying size.  Their lse has base two.  Plans
are the library's own and wait for the device; wrappers of a device share one workspace.

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
    about,
    flat,
    packed,
    unflat,
    unflat_lse,
)
from cpbench.kernels.libraries.flashinfer_partition import Partition, of_heads, rectangles
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert_library import Unconvertible, to_bsr, to_varlen
from cpbench.masks.head_masks import HeadMasks, distinct_masks
from cpbench.masks.tiling import tiles
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV
    from cpbench.core.problem import Problem
    from cpbench.masks.head_masks import SlicedMask


def _info(name: str, summary: str, **declared: Any) -> OperatorInfo:
    return OperatorInfo(
        name=f"flashinfer.{name}",
        summary=summary,
        source="FlashInfer, arXiv 2501.01005",
        load=f"{__name__}:{''.join(part.title() for part in name.split('_'))}",
        dtypes=("bfloat16", "float16"),
        devices=("cuda",),
        backward_on=(),
        external_lse=False,
        deterministic=False,
        requires=("torch", "flashinfer"),
        install="pip install flashinfer-python",
        unproven="flashinfer 0.7.2.post1",
        **declared,
    )


OPERATORS = (
    _info("dense", "FlashInfer's ragged prefill: full, causal, windows behind, documents"),
    _info(
        "block_sparse",
        "FlashInfer's block-sparse prefill: any mask as blocks and bits",
        params=("block_q", "block_k"),
    ),
    _info(
        "variable",
        "FlashInfer's block-sparse prefill with whole blocks of any size for each head",
        masks=("heads", "blocks"),
    ),
)
WORKSPACE_BYTES = 128 << 20  # what the library recommends
MOST_BITS = (1 << 31) - 1  # it counts the bits of a mask in int32


@dataclass(frozen=True, kw_only=True, eq=False)
class Wrapped(Plan):
    """The library's own plan, in its wrapper (None for an empty mask); ``repeat`` times the keys of
    a head."""

    wrapper: Any = None
    repeat: int = 1


class _Prefill(Adapter):
    limits = Limits(least=(8, 0), dims=(64, 128, 256))

    def __init__(self) -> None:
        self.name = f"flashinfer.{self.member}"

    member: str


class Dense(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    member = "dense"

    def refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        found = to_varlen(mask)
        if found.right > 0:
            raise Unconvertible(
                f"its queries see {found.right} tokens ahead; FlashInfer bounds a window behind "
                "alone, unless it is causal"
            )
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Wrapped:
        known = about(mask, problem, device)
        if known["empty"]:
            return Wrapped(**known)
        plan = packed(mask, problem, device)
        api = importlib.import_module("flashinfer")
        wrapper = api.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), kv_layout="NHD")
        wrapper.plan(
            plan.cu_q,
            plan.cu_k,
            causal=plan.causal,
            window_left=plan.left,
            head_dim_qk=problem.head_dim,
            **_shared(problem),
        )
        return Wrapped(**known, wrapper=wrapper)

    def _forward(self, qkv: QKV, plan: Wrapped) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        out, lse_NH = plan.wrapper.run(flat(q), flat(k), flat(v), return_lse=True)
        return unflat(out, len(q)), unflat_lse(lse_NH.T, len(q)) * LN2


class BlockSparse(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        block_q, block_k: tokens of a block; the keys must be whole blocks.
    """

    member = "block_sparse"

    def __init__(self, block_q: int = 128, block_k: int = 64) -> None:
        super().__init__()
        if min(block_q, block_k) < 1:
            raise ValueError(f"{self.name}: blocks of {block_q} x {block_k} tokens have none")
        self._block_q, self._block_k = block_q, block_k

    def refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        if problem.seq_k % self._block_k:
            return (
                f"needs a multiple of block_k = {self._block_k} keys, not {problem.seq_k}; "
                "block_k is a parameter"
            )
        bits = len(tiles(mask, self._block_q, self._block_k)) * self._block_q * self._block_k
        if bits > MOST_BITS:
            return f"counts the bits of a mask in 32 bits; these are {bits}"
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Wrapped:
        import torch

        known = about(mask, problem, device)
        if known["empty"]:
            return Wrapped(**known)
        found = to_bsr(mask, self._block_q, self._block_k)
        indptr, indices = (torch.as_tensor(x, device=device) for x in (found.indptr, found.indices))
        bits = None if found.packed is None else torch.as_tensor(found.blocks(), device=device)
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
            mask=bits,  # not packed: what is handed over packed is misread from the second row on
            o_data_type=dtype,
            **_shared(problem),
        )
        return Wrapped(**known, wrapper=wrapper)

    def _forward(self, qkv: QKV, plan: Wrapped) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        q, k, v = qkv
        each = [
            plan.wrapper.run(*(x[b].contiguous() for x in (q, k, v)), return_lse=True)
            for b in range(len(q))
        ]
        out, lse_BSH = (torch.stack(x) for x in zip(*each, strict=True))
        return out, lse_BSH.transpose(1, 2) * LN2


class Variable(_Prefill):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Batches become heads.  The library's pattern is one of a key/value head: where query heads that
    share one differ, keys are repeated for them, inside the call.
    """

    member = "variable"

    def refusal(self, problem: Problem, mask: SlicedMask) -> str | None:
        within = isinstance(mask, AttnMask)  # within which a selector is to choose
        whole = mask.kind == "full" if within else rectangles(distinct_masks(mask))
        if not whole:
            return (
                "computes blocks that are entirely visible, and this mask cuts some of them (a "
                "causal one does); use one that does not"
            )
        return None

    def prepare(self, mask: HeadMasks | Blocks, problem: Problem, device: str) -> Wrapped:

        partition = _chosen(mask) if isinstance(mask, Blocks) else _of_masks(mask, device)
        kept = partition.kept  # [1 or B, H, X, Y]
        seen = kept.any(-1)
        if not bool(seen.any()):
            return Wrapped(scale=problem.softmax_scale, empty=True)
        blind = partition.spread(~seen)[..., : problem.seq_q]
        groups = (problem.heads_kv, -1)
        sizes = [x.unflatten(0, groups) for x in (partition.rows, partition.cols)]
        chosen = kept.unflatten(1, groups)
        alike = bool((chosen == chosen[:, :, :1]).all())
        alike = alike and all(bool((x == x[:, :1]).all()) for x in sizes)
        every = problem.group if alike else 1  # of how many query heads one has a pattern
        kept = kept.expand(problem.batch, -1, -1, -1)[:, ::every].flatten(0, 1)
        wrapper = importlib.import_module("flashinfer").VariableBlockSparseAttentionWrapper(
            _workspace(device)
        )
        heads = {"num_qo_heads": problem.batch * problem.heads_q, "num_kv_heads": len(kept)}
        wrapper.plan(
            kept.contiguous(),
            partition.rows[::every].repeat(problem.batch, 1),
            partition.cols[::every].repeat(problem.batch, 1),
            head_dim=problem.head_dim,
            **{**_shared(problem), **heads},
        )
        return Wrapped(
            scale=problem.softmax_scale,
            blind=blind if bool(blind.any()) else None,
            wrapper=wrapper,
            repeat=problem.group // every,
        )

    def _forward(self, qkv: QKV, plan: Wrapped) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv
        k, v = (x.repeat_interleave(plan.repeat, 2) for x in (k, v))
        given = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # [B * H, S, D]
        out, lse = plan.wrapper.run(*given, return_lse=True)
        out, lse = (x.unflatten(0, (len(q), -1)) for x in (out, lse))
        return out.transpose(1, 2), lse * LN2


def _of_masks(mask: HeadMasks, device: str) -> Partition:
    found = of_heads(mask.masks)
    assert found is not None  # refused before
    return found.to(device)


def _chosen(chosen: Blocks) -> Partition:
    """What a selector chose, in the blocks of its grid.

    Raises:
        Unsupported: for whole columns, or blocks that the mask cuts.
    """
    import torch

    if chosen.columns is not None:
        raise Unsupported(
            "flashinfer.variable takes blocks alone; this selection has columns beside them"
        )
    kept = chosen.kept & chosen.grid.allowed
    if bool((kept & ~chosen.grid.full).any()):
        raise Unsupported(
            "flashinfer.variable computes blocks that are entirely visible, and the mask cuts some "
            "of those chosen (a causal one does)"
        )
    rows, cols = (
        x.to(torch.int32).expand(chosen.heads, -1).contiguous() for x in chosen.grid.block_lengths
    )
    return Partition(kept, rows, cols)


def _shared(problem: Problem) -> dict[str, Any]:
    """What all plans take.  The library's own default is float16."""
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
    import torch

    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
