# mypy: ignore-errors
"""The forward pass of a mixer in Triton: the inverses of chunks, the states between them, and the
outputs.

Source: Gated Delta Networks (Yang et al. 2025, arXiv 2412.06464) and its chunks in
flash-linear-attention; the notation is that of ``cpbench.kernels.mixers.forward``.

Legend: as in ``chunks_device``; programs divide chunks, batches and heads (bh), and E.
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
    to_int64,
    written_values,
)


@triton.jit
def invert(
    K, G, Beta, Number, Inverse, k_b, k_s, k_h, g_b, g_s, g_h, beta_b, beta_s, beta_h,
    batch_heads, heads, tokens,
    C: tl.constexpr, D: tl.constexpr, KEY_DIM: tl.constexpr, GATED: tl.constexpr,
    DOCUMENTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + M)^-1 of a chunk, from the inverses of its halves: that of a block of two halves is
    T - T N T, with T those of the halves and N the products between them."""
    n, bh = tl.program_id(0), tl.program_id(1)
    start = n * C
    k = load_rows(head(K, bh, heads, k_b, k_h), k_s, start, 0, tokens, C, D, KEY_DIM)
    beta = load_tokens(head(Beta, bh, heads, beta_b, beta_h), beta_s, start, tokens, C)
    between, _, _, _ = decays(
        head(G, bh, heads, g_b, g_h), g_s, Number, start, tokens, C, GATED, DOCUMENTS
    )
    products = tl.dot(k, tl.trans(k), input_precision=EXACT) * between * beta[None, :]
    i = tl.arange(0, C)
    row, col = i[:, None], i[None, :]
    inverse = tl.where(row == col, 1.0, 0.0) + tl.zeros([C, C], dtype=tl.float32)
    half = 1
    while half < C:
        crossing = (row // (2 * half) == col // (2 * half)) & (row // half > col // half)
        crossing_products = tl.where(crossing, products, 0.0)
        change = tl.dot(inverse, crossing_products, input_precision=PRECISION)
        inverse -= tl.dot(change, inverse, input_precision=PRECISION)
        half *= 2
    target = Inverse + (to_int64(n) * batch_heads + bh) * C * C
    store_matrix(target, 0, inverse, C, C, C, C)


@triton.jit
def pass_states(
    K, V, G, Beta, Number, Inverse, State, States, X,
    k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, beta_b, beta_s, beta_h,
    batch_heads, heads, tokens, chunks,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, GATED: tl.constexpr, DELTA: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Pass E columns of the state of a head through all chunks.

    ``States`` ``[chunks + 1, bh, KEY_DIM, VALUE_DIM]`` receives the state before each chunk and
    after the last one, ``X`` ``[chunks, bh, C, VALUE_DIM]`` the values that are written under the
    delta rule.
    """
    bh, first = tl.program_id(0), tl.program_id(1) * E
    size = KEY_DIM * VALUE_DIM
    k_head, v_head = head(K, bh, heads, k_b, k_h), head(V, bh, heads, v_b, v_h)
    g_head, beta_head = head(G, bh, heads, g_b, g_h), head(Beta, bh, heads, beta_b, beta_h)
    state = load_matrix(State + to_int64(bh) * size, first, D, E, KEY_DIM, VALUE_DIM)
    for n in range(chunks):
        start, index = n * C, to_int64(n) * batch_heads + bh
        store_matrix(States + index * size, first, state, D, E, KEY_DIM, VALUE_DIM)
        k = load_rows(k_head, k_s, start, 0, tokens, C, D, KEY_DIM)
        x = load_rows(v_head, v_s, start, first, tokens, C, E, VALUE_DIM)
        _, from_start, to_end, across = decays(
            g_head, g_s, Number, start, tokens, C, GATED, DOCUMENTS
        )
        if DELTA:
            beta = load_tokens(beta_head, beta_s, start, tokens, C)
            x = written_values(k, x, state, Inverse, index, from_start, C, PRECISION)
            store_matrix(X + index * C * VALUE_DIM, first, x, C, E, C, VALUE_DIM)
            to_end *= beta
        writers = tl.trans(k * to_end[:, None])
        state = across * state + tl.dot(writers, x, input_precision=PRECISION)
    end = to_int64(chunks) * batch_heads + bh
    store_matrix(States + end * size, first, state, D, E, KEY_DIM, VALUE_DIM)


@triton.jit
def outputs(
    Q, K, V, G, Beta, Number, States, X, Out,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, g_b, g_s, g_h, beta_b, beta_s, beta_h,
    o_b, o_s, o_h, batch_heads, heads, tokens, scale,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, GATED: tl.constexpr, DELTA: tl.constexpr, DOCUMENTS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E columns of the outputs of a chunk, from the state before it and the values written in
    it."""
    n, bh, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * E
    start, index = n * C, to_int64(n) * batch_heads + bh
    q = load_rows(head(Q, bh, heads, q_b, q_h), q_s, start, 0, tokens, C, D, KEY_DIM)
    k = load_rows(head(K, bh, heads, k_b, k_h), k_s, start, 0, tokens, C, D, KEY_DIM)
    between, from_start, _, _ = decays(
        head(G, bh, heads, g_b, g_h), g_s, Number, start, tokens, C, GATED, DOCUMENTS
    )
    pairs = tl.dot(q, tl.trans(k), input_precision=EXACT) * between
    if DELTA:
        beta = load_tokens(head(Beta, bh, heads, beta_b, beta_h), beta_s, start, tokens, C)
        pairs *= beta[None, :]
        x = load_matrix(X + index * C * VALUE_DIM, first, C, E, C, VALUE_DIM)
    else:
        x = load_rows(head(V, bh, heads, v_b, v_h), v_s, start, first, tokens, C, E, VALUE_DIM)
    state = load_matrix(States + index * KEY_DIM * VALUE_DIM, first, D, E, KEY_DIM, VALUE_DIM)
    # Scaled after the product, which takes q from the same registers as that of the pairs.
    out = exact_dot(q, state, EXACT, PRECISION) * from_start[:, None]
    out += tl.dot(pairs, x, input_precision=PRECISION)
    store_rows(
        head(Out, bh, heads, o_b, o_h), o_s, start, first, tokens, out * scale, C, E, VALUE_DIM
    )
