"""Stand-ins of attention libraries: their signatures and documented results, in dense float64.

Each function follows the layouts, alignments, bases and values for queries that see nothing of the
library, and refuses what the library refuses or misreads.  They are independent of the adapters.

Legend: S queries, T keys, H query heads, G key/value heads, D head dim; N concatenated tokens.
"""

from __future__ import annotations

import math
import sys
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from library_signatures import CustomOperator, function

HALF = (torch.bfloat16, torch.float16)
LN2 = math.log(2)
NAN = float("nan")


def attend(
    q_SHD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, times: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out ``[S, H, D]`` and lse ``[H, S]``, natural; 0 and -inf for rows that see nothing.

    Args:
        times: ``[S, T]`` or ``[H, S, T]``, how often each pair counts.
    """
    s, v = _scores(q_SHD, k_TGD, times, scale), _repeat_heads(v_TGD, q_SHD)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return torch.einsum("hst,thd->shd", p, v), lse


def differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_HS: torch.Tensor,
    times: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk, dv, from given out and lse."""
    dout, out = dout.double(), out.double()
    repeated_k, repeated_v = _repeat_heads(k, q), _repeat_heads(v, q)
    p = torch.exp(_scores(q, k, times, scale) - lse_HS.double().unsqueeze(-1))
    delta = (dout * out).sum(-1).T.unsqueeze(-1)
    ds = p * (torch.einsum("shd,thd->hst", dout, repeated_v) - delta) * scale
    dq = torch.einsum("hst,thd->shd", ds, repeated_k)
    dk = torch.einsum("hst,shd->thd", ds, q.double())
    dv = torch.einsum("hst,shd->thd", p, dout)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _repeat_heads(x_TGD: torch.Tensor, q_SHD: torch.Tensor) -> torch.Tensor:
    return x_TGD.double().repeat_interleave(q_SHD.shape[1] // x_TGD.shape[1], 1)


def _scores(q: torch.Tensor, k: torch.Tensor, times: torch.Tensor, scale: float) -> torch.Tensor:
    products = torch.einsum("shd,thd->hst", q.double(), _repeat_heads(k, q))
    return products * scale + times.double().log()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **limits: Any) -> None:
    """Assert the requirements of every library on its inputs."""
    assert q.dtype == k.dtype == v.dtype, "one dtype"
    assert q.dtype in limits.get("dtypes", HALF), f"not for {q.dtype}"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "a contiguous last axis"
    if limits.get("contiguous"):
        assert all(x.is_contiguous() for x in (q, k, v)), "contiguous"
    assert k.shape == v.shape
    dim = q.shape[-1]
    assert dim % 8 == 0
    assert dim <= limits.get("dim", 256)


def check_lse(lse: torch.Tensor, *shape: int) -> None:
    """Assert the requirements on an lse that is passed to a backward kernel."""
    assert lse.dtype == torch.float32, "lse in float32"
    assert lse.is_contiguous(), "the kernel takes no strides of the lse"
    assert lse.shape == shape, f"lse is {list(lse.shape)}, read as {shape}"


def window(S: int, T: int, left: int, right: int, corner: int) -> torch.Tensor:
    """``[S, T]`` booleans: ``-left <= j - i - corner <= right``; a negative bound is none."""
    offset = torch.arange(T)[None] - torch.arange(S)[:, None] - corner
    visible = torch.ones(S, T, dtype=torch.bool)
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible


def documents(cu_q: torch.Tensor, cu_k: torch.Tensor) -> list[tuple[slice, slice]]:
    """Queries and keys of each document, from cumulative lengths."""
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    assert len(cu_q) == len(cu_k)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in ends]


# --- FlashAttention ---------------------------------------------------------------------------


