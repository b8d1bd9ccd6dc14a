# mypy: ignore-errors
"""What the Triton kernels of attention share: items of work, tiles of tokens, and hiding.

A program works on one *item*: a tile of rows and the tiles of columns that it visits, in two lists.
*Runs* are ranges of neighbouring tiles in which everything is visible: they are computed without
masking.  (Where such tiles have few neighbours they are listed one by one instead, so that copying
the next one overlaps with work on this one.)  *Partial* tiles carry a few *pieces* each, band
slices ``(q0, q1, k0, k1, lo, hi)``: row i sees column j when some piece has ``q0 <= i < q1``,
``k0 <= j < k1`` and ``lo <= j - i <= hi``.  Pieces are sorted into layers, see :func:`hide`.  Empty
tiles are in no list.

Offsets of tokens, heads and batches are int64: a million tokens of 128 heads are more elements than
int32 counts.  Within a tile they are int32.  The head dimension is padded to a power
of two.

Legend: M rows and N columns of a tile of scores, D head dimension, padded to a power of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(6)  # of an item: row, runs begin and end, partial tiles begin and end, slot
PIECE = tl.constexpr(6)


@triton.jit
def item(items, plan, num_items, number):
    """The six fields of an item of a plan."""
    at = items + wide(plan * num_items + number) * FIELDS
    return (
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
    )


@triton.jit
def program(items, order, num_items, batch_heads, heads, PER_HEAD: tl.constexpr):
    """What one program works on: its batch and head (together, then as two), and the fields of its
    item."""
    bh = tl.program_id(0) % batch_heads
    plan = bh if PER_HEAD else 0
    number = tl.load(order + plan * num_items + tl.program_id(0) // batch_heads)
    row, run0, run1, part0, part1, slot = item(items, plan, num_items, number)
    return bh, wide(bh // heads), wide(bh % heads), row, run0, run1, part0, part1, slot


@triton.jit
def wide(x):
    """As int64; loop counters are plain integers in the interpreter."""
    return tl.full((), 0, dtype=tl.int64) + x


@triton.jit
def load_tile(base, stride, start, limit, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
          CLIP: tl.constexpr):  # fmt: skip
    """Tokens ``[start, start + N)`` of one head, ``[N, D]``; 0 beyond the tokens if ``CLIP`` and
    beyond the head dimension."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    at = base + wide(start) * stride + (n[:, None] * stride + d[None, :])
    if CLIP:
        if HEAD_DIM == D:
            return tl.load(at, mask=(start + n < limit)[:, None], other=0.0)
        return tl.load(at, mask=(start + n < limit)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == D:
        return tl.load(at)
    return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def source_of(base, stride, tokens, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
            DESCRIPTORS: tl.constexpr):  # fmt: skip
    """One head's tokens, of which tiles of N are to be read: its address, or a tensor descriptor
    for the copy engine of Hopper and later."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(
            base, shape=[tokens, HEAD_DIM], strides=[stride, 1], block_shape=[N, D]
        )
    else:  # noqa: RET505
        return base


@triton.jit
def kv_sources(
    K, V, b, g, k_b, k_s, k_h, v_b, v_s, v_h, seq_k, N: tl.constexpr, D: tl.constexpr,
    HEAD_DIM: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Keys and values of a batch and key/value head, as :func:`source_of`."""
    k = source_of(K + b * k_b + g * k_h, k_s, seq_k, N, D, HEAD_DIM, DESCRIPTORS)
    v = source_of(V + b * v_b + g * v_h, v_s, seq_k, N, D, HEAD_DIM, DESCRIPTORS)
    return k, v


@triton.jit
def read(source, stride, start, limit, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
          CLIP: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """A tile of a :func:`source_of`; descriptors clip by themselves."""
    if DESCRIPTORS:
        return source.load([start, 0])
    else:  # noqa: RET505
        return load_tile(source, stride, start, limit, N, D, HEAD_DIM, CLIP)


@triton.jit
def store(base, stride, start, limit, x, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The inverse of :func:`load_tile`, clipped, in the dtype of the target."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    at = base + wide(start) * stride + (n[:, None] * stride + d[None, :])
    inside = (start + n < limit)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def hide(s, rows, start, pieces, layers, first, last, M: tl.constexpr, N: tl.constexpr):
    """Scores with -inf where row and column do not see each other.

    A layer holds at most one visible interval of columns for each row, and layers go from left to
    right: what lies between the interval of one layer and that of the next is hidden.  So nothing
    but the scores is as large as the scores.
    """
    cols = start + tl.arange(0, N)
    shown = tl.full([M], -1, dtype=tl.int32)  # the last column that is not to be hidden any more
    for layer in range(first, last):
        begin = shown + 1
        end = shown
        for p in range(tl.load(layers + layer), tl.load(layers + layer + 1)):
            at = pieces + p * PIECE
            here = (rows >= tl.load(at)) & (rows < tl.load(at + 1))
            left = tl.maximum(rows + tl.load(at + 4), tl.load(at + 2))
            right = tl.minimum(rows + tl.load(at + 5), tl.load(at + 3) - 1)
            begin = tl.where(here, left, begin)
            end = tl.where(here, right, end)
        gap = (cols[None, :] > shown[:, None]) & (cols[None, :] < begin[:, None])
        s = tl.where(gap, float("-inf"), s)
        shown = end
    return tl.where(cols[None, :] > shown[:, None], float("-inf"), s)
