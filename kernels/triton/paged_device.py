# mypy: ignore-errors
"""Decoding over pages in Triton: each program attends to a part of the pages of one sequence and
key/value head, for all query heads that share it; a second kernel merges the parts.

Source: Flash-Decoding (Dao et al. 2023) over the page tables of PagedAttention (arXiv 2309.06180).

Legend: R query heads of a key/value head, padded to ROWS; N slots of a page, read BLOCK at a time;
D and V head dims of keys and of values, padded to powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-37)  # keeps the logarithm finite for queries that see nothing


@triton.jit
def attend(
    Q, K, V, Partial, PartialLse, indptr, pages, first, count,
    q_s, q_h, k_s, k_h, v_s, v_h, heads, splits, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of a part of the pages of sequence ``program_id(0)``."""
    b, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(indptr + b), tl.load(indptr + b + 1)
    share = (end - begin + splits - 1) // splits
    begin += part * share
    end = tl.minimum(begin + share, end)
    r, n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    d, e = tl.arange(0, D), tl.arange(0, DV)
    head = g * GROUP + r
    inside = r < GROUP
    q_at = Q + b.to(tl.int64) * q_s + head[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    acc = tl.zeros([ROWS, DV], dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for at in range(begin, end):
        page = tl.load(pages + at).to(tl.int64) * N
        low = tl.load(first + at)
        high = low + tl.load(count + at)
        for start in range(0, N, BLOCK):
            slot = start + n
            seen = (slot >= low) & (slot < high)
            k_at = K + (page + slot)[None, :] * k_s + g * k_h + d[:, None]
            k = tl.load(k_at, mask=seen[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(seen[None, :], s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)  # no -inf - -inf
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(row_max - base)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            v_at = V + (page + slot)[:, None] * v_s + g * v_h + e[None, :]
            v = tl.load(v_at, mask=seen[:, None] & (e < HEAD_DIM_V)[None, :], other=0.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum + TINY)) * LN2)
    row = (b.to(tl.int64) * splits + part) * heads + head
    out_at = Partial + row[:, None] * HEAD_DIM_V + e[None, :]
    tl.store(out_at, acc, mask=inside[:, None] & (e < HEAD_DIM_V)[None, :])
    tl.store(PartialLse + row, lse, mask=inside)


@triton.jit
def merge_splits(
    Partial, PartialLse, Out, Lse, sequences, heads, splits,
    DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query head of one sequence, in their order."""
    b, h = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, DV)
    acc = tl.zeros([DV], dtype=tl.float32)
    total, largest = 0.0, float("-inf")
    for part in range(splits):
        row = (b.to(tl.int64) * splits + part) * heads + h
        lse = tl.load(PartialLse + row)
        new = tl.maximum(largest, lse)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink, weight = tl.exp(largest - base), tl.exp(lse - base)
        out = tl.load(Partial + row * HEAD_DIM_V + e, mask=e < HEAD_DIM_V, other=0.0)
        acc = acc * shrink + out * weight
        total = total * shrink + weight
        largest = new
    acc = acc / tl.where(total == 0.0, 1.0, total)
    out_at = Out + (b.to(tl.int64) * heads + h) * HEAD_DIM_V + e
    tl.store(out_at, acc.to(Out.dtype.element_ty), mask=e < HEAD_DIM_V)
    lse = tl.where(total == 0.0, float("-inf"), largest + tl.log(total + TINY))
    tl.store(Lse + h * sequences + b, lse)
