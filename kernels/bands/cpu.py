"""The `bands` operator on CPU: a few batched matrix products per tile.

With P = exp(scores - lse), attention is matrix products of tiles (Dao et al. 2022,
"FlashAttention", as plain GEMMs).  The forward pass keeps a running row maximum and sum over the
keys of a tile; the backward pass needs neither, since lse is given.  Rows that see a single square
go to torch's fused CPU kernel (``bands.fused``), unless values have a head_dim of their own.  Tiles
are computed in float32 (float64 for float64) without copying the inputs; only half-precision
inputs are converted, a few heads at a time.

Legend: S queries, T keys, D head dim (values may have another); g key/value heads of a head group,
R query heads of each, h = g * R; n queries of a tile, m = R * n rows of it (head-major), w keys of
a chunk of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.bands.fused import Squares, WholeSquare
from cpbench.kernels.bands.plan import ABOVE, OUTSIDE, HiddenRegion, Layout, Span, Tile

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients

LOG2E = math.log2(math.e)  # exp2 is about twice as fast as exp
MAX_HEAD_SCORES = 1 << 17  # scores of a head at once: 512 KiB, the size of an L2 cache
MAX_SCORES = 1 << 19  # scores of a head group at once, which sets g: fewer, larger calls
MIN_ROW_MAX = -1e30  # lower bound of row maxima: finite, so that -inf - MIN_ROW_MAX is -inf


def forward(qkv: QKV, layout: Layout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a layout; see ``cpbench.core.operator.Operator.forward``."""
    import torch

    q, k, v = qkv
    whole = WholeSquare.of(layout.squares, scale, q, k, backward=False)
    if whole is not None:
        return whole.forward(q, k, v)
    out_BSHD = _empty_with_zeros((*q.shape[:3], v.shape[3]), q, layout.row_gaps)
    lse_BHS = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32)
    workspace, squares = _Workspace(q, k, layout), Squares(layout.squares, scale)
    for b, heads_q, heads_kv in workspace.head_groups():
        out_hSD, lse_hS1 = out_BSHD[b, :, heads_q].transpose(0, 1), lse_BHS[b, heads_q, :, None]
        (q_hSD,), kv_gTD = _heads_first(b, heads_q, q), _heads_first(b, heads_kv, k, v)
        of_queries = [x[None] for x in (q_hSD, out_hSD, lse_hS1[..., 0])]
        of_keys = [x[None] for x in kv_gTD]
        for square in layout.squares:
            squares.forward(of_queries, of_keys, square)
        q_hSD, k_gTD, v_gTD = workspace.read(q_hSD, *kv_gTD)
        for tile in layout.tiles:
            q_gmD = workspace.fold(q_hSD, tile)
            state: tuple[torch.Tensor, ...] = ()  # output, row sum and row maximum so far
            for chunk in workspace.chunks(tile):
                s_gmw = workspace.scores(len(q_gmD), tile, chunk)[0]
                k_gwD, v_gwD = workspace.gather(k_gTD, chunk), workspace.gather(v_gTD, chunk)
                s_gmw.baddbmm_(q_gmD, k_gwD.mT, beta=0, alpha=scale * LOG2E)
                workspace.apply_mask(s_gmw, tile, chunk)
                max_gm1 = s_gmw.amax(-1, True).clamp_(min=MIN_ROW_MAX)
                if not state:
                    s_gmw.sub_(max_gm1).exp2_()
                    state = torch.bmm(s_gmw, v_gwD), s_gmw.sum(-1, True), max_gm1
                    continue
                o_gmD, sum_gm1, old_max = state
                torch.maximum(max_gm1, old_max, out=max_gm1)
                rescale = old_max.sub_(max_gm1).exp2_()
                s_gmw.sub_(max_gm1).exp2_()
                o_gmD.mul_(rescale).baddbmm_(s_gmw, v_gwD)
                sum_gm1.mul_(rescale).add_(s_gmw.sum(-1, True))
                state = o_gmD, sum_gm1, max_gm1
            o_gmD, sum_gm1, max_gm1 = state
            workspace.unfold(sum_gm1.log2().add_(max_gm1).mul_(1 / LOG2E), lse_hS1, tile)
            # The sum is at least 1 for rows that see something, and 0 for others.
            workspace.unfold(o_gmD.div_(sum_gm1.clamp_(min=1.0)), out_hSD, tile)
    return out_BSHD, lse_BHS


