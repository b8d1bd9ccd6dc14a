"""Squares of a mask by torch's fused CPU kernel, for the `bands` operator.

The kernel computes blocks of queries with blocks of 512 keys, hidden ones included, so that a
causal call of up to 512 tokens costs as much as a full one.  Short causal squares are therefore
divided into strips of queries, each with the keys up to its last query and a bias.

Legend: B batch, S queries, T keys, D head dim; h query heads over g key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cpbench.kernels.bands.plan import Square

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import BackwardInputs, Gradients

# From so many queries on the kernel takes blocks of 256 of them instead of 64 or 32: strips would
# gain nothing.
LONG_QUERIES = 768
# From so many on, in causal and in full squares, its backward pass is faster in bfloat16 than in
# float32 with conversions.
HALF_CAUSAL, HALF_FULL = LONG_QUERIES, 256
# Queries of a strip, in squares of at most MAX_NARROW and in others: whole blocks of the kernel.
STRIP, WIDE_STRIP, MAX_NARROW = 64, 128, 512
# Elements of a head's queries from which contiguous copies pay off, and are made a key/value head
# at a time: strided inputs cost the kernel a tenth of its speed, more in half precision.
COPIED_ELEMENTS, COPIED_HALF_ELEMENTS = 1 << 17, 1 << 16


class Call(NamedTuple):
    """One call of the kernel, of queries ``[q0, q0 + n)`` and keys ``[k0, k0 + w)`` of a square:
    all pairs, the causal ones, or as ``strip`` those that are causal in its last keys."""

    q0: int
    n: int
    k0: int
    w: int
    causal: bool
    strip: bool = False


def calls(square: Square) -> list[Call]:
    """The calls for a square; tokens count from its first query and from its first key."""
    n, prefix = square.q1 - square.q0, square.k0 - square.prefix
    if prefix or not square.causal or not 2 * STRIP <= n < LONG_QUERIES:
        whole = Call(0, n, prefix, square.k1 - square.k0, square.causal)
        return [whole, Call(0, n, 0, prefix, False)] if prefix else [whole]
    # The first strip has the fewest keys, so it takes the queries that fill no block.
    height = STRIP if n <= MAX_NARROW else WIDE_STRIP
    first = height + n % height
    strips = [Call(a, height, 0, a + height, False, True) for a in range(first, n, height)]
    return [Call(0, first, 0, first, True), *strips]


class Squares:
    """The squares of one call of the operator.

    Args:
        squares: all of them.
        scale: of the scores.
    """

    def __init__(self, squares: Sequence[Square], scale: float) -> None:
        self.scale = scale
        lengths = [square.q1 - square.q0 for square in squares]
        self.longest = max((n for n in lengths if n < LONG_QUERIES), default=0)
        self._corners: dict[torch.dtype, torch.Tensor] = {}

    def _bias(self, call: Call, dtype: torch.dtype) -> torch.Tensor | None:
        """What hides the keys of a strip after a diagonal."""
        import torch

        if not call.strip:
            return None
        if dtype not in self._corners:  # the diagonal starts at column ``longest``
            corner = torch.zeros(WIDE_STRIP, self.longest + WIDE_STRIP, dtype=dtype)
            square = corner.new_full((WIDE_STRIP, WIDE_STRIP), -math.inf)
            corner[:, self.longest :] = square.triu_(1)
            self._corners[dtype] = corner[None, None]
        first = self.longest - (call.w - call.n)
        return self._corners[dtype][:, :, : call.n, first : first + call.w]

    def forward(
        self,
        of_queries: Sequence[torch.Tensor],
        of_keys: Sequence[torch.Tensor],
        square: Square,
    ) -> None:
        """Write out and lse of a square.

        Args:
            of_queries: q, out and lse, ``[1, h, S, D]`` and ``[1, h, S]``.
            of_keys: k and v, ``[1, g, T, D]``.
        """
        import torch

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        inputs = _Inputs(square, of_keys[0], backward=False)
        several = calls(square)
        for (q, out, lse), (k, v) in inputs.head_groups(of_queries, of_keys):
            q, k, v = inputs.read(q), inputs.read(k), inputs.read(v)
            if len(several) == 1 or several[1].strip:
                for call in several:
                    q0, n, k0, w, causal, _ = call
                    kv = k.narrow(2, k0, w), v.narrow(2, k0, w)
                    options = {"scale": self.scale, "attn_mask": self._bias(call, q.dtype)}
                    o, o_lse = flash(q.narrow(2, q0, n), *kv, 0.0, causal, **options)
                    out.narrow(2, q0, n).copy_(o)
                    lse.narrow(2, q0, n).copy_(o_lse)
                continue
            (o, o_lse), (o_more, lse_more) = (
                flash(q, k.narrow(2, k0, w), v.narrow(2, k0, w), 0.0, causal, scale=self.scale)
                for _, _, k0, w, causal, _ in several
            )
            # The weights sum to 1 for any lse; every row sees something in both calls.
            out.copy_(torch.lerp(o, o_more, torch.sigmoid(lse_more - o_lse).unsqueeze(-1)))
            lse.copy_(torch.logaddexp(o_lse, lse_more))

    def backward(
        self,
        of_queries: Sequence[torch.Tensor],
        of_keys: Sequence[torch.Tensor],
        square: Square,
    ) -> None:
        """Write dQ of a square, and write dK and dV if it alone has its keys, else add them.

        Args:
            of_queries: dout, q, out, dQ and lse, ``[1, h, S, D]`` and ``[1, h, S]``.
            of_keys: k, v, dK and dV, ``[1, g, T, D]``.
        """
        import torch

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = _Inputs(square, of_keys[0], backward=True)
        several = calls(square)
        for (dout, q, out, dq, lse), (k, v, dk, dv) in inputs.head_groups(of_queries, of_keys):
            dout, q, out, k, v = (inputs.read(x) for x in (dout, q, out, k, v))
            sums: list[torch.Tensor] = []
            for call in several:
                q0, n, k0, w, causal, _ = call
                dout_n, q_n, out_n, lse_n = (x.narrow(2, q0, n) for x in (dout, q, out, lse))
                kv = k.narrow(2, k0, w), v.narrow(2, k0, w)
                options = {"scale": self.scale, "attn_mask": self._bias(call, q.dtype)}
                parts = flash(dout_n, q_n, *kv, out_n, lse_n, 0.0, causal, **options)
                if len(several) == 1:
                    sums = parts
                    break
                sums = sums or [torch.zeros_like(x) for x in (q, k, v)]
                for total, part, (begin, size) in zip(
                    sums, parts, ((q0, n), (k0, w), (k0, w)), strict=True
                ):
                    total.narrow(2, begin, size).add_(part)
            dq.copy_(sums[0])
            for target, total in ((dk, sums[1]), (dv, sums[2])):
                target.copy_(total) if square.alone else target.add_(total)


class WholeSquare:
    """A mask that is one square, read in place and computed for all heads and batches at once."""

    def __init__(self, causal: bool, scale: float) -> None:
        self.causal, self.scale = causal, scale

    @staticmethod
    def of(
        squares: Sequence[Square], scale: float, q: torch.Tensor, k: torch.Tensor, backward: bool
    ) -> WholeSquare | None:
        """None where the mask is anything else, or inputs are copied or converted.

        Args:
            q, k: ``[B, S, h, D]`` and ``[B, T, g, D]``.
        """
        import torch

        tokens = slice(0, q.shape[1]), slice(0, k.shape[1])
        if len(squares) != 1 or len(calls(squares[0])) > 1:
            return None
        square, inputs = squares[0], _Inputs(squares[0], k, backward)
        places = slice(square.q0, square.q1), slice(square.prefix, square.k1)
        # In float64 the kernel's lse is float64 too.
        converted = inputs.dtype != q.dtype or q.dtype == torch.float64
        if places != tokens or converted or inputs.copied:
            return None
        return WholeSquare(square.causal, scale)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = flash(*inputs, 0.0, self.causal, scale=self.scale)
        return out.transpose(1, 2), lse.contiguous()

    def backward(self, x: BackwardInputs, lse: torch.Tensor) -> Gradients:
        """``lse`` is inf for rows that contribute nothing."""
        import torch

        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = (y.transpose(1, 2) for y in (x.dout, x.q, x.k, x.v, x.out))
        grads = flash(*inputs, lse, 0.0, self.causal, scale=self.scale)
        dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
        return dq, dk, dv


class _Inputs:
    """How the tensors of a square are read.

    They are float32 where the kernel has no products in half precision or is slower with them, or
    where two results are to be merged.
    """

    def __init__(self, square: Square, k: torch.Tensor, backward: bool) -> None:
        import torch

        n = square.q1 - square.q0
        self.rows, self.keys = (square.q0, n), (square.prefix, square.k1 - square.prefix)
        half = k.dtype == torch.bfloat16 and square.prefix == square.k0
        shorter = min(self.rows[1], self.keys[1])
        half &= not (backward and shorter < (HALF_CAUSAL if square.causal else HALF_FULL))
        self.dtype = k.dtype if half else torch.promote_types(k.dtype, torch.float32)
        self.copied = n * k.shape[3] >= (COPIED_HALF_ELEMENTS if half else COPIED_ELEMENTS)
        # Copies of bfloat16 are half as large, and a tenth faster for all heads at once.
        self.divided = self.copied and not half

    def head_groups(
        self, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """The queries and keys of the square, of all heads or of a key/value head at a time."""
        queries = [x.narrow(2, *self.rows) for x in of_queries]
        keys = [x.narrow(2, *self.keys) for x in of_keys]
        if not self.divided:
            yield queries, keys
            return
        g, h = keys[0].shape[1], queries[0].shape[1]
        for head in zip(
            zip(*(x.split(h // g, 1) for x in queries), strict=True),
            zip(*(x.split(1, 1) for x in keys), strict=True),
            strict=True,
        ):
            yield list(head[0]), list(head[1])

    def read(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        return x.contiguous() if self.copied else x
