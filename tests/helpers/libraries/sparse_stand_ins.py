"""Stand-ins of FlashInfer, FlashMask and VSA's kernel; see ``library_stand_ins``.

Legend: S queries, T keys, H query heads, G key/value heads, D head dim; N concatenated tokens.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from library_signatures import CustomOperator, function, signatures
from library_stand_ins import LN2, NAN, attend, check, check_lse, differentiate, documents, window

# --- FlashInfer ---------------------------------------------------------------------------------


class _Wrapper:
    """A wrapper class of FlashInfer: construct, plan, run."""

    file = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = self._bind("__init__", args, kwargs)
        workspace = arguments["float_workspace_buffer"]
        assert (workspace.dtype, workspace.ndim) == (torch.uint8, 1)
        assert len(workspace) >= 128 << 20
        assert arguments.get("kv_layout", "NHD") == "NHD", "fa3 misreads HND"
        self.planned: dict[str, Any] = {}

    def _bind(self, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        signature = signatures(self.file)[f"{type(self).__name__}.{name}"]
        return signature.bind(self, *args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        assert not self.planned, "a second plan keeps parts of the first"
        self.planned = self._bind("plan", args, kwargs)
        for name in ("packed_mask", "packed_custom_mask"):
            assert self.planned.get(name) is None, "misread from the second row on"
        assert not self.planned.get("causal") or "qo_indptr" in self.planned, "not of all keys"

    def _inputs(self, args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The checked q, k, v of a call of ``run``."""
        a, p = self._bind("run", args, kwargs), self.planned
        q, k, v = a["q"], a["k"], a["v"]
        check(q, k, v, contiguous=True)
        assert q.dtype == p["q_data_type"], "the plan is for another dtype"
        assert p["kv_data_type"] in (None, k.dtype)
        assert p.get("o_data_type") in (None, q.dtype)
        assert a["return_lse"]
        assert q.shape[-1] in (64, 128, 256)
        return q, k, v

    @property
    def _scale(self) -> float:
        scale: float = self.planned["sm_scale"]
        return scale


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        q, k, v = self._inputs(args, kwargs)
        p = self.planned
        assert (q.shape[1:], k.shape[1]) == (
            (p["num_qo_heads"], p["head_dim_qk"]),
            p["num_kv_heads"],
        )
        out, lse = torch.full_like(q, NAN), torch.full(q.shape[:2], NAN)
        for at_q, at_k in documents(p["qo_indptr"], p["kv_indptr"]):
            S, T = at_q.stop - at_q.start, at_k.stop - at_k.start
            visible = window(S, T, p["window_left"], 0 if p["causal"] else -1, T - S)
            o, o_lse = attend(q[at_q], k[at_k], v[at_k], visible, self._scale)
            out[at_q], lse[at_q] = o.to(q.dtype), (o_lse.T / LN2).float()
        return out, lse


