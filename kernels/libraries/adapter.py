"""What the adapters to attention libraries have in common: their limits, and rows that see nothing.

An adapter turns a mask into a library's arguments in ``prepare`` and calls it in ``forward`` and
``backward``.  Libraries disagree on queries that see nothing (lse of inf, -inf or unset, outputs of
0 or unset), so those, known from the mask, are set here.

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


def capability() -> tuple[int, int] | None:
    """The compute capability of the current CUDA device; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


@dataclass(frozen=True)
class Limits:
    """What a library's kernels take.

    Attributes:
        least: compute capability from which on they run.
        most: the last one they run on; None for no end.
        multiple: of which head_dim must be one.
        head_dim: the largest.
        dims: the only ones, where they are few.
    """

    least: tuple[int, int] = (8, 0)
    most: tuple[int, int] | None = None
    multiple: int = 8
    head_dim: int = 256
    dims: tuple[int, ...] = ()

    def refusal(self, problem: Problem) -> str | None:
        found = capability()
        if found is None:
            return "needs a CUDA device; torch sees none"
        if found < self.least or (self.most is not None and found > self.most):
            first = ".".join(map(str, self.least))
            end = "on" if self.most is None else f"to {'.'.join(map(str, self.most))}"
            wanted = first if self.most == self.least else f"from {first} {end}"
            return f"needs compute capability {wanted}; this device has {found[0]}.{found[1]}"
        dim = problem.head_dim
        if self.dims and dim not in self.dims:
            return f"needs head_dim {', '.join(map(str, self.dims))}, not {dim}"
        if dim % self.multiple or dim > self.head_dim:
            return f"needs head_dim a multiple of {self.multiple} up to {self.head_dim}, not {dim}"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What every adapter's plan begins with.

    Attributes:
        scale: of the scores.
        empty: nothing is visible at all; no call is made.
        blind: ``[S]``, ``[H, S]`` or ``[B, H, S]`` booleans, which queries see nothing; None where
            all see something.
    """

    scale: float
    empty: bool = False
    blind: torch.Tensor | None = None


def about(mask: SlicedMask, problem: Problem, device: str) -> dict[str, Any]:
    """The fields of a :class:`Plan`."""
    import torch

    rows = mask.empty_rows()
    blind = torch.as_tensor(rows, device=device) if rows.any() and not rows.all() else None
    return {"scale": problem.softmax_scale, "empty": bool(rows.all()), "blind": blind}


class Adapter(ABC):
    """An operator around a library; see ``cpbench.core.operator.Operator`` for its four methods."""

    name: str
    limits = Limits()

    def unsupported(self, problem: Problem, mask: Any, device: str) -> str | None:
        reason = self.limits.refusal(problem)
        if reason is None:
            found = self.mask_refusal(problem, mask)
            if found is not None:
                return found
            reason = self.device_refusal(problem, mask) if mask.area else None
        return f"{self.name} {reason}" if reason else None

    def mask_refusal(self, problem: Problem, mask: Any) -> str | None:
        """Why the library's form cannot say this, on whatever device; None if it can."""
        try:
            reason = self.refusal(problem, mask) if mask.area else None
        except Unconvertible as error:
            return f"{self.name} does not take this mask: {error}"
        return f"{self.name} {reason}" if reason else None

    def device_refusal(self, problem: Problem, mask: Any) -> str | None:
        """What this device has against a mask that the library's form can say."""
        return None

    def refusal(self, problem: Problem, mask: Any) -> str | None:
        """What the library's form cannot say, whatever the device, to follow the operator's name.

        Raises:
            Unconvertible: for a mask that the library's form cannot say.
        """
        return None

    def forward(self, qkv: QKV, plan: Any) -> OutLse:
        import torch

        if plan.empty:
            return nothing_visible(qkv.q)
        with torch.no_grad():  # gradients come from ``backward`` alone
            out, lse = self._forward(qkv, plan)
        if plan.blind is not None:
            lse = lse.masked_fill(plan.blind, -torch.inf)
        return _zeroed(out, plan.blind), lse

    def backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        import torch

        if plan.empty:
            return zero_gradients(x.qkv)
        # exp(score - lse) must be 0, not NaN, on rows that see nothing.
        lse = x.lse.masked_fill(x.lse == -torch.inf, torch.inf).contiguous()
        with torch.no_grad():
            dq, dk, dv = self._backward(x._replace(lse=lse), plan)
        return _zeroed(dq, plan.blind), dk, dv

    @abstractmethod
    def _forward(self, qkv: QKV, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """out ``[B, S, H, D]`` in the dtype of q and lse ``[B, H, S]``; rows that see nothing may
        hold anything."""

    def _backward(self, x: BackwardInputs, plan: Any) -> Gradients:
        """dq, dk, dv; lse is inf where -inf came in."""
        raise NotImplementedError(f"{self.name} has no backward pass")


def _zeroed(x_BSHD: torch.Tensor, blind: torch.Tensor | None) -> torch.Tensor:
    """0 for queries that see nothing."""
    if blind is None:
        return x_BSHD
    rows = blind[:, None] if blind.ndim == 1 else blind.transpose(-1, -2)
    return x_BSHD.masked_fill(rows.unsqueeze(-1), 0.0)


# --- documents under one window -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed(Plan):
    """The arguments of a variable-length call; see ``cpbench.masks.convert_library.Varlen``.

    Attributes:
        documents: of one batch; with one, a call of fixed length serves.
        cu_q, cu_k: ``[B * documents + 1]`` int32, where documents begin in all batches end to end.
        max_q, max_k: tokens of the longest.
        left, right: of the window, -1 for none.
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


def packed(mask: AttnMask, problem: Problem, device: str) -> Packed:
    """The plan of a mask that a variable-length call can say.

    Raises:
        Unconvertible: for any other.
    """
    if not mask.area:
        return Packed(**about(mask, problem, device))
    found = to_varlen(mask)
    return Packed(
        **about(mask, problem, device),
        documents=found.documents,
        cu_q=_repeated(found.cu_seqlens_q, problem.batch, device),
        cu_k=_repeated(found.cu_seqlens_k, problem.batch, device),
        max_q=found.max_q,
        max_k=found.max_k,
        left=found.left,
        right=found.right,
    )


def _repeated(cu_seqlens: Int32Array, batch: int, device: str) -> torch.Tensor:
    import torch

    starts = cu_seqlens[:-1] + cu_seqlens[-1] * np.arange(batch)[:, None]
    cu = np.append(starts, cu_seqlens[-1] * batch).astype(np.int32)
    return torch.as_tensor(cu, device=device)


class PackedAdapter(Adapter):
    """An adapter to a library with calls of fixed length and, for documents, of variable length.

    A subclass makes the one call or the other, by ``plan.documents``, in ``call_forward`` and
    ``call_backward``; of variable length, tensors are ``[N, H, D]`` and the lse ``[H, N]``.
    """

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Packed:
        return packed(mask, problem, device)

    @abstractmethod
    def call_forward(self, qkv: QKV, plan: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse."""

    @abstractmethod
    def call_backward(self, x: BackwardInputs, gradients: list[torch.Tensor], plan: Packed) -> None:
        """Write dq, dk, dv into ``gradients``."""

    def _forward(self, qkv: QKV, plan: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        if plan.documents == 1:
            return self.call_forward(qkv, plan)
        out, lse = self.call_forward(QKV(*map(flat, qkv)), plan)
        batch = len(qkv.q)
        return unflat(out, batch), unflat_lse(lse, batch)

    def _backward(self, x: BackwardInputs, plan: Packed) -> Gradients:
        gradients = dq, dk, dv = buffers(*x.qkv)
        if plan.documents > 1:
            dout, q, k, v, out = map(flat, x[:-1])
            x = BackwardInputs(dout, q, k, v, out, flat_lse(x.lse))
            gradients = [grad.flatten(0, 1) for grad in gradients]  # views
        self.call_backward(x, gradients, plan)
        return dq, dk, dv


def flat(x_BSHD: torch.Tensor) -> torch.Tensor:
    """``[B * S, H, D]``, contiguous: batches end to end."""
    return x_BSHD.contiguous().flatten(0, 1)


def unflat(x_NHD: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B, S, H, D]`` again."""
    found: torch.Tensor = x_NHD.unflatten(0, (batch, -1))
    return found


def flat_lse(lse_BHS: torch.Tensor) -> torch.Tensor:
    """``[H, B * S]``, contiguous."""
    return lse_BHS.transpose(0, 1).flatten(1).contiguous()


def unflat_lse(lse_HN: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B, H, S]`` again."""
    found: torch.Tensor = lse_HN.unflatten(1, (batch, -1)).transpose(0, 1)
    return found


def buffers(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous tensors of the same shapes for a library to write to."""
    import torch

    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
