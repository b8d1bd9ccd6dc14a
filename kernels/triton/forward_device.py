# mypy: ignore-errors
"""The forward pass in Triton, over the lists of tiles described in ``tiles_device``.

Softmax is computed in base 2 (the hardware has ``exp2``); lse is returned in natural logarithms.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), over lists of tiles as in FlexAttention
(arXiv 2412.05496); split rows as in Flash-Decoding (Dao et al. 2023).

Legend: M rows and N columns of a tile of scores, D head dimension, padded to a power of two.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import (
    LN2,
    LOG2E,
    apply_mask,
    kv_sources,
    load_program_item,
    load_tile,
    read_tile,
    store_tile,
    to_int64,
)

TINY = tl.constexpr(1e-37)  # keeps the logarithm finite for rows that see nothing


@triton.jit
def _attend(q, k_source, v_source, k_stride, v_stride, col, seq_k, acc, row_sum, row_max, scale,
            rows, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
            HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Update the online softmax with one tile; ``scale`` is for base 2."""
    start = col * N
    k = read_tile(k_source, k_stride, start, seq_k, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    new_max = tl.maximum(row_max, tl.max(s, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max  # no -inf - -inf
    p = tl.exp2(s - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    v = read_tile(v_source, v_stride, start, seq_k, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit
def forward(
    Q, K, V, Out, Lse, Partial, PartialLse,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    batch_heads, heads, num_items, seq_q, seq_k, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of one item; a part of a split row is stored in its slot of ``Partial``
    and ``PartialLse``."""
    bh, b, h, row, run0, run1, tile0, tile1, slot = load_program_item(
        items, order, num_items, batch_heads, heads, PER_HEAD
    )
    k_source, v_source = kv_sources(
        K, V, b, h // GROUP, k_b, k_s, k_h, v_b, v_s, v_h, seq_k, N, D, HEAD_DIM, DESCRIPTORS
    )
    start = row * M
    rows = start + tl.arange(0, M)
    q = load_tile(Q + b * q_b + h * q_h, q_s, start, seq_q, M, D, HEAD_DIM, True)
    acc = tl.zeros([M, D], dtype=tl.float32)
    row_sum = tl.zeros([M], dtype=tl.float32)
    row_max = tl.full([M], float("-inf"), dtype=tl.float32)
    scale2 = scale * LOG2E
    if LISTED:
        for t in tl.range(run0, run1, num_stages=STAGES):
            acc, row_sum, row_max = _attend(
                q, k_source, v_source, k_s, v_s, tl.load(runs + t), seq_k, acc, row_sum, row_max,
                scale2, rows, slices, layers, 0, 0,
                M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
    else:
        for r in range(run0, run1):
            begin = tl.load(runs + 2 * r)
            end = tl.load(runs + 2 * r + 1)
            for col in tl.range(begin, end, num_stages=STAGES):
                acc, row_sum, row_max = _attend(
                    q, k_source, v_source, k_s, v_s, col, seq_k, acc, row_sum, row_max, scale2,
                    rows, slices, layers, 0, 0, M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
    for t in tl.range(tile0, tile1, num_stages=1, disable_licm=True):
        acc, row_sum, row_max = _attend(
            q, k_source, v_source, k_s, v_s, tl.load(tiles + t), seq_k, acc, row_sum, row_max,
            scale2, rows, slices, layers,
            tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
            M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    # A row that sees nothing has a sum of 0; NaN must stay NaN.
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(row_sum + TINY)) * LN2)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if SPLIT and slot >= 0:
        offset = (slot.to(tl.int64) * batch_heads + bh) * M
        store_tile(Partial + offset * HEAD_DIM, HEAD_DIM, 0 * row, M, acc, M, D, HEAD_DIM)
        tl.store(PartialLse + offset + tl.arange(0, M), lse)
        return
    store_tile(Out + b * o_b + h * o_h, o_s, start, seq_q, acc, M, D, HEAD_DIM)
    tl.store(Lse + bh.to(tl.int64) * seq_q + rows, lse, mask=rows < seq_q)


@triton.jit
def merge_partials(
    Partial, PartialLse, Out, Lse, splits, o_b, o_s, o_h, batch_heads, heads, seq_q,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Merge ``ROWS`` rows of out and lse of a split row of tiles from its slots, in slot order."""
    pid = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    bh = pid % batch_heads
    split = splits + 3 * (pid // batch_heads)
    row, slot0, slot1 = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    m = tl.arange(0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    for slot in range(slot0, slot1):
        offset = (to_int64(slot) * batch_heads + bh) * M + first
        lse = tl.load(PartialLse + offset + m)
        new_max = tl.maximum(row_max, lse)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale, weight = tl.exp(row_max - base), tl.exp(lse - base)
        out = load_tile(
            Partial + offset * HEAD_DIM, HEAD_DIM, 0 * row, ROWS, ROWS, D, HEAD_DIM, False
        )
        acc = acc * rescale[:, None] + out * weight[:, None]
        row_sum = row_sum * rescale + weight
        row_max = new_max
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    start = row * M + first
    store_tile(Out + b * o_b + h * o_h, o_s, start, seq_q, acc, ROWS, D, HEAD_DIM)
    rows = start + m
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum + TINY))
    tl.store(Lse + bh.to(tl.int64) * seq_q + rows, lse, mask=rows < seq_q)