def backward(x: BackwardInputs, layout: Layout, scale: float) -> Gradients:
    """Gradients over a layout; see ``cpbench.core.operator.Operator.backward``."""

    dout, q, k, v, out, lse = x
    # exp(scores - inf) is 0: rows that see nothing contribute nothing.
    no_lse = lse == -math.inf
    whole = WholeSquare.of(layout.squares, scale, q, k, backward=True)
    if whole is not None:
        return whole.backward(x, lse.masked_fill(no_lse, math.inf))
    dq = _empty_with_zeros(q.shape, q, layout.row_gaps)
    dk, dv = (_empty_with_zeros(x.shape, x, layout.key_gaps) for x in (k, v))
    workspace, squares = _Workspace(q, k, layout), Squares(layout.squares, scale)
    lse_BHS = lse.to(workspace.dtype).masked_fill(no_lse, math.inf)
    for b, heads_q, heads_kv in workspace.head_groups():
        *queries_hSD, dq_hSD = _heads_first(b, heads_q, dout, q, out, dq)
        kv_gTD, targets = _heads_first(b, heads_kv, k, v), _heads_first(b, heads_kv, dk, dv)
        lse_hS1 = lse_BHS[b, heads_q, :, None]
        do_hSD, q_hSD, out_hSD, k_gTD, v_gTD = workspace.read(*queries_hSD, *kv_gTD)
        # Sums of several parts are of the working dtype, and written before what stands alone.
        for alone, grads in ((False, workspace.sums(targets, layout)), (True, targets)):
            of_queries = [x[None] for x in (*queries_hSD, dq_hSD, lse_hS1[..., 0])]
            of_keys = [x[None] for x in (*kv_gTD, *grads)]
            for square in layout.squares:
                if square.alone == alone:
                    squares.backward(of_queries, of_keys, square)
            for tile in layout.tiles:
                if tile.alone == alone:
                    of_tile = q_hSD, do_hSD, out_hSD, lse_hS1, dq_hSD
                    _backward_of_tile(workspace, tile, of_tile, (k_gTD, v_gTD, *grads), scale)
            for target, total in zip(targets, grads, strict=True):
                if total is not target:
                    target.copy_(total)
    return dq, dk, dv


def _backward_of_tile(
    workspace: _Workspace,
    tile: Tile,
    of_queries: Sequence[torch.Tensor],
    of_keys: Sequence[torch.Tensor],
    scale: float,
) -> None:
    """Write dQ of a tile, and write dK and dV if it alone has its keys, else add them.

    Args:
        of_queries: q, dout, out, lse and dQ, ``[h, S, D]`` and ``[h, S, 1]``.
        of_keys: k, v, dK and dV, ``[g, T, D]``.
    """
    import torch

    *inputs, dq_hSD = of_queries
    k_gTD, v_gTD, dk_gTD, dv_gTD = of_keys
    q_gmD, do_gmD, out_gmD, lse_gm1 = (workspace.fold(x, tile) for x in inputs)
    delta_gm1 = (do_gmD * out_gmD).sum(-1, True)
    dq_gmD = torch.zeros_like(q_gmD)
    for chunk in workspace.chunks(tile):
        p_gmw, ds_gmw, pT_gwm, dsT_gwm = workspace.scores(len(q_gmD), tile, chunk)
        k_gwD, v_gwD = workspace.gather(k_gTD, chunk), workspace.gather(v_gTD, chunk)
        torch.baddbmm(lse_gm1, q_gmD, k_gwD.mT, beta=-LOG2E, alpha=scale * LOG2E, out=p_gmw)
        workspace.apply_mask(p_gmw, tile, chunk)
        p_gmw.exp2_()
        _put_product(dv_gTD, chunk, pT_gwm, do_gmD, 1.0, tile.alone)
        torch.baddbmm(delta_gm1, do_gmD, v_gwD.mT, beta=-1, out=ds_gmw)
        ds_gmw.mul_(p_gmw)
        _put_product(dk_gTD, chunk, dsT_gwm, q_gmD, scale, tile.alone)
        dq_gmD.baddbmm_(ds_gmw, k_gwD, alpha=scale)
    workspace.unfold(dq_gmD, dq_hSD, tile)


