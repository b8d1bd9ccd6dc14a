"""The sampled half of ``check``: single rows and columns recomputed at the measured size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.problem import Problem
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask, distinct
from cpbench.verify.check import Errors, Rank, Tensors, TensorSums, combine, index_of

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention

SAMPLED_LINES = 64
TILES = (64, 128, 256)  # extents of tiles whose last, partial one is always looked at
Floats = np.typing.NDArray[np.float64]


def sampled(work: Attention, inputs: Tensors, found: Tensors, recipe: Recipe, rank: Rank) -> Errors:
    """Errors of sampled rows and columns at the measured size.

    Every rank recomputes lines of its own tokens, each of another batch and key/value head in
    turn, from regenerated global inputs.  Columns need the lse and delta of every query: those are
    the operator's own, gathered, and are themselves checked by the rows.

    Args:
        inputs: of this rank, as :func:`make_inputs` made them.
        found: what :func:`run` returned for them.
    """
    import torch

    problem, world, seed = work.problem, work.world, recipe.seed
    source = _Source(problem, work.mask, recipe, rank.device)
    queries, keys = (x.positions(work.rank) for x in (world.queries, world.keys))
    rows = sampled_lines(work.mask, queries, seed)
    columns = sampled_lines(work.mask.transpose(), keys, seed)
    whole = _everyones_lse(work, inputs, found, rank) if "dq" in found and "lse" in found else None
    pairs = [(b, g) for b in range(problem.batch) for g in range(problem.heads_kv)]
    got: dict[str, list[torch.Tensor]] = {}
    want: dict[str, list[torch.Tensor]] = {}

    def hold(name: str, mine: torch.Tensor, right: torch.Tensor) -> None:
        got.setdefault(name, []).append(mine)
        want.setdefault(name, []).append(right)

    for number, (b, g) in enumerate(pairs):
        heads = slice(g * problem.group, (g + 1) * problem.group)
        for i in _turns(len(rows), number, len(pairs), work, seed):
            right = source.row(b, g, int(queries[rows[i]]))
            for name in [name for name in right if name in found]:
                value = found[name][b]
                mine = value[:, rows[i]] if name == "lse" else value[rows[i]]
                hold(name, mine[heads], right[name])
        for i in _turns(len(columns) if whole else 0, number, len(pairs), work, seed):
            assert whole is not None
            right = source.column(b, g, int(keys[columns[i]]), whole[0][b], whole[1][b])
            for name in right:
                hold(name, found[name][b][columns[i], g], right[name])
        source.forget()
    sums = {name: TensorSums.of(torch.cat(got[name]), torch.cat(want[name])) for name in got}
    return combine(rank.gather(sums))


def _turns(count: int, number: int, pairs: int, work: Attention, seed: int) -> IntArray:
    """Which of a rank's lines are looked at in a batch and head: each in one of them."""
    turn = np.arange(count) * work.world.size + work.rank + seed
    return np.flatnonzero(turn % pairs == number)