def _sequences(a: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Indices of the queries, keys and lse of each batch or document."""
    if a.get("cu_seqlens_q") is None:
        return [(b, b, b) for b in range(len(a["q"]))]
    spans = documents(a["cu_seqlens_q"], a["cu_seqlens_k"])
    assert a["max_seqlen_q"] >= max(q.stop - q.start for q, _ in spans)
    assert a["max_seqlen_k"] >= max(k.stop - k.start for _, k in spans)
    return [(q, k, (slice(None), q)) for q, k in spans]


def _flash_2_window(S: int, T: int, a: dict[str, Any]) -> torch.Tensor:
    """The window as in flash_api.cpp and set_params_fprop, including their mistakes."""
    max_k = a["max_seqlen_k"] if a.get("cu_seqlens_k") is not None else T
    left, right = a["window_size_left"], a["window_size_right"]
    left, right = (-1 if bound >= max_k else bound for bound in (left, right))
    if a["causal"]:
        right = 0
    if left < 0 <= right:
        left = max_k
    if right < 0 <= left:
        right = max_k
    return window(S, T, left, right, T - S)


def _flash_3_window(S: int, T: int, a: dict[str, Any]) -> torch.Tensor:
    varlen = a.get("cu_seqlens_k") is not None
    max_q, max_k = (a["max_seqlen_q"], a["max_seqlen_k"]) if varlen else (S, T)
    left, right = a.get("window_size") or (a["window_size_left"], a["window_size_right"])
    left = -1 if left >= max_k - 1 else left
    right = -1 if right >= max_q - 1 else right
    causal = a["is_causal"] if "is_causal" in a else a["causal"]
    return window(S, T, left, 0 if causal else right, T - S)


def flash_forward(
    a: dict[str, Any], visible: Any, empty_lse: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass of FlashAttention.

    Args:
        a: arguments of the call, by name.
        visible: computes the visible pairs from S, T and the arguments.
        empty_lse: the library's lse of rows that see nothing.
    """
    q, k, v = a["q"], a["k"], a["v"]
    check(q, k, v)
    assert isinstance(a["softmax_scale"], float)
    dense = a.get("cu_seqlens_q") is None
    shape = (len(q), q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])
    out, lse = torch.full_like(q, NAN), torch.full(shape, NAN)
    for at_q, at_k, at_lse in _sequences(a):
        S, T = len(q[at_q]), len(k[at_k])
        o, o_lse = attend(q[at_q], k[at_k], v[at_k], visible(S, T, a), a["softmax_scale"])
        out[at_q] = o.to(q.dtype)
        lse[at_lse] = o_lse.masked_fill(o_lse == -torch.inf, empty_lse).float()
    return out, lse


def flash_backward(a: dict[str, Any], visible: Any) -> torch.Tensor:
    """The backward pass of FlashAttention, into buffers; see :func:`flash_forward`."""
    q, k, v, out, lse = (a[name] for name in ("q", "k", "v", "out", "softmax_lse"))
    check(q, k, v)
    dense = a.get("cu_seqlens_q") is None
    check_lse(lse, *((len(q), q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])))
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        buffer = a[name]
        assert buffer is not None, "without a buffer the gradient is lost"
        assert (buffer.shape, buffer.dtype, buffer.stride(-1)) == (x.shape, x.dtype, 1)
    assert out.shape == a["dout"].shape == q.shape
    assert out.dtype == a["dout"].dtype == q.dtype
    for at_q, at_k, at_lse in _sequences(a):
        S, T = len(q[at_q]), len(k[at_k])
        finite_lse = lse[at_lse].masked_fill(lse[at_lse] == -torch.inf, 0.0)  # as the kernels do
        grads = differentiate(
            a["dout"][at_q], q[at_q], k[at_k], v[at_k], out[at_q], finite_lse, visible(S, T, a),
            a["softmax_scale"],
        )  # fmt: skip
        for name, at, grad in zip(("dq", "dk", "dv"), (at_q, at_k, at_k), grads, strict=True):
            a[name][at] = grad.to(q.dtype)
    return torch.zeros(1)  # softmax_d


def _flash_attn_2() -> dict[str, Any]:
    def forward(a: dict[str, Any]) -> Any:
        assert a["dropout_p"] == 0.0
        return (*flash_forward(a, _flash_2_window, torch.inf), torch.empty(0), torch.zeros(2))

    def backward(a: dict[str, Any]) -> Any:
        return flash_backward(a, _flash_2_window)

    bodies = {
        "_flash_attn_forward": forward,
        "_flash_attn_varlen_forward": forward,
        "_flash_attn_backward": backward,
        "_flash_attn_varlen_backward": backward,
    }
    return {
        name: CustomOperator(function("flash_attn_2", name, body)) for name, body in bodies.items()
    }


