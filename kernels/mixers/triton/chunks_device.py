# mypy: ignore-errors
"""What the kernels share: the tokens of a chunk and the decay between them.

Everything is computed in float32.  Products of inputs of 16 bits are exact in TF32 (``EXACT``);
those of states are three TF32 products (``PRECISION``), since errors of one add up over chunks.

Legend: C tokens of a chunk, D and E the dimensions of keys and values, padded to powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def to_int64(x):
    """Convert to int64; in the interpreter loop counters are plain integers."""
    return tl.full((), 0, dtype=tl.int64) + x


@triton.jit
def head(X, bh, heads, x_b, x_h):
    """A pointer to the first element of a batch and head."""
    return X + to_int64(bh // heads) * x_b + to_int64(bh % heads) * x_h


@triton.jit
def load_rows(X, stride, start, first, tokens, C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """Load the tokens of a chunk and D dimensions from ``first``, ``[C, D]`` float32; 0 beyond."""
    row, col = start + tl.arange(0, C), first + tl.arange(0, D)
    inside = (row < tokens)[:, None] & (col < DIM)[None, :]
    x = tl.load(X + to_int64(row)[:, None] * stride + col[None, :], mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_rows(
    X, stride, start, first, tokens, x, C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr
):
    """Store what :func:`load_rows` loads."""
    row, col = start + tl.arange(0, C), first + tl.arange(0, D)
    inside = (row < tokens)[:, None] & (col < DIM)[None, :]
    tl.store(
        X + to_int64(row)[:, None] * stride + col[None, :], x.to(X.dtype.element_ty), mask=inside
    )


@triton.jit
def load_matrix(
    X, first, ROWS: tl.constexpr, COLS: tl.constexpr, height, WIDTH: tl.constexpr
):  # fmt: skip
    """Load COLS columns from ``first`` of a contiguous matrix ``[height, WIDTH]``; 0 beyond."""
    row, col = tl.arange(0, ROWS), first + tl.arange(0, COLS)
    inside = (row < height)[:, None] & (col < WIDTH)[None, :]
    return tl.load(X + row[:, None] * WIDTH + col[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(X, first, x, ROWS: tl.constexpr, COLS: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Store what :func:`load_matrix` loads."""
    row, col = tl.arange(0, ROWS), first + tl.arange(0, COLS)
    inside = (row < HEIGHT)[:, None] & (col < WIDTH)[None, :]
    tl.store(X + row[:, None] * WIDTH + col[None, :], x, mask=inside)


@triton.jit
def load_tokens(X, stride, start, tokens, C: tl.constexpr):
    """Load one number of each token of a chunk, ``[C]`` float32; 0 beyond."""
    row = start + tl.arange(0, C)
    return tl.load(X + to_int64(row) * stride, mask=row < tokens, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(X, stride, start, tokens, x, C: tl.constexpr):
    """Store what :func:`load_tokens` loads."""
    row = start + tl.arange(0, C)
    tl.store(X + to_int64(row) * stride, x.to(X.dtype.element_ty), mask=row < tokens)


@triton.jit
def which_summed(Number, start, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """``[C, C]``, whether the decay of a token (column) is in the sum of another (row)."""
    i = tl.arange(0, C)
    summed = i[:, None] >= i[None, :]
    if DOCUMENTS:
        own, previous = tl.load(Number + start + 1 + i), tl.load(Number + start + i)
        summed = summed & (own[:, None] == own[None, :]) & (own == previous)[None, :]
    return summed


@triton.jit
def decays(
    G, g_s, Number, start, tokens, C: tl.constexpr, GATED: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """The factors of a chunk, see ``cpbench.kernels.mixers.decay``.

    Args:
        G: log decays of the head, token stride ``g_s``.
        Number: of the document of each token, after that of the token before the first.

    Returns:
        between ``[C, C]`` with its diagonal, start and end ``[C]``, across.
    """
    i = tl.arange(0, C)
    visible = i[:, None] >= i[None, :]
    first, last, through = i >= 0, i >= 0, 1.0
    g = tl.zeros([C], dtype=tl.float32)
    if GATED:
        g = load_tokens(G, g_s, start, tokens, C)
    if DOCUMENTS:
        before = tl.load(Number + start)
        own = tl.load(Number + start + 1 + i)
        final = tl.load(Number + start + C)
        visible = visible & (own[:, None] == own[None, :])
        first, last = own == before, own == final
        through = tl.where(before == final, 1.0, 0.0)
        summed = which_summed(Number, start, C, DOCUMENTS)
        sums = tl.sum(tl.where(summed, g[None, :], 0.0), 1)
    else:
        sums = tl.cumsum(g, 0)
    total = tl.sum(tl.where(i == C - 1, sums, 0.0), 0)
    hidden = float("-inf")
    between = tl.exp(tl.where(visible, sums[:, None] - sums[None, :], hidden))
    from_start = tl.exp(tl.where(first, sums, hidden))
    to_end = tl.exp(tl.where(last, total - sums, hidden))
    return between, from_start, to_end, through * tl.exp(total)


@triton.jit
def exact_dot(a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` where a is of the inputs: of 16 bits it is exact in TF32, so that two products with
    the parts of b are as good as three, and need no registers for the other part of a."""
    if EXACT == "tf32":
        high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 10 bits
        product = tl.dot(a, b - high, input_precision="tf32")
        product = tl.dot(a, high, product, input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def written_values(
    k, v, state, Inverse, index, from_start, C: tl.constexpr, PRECISION: tl.constexpr
):
    """The values ``[C, E]`` that a chunk writes under the delta rule, from the state before it.

    Args:
        index: of the chunk among the inverses ``[C, C]``.
    """
    v -= tl.dot(k * from_start[:, None], state, input_precision=PRECISION)
    inverse = load_matrix(Inverse + index * C * C, 0, C, C, C, C)
    return tl.dot(inverse, v, input_precision=PRECISION)
