"""The results of branches that are joined by their lse, in float64: whole, or sampled lines.

Derived keys are derived again in float64.  See ``cpbench.selectors.common.joining`` for the
definition.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, R query heads of each, D head
dim; n keys of a row, or rows of a column.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.kernels.reference import by_block, grouped_gradients, grouped_scores
from cpbench.selectors.common.base import Branch, SelectionResult
from cpbench.selectors.common.joining import KeyPool
from cpbench.selectors.common.rotating import Turn
from cpbench.selectors.selections import LandmarkBlocks
from cpbench.verify.branch_lines import (
    rows_in_chunks,
    visible_columns,
    window_at,
    window_means,
    windows_with,
)
from cpbench.verify.check import Tensors
from cpbench.verify.fit import chunks

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention


def reference_results(branches: tuple[Branch, ...], x: Tensors, scale: float) -> Tensors:
    """out, lse, and gradients if there is a dout, in float64, ``[B, heads, S, …]``."""
    import torch

    from cpbench.kernels.reference import backward64, forward64

    qkv = QKV(*(x[name].double() for name in "qkv"))
    parts = []
    for branch in branches:
        keys = _all_keys(branch, qkv)
        out, lse = forward64(keys, branch.mask, scale)
        parts.append((branch, keys, out, lse + math.log(branch.key_weight)))
    total_lse = torch.stack([lse for *_, lse in parts]).logsumexp(0)
    total = torch.stack([out * _per_row(_weights(lse, total_lse)) for *_, out, lse in parts]).sum(0)
    results = {"out": total.transpose(1, 2), "lse": total_lse}
    if "dout" not in x:
        return results
    dout, grads = x["dout"].double(), [torch.zeros_like(tensor) for tensor in qkv]
    for branch, keys, *_ in parts:
        of_keys = BackwardInputs(dout, *keys, total, total_lse - math.log(branch.key_weight))
        dq, dk, dv = backward64(of_keys, branch.mask, scale)
        if branch.derived is not None:
            more_dq, dk, dv = branch.derived.derive_backward(dk, dv, qkv)
            dq = dq + more_dq
        else:
            dk, dv = (branch.pool_k.mean_backward(grad, x["k"].shape[1]) for grad in (dk, dv))
        grads[0] += dq if branch.turn_q is None else branch.turn_q.transposed(dq)
        grads[1] += dk if branch.turn_k is None else branch.turn_k.transposed(dk)
        grads[2] += dv
    return results | {f"d{name}": grads[i].transpose(1, 2) for i, name in enumerate("qkv")}


def _all_keys(branch: Branch, qkv: QKV) -> QKV:
    """The inputs of the kernel of a branch."""
    qkv = branch.turned(qkv)
    if branch.derived is not None:
        return QKV(qkv.q, *branch.derived.derive(qkv))
    return QKV(qkv.q, branch.pool_k.mean(qkv.k), branch.pool_k.mean(qkv.v))


def _weights(part_lse: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """``exp(part_lse - lse)``; 0 where nothing is visible."""
    return (part_lse - lse.masked_fill(lse == -math.inf, math.inf)).exp()


def _per_row(x_BHS: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, 1]``."""
    return x_BHS.transpose(1, 2)[..., None]


def _turned(
    turn: Turn | None, x_D: torch.Tensor, token: int, transposed: bool = False
) -> torch.Tensor:
    """A vector of one token with RoPE, or a gradient turned back."""
    if turn is None:
        return x_D
    of_token = Turn(turn.positions[token : token + 1], turn.theta, turn.magnitude)
    x = x_D[None, None, None]
    turned = of_token.transposed(x) if transposed else of_token.apply(x)
    return turned[0, 0, 0]


