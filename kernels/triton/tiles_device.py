# mypy: ignore-errors
"""Device functions shared by the Triton attention kernels: work items, tiles, and masking.

Each program computes one *item*: a tile of rows and the tiles of columns that it visits, in two
lists.  *Runs* are ranges of adjacent tiles that are entirely visible; they are computed without
masking.  (Where runs are short, their tiles are listed one by one instead, so that the copy of the
next tile overlaps with the computation.)  *Partial* tiles have a few band slices each,
``(q0, q1, k0, k1, lo, hi)``: row i sees column j if ``q0 <= i < q1``, ``k0 <= j < k1`` and
``lo <= j - i <= hi`` for some slice.  Slices are sorted into layers, see :func:`apply_mask`.  Empty
tiles are in no list.

Offsets of tokens, heads and batches are int64, since a million tokens of 128 heads have more
elements than int32 can count.  Offsets within a tile are int32.  The head dimension is padded to a
power of two.

Legend: M rows and N columns of a tile of scores, D head dimension, padded to a power of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Fields of an item: row, begin and end of its runs, begin and end of its partial tiles, slot.
ITEM_FIELDS = tl.constexpr(6)
SLICE_FIELDS = tl.constexpr(6)


@triton.jit
def load_item(items, plan, num_items, index):
    """Load the six fields of an item of a plan."""
    item = items + to_int64(plan * num_items + index) * ITEM_FIELDS
    return (
        tl.load(item),
        tl.load(item + 1),
        tl.load(item + 2),
        tl.load(item + 3),
        tl.load(item + 4),
        tl.load(item + 5),
    )


@triton.jit
def load_program_item(items, order, num_items, batch_heads, heads, PER_HEAD: tl.constexpr):
    """Load the item of this program: batch and head (as one number, then as two), and its six
    fields."""
    bh = tl.program_id(0) % batch_heads
    plan = bh if PER_HEAD else 0
    index = tl.load(order + plan * num_items + tl.program_id(0) // batch_heads)
    row, run0, run1, tile0, tile1, slot = load_item(items, plan, num_items, index)
    return bh, to_int64(bh // heads), to_int64(bh % heads), row, run0, run1, tile0, tile1, slot


@triton.jit
def to_int64(x):
    """Convert to int64; in the interpreter loop counters are plain integers."""
    return tl.full((), 0, dtype=tl.int64) + x


@triton.jit
def load_tile(base, stride, start, limit, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
          CLIP: tl.constexpr):  # fmt: skip
    """Load tokens ``[start, start + N)`` of one head, ``[N, D]``; 0 beyond the head dimension and,
    if ``CLIP``, beyond the last token."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    ptrs = base + to_int64(start) * stride + (n[:, None] * stride + d[None, :])
    if CLIP:
        if HEAD_DIM == D:
            return tl.load(ptrs, mask=(start + n < limit)[:, None], other=0.0)
        return tl.load(ptrs, mask=(start + n < limit)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM == D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def tile_source(base, stride, tokens, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
            DESCRIPTORS: tl.constexpr):  # fmt: skip
    """The tokens of one head, to read tiles of N from: a pointer, or a tensor descriptor for the
    copy engine of Hopper and later."""
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
    """Keys and values of one batch and key/value head, see :func:`tile_source`."""
    k = tile_source(K + b * k_b + g * k_h, k_s, seq_k, N, D, HEAD_DIM, DESCRIPTORS)
    v = tile_source(V + b * v_b + g * v_h, v_s, seq_k, N, D, HEAD_DIM, DESCRIPTORS)
    return k, v


@triton.jit
def read_tile(source, stride, start, limit, N: tl.constexpr, D: tl.constexpr,
          HEAD_DIM: tl.constexpr, CLIP: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Load a tile from a :func:`tile_source`; descriptors always clip."""
    if DESCRIPTORS:
        return source.load([start, 0])
    else:  # noqa: RET505
        return load_tile(source, stride, start, limit, N, D, HEAD_DIM, CLIP)


@triton.jit
def store_tile(base, stride, start, limit, x, N: tl.constexpr, D: tl.constexpr,
          HEAD_DIM: tl.constexpr):  # fmt: skip
    """Store a tile ``[N, D]``, clipped and in the dtype of the target; see :func:`load_tile`."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    ptrs = base + to_int64(start) * stride + (n[:, None] * stride + d[None, :])
    inside = (start + n < limit)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def apply_mask(s, rows, start, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr):
    """Set the scores of hidden pairs of a partial tile to -inf.

    A layer has at most one visible interval of columns per row, and layers are ordered from left to
    right: the columns between the intervals of consecutive layers are hidden.  So no other tensor
    as large as the scores is needed.
    """
    cols = start + tl.arange(0, N)
    done = tl.full([M], -1, dtype=tl.int32)  # the last column that is masked already
    for layer in range(first, last):
        begin = done + 1
        end = done
        for i in range(tl.load(layers + layer), tl.load(layers + layer + 1)):
            ptr = slices + i * SLICE_FIELDS
            in_slice = (rows >= tl.load(ptr)) & (rows < tl.load(ptr + 1))
            left = tl.maximum(rows + tl.load(ptr + 4), tl.load(ptr + 2))
            right = tl.minimum(rows + tl.load(ptr + 5), tl.load(ptr + 3) - 1)
            begin = tl.where(in_slice, left, begin)
            end = tl.where(in_slice, right, end)
        gap = (cols[None, :] > done[:, None]) & (cols[None, :] < begin[:, None])
        s = tl.where(gap, float("-inf"), s)
        done = end
    return tl.where(cols[None, :] > done[:, None], float("-inf"), s)
