"""Operators that choose what to attend to from queries and keys, and a kernel for what they chose.

A selector looks at q and k and returns :class:`Branch` es: softmaxes over some of the keys, or over
means of neighbouring ones, whose outputs are added up.  Most return one.  It never imports a
kernel: it is given one by name, so any selector runs on any kernel that takes selections of its
kind.  The choice is made once, in the forward pass; the backward pass reuses it, and no gradient
flows through it.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; X blocks of
queries, Y blocks of keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.operator import declared_refusal
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.pooling import NO_POOL, Pool
from cpbench.selectors.common.selection import SELECTIONS, Blocks, Grid, Selection, grid

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Operator
    from cpbench.core.problem import Problem

# The kernel of each kind of branch, where the user names none.
KERNELS = {
    "cpu": {
        "blocks": "gathered",
        "lines": "bands",
        "rows": "gathered",
        "tokens": "gathered",
        "mask": "bands",
    },
    "cuda": {
        "blocks": "triton_block_sparse",
        "lines": "triton_block_sparse",
        "rows": "gathered",
        "tokens": "gathered",
        "mask": "triton_band",
    },
}


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One softmax of a sparse attention.

    Attributes:
        seen: what its queries see, in its own queries and keys.
        gate: what its output is multiplied by before the branches are added up.
        pool_q, pool_k: of which means of tokens its queries, and its keys and values, are.
    """

    seen: AttnMask | Selection
    gate: float = 1.0
    pool_q: Pool = NO_POOL
    pool_k: Pool = NO_POOL

    @property
    def form(self) -> str:
        """``"mask"``, or the kind of its selection."""
        return "mask" if isinstance(self.seen, AttnMask) else self.seen.kind


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known before the inputs are.

    Attributes:
        mask: within which all is chosen.
        problem: of the whole.
        device: where.
        kernels: by form, the name and the implementation.
        grids: the mask in blocks, as far as it was asked for; see :meth:`cells`.
    """

    mask: AttnMask
    problem: Problem
    device: str
    kernels: dict[str, tuple[OperatorInfo, Operator]] = field(repr=False)
    grids: dict[tuple[int, int], Grid] = field(default_factory=dict, repr=False)

    def cells(self, block_q: int, block_k: int) -> Grid:
        """The mask in blocks, made once and held with the plan."""
        if (block_q, block_k) not in self.grids:
            self.grids[block_q, block_k] = grid(self.mask, block_q, block_k, self.device)
        return self.grids[block_q, block_k]


class Arranged(NamedTuple):
    """A branch and its kernel's plan; ``folded`` where batches became heads."""

    branch: Branch
    kernel: Operator
    plan: Any
    folded: bool


