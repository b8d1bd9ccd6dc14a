# mypy: ignore-errors
"""Attention to selections of single queries in Triton: blocks of keys, or listed keys.

A program has M rows, of consecutive queries and the query heads that share their keys.  It goes
through its entries: blocks that any of its rows has selected, where a row sees those that it has
selected itself; or, of listed keys, those of its one query.  dK and dV of blocks are computed by
programs of their own, which go through the rows that have selected a block; those of listed keys
are added up by atomic additions, in any order.

Source: NSA (arXiv 2502.11089), whose rows are the heads of one query; the sparse MLA kernel of
DeepSeek-V3.2, which gathers listed keys.

Legend: M rows and N columns of a tile of scores; D and V head dims of keys and of values, padded to
powers of two; P programs of a batch, each with R query heads; W keys of an entry.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import LN2, LOG2E, head_pointer, to_int64

TINY = tl.constexpr(1e-37)  # keeps the logarithm finite for rows that see nothing


@triton.jit
def _rows(x, part, seq_q, R: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr):
    """The query and the head of each row of tile ``x``, and whether there is such a row."""
    m = tl.arange(0, M)
    query = x * QUERIES + m // R
    return query, part * R + m % R, (m < QUERIES * R) & (query < seq_q)


@triton.jit
def _load(base, at, stride, there, column, DIM: tl.constexpr):
    """Rows ``at`` of a matrix, 0 where there is none."""
    address = base + at.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(address, mask=there[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _add(base, at, stride, there, column, value, DIM: tl.constexpr):
    """Add to rows ``at`` of a matrix in float32, in any order."""
    address = base + at.to(tl.int64)[:, None] * stride + column[None, :]
    tl.atomic_add(address, value, mask=there[:, None] & (column < DIM)[None, :])


@triton.jit
def _load_heads(X, x_b, x_s, x_h, b, query, head, there, column, DIM: tl.constexpr):
    """One row of each query and head, 0 where there is none."""
    row = query.to(tl.int64) * x_s + head * x_h
    address = head_pointer(X, b, 0, x_b, x_h) + row[:, None] + column[None, :]
    return tl.load(address, mask=there[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def _store_heads(X, x_b, x_s, x_h, b, query, head, there, column, value, DIM: tl.constexpr):
    """The inverse of :func:`_load_heads`."""
    row = query.to(tl.int64) * x_s + head * x_h
    address = head_pointer(X, b, 0, x_b, x_h) + row[:, None] + column[None, :]
    mask = there[:, None] & (column < DIM)[None, :]
    tl.store(address, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _of_block(Kept, HiddenIndex, Hidden, kept_at, y, key, offset, inside, query, there, blocks,
              W: tl.constexpr):  # fmt: skip
    """Which rows see which keys of block ``y``: ``[M, N]``."""
    kept = there & (tl.load(Kept + kept_at + y, mask=there, other=0) != 0)
    seen = kept[:, None] & inside[None, :]
    entry = tl.load(HiddenIndex + query.to(tl.int64) * blocks + y, mask=kept, other=-1)
    if tl.max(entry, 0) >= 0:  # some row sees only a part of the block
        at = entry.to(tl.int64)[:, None] * W + offset[None, :]
        hidden = tl.load(Hidden + at, mask=(entry >= 0)[:, None] & inside[None, :], other=0)
        seen = seen & (hidden == 0)
    return seen


@triton.jit
def _keys(Listed, Kept, HiddenIndex, Hidden, kept_at, at, start, query, there, seq_k, blocks,
          W: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """N keys of an entry, which of them exist, and which rows see them."""
    offset = start + tl.arange(0, N)
    if TOKENS:
        key = tl.load(Listed + to_int64(at) * W + offset, mask=offset < W, other=-1)
        inside = key >= 0
        seen = there[:, None] & inside[None, :]
    else:
        y = tl.load(Listed + at)
        key = y * W + offset
        inside = (offset < W) & (key < seq_k)
        seen = _of_block(Kept, HiddenIndex, Hidden, kept_at, y, key, offset, inside, query, there,
                         blocks, W)  # fmt: skip
    return key, inside, seen


@triton.jit
def _bounds(Starts, bp, x, tiles, TOKENS: tl.constexpr):
    """The entries of a tile of rows."""
    if TOKENS:
        begin = bp * tiles + x
        end = begin + 1
    else:
        begin = tl.load(Starts + bp * (tiles + 1) + x)
        end = tl.load(Starts + bp * (tiles + 1) + x + 1)
    return begin, end


@triton.jit
def forward(
    Q, K, V, Out, Lse, Kept, HiddenIndex, Hidden, Starts, Listed,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    tiles, parts, parts_per_kv, seq_q, seq_k, blocks, scale,
    R: tl.constexpr, QUERIES: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of the rows of tile ``program_id(0)``."""
    x, bp = tl.program_id(0), tl.program_id(1)
    b, part = bp // parts, bp % parts
    g, heads = part // parts_per_kv, parts * R
    query, head, there = _rows(x, part, seq_q, R, QUERIES, M)
    d, e = tl.arange(0, D), tl.arange(0, DV)
    q = _load_heads(Q, q_b, q_s, q_h, b, query, head, there, d, HEAD_DIM)
    k_base = head_pointer(K, b, g, k_b, k_h)
    v_base = head_pointer(V, b, g, v_b, v_h)
    row = (b * heads + head).to(tl.int64) * seq_q + query
    kept_at = row * blocks
    acc = tl.zeros([M, DV], dtype=tl.float32)
    row_sum = tl.zeros([M], dtype=tl.float32)
    row_max = tl.full([M], float("-inf"), dtype=tl.float32)
    begin, end = _bounds(Starts, bp, x, tiles, TOKENS)
    for at in range(begin, end):
        for start in range(0, W, N):
            key, inside, seen = _keys(Listed, Kept, HiddenIndex, Hidden, kept_at, at, start, query,
                                      there, seq_k, blocks, W, N, TOKENS)  # fmt: skip
            k = _load(k_base, key, k_s, inside, d, HEAD_DIM)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(seen, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)  # no -inf - -inf
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(row_max - base)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            v = _load(v_base, key, v_s, inside, e, HEAD_DIM_V)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum + TINY)) * LN2)
    _store_heads(Out, o_b, o_s, o_h, b, query, head, there, e, acc, HEAD_DIM_V)
    tl.store(Lse + row, lse, mask=there)


