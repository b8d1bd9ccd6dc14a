"""What libraries call of ``flash_attn``, computed by the operator under test.  Not a strategy.

So that libraries are compared over the same kernel as everything else, the functions of
FlashAttention that they call are replaced, for the time of a call and in the modules of the library
alone, by functions of the same signature that hand each block to the operator: also where
``flash_attn`` is installed.  Where it is not, a library is imported against a stand-in module,
which is taken away again afterwards.

One library call runs at a time in a process: what the functions compute with is module state, since
autograd may run a backward pass on a thread of its own.

Signatures: flash_attn 2.7 and 2.8 (``flash_attn/flash_attn_interface.py``), whose inner functions
return ``out, softmax_lse, S_dmask, rng_state``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.strategies.libraries.blocks import Blocks

VERSION = "2.8.3"  # libraries choose signatures by it
FUNCTIONS = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)
_current: list[tuple[BoundOperator, Blocks]] = []


# --- what libraries call ------------------------------------------------------------------------


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Any, Any, None, None]:
    op, blocks = _asked(dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
    out, lse = blocks.forward(op, q, k, v, causal)
    return out, lse, None, None


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    rng_state: Any = None,
) -> None:
    op, blocks = _asked(dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
    grads = blocks.backward(op, dout, q, k, v, out, softmax_lse.contiguous(), causal)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)  # they may be strided slices of larger buffers


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Any, Any, None, None]:
    """``[N, H, D]``; the lse is ``[H, N]``."""
    op, blocks = _asked(dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
    out, lse = blocks.forward_packed(op, *(x.unsqueeze(0) for x in (q, k, v)))
    return out.squeeze(0), None if lse is None else lse.squeeze(0), None, None


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    rng_state: Any = None,
) -> None:
    op, blocks = _asked(dropout_p, softmax_scale, window_size_left, window_size_right, softcap)
    given = [x.unsqueeze(0) for x in (dout, q, k, v, out, softmax_lse.contiguous())]
    for target, grad in zip((dq, dk, dv), blocks.backward_packed(op, *given), strict=True):
        target.copy_(grad.squeeze(0))


def flash_attn_func(*args: Any, **kwargs: Any) -> None:
    """Imported by libraries, and not called in what is compared here."""
    raise NotImplementedError("flash_attn_func has no stand-in")


def _asked(
    dropout: float, scale: float | None, left: int, right: int, softcap: float
) -> tuple[BoundOperator, Blocks]:
    """What to compute with, when nothing is asked for that is not computed."""
    if not _current:
        raise RuntimeError("flash_attn is not installed: its stand-in works inside cpbench only")
    op, blocks = _current[-1]
    assert not dropout
    assert not softcap
    assert (left, right) == (-1, -1)
    assert scale is None or abs(scale - blocks.problem.softmax_scale) <= 1e-6 * abs(scale)
    return op, blocks


# --- putting them where libraries find them -----------------------------------------------------


@contextmanager
def importable(stubs: dict[str, ModuleType] | None = None) -> Iterator[None]:
    """``import flash_attn`` works for as long as this lasts, by the stand-in where it must.

    Args:
        stubs: further modules to find, by name.
    """
    added = dict(stubs or {})
    if importlib.util.find_spec("flash_attn") is None:
        package, inner = _module("flash_attn"), _module("flash_attn.flash_attn_interface")
        vars(package).update(flash_attn_interface=inner, __path__=[])
        added |= {package.__name__: package, inner.__name__: inner}
    before = {name: sys.modules[name] for name in added if name in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _module(name: str) -> ModuleType:
    module = ModuleType(name, "cpbench stands in for it.")
    offered = {name: globals()[name] for name in (*FUNCTIONS, "flash_attn_func")}
    vars(module).update(offered, __version__=VERSION)
    return module


@contextmanager
def routed(op: BoundOperator, blocks: Blocks, modules: Iterable[ModuleType]) -> Iterator[None]:
    """In some modules of a library, what they imported of ``flash_attn`` computes with ``op``."""
    found = [(m, name, vars(m)[name]) for m in modules for name in FUNCTIONS if name in vars(m)]
    for module, name, _ in found:
        setattr(module, name, globals()[name])
    _current.append((op, blocks))
    try:
        yield
    finally:
        _current.pop()
        for module, name, original in found:
            setattr(module, name, original)