class KeyRange(NamedTuple):
    """Keys ``[key, key + width)`` of a span."""

    span: Span
    key: int
    width: int


def _put_product(
    x_gTD: torch.Tensor,
    chunk: Sequence[KeyRange],
    a_gwm: torch.Tensor,
    b_gmD: torch.Tensor,
    scale: float,
    overwrite: bool,
) -> None:
    """Write ``scale * a @ b`` to the keys of a chunk, or add it."""
    import torch

    if len(chunk) == 1 and x_gTD.dtype == a_gwm.dtype:
        keys = x_gTD.narrow(1, chunk[0].key, chunk[0].width)
        keys.baddbmm_(a_gwm, b_gmD, beta=0 if overwrite else 1, alpha=scale)
        return
    products = torch.bmm(a_gwm, b_gmD).mul_(scale).split([keys.width for keys in chunk], dim=1)
    for (_, key, width), product in zip(chunk, products, strict=True):
        target = x_gTD.narrow(1, key, width)
        target.copy_(product) if overwrite else target.add_(product)


def _heads_first(b: int, heads: slice, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views ``[heads, S, D]``."""
    return tuple(x[b, :, heads].transpose(0, 1) for x in tensors)


def _empty_with_zeros(
    shape: Sequence[int], like: torch.Tensor, gaps: Iterable[tuple[int, int]]
) -> torch.Tensor:
    """Contiguous uninitialised memory in the dtype of a tensor, zero in some ranges of tokens."""
    empty = like.new_empty(tuple(shape))
    for begin, end in gaps:
        empty[:, begin:end] = 0
    return empty


class _Workspace:
    """Scratch memory, masking, and conversion between ``[S, H, D]`` tensors and rows of tiles."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, layout: Layout) -> None:
        import torch

        self.batch, self.heads_kv, self.group = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        # Whole tensors are converted at once, unless few of their tokens are in tiles.
        self.converts = 4 * sum(tile.q1 - tile.q0 for tile in layout.tiles) > q.shape[1]
        rows = max((tile.q1 - tile.q0 for tile in layout.tiles), default=0)
        max_scores = 1  # of one head
        for tile in layout.tiles:
            keys = sum(span.k1 - span.k0 for span in tile.spans)
            m = self.group * (tile.q1 - tile.q0)
            max_scores = max(max_scores, m * min(keys, self.max_chunk_keys(m)))
        num_groups = -(-self.heads_kv * max_scores // MAX_SCORES)
        self.max_heads = -(-self.heads_kv // num_groups)
        shape = (2, self.max_heads * max_scores)
        self.buffers = torch.empty(shape, dtype=self.dtype, device="cpu")
        self.views: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}
        hidden = torch.full((rows, rows), -math.inf, dtype=self.dtype, device="cpu")
        self.above, self.below = hidden.triu(1), hidden.tril(-1)

    @staticmethod
    def max_chunk_keys(rows: int) -> int:
        """Maximum keys of a chunk of a tile with so many rows."""
        return max(1, MAX_HEAD_SCORES // rows)

    def chunks(self, tile: Tile) -> Iterator[list[KeyRange]]:
        """The keys of a tile in chunks: wide spans are split evenly, narrow ones combined."""
        max_keys = self.max_chunk_keys(self.group * (tile.q1 - tile.q0))
        chunk: list[KeyRange] = []
        free = max_keys
        for span in tile.spans:
            width = span.k1 - span.k0
            splits = -(-width // max_keys)
            ends = [span.k0 + width * i // splits for i in range(splits + 1)]
            for begin, end in itertools.pairwise(ends):
                if end - begin > free:
                    yield chunk
                    chunk, free = [], max_keys
                chunk.append(KeyRange(span, begin, end - begin))
                free -= end - begin
        if chunk:
            yield chunk

    def head_groups(self) -> Iterator[tuple[int, slice, slice]]:
        """Batch index, query heads and key/value heads of each group that is computed together."""
        for b in range(self.batch):
            for g0 in range(0, self.heads_kv, self.max_heads):
                g1 = min(g0 + self.max_heads, self.heads_kv)
                yield b, slice(g0 * self.group, g1 * self.group), slice(g0, g1)

    def read(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors for tiles, in the working dtype if many of their tokens are needed."""
        return tuple(x.to(self.dtype) if self.converts else x for x in tensors)

    def sums(self, targets: Sequence[torch.Tensor], layout: Layout) -> Sequence[torch.Tensor]:
        """Where gradients of keys that several parts have are added up."""
        import torch

        alone = [tile.alone for tile in layout.tiles] + [s.alone for s in layout.squares]
        if targets[0].dtype == self.dtype or all(alone):
            return targets
        return [torch.zeros_like(x, dtype=self.dtype) for x in targets]

    def gather(self, x_gTD: torch.Tensor, chunk: Sequence[KeyRange]) -> torch.Tensor:
        """The keys of a chunk, ``[g, w, D]``: a view of a single range, a copy of several.

        One large matrix product is faster than several small ones, even with the copy.
        """
        import torch

        ranges = [x_gTD.narrow(1, keys.key, keys.width) for keys in chunk]
        return (ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=1)).to(self.dtype)

    def fold(self, x_hSC: torch.Tensor, tile: Tile) -> torch.Tensor:
        """The rows of a tile, ``[g, m, C]``: a view unless heads are grouped or converted."""
        x = x_hSC.narrow(1, tile.q0, tile.q1 - tile.q0).to(self.dtype)
        return x if self.group == 1 else x.reshape(len(x) // self.group, -1, x.shape[-1])

    def unfold(self, x_gmC: torch.Tensor, target_hSC: torch.Tensor, tile: Tile) -> None:
        """The inverse of :meth:`fold`, into a tensor of any dtype."""
        target = target_hSC.narrow(1, tile.q0, tile.q1 - tile.q0)
        target.copy_(x_gmC if self.group == 1 else x_gmC.view(target.shape))

    def scores(self, heads: int, tile: Tile, chunk: Sequence[KeyRange]) -> tuple[torch.Tensor, ...]:
        """Two uninitialised ``[g, m, w]`` and their transposes, always in the same memory."""
        width = sum(keys.width for keys in chunk)
        shape = (heads, (tile.q1 - tile.q0) * self.group, width)
        if shape not in self.views:
            pair = [x[: math.prod(shape)].view(shape) for x in self.buffers]
            self.views[shape] = (*pair, *(x.mT for x in pair))
        return self.views[shape]

    def apply_mask(self, s_gmw: torch.Tensor, tile: Tile, chunk: Sequence[KeyRange]) -> None:
        """Set the scores of hidden pairs to -inf."""
        first = 0
        for keys in chunk:
            if keys.span.hidden:
                self._apply_regions(s_gmw.narrow(2, first, keys.width), tile, keys)
            first += keys.width

    def _apply_regions(self, s_gmw: torch.Tensor, tile: Tile, keys: KeyRange) -> None:
        rows = tile.q1 - tile.q0
        span, key, width = keys
        for region in span.hidden:
            k0, k1 = max(region.k0, key), min(region.k1, key + width)
            if k0 >= k1:
                continue
            if region.kind == OUTSIDE:
                bias = s_gmw.new_tensor(_outside_bias(tile, region, k0, k1))
            else:
                # Column y of a triangle is key y + q0 + offset.
                triangle = self.above if region.kind == ABOVE else self.below
                y = tile.q0 + region.offset
                bias = triangle[:rows, k0 - y : k1 - y]
            scores = s_gmw if self.group == 1 else s_gmw.view(-1, rows, width)
            scores.narrow(2, k0 - key, k1 - k0).add_(bias)


def _outside_bias(tile: Tile, region: HiddenRegion, k0: int, k1: int) -> npt.NDArray[np.float32]:
    """``[n, k1 - k0]``: 0 in the strips of a region, -inf elsewhere."""
    bias = np.full((tile.q1 - tile.q0, k1 - k0), -np.inf, dtype=np.float32)
    for q0, q1, x0, x1, lo, hi in region.strips:
        x0, x1 = max(x0, k0), min(x1, k1)
        if x0 < x1:
            offset = np.arange(x0, x1) - np.arange(q0, q1)[:, None]
            view = bias[q0 - tile.q0 : q1 - tile.q0, x0 - k0 : x1 - k0]
            view[(offset >= lo) & (offset <= hi)] = 0
    return bias
