# mypy: ignore-errors
"""The backward pass of a mixer in Triton: the gradients of the states, under the delta rule the
written values once more, then the gradients of each chunk.

The formulas are those of ``cpbench.kernels.mixers.backward``: readers are q (times scale) and under
the delta rule k, writers w = beta k.

Legend: as in ``chunks_device``; programs divide chunks, batches and heads (bh), and E; of the
gradients of a chunk P of the D columns of keys instead, so that they fit into registers.
"""

import triton
import triton.language as tl

from cpbench.kernels.mixers.triton.chunks_device import (
    decays,
    exact_dot,
    head,
    load_matrix,
    load_rows,
    load_tokens,
    store_matrix,
    store_rows,
    store_tokens,
    to_int64,
    which_summed,
    written_values,
)


@triton.jit
def pass_gradients(
    Q, K, G, Beta, Number, Inverse, DOut, DState, DStates, DV,
    q_b, q_s, q_h, k_b, k_s, k_h, g_b, g_s, g_h, beta_b, beta_s, beta_h, do_b, do_s, do_h,
    batch_heads, heads, tokens, chunks, scale,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, GATED: tl.constexpr, DELTA: tl.constexpr, DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass E columns of the gradient of the state of a head back through all chunks.

    ``DStates`` ``[chunks + 1, bh, KEY_DIM, VALUE_DIM]`` receives that before each chunk and after
    the last one, ``DV`` ``[chunks, bh, C, VALUE_DIM]`` the gradient of the values.
    """
    bh, first = tl.program_id(0), tl.program_id(1) * E
    size = KEY_DIM * VALUE_DIM
    q_head, k_head = head(Q, bh, heads, q_b, q_h), head(K, bh, heads, k_b, k_h)
    g_head, beta_head = head(G, bh, heads, g_b, g_h), head(Beta, bh, heads, beta_b, beta_h)
    dout_head = head(DOut, bh, heads, do_b, do_h)
    dstate = load_matrix(DState + to_int64(bh) * size, first, D, E, KEY_DIM, VALUE_DIM)
    for back in range(chunks):
        n = chunks - 1 - back
        start, index = n * C, to_int64(n) * batch_heads + bh
        store_matrix(
            DStates + (index + batch_heads) * size, first, dstate, D, E, KEY_DIM, VALUE_DIM
        )
        q = load_rows(q_head, q_s, start, 0, tokens, C, D, KEY_DIM)
        k = load_rows(k_head, k_s, start, 0, tokens, C, D, KEY_DIM)
        # The scale comes after the product: with it, q would not be exact.
        pairs = tl.dot(k, tl.trans(q), input_precision=EXACT) * scale
        between, from_start, to_end, across = decays(
            g_head, g_s, Number, start, tokens, C, GATED, DOCUMENTS
        )
        pairs *= tl.trans(between)
        dout = load_rows(dout_head, do_s, start, first, tokens, C, E, VALUE_DIM)
        if DELTA:
            beta = load_tokens(beta_head, beta_s, start, tokens, C)
            pairs *= beta[:, None]
            to_end *= beta
        dv = tl.dot(pairs, dout, input_precision=PRECISION)
        # Decays are applied to what has few columns, so that products share q and k.
        dv += exact_dot(k, dstate, EXACT, PRECISION) * to_end[:, None]
        dstate *= across
        dout *= (scale * from_start)[:, None]
        dstate += exact_dot(tl.trans(q), dout, EXACT, PRECISION)
        if DELTA:
            inverse = load_matrix(Inverse + index * C * C, 0, C, C, C, C)
            dv = tl.dot(tl.trans(inverse), dv, input_precision=PRECISION)
        store_matrix(DV + index * C * VALUE_DIM, first, dv, C, E, C, VALUE_DIM)
        if DELTA:
            dv *= from_start[:, None]
            dstate -= exact_dot(tl.trans(k), dv, EXACT, PRECISION)
    store_matrix(DStates + to_int64(bh) * size, first, dstate, D, E, KEY_DIM, VALUE_DIM)


@triton.jit
def recompute_values(
    K, V, G, Number, Inverse, States, X, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h,
    batch_heads, heads, tokens,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, GATED: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E columns of the values that a chunk writes under the delta rule, ``X`` as in the forward
    pass, which keeps none."""
    n, bh, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * E
    start, index = n * C, to_int64(n) * batch_heads + bh
    k = load_rows(head(K, bh, heads, k_b, k_h), k_s, start, 0, tokens, C, D, KEY_DIM)
    x = load_rows(head(V, bh, heads, v_b, v_h), v_s, start, first, tokens, C, E, VALUE_DIM)
    _, from_start, _, _ = decays(
        head(G, bh, heads, g_b, g_h), g_s, Number, start, tokens, C, GATED, DOCUMENTS
    )
    state = load_matrix(States + index * KEY_DIM * VALUE_DIM, first, D, E, KEY_DIM, VALUE_DIM)
    x = written_values(k, x, state, Inverse, index, from_start, C, PRECISION)
    store_matrix(X + index * C * VALUE_DIM, first, x, C, E, C, VALUE_DIM)


@triton.jit
def chunk_gradients(
    Q, K, V, G, Beta, Number, X, States, DStates, DV, DOut, DQ, DK, DG, DBeta,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, beta_b, beta_s, beta_h,
    do_b, do_s, do_h, dq_b, dq_s, dq_h, dk_b, dk_s, dk_h, dg_b, dg_s, dg_h, db_b, db_s, db_h,
    batch_heads, heads, tokens, columns, scale,
    C: tl.constexpr, P: tl.constexpr, E: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, GATED: tl.constexpr, DELTA: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of P columns of q and k of a chunk, and what they contribute to those of g and
    beta, from the states before it and their gradients after it.

    ``DG`` and ``DBeta`` ``[parts, B, S, H]`` float32 receive the contributions of each part.
    """
    n, bh, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, index, left = n * C, to_int64(n) * batch_heads + bh, part * P
    height = KEY_DIM - left  # of this part, and of those after it
    of_state = index * KEY_DIM * VALUE_DIM + left * VALUE_DIM
    of_dstate = (index + batch_heads) * KEY_DIM * VALUE_DIM + left * VALUE_DIM
    k = load_rows(head(K, bh, heads, k_b, k_h), k_s, start, left, tokens, C, P, KEY_DIM)
    between, from_start, to_end, across = decays(
        head(G, bh, heads, g_b, g_h), g_s, Number, start, tokens, C, GATED, DOCUMENTS
    )
    v_head, dout_head = head(V, bh, heads, v_b, v_h), head(DOut, bh, heads, do_b, do_h)
    dq, dk, dw = (
        tl.zeros([C, P], dtype=tl.float32),
        tl.zeros([C, P], dtype=tl.float32),
        tl.zeros([C, P], dtype=tl.float32),
    )
    dp, dm = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    through = tl.zeros([P], dtype=tl.float32)
    for column in range(columns):  # a number at run time, lest the loop be unrolled
        first = column * E
        state = load_matrix(States + of_state, first, P, E, height, VALUE_DIM)
        dstate = load_matrix(DStates + of_dstate, first, P, E, height, VALUE_DIM)
        dout = load_rows(dout_head, do_s, start, first, tokens, C, E, VALUE_DIM)
        if DELTA:
            x = load_matrix(X + index * C * VALUE_DIM, first, C, E, C, VALUE_DIM)
            dv = load_matrix(DV + index * C * VALUE_DIM, first, C, E, C, VALUE_DIM)
            dk -= tl.dot(dv, tl.trans(state), input_precision=PRECISION)
            dm -= tl.dot(dv, tl.trans(x), input_precision=PRECISION)
        else:
            x = load_rows(v_head, v_s, start, first, tokens, C, E, VALUE_DIM)
        dq += tl.dot(dout, tl.trans(state), input_precision=PRECISION)
        dw += tl.dot(x, tl.trans(dstate), input_precision=PRECISION)
        dp += tl.dot(dout, tl.trans(x), input_precision=PRECISION)
        through += tl.sum(state * dstate, 1)
    q = load_rows(head(Q, bh, heads, q_b, q_h), q_s, start, left, tokens, C, P, KEY_DIM) * scale
    w = k
    if DELTA:
        beta = load_tokens(head(Beta, bh, heads, beta_b, beta_h), beta_s, start, tokens, C)
        w = k * beta[:, None]
    i = tl.arange(0, C)
    itself = i[:, None] == i[None, :]
    own = tl.sum(tl.where(itself, dp, 0.0), 1)[:, None]
    between = tl.where(itself, 0.0, between)
    dp *= between
    dq = dq * from_start[:, None] + tl.dot(dp, w, input_precision=PRECISION)
    dw_end = dw * to_end[:, None]
    dw = tl.dot(tl.trans(dp), q, input_precision=PRECISION)
    if DELTA:
        dm *= between
        dk = dk * from_start[:, None] + tl.dot(dm, w, input_precision=PRECISION)
        dw += tl.dot(tl.trans(dm), k, input_precision=PRECISION)
    if GATED:
        last = i == tl.minimum(tokens - start, C) - 1  # no decay follows it
        handed_on = tl.where(last, 0.0, tl.sum(w * dw_end, 1))
        at_end = tl.sum(handed_on, 0) + across * tl.sum(through, 0)
        dsums = tl.sum(q * dq + k * dk - w * dw, 1) - handed_on + tl.where(last, at_end, 0.0)
        summed = which_summed(Number, start, C, DOCUMENTS)
        dg = tl.sum(tl.where(summed, dsums[:, None], 0.0), 0)
        of_part = to_int64(part) * tokens * batch_heads
        store_tokens(head(DG + of_part, bh, heads, dg_b, dg_h), dg_s, start, tokens, dg, C)
    dw += dw_end + own * q
    dq = (dq + own * w) * scale
    store_rows(head(DQ, bh, heads, dq_b, dq_h), dq_s, start, left, tokens, dq, C, P, KEY_DIM)
    if DELTA:
        dbeta = tl.sum(dw * k, 1)
        of_part = to_int64(part) * tokens * batch_heads
        store_tokens(head(DBeta + of_part, bh, heads, db_b, db_h), db_s, start, tokens, dbeta, C)
        dw = dk + dw * beta[:, None]
    store_rows(head(DK, bh, heads, dk_b, dk_h), dk_s, start, left, tokens, dw, C, P, KEY_DIM)
