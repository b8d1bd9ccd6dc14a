# mypy: ignore-errors
"""The backward pass in Triton, over the lists of tiles described in ``tiles_device``.

One kernel computes dQ of a tile of queries over its key tiles; another computes dK and dV of a tile
of keys over its query tiles, with the transposed lists and for all query heads of a key/value head.
There are no atomic additions, so results are deterministic, and no head is repeated in memory.  out
and lse may be the global ones of a distributed computation.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691).

Legend: M rows and N columns of a tile of scores, D head dimension, padded to a power of two.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import (
    LOG2E,
    apply_mask,
    kv_sources,
    load_item,
    load_program_item,
    load_tile,
    read_tile,
    store_tile,
    tile_source,
    to_int64,
)


@triton.jit
def row_terms(
    Out, DOut, Lse, Delta, Lse2, o_b, o_s, o_h, do_b, do_s, do_h, batch_heads, heads, seq_q,
    M: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Compute ``Delta``, sum(dout * out), and ``Lse2``, the lse in base 2, which is +inf for rows
    that see nothing, so that exp2(score - lse) is 0."""
    bh = tl.program_id(0) % batch_heads
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    start = tl.program_id(0) // batch_heads * M
    rows = start + tl.arange(0, M)
    o = load_tile(Out + b * o_b + h * o_h, o_s, start, seq_q, M, D, HEAD_DIM, True).to(tl.float32)
    do = load_tile(DOut + b * do_b + h * do_h, do_s, start, seq_q, M, D, HEAD_DIM, True).to(
        tl.float32
    )
    offsets = bh.to(tl.int64) * seq_q + rows
    lse = tl.load(Lse + offsets, mask=rows < seq_q, other=float("-inf"))
    tl.store(Delta + offsets, tl.sum(o * do, 1), mask=rows < seq_q)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(Lse2 + offsets, lse2, mask=rows < seq_q)


