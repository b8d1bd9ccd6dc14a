"""A stand-in of the FlashAttention-2 in torch, bound by the schemas of its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_stand_ins import _flash_2_window, flash_backward, flash_forward


def _bound(name: str, body: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function that takes the arguments of ``torch.ops.aten.NAME`` as its schema says."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    known = {argument.name for argument in arguments}

    def call(*args: Any, **kwargs: Any) -> Any:
        assert len(args) == len(positional), f"{name} takes {', '.join(positional)}"
        assert kwargs.keys() <= known - set(positional), kwargs.keys()
        return body({**dict(zip(positional, args, strict=True)), **kwargs})

    return call


def _as_library(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the package flash-attn."""
    assert a["dropout_p"] == 0.0
    assert not a["is_causal"]
    bound = {key: -1 if a[key] is None else a[key] for key in ("window_size_left",
                                                              "window_size_right")}  # fmt: skip
    return {
        "q": a["query"], "k": a["key"], "v": a["value"], "softmax_scale": a["scale"],
        "cu_seqlens_q": a["cum_seq_q"], "cu_seqlens_k": a["cum_seq_k"],
        "max_seqlen_q": a["max_q"], "max_seqlen_k": a["max_k"], "causal": False, **bound,
    }  # fmt: skip


def _forward(a: dict[str, Any]) -> Any:
    out, lse = flash_forward(_as_library(a), _flash_2_window, torch.inf)
    return out, lse, torch.zeros(2), torch.empty(()), torch.empty(0)


def _backward(a: dict[str, Any]) -> Any:
    assert a["rng_state"].dtype == a["unused"].dtype == torch.uint64
    gradients = {
        name: torch.empty_like(a[argument], memory_format=torch.contiguous_format)
        for name, argument in (("dq", "query"), ("dk", "key"), ("dv", "value"))
    }
    given = {"dout": a["grad_out"], "out": a["out"], "softmax_lse": a["logsumexp"]}
    flash_backward({**_as_library(a), **given, **gradients}, _flash_2_window)
    return tuple(gradients.values())


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch's operators."""
    for name, body in (("forward", _forward), ("backward", _backward)):
        operator = f"_flash_attention_{name}"
        monkeypatch.setattr(torch.ops.aten, operator, _bound(operator, body))
