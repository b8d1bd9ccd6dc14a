"""Means over neighbouring tokens, and their gradients.

Legend: B batch, T tokens, H heads, D head dim; n windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pool:
    """Windows of ``size`` tokens, one every ``stride``.

    Attributes:
        size, stride: in tokens; a size is a multiple of the stride.
        partial: whether a last window that runs past the end counts (as the mean of what is there).
    """

    size: int = 1
    stride: int = 1
    partial: bool = False

    def count(self, tokens: int) -> int:
        """How many windows there are."""
        if self.partial:
            return -(-tokens // self.stride)
        return max((tokens - self.size) // self.stride + 1, 0)

    def mean(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """``[B, n, H, D]`` in the dtype of x, added up in float32 (float64 for float64)."""
        import torch

        if self == NO_POOL:
            return x_BTHD
        dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
        steps = self._steps(x_BTHD.to(dtype))
        n, per = self.count(x_BTHD.shape[1]), self.size // self.stride
        total = steps[:, :n].clone()
        for number in range(1, per):
            part = steps[:, number : number + n]
            total[:, : part.shape[1]] += part
        total /= self._lengths(x_BTHD)[:, None, None]
        return total.to(x_BTHD.dtype)

    def backward(self, dx_BnHD: torch.Tensor, tokens: int) -> torch.Tensor:
        """The gradient of what was averaged, ``[B, T, H, D]``."""
        import torch

        if self == NO_POOL:
            return dx_BnHD
        b, n, h, d = dx_BnHD.shape
        per, steps = self.size // self.stride, -(-tokens // self.stride)
        share = dx_BnHD / self._lengths(dx_BnHD, tokens)[:, None, None]
        of_step = dx_BnHD.new_zeros((b, max(steps, n + per - 1), h, d))
        for number in range(per):
            of_step[:, number : number + n] += share
        return torch.repeat_interleave(of_step, self.stride, 1)[:, :tokens]

    def spread(self, x_BnHD: torch.Tensor, tokens: int) -> torch.Tensor:
        """Each window's value at each of its tokens; of windows that do not overlap."""
        if self == NO_POOL:
            return x_BnHD
        assert self.size == self.stride
        assert self.partial
        return x_BnHD.repeat_interleave(self.size, 1)[:, :tokens]

    def gathered(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """Sums over windows, the gradient of :meth:`spread`."""
        if self == NO_POOL:
            return x_BTHD
        assert self.size == self.stride
        return self._steps(x_BTHD.float()).to(x_BTHD.dtype)

    def _steps(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """Sums over each stride's tokens."""
        import torch

        missing = -x_BTHD.shape[1] % self.stride
        if missing:
            x_BTHD = torch.nn.functional.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
        found: torch.Tensor = x_BTHD.unflatten(1, (-1, self.stride)).sum(2)
        return found

    def _lengths(self, like: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """``[n]`` tokens of each window."""
        import torch

        tokens = like.shape[1] if tokens is None else tokens
        starts = torch.arange(self.count(tokens), device=like.device) * self.stride
        return (tokens - starts).clamp(max=self.size)


NO_POOL = Pool()
