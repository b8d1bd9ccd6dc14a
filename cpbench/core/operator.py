"""The contract of an attention operator, and the float32 merge of partial results around it.

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim.

An operator works on the tensors of one device.  ``out`` and ``lse`` handed to ``backward`` may be
the *global* ones of a computation of which this operator does a part: with P = exp(scores - lse)
and delta = sum(dout * out), the gradients of the parts just add.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cpbench.core.environment import interpreting
from cpbench.core.registry import OperatorInfo, missing_package

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


class Unsupported(ValueError):
    """This operator or strategy cannot do this problem here; the message says why."""


class Operator(Protocol):
    """What a kernel file implements.  All tensors are on one device, in ``problem.dtype``."""

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        """Why this operator cannot do this here, in words a user can act on; None if it can."""
        ...

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Any:
        """An immutable plan, free of inputs; timed apart and reused."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention.

        Args:
            q: ``[B, S, H, D]``; k, v: ``[B, T, G, D]``; any strides with a contiguous last axis.

        Returns:
            out ``[B, S, H, D]`` in the dtype of q, 0 for a query that sees nothing; lse
            ``[B, H, S]`` float32, natural logarithm, -inf for such a query (None where the
            declaration says that there is none: ``mergeable``, ``lse_on``).
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        plan: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients dq, dk, dv in the shapes and dtypes of q, k, v.

        Rows whose lse is -inf contribute nothing and get 0.
        """
        ...


def declared_refusal(info: OperatorInfo, problem: Problem, device: str) -> str | None:
    """Why the declaration alone rules this problem out, whatever the mask; None if it does not.

    Needs neither torch nor the operator's own modules, so a parent process can ask too.
    """
    if device not in info.devices:
        return f"{info.name} runs on {' and '.join(info.devices)}, not on {device}"
    if device in info.interpreted_on and not interpreting():
        return (
            f"{info.name} has no compiler for {device}; set TRITON_INTERPRET=1 to check it there "
            "under Triton's interpreter (slow)"
        )
    missing = missing_package(info)
    if missing is not None:
        how = f": {info.install}" if info.install else ""
        return f"{info.name} needs the Python package {missing}, which is not installed{how}"
    return declared_limits(info, problem, device)


def declared_limits(info: OperatorInfo, problem: Problem, device: str) -> str | None:
    """As :func:`declared_refusal`, were all installed that it needs."""
    if device not in info.devices:
        return f"{info.name} runs on {' and '.join(info.devices)}, not on {device}"
    if problem.dtype not in info.dtypes:
        return f"{info.name} takes {', '.join(info.dtypes)}, not {problem.dtype}"
    if problem.head_dim > info.max_head_dim:
        return f"{info.name} takes head_dim up to {info.max_head_dim}, not {problem.head_dim}"
    if problem.backward and device not in info.backward_on:
        return f"{info.name} has no backward pass on {device}; use direction fwd"
    if problem.deterministic and not info.deterministic:
        return f"{info.name} is not deterministic"
    if problem.softcap:
        return "softcap is not built yet; use 0"
    return None
