"""Stand-ins of libraries of sequence mixers: their signatures and documented results, in float64.

Each computes the recurrence token by token, and refuses what the library refuses.
"""

from __future__ import annotations

import itertools
from typing import Any

import naive_mixers
import torch
from library_signatures import function

HALF = (torch.bfloat16, torch.float16)
CHUNKED = {
    "linear": ("linear_attn", "chunk_linear_attn"),
    "retention": ("retention", "chunk_retention"),
    "ssd": ("simple_gla", "chunk_simple_gla"),
    "gla": ("gla", "chunk_gla"),
    "deltanet": ("delta_rule", "chunk_delta_rule"),
    "gated_deltanet": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("kda", "chunk_kda"),
}
NAIVE = {
    "linear": ("linear_attn.naive", "naive_chunk_linear_attn"),
    "retention": ("retention.naive", "naive_retention"),
    "ssd": ("simple_gla.naive", "naive_chunk_simple_gla"),
    "gla": ("gla.naive", "naive_recurrent_gla"),
    "deltanet": ("delta_rule.naive", "delta_rule_chunkwise"),
    "gated_deltanet": ("gated_delta_rule.naive", "naive_chunk_gated_delta_rule"),
    "kda": ("kda.naive", "naive_chunk_kda"),
}
MULTIPLES = {"linear": 64, "deltanet": 32, "kda": 64}  # of tokens, in the functions in torch
STATELESS = ("linear", "retention")  # of those
HEADS_FIRST = ("retention", "deltanet")


def mix(
    x: naive_mixers.Named, mixer: str, scale: float | None, starts: tuple[int, ...] = (0,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the last state by the recurrence, with the decays of RetNet for ``retention``."""
    batch, _, heads, key_dim = x["q"].shape
    x = {**x, "initial_state": torch.zeros(batch, heads, key_dim, x["v"].shape[3])}
    if mixer == "retention":
        decays = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads).double())))
        x["g"] = decays.expand(x["q"].shape[:3])
    return naive_mixers.recurrence(x, mixer, key_dim**-0.5 if scale is None else scale, starts)


def _named(a: dict[str, Any], mixer: str) -> naive_mixers.Named:
    names = ["q", "k", "v"]
    names += ["beta"] if mixer in naive_mixers.DELTA else []
    x = {name: a[name] for name in names}
    if mixer in ("ssd", "gla", "gated_deltanet", "kda"):
        x["g"] = a["gk"] if "gk" in a else a["g"]
    return x


def _naive(mixer: str) -> Any:
    def body(a: dict[str, Any]) -> Any:
        x = _named(a, mixer)
        if mixer in HEADS_FIRST:
            x = {name: y.transpose(1, 2) for name, y in x.items()}
        assert x["q"].shape[1] % MULTIPLES.get(mixer, 1) == 0, "whole chunks"
        out, state = mix(x, mixer, a.get("scale"))
        out = out.transpose(1, 2) if mixer in HEADS_FIRST else out
        out = out.to(x["q"].dtype if mixer in ("gla", "kda", "retention") else torch.float32)
        if mixer in STATELESS:
            return out
        return out, state.float() if a.get("output_final_state", True) else None

    return function("fla", NAIVE[mixer][1], body)


def _chunked(mixer: str) -> Any:
    def body(a: dict[str, Any]) -> Any:
        assert not a.get("kwargs"), f"not known: {a['kwargs']}"
        assert not a.get("normalize"), "without the normaliser"
        x = _named(a, mixer)
        assert x["q"].dtype == x["k"].dtype == x["v"].dtype
        assert x["q"].dtype in HALF
        assert a["g_gamma"] is None if "g_gamma" in a else True
        cu = a["cu_seqlens"]
        if cu is None:
            out, state = mix(x, mixer, a["scale"])
        else:
            assert len(x["q"]) == 1, "one flattened sequence"
            assert cu.dtype == torch.int64
            assert int(cu[-1]) == x["q"].shape[1]
            runs = [
                mix({n: y[:, i:j] for n, y in x.items()}, mixer, a["scale"])
                for i, j in itertools.pairwise(cu.tolist())
            ]
            outs, states = zip(*runs, strict=True)
            out, state = torch.cat(outs, 1), torch.cat(states)
        return out.to(x["v"].dtype), state.float() if a["output_final_state"] else None

    return function("fla", CHUNKED[mixer][1], body)


def _mamba(a: dict[str, Any]) -> Any:
    x, dt, A, B, C = (a[name] for name in ("x", "dt", "A", "B", "C"))
    batch, tokens, heads, _ = x.shape
    assert dt.shape == (batch, tokens, heads)
    assert A.shape == (heads,)
    assert C.shape == B.shape
    assert heads % B.shape[2] == 0
    assert all(a[name] is None for name in ("D", "z", "dt_bias", "initial_states", "cu_seqlens"))
    assert not a["dt_softplus"]
    assert not a["return_varlen_states"]
    assert bool((dt >= 0).all()), "dt_limit"
    assert bool(x.isfinite().all())
    starts = (0,)
    if (documents := a["seq_idx"]) is not None:
        assert documents.shape == (batch, tokens)
        assert documents.dtype == torch.int32
        assert documents.is_contiguous()
        starts = (0, *(documents[0].diff().nonzero().flatten() + 1).tolist())
    repeat = heads // B.shape[2]
    named = {
        "q": C.repeat_interleave(repeat, 2),
        "k": B.repeat_interleave(repeat, 2),
        "v": x.double() * dt.double().unsqueeze(-1),
        "g": dt.double() * A,
    }
    out, state = mix(named, "ssd", 1.0, starts)
    found = (out.to(x.dtype), state.mT.contiguous().float())
    return found if a["return_final_states"] else found[0]


def modules() -> dict[str, dict[str, Any]]:
    """The contents of the modules of all libraries, for ``library_stand_ins.install``."""
    found: dict[str, dict[str, Any]] = {}
    for make, places in ((_chunked, CHUNKED), (_naive, NAIVE)):
        for mixer, (module, name) in places.items():
            found.setdefault(f"fla.ops.{module}", {})[name] = make(mixer)
    call = function("mamba_ssm", "mamba_chunk_scan_combined", _mamba)
    found["mamba_ssm.ops.triton.ssd_combined"] = {"mamba_chunk_scan_combined": call}
    return found
