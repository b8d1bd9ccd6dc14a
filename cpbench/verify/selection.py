"""The checks of operators that choose what to attend to: is what they computed right, given what
they chose?

Both checks take the choice from the operator itself; whether it is the right one is what the tests
of selectors ask, and what it is worth ``cpbench.verify.quality`` tells.  Means of keys (or queries)
are made anew in float64.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.selectors.common.base import Branch, Choice, Selecting
from cpbench.selectors.common.pooling import Pool
from cpbench.verify.at_size import keys_seen, sampled_lines
from cpbench.verify.check import Errors, Rank, Tensors, TensorSums, combine, run

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention


def run_and_tell(work: Attention, inputs: Tensors) -> tuple[Tensors, Choice]:
    """One pass as :func:`check.run`, and what was chosen in it."""
    selector = work.op.impl
    assert isinstance(selector, Selecting)
    selector.remember = True
    found = run(work, inputs, None)
    selector.remember = False
    return found, selector.choice(found["out"])


def small(work: Attention, inputs: Tensors, rank: Rank) -> Errors:
    """Errors of every output and gradient of a small problem."""
    found, choice = run_and_tell(work, inputs)
    want = reference(choice.branches, inputs, work.problem.softmax_scale)
    sums = {}
    for name, value in found.items():
        heads_first = value if name == "lse" else value.transpose(1, 2)
        groups = heads_first.shape[0] * heads_first.shape[1]
        sums[name] = TensorSums.of(heads_first, want[name], groups)
    return combine(rank.gather(sums))


def reference(branches: tuple[Branch, ...], x: Tensors, scale: float) -> Tensors:
    """float64 out, gradients where there is a dout, and lse where there is one softmax, ``[B,
    heads, S, …]``."""
    from cpbench.kernels.reference import backward64, forward64

    tokens = {name: x[name].shape[1] for name in ("q", "k", "v")}
    total: Tensors = {}
    lse = None
    for branch in branches:
        pools = {"q": branch.pool_q, "k": branch.pool_k, "v": branch.pool_k}
        q, k, v = (pools[name].mean(x[name].double()) for name in ("q", "k", "v"))
        out, lse = forward64(q, k, v, branch.seen, scale)
        parts = {"out": branch.pool_q.spread(out, tokens["q"]) * branch.gate}
        if "dout" in x:
            dout = branch.pool_q.gathered(x["dout"].double()) * branch.gate
            grads = backward64(dout, q, k, v, out, lse, branch.seen, scale)
            for name, grad in zip(("q", "k", "v"), grads, strict=True):
                parts[f"d{name}"] = pools[name].backward(grad, tokens[name])
        for name, part in parts.items():
            total[name] = total[name] + part if name in total else part
    found = {name: value.transpose(1, 2) for name, value in total.items()}
    if len(branches) == 1 and lse is not None:
        found["lse"] = lse
    return found


LINES = 48  # sampled rows, and columns


def sampled(
    work: Attention, inputs: Tensors, found: Tensors, choice: Choice, seed: int, rank: Rank
) -> Errors:
    """Errors of sampled rows and columns at the measured size, each in another head in turn; of a
    kernel that returns no lse, of rows alone."""
    import torch

    problem, mask = work.problem, work.mask
    source = _Source(work, inputs, choice)
    pairs = [(b, h) for b in range(problem.batch) for h in range(problem.heads_q)]
    got: dict[str, list[torch.Tensor]] = {}
    want: dict[str, list[torch.Tensor]] = {}

    def hold(name: str, mine: torch.Tensor, right: torch.Tensor) -> None:
        got.setdefault(name, []).append(mine.flatten())
        want.setdefault(name, []).append(right.flatten())

    for turn, line in enumerate(_some(sampled_lines(mask, np.arange(mask.seq_q), seed))):
        b, h = pairs[(turn + seed) % len(pairs)]
        right = source.row(b, h, int(line))
        for name in right:
            value = found[name][b, h, line] if name == "lse" else found[name][b, line, h]
            hold(name, value, right[name])
    if "dk" in found and all(result.lse is not None for result in choice.results):
        turned = sampled_lines(mask.transpose(), np.arange(mask.seq_k), seed)
        for turn, line in enumerate(_some(turned)):
            b, h = pairs[(turn + seed) % len(pairs)]
            g = h // problem.group
            for name, right_D in source.column(b, g, int(line)).items():
                hold(name, found[name][b, line, g], right_D)
    sums = {name: TensorSums.of(torch.cat(got[name]), torch.cat(want[name])) for name in got}
    return combine(rank.gather(sums))


def _some(lines: IntArray) -> IntArray:
    places = np.linspace(0, len(lines) - 1, min(LINES, len(lines))).astype(int)
    few: IntArray = lines[np.unique(places)]
    return few


class _Source:
    """Rows and columns of what a choice stands for, in float64."""

    def __init__(self, work: Attention, inputs: Tensors, choice: Choice) -> None:
        self._problem, self._inputs, self._choice = work.problem, inputs, choice
        self._lse = choice.results[0].lse is not None and len(choice.branches) == 1

    def row(self, b: int, h: int, line: int) -> Tensors:
        """out, dq ``[D]`` and lse of one query of a head."""
        import torch

        x, g = self._inputs, h // self._problem.group
        scale = self._problem.softmax_scale
        found: Tensors = {}
        for branch in self._choice.branches:
            of_row = _window(branch.pool_q, line, x["q"].shape[1])
            seen = _keys(branch, b, h, line // branch.pool_q.stride, x["q"].device)
            q_D = x["q"][b, of_row, h].double().mean(0)
            k_nD, v_nD = (_means(x[name][b, :, g], branch.pool_k, seen) for name in "kv")
            scores = (k_nD @ q_D) * scale
            lse = torch.logsumexp(scores, 0)
            probs = torch.exp(scores - lse)
            parts = {"out": (probs @ v_nD) * branch.gate}
            if self._lse:
                found["lse"] = lse
            if "dout" in x:
                dout_D = x["dout"][b, of_row, h].double().sum(0) * branch.gate
                delta = dout_D @ (probs @ v_nD)
                dq_D = (probs * (v_nD @ dout_D - delta) * scale) @ k_nD
                parts["dq"] = dq_D / (of_row.stop - of_row.start)
            for name, part in parts.items():
                found[name] = found[name] + part if name in found else part
        return found

    def column(self, b: int, g: int, line: int) -> Tensors:
        """dk and dv ``[D]`` of one key."""
        import torch

        x, group = self._inputs, self._problem.group
        scale, tokens = self._problem.softmax_scale, x["k"].shape[1]
        dk_D, dv_D = (torch.zeros_like(x["k"][b, line, g], dtype=torch.float64) for _ in "kv")
        for one, result in zip(self._choice.arranged, self._choice.results, strict=True):
            branch = one.branch
            for window in _windows_of(branch.pool_k, line, tokens):
                at = torch.tensor([window], device=x["k"].device)
                k_D, v_D = (_means(x[name][b, :, g], branch.pool_k, at)[0] for name in "kv")
                place = _window(branch.pool_k, window * branch.pool_k.stride, tokens)
                share = 1 / (place.stop - place.start)
                for h in range(g * group, (g + 1) * group):
                    rows = _queries(branch, b, h, window, x["q"].device)
                    # The operator's own out and lse, which the rows check.
                    at_head = (0, b * self._problem.heads_q + h) if one.folded else (b, h)
                    assert result.lse is not None
                    lse_n = result.lse[at_head][rows].double()
                    out_nD = result.out[at_head[0], rows, at_head[1]].double()
                    q_nD = _means(x["q"][b, :, h], branch.pool_q, rows)
                    dout_nD = _sums(x["dout"][b, :, h], branch.pool_q, rows) * branch.gate
                    probs = torch.exp((q_nD @ k_D) * scale - lse_n)
                    delta = (dout_nD * out_nD).sum(-1)
                    dv_D += share * (probs @ dout_nD)
                    dk_D += share * ((probs * (dout_nD @ v_D - delta) * scale) @ q_nD)
        return {"dk": dk_D, "dv": dv_D}


def _window(pool: Pool, token: int, tokens: int) -> slice:
    """The tokens of the window that begins in the stride of a token."""
    begin = token // pool.stride * pool.stride
    return slice(begin, min(begin + pool.size, tokens))


def _windows_of(pool: Pool, token: int, tokens: int) -> range:
    """The windows that hold a token."""
    last = token // pool.stride
    first = max(last - pool.size // pool.stride + 1, 0)
    return range(first, min(last + 1, pool.count(tokens)))


def _sums(x_TD: torch.Tensor, pool: Pool, windows: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` float64 sums over windows."""
    import torch

    tokens = len(x_TD)
    if pool.size == 1:
        return x_TD[windows].double()
    place = windows[:, None] * pool.stride + torch.arange(pool.size, device=windows.device)
    there = place < tokens
    return (x_TD[place.clamp(max=tokens - 1)].double() * there[..., None]).sum(1)


def _means(x_TD: torch.Tensor, pool: Pool, windows: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` float64."""
    lengths = (len(x_TD) - windows * pool.stride).clamp(max=pool.size)
    return _sums(x_TD, pool, windows) / lengths[:, None]


def _keys(branch: Branch, b: int, h: int, row: int, device: torch.device) -> torch.Tensor:
    """What a row of a branch sees: keys, or windows of them."""
    import torch

    if isinstance(branch.seen, AttnMask):
        return torch.as_tensor(keys_seen(branch.seen, row), device=device)
    return branch.seen.seen(b, h, row)


def _queries(branch: Branch, b: int, h: int, column: int, device: torch.device) -> torch.Tensor:
    """The rows of a branch that see a column of it."""
    import torch

    if isinstance(branch.seen, AttnMask):
        return torch.as_tensor(keys_seen(branch.seen.transpose(), column), device=device)
    return branch.seen.seers(b, h, column)
