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
elements than int32 can count.  Offsets within a tile are int32.  Shapes of tensors are powers of
two, so that a head dimension is padded, or divided into two *parts* that are: 192 into 128 and 64.
A tile ``[N, D0 + D1]`` is a tuple of its parts, of which there is one if ``D1`` is 0.

Legend: M rows and N columns of a tile of scores, D0 and D1 the parts of a head dimension, which is
HEAD_DIM without padding; those of the values are V0, V1 and HEAD_DIM_V.
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
def program_work(order, num_items, batch_heads, section, PER_HEAD: tl.constexpr):
    """Batch and head of this program as one number, and the number of its item.

    Programs start in the order of their numbers: heads in sections of ``section``, whose keys and
    values fit in the L2 cache together, and in a section the items by decreasing work.
    """
    pid = tl.program_id(0)
    first = pid // (section * num_items) * section
    width = tl.minimum(section, batch_heads - first)
    pid -= first * num_items
    bh = first + pid % width
    return bh, tl.load(order + (bh if PER_HEAD else 0) * num_items + pid // width)


@triton.jit
def to_int64(x):
    """Convert to int64; in the interpreter loop counters are plain integers."""
    return tl.full((), 0, dtype=tl.int64) + x


@triton.jit
def head_pointer(X, b, h, x_b, x_h):
    """A pointer to the first element of one batch and head."""
    return X + to_int64(b) * x_b + to_int64(h) * x_h


@triton.jit
def head_source(X, Rest, b, h, x_b, x_h, D1: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """What to read tiles of one batch and head from: a pointer to its first element, or for the
    copy engine of Hopper and later the descriptors of all of a tensor, ``X`` of the first part and
    ``Rest`` of the second one.  (Triton launches no kernel with descriptors in a tuple.)"""
    if DESCRIPTORS:
        if D1:
            return X, Rest
        else:  # noqa: RET505
            return (X,)
    else:
        return head_pointer(X, b, h, x_b, x_h)


@triton.jit
def read_tile(
    source, b, h, stride, start, limit, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HEAD_DIM: tl.constexpr, CLIP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile from a :func:`head_source`; descriptors always clip."""
    if DESCRIPTORS:
        first = source[0].load([b, start, h, 0]).reshape(N, D0)
        if D1:
            return first, source[1].load([b, start, h, D0]).reshape(N, D1)
        else:  # noqa: RET505
            return (first,)
    else:
        return load_tile(source, stride, start, limit, N, D0, D1, HEAD_DIM, CLIP)


@triton.jit
def load_tile(base, stride, start, limit, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
          HEAD_DIM: tl.constexpr, CLIP: tl.constexpr):  # fmt: skip
    """Load tokens ``[start, start + N)`` of one head; 0 beyond the head dimension and, if ``CLIP``,
    beyond the last token."""
    first = _load_part(base, stride, start, limit, N, D0, HEAD_DIM, CLIP)
    if D1:
        return first, _load_part(base + D0, stride, start, limit, N, D1, HEAD_DIM - D0, CLIP)
    else:  # noqa: RET505
        return (first,)


@triton.jit
def _load_part(base, stride, start, limit, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
          CLIP: tl.constexpr):  # fmt: skip
    """Load the first ``WIDTH`` elements of tokens, or all D if there are more, ``[N, D]``."""
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    ptrs = base + to_int64(start) * stride + (n[:, None] * stride + d[None, :])
    if CLIP:
        if WIDTH >= D:
            return tl.load(ptrs, mask=(start + n < limit)[:, None], other=0.0)
        return tl.load(ptrs, mask=(start + n < limit)[:, None] & (d < WIDTH)[None, :], other=0.0)
    if WIDTH >= D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, stride, start, limit, x, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
          HEAD_DIM: tl.constexpr):  # fmt: skip
    """Store a tile, clipped and in the dtype of the target; see :func:`load_tile`."""
    _store_part(base, stride, start, limit, x[0], N, D0, HEAD_DIM)
    if D1:
        _store_part(base + D0, stride, start, limit, x[1], N, D1, HEAD_DIM - D0)


@triton.jit
def _store_part(base, stride, start, limit, x, N: tl.constexpr, D: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    ptrs = base + to_int64(start) * stride + (n[:, None] * stride + d[None, :])
    inside = (start + n < limit)[:, None] & (d < WIDTH)[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def zero_tile(N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A tile of float32 zeros."""
    if D1:
        return tl.zeros([N, D0], dtype=tl.float32), tl.zeros([N, D1], dtype=tl.float32)
    else:  # noqa: RET505
        return (tl.zeros([N, D0], dtype=tl.float32),)


@triton.jit
def multiplied(x, factor, D1: tl.constexpr):
    """A tile times a scalar or a column."""
    if D1:
        return x[0] * factor, x[1] * factor
    else:  # noqa: RET505
        return (x[0] * factor,)


@triton.jit
def added(x, y, D1: tl.constexpr):
    """The sum of two tiles."""
    if D1:
        return x[0] + y[0], x[1] + y[1]
    else:  # noqa: RET505
        return (x[0] + y[0],)


@triton.jit
def inner_products(x, y, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``x @ y.T`` of two tiles."""
    product = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if D1:
        product = tl.dot(x[1], tl.trans(y[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(weights, y, acc, D1: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + weights @ y`` for two tiles ``acc`` and ``y``."""
    weights = weights.to(y[0].dtype)
    first = tl.dot(weights, y[0], acc[0], input_precision=PRECISION)
    if D1:
        return first, tl.dot(weights, y[1], acc[1], input_precision=PRECISION)
    else:  # noqa: RET505
        return (first,)


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
