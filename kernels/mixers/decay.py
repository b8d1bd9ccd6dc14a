"""The decay inside chunks: factors between tokens, and between tokens and the ends of the chunk.

With G the sum of the log decays from the start of the chunk, the factor between tokens j <= t is
``exp(G_t - G_j)``: differences are taken before the exponential, since ``exp(-G_j)`` overflows
(at 88 nats in float32), and sums start at each chunk, since they lose digits with length.  Where a
document begins in between, factors are 0.  A factor of None is 1.

Legend: n chunks, h = B * H, C tokens of a chunk, K dimensions of keys, R readers (q; q and k under
the delta rule).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from cpbench.kernels.mixers.precision import full_float32

if TYPE_CHECKING:
    import torch

    from cpbench.kernels.mixers.chunks import Segments


class Decay(Protocol):
    """The factors of a slab's chunks.

    Attributes:
        segments: which tokens are of one document; None if all are.
        start: ``[n, h, C, 1 or K]``, from the start of the chunk to a token.
        end: of this shape, from a token to the end of the chunk.
        across: ``[n, h, 1 or K, 1]``, from start to end.
    """

    @property
    def segments(self) -> Segments | None: ...

    @property
    def start(self) -> torch.Tensor | None: ...

    @property
    def end(self) -> torch.Tensor | None: ...

    @property
    def across(self) -> torch.Tensor | None: ...

    def pairs(self, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
        """Products of readers ``[n, h, R, C, K]`` and writers ``[n, h, C, K]``, decayed.

        Returns:
            ``[n, h, R, C, C]``, 0 where the writer is later than the reader.
        """
        ...

    def pairs_backward(
        self, dpairs: torch.Tensor, readers: torch.Tensor, writers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of readers and writers through pairs of different tokens; ``dpairs`` is
        overwritten."""
        ...


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """``x * factor``."""
    return x if factor is None else x * factor


def make_decay(g: torch.Tensor | None, diagonal: bool, segments: Segments | None) -> Decay:
    """The decay of chunks.

    Args:
        g: ``[n, h, C, 1 or K]`` log decay of each token, or None.
    """
    if g is None:
        return NoDecay(segments)
    if diagonal:
        return DiagonalDecay(g, segments)
    return ScalarDecay(g, segments)


