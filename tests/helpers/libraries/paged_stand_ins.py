"""Stand-ins for libraries that decode over pages, with their signatures and layouts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from library_signatures import function, signatures
from library_stand_ins import LN2, attend


def _decode(
    q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], pages: list[list[int]],
    lens: list[int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out ``[B, H, D]`` and natural lse ``[B, H]``; unset where a sequence has no key."""
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    for b, tokens in enumerate(lens):
        if tokens:
            k, v = (x[pages[b]].flatten(0, 1)[:tokens] for x in caches)
            seen = torch.ones(1, tokens, dtype=torch.bool)
            o, o_lse = attend(q[b : b + 1], k, v, seen, scale)
            out[b], lse[b] = o[0].to(q.dtype), o_lse[:, 0].float()
    return out, lse


def _with_kvcache(a: dict[str, Any]) -> Any:
    k, table, lens = a["k_cache"], a["block_table"], a["cache_seqlens"]
    assert k.shape[1] % 256 == 0, "pages of 256"
    assert table.dtype == lens.dtype == torch.int32
    assert a["return_softmax_lse"]
    assert a["k"] is a["v"] is None, "the cache is read only"
    out, lse = _decode(
        a["q"][:, 0], (k, a["v_cache"]), table.tolist(), lens.tolist(), a["softmax_scale"]
    )
    return out[:, None], lse[:, :, None]


class BatchDecodeWithPagedKVCacheWrapper:
    """Construct, plan, run."""

    def __init__(
        self, workspace: torch.Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool = False
    ) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(self, *args: Any, **kwargs: Any) -> None:
        signature = signatures("paged")["BatchDecodeWithPagedKVCacheWrapper.plan"]
        self.planned = signature.bind(self, *args, **kwargs)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], *,
            return_lse: bool) -> Any:  # fmt: skip
        assert return_lse
        p = self.planned
        assert caches[0].shape[1:] == (p["page_size"], p["num_kv_heads"], p["head_dim"])
        ends, indices = p["indptr"].tolist(), p["indices"].tolist()
        pages = [indices[a:b] for a, b in pairwise(ends)]
        lens = [
            max(len(own) - 1, 0) * p["page_size"] + last
            for own, last in zip(pages, p["last_page_len"].tolist(), strict=True)
        ]
        out, lse = _decode(q, caches, pages, lens, p["sm_scale"])
        return out, lse / LN2


MODULES: dict[str, dict[str, Any]] = {
    "flash_attn.flash_attn_interface": {
        "flash_attn_with_kvcache": function("paged", "flash_attn_with_kvcache", _with_kvcache)
    },
    "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper},
}
