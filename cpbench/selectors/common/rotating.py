"""RoPE by selectors themselves: queries and keys of a branch at positions of its own.

The inputs are those before RoPE.  Turning is linear, so the gradient of what was turned is turned
back: by the same angles the other way, times the same magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs.rotary import BASE, Floats, frequencies, rotate
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Plan, Selector

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

ROPE_PARAMS = ("base", "scaling", "factor", "original_length")


@dataclass(frozen=True, eq=False)
class Turn:
    """RoPE of the queries, or of the keys, of a branch.

    Attributes:
        positions: ``[tokens]``.
        theta, magnitude: see ``cpbench.inputs.rotary.frequencies``.
    """

    positions: IntArray
    theta: Floats
    magnitude: float

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, tokens, heads, D]``, turned; in its dtype."""
        return rotate(x, self.positions, self.theta, self.magnitude)

    def transposed(self, dx: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`apply` with respect to its input."""
        return rotate(dx, -self.positions, self.theta, self.magnitude)

    def of_tokens(self, tokens: torch.Tensor) -> Turn:
        """That of some of the tokens."""
        return Turn(self.positions[tokens.cpu().numpy()], self.theta, self.magnitude)


class RotatingSelector(Selector):
    """A selector that turns queries and keys itself.

    Args:
        kernel: see :class:`Selector`.
        base, scaling, factor, original_length: see ``cpbench.rope``; no scaling if empty.

    Raises:
        ValueError: for values that are not allowed.
    """

    joined = True

    def __init__(
        self,
        kernel: str,
        *,
        base: float = BASE,
        scaling: str = "",
        factor: float | None = None,
        original_length: int = 0,
    ) -> None:
        super().__init__(kernel)
        self._rope = base, scaling or None, factor, original_length
        try:
            frequencies(4, *self._rope)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if problem.head_dim % 2:
            return f"{self.name} applies RoPE: it takes an even head_dim, not {problem.head_dim}"
        return super().unsupported(problem, mask, device)

    def turn(self, positions: IntArray, plan: Plan) -> Turn:
        """RoPE at these positions."""
        return Turn(positions, *frequencies(plan.problem.head_dim, *self._rope))

    def as_full(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k at their positions in the sequence, of which the queries are the last."""
        tokens = np.arange(k.shape[1])
        theta, magnitude = frequencies(k.shape[3], *self._rope)
        q_at = tokens[len(tokens) - q.shape[1] :]
        return rotate(q, q_at, theta, magnitude), rotate(k, tokens, theta, magnitude)
