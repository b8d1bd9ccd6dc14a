"""A stand-in for ``flash_attn`` that computes with the operator under test.  Not a strategy.

To compare libraries over the same kernel, the functions of FlashAttention that they call are
replaced, during a call and only in the modules of the library, by functions of the same signature
that pass each block to the operator, even if ``flash_attn`` is installed.  If it is not, a library
is imported against a stand-in module, which is removed afterwards.

One library call runs at a time in a process: the current operator is module state, since autograd
may run a backward pass on another thread.

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

from cpbench.core.operator import QKV, BackwardInputs

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.strategies.libraries.blocks import BlockPlans

VERSION = "2.8.3"  # libraries select signatures by it
FUNCTIONS = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)
_operators: list[tuple[BoundOperator, BlockPlans]] = []


# --- functions that libraries call --------------------------------------------------------------


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
    op, blocks = _current_operator(
        dropout_p, softmax_scale, window_size_left, window_size_right, softcap
    )
    out, lse = blocks.forward(op, QKV(q, k, v), causal)
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
    op, blocks = _current_operator(
        dropout_p, softmax_scale, window_size_left, window_size_right, softcap
    )
    grads = blocks.backward(
        op, BackwardInputs(dout, q, k, v, out, softmax_lse.contiguous()), causal
    )
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)  # targets may be strided slices of larger buffers


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
    op, blocks = _current_operator(
        dropout_p, softmax_scale, window_size_left, window_size_right, softcap
    )
    out, lse = blocks.forward_packed(op, QKV(*(x.unsqueeze(0) for x in (q, k, v))))
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
    op, blocks = _current_operator(
        dropout_p, softmax_scale, window_size_left, window_size_right, softcap
    )
    tensors = [x.unsqueeze(0) for x in (dout, q, k, v, out, softmax_lse.contiguous())]
    for target, grad in zip(
        (dq, dk, dv), blocks.backward_packed(op, BackwardInputs(*tensors)), strict=True
    ):
        target.copy_(grad.squeeze(0))


def flash_attn_func(*args: Any, **kwargs: Any) -> None:
    """Imported by libraries but not called by the functions that are compared."""
    raise NotImplementedError("flash_attn_func has no stand-in")


def _current_operator(
    dropout: float, scale: float | None, left: int, right: int, softcap: float
) -> tuple[BoundOperator, BlockPlans]:
    """The operator and plans of the current call; asserts that no unsupported feature is used."""
    if not _operators:
        raise RuntimeError("flash_attn is not installed: its stand-in works inside cpbench only")
    op, blocks = _operators[-1]
    assert not dropout
    assert not softcap
    assert (left, right) == (-1, -1)
    assert scale is None or abs(scale - blocks.problem.softmax_scale) <= 1e-6 * abs(scale)
    return op, blocks


# --- installing the stand-in --------------------------------------------------------------------


@contextmanager
def importable_flash_attn(stubs: dict[str, ModuleType] | None = None) -> Iterator[None]:
    """Make ``import flash_attn`` work inside this context, by the stand-in if not installed.

    Args:
        stubs: additional modules to make importable, by name.
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
    module = ModuleType(name, "A stand-in of cpbench.")
    functions = {name: globals()[name] for name in (*FUNCTIONS, "flash_attn_func")}
    vars(module).update(functions, __version__=VERSION)
    return module


@contextmanager
def route_flash_attn(
    op: BoundOperator, blocks: BlockPlans, modules: Iterable[ModuleType]
) -> Iterator[None]:
    """Route what these modules of a library imported from ``flash_attn`` to ``op``."""
    replaced = [(m, name, vars(m)[name]) for m in modules for name in FUNCTIONS if name in vars(m)]
    for module, name, _ in replaced:
        setattr(module, name, globals()[name])
    _operators.append((op, blocks))
    try:
        yield
    finally:
        _operators.pop()
        for module, name, original in replaced:
            setattr(module, name, original)