def sampled_lines(mask: Mask, positions: IntArray, seed: int) -> IntArray:
    """Local indices of the sampled queries of a rank: those at edges, and others at random."""
    n = mask.seq_q
    columns = [0, 1, 2, 3] if mask.seq_q == mask.seq_k else [0, 1]
    corners = mask.slices[:, columns].reshape(-1)
    corners = np.concatenate([corners, corners - 1])
    corners = corners[np.linspace(0, len(corners) - 1, min(8, len(corners))).astype(int)]
    edges = np.concatenate([[0, n - 1], corners, *([n // t * t, n // t * t - 1] for t in TILES)])
    real = np.flatnonzero(positions < n)
    at_edges = real[np.isin(positions[real], edges)]
    both_ends = real[[0, -1]] if len(real) else real
    count = min(len(real), max(8, SAMPLED_LINES * len(positions) // max(n, 1)))
    chance = np.random.default_rng([seed, int(positions[0])])
    spread = chance.choice(real, size=count, replace=False)
    return np.unique(np.concatenate([at_edges, both_ends, spread])).astype(np.int64)


def _everyones_lse(
    work: Attention, inputs: Tensors, found: Tensors, rank: Rank
) -> tuple[Floats, Floats]:
    """lse and delta of all queries, ``[B, H, S]`` each, in global order."""
    delta = (inputs["dout"].double() * found["out"].double()).sum(-1).transpose(1, 2)
    mine = (found["lse"].double().cpu().numpy(), delta.cpu().numpy())
    parts = rank.control.gather(mine) if rank.control else [mine]
    layout = work.world.queries
    whole = np.empty((2, *mine[0].shape[:2], layout.padded_len))
    for other, part in enumerate(parts):
        whole[..., layout.positions(other)] = part
    return whole[0], whole[1]


class _Source:
    """Single rows and columns of the problem in float64, from inputs made anew.

    Legend: R query heads of a group, T visible keys (or queries, for a column), D head dim.
    """

    def __init__(self, problem: Problem, mask: Mask, recipe: Recipe, device: str) -> None:
        self._problem, self._recipe, self._device = problem, recipe, device
        self._mask, self._transposed = mask, mask.transpose()
        self._alike = problem.group if isinstance(mask, AttnMask) else 1  # heads of one mask
        self._keys: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop the keys and values of the present batch and head."""
        self._keys.clear()

    def row(self, b: int, g: int, line: int) -> Tensors:
        """out and dq ``[R, D]`` and lse ``[R]`` of one query."""
        import torch

        parts = [self._part_of_row(b, heads, line) for heads in self._heads(g)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _heads(self, g: int) -> list[range]:
        """The query heads of a group, together where they share a mask."""
        first, end = g * self._problem.group, (g + 1) * self._problem.group
        return [range(h, h + self._alike) for h in range(first, end, self._alike)]

    def _part_of_row(self, b: int, heads: range, line: int) -> Tensors:
        import torch

        g = heads[0] // self._problem.group
        seen = self._visible(self._mask, heads, line)
        for name in ("k", "v"):
            if name not in self._keys:
                tokens = np.arange(self._mask.seq_k)
                self._keys[name] = self._make(name, b, [g], tokens)[:, 0]
        k_TD, v_TD = (self._keys[name][seen].double() for name in ("k", "v"))
        q_RD = self._of_queries("q", b, heads, np.array([line]))[:, 0]
        scale = self._problem.softmax_scale
        scores_RT = (q_RD @ k_TD.T) * scale
        lse_R = torch.logsumexp(scores_RT, -1)
        probs_RT = torch.exp(scores_RT - lse_R[:, None])
        found = {"out": probs_RT @ v_TD, "lse": lse_R}
        if self._problem.backward:
            dout_RD = self._of_queries("dout", b, heads, np.array([line]))[:, 0]
            delta_R1 = (dout_RD * found["out"]).sum(-1, keepdim=True)
            found["dq"] = (probs_RT * (dout_RD @ v_TD.T - delta_R1) * scale) @ k_TD
        return found

    def column(
        self,
        b: int,
        g: int,
        line: int,
        lse_HS: Floats,
        delta_HS: Floats,
    ) -> Tensors:
        """dk and dv ``[D]`` of one key, given the lse and delta of all queries."""
        import torch

        k_D, v_D = (self._keys[name][line].double() for name in ("k", "v"))
        dk_D, dv_D = torch.zeros_like(k_D), torch.zeros_like(v_D)
        for heads, part in self._seers(g, line):
            q_RTD, dout_RTD = (self._of_queries(name, b, heads, part) for name in ("q", "dout"))
            these = slice(heads.start, heads.stop)
            lse_RT, delta_RT = (
                torch.as_tensor(x[these, part], device=self._device) for x in (lse_HS, delta_HS)
            )
            scale = self._problem.softmax_scale
            probs_RT = torch.exp((q_RTD @ k_D) * scale - lse_RT)
            dscores_RT = probs_RT * (dout_RTD @ v_D - delta_RT) * scale
            dv_D += torch.einsum("rt,rtd->d", probs_RT, dout_RTD)
            dk_D += torch.einsum("rt,rtd->d", dscores_RT, q_RTD)
        return {"dk": dk_D, "dv": dv_D}

    def _seers(self, g: int, line: int) -> Iterator[tuple[range, IntArray]]:
        """The queries that see one key, by heads that share a mask, some at a time."""
        for heads in self._heads(g):
            seen = self._visible(self._transposed, heads, line).cpu().numpy()
            for start in range(0, len(seen), 1 << 14):
                yield heads, seen[start : start + (1 << 14)]

    def _of_queries(self, name: str, b: int, heads: range, tokens: IntArray) -> torch.Tensor:
        """``[R, tokens, D]`` float64 of some query heads."""
        return self._make(name, b, heads, tokens).double().transpose(0, 1)

    def _make(self, name: str, b: int, heads: list[int] | range, tokens: IntArray) -> torch.Tensor:
        device = self._device
        given = (name, self._problem, tokens)
        return self._recipe.make(*given, batches=[b], heads=heads, device=device)[0]

    def _visible(self, of: Mask, heads: range, line: int) -> torch.Tensor:
        """Indices of the keys that one query sees in heads that share a mask, repeated where it
        sees them several times."""
        if isinstance(of, DilatedMask):
            return index_of(of.seen(heads[0], line), self._device)
        masks = distinct(of)
        return index_of(keys_seen(masks[heads[0] % len(masks)], line), self._device)


def keys_seen(mask: AttnMask, line: int) -> IntArray:
    """Indices of the keys that one query sees."""
    here = mask.slices[(mask.slices[:, 0] <= line) & (line < mask.slices[:, 1])]
    _, _, k0, k1, lo, hi = here.T
    start, end = np.maximum(k0, line + lo), np.minimum(k1, line + hi + 1)
    parts = [np.arange(a, b) for a, b in zip(start, end, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