@triton.jit
def _add_dq(q, do, lse, delta, k_source, v_source, k_stride, v_stride, col, seq_k, dq, scale,
            rows, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
            HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Add the contribution of one tile of keys to dq."""
    start = col * N
    k = read_tile(k_source, k_stride, start, seq_k, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    v = read_tile(v_source, v_stride, start, seq_k, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    p = tl.exp2(s - lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def backward_dq(
    Q, K, V, DOut, Lse2, Delta, DQ, Partial,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dq_b, dq_s, dq_h,
    batch_heads, heads, num_items, seq_q, seq_k, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq of one item; a part of a split row is stored in its slot of ``Partial``."""
    bh, b, h, row, run0, run1, tile0, tile1, slot = load_program_item(
        items, order, num_items, batch_heads, heads, PER_HEAD
    )
    k_source, v_source = kv_sources(
        K, V, b, h // GROUP, k_b, k_s, k_h, v_b, v_s, v_h, seq_k, N, D, HEAD_DIM, DESCRIPTORS
    )
    start = row * M
    rows = start + tl.arange(0, M)
    q = load_tile(Q + b * q_b + h * q_h, q_s, start, seq_q, M, D, HEAD_DIM, True)
    do = load_tile(DOut + b * do_b + h * do_h, do_s, start, seq_q, M, D, HEAD_DIM, True)
    offsets = bh.to(tl.int64) * seq_q + rows
    lse = tl.load(Lse2 + offsets, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(Delta + offsets, mask=rows < seq_q, other=0.0)
    dq = tl.zeros([M, D], dtype=tl.float32)
    scale2 = scale * LOG2E
    if LISTED:
        for t in tl.range(run0, run1, num_stages=STAGES):
            dq = _add_dq(
                q, do, lse, delta, k_source, v_source, k_s, v_s, tl.load(runs + t), seq_k, dq,
                scale2, rows, slices, layers, 0, 0,
                M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
    else:
        for r in range(run0, run1):
            begin = tl.load(runs + 2 * r)
            end = tl.load(runs + 2 * r + 1)
            for col in tl.range(begin, end, num_stages=STAGES):
                dq = _add_dq(
                    q, do, lse, delta, k_source, v_source, k_s, v_s, col, seq_k, dq, scale2,
                    rows, slices, layers, 0, 0, M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
    for t in tl.range(tile0, tile1, num_stages=1, disable_licm=True):
        dq = _add_dq(
            q, do, lse, delta, k_source, v_source, k_s, v_s, tl.load(tiles + t), seq_k, dq, scale2,
            rows, slices, layers, tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
            M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    dq = dq * scale
    if SPLIT and slot >= 0:
        offset = (to_int64(slot) * batch_heads + bh) * M
        store_tile(Partial + offset * HEAD_DIM, HEAD_DIM, 0 * row, M, dq, M, D, HEAD_DIM)
        return
    store_tile(DQ + b * dq_b + h * dq_h, dq_s, start, seq_q, dq, M, D, HEAD_DIM)


@triton.jit
def sum_partials(
    Partial, DQ, splits, dq_b, dq_s, dq_h, batch_heads, heads, seq_q,
    M: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sum ``ROWS`` rows of dq of a split row of tiles over its slots, in slot order."""
    pid = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    bh = pid % batch_heads
    split = splits + 3 * (pid // batch_heads)
    row, slot0, slot1 = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    acc = tl.zeros([ROWS, D], dtype=tl.float32)
    for slot in range(slot0, slot1):
        offset = (to_int64(slot) * batch_heads + bh) * M + first
        acc += load_tile(
            Partial + offset * HEAD_DIM, HEAD_DIM, 0 * row, ROWS, ROWS, D, HEAD_DIM, False
        )
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    start = row * M + first
    store_tile(DQ + b * dq_b + h * dq_h, dq_s, start, seq_q, acc, ROWS, D, HEAD_DIM)


@triton.jit
def _add_dkv(k, v, q_source, do_source, lse_base, delta_base, q_stride, do_stride, col, seq_q,
             dk, dv, scale, rows, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr,
             D: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
             DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the contribution of one tile of queries to dk and dv; rows of the tile are keys, columns
    are queries."""
    start = col * N
    cols = start + tl.arange(0, N)
    q = read_tile(q_source, q_stride, start, seq_q, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    do = read_tile(do_source, do_stride, start, seq_q, N, D, HEAD_DIM, MASKED, DESCRIPTORS)
    if MASKED:
        lse = tl.load(lse_base + cols, mask=cols < seq_q, other=float("inf"))
        delta = tl.load(delta_base + cols, mask=cols < seq_q, other=0.0)
    else:
        lse = tl.load(lse_base + cols)
        delta = tl.load(delta_base + cols)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    if MASKED:
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    p = tl.exp2(s - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_dkv(
    Q, K, V, DOut, Lse2, Delta, DK, DV,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dk_b, dk_s, dk_h,
    dv_b, dv_s, dv_h,
    batch_heads, heads, num_items, seq_q, seq_k, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys; ``batch_heads`` and ``heads`` count key/value heads,
    and the lists are those of the transposed mask."""
    pid = tl.program_id(0)
    bh = pid % batch_heads
    index = tl.load(order + (bh if PER_HEAD else 0) * num_items + pid // batch_heads)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    start = index * M  # rows are not split in this pass, so items are rows
    rows = start + tl.arange(0, M)
    k = load_tile(K + b * k_b + h * k_h, k_s, start, seq_k, M, D, HEAD_DIM, True)
    v = load_tile(V + b * v_b + h * v_h, v_s, start, seq_k, M, D, HEAD_DIM, True)
    dk = tl.zeros([M, D], dtype=tl.float32)
    dv = tl.zeros([M, D], dtype=tl.float32)
    scale2 = scale * LOG2E
    # Heads that share their runs are iterated in the loop over runs: an outer loop over heads costs
    # registers.
    OUTER: tl.constexpr = GROUP if PER_HEAD or LISTED else 1
    INNER: tl.constexpr = GROUP // OUTER
    for outer in tl.range(0, OUTER, num_stages=1, disable_licm=True):
        plan = bh * GROUP + outer if PER_HEAD else 0
        _, run0, run1, tile0, tile1, _ = load_item(items, plan, num_items, index)
        if LISTED:
            q_ptr = Q + b * q_b + (h * GROUP + outer) * q_h
            do_ptr = DOut + b * do_b + (h * GROUP + outer) * do_h
            q_source = tile_source(q_ptr, q_s, seq_q, N, D, HEAD_DIM, DESCRIPTORS)
            do_source = tile_source(do_ptr, do_s, seq_q, N, D, HEAD_DIM, DESCRIPTORS)
            terms = to_int64(bh * GROUP + outer) * seq_q
            for t in tl.range(run0, run1, num_stages=STAGES):
                dk, dv = _add_dkv(
                    k, v, q_source, do_source, Lse2 + terms, Delta + terms, q_s, do_s,
                    tl.load(runs + t), seq_q, dk, dv, scale2, rows, slices, layers, 0, 0,
                    M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
        else:
            for step in range((run1 - run0) * INNER):
                g = outer + step // (run1 - run0)
                r = run0 + step % (run1 - run0)
                q_ptr = Q + b * q_b + (h * GROUP + g) * q_h
                do_ptr = DOut + b * do_b + (h * GROUP + g) * do_h
                q_source = tile_source(q_ptr, q_s, seq_q, N, D, HEAD_DIM, DESCRIPTORS)
                do_source = tile_source(do_ptr, do_s, seq_q, N, D, HEAD_DIM, DESCRIPTORS)
                terms = to_int64(bh * GROUP + g) * seq_q
                begin = tl.load(runs + 2 * r)
                end = tl.load(runs + 2 * r + 1)
                for col in tl.range(begin, end, num_stages=STAGES):
                    dk, dv = _add_dkv(
                        k, v, q_source, do_source, Lse2 + terms, Delta + terms, q_s, do_s,
                        col, seq_q, dk, dv, scale2, rows, slices, layers, 0, 0,
                        M, N, D, HEAD_DIM, PRECISION, DESCRIPTORS, False,
                    )  # fmt: skip
        for step in tl.range(0, (tile1 - tile0) * INNER, num_stages=1, disable_licm=True):
            g = outer + step // (tile1 - tile0)
            t = tile0 + step % (tile1 - tile0)
            terms = to_int64(bh * GROUP + g) * seq_q
            dk, dv = _add_dkv(
                k, v, Q + b * q_b + (h * GROUP + g) * q_h, DOut + b * do_b + (h * GROUP + g) * do_h,
                Lse2 + terms, Delta + terms, q_s, do_s, tl.load(tiles + t),
                seq_q, dk, dv, scale2, rows, slices, layers,
                tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
                M, N, D, HEAD_DIM, PRECISION, False, True,
            )  # fmt: skip
    store_tile(DK + b * dk_b + h * dk_h, dk_s, start, seq_k, dk * scale, M, D, HEAD_DIM)
    store_tile(DV + b * dv_b + h * dv_h, dv_s, start, seq_k, dv, M, D, HEAD_DIM)
