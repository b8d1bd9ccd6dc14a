"""The support matrix: which operator takes which mask, forward and backward, on which device.

It is read from declarations (and, for adapters, from what their library's form can say), at a small
size, and needs neither torch nor any library: what an operator refuses at a size, or for want of a
package, is another matter.
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
from cpbench.parallel.bound_operator import native_part
from cpbench.selectors.common.selection import SELECTIONS
from cpbench.sweep.verification import DILATED_MASKS, HEAD_MASKS, MASKS, SEQ_LEN

HEADS = 4
TOKENS = 320  # a multiple of usual blocks: the last document of verification is longer here


def _here(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text.replace("125]", f"{125 + TOKENS - SEQ_LEN}]") for text in texts)


SHARED, BY_HEAD = _here(MASKS), _here((*HEAD_MASKS, *DILATED_MASKS))


def rows(device: str) -> list[dict[str, Any]]:
    """For each operator of a device the masks that it takes, in words, and those that it has a
    backward pass for."""
    return [
        _row(info, device)
        for _, info in sorted(registry.operators().items())
        if device in info.devices
    ]


def _row(info: OperatorInfo, device: str) -> dict[str, Any]:
    taken = {
        direction: [
            text for text in (*SHARED, *BY_HEAD) if refusal(info, text, direction, device) is None
        ]
        for direction in ("fwd", "fwd_bwd")
    }
    backward = device in info.backward_on
    if backward and taken["fwd"] != taken["fwd_bwd"]:
        backward_words = ", ".join(_names(SHARED, taken["fwd_bwd"])) or "no"
    else:
        backward_words = "yes" if backward else "no"
    return {
        "operator": info.name,
        "of all heads alike": _words(SHARED, taken["fwd"]),
        "of each head": _words(BY_HEAD, taken["fwd"]),
        "of selectors": ", ".join(kind for kind in SELECTIONS if kind in info.masks) or "-",
        "backward": backward_words,
        "": "never run" if info.unproven else "",
    }


def refusal(info: OperatorInfo, mask: str, direction: str, device: str) -> str | None:
    """Why a mask (by its text, at ``TOKENS`` tokens) is not taken; None if it is."""
    dtype = next((name for name in DTYPES if name in info.dtypes), info.dtypes[0])
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS, heads_kv=HEADS, head_dim=64,
        dtype=dtype, direction=direction,
    )  # fmt: skip
    reason = declared_limits(info, problem, device)
    if reason is not None:
        return reason
    built: Mask = masks.build_heads(mask, TOKENS, HEADS)
    if isinstance(built, AttnMask) and not info.selects:
        _, built = native_part(built)
    if built.kind not in info.masks:
        return f"{info.name} takes {', '.join(info.masks)} masks"
    if info.unproven:
        adapter = registry.implementation(info, {})
        if isinstance(adapter, Adapter) and isinstance(built, SlicedMask):
            return adapter.mask_refusal(problem, built)
    return None


def _names(texts: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Patterns of which all variants are taken."""
    there, names = set(taken), dict.fromkeys(Spec.parse(text).name for text in texts)
    lacking = {Spec.parse(text).name for text in texts if text not in there}
    return [name for name in names if name not in lacking]


def _words(texts: tuple[str, ...], taken: Iterable[str]) -> str:
    everything = list(dict.fromkeys(Spec.parse(text).name for text in texts))
    yes = _names(texts, taken)
    no = [name for name in everything if name not in yes]
    if not no:
        return "any"
    if not yes:
        return "-"
    return f"all but {', '.join(no)}" if len(no) < len(yes) else ", ".join(yes)
