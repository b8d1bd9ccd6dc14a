"""Sequence mixers on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from cpbench.api.autograd import no_autocast
from cpbench.api.inputs import require_dense, require_scale, short, under_autocast
from cpbench.api.public_operator import are_finite
from cpbench.core.operator import Unsupported
from cpbench.core.problem import DTYPE_BYTES
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.kernels.mixers import forms
from cpbench.kernels.mixers.chunks import Inputs, Plan
from cpbench.kernels.mixers.forms import Form
from cpbench.kernels.mixers.mixer import Mixer, retention_decays
from cpbench.kernels.mixers.operator import make_mixer
from cpbench.kernels.mixers.triton import launch
from cpbench.masks import build
from cpbench.masks.attn_mask import AttnMask

MaskLike = AttnMask | str | Mapping[str, Any] | Spec


@untraced
def mix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    mixer: Spec | str = "gated_deltanet",
    mask: MaskLike | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix tokens through a state per head, in time proportional to their number.

    A token updates the state, then reads it (``cpbench.kernels.mixers.forms``):

        S <- (I - beta k k^T) Diag(exp g) S + beta k v^T,    out = scale * S^T q

    Without the delta rule ``I - beta k k^T`` and beta are left out.  Differentiable, once, in all
    tensors and both results.  Under autocast q, k and v are cast, g and beta are not.

    Args:
        q, k: ``[B, S, H, K]``; v: ``[B, S, H, V]``.  The delta rule wants keys of length 1.
        g: log decay, at most 0, ``[B, S, H]`` (``retention``, ``ssd``, ``gated_deltanet``) or
            ``[B, S, H, K]`` (``gla``, ``kda``).
        beta: ``[B, S, H]``, from 0 to 2 (``deltanet``, ``gated_deltanet``, ``kda``).
        mixer: name, with parameters if wanted.  ``chunk``: tokens that are computed together, a
            power of two (``"gla:chunk=32"``); of ``ttt``, any number of tokens that read the state
            before them, 512 unless given, counted from the start of a document.
            ``kernel=triton``: by our Triton kernels (at most one decay per head and token).
        mask: causal (unless given) or causal within documents, each of which starts from an empty
            state, as a name or an object of ``cpbench.masks``; ``"full"`` for ``linear`` alone.
        scale: multiplies q; ``K ** -0.5`` unless given.
        initial_state: ``[B, H, K, V]``, before the first document; of ``ttt``, the fast weights
            that every document starts from.  0 unless given.

    Returns:
        out ``[B, S, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]``,
        float32 (float64 for float64).

    Raises:
        ValueError: if shapes, dtypes, mask or scale do not fit, or the mixer is unknown or none.
        Unsupported: for what ``kernel=triton`` does not compute.
        RuntimeError: in the backward pass, for a second derivative.
    """
    form, chunk, kernel = forms.parse(mixer)
    require_inputs(form, q, k, v, g, beta, initial_state)
    require_scale(scale)
    q, k, v = under_autocast(q, k, v)
    tokens, found = q.shape[1], find_mask(mask, q.shape[1])
    if (found.seq_q, found.seq_k) != (tokens, tokens):
        raise ValueError(
            f"a mask of {found.seq_q} queries and {found.seq_k} keys does not fit {tokens} tokens"
        )
    require_mask(form, found)
    work = make_mixer(make_plan(form, chunk, kernel, q, scale), found, kernel)
    if g is None and form.default_gate:
        g = retention_decays(q.shape[2], q.device).expand(q.shape[:3])
    return MixerFunction.apply(work, q, k, v, g, beta, initial_state)  # type: ignore[no-any-return, no-untyped-call]


