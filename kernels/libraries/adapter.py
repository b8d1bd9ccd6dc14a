"""Base classes of the adapters to attention libraries.

An adapter converts a mask to the arguments of a library in ``prepare`` and calls the library in
``forward`` and ``backward``.  Libraries disagree on queries that see nothing (lse of inf, -inf or
unset; outputs of 0 or unset); the base class sets their results from the mask.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import QKV, BackwardInputs, nothing_visible, zero_gradients
from cpbench.masks.convert import Int32Array
from cpbench.masks.convert_library import UNBOUNDED, Unconvertible, to_varlen

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask
    from cpbench.masks.head_masks import SlicedMask

LN2 = 0.6931471805599453


def compute_capability() -> tuple[int, int] | None:
    """The compute capability of the current CUDA device; None without a device."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


@dataclass(frozen=True)
class Limits:
    """Limits of a library's kernels on devices and head dimensions.

    Attributes:
        min_capability: lowest supported compute capability.
        max_capability: highest supported compute capability; None for no limit.
        head_dim_multiple: head_dim must be a multiple of it.
        max_head_dim: largest supported head_dim.
        head_dims: the supported head_dims, if only these are.
    """

    min_capability: tuple[int, int] = (8, 0)
    max_capability: tuple[int, int] | None = None
    head_dim_multiple: int = 8
    max_head_dim: int = 256
    head_dims: tuple[int, ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        """Why the limits rule out this problem or device, or None."""
        capability = compute_capability()
        if capability is None:
            return "needs a CUDA device; torch sees none"
        low, high = self.min_capability, self.max_capability
        if capability < low or (high is not None and capability > high):
            first = ".".join(map(str, low))
            end = "on" if high is None else f"to {'.'.join(map(str, high))}"
            supported = first if high == low else f"from {first} {end}"
            actual = ".".join(map(str, capability))
            return f"needs compute capability {supported}; this device has {actual}"
        dim = problem.head_dim
        if self.head_dims and dim not in self.head_dims:
            return f"needs head_dim {', '.join(map(str, self.head_dims))}, not {dim}"
        if dim % self.head_dim_multiple or dim > self.max_head_dim:
            multiple = f"a multiple of {self.head_dim_multiple} up to {self.max_head_dim}"
            return f"needs head_dim {multiple}, not {dim}"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The common fields of adapters' plans.

    Attributes:
        scale: factor of the scores.
        empty: whether the mask is empty; then no call is made.
        empty_rows: ``[S]``, ``[H, S]`` or ``[B, H, S]`` booleans, queries that see nothing; None if
            there are none.
    """

    scale: float
    empty: bool = False
    empty_rows: torch.Tensor | None = None


def plan_fields(mask: SlicedMask, problem: Problem, device: str) -> dict[str, Any]:
    """The fields of the :class:`Plan` of a mask."""
    import torch

    rows = mask.empty_rows()
    empty_rows = torch.as_tensor(rows, device=device) if rows.any() and not rows.all() else None
    return {"scale": problem.softmax_scale, "empty": bool(rows.all()), "empty_rows": empty_rows}


class Adapter(ABC):
    """An operator around a library; see ``cpbench.core.operator.Operator`` for its four methods."""

    name: str
    limits = Limits()

    def unsupported(self, problem: Problem, mask: Any, device: str) -> str | None:
        reason = self.limits.refusal(problem)
        if reason is None:
            mask_reason = self.mask_refusal(problem, mask)
            if mask_reason is not None:
                return mask_reason
            reason = self.device_refusal(problem, mask) if mask.area else None
        return f"{self.name} {reason}" if reason else None

    def mask_refusal(self, problem: Problem, mask: Any) -> str | None:
        """Why the library does not take this mask on any device; None if it does."""
        try:
            reason = self.format_refusal(problem, mask) if mask.area else None
        except Unconvertible as error:
            return f"{self.name} does not take this mask: {error}"
        return f"{self.name} {reason}" if reason else None

    def device_refusal(self, problem: Problem, mask: Any) -> str | None:
        """Why the library does not take this mask on the current device, to follow the operator's
        name; None if it does."""
        return None

    def format_refusal(self, problem: Problem, mask: Any) -> str | None:
        """Why the library's mask format cannot express this mask, to follow the operator's name;
        None if it can.

        Raises:
            Unconvertible: for a mask that the format cannot express.
        """
        return None

    def forward(self, qkv: QKV, plan: Any) -> OutLse:
        import torch

        if plan.empty:
            return nothing_visible(qkv.q)
        with torch.no_grad():  # gradients come from ``backward`` alone
            out, lse = self._forward(qkv, plan)
        if plan.empty_rows is not None:
            lse = lse.masked_fill(plan.empty_rows, -torch.inf)
        return _zero_rows(out, plan.empty_rows), lse

    def backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        import torch

        if plan.empty:
            return zero_gradients(x.qkv)
        # exp(score - lse) must be 0, not NaN, on rows that see nothing.
        lse = x.lse.masked_fill(x.lse == -torch.inf, torch.inf).contiguous()
        with torch.no_grad():
            dq, dk, dv = self._backward(x._replace(lse=lse), plan)
        return _zero_rows(dq, plan.empty_rows), dk, dv

    @abstractmethod
    def _forward(self, qkv: QKV, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out ``[B, S, H, D]`` in the dtype of q and lse ``[B, H, S]``; rows that see
        nothing may have any value."""

    def _backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        """Return dq, dk, dv; lse of -inf has been replaced by inf."""
        raise NotImplementedError(f"{self.name} has no backward pass")


def _zero_rows(x_BSHD: torch.Tensor, empty_rows: torch.Tensor | None) -> torch.Tensor:
    """Set rows of queries that see nothing to 0."""
    if empty_rows is None:
        return x_BSHD
    rows = empty_rows[:, None] if empty_rows.ndim == 1 else empty_rows.transpose(-1, -2)
    return x_BSHD.masked_fill(rows.unsqueeze(-1), 0.0)


# --- packed documents under one window ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedPlan(Plan):
    """The arguments of a variable-length call; see ``cpbench.masks.convert_library.Varlen``.

    Attributes:
        documents: documents per batch; a single one needs only a fixed-length call.
        cu_q, cu_k: ``[B * documents + 1]`` int32, cumulative lengths of the documents of all
            batches, concatenated.
        max_q, max_k: tokens of the longest document.
        left, right: bounds of the window, -1 for none.
    """

    documents: int = 0
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    left: int = UNBOUNDED
    right: int = UNBOUNDED

    @property
    def causal(self) -> bool:
        return self.right == 0


def packed_plan(mask: AttnMask, problem: Problem, device: str) -> PackedPlan:
    """The plan of a mask that variable-length calls can express.

    Raises:
        Unconvertible: for other masks.
    """
    if not mask.area:
        return PackedPlan(**plan_fields(mask, problem, device))
    varlen = to_varlen(mask)
    return PackedPlan(
        **plan_fields(mask, problem, device),
        documents=varlen.documents,
        cu_q=_repeat_cu_seqlens(varlen.cu_seqlens_q, problem.batch, device),
        cu_k=_repeat_cu_seqlens(varlen.cu_seqlens_k, problem.batch, device),
        max_q=varlen.max_q,
        max_k=varlen.max_k,
        left=varlen.left,
        right=varlen.right,
    )


def _repeat_cu_seqlens(cu_seqlens: Int32Array, batch: int, device: str) -> torch.Tensor:
    """Cumulative lengths of several batches, concatenated."""
    import torch

    starts = cu_seqlens[:-1] + cu_seqlens[-1] * np.arange(batch)[:, None]
    cu = np.append(starts, cu_seqlens[-1] * batch).astype(np.int32)
    return torch.as_tensor(cu, device=device)


class PackedAdapter(Adapter):
    """An adapter to a library with fixed-length calls and, for documents, variable-length calls.

    A subclass makes the fixed-length call for one document per batch, else the variable-length
    call, for which tensors are ``[N, H, D]`` and the lse is ``[H, N]``.
    """

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> PackedPlan:
        return packed_plan(mask, problem, device)

    @abstractmethod
    def call_forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse."""

    @abstractmethod
    def call_backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        """Return dq, dk, dv."""

    def _forward(self, qkv: QKV, plan: PackedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        if plan.documents == 1:
            return self.call_forward(qkv, plan)
        out, lse = self.call_forward(QKV(*map(flatten_batch, qkv)), plan)
        batch = len(qkv.q)
        return unflatten_batch(out, batch), unflatten_lse(lse, batch)

    def _backward(self, x: BackwardInputs, plan: PackedPlan) -> Gradients:
        if plan.documents == 1:
            return self.call_backward(x, plan)
        dout, q, k, v, out = map(flatten_batch, x[:-1])
        flat = BackwardInputs(dout, q, k, v, out, flatten_lse(x.lse))
        dq, dk, dv = (unflatten_batch(y, len(x.q)) for y in self.call_backward(flat, plan))
        return dq, dk, dv


def missing_backward(problem: Problem) -> str | None:
    """Why torch's FlashAttention-2 has no backward pass on this GPU, to follow its name; None if it
    has.  Source: ``check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120``."""
    small = compute_capability() in ((8, 6), (8, 7), (8, 8), (8, 9), (12, 0), (12, 1))
    if small and problem.backward and 192 < problem.head_dim <= 224:
        return (
            f"has no backward pass for head_dim 193 to 224 on this GPU, so not {problem.head_dim}"
        )
    return None


def misread_bound(mask: AttnMask) -> str | None:
    """Why FlashAttention-2 does not take a mask; None if it does.

    It treats a bound of at least as many tokens as there are keys as unbounded, and an unbounded
    right side beside a left bound as a bound of that many tokens, which is wrong for documents with
    more queries than keys.

    Raises:
        Unconvertible: for a mask that is not documents under one window.
    """
    varlen = to_varlen(mask)
    dropped = varlen.right >= varlen.max_k
    added = varlen.right == UNBOUNDED and 0 <= varlen.left < varlen.max_k < varlen.max_q - 1
    if dropped or added:
        return (
            f"misreads the right bound of this window: it has {varlen.max_q} queries and only "
            f"{varlen.max_k} keys"
        )
    return None


def flatten_batch(x_BSHD: torch.Tensor) -> torch.Tensor:
    """Concatenate batches: ``[B * S, H, D]``, contiguous."""
    return x_BSHD.contiguous().flatten(0, 1)


def unflatten_batch(x_NHD: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`flatten_batch`: ``[B, S, H, D]``."""
    x_BSHD: torch.Tensor = x_NHD.unflatten(0, (batch, -1))
    return x_BSHD


def flatten_lse(lse_BHS: torch.Tensor) -> torch.Tensor:
    """Concatenate batches: ``[H, B * S]``, contiguous."""
    return lse_BHS.transpose(0, 1).flatten(1).contiguous()


def unflatten_lse(lse_HN: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`flatten_lse`: ``[B, H, S]``."""
    lse_BHS: torch.Tensor = lse_HN.unflatten(1, (batch, -1)).transpose(0, 1)
    return lse_BHS


def empty_contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Uninitialised contiguous tensors of the same shapes, for a library to write to."""
    import torch

    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
