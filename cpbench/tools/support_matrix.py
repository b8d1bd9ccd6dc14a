"""Support matrix: the masks that each operator supports on a device, forward and backward.

It is derived from declarations (and, for adapters, from the mask formats of their library) at a
small size, and needs neither torch nor any library.  Refusals that depend on the size or on a
missing package are not included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import declared_limits
from cpbench.core.problem import DTYPES, Problem
from cpbench.core.registry import OperatorInfo
from cpbench.core.spec import Spec
from cpbench.kernels.libraries.adapter import Adapter
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import Mask, SlicedMask
from cpbench.parallel.bound_operator import declared_kind, native_rectangle
from cpbench.selectors.selections import SELECTIONS
from cpbench.sweep.verification.cases import DILATED_MASKS, HEAD_MASKS, MASKS, SEQ_LEN

HEADS = 4
TOKENS = 320  # a multiple of usual block sizes


def _resized(mask_texts: Iterable[str]) -> tuple[str, ...]:
    """Masks of ``cpbench verify`` at ``TOKENS`` tokens: their last document is made longer."""
    return tuple(text.replace("125]", f"{125 + TOKENS - SEQ_LEN}]") for text in mask_texts)


SHARED, BY_HEAD = _resized(MASKS), _resized((*HEAD_MASKS, *DILATED_MASKS))


def rows(device: str) -> list[dict[str, Any]]:
    """One row per operator of a device: the masks that it supports, forward and backward.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    return [
        _row(info, device)
        for _, info in sorted(registry.operators().items())
        if device in info.devices
    ]


def _row(info: OperatorInfo, device: str) -> dict[str, Any]:
    supported = {
        direction: [
            text for text in (*SHARED, *BY_HEAD) if refusal(info, text, direction, device) is None
        ]
        for direction in ("fwd", "fwd_bwd")
    }
    backward = device in info.backward_on
    if backward and supported["fwd"] != supported["fwd_bwd"]:
        backward_cell = ", ".join(_fully_supported(SHARED, supported["fwd_bwd"])) or "no"
    else:
        backward_cell = "yes" if backward else "no"
    return {
        "operator": info.name,
        "of all heads alike": _supported_names(SHARED, supported["fwd"]),
        "of each head": _supported_names(BY_HEAD, supported["fwd"]),
        "of selectors": ", ".join(kind for kind in SELECTIONS if kind in info.masks) or "-",
        "backward": backward_cell,
        "": ", ".join(["mixer"] * bool(info.mixer) + ["never run"] * bool(info.unproven)),
    }


def refusal(info: OperatorInfo, mask: str, direction: str, device: str) -> str | None:
    """Why an operator refuses a mask at ``TOKENS`` tokens, or None if it supports it.

    Args:
        mask: such as ``"sliding_window:window=40"``.
        direction: ``"fwd"`` or ``"fwd_bwd"``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    dtype = next((name for name in DTYPES if name in info.dtypes), info.dtypes[0])
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS, heads_kv=HEADS, head_dim=64,
        dtype=dtype, direction=direction,
    )  # fmt: skip
    reason = declared_limits(info, problem, device)
    if reason is not None:
        return reason
    built: Mask = masks.build_heads(mask, TOKENS, HEADS)
    if isinstance(built, AttnMask) and not (info.selects or info.mixer):
        _, built = native_rectangle(built)
    if declared_kind(info, built) not in info.masks:
        return f"{info.name} takes {', '.join(info.masks)} masks"
    if info.unproven:
        adapter = registry.implementation(info, {})
        if isinstance(adapter, Adapter) and isinstance(built, SlicedMask):
            return adapter.mask_refusal(problem, built)
    return None


def _fully_supported(mask_texts: Iterable[str], supported_texts: Iterable[str]) -> list[str]:
    """Names of the patterns of which every variant is supported."""
    supported = set(supported_texts)
    names = dict.fromkeys(Spec.parse(text).name for text in mask_texts)
    refused = {Spec.parse(text).name for text in mask_texts if text not in supported}
    return [name for name in names if name not in refused]


def _supported_names(mask_texts: tuple[str, ...], supported_texts: Iterable[str]) -> str:
    """``any``, ``-`` for none, or the shorter list of supported or unsupported patterns."""
    names = list(dict.fromkeys(Spec.parse(text).name for text in mask_texts))
    supported = _fully_supported(mask_texts, supported_texts)
    refused = [name for name in names if name not in supported]
    if not refused:
        return "any"
    if not supported:
        return "-"
    if len(refused) < len(supported):
        return f"all but {', '.join(refused)}"
    return ", ".join(supported)
