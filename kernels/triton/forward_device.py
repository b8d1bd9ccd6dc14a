# mypy: ignore-errors
"""The forward pass in Triton, over the lists of tiles that ``triton_tiles_device`` describes.

Softmax is in base 2 (``exp2`` is the hardware's); lse leaves in natural logarithms.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), over lists of tiles as FlexAttention
(arXiv 2412.05496) walks them; split rows as in Flash-Decoding (Dao et al. 2023).

Legend: M rows and N columns of a tile of scores, D head dimension, padded to a power of two.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import (
    LN2,
    LOG2E,
    hide,
    kv_sources,
    load_tile,
    program,
    read,
    store,
    wide,
)

TINY = tl.constexpr(1e-37)  # keeps the logarithm of rows that see nothing finite


@triton.jit
def _attend(q, k_source, v_source, k_stride, v_stride, col, seq_k, acc, total, top, scale,
            rows, pieces, layers, first, last, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
            HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
            PARTIAL: tl.constexpr):  # fmt: skip
    """One tile of the online softmax; ``scale`` is in base 2."""
    start = col * N
    k = read(k_source, k_stride, start, seq_k, N, D, HEAD_DIM, PARTIAL, DESCRIPTORS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if PARTIAL:
        s = hide(s, rows, start, pieces, layers, first, last, M, N)
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher) if PARTIAL else higher  # no -inf - -inf
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    v = read(v_source, v_stride, start, seq_k, N, D, HEAD_DIM, PARTIAL, DESCRIPTORS)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit
def forward(
    Q, K, V, Out, Lse, Part, PartLse,
    items, order, runs, tiles, tile_layers, layers, pieces,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    batch_heads, heads, num_items, seq_q, seq_k, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of one item; of a split row into its slot of ``Part`` and ``PartLse``."""
    bh, b, h, row, run0, run1, part0, part1, slot = program(
        items, order, num_items, batch_heads, heads, PER_HEAD
    )
    k_source, v_source = kv_sources(
        K, V, b, h // GROUP, k_b, k_s, k_h, v_b, v_s, v_h, seq_k, N, D, HEAD_DIM, DESCRIPTORS
    )
    start = row * M
    rows = start + tl.arange(0, M)
    q = load_tile(Q + b * q_b + h * q_h, q_s, start, seq_q, M, D, HEAD_DIM, True)
    acc = tl.zeros([M, D], dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    top = tl.full([M], float("-inf"), dtype=tl.float32)
    scale2 = scale * LOG2E
    if LISTED:
        for t in tl.range(run0, run1, num_stages=STAGES):
            acc, total, top = _attend(
                q, k_source, v_source, k_s, v_s, tl.load(runs + t), seq_k, acc, total, top, scale2,
                rows, pieces, layers, 0, 0, M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
    else:
        for r in range(run0, run1):
            begin = tl.load(runs + 2 * r)
            end = tl.load(runs + 2 * r + 1)
            for col in tl.range(begin, end, num_stages=STAGES):
                acc, total, top = _attend(
                    q, k_source, v_source, k_s, v_s, col, seq_k, acc, total, top, scale2,
                    rows, pieces, layers, 0, 0, M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
    for t in tl.range(part0, part1, num_stages=1, disable_licm=True):
        acc, total, top = _attend(
            q, k_source, v_source, k_s, v_s, tl.load(tiles + t), seq_k, acc, total, top, scale2,
            rows, pieces, layers, tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
            M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    # Where total is 0 nothing is seen; a NaN must stay one.
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total + TINY)) * LN2)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLIT and slot >= 0:
        at = (slot.to(tl.int64) * batch_heads + bh) * M
        store(Part + at * HEAD_DIM, HEAD_DIM, 0 * row, M, acc, M, D, HEAD_DIM)
        tl.store(PartLse + at + tl.arange(0, M), lse)
        return
    store(Out + b * o_b + h * o_h, o_s, start, seq_q, acc, M, D, HEAD_DIM)
    tl.store(Lse + bh.to(tl.int64) * seq_q + rows, lse, mask=rows < seq_q)


@triton.jit
def merge_parts(
    Part, PartLse, Out, Lse, splits, o_b, o_s, o_h, batch_heads, heads, seq_q,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """out and lse of ``ROWS`` rows of a split row of tiles from its slots, in their order."""
    pid = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    bh = pid % batch_heads
    at = splits + 3 * (pid // batch_heads)
    row, slot0, slot1 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    m = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    for slot in range(slot0, slot1):
        here = (wide(slot) * batch_heads + bh) * M + first
        lse = tl.load(PartLse + here + m)
        higher = tl.maximum(top, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp(top - base), tl.exp(lse - base)
        x = load_tile(Part + here * HEAD_DIM, HEAD_DIM, 0 * row, ROWS, ROWS, D, HEAD_DIM, False)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        top = higher
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    start = row * M + first
    store(Out + b * o_b + h * o_h, o_s, start, seq_q, acc, ROWS, D, HEAD_DIM)
    rows = start + m
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(total + TINY))
    tl.store(Lse + bh.to(tl.int64) * seq_q + rows, lse, mask=rows < seq_q)
