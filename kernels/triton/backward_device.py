# mypy: ignore-errors
"""The backward pass in Triton, over the lists of tiles described in ``tiles_device``.

One kernel computes dQ of a tile of queries over its key tiles; another computes dK and dV of a tile
of keys over its query tiles, with the transposed lists and for all query heads of a key/value head.
There are no atomic additions, so results are deterministic, and no head is repeated in memory.  out
and lse may be the global ones of a distributed computation.

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691).

Legend: M rows and N columns of a tile of scores; D0, D1, V0, V1: see ``tiles_device``.
"""

import triton
import triton.language as tl
from cpbench.kernels.triton.tiles_device import (
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

# What a launch of ``backward_dkv`` computes.
BOTH, ONLY_DK, ONLY_DV = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def row_terms(
    Out, DOut, Lse, Delta, Lse2, o_b, o_s, o_h, do_b, do_s, do_h,
    batch_heads, heads, seq_q, padded_q,
    M: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Compute ``Delta``, sum(dout * out), and ``Lse2``, the lse in base 2, which is +inf for rows
    that see nothing, so that exp2(score - lse) is 0.  Both have ``padded_q`` rows, which the tiles
    of the other kernels do not exceed; so have those after the last query."""
    bh = tl.program_id(0) % batch_heads
    b, h = bh // heads, bh % heads
    start = tl.program_id(0) // batch_heads * M
    rows = start + tl.arange(0, M)
    o_source = head_pointer(Out, b, h, o_b, o_h)
    do_source = head_pointer(DOut, b, h, do_b, do_h)
    o = load_tile(o_source, o_s, start, seq_q, M, V0, V1, HEAD_DIM_V, True)
    do = load_tile(do_source, do_s, start, seq_q, M, V0, V1, HEAD_DIM_V, True)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if V1:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    lse = tl.load(Lse + to_int64(bh) * seq_q + rows, mask=rows < seq_q, other=float("-inf"))
    offsets = to_int64(bh) * padded_q + rows
    tl.store(Delta + offsets, delta)
    tl.store(Lse2 + offsets, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E))


@triton.jit
def _add_dq(q, do, lse, delta, k_source, v_source, b, g, k_stride, v_stride, col, seq_k, dq, scale,
            rows, slices, layers, first, last, M: tl.constexpr, N: tl.constexpr, D0: tl.constexpr,
            D1: tl.constexpr, HEAD_DIM: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
            HEAD_DIM_V: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Add the contribution of one tile of keys to dq."""
    start = col * N
    k = read_tile(k_source, b, g, k_stride, start, seq_k, N, D0, D1, HEAD_DIM, MASKED, DESCRIPTORS)
    v = read_tile(
        v_source, b, g, v_stride, start, seq_k, N, V0, V1, HEAD_DIM_V, MASKED, DESCRIPTORS
    )
    s = inner_products(q, k, D1, PRECISION)
    if MASKED:
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (inner_products(do, v, V1, PRECISION) - delta[:, None])
    return add_product(ds, k, dq, D1, PRECISION)


@triton.jit
def backward_dq(
    Q, K, KRest, V, VRest, DOut, Lse2, Delta, DQ, Partial,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dq_b, dq_s, dq_h,
    batch_heads, heads, section, num_items, seq_q, seq_k, padded_q, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq of one item; a part of a split row is stored in its slot of ``Partial``."""
    bh, index = program_work(order, num_items, batch_heads, section, PER_HEAD)
    row, run0, run1, tile0, tile1, slot = load_item(items, bh if PER_HEAD else 0, num_items, index)
    b, h = bh // heads, bh % heads
    g = h // GROUP
    k_source = head_source(K, KRest, b, g, k_b, k_h, D1, DESCRIPTORS)
    v_source = head_source(V, VRest, b, g, v_b, v_h, V1, DESCRIPTORS)
    start = row * M
    rows = start + tl.arange(0, M)
    q_source = head_pointer(Q, b, h, q_b, q_h)
    do_source = head_pointer(DOut, b, h, do_b, do_h)
    q = load_tile(q_source, q_s, start, seq_q, M, D0, D1, HEAD_DIM, True)
    do = load_tile(do_source, do_s, start, seq_q, M, V0, V1, HEAD_DIM_V, True)
    offsets = to_int64(bh) * padded_q + rows
    lse, delta = tl.load(Lse2 + offsets), tl.load(Delta + offsets)
    dq = zero_tile(M, D0, D1)
    scale2 = scale * LOG2E
    if LISTED:
        for t in tl.range(run0, run1, num_stages=STAGES):
            dq = _add_dq(
                q, do, lse, delta, k_source, v_source, b, g, k_s, v_s, tl.load(runs + t), seq_k,
                dq, scale2, rows, slices, layers, 0, 0,
                M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, False,
            )  # fmt: skip
    else:
        for r in range(run0, run1):
            begin = tl.load(runs + 2 * r)
            end = tl.load(runs + 2 * r + 1)
            for col in tl.range(begin, end, num_stages=STAGES):
                dq = _add_dq(
                    q, do, lse, delta, k_source, v_source, b, g, k_s, v_s, col, seq_k,
                    dq, scale2, rows, slices, layers, 0, 0,
                    M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, False,
                )  # fmt: skip
    for t in tl.range(tile0, tile1, num_stages=1, disable_licm=True):
        dq = _add_dq(
            q, do, lse, delta, k_source, v_source, b, g, k_s, v_s, tl.load(tiles + t), seq_k,
            dq, scale2, rows, slices, layers,
            tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
            M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    dq = multiplied(dq, scale, D1)
    if SPLIT and slot >= 0:
        partial = Partial + (to_int64(slot) * batch_heads + bh) * M * HEAD_DIM
        store_tile(partial, HEAD_DIM, 0 * row, M, dq, M, D0, D1, HEAD_DIM)
        return
    target = head_pointer(DQ, b, h, dq_b, dq_h)
    store_tile(target, dq_s, start, seq_q, dq, M, D0, D1, HEAD_DIM)


@triton.jit
def sum_partials(
    Partial, DQ, splits, dq_b, dq_s, dq_h, batch_heads, heads, seq_q,
    M: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sum ``ROWS`` rows of dq of a split row of tiles over its slots, in slot order."""
    pid = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    bh = pid % batch_heads
    split = splits + 3 * (pid // batch_heads)
    row, slot0, slot1 = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    acc = zero_tile(ROWS, D0, D1)
    for slot in range(slot0, slot1):
        partial = Partial + ((to_int64(slot) * batch_heads + bh) * M + first) * HEAD_DIM
        part = load_tile(partial, HEAD_DIM, 0 * row, ROWS, ROWS, D0, D1, HEAD_DIM, False)
        acc = added(acc, part, D1)
    target = head_pointer(DQ, bh // heads, bh % heads, dq_b, dq_h)
    store_tile(target, dq_s, row * M + first, seq_q, acc, ROWS, D0, D1, HEAD_DIM)


@triton.jit
def _add_dkv(k, v, q_source, do_source, b, h, lse_base, delta_base, q_stride, do_stride, col, seq_q,
             dk, dv, scale, first_row, slices, layers, first, last, M: tl.constexpr,
             N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr,
             V0: tl.constexpr, V1: tl.constexpr, HEAD_DIM_V: tl.constexpr, PRECISION: tl.constexpr,
             DESCRIPTORS: tl.constexpr, WANTED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the contribution of one tile of queries to dk and dv, or to the one that is wanted; rows
    of the tile are keys, columns are queries."""
    start = col * N
    cols = start + tl.arange(0, N)
    q = read_tile(q_source, b, h, q_stride, start, seq_q, N, D0, D1, HEAD_DIM, MASKED, DESCRIPTORS)
    do = read_tile(
        do_source, b, h, do_stride, start, seq_q, N, V0, V1, HEAD_DIM_V, MASKED, DESCRIPTORS
    )
    s = inner_products(k, q, D1, PRECISION)
    if MASKED:
        rows = first_row + tl.arange(0, M)
        s = apply_mask(s, rows, start, slices, layers, first, last, M, N)
    p = tl.exp2(s * scale - tl.load(lse_base + cols)[None, :])
    if WANTED != ONLY_DK:
        dv = add_product(p, do, dv, V1, PRECISION)
    if WANTED != ONLY_DV:
        dp = inner_products(v, do, V1, PRECISION)
        ds = p * (dp - tl.load(delta_base + cols)[None, :])
        dk = add_product(ds, q, dk, D1, PRECISION)
    return dk, dv


@triton.jit
def backward_dkv(
    Q, QRest, K, V, DOut, DOutRest, Lse2, Delta, DK, DV,
    items, order, runs, tiles, tile_layers, layers, slices,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, do_b, do_s, do_h, dk_b, dk_s, dk_h,
    dv_b, dv_s, dv_h,
    batch_heads, heads, section, num_items, seq_q, seq_k, padded_q, scale,
    GROUP: tl.constexpr, PER_HEAD: tl.constexpr, LISTED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HEAD_DIM: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
    WANTED: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys, or the one that is wanted; ``batch_heads`` and
    ``heads`` count key/value heads, and the lists are those of the transposed mask."""
    bg, index = program_work(order, num_items, batch_heads, section, PER_HEAD)
    b, g = bg // heads, bg % heads
    start = index * M  # rows are not split in this pass, so items are rows
    k_source = head_pointer(K, b, g, k_b, k_h)
    v_source = head_pointer(V, b, g, v_b, v_h)
    k = load_tile(k_source, k_s, start, seq_k, M, D0, D1, HEAD_DIM, True)
    v = load_tile(v_source, v_s, start, seq_k, M, V0, V1, HEAD_DIM_V, True)
    dk = zero_tile(M, D0, D1)  # the compiler removes the one that is not wanted
    dv = zero_tile(M, V0, V1)
    scale2 = scale * LOG2E
    # Heads that share their runs are iterated in the loop over runs: an outer loop over heads costs
    # registers.
    OUTER: tl.constexpr = GROUP if PER_HEAD or LISTED else 1
    INNER: tl.constexpr = GROUP // OUTER
    for outer in tl.range(0, OUTER, num_stages=1, disable_licm=True):
        plan = bg * GROUP + outer if PER_HEAD else 0
        _, run0, run1, tile0, tile1, _ = load_item(items, plan, num_items, index)
        if LISTED:
            h = g * GROUP + outer
            q_source = head_source(Q, QRest, b, h, q_b, q_h, D1, DESCRIPTORS)
            do_source = head_source(DOut, DOutRest, b, h, do_b, do_h, V1, DESCRIPTORS)
            terms = to_int64(bg * GROUP + outer) * padded_q
            for t in tl.range(run0, run1, num_stages=STAGES):
                dk, dv = _add_dkv(
                    k, v, q_source, do_source, b, h, Lse2 + terms, Delta + terms, q_s, do_s,
                    tl.load(runs + t), seq_q, dk, dv, scale2, start, slices, layers, 0, 0,
                    M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V,
                    PRECISION, DESCRIPTORS, WANTED, False,
                )  # fmt: skip
        else:
            for step in range((run1 - run0) * INNER):
                head = outer + step // (run1 - run0)
                r = run0 + step % (run1 - run0)
                h = g * GROUP + head
                q_source = head_source(Q, QRest, b, h, q_b, q_h, D1, DESCRIPTORS)
                do_source = head_source(DOut, DOutRest, b, h, do_b, do_h, V1, DESCRIPTORS)
                terms = to_int64(bg * GROUP + head) * padded_q
                begin = tl.load(runs + 2 * r)
                end = tl.load(runs + 2 * r + 1)
                for col in tl.range(begin, end, num_stages=STAGES):
                    dk, dv = _add_dkv(
                        k, v, q_source, do_source, b, h, Lse2 + terms, Delta + terms, q_s, do_s,
                        col, seq_q, dk, dv, scale2, start, slices, layers, 0, 0,
                        M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V,
                        PRECISION, DESCRIPTORS, WANTED, False,
                    )  # fmt: skip
        for step in tl.range(0, (tile1 - tile0) * INNER, num_stages=1, disable_licm=True):
            head = outer + step // (tile1 - tile0)
            t = tile0 + step % (tile1 - tile0)
            h = g * GROUP + head
            terms = to_int64(bg * GROUP + head) * padded_q
            dk, dv = _add_dkv(
                k, v, head_source(Q, QRest, b, h, q_b, q_h, D1, DESCRIPTORS),
                head_source(DOut, DOutRest, b, h, do_b, do_h, V1, DESCRIPTORS), b, h,
                Lse2 + terms, Delta + terms, q_s, do_s, tl.load(tiles + t),
                seq_q, dk, dv, scale2, start, slices, layers,
                tl.load(tile_layers + 2 * t), tl.load(tile_layers + 2 * t + 1),
                M, N, D0, D1, HEAD_DIM, V0, V1, HEAD_DIM_V, PRECISION, DESCRIPTORS, WANTED, True,
            )  # fmt: skip
    dk_target = head_pointer(DK, b, g, dk_b, dk_h)
    dv_target = head_pointer(DV, b, g, dv_b, dv_h)
    if WANTED != ONLY_DV:
        store_tile(dk_target, dk_s, start, seq_k, multiplied(dk, scale, D1), M, D0, D1, HEAD_DIM)
    if WANTED != ONLY_DK:
        store_tile(dv_target, dv_s, start, seq_k, dv, M, V0, V1, HEAD_DIM_V)