class Result(NamedTuple):
    """What a branch's kernel was given and returned."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None


class Choice(NamedTuple):
    """What one forward pass chose and computed."""

    arranged: tuple[Arranged, ...]
    results: tuple[Result, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(one.branch for one in self.arranged)


class Selecting(ABC):
    """The operator around a selector; see ``cpbench.core.operator.Operator`` for its four methods.

    Args:
        kernel: name of the operator that computes what was chosen, instead of the usual one.
    """

    name: str
    forms: tuple[str, ...] = ("blocks",)

    def __init__(self, kernel: str = "") -> None:
        self._kernel = str(kernel)
        self._choices: Any = None  # by output, weakly; made where torch is there anyway
        self.remember = False  # also choices that no backward pass will want

    @abstractmethod
    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        """What to attend to, on the device of q and k, without gradients."""

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        for form in self.forms:
            try:
                info, kernel = self._kernel_of(form, device)
            except ValueError as error:
                return str(error)
            reason = declared_refusal(info, problem, device.partition(":")[0])
            if reason is None and form in SELECTIONS and not _takes(info, form):
                takes = ", ".join(info.masks)
                reason = f"{info.name} takes {takes} masks; {self.name} chooses {form}"
            reason = reason or kernel.unsupported(problem, mask, device)
            if reason is not None:
                return f"{self.name} computes with {info.name}, and {reason}"
        return None

    def _kernel_of(self, form: str, device: str) -> tuple[OperatorInfo, Operator]:
        usual = KERNELS[device.partition(":")[0]][form]
        info = operator_info(self._kernel or usual)
        if form == "mask" and not {"full", "causal", "bands"} <= set(info.masks):
            info = operator_info(usual)  # what is asked for takes the selection alone
        if info.selects:
            raise ValueError(f"{self.name}: kernel = {info.name!r} is itself a selector")
        return info, implementation(info, {})

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        kernels = {form: self._kernel_of(form, device) for form in self.forms}
        return Plan(mask, problem, device, kernels)

    # --- one forward pass, in its parts -------------------------------------------------------

    def arrange(self, branches: tuple[Branch, ...], plan: Plan) -> tuple[Arranged, ...]:
        """The kernels' plans for what was chosen."""
        return tuple(self._arranged(branch, plan) for branch in branches)

    def _arranged(self, branch: Branch, plan: Plan) -> Arranged:
        info, kernel = plan.kernels[branch.form]
        seen: Any = branch.seen
        problem = replace(
            plan.problem,
            seq_q=seen.seq_q,
            seq_k=seen.seq_k,
            scale=plan.problem.softmax_scale,
        )
        folded = isinstance(seen, Blocks) and branch.form not in info.masks
        if folded:
            seen = seen.to_heads()
            problem = replace(
                problem,
                batch=1,
                heads_q=problem.batch * problem.heads_q,
                heads_kv=problem.batch * problem.heads_kv,
            )
        return Arranged(branch, kernel, kernel.prepare(seen, problem, plan.device), folded)

    def compute(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arranged: tuple[Arranged, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Result, ...]]:
        """out, lse where there is one softmax, and the result of each branch."""
        results = tuple(_attend(q, k, v, one) for one in arranged)
        if len(results) == 1 and _plain(arranged[0].branch):
            out, lse = results[0].out, results[0].lse
            if arranged[0].folded and len(q) > 1:
                return _unfold(out, len(q)), None if lse is None else _heads(lse, len(q)), results
            return out, lse, results
        total = None
        for one, result in zip(arranged, results, strict=True):
            part = _unfold(result.out, len(q)) if one.folded else result.out
            part = one.branch.pool_q.spread(part.float(), q.shape[1]).mul(one.branch.gate)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(q.dtype), None, results

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        arranged = self.arrange(self.select(q, k, plan), plan)
        found, lse, results = self.compute(q, k, v, arranged)
        out = found.view_as(found)  # not what a result holds: else it would keep its own key alive
        if self.remember or plan.problem.backward:
            if self._choices is None:
                from torch.utils.weak import WeakTensorKeyDictionary

                self._choices = WeakTensorKeyDictionary()
            self._choices[out] = Choice(arranged, results)
        return out, lse

    def choice(self, out: torch.Tensor) -> Choice:
        """What was chosen for an output of :meth:`forward`, which must still be the same tensor.

        Raises:
            ValueError: for any other tensor.
        """
        if self._choices is None or out not in self._choices:
            raise ValueError(f"{self.name} needs the output that its own forward returned")
        found: Choice = self._choices[out]
        return found

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        plan: Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        arranged, results = self.choice(out)
        total: list[torch.Tensor] = []
        for one, result in zip(arranged, results, strict=True):
            branch = one.branch
            mine = dout
            if branch.gate != 1.0:
                mine = mine * branch.gate
            mine = branch.pool_q.gathered(mine)
            if one.folded:
                mine = _fold(mine)
            given = (mine, *result[:3], result.out, result.lse, one.plan)
            grads = list(one.kernel.backward(*given))
            if one.folded:
                grads = [_unfold(x, len(q)) for x in grads]
            if len(arranged) == 1 and _plain(branch):
                return grads[0], grads[1], grads[2]
            pools = (branch.pool_q, branch.pool_k, branch.pool_k)
            parts = [
                pool.backward(x.float(), like.shape[1])
                for pool, x, like in zip(pools, grads, (q, k, v), strict=True)
            ]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        dq, dk, dv = (x.to(like.dtype) for x, like in zip(total, (q, k, v), strict=True))
        return dq, dk, dv


def _takes(info: OperatorInfo, form: str) -> bool:
    return form in info.masks or (form in ("blocks", "lines") and "heads" in info.masks)


def _plain(branch: Branch) -> bool:
    return branch.gate == 1.0 and branch.pool_q == branch.pool_k == NO_POOL


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, one: Arranged) -> Result:
    branch = one.branch
    q, k, v = branch.pool_q.mean(q), branch.pool_k.mean(k), branch.pool_k.mean(v)
    if one.folded:
        q, k, v = (_fold(x) for x in (q, k, v))
    return Result(q, k, v, *one.kernel.forward(q, k, v, one.plan))


def _fold(x_BSHD: torch.Tensor) -> torch.Tensor:
    """``[1, S, B * H, D]``."""
    if len(x_BSHD) == 1:
        return x_BSHD
    return x_BSHD.transpose(0, 1).flatten(1, 2)[None]


def _unfold(x: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B, S, H, D]``."""
    return x if len(x) == batch else x[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _heads(lse: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B, H, S]`` from ``[1, B * H, S]``."""
    heads: torch.Tensor = lse[0].unflatten(0, (batch, -1))
    return heads
