"""Mean pooling over windows of adjacent tokens, and its gradient.

Legend: B batch, T tokens, H heads, D head dim; n windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pool:
    """Windows of ``size`` tokens, one every ``stride`` tokens.

    Attributes:
        size, stride: in tokens; the size is a multiple of the stride.
        partial: whether to include windows that run past the end, pooled over the tokens present.
    """

    size: int = 1
    stride: int = 1
    partial: bool = False

    def num_windows(self, tokens: int) -> int:
        """Number of windows over so many tokens."""
        if self.partial:
            return -(-tokens // self.stride)
        return max((tokens - self.size) // self.stride + 1, 0)

    def mean(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """Window means ``[B, n, H, D]`` in the dtype of x, accumulated in float32 (float64 for
        float64)."""
        import torch

        if self == NO_POOL:
            return x_BTHD
        dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
        stride_sums = self._stride_sums(x_BTHD.to(dtype))
        n, strides_per_window = self.num_windows(x_BTHD.shape[1]), self.size // self.stride
        total = stride_sums[:, :n].clone()
        for shift in range(1, strides_per_window):
            shifted = stride_sums[:, shift : shift + n]
            total[:, : shifted.shape[1]] += shifted
        total /= self._window_lengths(x_BTHD)[:, None, None]
        return total.to(x_BTHD.dtype)

    def mean_backward(self, dmean_BnHD: torch.Tensor, tokens: int) -> torch.Tensor:
        """The gradient of :meth:`mean` with respect to its input, ``[B, T, H, D]``."""
        import torch

        if self == NO_POOL:
            return dmean_BnHD
        b, n, h, d = dmean_BnHD.shape
        strides_per_window, strides = self.size // self.stride, -(-tokens // self.stride)
        token_grad = dmean_BnHD / self._window_lengths(dmean_BnHD, tokens)[:, None, None]
        stride_grad = dmean_BnHD.new_zeros((b, max(strides, n + strides_per_window - 1), h, d))
        for shift in range(strides_per_window):
            stride_grad[:, shift : shift + n] += token_grad
        return torch.repeat_interleave(stride_grad, self.stride, 1)[:, :tokens]

    def unpool(self, x_BnHD: torch.Tensor, tokens: int) -> torch.Tensor:
        """Repeat the value of each window at its tokens; for windows that do not overlap."""
        if self == NO_POOL:
            return x_BnHD
        assert self.size == self.stride
        assert self.partial
        return x_BnHD.repeat_interleave(self.size, 1)[:, :tokens]

    def unpool_backward(self, dx_BTHD: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`unpool` with respect to its input: sums over windows."""
        if self == NO_POOL:
            return dx_BTHD
        assert self.size == self.stride
        return self._stride_sums(dx_BTHD.float()).to(dx_BTHD.dtype)

    def _stride_sums(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """Sums over each run of ``stride`` tokens."""
        import torch

        missing = -x_BTHD.shape[1] % self.stride
        if missing:
            x_BTHD = torch.nn.functional.pad(x_BTHD, (0, 0, 0, 0, 0, missing))
        sums: torch.Tensor = x_BTHD.unflatten(1, (-1, self.stride)).sum(2)
        return sums

    def _window_lengths(self, like: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """``[n]``: tokens of each window."""
        import torch

        tokens = like.shape[1] if tokens is None else tokens
        starts = torch.arange(self.num_windows(tokens), device=like.device) * self.stride
        return (tokens - starts).clamp(max=self.size)


NO_POOL = Pool()