class NoDecay:
    """Factors of 1, or 0 between documents."""

    def __init__(self, segments: Segments | None) -> None:
        self.start: torch.Tensor | None = None
        self.end: torch.Tensor | None = None
        self.across: torch.Tensor | None = None
        self.segments = segments
        if segments is not None:
            self.start, self.end = segments.first, segments.last
            self.across = segments.through

    def pairs(self, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
        return self._visible(_products(readers, writers), 0)

    def pairs_backward(
        self, dpairs: torch.Tensor, readers: torch.Tensor, writers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _products_backward(self._visible(dpairs, -1), readers, writers)

    def _visible(self, x: torch.Tensor, diagonal: int) -> torch.Tensor:
        x = x.tril_(diagonal)
        return x if self.segments is None else _hide(x, self.segments.same.unsqueeze(2))


class ScalarDecay:
    """One decay per head and token."""

    def __init__(self, g: torch.Tensor, segments: Segments | None) -> None:
        self.segments = segments
        G = sum_decays(g, segments)
        self.start, self.end = _to_ends(G, segments)
        self.across = self.start[:, :, -1:]
        between = _exp(G - G.mT).tril_()
        self.between = between if segments is None else _hide(between, segments.same)
        self.between = self.between.unsqueeze(2)

    def pairs(self, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
        return _products(readers, writers).mul_(self.between)

    def pairs_backward(
        self, dpairs: torch.Tensor, readers: torch.Tensor, writers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dpairs.mul_(self.between).diagonal(dim1=-2, dim2=-1).zero_()
        return _products_backward(dpairs, readers, writers)


class DiagonalDecay:
    """One decay per key dimension and token.

    No single factor separates a pair (t, j), so the lower triangle of a chunk is halved again and
    again: between the later and the earlier half of a block, both exp(G_t - G_m) and exp(G_m - G_j)
    are at most 1, with m the last token of the earlier half (the secondary chunks of Gated Linear
    Attention, down to single tokens).
    """

    def __init__(self, g: torch.Tensor, segments: Segments | None) -> None:
        self.G = sum_decays(g, segments)
        self.segments = segments
        self.start, self.end = _to_ends(self.G, segments)
        self.across = self.start[:, :, -1, :, None]

    def pairs(self, readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
        n, h, R, C, _ = readers.shape
        out = readers.new_zeros((n, h, R, C, C))
        out.diagonal(dim1=-2, dim2=-1).copy_((readers * writers.unsqueeze(2)).sum(-1))
        for half in _halves(C):
            late, early = self._level(half, readers, writers)[:2]
            _quarter(out, half).copy_((late @ early.mT).unflatten(-2, (R, half)))
        return out

    def pairs_backward(
        self, dpairs: torch.Tensor, readers: torch.Tensor, writers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        R = readers.shape[2]
        dreaders, dwriters = torch.zeros_like(readers), torch.zeros_like(writers)
        for half in _halves(readers.shape[3]):
            late, early, since, until = self._level(half, readers, writers)
            dquarter = _quarter(dpairs, half).flatten(-3, -2)  # [n, h, b, R * half, half]
            dlate = (dquarter @ early).unflatten(-2, (R, half)).mul_(since)
            _blocks(dreaders, half)[..., 1, :, :].add_(dlate.transpose(2, 3))
            _blocks(dwriters, half)[..., 0, :, :].addcmul_(dquarter.mT @ late, until)
        return dreaders, dwriters

    def _level(
        self, half: int, readers: torch.Tensor, writers: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Decayed readers of the later halves ``[n, h, b, R * half, K]`` and writers of the earlier
        ones ``[n, h, b, half, K]`` of blocks of two halves, and the factors of both."""
        G = _blocks(self.G, half)
        middle = G[..., 0, -1:, :]
        since, until = _exp(G[..., 1, :, :] - middle), _exp(middle - G[..., 0, :, :])
        if self.segments is not None:
            number = _blocks(self.segments.number, half)
            own = number == number[..., 0, -1:, :].unsqueeze(-3)
            since, until = _hide(since, own[..., 1, :, :]), _hide(until, own[..., 0, :, :])
        since = since.unsqueeze(3)
        late = _blocks(readers, half)[..., 1, :, :].transpose(2, 3) * since
        return late.flatten(3, 4), _blocks(writers, half)[..., 0, :, :] * until, since, until


def sum_decays(g: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """The sums G of log decays ``[n, h, C, …]`` from the start of each chunk, or of the document if
    that begins later; the decay of its first token is that of an empty state."""
    with full_float32(g.device):
        return _summed(g, segments) @ g


def sum_decays_backward(dG: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """The gradient of log decays from that of their sums."""
    with full_float32(dG.device):
        return _summed(dG, segments).mT @ dG


def _summed(like: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """``[C, C]`` or ``[n, 1, C, C]``, 1 where the decay of a token (column) is in a sum (row)."""
    if segments is None:
        return like.new_ones((like.shape[2],) * 2).tril_()
    return (segments.same & ~segments.begins.mT).tril_().to(like.dtype)


def _halves(C: int) -> list[int]:
    return [1 << level for level in range(C.bit_length() - 1)]


def _blocks(x: torch.Tensor, half: int) -> torch.Tensor:
    """``[..., C, K]`` as ``[..., b, 2, half, K]``."""
    blocks: torch.Tensor = x.unflatten(-2, (-1, 2, half))
    return blocks


def _quarter(pairs: torch.Tensor, half: int) -> torch.Tensor:
    """The quarters of later readers and earlier writers of all blocks on the diagonal, a view:
    ``[n, h, b, R, half, half]`` of ``[n, h, R, C, C]``."""
    blocks = pairs.unflatten(4, (-1, 2, half)).unflatten(3, (-1, 2, half))
    # [n, h, R, b, 2, half, b, 2, half]
    quarters: torch.Tensor = blocks[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5)
    return quarters.permute(0, 1, 5, 2, 3, 4)


def _to_ends(G: torch.Tensor, segments: Segments | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors from the start of the chunk and to its end."""
    start, end = _exp(G.clone()), _exp(G[:, :, -1:] - G)
    if segments is not None:
        start, end = _hide(start, segments.first), _hide(end, segments.last)
    return start, end


def smallest_factor(dtype: torch.dtype) -> float:
    """Factors below it are 0, the root of the smallest normal number (1e-19 in float32): a CPU
    takes a hundred times longer for smaller numbers, which products of two factors would be."""
    import torch

    return math.sqrt(torch.finfo(dtype).tiny)


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp(x) in place, or 0."""
    import torch

    return torch.threshold_(x, math.log(smallest_factor(x.dtype)), -math.inf).exp_()


def _hide(x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """0 in place of what is not visible, which may be infinite."""
    return x.masked_fill_(~visible, 0)


def _products(readers: torch.Tensor, writers: torch.Tensor) -> torch.Tensor:
    n, h, R, C, _ = readers.shape
    return (readers.flatten(2, 3) @ writers.mT).view(n, h, R, C, C)


def _products_backward(
    dproducts: torch.Tensor, readers: torch.Tensor, writers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = dproducts.flatten(2, 3)
    return (rows @ writers).view(readers.shape), rows.mT @ readers.flatten(2, 3)