def _flash_attn_3(tag: bool) -> dict[str, Any]:
    file = "flash_attn_3_tag" if tag else "flash_attn_3"

    def forward(a: dict[str, Any]) -> Any:
        empty = torch.empty(0)
        return (*flash_forward(a, _flash_3_window, -torch.inf), empty, empty)

    def backward(a: dict[str, Any]) -> Any:
        softmax_d = flash_backward(a, _flash_3_window)
        return (a["dq"], a["dk"], a["dv"], softmax_d) if tag else softmax_d

    bodies = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
    functions = {name: function(file, name, body) for name, body in bodies.items()}
    return functions if tag else {name: CustomOperator(call) for name, call in functions.items()}


# --- TransformerEngine ------------------------------------------------------------------------


class FusedAttnBackend(IntEnum):
    No_Backend = -1
    F16_arbitrary_seqlen = 1
    FP8 = 2


def _te_sequences(a: dict[str, Any]) -> list[tuple[Any, Any, torch.Tensor]]:
    """Indices of the queries and keys of each batch or document, and the visible pairs."""
    q, k = a["q"], a["k"]
    check(q, k, a["v"], contiguous=True)
    assert a["fake_dtype"] == q.dtype
    assert a["fused_attention_backend"] == FusedAttnBackend.F16_arbitrary_seqlen
    assert a["dropout"] == 0.0
    layout = "thd" if q.ndim == 3 else "bshd"
    assert a["qkv_layout"] == f"{layout}_{layout}_{layout}", "the layout of the tensors"
    assert a["o_format"] == layout
    mask_type, (left, right) = a["attn_mask_type"], a["window_size"]
    assert ("padding" in mask_type) == (layout == "thd"), "thd needs a padding mask"
    if "causal" in mask_type:
        assert (left, right) == (-1, 0) or (left >= 0 and right == 0)
    else:
        assert (left, right) == (-1, -1) or min(left, right) >= 0
    spans = documents(a["cu_seqlens_q"], a["cu_seqlens_kv"])
    longest = [max(s.stop - s.start for s in tokens) for tokens in zip(*spans, strict=True)]
    assert longest == [a["max_seqlen_q"], a["max_seqlen_kv"]]
    if max(left, right) >= 0:
        assert longest[0] <= longest[1], "a window needs as many keys as queries"
    if "causal" in mask_type:
        bottom_right = "bottom_right" in mask_type
    else:
        bottom_right = a["bottom_right_diagonal"]
    sequences = []
    for n, (at_q, at_k) in enumerate(spans):
        S, T = at_q.stop - at_q.start, at_k.stop - at_k.start
        visible = window(S, T, left, right, T - S if bottom_right else 0)
        sequences.append((at_q, at_k, visible) if layout == "thd" else (n, n, visible))
    return sequences


def _transformer_engine() -> dict[str, Any]:
    def forward(a: dict[str, Any]) -> Any:
        q, sequences = a["q"], _te_sequences(a)
        thd = q.ndim == 3
        out = torch.zeros_like(q) if thd else torch.full_like(q, NAN)
        shape = (*q.shape[:2], 1) if thd else (len(q), q.shape[2], q.shape[1], 1)
        stats = torch.full(shape, NAN)
        for at_q, at_k, visible in sequences:
            o, lse = attend(q[at_q], a["k"][at_k], a["v"][at_k], visible, a["attn_scale"])
            out[at_q] = o.to(q.dtype)
            lse = lse.masked_fill(lse == -torch.inf, NAN).float()  # not documented
            stats[at_q] = (lse.T if thd else lse).unsqueeze(-1)
        return out, [stats, torch.zeros(2, dtype=torch.int64)]

    def backward(a: dict[str, Any]) -> Any:
        q, sequences = a["q"], _te_sequences(a)
        thd = q.ndim == 3
        stats, seed = a["aux_ctx_tensors"]
        check_lse(stats, *((*q.shape[:2], 1) if thd else (len(q), q.shape[2], q.shape[1], 1)))
        assert (seed.shape, seed.dtype) == ((2,), torch.int64)
        assert a["do_format"] == a["o_format"]
        assert a["dqkv_layout"] == a["qkv_layout"]
        assert a["o"].is_contiguous()
        assert a["d_o"].is_contiguous()
        grads = [torch.zeros_like(x) for x in (q, a["k"], a["v"])]
        for at_q, at_k, visible in sequences:
            lse = stats[at_q].squeeze(-1)
            sequence_grads = differentiate(
                a["d_o"][at_q], q[at_q], a["k"][at_k], a["v"][at_k], a["o"][at_q],
                lse.T if thd else lse, visible, a["attn_scale"],
            )  # fmt: skip
            for total, at, grad in zip(grads, (at_q, at_k, at_k), sequence_grads, strict=True):
                total[at] = grad.to(q.dtype)
        return (*grads, None, None)

    bodies = {"fused_attn_fwd": forward, "fused_attn_bwd": backward}
    functions = {name: function("transformer_engine", name, body) for name, body in bodies.items()}
    return {**functions, "FusedAttnBackend": FusedAttnBackend}


