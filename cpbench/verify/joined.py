"""The results of branches that are joined by their lse, in float64: whole, or sampled lines.

Derived keys are derived again in float64.  See ``cpbench.selectors.common.joining`` for the
definition.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, R query heads of each, D head
dim; n keys of a row, or rows of a column.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.selectors.common.base import Branch, SelectionResult
from cpbench.selectors.common.folding import unfold_batch, unfold_lse
from cpbench.selectors.common.joining import KeyPool, KeyScores, branch_lse
from cpbench.selectors.common.rotating import Turn
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
        parts.append((branch, keys, out, lse, branch_lse(branch, lse, qkv)))
    total_lse = torch.stack([lse for *_, lse in parts]).logsumexp(0)
    weights = [_weights(lse, total_lse) for *_, lse in parts]
    total = torch.stack(
        [out * _per_row(w) for (_, _, out, _, _), w in zip(parts, weights, strict=True)]
    ).sum(0)
    results = {"out": total.transpose(1, 2), "lse": total_lse}
    if "dout" not in x:
        return results
    dout, grads = x["dout"].double(), [torch.zeros_like(tensor) for tensor in qkv]
    delta = (dout * total).sum(-1).transpose(1, 2)
    for (branch, keys, out, lse, _), w in zip(parts, weights, strict=True):
        if branch.scores is None:
            lse_of_keys = total_lse - math.log(branch.key_weight)
            of_keys = BackwardInputs(dout, *keys, total, lse_of_keys)
        else:
            of_keys = BackwardInputs(dout * _per_row(w), *keys, out, lse)
            dlse = w * ((dout * out).sum(-1).transpose(1, 2) - delta)
            for grad, part in zip(grads, branch.scores.backward(dlse, *qkv[:2]), strict=False):
                grad += part
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
            visible = visible_columns(branch, b, h, line, q_D.device)
            k_nD, v_nD = self._keys(branch, b, h, visible)
            scores = (k_nD @ _turned(branch.turn_q, q_D, line)) * scale
            lse = scores.logsumexp(0)
            probs = (scores - lse).exp() if len(visible) else scores
            joined_by, score_key = lse + math.log(branch.key_weight), None
            if branch.scores is not None:
                score_key = self._score_key(branch.scores, b, h, line)
                joined_by = (
                    torch.full_like(lse, -torch.inf)
                    if score_key is None
                    else q_D @ score_key * branch.scores.scale
                )
            parts.append((branch, k_nD, v_nD, probs, probs @ v_nD, joined_by, score_key))
        total_lse = torch.stack([lse for *_, lse, _ in parts]).logsumexp(0)
        weights = [_weights(lse, total_lse) for *_, lse, _ in parts]
        outs = [out for *_, out, _, _ in parts]
        total = sum((w * out for w, out in zip(weights, outs, strict=True)), torch.zeros_like(q_D))
        results = {"out": total, "lse": total_lse}
        if "dout" not in x:
            return results
        dout_D = x["dout"][b, line, h].double()
        dq_D = torch.zeros_like(q_D)
        for (branch, k_nD, v_nD, probs, out, _, score_key), w in zip(parts, weights, strict=True):
            mean = (total if branch.scores is None else out) @ dout_D
            own_dq_D = w * ((probs * (v_nD @ dout_D - mean) * scale) @ k_nD)
            dq_D += _turned(branch.turn_q, own_dq_D, line, transposed=True)
            if branch.scores is not None and score_key is not None:
                dq_D += w * ((out - total) @ dout_D) * branch.scores.scale * score_key
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
            if branch.scores is not None:
                dk_D += self._dk_of_scores(number, branch.scores, b, g, line)
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

    def _score_key(self, scores: KeyScores, b: int, h: int, line: int) -> torch.Tensor | None:
        """The key ``[D]`` whose score is the lse of a query; None if it has none."""
        key = int(scores.index[b, h, line])
        return None if key < 0 else self._inputs["k"][b, key, h // self._problem.group].double()

    def _column_gradients(
        self, number: int, b: int, h: int, column: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv ``[D]`` of a key of a branch, through one query head."""
        import torch

        branch, x, scale = self._selection.branches[number], self._inputs, self._scale
        index = torch.tensor([column], device=x["k"].device)
        k_D, v_D = (keys[0] for keys in self._keys(branch, b, h, index))
        dk_D, dv_D = torch.zeros_like(k_D), torch.zeros_like(v_D)
        for _, rows in rows_in_chunks(
            branch, self._problem, b, range(h, h + 1), column, index.device
        ):
            q_nD, dout_nD = (x[name][b, rows, h].double() for name in ("q", "dout"))
            if branch.turn_q is not None:
                q_nD = branch.turn_q.of_tokens(rows).apply(q_nD[None, :, None])[0, :, 0]
            out_nD, lse_n, weights_n = self._softmax_of(number, b, h, rows)
            probs = weights_n * ((q_nD @ k_D) * scale - lse_n).exp()
            dv_D += probs @ dout_nD
            dk_D += (probs * (dout_nD @ v_D - (dout_nD * out_nD).sum(-1)) * scale) @ q_nD
        return dk_D, dv_D

    @property
    def _scale(self) -> float:
        return self._problem.softmax_scale

    def _softmax_of(
        self, number: int, b: int, h: int, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """out ``[n, D]`` and lse of the softmax that the pairs of a branch belong to, and its
        weight in the result, ``[n]``."""
        import torch

        branch = self._selection.branches[number]
        out, lse = self._results["out"][b, rows, h].double(), self._results["lse"][b, h, rows]
        if branch.scores is None:
            lse = lse.double() - math.log(branch.key_weight)
            return out, lse, torch.ones_like(lse)
        own_out, own_lse = self._own(number)
        return own_out(b, rows, h), own_lse(b, h, rows), self._given_weights(number, b, h, rows)

    def _own(self, number: int) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
        """Rows of the own out, and of the own lse, of a branch."""
        result, batch = self._selection.results[number], self._problem.batch
        assert result.lse is not None
        out, lse = unfold_batch(result.out, batch), unfold_lse(result.lse, batch)
        return (lambda *at: out[at].double()), (lambda *at: lse[at].double())

    def _given_weights(self, number: int, b: int, h: int, rows: torch.Tensor) -> torch.Tensor:
        """``[n]``: weights of a branch whose lse is given."""
        import torch

        scores = self._selection.branches[number].scores
        assert scores is not None
        keys, x = scores.index[b, h, rows].long(), self._inputs
        k_nD = x["k"][b, keys.clamp(min=0), h // self._problem.group].double()
        lse = (x["q"][b, rows, h].double() * k_nD).sum(-1) * scores.scale
        lse = lse.masked_fill(keys < 0, -torch.inf)
        return _weights(lse, self._results["lse"][b, h, rows].double())

    def _dk_of_scores(
        self, number: int, scores: KeyScores, b: int, g: int, line: int
    ) -> torch.Tensor:
        """dk ``[D]`` of a key through the scores that are the lse of a branch."""
        import torch

        x, own_out = self._inputs, self._own(number)[0]
        dk_D = torch.zeros_like(x["k"][b, line, g], dtype=torch.float64)
        for h in self._heads(g):
            found = torch.nonzero(scores.index[b, h] == line)[:, 0]
            for part in chunks(len(found), self._problem.head_dim):
                rows = found[part]
                q_nD, dout_nD = (x[name][b, rows, h].double() for name in ("q", "dout"))
                above = own_out(b, rows, h) - self._results["out"][b, rows, h].double()
                weights_n = self._given_weights(number, b, h, rows)
                dk_D += (weights_n * (dout_nD * above).sum(-1) * scores.scale) @ q_nD
        return dk_D

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