class BlockSparseAttentionWrapper(_Wrapper):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        q, k, v = self._inputs(args, kwargs)
        p = self.planned
        M, N, R, C = (p[name] for name in "MNRC")
        assert (len(q), len(k)) == (M, N)
        assert N % C == 0, "keys are pages of C tokens"
        for x in (p["indptr"], p["indices"]):
            assert x.dtype == torch.int32
        bits = p["mask"]
        if bits is not None:
            assert (bits.dtype, bits.shape) == (torch.bool, (len(p["indices"]), R, C))
        visible = torch.zeros(M, N, dtype=torch.bool)
        ends = p["indptr"].tolist()
        assert len(ends) == -(-M // R) + 1
        for row, (begin, end) in enumerate(pairwise(ends)):
            listed = p["indices"][begin:end].tolist()
            assert len(set(listed)) == len(listed), "a key would count twice"
            for n, col in zip(range(begin, end), listed, strict=True):
                height = min(R, M - row * R)
                block = torch.ones(R, C, dtype=torch.bool) if bits is None else bits[n]
                visible[row * R : row * R + height, col * C : col * C + C] = block[:height]
        out, lse = attend(q, k, v, visible, self._scale)
        return out.to(q.dtype), (lse.T / LN2).float()


class VariableBlockSparseAttentionWrapper(_Wrapper):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        q, k, v = (x.transpose(0, 1) for x in self._inputs(args, kwargs))  # heads come first
        p = self.planned
        kept, rows, cols = p["block_mask_map"], p["block_row_sz"], p["block_col_sz"]
        assert kept.dtype == torch.bool
        assert rows.dtype == cols.dtype == torch.int32
        heads, group = p["num_kv_heads"], p["num_qo_heads"] // p["num_kv_heads"]
        assert (q.shape[1], k.shape[1]) == (p["num_qo_heads"], heads)
        assert kept.shape == (heads, rows.shape[1], cols.shape[1])
        assert (rows.sum(1) == len(q)).all()
        assert (cols.sum(1) == len(k)).all()
        assert min(int(rows.min()), int(cols.min())) > 0
        pairs = [
            kept[g].repeat_interleave(rows[g].long(), 0).repeat_interleave(cols[g].long(), 1)
            for g in range(heads)
        ]
        visible = torch.stack(pairs).repeat_interleave(group, 0)
        out, lse = attend(q, k, v, visible, self._scale)
        return out.to(q.dtype).transpose(0, 1).contiguous(), (lse / LN2).float()


def _flashinfer(file: str) -> dict[str, Any]:
    classes = (
        BatchPrefillWithRaggedKVCacheWrapper,
        BlockSparseAttentionWrapper,
        VariableBlockSparseAttentionWrapper,
    )
    return {base.__name__: type(base.__name__, (base,), {"file": file}) for base in classes}


# --- FlashMask ----------------------------------------------------------------------------------


def _flashmask_visible(a: dict[str, Any], S: int, T: int, causal: bool) -> torch.Tensor:
    """The visible pairs ``[B, S, T]``, by the table in the library's documentation."""
    rows = a["startend_row_indices"]
    assert (rows.dtype, rows.shape[1:3]) == (torch.int32, (1, T))
    if rows.shape[3] not in ((1, 2) if causal else (2, 4)):
        raise ValueError(f"Invalid shape of startend_row_indices: {list(rows.shape)}")
    i, j = torch.arange(S)[:, None], torch.arange(T)[None]
    columns = [x[:, 0, None] for x in rows.unbind(-1)]
    if causal:
        masked = (j - i > T - S).expand(len(rows), S, T).clone()
        if len(columns) == 1:
            masked |= i >= columns[0]
        else:
            masked |= (columns[0] <= i) & (i < columns[1])
    elif len(columns) == 2:
        masked = (i >= columns[0]) | (i < columns[1])
    else:
        masked = (columns[0] <= i) & (i < columns[1])
        masked |= (columns[2] <= i) & (i < columns[3])
    return ~masked


def _flashmask() -> dict[str, Any]:
    def forward(a: dict[str, Any]) -> Any:
        q, k, v = a["query"], a["key"], a["value"]
        check(q, k, v, dtypes=(torch.bfloat16,))
        if a["startend_row_indices"] is None:
            raise ValueError("startend_row_indices cannot be None")
        assert len(a["startend_row_indices"]) == len(k), "no broadcast of batches"
        visible = _flashmask_visible(a, q.shape[1], k.shape[1], a["causal"])
        results = [
            attend(q[b], k[b], v[b], visible[b], a["softmax_scale"] or q.shape[-1] ** -0.5)
            for b in range(len(q))
        ]
        assert a["return_softmax_lse"]
        return [
            torch.stack([o for o, _ in results]).to(q.dtype),
            torch.stack([lse for _, lse in results]).float(),
        ]

    def backward(a: dict[str, Any]) -> Any:
        q, k, v, lse = a["q"], a["k"], a["v"], a["softmax_lse"]
        check(q, k, v, dtypes=(torch.bfloat16,))
        check_lse(lse, len(q), q.shape[2], q.shape[1])
        assert a["out"].dtype == a["dout"].dtype == q.dtype
        visible = _flashmask_visible(a, q.shape[1], k.shape[1], a["is_causal"])
        grads = [
            differentiate(
                a["dout"][b], q[b], k[b], v[b], a["out"][b],
                lse[b].masked_fill(lse[b] == -torch.inf, 0.0), visible[b], a["softmax_scale"],
            )
            for b in range(len(q))
        ]  # fmt: skip
        return tuple(torch.stack(x).to(q.dtype) for x in zip(*grads, strict=True))

    return {
        "flashmask_attention": function("flashmask", "flashmask_attention", forward),
        "flashmask_cuda": SimpleNamespace(bwd=function("flashmask", "bwd", backward)),
    }


# --- VSA ----------------------------------------------------------------------------------------


def _vsa_visible(a: dict[str, Any], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The visible pairs, ``[B, H, S, T]``."""
    index, count, sizes = a["q2k_idx"], a["q2k_num"], a["variable_block_sizes"]
    B, H, S, T = len(q), q.shape[1], q.shape[2], k.shape[2]
    assert S % 64 == T % 64 == 0, "whole blocks"
    assert index.dtype == count.dtype == sizes.dtype == torch.int32
    assert all(x.is_contiguous() for x in (index, count, sizes))
    assert index.shape[:3] == count.shape == (B, H, S // 64)
    assert sizes.shape == (T // 64,)
    valid = torch.arange(64)[None] < sizes[:, None]  # [Y, 64]
    visible = torch.zeros(B, H, S // 64, T // 64, 64, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for x in range(S // 64):
                listed = index[b, h, x, : count[b, h, x]].tolist()
                assert len(set(listed)) == len(listed), "a key would count twice"
                assert all(sizes[y] > 0 for y in listed)
                visible[b, h, x, listed] = valid[listed]
    return visible.flatten(3).repeat_interleave(64, 2)


def _vsa_forward(a: dict[str, Any], q: Any, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check(*(x.contiguous() for x in (q, k, v)), dtypes=(torch.bfloat16,))
    assert q.shape[1] == k.shape[1], "heads of keys are indexed by those of queries"
    visible, scale = _vsa_visible(a, q, k), q.shape[-1] ** -0.5
    results = [
        attend(*(x[b].transpose(0, 1) for x in (q, k, v)), visible[b], scale) for b in range(len(q))
    ]
    out = torch.stack([o.transpose(0, 1) for o, _ in results])
    return out.to(q.dtype), torch.stack([lse for _, lse in results])


def _vsa_backward(
    a: dict[str, Any], dout: Any, q: Any, k: Any, v: Any, out: Any, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    assert q.shape[1] == k.shape[1]
    assert out.is_contiguous()
    visible, scale = _vsa_visible(a, q, k), q.shape[-1] ** -0.5
    batch_grads = []
    for b in range(len(q)):
        tensors = (x[b].transpose(0, 1) for x in (dout, q, k, v, out))
        batch_grads.append(differentiate(*tensors, lse[b], visible[b], scale))
    grads = (torch.stack(x).transpose(1, 2) for x in zip(*batch_grads, strict=True))
    return tuple(grad.to(q.dtype) for grad in grads)


def _check_sm90(a: dict[str, Any], q: torch.Tensor) -> None:
    assert len(q) == 1, "one batch"
    assert q.shape[-1] in (64, 128), "nothing is launched for others"
    assert (a["q2k_num"] > 0).all(), "undefined for rows without blocks"


def _vsa() -> dict[str, Any]:
    def triton(a: dict[str, Any]) -> Any:
        out, lse = _vsa_forward(a, a["q"], a["k"], a["v"])
        return out, (lse / LN2).float()

    def triton_backward(a: dict[str, Any]) -> Any:
        lse = a["M"]
        check_lse(lse, *a["q"].shape[:3])
        inputs = (a[name] for name in ("grad_output", "q", "k", "v", "o"))
        return _vsa_backward(a, *inputs, lse.double() * LN2)

    def sm90(a: dict[str, Any]) -> Any:
        q = a["q_padded"]
        _check_sm90(a, q)
        out, lse = _vsa_forward(a, q, a["k_padded"], a["v_padded"])
        return out, (-(q.shape[-1] ** 0.5) * lse).float().unsqueeze(-1)

    def sm90_backward(a: dict[str, Any]) -> Any:
        q, lse = a["q_padded"], a["lse_padded"]
        _check_sm90(a, q)
        check_lse(lse, *q.shape[:3], 1)
        names = ("grad_output_padded", "q_padded", "k_padded", "v_padded", "o_padded")
        natural = lse.squeeze(-1).double() * -(q.shape[-1] ** -0.5)
        return _vsa_backward(a, *(a[name] for name in names), natural)

    bodies = {
        "block_sparse_attn_triton": triton,
        "block_sparse_attn_backward_triton": triton_backward,
        "block_sparse_attn_sm90": sm90,
        "block_sparse_attn_backward_sm90": sm90_backward,
    }
    return {name: CustomOperator(function("vsa", name, body)) for name, body in bodies.items()}


def sparse(flashinfer: str = "flashinfer") -> dict[str, dict[str, Any]]:
    """Libraries of sparse masks; ``flashinfer`` is the file of its signatures."""
    ops = {"block_sparse_fwd": object(), "block_sparse_bwd": object()}
    return {
        "flashinfer": _flashinfer(flashinfer),
        "flashmask": {},
        "interface_torch": _flashmask(),
        "fastvideo_kernel.block_sparse_attn": _vsa(),
        "fastvideo_kernel._C.fastvideo_kernel_ops": ops,
    }
