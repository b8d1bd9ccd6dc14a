"""Any operator as the attention of Hugging Face models.

::

    from cpbench.integrations import transformers as cpbench_transformers

    cpbench_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpbench")

Source: the attention interface and the mask interface of transformers, from version 4.56 on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import cpbench
from cpbench import masks
from cpbench.core.registry import check_params, operator_info
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert import from_dense

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "cpbench"
CHUNK_PAIRS = 1 << 26  # pairs of a mask that are evaluated at once
REFUSED = ("softcap", "position_bias", "s_aux")  # changes of the scores that no operator computes

# From which value on a number that is added to scores hides a pair.
HIDING = {
    torch.float32: -1e4, torch.float64: -1e4, torch.bfloat16: -9e3, torch.float16: -9e3,
}  # fmt: skip

Observer = Callable[["Call"], None]
_observers: list[Observer] = []


@dataclass(frozen=True)
class Call:
    """A call of an attention layer.

    Attributes:
        module: the layer.
        q, k, v: ``[B, S, H, D]``.
        scale: of the scores; None for head_dim ** -0.5.
        window: number of keys that a query sees, itself included, in a layer with a sliding window.
    """

    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None
    window: int | None


@dataclass(frozen=True)
class BatchMasks:
    """The mask of each sequence of a batch; one mask if all are equal.

    ``ndim`` and ``shape`` are for transformers: those of a mask that needs no more preparation.
    """

    masks: tuple[AttnMask, ...]

    @property
    def ndim(self) -> int:
        return 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.masks), 1, self.masks[0].seq_q, self.masks[0].seq_k)


def register(operator: str = "bands", name: str = NAME) -> None:
    """Register an operator as an implementation of attention.

    Args:
        operator: an operator with parameters; a selector is an approximation.
        name: for ``attn_implementation``.

    Raises:
        ImportError: without transformers, or with one that has no such interfaces.
        ValueError: for an operator that does not exist or applies RoPE, or a name that transformers
            would take for one of FlashAttention's.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    spec = Spec.parse(operator)
    check_params("operator", spec.name, spec.kwargs, operator_info(spec.name).params)
    if operator_info(spec.name).rotates:
        raise ValueError(f"{spec.name} applies RoPE, which models of transformers do themselves")
    if "flash" in name:
        raise ValueError(f"name = {name!r}: transformers takes names with flash for FlashAttention")

    AttentionInterface.register(name, functools.partial(attention_forward, operator=operator))
    AttentionMaskInterface.register(name, make_masks)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ``observer`` is called before every attention that is computed by an implementation
    of :func:`register`."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BatchMasks | torch.Tensor | None,
    *,
    operator: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers.

    Args:
        module: the attention layer.
        query: ``[B, H, S, D]``; key, value: ``[B, G, T, D]``.
        attention_mask: of :func:`make_masks`; a boolean or additive ``[B, 1 or H, S, T]``; or None
            for the causal or full mask of the module.

    Returns:
        out ``[B, S, H, D]`` and None.

    Raises:
        ValueError: for dropout, or a change of the scores that no operator computes.
    """
    if dropout:
        raise ValueError(
            f"cpbench has no dropout: set that of the model's attention to 0, not {dropout}"
        )
    for option in REFUSED:
        if options.get(option) is not None:
            raise ValueError(f"the attention of this model has {option}, which cpbench has not")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    for observer in _observers:
        observer(Call(module, q, k, v, scaling, options.get("sliding_window")))
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal and q.shape[1] > 1:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]  # of a cache that is not filled yet
        batch: tuple[AttnMask, ...] = (
            _unpadded(q.shape[1], k.shape[1], bool(causal) and q.shape[1] > 1),
        )
    elif isinstance(attention_mask, BatchMasks):
        batch = attention_mask.masks
    else:
        batch = _masks_of_tensor(attention_mask, len(q), q.shape[1], k.shape[1])
    if len(batch) == 1:
        out, _ = cpbench.attention(q, k, v, batch[0], operator=operator, scale=scaling)
        return out.contiguous(), None
    outs = [
        cpbench.attention(q[i][None], k[i][None], v[i][None], mask, operator, scaling)[0]
        for i, mask in enumerate(batch)
    ]
    return torch.cat(outs), None


@untraced
def make_masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | BatchMasks | None = None,
    **options: Any,
) -> BatchMasks | None:
    """The masks of a batch, with the signature of transformers.

    The pattern is evaluated by transformers, some queries at a time, so that no ``[S, T]`` mask is
    held for long sequences.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, BatchMasks):  # made before, for a static cache
        return attention_mask
    pattern = causal_mask_function if mask_function is None else mask_function
    padded = attention_mask is not None and not bool(attention_mask.all())
    whole = q_length == kv_length and q_offset == kv_offset == 0
    if pattern is causal_mask_function and whole and not padded:
        return None
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    step = max(1, CHUNK_PAIRS // max(1, batch_size * kv_length))
    parts: list[torch.Tensor] = []
    for start in range(0, q_length, step):
        rows = sdpa_mask(
            batch_size=batch_size, q_length=min(step, q_length - start), kv_length=kv_length,
            q_offset=q_offset + start, kv_offset=kv_offset, mask_function=pattern,
            attention_mask=attention_mask, **options,
        )  # fmt: skip
        assert rows is not None
        parts.append(rows)
    return BatchMasks(_masks_of_parts(parts, batch_size))


def _unpadded(queries: int, keys: int, causal: bool) -> AttnMask:
    if causal:
        return masks.build("causal", keys)
    return AttnMask.from_slices(queries, keys, [[0, queries, 0, keys, -queries, keys]])


@untraced
def _masks_of_tensor(
    mask: torch.Tensor, batch: int, queries: int, keys: int
) -> tuple[AttnMask, ...]:
    """Masks from booleans, or from what is added to scores: 0, or a number that hides a pair."""
    shape = list(mask.shape)
    if mask.ndim != 4 or mask.dtype not in (torch.bool, *HIDING):
        raise ValueError(
            f"attention_mask must be boolean or floating-point [B, 1 or H, S, T], not {mask.dtype} "
            f"{shape}"
        )
    visible = mask
    if mask.dtype != torch.bool:
        visible = mask == 0
        if bool((~visible & ~(mask <= HIDING[mask.dtype])).any()):
            raise ValueError("attention_mask holds a bias: cpbench adds none to scores")
    if mask.shape[1] > 1 and bool((visible != visible[:, :1]).any()):
        raise ValueError(f"attention_mask {shape} differs from head to head")
    visible = visible[:, :1].expand(-1, -1, queries, keys)
    return _masks_of_parts([visible], batch)


def _masks_of_parts(parts: list[torch.Tensor], batch: int) -> tuple[AttnMask, ...]:
    """The mask of each sequence from ``[B or 1, 1, s, T]`` booleans; one if all are equal."""
    found = tuple(
        from_dense([part[i, 0].cpu().numpy() for part in parts]) for i in range(len(parts[0]))
    )
    return found[:1] if len(set(found)) == 1 or batch == 1 else found