@triton.jit
def backward_dq(
    Q, K, V, DOut, Lse2, Delta, DQ, DK, DV_, Kept, HiddenIndex, Hidden, Starts, Listed,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dq_b, dq_s, dq_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    tiles, parts, parts_per_kv, seq_q, seq_k, blocks, scale,
    R: tl.constexpr, QUERIES: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq of the rows of tile ``program_id(0)``; of listed keys, add to dk and dv."""
    x, bp = tl.program_id(0), tl.program_id(1)
    b, part = bp // parts, bp % parts
    g, heads = part // parts_per_kv, parts * R
    query, head, there = _rows(x, part, seq_q, R, QUERIES, M)
    d, e = tl.arange(0, D), tl.arange(0, DV)
    q = _load_heads(Q, q_b, q_s, q_h, b, query, head, there, d, HEAD_DIM)
    do = _load_heads(DOut, do_b, do_s, do_h, b, query, head, there, e, HEAD_DIM_V)
    k_base = head_pointer(K, b, g, k_b, k_h)
    v_base = head_pointer(V, b, g, v_b, v_h)
    row = (b * heads + head).to(tl.int64) * seq_q + query
    kept_at = row * blocks
    lse = tl.load(Lse2 + row, mask=there, other=float("inf"))
    delta = tl.load(Delta + row, mask=there, other=0.0)
    dq = tl.zeros([M, D], dtype=tl.float32)
    begin, end = _bounds(Starts, bp, x, tiles, TOKENS)
    for at in range(begin, end):
        for start in range(0, W, N):
            key, inside, seen = _keys(Listed, Kept, HiddenIndex, Hidden, kept_at, at, start, query,
                                      there, seq_k, blocks, W, N, TOKENS)  # fmt: skip
            k = _load(k_base, key, k_s, inside, d, HEAD_DIM)
            v = _load(v_base, key, v_s, inside, e, HEAD_DIM_V)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if TOKENS:
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
                _add(head_pointer(DK, b, g, dk_b, dk_h), key, dk_s, inside, d, dk, HEAD_DIM)
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
                _add(head_pointer(DV_, b, g, dv_b, dv_h), key, dv_s, inside, e, dv, HEAD_DIM_V)
    _store_heads(DQ, dq_b, dq_s, dq_h, b, query, head, there, d, dq, HEAD_DIM)


@triton.jit
def backward_dkv(
    Q, K, V, DOut, Lse2, Delta, DK, DV_, Kept, HiddenIndex, Hidden, Starts, Listed,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    parts, seq_q, seq_k, blocks, scale,
    R: tl.constexpr, QUERIES: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of N keys of a block, from the tiles of rows that have selected it; a part
    has all query heads of a key/value head."""
    STEPS: tl.constexpr = (W + N - 1) // N
    y, start = tl.program_id(0) // STEPS, tl.program_id(0) % STEPS * N
    bp = tl.program_id(1)
    b, g, heads = bp // parts, bp % parts, parts * R
    d, e = tl.arange(0, D), tl.arange(0, DV)
    offset = start + tl.arange(0, N)
    key = y * W + offset
    inside = (offset < W) & (key < seq_k)
    k = _load(head_pointer(K, b, g, k_b, k_h), key, k_s, inside, d, HEAD_DIM)
    v = _load(head_pointer(V, b, g, v_b, v_h), key, v_s, inside, e, HEAD_DIM_V)
    dk = tl.zeros([N, D], dtype=tl.float32)
    dv = tl.zeros([N, DV], dtype=tl.float32)
    begin = tl.load(Starts + bp * (blocks + 1) + y)
    end = tl.load(Starts + bp * (blocks + 1) + y + 1)
    for at in range(begin, end):
        query, head, there = _rows(tl.load(Listed + at), g, seq_q, R, QUERIES, M)
        row = (b * heads + head).to(tl.int64) * seq_q + query
        seen = _of_block(Kept, HiddenIndex, Hidden, row * blocks, y, key, offset, inside, query,
                         there, blocks, W)  # fmt: skip
        q = _load_heads(Q, q_b, q_s, q_h, b, query, head, there, d, HEAD_DIM)
        do = _load_heads(DOut, do_b, do_s, do_h, b, query, head, there, e, HEAD_DIM_V)
        lse = tl.load(Lse2 + row, mask=there, other=float("inf"))
        delta = tl.load(Delta + row, mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    _store_heads(DK, dk_b, dk_s, dk_h, b, key, g, inside, d, dk, HEAD_DIM)
    _store_heads(DV_, dv_b, dv_s, dv_h, b, key, g, inside, e, dv, HEAD_DIM_V)