# --- MagiAttention ----------------------------------------------------------------------------


def _magi_times(a: dict[str, Any]) -> torch.Tensor:
    """``[N, T]``: how many rectangles contain each pair."""
    q, k, types = a["q"], a["k"], a["attn_type_map"]
    check(q, k, a["v"], dim=128)
    assert q.ndim == 3, "concatenated tokens"
    for x in (a["q_ranges"], a["k_ranges"], types):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    times = torch.zeros(len(q), len(k), dtype=torch.int64)
    for (q0, q1), (k0, k1), code in zip(
        a["q_ranges"].tolist(), a["k_ranges"].tolist(), types.tolist(), strict=True
    ):
        S, T = q1 - q0, k1 - k0
        causal = window(S, T, -1, 0 if code in (1, 3) else -1, T - S)
        inverse_causal = window(S, T, 0 if code in (2, 3) else -1, -1, 0)
        times[q0:q1, k0:k1] += (causal & inverse_causal).long()
    return times


def _magi_attention() -> dict[str, Any]:
    def forward(a: dict[str, Any]) -> Any:
        q, scale = a["q"], a["softmax_scale"]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = attend(q, a["k"], a["v"], _magi_times(a), scale)
        return out.to(q.dtype), SimpleNamespace(lse=lse.T.contiguous().float(), max_logits=None)

    def backward(a: dict[str, Any]) -> Any:
        q, lse = a["q"], a["lse"]
        assert a["out"].dtype == a["dout"].dtype == q.dtype
        check_lse(lse, *q.shape[:2])
        assert a["dq"] is a["dk"] is a["dv"] is None
        assert a["dq_type"] == a["dk_type"] == a["dv_type"] == torch.float32
        finite_lse = lse.masked_fill(lse == -torch.inf, 0.0).T
        grads = differentiate(
            a["dout"], q, a["k"], a["v"], a["out"], finite_lse, _magi_times(a), a["softmax_scale"]
        )
        return (*(grad.float() for grad in grads), None)

    return {
        "flex_flash_attn_func": function("magi_attention", "flex_flash_attn_func", forward),
        "_flex_flash_attn_backward": function(
            "magi_attention", "_flex_flash_attn_backward", backward
        ),
    }


# --- installation -----------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Add modules of these names and contents, and their parent packages, to ``sys.modules``."""
    for name, contents in modules.items():
        names = name.split(".")
        for n in range(1, len(names) + 1):
            path = ".".join(names[:n])
            if path not in sys.modules or n == len(names):
                module = ModuleType(path)
                module.__spec__ = ModuleSpec(path, None, is_package=n < len(names))
                monkeypatch.setitem(sys.modules, path, module)
        vars(sys.modules[name]).update(contents)


def dense(tag: bool = False) -> dict[str, dict[str, Any]]:
    """Libraries of dense attention and of masks as rectangles; ``tag`` selects the older API of
    FlashAttention-3."""
    te = "transformer_engine.pytorch.cpp_extensions.fused_attn"
    return {
        "flash_attn.flash_attn_interface": _flash_attn_2(),
        "flash_attn_interface": _flash_attn_3(tag),
        te: _transformer_engine(),
        "magi_attention.functional.flex_flash_attn": _magi_attention(),
    }
