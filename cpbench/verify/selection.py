"""The small and sampled checks of selectors: are the results right, given the selection?

Both checks take the selection from the operator itself; of several ranks they are made on rank 0,
where everything is gathered.  Whether it is the right one is tested by
the tests of selectors; how much attention it recalls is measured in ``cpbench.verify.quality``.
Means of keys (or queries) are recomputed in float64.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, SelectionResult, Selector
from cpbench.verify import joined
from cpbench.verify.at_size import sample_lines
from cpbench.verify.branch_lines import (
    rows_in_chunks,
    visible_columns,
    window_at,
    window_means,
    window_sums,
    windows_with,
)
from cpbench.verify.check import RankContext, Tensors, run_pass
from cpbench.verify.errors import Errors, ErrorSums, TensorErrorSums, combined_errors
from cpbench.verify.gathered import OneRank, run_pass_as_one_rank

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention


def run_pass_with_selection(work: Attention, inputs: Tensors) -> tuple[Tensors, SelectionResult]:
    """Run one pass as :func:`check.run_pass`; also returns its selection."""
    selector = work.op.impl
    assert isinstance(selector, Selector)
    selector.keep_selection = True
    results = run_pass(work, inputs, None)
    selector.keep_selection = False
    return results, selector.selection_of(results["out"])


def check_small(work: Attention, inputs: Tensors, context: RankContext) -> Errors:
    """Errors of every output and gradient of a small problem."""
    _, one, _ = run_pass_as_one_rank(work, inputs, context)

    def compare() -> tuple[ErrorSums, float]:
        if one is None:
            return {}, 0.0
        selection, scale = one.selection, work.problem.softmax_scale
        reference = joined.reference_results if selection.joined else reference_results
        expected = reference(selection.branches, one.inputs, scale)
        sums = {}
        for name, value in one.results.items():
            heads_first = value if name == "lse" else value.transpose(1, 2)
            groups = heads_first.shape[0] * heads_first.shape[1]
            sums[name] = TensorErrorSums.between(heads_first, expected[name], groups)
        return sums, _largest(expected["lse"])

    return _errors(context.gather(context.compute(compare)))


def _largest(lse: torch.Tensor) -> float:
    """The largest magnitude of an lse."""
    finite = lse[lse.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def _errors(ranks: list[tuple[ErrorSums, float]]) -> Errors:
    """The errors, from the sums of every rank and the largest lse of a branch, with which limits
    grow where the result has no lse (see ``core.tolerance``)."""
    errors = combined_errors([sums for sums, _ in ranks])
    return {**errors, "out": {**errors["out"], "scores": max(largest for _, largest in ranks)}}


def reference_results(branches: tuple[Branch, ...], x: Tensors, scale: float) -> Tensors:
    """Results in float64, ``[B, heads, S, …]``: out, gradients if there is a dout, and the lse of
    each branch, one after another."""
    import torch

    from cpbench.kernels.reference import backward64, forward64

    tokens = {name: x[name].shape[1] for name in ("q", "k", "v")}
    total: Tensors = {}
    lses = []
    for branch in branches:
        pools = {"q": branch.pool_q, "k": branch.pool_k, "v": branch.pool_k}
        qkv = QKV(*(pools[name].mean(x[name].double()) for name in ("q", "k", "v")))
        out, lse = forward64(qkv, branch.mask, scale)
        lses.append(lse)
        partial = {"out": branch.pool_q.unpool(out, tokens["q"]) * branch.gate}
        if "dout" in x:
            dout = branch.pool_q.unpool_backward(x["dout"].double()) * branch.gate
            grads = backward64(BackwardInputs(dout, *qkv, out, lse), branch.mask, scale)
            for name, grad in zip(("q", "k", "v"), grads, strict=True):
                partial[f"d{name}"] = pools[name].mean_backward(grad, tokens[name])
        for name, value in partial.items():
            total[name] = total[name] + value if name in total else value
    results = {name: value.transpose(1, 2) for name, value in total.items()}
    return results | {"lse": torch.cat(lses, 2)}


MAX_LINES = 48  # sampled rows; the same of columns


def check_sampled(
    work: Attention,
    inputs: Tensors,
    results: Tensors,
    selection: SelectionResult,
    seed: int,
    context: RankContext,
) -> Errors:
    """Errors of sampled rows and columns at the measured size, of every batch and head; of rows
    only for a kernel that returns no lse."""
    return check_sampled_pass(OneRank(work, inputs, results, selection), seed, context)


def check_sampled_pass(one: OneRank | None, seed: int, context: RankContext) -> Errors:
    """As :func:`check_sampled`, of a pass that is gathered on rank 0, and None on others."""

    def compare() -> tuple[ErrorSums, float]:
        return ({}, 0.0) if one is None else _compare_lines(*one[:4], seed)

    return _errors(context.gather(context.compute(compare)))


def _compare_lines(
    work: Attention, inputs: Tensors, results: Tensors, selection: SelectionResult, seed: int
) -> tuple[ErrorSums, float]:
    """Error sums of the sampled lines, and the largest lse of a branch."""
    import torch

    problem, mask = work.problem, work.mask
    reference = (
        joined.JoinedLines(work, inputs, results, selection)
        if selection.joined
        else _ReferenceLines(work, inputs, selection)
    )
    heads = [(b, h) for b in range(problem.batch) for h in range(problem.heads_q)]
    actual: dict[str, list[torch.Tensor]] = {}
    expected: dict[str, list[torch.Tensor]] = {}

    def append(name: str, value: torch.Tensor, reference_value: torch.Tensor) -> None:
        actual.setdefault(name, []).append(value.flatten())
        expected.setdefault(name, []).append(reference_value.flatten())

    largest = 0.0
    rows = _spread_subset(sample_lines(mask, np.arange(mask.seq_q), seed))
    for line, (b, h) in _assign_to_heads(rows, heads, seed):
        row = reference.row(b, h, line)
        largest = max(largest, _largest(row["lse"]))
        for name in row:
            if name in results:
                value = results[name][b, h, line] if name == "lse" else results[name][b, line, h]
                append(name, value, row[name])
    if "dk" in results and all(result.lse is not None for result in selection.results):
        columns = _spread_subset(sample_lines(mask.transpose(), np.arange(mask.seq_k), seed))
        heads_kv = [(b, g) for b in range(problem.batch) for g in range(problem.heads_kv)]
        for line, (b, g) in _assign_to_heads(columns, heads_kv, seed):
            for name, grad_D in reference.column(b, g, line).items():
                append(name, results[name][b, line, g], grad_D)
    sums = {
        name: TensorErrorSums.between(torch.cat(actual[name]), torch.cat(expected[name]))
        for name in actual
    }
    return sums, largest


def _assign_to_heads(
    lines: IntArray, heads: list[tuple[int, int]], seed: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Every line with a batch and head, in turn, until all of both have been taken; and the last
    line with the last of them."""
    for number in range(max(len(lines), len(heads))):
        yield int(lines[number % len(lines)]), heads[(number + seed) % len(heads)]
    yield int(lines[-1]), heads[-1]