class JoinedLines:
    """Rows and columns of the results for a selection.

    Args:
        work, inputs, results, selection: of a pass.  Columns take out and lse from the results,
            which the rows check.
    """

    def __init__(
        self, work: Attention, inputs: Tensors, results: Tensors, selection: SelectionResult
    ) -> None:
        self._problem, self._inputs, self._results = work.problem, inputs, results
        self._selection = selection
        self._group_keys = functools.lru_cache(maxsize=4)(self._derive_group)
        self._turned_keys = functools.lru_cache(maxsize=4)(self._turn_keys)

    def row(self, b: int, h: int, line: int) -> Tensors:
        """out, dq ``[D]`` and lse of one query of a head."""
        import torch

        x, scale = self._inputs, self._problem.softmax_scale
        q_D = x["q"][b, line, h].double()
        parts = []
        for branch in self._selection.branches:
            keys = self._row_keys(branch, b, h, line)
            k_nD, v_nD = self._keys(branch, b, h, keys)
            scores = (k_nD @ _turned(branch.turn_q, q_D, line)) * scale
            joined_scores = scores + math.log(branch.key_weight)
            if isinstance(branch.mask, LandmarkBlocks):
                joined_scores = by_block(grouped_scores, branch.mask.grid.block_k, scores)
            parts.append((branch, k_nD, v_nD, scores, joined_scores))
        total_lse = torch.cat([scores for *_, scores in parts]).logsumexp(0)
        probs = [_weights(scores, total_lse) for *_, scores in parts]
        total = torch.zeros_like(q_D)
        for (_, _, v_nD, *_), p in zip(parts, probs, strict=True):
            total += p @ v_nD
        results = {"out": total, "lse": total_lse}
        if "dout" not in x:
            return results
        dout_D = x["dout"][b, line, h].double()
        dq_D = torch.zeros_like(q_D)
        for (branch, k_nD, v_nD, scores, _), p in zip(parts, probs, strict=True):
            dscores = p * ((v_nD - total) @ dout_D)
            if isinstance(branch.mask, LandmarkBlocks):
                dscores = by_block(grouped_gradients, branch.mask.grid.block_k, scores, dscores)
            dq_D += _turned(branch.turn_q, (dscores * scale) @ k_nD, line, transposed=True)
        return results | {"dq": dq_D + self._dq_of_derived(b, h, line)}

    def column(self, b: int, g: int, line: int) -> Tensors:
        """dk and dv ``[D]`` of one key."""
        import torch

        tokens, device = self._inputs["k"].shape[1], self._inputs["k"].device
        dk_D, dv_D = (
            torch.zeros(self._problem.head_dim, dtype=torch.float64, device=device) for _ in "kv"
        )
        for number, branch in enumerate(self._selection.branches):
            if branch.derived is not None:
                for grad, part in zip(
                    (dk_D, dv_D), self._of_derived(number, b, g, line)[1:], strict=True
                ):
                    grad += part
                continue
            for column in windows_with(branch.pool_k, line, tokens):
                window = window_at(branch.pool_k, column * branch.pool_k.stride, tokens)
                for h in self._heads(g):
                    dk, dv = self._column_gradients(number, b, h, column)
                    dk = _turned(branch.turn_k, dk, line, transposed=True)
                    dk_D += dk / (window.stop - window.start)
                    dv_D += dv / (window.stop - window.start)
        return {"dk": dk_D, "dv": dv_D}

    def _heads(self, g: int) -> range:
        """The query heads of a key/value head."""
        return range(g * self._problem.group, (g + 1) * self._problem.group)

    def _keys(
        self, branch: Branch, b: int, h: int, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[n, D]`` of a branch for a query head."""
        g = h // self._problem.group
        if branch.derived is not None:
            k, v = self._group_keys(branch.derived, b, g)
            return k[columns, h % self._problem.group], v[columns, h % self._problem.group]
        all_k, all_v = self._turned_keys(branch.turn_k, b, g), self._inputs["v"][b, :, g]
        k, v = (window_means(x, branch.pool_k, columns) for x in (all_k, all_v))
        return k, v

    def _row_keys(self, branch: Branch, b: int, h: int, line: int) -> torch.Tensor:
        """The keys of a row; of blocks that landmarks weight, with these."""
        import torch

        if isinstance(branch.mask, LandmarkBlocks):
            return torch.nonzero(branch.mask.dense_blocks(line, line + 1)[b, h, 0])[:, 0]
        return visible_columns(branch, b, h, line, self._inputs["q"].device)

    def _turn_keys(self, turn: Turn | None, b: int, g: int) -> torch.Tensor:
        """All keys ``[T, D]`` of a key/value head, in float64 if they are turned."""
        k_TD = self._inputs["k"][b, :, g]
        return k_TD if turn is None else turn.apply(k_TD[None, :, None].double())[0, :, 0]

    def _derive_group(self, pool: KeyPool, b: int, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The derived keys and values of the query heads of a group, ``[n, R, D]``."""
        import torch

        n = pool.num_keys(self._inputs["k"].shape[1])
        elements = pool.size * self._problem.head_dim * self._problem.group
        derived = [pool.derive(self._runs(pool, b, g, part)) for part in chunks(n, elements)]
        keys, values = (torch.cat(list(x), 1)[0] for x in zip(*derived, strict=True))
        return keys, values

    def _runs(self, pool: KeyPool, b: int, g: int, runs: slice) -> QKV:
        """The inputs of some runs of tokens, of one key/value head."""
        tokens = slice(runs.start * pool.size, runs.stop * pool.size)
        heads, x = self._heads(g), self._inputs
        q = x["q"][b : b + 1, tokens, heads.start : heads.stop].double()
        k, v = (x[name][b : b + 1, tokens, g : g + 1].double() for name in "kv")
        return QKV(q, k, v)

    def _column_gradients(
        self, number: int, b: int, h: int, column: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv ``[D]`` of a key of a branch, through one query head."""
        import torch

        branch, x = self._selection.branches[number], self._inputs
        scale = self._problem.softmax_scale
        if isinstance(branch.mask, LandmarkBlocks):
            return self._landmark_column(branch.mask, b, h, column)
        index = torch.tensor([column], device=x["k"].device)
        k_D, v_D = (keys[0] for keys in self._keys(branch, b, h, index))
        dk_D, dv_D = torch.zeros_like(k_D), torch.zeros_like(v_D)
        for _, rows in rows_in_chunks(
            branch, self._problem, b, range(h, h + 1), column, index.device
        ):
            q_nD, dout_nD = (x[name][b, rows, h].double() for name in ("q", "dout"))
            if branch.turn_q is not None:
                q_nD = branch.turn_q.of_tokens(rows).apply(q_nD[None, :, None])[0, :, 0]
            out_nD, lse_n = (self._results[name] for name in ("out", "lse"))
            out_nD, lse_n = out_nD[b, rows, h].double(), lse_n[b, h, rows].double()
            probs = ((q_nD @ k_D) * scale - (lse_n - math.log(branch.key_weight))).exp()
            dv_D += probs @ dout_nD
            dk_D += (probs * (dout_nD @ v_D - (dout_nD * out_nD).sum(-1)) * scale) @ q_nD
        return dk_D, dv_D

    def _landmark_column(
        self, selected: LandmarkBlocks, b: int, h: int, column: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_column_gradients`, of a key in blocks that landmarks weight, or a landmark."""
        import torch

        x, g, width = self._inputs, h // self._problem.group, selected.grid.block_k
        block, position = divmod(column, width)
        keys = slice(block * width, (block + 1) * width)
        k_wD, v_wD = (x[name][b, keys, g].double() for name in "kv")
        dk_D, dv_D = (torch.zeros_like(y[0]) for y in (k_wD, v_wD))
        if len(k_wD) < width:
            return dk_D, dv_D
        queries = selected.visible_queries(b, h, keys.start)
        for part in chunks(len(queries), width * self._problem.head_dim):
            rows = queries[part]
            q_nD, dout_nD, out_nD = (
                y[b, rows, h].double() for y in (x["q"], x["dout"], self._results["out"])
            )
            scores_nw = (q_nD @ k_wD.T) * self._problem.softmax_scale
            lse_n1 = self._results["lse"][b, h, rows].double()[:, None]
            probs_nw = (grouped_scores(scores_nw) - lse_n1).exp()
            dscores_nw = (dout_nD @ v_wD.T - (dout_nD * out_nD).sum(-1, True)) * probs_nw
            dscores_nw = grouped_gradients(scores_nw, dscores_nw) * self._problem.softmax_scale
            dk_D += dscores_nw[:, position] @ q_nD
            dv_D += probs_nw[:, position] @ dout_nD
        return dk_D, dv_D

    def _dq_of_derived(self, b: int, h: int, line: int) -> torch.Tensor | float:
        """dq ``[D]`` of a query through the keys that are derived from it."""
        total: torch.Tensor | float = 0.0
        for number, branch in enumerate(self._selection.branches):
            if branch.derived is not None:
                group = self._problem.group
                dq = self._of_derived(number, b, h // group, line)[0]
                total = total + dq[h % group]
        return total

    def _of_derived(
        self, number: int, b: int, g: int, line: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq ``[R, D]``, dk and dv ``[D]`` of a token through the key that is derived from its
        run."""
        import torch

        pool = self._selection.branches[number].derived
        assert pool is not None
        run, tokens = line // pool.size, self._inputs["k"].shape[1]
        zeros = self._inputs["k"].new_zeros(self._problem.head_dim, dtype=torch.float64)
        if run >= pool.num_keys(tokens):
            return zeros.expand(self._problem.group, -1), zeros, zeros
        of_heads = [self._column_gradients(number, b, h, run) for h in self._heads(g)]
        dk, dv = (torch.stack(grads)[None, None] for grads in zip(*of_heads, strict=True))
        grads = pool.derive_backward(dk, dv, self._runs(pool, b, g, slice(run, run + 1)))
        dq, dk, dv = (grad[0, line % pool.size] for grad in grads)
        return dq, dk[0], dv[0]