class MixerFunction(torch.autograd.Function):
    """out and state of a mixer, both differentiable; once."""

    @staticmethod
    def forward(
        ctx: Any,
        work: Mixer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        x, keep, saved = Inputs(q, k, v, g, beta), any(ctx.needs_input_grad), None
        ctx.exact = not work.whole and q.device.type == "cpu" and not _finite(*x, state)
        with no_autocast(q.device):
            if ctx.exact:
                out, last = work.recur(x, state)
            else:
                out, last, saved = work.forward(x, state, keep)
        if keep:
            leaves, ctx.structure = pytree.tree_flatten((x, state, saved))
            ctx.save_for_backward(*leaves)
        ctx.work = work
        return out, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dstate: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, state, saved = pytree.tree_unflatten(list(ctx.saved_tensors), ctx.structure)
        work: Mixer = ctx.work
        if dout is None:
            dout = torch.zeros_like(x.v)
        exact = ctx.exact or (
            not work.whole and dout.device.type == "cpu" and not _finite(dout, dstate)
        )
        with no_autocast(dout.device):
            if exact:
                grads = _differentiate_recurrence(work, x, state, dout, dstate)
            else:
                *rest, initial = work.backward(x, saved, dout, dstate)
                grads = (*rest, None if state is None else initial.to(state.dtype))
        needed = ctx.needs_input_grad[1:]
        return None, *(y if want else None for y, want in zip(grads, needed, strict=True))


def _differentiate_recurrence(
    work: Mixer,
    x: Inputs,
    state: torch.Tensor | None,
    dout: torch.Tensor,
    dstate: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the inputs and of the state, token by token."""
    leaves = [None if y is None else y.detach().requires_grad_() for y in (*x[:5], state)]
    with torch.enable_grad():
        out, last = work.recur(Inputs(*leaves[:5]), leaves[5])  # type: ignore[arg-type]
    given = [y for y in leaves if y is not None]
    results, gradients = [out], [dout]
    if dstate is not None:
        results, gradients = [out, last], [dout, dstate]
    found = iter(torch.autograd.grad(results, given, gradients, materialize_grads=True))
    return tuple(None if y is None else next(found) for y in leaves)


def _finite(*tensors: torch.Tensor | None) -> bool:
    return are_finite(tuple(x for x in tensors if x is not None))


def require_inputs(
    form: Form, q: Any, k: Any, v: Any, g: Any, beta: Any, initial_state: Any
) -> None:
    """Raise a ValueError for tensors that do not fit the form or each other."""
    for name, x, shape in (("q", q, "K"), ("k", k, "K"), ("v", v, "V")):
        require_dense(name, x, q, 4, f"[B, S, H, {shape}]")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit; shapes are "
            "[B, S, H, K], [B, S, H, K] and [B, S, H, V]"
        )
    if 0 in (*q.shape, v.shape[3]):
        raise ValueError(f"q {list(q.shape)} and v {list(v.shape)} must have no axis of 0")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if str(q.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise ValueError(f"q, k and v must be {', '.join(DTYPE_BYTES)}, not {q.dtype}")
    B, S, H, K = q.shape
    gate = {None: None, "scalar": [B, S, H], "diagonal": [B, S, H, K]}[form.gate]
    for name, x, wanted, required in (
        ("g", g, gate, not form.default_gate),
        ("beta", beta, [B, S, H] if form.delta else None, True),
        ("initial_state", initial_state, [B, H, K, v.shape[3]], False),
    ):
        if wanted is None:
            if x is not None:
                raise ValueError(f"{form.name} takes no {name}; {_takers(name)} do")
            continue
        if x is None and not required:
            continue
        if x is None:
            raise ValueError(f"{form.name} needs {name}, of shape {wanted}")
        require_dense(name, x, q, len(wanted), str(wanted))
        if list(x.shape) != wanted or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}; {form.name} wants floating point {wanted}"
            )


def _takers(name: str) -> str:
    takes = (form.gate is not None if name == "g" else form.delta for form in forms.FORMS.values())
    return ", ".join(form for form, has in zip(forms.FORMS, takes, strict=True) if has)


def find_mask(mask: Any, tokens: int) -> AttnMask:
    """The mask of an argument; a name is that of a mask of so many tokens, None causal."""
    if mask is None or isinstance(mask, str | Mapping | Spec):
        return build("causal" if mask is None else mask, tokens)
    if not isinstance(mask, AttnMask):
        raise ValueError(f"mask must be a name or one of cpbench.masks, not {short(mask)}")
    return mask


def make_plan(form: Form, chunk: int, kernel: str, q: torch.Tensor, scale: float | None) -> Plan:
    """What is fixed before a sequence of one document is computed.

    Raises:
        Unsupported: for what ``kernel=triton`` does not compute.
    """
    plan = Plan(form, q.shape[3] ** -0.5 if scale is None else float(scale), chunk)
    if kernel == "triton":
        dtype = str(q.dtype).removeprefix("torch.")
        reason = launch.refusal(plan, q.shape[3], dtype, q.device.type)
        if reason is not None:
            raise Unsupported(f"{form.name}: {reason}")
    return plan


def require_mask(form: Form, mask: AttnMask) -> None:
    """Raise a ValueError for a mask that the mixer does not take."""
    full = form.name == "linear"
    if mask.causal_documents is None and not (mask.kind == "full" and full):
        allowed = "causal, causal_document" + (" and full" if full else "")
        raise ValueError(f"{form.name} takes the masks {allowed}, not {mask!r}")
