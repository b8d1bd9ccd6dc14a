# mypy: ignore-errors
"""The forward pass in Triton, over the lists of tiles described in ``tiles_device``.

Softmax is computed in base 2 (the hardware has ``exp2``); lse is returned in natural logarithms.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), over lists of tiles as in FlexAttention
(arXiv 2412.05496); split rows as in Flash-Decoding (Dao et al. 2023).

Legend: M rows and N columns of a tile of scores; D0, D1, V0, V1: see ``tiles_device``.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import (
    LN2,
    LOG2E,
    add_product,
    added,
    apply_mask,
    head_pointer,
    head_source,
    inner_products,
    load_item,
    load_tile,
    multiplied,
    program_work,
    read_tile,
    store_tile,
    to_int64,
    zero_tile,
)

TINY = tl.constexpr(1e-37)  # keeps the logarithm finite for rows that see nothing


@triton.jit
def _attend(q, k_source, v_source, b, g, k_stride, v_stride, col, seq_k, acc, row_sum, row_max,
            scale, rows, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr,
            D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr, V0: tl.constexpr,
            V1: tl.constexpr, HEAD_DIM_V: tl.constexpr, PRECISION: tl.constexpr,
            DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Update the online softmax with one tile.

    ``scale``, which is positive and for base 2, is applied in the exponent, where it costs nothing;
    ``row_max`` is of scores without it.
    """
    start = col * N
    k = read_tile(k_source, b, g, k_stride, start, seq_k, N, D0, D1, HEAD_DIM, MASKED, DESCRIPTORS)
    s = inner_products(q, k, D1, PRECISION)
    if MASKED:
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    new_max = tl.maximum(row_max, tl.max(s, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max  # no -inf - -inf
    p = tl.exp2(s * scale - (base * scale)[:, None])
    rescale = tl.exp2((row_max - base) * scale)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    v = read_tile(
        v_source, b, g, v_stride, start, seq_k, N, V0, V1, HEAD_DIM_V, MASKED, DESCRIPTORS
    )
    acc = add_product(p, v, multiplied(acc, rescale[:, None], V1), V1, PRECISION)
    return acc, row_sum, new_max


@triton.jit
def forward(
    Q, K, KRest, V, VRest, Out, Lse, Partial, PartialLse,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    batch_heads, heads, section, num_items, seq_q, seq_k, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of one item; a part of a split row is stored in its slot of ``Partial``
    and ``PartialLse``."""
    bh, index = program_work(order, num_items, batch_heads, section, PER_HEAD)
    row, run0, run1, tile0, tile1, slot = load_item(items, bh if PER_HEAD else 0, num_items, index)
    b, h = bh // heads, bh % heads
    g = h // GROUP
    k_source = head_source(K, KRest, b, g, k_b, k_h, D1, DESCRIPTORS)
    v_source = head_source(V, VRest, b, g, v_b, v_h, V1, DESCRIPTORS)
    start = row * M
    rows = start + tl.arange(0, M)
    q_source = head_pointer(Q, b, h, q_b, q_h)
    q = load_tile(q_source, q_s, start, seq_q, M, D0, D1, HEAD_DIM, True)
    acc = zero_tile(M, V0, V1)
    row_sum = tl.zeros([M], dtype=tl.float32)
    row_max = tl.full([M], float("-inf"), dtype=tl.float32)
    scale2 = scale * LOG2E
    if LISTED:
        for t in tl.range(run0, run1, num_stages=STAGES):
            acc, row_sum, row_max = _attend(
                q, k_source, v_source, b, g, k_s, v_s, tl.load(runs + t), seq_k, acc, row_sum,
                row_max, scale2, rows, slices, layers, 0, 0,
                M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
    else:
        for r in range(run0, run1):
            begin = tl.load(runs + 2 * r)
            end = tl.load(runs + 2 * r + 1)
            for col in tl.range(begin, end, num_stages=STAGES):
                acc, row_sum, row_max = _attend(
                    q, k_source, v_source, b, g, k_s, v_s, col, seq_k, acc, row_sum,
                    row_max, scale2, rows, slices, layers, 0, 0,
                    M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
    for t in tl.range(tile0, tile1, num_stages=1, disable_licm=True):
        acc, row_sum, row_max = _attend(
            q, k_source, v_source, b, g, k_s, v_s, tl.load(tiles + t), seq_k, acc, row_sum,
            row_max, scale2, rows, slices, layers,
            tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
            M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    # A row that sees nothing has a sum of 0; NaN must stay NaN.
    lse = tl.where(
        row_sum == 0.0, float("-inf"), (row_max * scale2 + tl.log2(row_sum + TINY)) * LN2
    )
    acc = multiplied(acc, (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None], V1)
    if SPLIT and slot >= 0:
        offset = (to_int64(slot) * batch_heads + bh) * M
        partial = Partial + offset * HEAD_DIM_V
        store_tile(partial, HEAD_DIM_V, 0 * row, M, acc, M, V0, V1, HEAD_DIM_V)
        tl.store(PartialLse + offset + tl.arange(0, M), lse)
        return
    target = head_pointer(Out, b, h, o_b, o_h)
    store_tile(target, o_s, start, seq_q, acc, M, V0, V1, HEAD_DIM_V)
    tl.store(Lse + to_int64(bh) * seq_q + rows, lse, mask=rows < seq_q)


@triton.jit
def merge_partials(
    Partial, PartialLse, Out, Lse, splits, o_b, o_s, o_h, batch_heads, heads, seq_q,
    M: tl.constexpr, ROWS: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
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
    acc = zero_tile(ROWS, V0, V1)
    for slot in range(slot0, slot1):
        offset = (to_int64(slot) * batch_heads + bh) * M + first
        lse = tl.load(PartialLse + offset + m)
        new_max = tl.maximum(row_max, lse)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale, weight = tl.exp(row_max - base), tl.exp(lse - base)
        out = load_tile(
            Partial + offset * HEAD_DIM_V, HEAD_DIM_V, 0 * row, ROWS, ROWS, V0, V1, HEAD_DIM_V,
            False,
        )  # fmt: skip
        acc = multiplied(acc, rescale[:, None], V1)
        acc = added(acc, multiplied(out, weight[:, None], V1), V1)
        row_sum = row_sum * rescale + weight
        row_max = new_max
    acc = multiplied(acc, (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None], V1)
    start = row * M + first
    target = head_pointer(Out, bh // heads, bh % heads, o_b, o_h)
    store_tile(target, o_s, start, seq_q, acc, ROWS, V0, V1, HEAD_DIM_V)
    rows = start + m
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum + TINY))
    tl.store(Lse + to_int64(bh) * seq_q + rows, lse, mask=rows < seq_q)
