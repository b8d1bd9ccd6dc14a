"""Stand-ins of attention libraries: their signatures, and what they document, densely in float64.

Each body follows the library's own layouts, alignments, bases and values for queries that see
nothing, and refuses what the library refuses or misreads.  Nothing here knows the adapters.

Legend: S queries, T keys, H query heads, G key/value heads, D head dim; N tokens end to end.
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
from library_signatures import Hidden, function

HALF = (torch.bfloat16, torch.float16)
LN2 = math.log(2)
NAN = float("nan")


def attend(
    q_SHD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, times: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[S, H, D]`` and lse ``[H, S]``, natural; ``times`` ``[S, T]`` or ``[H, S, T]`` counts
    how often a key is seen.  Rows that see nothing: 0 and -inf."""
    s, v = _scores(q_SHD, k_TGD, times, scale), _wide(v_TGD, q_SHD)
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
    """dq, dk, dv from somebody's out and lse."""
    dout, out, wide_k, wide_v = dout.double(), out.double(), _wide(k, q), _wide(v, q)
    p = torch.exp(_scores(q, k, times, scale) - lse_HS.double().unsqueeze(-1))
    delta = (dout * out).sum(-1).T.unsqueeze(-1)
    ds = p * (torch.einsum("shd,thd->hst", dout, wide_v) - delta) * scale
    dq = torch.einsum("hst,thd->shd", ds, wide_k)
    dk = torch.einsum("hst,shd->thd", ds, q.double())
    dv = torch.einsum("hst,shd->thd", p, dout)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def _wide(x_TGD: torch.Tensor, q_SHD: torch.Tensor) -> torch.Tensor:
    return x_TGD.double().repeat_interleave(q_SHD.shape[1] // x_TGD.shape[1], 1)


def _scores(q: torch.Tensor, k: torch.Tensor, times: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.einsum("shd,thd->hst", q.double(), _wide(k, q)) * scale + times.double().log()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **wanted: Any) -> None:
    """What every library asks of its inputs."""
    assert q.dtype == k.dtype == v.dtype, "one dtype"
    assert q.dtype in wanted.get("dtypes", HALF), f"not for {q.dtype}"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "a contiguous last axis"
    if wanted.get("contiguous"):
        assert all(x.is_contiguous() for x in (q, k, v)), "contiguous"
    assert k.shape == v.shape
    dim = q.shape[-1]
    assert dim % 8 == 0
    assert dim <= wanted.get("dim", 256)


def check_lse(lse: torch.Tensor, *shape: int) -> None:
    assert lse.dtype == torch.float32, "lse in float32"
    assert lse.is_contiguous(), "the kernel takes no strides of the lse"
    assert lse.shape == shape, f"lse is {list(lse.shape)}, read as {shape}"


def window(S: int, T: int, left: int, right: int, corner: int) -> torch.Tensor:
    """``[S, T]``: ``-left <= j - i - corner <= right``, negative bounds are none."""
    offset = torch.arange(T)[None] - torch.arange(S)[:, None] - corner
    seen = torch.ones(S, T, dtype=torch.bool)
    if left >= 0:
        seen &= offset >= -left
    if right >= 0:
        seen &= offset <= right
    return seen


def documents(cu_q: torch.Tensor, cu_k: torch.Tensor) -> list[tuple[slice, slice]]:
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    assert len(cu_q) == len(cu_k)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in ends]


# --- FlashAttention ---------------------------------------------------------------------------


