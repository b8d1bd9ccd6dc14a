# mypy: ignore-errors
"""The Triton kernel of ``merge``, which is compiled on GPUs and interpreted in tests."""

import triton
import triton.language as tl


@triton.jit
def merge_results(
    Out, Partial, Target, Lse, PartialLse, TargetLse,
    o_b, o_s, o_h, p_b, p_s, p_h, t_b, t_s, t_h, l_b, l_h, l_s, m_b, m_h, m_s, n_b, n_h, n_s,
    heads, seq, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Merge ``ROWS`` tokens of one batch and head, whose elements are contiguous.  A program reads
    all that it writes over before it writes."""
    zero = tl.full((), 0, dtype=tl.int64)
    b, h = zero + tl.program_id(1) // heads, zero + tl.program_id(1) % heads
    rows = zero + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    inside = rows < seq
    lse = tl.load(Lse + b * l_b + h * l_h + rows * l_s, mask=inside, other=0.0)
    more = tl.load(PartialLse + b * m_b + h * m_h + rows * m_s, mask=inside, other=0.0)
    difference = more - lse
    unknown = difference != difference  # both are -inf, or one is NaN
    weight = tl.where(unknown, 0.0, 1.0 / (1.0 + tl.exp(difference)))
    more_weight = tl.where(unknown, 0.0, 1.0 / (1.0 + tl.exp(-difference)))
    merged = tl.maximum(lse, more) + tl.log(1.0 + tl.exp(-tl.abs(difference)))
    merged = tl.where(unknown, lse + more, merged)
    tl.store(TargetLse + b * n_b + h * n_h + rows * n_s, merged, mask=inside)
    cells = inside[:, None] & (d < HEAD_DIM)[None, :]
    out = tl.load(Out + b * o_b + h * o_h + rows[:, None] * o_s + d[None, :], mask=cells, other=0.0)
    partial = tl.load(
        Partial + b * p_b + h * p_h + rows[:, None] * p_s + d[None, :], mask=cells, other=0.0
    )
    total = out.to(tl.float32) * weight[:, None] + partial.to(tl.float32) * more_weight[:, None]
    target = Target + b * t_b + h * t_h + rows[:, None] * t_s + d[None, :]
    tl.store(target, total, mask=cells)
