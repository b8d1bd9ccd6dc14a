"""Attention as custom operators of torch, which stay in the graph of ``torch.compile``.

A graph holds the digest of its mask, a text, and is specialised on it.  Operators whose backward
pass needs more than q, k, v, out and lse break the graph instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cpbench.api.autograd import differentiate, no_autocast
from cpbench.api.inputs import need_gradients, with_contiguous_heads
from cpbench.api.on_one_rank import prepare_on_one_rank
from cpbench.core.operator import QKV
from cpbench.core.registry import operator_info
from cpbench.core.spec import Spec
from cpbench.masks.head_masks import Mask
from cpbench.masks.living import find_mask
from cpbench.parallel.strategy import Saved


def _is_stateless(operator: str) -> bool:
    try:
        info = operator_info(Spec.parse(operator).name)
    except ValueError:
        return False  # said outside of the graph
    return info.external_lse and info.mergeable and not info.selects


# As torch.compiler.assume_constant_result, without importing the compiler.
_is_stateless._dynamo_marked_constant = True  # type: ignore[attr-defined]


def stays_in_graph(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: Spec | str,
    scale: float | None,
) -> bool:
    """Whether :func:`attention` can compute this while a graph is traced; mistakes are reported
    outside of it."""
    return (
        isinstance(operator, str)
        and isinstance(mask, Mask)
        and "digest" in mask.__dict__
        and q.ndim == k.ndim == v.ndim == 4
        and (scale is None or (isinstance(scale, float) and 0 < scale < math.inf))
        and _is_stateless(operator)
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: str,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`cpbench.attention`; for use while a graph is traced."""
    backward = need_gradients(q, k, v)
    out, lse = _forward(q, k, v, mask.digest, operator, scale, backward)
    return out, lse


@torch.library.custom_op("cpbench::attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    operator: str,
    scale: float | None,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    work = prepare_on_one_rank(q, k, v, find_mask(mask), operator, scale, backward)
    with no_autocast(q.device):
        out, lse, _ = work.forward(QKV(*with_contiguous_heads(q, k, v)), None)
    assert lse is not None
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    operator: str,
    scale: float | None,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, s, h, _d = q.shape
    return q.new_empty((b, s, h, v.shape[3])), q.new_empty((b, h, s), dtype=torch.float32)


@torch.library.custom_op("cpbench::attention_backward", mutates_args=())
def _backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: str,
    operator: str,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    work = prepare_on_one_rank(q, k, v, find_mask(mask), operator, scale, True)
    if dlse is not None and dlse.device.type == "cpu" and not dlse.any():
        dlse = None  # a graph that returns lse passes zeros
    saved = Saved(*with_contiguous_heads(q, k, v), out, lse)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = differentiate(work, saved, lse, dout, dlse, None)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *ctx.named, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 7
    return *_backward(dout, dlse, *ctx.saved_tensors, *ctx.named), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