def _parts(a: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Where each batch's or document's queries, keys and lse are, and its extents."""
    if a.get("cu_seqlens_q") is None:
        return [(b, b, b) for b in range(len(a["q"]))]
    found = documents(a["cu_seqlens_q"], a["cu_seqlens_k"])
    assert a["max_seqlen_q"] >= max(q.stop - q.start for q, _ in found)
    assert a["max_seqlen_k"] >= max(k.stop - k.start for _, k in found)
    return [(q, k, (slice(None), q)) for q, k in found]


def _flash_2_window(S: int, T: int, a: dict[str, Any]) -> torch.Tensor:
    """As flash_api.cpp and set_params_fprop have it, mistakes included."""
    most = a["max_seqlen_k"] if a.get("cu_seqlens_k") is not None else T
    left, right = a["window_size_left"], a["window_size_right"]
    left, right = (-1 if bound >= most else bound for bound in (left, right))
    if a["causal"]:
        right = 0
    if left < 0 <= right:
        left = most
    if right < 0 <= left:
        right = most
    return window(S, T, left, right, T - S)


def _flash_3_window(S: int, T: int, a: dict[str, Any]) -> torch.Tensor:
    varlen = a.get("cu_seqlens_k") is not None
    most_q, most_k = (a["max_seqlen_q"], a["max_seqlen_k"]) if varlen else (S, T)
    left, right = a.get("window_size") or (a["window_size_left"], a["window_size_right"])
    left = -1 if left >= most_k - 1 else left
    right = -1 if right >= most_q - 1 else right
    causal = a["is_causal"] if "is_causal" in a else a["causal"]
    return window(S, T, left, 0 if causal else right, T - S)


def flash_forward(a: dict[str, Any], seen: Any, blind: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = a["q"], a["k"], a["v"]
    check(q, k, v)
    assert isinstance(a["softmax_scale"], float)
    dense = a.get("cu_seqlens_q") is None
    shape = (len(q), q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])
    out, lse = torch.full_like(q, NAN), torch.full(shape, NAN)
    for at_q, at_k, at_lse in _parts(a):
        S, T = len(q[at_q]), len(k[at_k])
        o, found = attend(q[at_q], k[at_k], v[at_k], seen(S, T, a), a["softmax_scale"])
        out[at_q] = o.to(q.dtype)
        lse[at_lse] = found.masked_fill(found == -torch.inf, blind).float()
    return out, lse


def flash_backward(a: dict[str, Any], seen: Any) -> torch.Tensor:
    q, k, v, out, lse = (a[name] for name in ("q", "k", "v", "out", "softmax_lse"))
    check(q, k, v)
    dense = a.get("cu_seqlens_q") is None
    check_lse(lse, *((len(q), q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])))
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        into = a[name]
        assert into is not None, "without a buffer the gradient is lost"
        assert (into.shape, into.dtype, into.stride(-1)) == (x.shape, x.dtype, 1)
    assert out.shape == a["dout"].shape == q.shape
    assert out.dtype == a["dout"].dtype == q.dtype
    for at_q, at_k, at_lse in _parts(a):
        S, T = len(q[at_q]), len(k[at_k])
        safe = lse[at_lse].masked_fill(lse[at_lse] == -torch.inf, 0.0)  # as the kernels do
        grads = differentiate(
            a["dout"][at_q], q[at_q], k[at_k], v[at_k], out[at_q], safe, seen(S, T, a),
            a["softmax_scale"],
        )  # fmt: skip
        for into, at, x in zip(("dq", "dk", "dv"), (at_q, at_k, at_k), grads, strict=True):
            a[into][at] = x.to(q.dtype)
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
    return {name: Hidden(function("flash_attn_2", name, body)) for name, body in bodies.items()}


def _flash_attn_3(tag: bool) -> dict[str, Any]:
    file = "flash_attn_3_tag" if tag else "flash_attn_3"

    def forward(a: dict[str, Any]) -> Any:
        nothing = torch.empty(0)
        return (*flash_forward(a, _flash_3_window, -torch.inf), nothing, nothing)

    def backward(a: dict[str, Any]) -> Any:
        softmax_d = flash_backward(a, _flash_3_window)
        return (a["dq"], a["dk"], a["dv"], softmax_d) if tag else softmax_d

    bodies = {"_flash_attn_forward": forward, "_flash_attn_backward": backward}
    made = {name: function(file, name, body) for name, body in bodies.items()}
    return made if tag else {name: Hidden(call) for name, call in made.items()}


# --- TransformerEngine ------------------------------------------------------------------------


class FusedAttnBackend(IntEnum):
    No_Backend = -1
    F16_arbitrary_seqlen = 1
    FP8 = 2


def _te_parts(a: dict[str, Any]) -> list[tuple[Any, Any, torch.Tensor]]:
    q, k = a["q"], a["k"]
    check(q, k, a["v"], contiguous=True)
    assert a["fake_dtype"] == q.dtype
    assert a["fused_attention_backend"] == FusedAttnBackend.F16_arbitrary_seqlen
    assert a["dropout"] == 0.0
    form = "thd" if q.ndim == 3 else "bshd"
    assert a["qkv_layout"] == f"{form}_{form}_{form}", "the layout that the tensors have"
    assert a["o_format"] == form
    kind, (left, right) = a["attn_mask_type"], a["window_size"]
    assert ("padding" in kind) == (form == "thd"), "thd needs a padding mask"
    if "causal" in kind:
        assert (left, right) == (-1, 0) or (left >= 0 and right == 0)
    else:
        assert (left, right) == (-1, -1) or min(left, right) >= 0
    spans = documents(a["cu_seqlens_q"], a["cu_seqlens_kv"])
    longest = [max(s.stop - s.start for s in some) for some in zip(*spans, strict=True)]
    assert longest == [a["max_seqlen_q"], a["max_seqlen_kv"]]
    if max(left, right) >= 0:
        assert longest[0] <= longest[1], "a window needs as many keys as queries"
    bottom = "bottom_right" in kind or ("causal" not in kind and a["bottom_right_diagonal"])
    found = []
    for n, (at_q, at_k) in enumerate(spans):
        S, T = at_q.stop - at_q.start, at_k.stop - at_k.start
        seen = window(S, T, left, right, T - S if bottom else 0)
        found.append((at_q, at_k, seen) if form == "thd" else (n, n, seen))
    return found


def _transformer_engine() -> dict[str, Any]:
    def forward(a: dict[str, Any]) -> Any:
        q, parts = a["q"], _te_parts(a)
        thd = q.ndim == 3
        out = torch.zeros_like(q) if thd else torch.full_like(q, NAN)
        shape = (*q.shape[:2], 1) if thd else (len(q), q.shape[2], q.shape[1], 1)
        stats = torch.full(shape, NAN)
        for at_q, at_k, seen in parts:
            o, lse = attend(q[at_q], a["k"][at_k], a["v"][at_k], seen, a["attn_scale"])
            out[at_q] = o.to(q.dtype)
            lse = lse.masked_fill(lse == -torch.inf, NAN).float()  # not documented
            stats[at_q] = (lse.T if thd else lse).unsqueeze(-1)
        return out, [stats, torch.zeros(2, dtype=torch.int64)]

    def backward(a: dict[str, Any]) -> Any:
        q, parts = a["q"], _te_parts(a)
        thd = q.ndim == 3
        stats, seed = a["aux_ctx_tensors"]
        check_lse(stats, *((*q.shape[:2], 1) if thd else (len(q), q.shape[2], q.shape[1], 1)))
        assert (seed.shape, seed.dtype) == ((2,), torch.int64)
        assert a["do_format"] == a["o_format"]
        assert a["dqkv_layout"] == a["qkv_layout"]
        assert a["o"].is_contiguous()
        assert a["d_o"].is_contiguous()
        grads = [torch.zeros_like(x) for x in (q, a["k"], a["v"])]
        for at_q, at_k, seen in parts:
            lse = stats[at_q].squeeze(-1)
            found = differentiate(
                a["d_o"][at_q], q[at_q], a["k"][at_k], a["v"][at_k], a["o"][at_q],
                lse.T if thd else lse, seen, a["attn_scale"],
            )  # fmt: skip
            for into, at, x in zip(grads, (at_q, at_k, at_k), found, strict=True):
                into[at] = x.to(q.dtype)
        return (*grads, None, None)

    bodies = {"fused_attn_fwd": forward, "fused_attn_bwd": backward}
    made = {name: function("transformer_engine", name, body) for name, body in bodies.items()}
    return {**made, "FusedAttnBackend": FusedAttnBackend}


# --- MagiAttention ----------------------------------------------------------------------------


def _magi_times(a: dict[str, Any]) -> torch.Tensor:
    """``[N, T]``, how often each pair is in a rectangle."""
    q, k, types = a["q"], a["k"], a["attn_type_map"]
    check(q, k, a["v"], dim=128)
    assert q.ndim == 3, "tokens end to end"
    for x in (a["q_ranges"], a["k_ranges"], types):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    times = torch.zeros(len(q), len(k), dtype=torch.int64)
    for (q0, q1), (k0, k1), code in zip(
        a["q_ranges"].tolist(), a["k_ranges"].tolist(), types.tolist(), strict=True
    ):
        S, T = q1 - q0, k1 - k0
        up_to = window(S, T, -1, 0 if code in (1, 3) else -1, T - S)
        since = window(S, T, 0 if code in (2, 3) else -1, -1, 0)
        times[q0:q1, k0:k1] += (up_to & since).long()
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
        safe = lse.masked_fill(lse == -torch.inf, 0.0).T
        grads = differentiate(
            a["dout"], q, a["k"], a["v"], a["out"], safe, _magi_times(a), a["softmax_scale"]
        )
        return (*(x.float() for x in grads), None)

    return {
        "flex_flash_attn_func": function("magi_attention", "flex_flash_attn_func", forward),
        "_flex_flash_attn_backward": function(
            "magi_attention", "_flex_flash_attn_backward", backward
        ),
    }


# --- installation -----------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules of these names and contents, and the packages above them, where imports look."""
    for name, contents in modules.items():
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            path = ".".join(parts[:n])
            if path not in sys.modules or n == len(parts):
                module = ModuleType(path)
                module.__spec__ = ModuleSpec(path, None, is_package=n < len(parts))
                monkeypatch.setitem(sys.modules, path, module)
        vars(sys.modules[name]).update(contents)


def dense(tag: bool = False) -> dict[str, dict[str, Any]]:
    """Libraries of dense attention and of masks as rectangles; ``tag`` is FlashAttention-3's other
    API."""
    te = "transformer_engine.pytorch.cpp_extensions.fused_attn"
    return {
        "flash_attn.flash_attn_interface": _flash_attn_2(),
        "flash_attn_interface": _flash_attn_3(tag),
        te: _transformer_engine(),
        "magi_attention.functional.flex_flash_attn": _magi_attention(),
    }