def _spread_subset(lines: IntArray) -> IntArray:
    """At most ``MAX_LINES`` of the lines, evenly spread."""
    indices = np.linspace(0, len(lines) - 1, min(MAX_LINES, len(lines))).astype(int)
    subset: IntArray = lines[np.unique(indices)]
    return subset


class _ReferenceLines:
    """Rows and columns of the results for a selection, in float64."""

    def __init__(self, work: Attention, inputs: Tensors, selection: SelectionResult) -> None:
        self._problem, self._inputs, self._selection = work.problem, inputs, selection

    def row(self, b: int, h: int, line: int) -> Tensors:
        """out, dq ``[D]`` and the lse of each branch of one query of a head."""
        import torch

        x, g = self._inputs, h // self._problem.group
        scale = self._problem.softmax_scale
        total: Tensors = {}
        lses = []
        for branch in self._selection.branches:
            window = window_at(branch.pool_q, line, x["q"].shape[1])
            visible = visible_columns(branch, b, h, line // branch.pool_q.stride, x["q"].device)
            q_D = x["q"][b, window, h].double().mean(0)
            k_nD, v_nD = (window_means(x[name][b, :, g], branch.pool_k, visible) for name in "kv")
            scores = (k_nD @ q_D) * scale
            lse = torch.logsumexp(scores, 0)
            probs = torch.exp(scores - lse)
            partial = {"out": (probs @ v_nD) * branch.gate}
            lses.append(lse)
            if "dout" in x:
                dout_D = x["dout"][b, window, h].double().sum(0) * branch.gate
                delta = dout_D @ (probs @ v_nD)
                dq_D = (probs * (v_nD @ dout_D - delta) * scale) @ k_nD
                partial["dq"] = dq_D / (window.stop - window.start)
            for name, value in partial.items():
                total[name] = total[name] + value if name in total else value
        return total | {"lse": torch.stack(lses)}

    def column(self, b: int, g: int, line: int) -> Tensors:
        """dk and dv ``[D]`` of one key."""
        import torch

        x = self._inputs
        scale, tokens = self._problem.softmax_scale, x["k"].shape[1]
        dk_D, dv_D = (torch.zeros_like(x["k"][b, line, g], dtype=torch.float64) for _ in "kv")
        selected = zip(self._selection.prepared, self._selection.results, strict=True)
        for prepared, result in selected:
            branch = prepared.branch
            for number in windows_with(branch.pool_k, line, tokens):
                index = torch.tensor([number], device=x["k"].device)
                k_D, v_D = (
                    window_means(x[name][b, :, g], branch.pool_k, index)[0] for name in "kv"
                )
                window = window_at(branch.pool_k, number * branch.pool_k.stride, tokens)
                share = 1 / (window.stop - window.start)
                heads = range(g * self._problem.group, (g + 1) * self._problem.group)
                for h, rows in rows_in_chunks(
                    branch, self._problem, b, heads, number, index.device
                ):
                    # The operator's own out and lse, which the rows check.
                    batch, head = (0, b * self._problem.heads_q + h) if prepared.folded else (b, h)
                    assert result.lse is not None
                    lse_n = result.lse[batch, head][rows].double()
                    out_nD = result.out[batch, rows, head].double()
                    q_nD = window_means(x["q"][b, :, h], branch.pool_q, rows)
                    dout_nD = window_sums(x["dout"][b, :, h], branch.pool_q, rows) * branch.gate
                    probs = torch.exp((q_nD @ k_D) * scale - lse_n)
                    delta = (dout_nD * out_nD).sum(-1)
                    dv_D += share * (probs @ dout_nD)
                    dk_D += share * ((probs * (dout_nD @ v_D - delta) * scale) @ q_nD)
        return {"dk": dk_D, "dv": dv_D}
