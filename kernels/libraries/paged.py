"""Operators `paged.flash_attn` and `paged.flashinfer`: libraries that decode over pages.

Both take the cache as pages and a table of whole pages, of which the last of a sequence may be
partial; what a mask cuts out of other pages is refused.

Written against flash_attn/flash_attn_interface.py (``flash_attn_with_kvcache``) of flash-attn
2.8.3.post1 and flashinfer/decode.py (``BatchDecodeWithPagedKVCacheWrapper``) of FlashInfer's commit
002752ae; never run.

Legend: B sequences, one query each; T slots of the cache; H query heads, G key/value heads, D head
dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.libraries.adapter import LN2, Adapter, Limits, Plan, plan_fields
from cpbench.masks.paged.table import PageTable

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

_SHARED: dict[str, Any] = {
    "dtypes": ("bfloat16", "float16"), "devices": ("cuda",), "backward_on": (),
    "deterministic": False, "paged": True,
}  # fmt: skip
OPERATORS = (
    OperatorInfo(
        name="paged.flash_attn",
        summary="decoding: FlashAttention-2 over pages of a multiple of 256",
        source="flash-attn, flash_attn_with_kvcache",
        load="cpbench.kernels.libraries.paged:PagedFlashAttn",
        requires=("torch", "flash_attn"),
        install="pip install flash-attn --no-build-isolation",
        unproven="flash-attn 2.8.3.post1",
        **_SHARED,
    ),
    OperatorInfo(
        name="paged.flashinfer",
        summary="decoding: FlashInfer's batch decode over pages",
        source="FlashInfer, arXiv 2501.01005",
        load="cpbench.kernels.libraries.paged:PagedFlashInfer",
        requires=("torch", "flashinfer"),
        install="pip install flashinfer-python",
        unproven="flashinfer 002752ae",
        **_SHARED,
    ),
)
FLASH_ATTN_PAGE = 256
WORKSPACE_BYTES = 128 << 20  # recommended by FlashInfer
TENSOR_CORES_FROM = 4  # query heads of a key/value head


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedPlan(Plan):
    """The arguments of a call.

    Attributes:
        page_size: slots of a page.
        table: ``[B, pages]`` int32 pages, padded with 0; of FlashAttention.
        lens: ``[B]`` int32 keys; of FlashAttention.
        wrapper: the library's, planned; of FlashInfer.
    """

    page_size: int = 0
    table: torch.Tensor | None = None
    lens: torch.Tensor | None = None
    wrapper: Any = None


class _Paged(Adapter):
    """What both share: the cache as pages."""

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        if not problem.page_size:
            return "decodes over pages; use phase decode"
        if mask.seq_k % problem.page_size:
            return f"takes a cache of whole pages of {problem.page_size}, not {mask.seq_k} slots"
        return PageTable.of(mask, problem.page_size).block_table()[2]

    @staticmethod
    def _caches(qkv: QKV, plan: PagedPlan) -> list[torch.Tensor]:
        """k and v as ``[pages, page_size, G, D]``."""
        return [x[0].unflatten(0, (-1, plan.page_size)) for x in (qkv.k, qkv.v)]


class PagedFlashAttn(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "paged.flash_attn"

    def format_refusal(self, problem: Problem, mask: AttnMask) -> str | None:
        if problem.page_size and problem.page_size % FLASH_ATTN_PAGE:
            return f"takes pages of a multiple of {FLASH_ATTN_PAGE}, not {problem.page_size}"
        return super().format_refusal(problem, mask)

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> PagedPlan:
        import torch

        fields = plan_fields(mask, problem, device)
        pages, lens, reason = PageTable.of(mask, problem.page_size).block_table()
        assert reason is None
        table, lengths = (
            torch.as_tensor(x, dtype=torch.int32, device=device) for x in (pages, lens)
        )
        return PagedPlan(**fields, page_size=problem.page_size, table=table, lens=lengths)

    def _forward(self, qkv: QKV, plan: PagedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        api = importlib.import_module("flash_attn.flash_attn_interface")
        out, lse = api.flash_attn_with_kvcache(
            qkv.q[0][:, None].contiguous(),
            *self._caches(qkv, plan),
            cache_seqlens=plan.lens,
            block_table=plan.table,
            softmax_scale=plan.scale,
            return_softmax_lse=True,
        )  # [B, 1, H, D] and [B, H, 1]
        return out[:, 0][None], lse[:, :, 0].T[None]


class PagedFlashInfer(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    name = "paged.flashinfer"
    limits = Limits(min_capability=(8, 0), head_dims=(64, 128, 256))

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> PagedPlan:
        import torch

        fields = plan_fields(mask, problem, device)
        if fields["empty"]:
            return PagedPlan(**fields)
        table = PageTable.of(mask, problem.page_size)
        last = [int(table.count[table.of_query(b)][-1:].sum()) for b in range(mask.seq_q)]
        indptr, pages, last_lens = (
            torch.as_tensor(x, dtype=torch.int32, device=device)
            for x in (table.indptr, table.pages, last)
        )
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout="NHD", use_tensor_cores=problem.group >= TENSOR_CORES_FROM
        )
        dtype = getattr(torch, problem.dtype)
        wrapper.plan(
            indptr,
            pages,
            last_lens,
            problem.heads_q,
            problem.heads_kv,
            problem.head_dim,
            problem.page_size,
            sm_scale=problem.softmax_scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return PagedPlan(**fields, page_size=problem.page_size, wrapper=wrapper)

    def _forward(self, qkv: QKV, plan: PagedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        caches = tuple(self._caches(qkv, plan))
        out, lse = plan.wrapper.run(qkv.q[0].contiguous(), caches, return_lse=True)
        return out[None], lse.T[None] * LN2  # [B, H, D], and [B, H] in base 2
