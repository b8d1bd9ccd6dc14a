"""Operator `gathered`: attention to the selections of selectors, in plain torch on any device.

Blocks of keys per query (kinds ``"rows"`` and ``"landmarks"``) are in
``cpbench.kernels.gathered.rows``, single keys per query (``"tokens"``) in ``.tokens``, blocks of
keys per block of queries (``"blocks"``) in ``.blocks``; columns and diagonals (``"lines"``), and on
CPUs blocks for which that is faster, are calls of torch's fused kernel (``.tree``).

Legend: S queries, T keys, R query heads of a key/value head, D head dim; N = R * S rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.gathered import blocks, calls, rows, tokens, tree
from cpbench.selectors.selections import Lines, Selection, Tokens

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="gathered",
        summary="for selectors: gathers the selected blocks or single keys",
        source="MoBA, arXiv 2502.13189, as gathered rows; top-k gather as in DeepSeek sparse "
        "attention",
        load="cpbench.kernels.gathered.operator:Gathered",
        masks=("blocks", "landmarks", "lines", "rows", "tokens"),
        dtypes=("float64", "float32", "bfloat16", "float16"),
    ),
)


@dataclass(frozen=True, eq=False)
class TokensPlan:
    """The listed keys, and the factor of the scores."""

    scale: float
    tokens: Tokens


Plan = blocks.Plan | calls.Plan | rows.Plan | TokensPlan


class Gathered:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        if problem.deterministic and not self.is_deterministic(problem, device):
            return "gathered sums gradients of keys in any order on cuda: not deterministic"
        return None

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``."""
        return not (problem.backward and device.startswith("cuda"))

    def prepare(self, mask: Selection, problem: Problem, device: str) -> Plan:
        scale = problem.softmax_scale
        if isinstance(mask, Lines):
            return tree.plan(mask, scale)
        if isinstance(mask, Tokens):
            return TokensPlan(scale, mask)
        if mask.kind == "blocks":
            in_calls = tree.plan_if_faster(mask, scale) if device == "cpu" else None
            return in_calls or blocks.plan(mask, scale)
        return rows.plan(mask, problem.heads_kv, scale)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        if isinstance(plan, blocks.Plan):
            return blocks.forward(qkv, plan)
        if isinstance(plan, calls.Plan):
            return calls.forward(qkv, plan)
        q, k, v = qkv
        work = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        for b, g, heads in _groups(q, k):
            k_TD, v_TD = k[b, :, g].to(work), v[b, :, g].to(work)
            inputs = _to_rows(q[b, :, heads], work), k_TD, v_TD
            if isinstance(plan, TokensPlan):
                index = tokens.head_index(plan.tokens, b, heads)
                out_ND, lse_N = tokens.forward(*inputs, plan.scale, index)
            else:
                out_ND, lse_N = rows.forward(*inputs, plan, b * k.shape[2] + g)
            out[b, :, heads] = _from_rows(out_ND, q.shape[1])
            lse[b, heads] = lse_N.view(-1, q.shape[1]).float()
        return out, lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        if isinstance(plan, blocks.Plan):
            return blocks.backward(x, plan)
        if isinstance(plan, calls.Plan):
            return calls.backward(x, plan)
        dout, q, k, v, out, lse = x
        work = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for b, g, heads in _groups(q, k):
            do_ND, q_ND, out_ND = (_to_rows(x[b, :, heads], work) for x in (dout, q, out))
            k_TD, v_TD = k[b, :, g].to(work), v[b, :, g].to(work)
            delta_N1 = (do_ND * out_ND).sum(-1, True)
            lse_N1 = lse[b, heads].to(work).reshape(-1, 1)
            lse_N1 = lse_N1.masked_fill(lse_N1 == -torch.inf, torch.inf)
            inputs = do_ND, q_ND, k_TD, v_TD, delta_N1, lse_N1
            if isinstance(plan, TokensPlan):
                index = tokens.head_index(plan.tokens, b, heads)
                grads = tokens.backward(*inputs, plan.scale, index)
            else:
                grads = rows.backward(*inputs, plan, b * k.shape[2] + g)
            dq[b, :, heads] = _from_rows(grads[0], q.shape[1])
            dk[b, :, g], dv[b, :, g] = grads[1], grads[2]
        return dq, dk, dv


def _groups(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, int, slice]]:
    """Each batch index and key/value head, with its query heads."""
    group = q.shape[2] // k.shape[2]
    for b in range(len(q)):
        for g in range(k.shape[2]):
            yield b, g, slice(g * group, (g + 1) * group)


def _to_rows(x_SRD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[R * S, D]``, head-major."""
    return x_SRD.to(dtype).transpose(0, 1).reshape(-1, x_SRD.shape[2])


def _from_rows(x_ND: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of :func:`_to_rows`: ``[S, R, D]``."""
    return x_ND.view(-1, tokens, x_ND.shape[1]).transpose(0, 1)
