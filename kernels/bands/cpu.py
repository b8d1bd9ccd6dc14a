"""The `bands` operator on CPU: a few batched matrix products per tile, nothing else of any size.

With P = exp(scores - lse), attention is matrix products of tiles (Dao et al. 2022,
"FlashAttention", as plain GEMMs).  The forward pass keeps a running row maximum and sum over the
keys of a tile; the backward pass needs neither, since lse is given.  Rows that see one square go
to torch's fused CPU kernel instead.  Everything is computed in float32 (float64 for float64), where
the inputs lie: only half-precision inputs are copied, a few heads at a time.

Legend: S queries, T keys, D head dim; g key/value heads worked on at once, R query heads of each,
h = g * R; n queries of a tile, m = R * n rows of it (head-major), w keys of a chunk of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.bands.plan import ABOVE, OUTSIDE, Fix, Layout, Span, Square, Tile

if TYPE_CHECKING:
    import torch

LOG2E = math.log2(math.e)  # exp2 is about twice as fast as exp
CHUNK = 1 << 17  # most scores of a head at once: 512 KiB, the size of an L2 cache
SCORES = 1 << 19  # most scores of all heads at once, which sets g: fewer, larger calls
LONG = 1 << 16  # elements of a square's queries from which heads go one by one: copies stay small
FLOOR = -1e30  # row maximum of a row that sees nothing: finite, so that -inf - FLOOR is -inf


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a layout; see ``cpbench.core.operator.Operator.forward``."""
    import torch

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_BSHD = _empty(q, layout.row_gaps)
    lse_BHS = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float32)
    work = _Workspace(q, k, layout)
    for b, heads_q, heads_kv in work.parts():
        (q_hSD,), (k_gTD, v_gTD) = work.read(b, heads_q, q), work.read(b, heads_kv, k, v)
        out_hSD, lse_hS1 = out_BSHD[b, :, heads_q].transpose(0, 1), lse_BHS[b, heads_q, :, None]
        for square in layout.squares:
            rows = slice(square.q0, square.q1)
            (q_1hnD,), results = _fused(rows, q_hSD), []
            for keys, causal in _calls(square):
                results.append(flash(q_1hnD, *_fused(keys, k_gTD, v_gTD), 0.0, causal, scale=scale))
            o, lse = results[0]
            for o_more, lse_more in results[1:]:
                # Weights that sum to 1 however large the lse are; no row is blind in either.
                o = torch.lerp(o, o_more, torch.sigmoid(lse_more - lse).unsqueeze(-1))
                lse = torch.logaddexp(lse, lse_more)
            out_hSD[:, rows], lse_hS1[:, rows, 0] = o[0], lse[0]
        for tile in layout.tiles:
            q_gmD = work.fold(q_hSD, tile)
            state: tuple[torch.Tensor, ...] = ()  # output, row sum and row maximum so far
            for chunk in work.chunks(tile):
                s_gmw = work.scores(len(q_gmD), tile, chunk)[0]
                k_gwD, v_gwD = _gather(k_gTD, chunk), _gather(v_gTD, chunk)
                s_gmw.baddbmm_(q_gmD, k_gwD.mT, beta=0, alpha=scale * LOG2E)
                work.hide(s_gmw, tile, chunk)
                max_gm1 = s_gmw.amax(-1, True).clamp_(min=FLOOR)
                if not state:
                    s_gmw.sub_(max_gm1).exp2_()
                    state = torch.bmm(s_gmw, v_gwD), s_gmw.sum(-1, True), max_gm1
                    continue
                o_gmD, sum_gm1, old_max = state
                torch.maximum(max_gm1, old_max, out=max_gm1)
                shrink = old_max.sub_(max_gm1).exp2_()
                s_gmw.sub_(max_gm1).exp2_()
                o_gmD.mul_(shrink).baddbmm_(s_gmw, v_gwD)
                sum_gm1.mul_(shrink).add_(s_gmw.sum(-1, True))
                state = o_gmD, sum_gm1, max_gm1
            o_gmD, sum_gm1, max_gm1 = state
            work.unfold(sum_gm1.log2().add_(max_gm1).mul_(1 / LOG2E), lse_hS1, tile)
            # The sum is at least 1 in a row that sees anything; 0 in the others.
            work.unfold(o_gmD.div_(sum_gm1.clamp_(min=1.0)), out_hSD, tile)
    return out_BSHD, lse_BHS


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients over a layout; see ``cpbench.core.operator.Operator.backward``."""
    import torch

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    shared = layout.key_gaps is None
    dq = _empty(q, layout.row_gaps)
    key_gaps = ((0, k.shape[1]),) if layout.key_gaps is None else layout.key_gaps
    dk, dv = _empty(k, key_gaps), _empty(v, key_gaps)
    work = _Workspace(q, k, layout)
    # exp(scores - inf) is 0: rows that see nothing contribute nothing.
    lse_BHS = lse.to(work.dtype).masked_fill(lse == -math.inf, math.inf)
    for b, heads_q, heads_kv in work.parts():
        q_hSD, do_hSD, out_hSD = work.read(b, heads_q, q, dout, out)
        k_gTD, v_gTD = work.read(b, heads_kv, k, v)
        # Still to be filled; the gradients themselves where they have the working dtype.
        (dq_hSD,), (dk_gTD, dv_gTD) = work.read(b, heads_q, dq), work.read(b, heads_kv, dk, dv)
        for square in layout.squares:
            rows = slice(square.q0, square.q1)
            do_1hnD, q_1hnD, out_1hnD = _fused(rows, do_hSD, q_hSD, out_hSD)
            lse_1hn = lse_BHS[b, heads_q, rows][None]
            for keys, causal in _calls(square):
                k_1gwD, v_1gwD = _fused(keys, k_gTD, v_gTD)
                given = do_1hnD, q_1hnD, k_1gwD, v_1gwD, out_1hnD, lse_1hn
                grads = flash(*given, 0.0, causal, scale=scale)
                first = keys.stop == square.k1
                for into, grad, fresh in (
                    (dq_hSD[:, rows], grads[0][0], first),
                    (dk_gTD[:, keys], grads[1][0], not shared),
                    (dv_gTD[:, keys], grads[2][0], not shared),
                ):
                    into.copy_(grad) if fresh else into.add_(grad)
        lse_hS1 = lse_BHS[b, heads_q, :, None]
        for tile in layout.tiles:
            q_gmD, do_gmD = work.fold(q_hSD, tile), work.fold(do_hSD, tile)
            delta_gm1 = (do_gmD * work.fold(out_hSD, tile)).sum(-1, True)
            lse_gm1 = work.fold(lse_hS1, tile)
            dq_gmD = torch.zeros_like(q_gmD)
            for chunk in work.chunks(tile):
                p_gmw, ds_gmw, pT_gwm, dsT_gwm = work.scores(len(q_gmD), tile, chunk)
                k_gwD, v_gwD = _gather(k_gTD, chunk), _gather(v_gTD, chunk)
                torch.baddbmm(lse_gm1, q_gmD, k_gwD.mT, beta=-LOG2E, alpha=scale * LOG2E, out=p_gmw)
                work.hide(p_gmw, tile, chunk)
                p_gmw.exp2_()
                _add_product(dv_gTD, chunk, pT_gwm, do_gmD, 1.0)
                torch.baddbmm(delta_gm1, do_gmD, v_gwD.mT, beta=-1, out=ds_gmw)
                ds_gmw.mul_(p_gmw)
                _add_product(dk_gTD, chunk, dsT_gwm, q_gmD, scale)
                dq_gmD.baddbmm_(ds_gmw, k_gwD, alpha=scale)
            work.unfold(dq_gmD, dq_hSD, tile)
        work.write(dq_hSD, dq[b, :, heads_q])
        work.write(dk_gTD, dk[b, :, heads_kv])
        work.write(dv_gTD, dv[b, :, heads_kv])
    return dq, dk, dv


class Piece(NamedTuple):
    """Keys ``[key, key + width)`` of a span."""

    span: Span
    key: int
    width: int


def _gather(x_gTD: torch.Tensor, chunk: Sequence[Piece]) -> torch.Tensor:
    """The keys of a chunk, ``[g, w, D]``: a view of one piece, a copy of several.

    A copy costs less than what small matrix products lose against one large one.
    """
    import torch

    parts = [x_gTD.narrow(1, piece.key, piece.width) for piece in chunk]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_product(
    into_gTD: torch.Tensor,
    chunk: Sequence[Piece],
    a_gwm: torch.Tensor,
    b_gmD: torch.Tensor,
    scale: float,
) -> None:
    """Add ``scale * a @ b`` to the keys of a chunk."""
    import torch

    if len(chunk) == 1:
        into_gTD.narrow(1, chunk[0].key, chunk[0].width).baddbmm_(a_gwm, b_gmD, alpha=scale)
        return
    parts = torch.bmm(a_gwm, b_gmD).split([piece.width for piece in chunk], dim=1)
    for piece, part in zip(chunk, parts, strict=True):
        into_gTD.narrow(1, piece.key, piece.width).add_(part, alpha=scale)


def _calls(square: Square) -> Iterator[tuple[slice, bool]]:
    """Keys of each call of the fused kernel that a square takes, and whether it is causal."""
    yield slice(square.k0, square.k1), square.causal
    if square.before < square.k0:
        yield slice(square.before, square.k0), False


def _fused(tokens: slice, *of: torch.Tensor) -> list[torch.Tensor]:
    """Some tokens of each ``[h, S, D]``, contiguous ``[1, h, n, D]``: strides cost the fused kernel
    a tenth of its speed, and more of it in half precision."""
    return [x[None, :, tokens].contiguous() for x in of]


def _empty(like_BSHD: torch.Tensor, zero: Iterable[tuple[int, int]]) -> torch.Tensor:
    """Contiguous uninitialised memory of that shape, zero in some ranges of tokens."""
    import torch

    made = torch.empty_like(like_BSHD, memory_format=torch.contiguous_format)
    for begin, end in zero:
        made[:, begin:end] = 0
    return made


class _Workspace:
    """Scratch memory, hiding, and the way between ``[S, H, D]`` tensors and batches of rows."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, layout: Layout) -> None:
        import torch

        self.batch, self.heads_kv, self.group = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows = max((tile.q1 - tile.q0 for tile in layout.tiles), default=0)
        cells = 1
        for tile in layout.tiles:
            keys = sum(span.k1 - span.k0 for span in tile.spans)
            m = self.group * (tile.q1 - tile.q0)
            cells = max(cells, m * min(keys, self.most_keys(m)))
        parts = -(-self.heads_kv * cells // SCORES)
        self.at_once = -(-self.heads_kv // parts)
        longest = max((square.q1 - square.q0 for square in layout.squares), default=0)
        if longest * q.shape[3] >= LONG:
            self.at_once = 1
        self.buffers = torch.empty((2, self.at_once * cells), dtype=self.dtype)
        self.views: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}
        hidden = torch.full((rows, rows), -math.inf, dtype=self.dtype)
        self.above, self.below = hidden.triu(1), hidden.tril(-1)

    @staticmethod
    def most_keys(rows: int) -> int:
        """Keys of the largest chunk of a tile with so many rows."""
        return max(1, CHUNK // rows)

    def chunks(self, tile: Tile) -> Iterator[list[Piece]]:
        """The keys of a tile in chunks: wide spans in even pieces, narrow ones together."""
        most = self.most_keys(self.group * (tile.q1 - tile.q0))
        chunk: list[Piece] = []
        free = most
        for span in tile.spans:
            width = span.k1 - span.k0
            parts = -(-width // most)
            ends = [span.k0 + width * i // parts for i in range(parts + 1)]
            for begin, end in itertools.pairwise(ends):
                if end - begin > free:
                    yield chunk
                    chunk, free = [], most
                chunk.append(Piece(span, begin, end - begin))
                free -= end - begin
        if chunk:
            yield chunk

    def parts(self) -> Iterator[tuple[int, slice, slice]]:
        """Batch index, query heads and key/value heads of what is worked on together."""
        for b in range(self.batch):
            for g0 in range(0, self.heads_kv, self.at_once):
                g1 = min(g0 + self.at_once, self.heads_kv)
                yield b, slice(g0 * self.group, g1 * self.group), slice(g0, g1)

    def read(self, b: int, heads: slice, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[heads, S, D]`` in the working dtype: views where the tensors have it."""
        return tuple(x[b, :, heads].to(self.dtype).transpose(0, 1) for x in tensors)

    def write(self, x_hSD: torch.Tensor, to_ShD: torch.Tensor) -> None:
        """Round what :meth:`read` had to copy."""
        if x_hSD.dtype != to_ShD.dtype:
            to_ShD.copy_(x_hSD.transpose(0, 1))

    def fold(self, x_hSC: torch.Tensor, tile: Tile) -> torch.Tensor:
        """``[g, m, C]``, the rows of a tile: a view unless heads are grouped."""
        x = x_hSC.narrow(1, tile.q0, tile.q1 - tile.q0)
        return x if self.group == 1 else x.reshape(len(x) // self.group, -1, x.shape[-1])

    def unfold(self, x_gmC: torch.Tensor, to_hSC: torch.Tensor, tile: Tile) -> None:
        """The inverse of :meth:`fold`, into a tensor of any dtype."""
        to = to_hSC.narrow(1, tile.q0, tile.q1 - tile.q0)
        to.copy_(x_gmC if self.group == 1 else x_gmC.view(to.shape))

    def scores(self, heads: int, tile: Tile, chunk: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
        """Two uninitialised ``[g, m, w]`` and their transposes, always in the same memory."""
        keys = sum(piece.width for piece in chunk)
        shape = (heads, (tile.q1 - tile.q0) * self.group, keys)
        if shape not in self.views:
            pair = [x[: math.prod(shape)].view(shape) for x in self.buffers]
            self.views[shape] = (*pair, *(x.mT for x in pair))
        return self.views[shape]

    def hide(self, s_gmw: torch.Tensor, tile: Tile, chunk: Sequence[Piece]) -> None:
        """Set the scores of pairs that do not see each other to -inf."""
        first = 0
        for piece in chunk:
            if piece.span.fixes:
                self._hide(s_gmw.narrow(2, first, piece.width), tile, piece)
            first += piece.width

    def _hide(self, s_gmw: torch.Tensor, tile: Tile, piece: Piece) -> None:
        rows = tile.q1 - tile.q0
        span, key, count = piece
        for fix in span.fixes:
            k0, k1 = max(fix.k0, key), min(fix.k1, key + count)
            if k0 >= k1:
                continue
            if fix.kind == OUTSIDE:
                hidden = s_gmw.new_tensor(_outside(tile, fix, k0, k1))
            else:
                # Column y of a triangle is key y + q0 + offset.
                triangle, y = self.above if fix.kind == ABOVE else self.below, tile.q0 + fix.offset
                hidden = triangle[:rows, k0 - y : k1 - y]
            part = s_gmw if self.group == 1 else s_gmw.view(-1, rows, count)
            part.narrow(2, k0 - key, k1 - k0).add_(hidden)


def _outside(tile: Tile, fix: Fix, k0: int, k1: int) -> npt.NDArray[np.float32]:
    """``[n, k1 - k0]``: 0 in the pieces of a fix, -inf elsewhere."""
    hidden = np.full((tile.q1 - tile.q0, k1 - k0), -np.inf, dtype=np.float32)
    for q0, q1, x0, x1, lo, hi in fix.pieces:
        x0, x1 = max(x0, k0), min(x1, k1)
        if x0 < x1:
            offset = np.arange(x0, x1) - np.arange(q0, q1)[:, None]
            view = hidden[q0 - tile.q0 : q1 - tile.q0, x0 - k0 : x1 - k0]
            view[(offset >= lo) & (offset <= hi)] = 0
    return hidden
