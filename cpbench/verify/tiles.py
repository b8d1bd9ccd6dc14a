"""The check of tiles: every row and column at the measured size, by random projections.

With T a matrix of a few random columns of signs, ``out T = P (V T)`` costs little more than the
probabilities P, and a wrong row of out differs from it unless its error is orthogonal to every
column of T.  Likewise ``dq T = dS (K T)``, ``dk T = dS' (Q T)`` and ``dv T = P' (dout T)``: two
large matrix products over rows and two over columns instead of seven.  It computes in float32,
since the sampled lines are compared in float64; it is for faults that samples miss, such as one bad
tile.

Chunks of lines are checked in random order until a time limit, the last batch and head first; the
share of lines that were checked is reported.  As in ``verify.at_size``, columns use the operator's
own lse and delta.

Source: Freivalds, "Probabilistic machines can use less running time" (1977).

Legend: R query heads that share a key/value head and a mask, C lines of a chunk, N lines that they
see, D head dim, J projections.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import distinct_masks
from cpbench.masks.slices import IntArray
from cpbench.verify.at_size import Statistics
from cpbench.verify.check import RankContext, Tensors, as_index
from cpbench.verify.errors import Errors, TensorErrorSums, worst_errors
from cpbench.verify.fit import chunks, row_products

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.parallel.layout import Layout

TILE = 128  # lines of a chunk, that is of a tile
BLOCK = 1024  # lines seen by a chunk that are computed at a time
PROJECTIONS = 4
MIN_TILE_WEIGHT = 1e-3  # of the mean: tiles of smaller norm are compared at this


@dataclass(frozen=True)
class TileErrors:
    """Result of the check.

    Attributes:
        errors: by tensor, of the worst batch and head; ``tile`` is rel_l2 of the worst tile.
        covered: share of the lines (rows, and columns where there is a backward pass) checked.
    """

    errors: Errors
    covered: float


def check_tiles(
    work: Attention,
    inputs: Tensors,
    results: Tensors,
    recipe: Recipe,
    seed: int,
    seconds: float,
    context: RankContext,
    statistics: Statistics | None,
) -> TileErrors:
    """Errors of all tiles of a rank's results, or of as many as the time allows; collective.

    Args:
        inputs, results: as for ``at_size.check_sampled``.
        seed: of the projections and of the order of chunks.
        seconds: time limit.
        statistics: of ``at_size.query_statistics``.
    """
    if isinstance(work.mask, DilatedMask) or "lse" not in results:
        return TileErrors({}, 0.0)
    checker = _TileChecker(work, inputs, results, recipe, seed, work.home, statistics)
    ranks = context.gather(context.compute(functools.partial(checker.run, seconds)))
    return TileErrors(
        worst_errors([errors for errors, _ in ranks]), min(covered for _, covered in ranks)
    )


class _TileChecker:
    """The check of one rank's tiles."""

    def __init__(
        self,
        work: Attention,
        inputs: Tensors,
        results: Tensors,
        recipe: Recipe,
        seed: int,
        device: str,
        statistics: Statistics | None,
    ) -> None:
        import torch

        self._work, self._inputs, self._results, self._recipe = work, inputs, results, recipe
        self._problem, self._device, self._statistics = work.problem, device, statistics
        self._backward = statistics is not None
        self._rng = np.random.default_rng([seed, work.rank])
        lanes = max(self._problem.head_dim, self._problem.value_dim)
        signs = self._rng.choice([-1.0, 1.0], size=(lanes, PROJECTIONS))
        self._signs_DJ = torch.as_tensor(signs, device=device, dtype=torch.float32)
        self._cache: Tensors = {}

    def run(self, seconds: float) -> tuple[Errors, float]:
        """Errors by tensor, and the share of lines that were checked."""
        end = time.monotonic() + seconds
        problem = self._problem
        pairs = [(b, g) for b in range(problem.batch) for g in range(problem.heads_kv)]
        order = [len(pairs) - 1, *self._rng.permutation(len(pairs) - 1)]
        by_pair, covered = [], 0.0
        for done, index in enumerate(order):
            left = end - time.monotonic()
            if left <= 0 and done:
                break
            b, g = pairs[index]
            errors, share = self._check_pair(b, g, left / (len(pairs) - done))
            by_pair.append(errors)
            covered += share / len(pairs)
        return worst_errors(by_pair), covered

    def _check_pair(self, b: int, g: int, seconds: float) -> tuple[Errors, float]:
        """The same for one batch and key/value head; at least one chunk."""
        end = time.monotonic() + seconds
        world, rank = self._work.world, self._work.rank
        self._cache.clear()
        chunks = [(self._check_rows, chunk) for chunk in _chunks(world.queries, rank)]
        if self._backward:
            chunks += [(self._check_columns, chunk) for chunk in _chunks(world.keys, rank)]
        tiles: dict[str, list[TensorErrorSums]] = {}
        done = 0
        for index in self._rng.permutation(len(chunks)):
            check, chunk = chunks[index]
            for heads, mask in self._heads_by_mask(g):
                for name, sums in check(b, heads, mask, chunk).items():
                    tiles.setdefault(name, []).append(sums)
            done += 1
            if time.monotonic() > end:
                break
        return {name: _errors(name, sums) for name, sums in tiles.items()}, done / len(chunks)

    def _heads_by_mask(self, g: int) -> Iterator[tuple[slice, AttnMask]]:
        """The query heads of a group, in ranges that share a mask."""
        mask = self._work.mask
        assert not isinstance(mask, DilatedMask)
        first, end = g * self._problem.group, (g + 1) * self._problem.group
        if isinstance(mask, AttnMask):
            yield slice(first, end), mask
        else:
            for h in range(first, end):
                yield slice(h, h + 1), distinct_masks(mask)[h]

    def _check_rows(
        self, b: int, heads: slice, mask: AttnMask, chunk: _Chunk
    ) -> dict[str, TensorErrorSums]:
        """Errors of out, lse and dq of a chunk of queries."""
        import torch

        g = slice(heads.start // self._problem.group, heads.start // self._problem.group + 1)
        q_RCD = self._own("q", b, heads, chunk) * self._problem.softmax_scale
        lse_RC1 = self._lse(b, heads)[:, chunk.local, None]
        k_T1D, v_T1D = (self._all(name, b, g) for name in "kv")
        out_basis_TJ, dq_basis_TJ = (self._basis(name, b, g)[0] for name in "vk")
        dout_RCD = delta_RC1 = None
        if self._backward:
            dout_RCD = self._own("dout", b, heads, chunk)
            delta_RC1 = self._delta(b, heads)[:, chunk.local, None]
        total_RC1 = torch.zeros_like(lse_RC1)
        out_RCJ, dq_RCJ = (total_RC1.repeat(1, 1, PROJECTIONS) for _ in range(2))
        for block, hidden in _blocks(chunk, mask, len(k_T1D), self._device):
            probs = (q_RCD @ _rows(k_T1D, block)[0].T).sub_(lse_RC1).exp_()
            if hidden is not None:
                probs.masked_fill_(hidden, 0.0)
            total_RC1 += probs.sum(-1, keepdim=True)
            out_RCJ += probs @ out_basis_TJ[block]
            if dout_RCD is not None and delta_RC1 is not None:
                dscores = (dout_RCD @ _rows(v_T1D, block)[0].T).sub_(delta_RC1).mul_(probs)
                dq_RCJ += dscores @ dq_basis_TJ[block]
        # P was exp(s - lse) with the operator's own lse: what it should be follows from sums of P.
        sees_C1 = as_index(~mask.empty_rows()[chunk.positions], self._device)[:, None]
        expected = {
            "out": torch.where(sees_C1, out_RCJ / total_RC1, 0.0),
            "lse": torch.where(sees_C1, lse_RC1 + total_RC1.log(), -torch.inf)[..., 0],
        }
        if dout_RCD is not None:
            expected["dq"] = dq_RCJ * self._problem.softmax_scale
        return self._compare(b, heads, chunk, expected)

    def _check_columns(
        self, b: int, heads: slice, mask: AttnMask, chunk: _Chunk
    ) -> dict[str, TensorErrorSums]:
        """Errors of dk and dv of a chunk of keys, which are sums over all heads of a group: checked
        with the first range of heads."""
        import torch

        group = self._problem.group
        if heads.start % group:
            return {}
        g = slice(heads.start // group, heads.start // group + 1)
        k_CD, v_CD = (self._own(name, b, g, chunk)[0] for name in "kv")
        k_CD = k_CD * self._problem.softmax_scale
        dk_CJ, dv_CJ = (torch.zeros(len(k_CD), PROJECTIONS, device=self._device) for _ in "kv")
        for group_heads, head_mask in self._heads_by_mask(g.start):
            q_SRD, dout_SRD = (self._all(name, b, group_heads) for name in ("q", "dout"))
            q_basis, dout_basis = (self._basis(name, b, group_heads) for name in ("q", "dout"))
            lse_R1S, delta_R1S = (x[:, None] for x in self._all_statistics(b, group_heads))
            for block, hidden in _blocks(chunk, head_mask.transpose(), len(q_SRD), self._device):
                probs = (k_CD @ _rows(q_SRD, block).mT).sub_(lse_R1S[..., block]).exp_()
                if hidden is not None:
                    probs.masked_fill_(hidden, 0.0)
                dv_CJ += (probs @ dout_basis[:, block]).sum(0)
                dscores = v_CD @ _rows(dout_SRD, block).mT
                dscores = dscores.sub_(delta_R1S[..., block]).mul_(probs)
                dk_CJ += (dscores @ q_basis[:, block]).sum(0)
        expected = {"dk": dk_CJ[None] * self._problem.softmax_scale, "dv": dv_CJ[None]}
        return self._compare(b, g, chunk, expected)

    def _compare(
        self, b: int, heads: slice, chunk: _Chunk, expected: Tensors
    ) -> dict[str, TensorErrorSums]:
        """Error sums of a tile, a group for each head."""
        sums = {}
        for name, reference in expected.items():
            if name == "lse":
                actual = self._results[name][b, heads][:, chunk.local]
            else:
                own = self._results[name][b][chunk.local][:, heads].float().transpose(0, 1)
                actual = self._projected(own)
            sums[name] = TensorErrorSums.between(actual, reference, len(reference))
        return sums

    def _own(self, name: str, b: int, heads: slice, chunk: _Chunk) -> torch.Tensor:
        """Own tokens of an input, ``[heads, C, D]`` float32."""
        x = self._inputs[name][b][as_index(chunk.local, self._device)]
        return x[:, heads].transpose(0, 1).float()

    # What all chunks of one batch and key/value head have in common, of one range of its heads.

    def _cached(self, key: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _lse(self, b: int, heads: slice) -> torch.Tensor:
        """Of own queries, ``[heads, tokens]``; infinite where P = 0, as a query sees nothing."""
        return self._cached(f"lse {heads}", lambda: _seen(self._results["lse"][b, heads].float()))

    def _delta(self, b: int, heads: slice) -> torch.Tensor:
        """Of own queries, ``[heads, tokens]`` float32."""
        import torch

        dout, out = (x[b : b + 1, :, heads] for x in (self._inputs["dout"], self._results["out"]))
        return self._cached(f"delta {heads}", lambda: row_products(dout, out, torch.float32)[0])

    def _all_statistics(self, b: int, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """lse, as :meth:`_lse`, and delta of all queries, in global order; ``[heads, S]``."""
        import torch

        assert self._statistics is not None
        lse, delta = (x[b, heads] for x in self._statistics)
        convert = functools.partial(torch.as_tensor, device=self._device, dtype=torch.float32)
        return (
            self._cached(f"all lse {heads}", lambda: _seen(convert(lse))),
            self._cached(f"all delta {heads}", lambda: convert(delta)),
        )

    def _all(self, name: str, b: int, heads: slice) -> torch.Tensor:
        """All tokens of an input in global order, ``[T, heads, D]``; in their own dtype, since they
        are many."""
        world, chosen = self._work.world, range(heads.start, heads.stop)
        tokens = (world.keys if name in "kv" else world.queries).seq_len
        if world.size == 1:
            return self._inputs[name][b, :tokens, heads]

        def make() -> torch.Tensor:
            return self._recipe.make(
                name, self._problem, np.arange(tokens), batches=[b], heads=chosen,
                device=self._device,
            )[0]  # fmt: skip

        return self._cached(f"{name} {heads}", make)

    def _basis(self, name: str, b: int, heads: slice) -> torch.Tensor:
        """The projections of an input, ``[heads, T, J]``."""
        import torch

        x = self._all(name, b, heads)

        def make() -> torch.Tensor:
            parts = chunks(len(x), x[:1].numel())
            return torch.cat([self._projected(_rows(x, part)) for part in parts], 1)

        return self._cached(f"{name} {heads} projected", make)

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, D]`` times the signs of its lanes, ``[…, J]``."""
        return x @ self._signs_DJ[: x.shape[-1]]


def _rows(x_TRD: torch.Tensor, part: slice) -> torch.Tensor:
    """Some tokens as ``[R, tokens, D]`` float32, contiguous."""
    return x_TRD[part].transpose(0, 1).contiguous().float()


def _seen(lse: torch.Tensor) -> torch.Tensor:
    """With infinity for minus infinity, by which P = exp(s - lse) is 0 for a query that sees
    nothing."""
    import torch

    return lse.masked_fill(torch.isneginf(lse), torch.inf)


@dataclass(frozen=True)
class _Chunk:
    """Lines of one tile: their indices on this rank, and their global positions."""

    local: IntArray
    positions: IntArray


def _chunks(layout: Layout, rank: int) -> list[_Chunk]:
    """The tokens of a rank in chunks, without padding."""
    positions = layout.positions(rank)
    real = np.flatnonzero(positions < layout.seq_len)
    starts = range(0, len(real), TILE)
    return [_Chunk(real[i : i + TILE], positions[real[i : i + TILE]]) for i in starts]


def _blocks(
    chunk: _Chunk, mask: AttnMask, seen: int, device: str
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """The blocks of lines of which a chunk sees some, each with the pairs that are hidden,
    ``[C, N]``, or None if it sees all."""
    starts = np.flatnonzero(np.diff(chunk.positions, prepend=-2) != 1)
    lengths = np.diff(np.append(starts, len(chunk.positions)))
    ranges = np.column_stack([chunk.positions[starts], lengths])
    own_mask = mask.restrict(ranges, np.array([[0, seen]]))
    _, _, first, last = own_mask.hull
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        visible = own_mask.crop(0, len(chunk.positions), start, end)
        if visible.area == len(chunk.positions) * (end - start):
            yield slice(start, end), None
        elif visible.area:
            yield slice(start, end), as_index(~visible.to_dense(), device)


def _errors(name: str, tiles: list[TensorErrorSums]) -> dict[str, float]:
    """The errors of a tensor in one batch and group of heads, over all tiles that were checked, and
    ``tile``, rel_l2 of the worst tile."""
    errors = functools.reduce(TensorErrorSums.add, tiles).errors(absolute=name == "lse")
    squared_error = np.stack([tile.squared_error for tile in tiles])
    weight = np.stack([tile.w for tile in tiles])
    if name != "lse" and weight.any():
        least = MIN_TILE_WEIGHT * weight.mean()
        errors["tile"] = float(np.sqrt((squared_error / np.maximum(weight, least)).max()))
    return errors
