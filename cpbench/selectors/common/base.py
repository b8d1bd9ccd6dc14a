"""Selectors: operators that select what to attend to from q and k, and compute it with a kernel.

A selector returns one or more :class:`Branch` es: softmaxes over a selection of the keys, or over
means of adjacent keys, whose outputs are summed, or joined by their lse into one softmax.  It never
imports a kernel: the kernel is given by name, so a selector runs on any kernel that takes its kinds
of selections.  The selection is made in the forward pass; the backward pass reuses it, and no
gradient flows through it.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; X blocks of
queries, Y blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.operator import QKV, BackwardInputs, declared_refusal, is_deterministic
from cpbench.core.output_state import OutputStates
from cpbench.core.registry import OperatorInfo, implementation, operator_info
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.folding import fold_batch, unfold_batch, unfold_lse
from cpbench.selectors.common.joining import KeyPool, join, join_backward
from cpbench.selectors.common.pooling import NO_POOL, Pool
from cpbench.selectors.selections import BY_HEAD, SELECTIONS, Grid, Selection, block_grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from cpbench.core.operator import Gradients, Operator, OutLse
    from cpbench.core.problem import Problem
    from cpbench.selectors.common.rotating import Turn

# Default kernel of each kind of branch, by device type.
DEFAULT_KERNELS = {
    "cpu": {
        "blocks": "gathered",
        "landmarks": "gathered",
        "lines": "gathered",
        "rows": "gathered",
        "tokens": "gathered",
        "mask": "bands",
    },
    "cuda": {
        "blocks": "triton_block_sparse",
        "landmarks": "gathered",
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
        mask: static mask or selection, in queries and keys of the branch (pooled ones, if any).
        gate: factor of its output in the sum over branches.
        pool_q, pool_k: mean pooling of its queries, and of its keys and values.
        derived: what derives its keys and values from the inputs, in place of ``pool_k``; of
            branches that are joined by their lse, as ``key_weight``.
        key_weight: tokens that each of its keys counts for.
        turn_q, turn_k: RoPE of its queries and of its keys, before they are pooled (see
            ``rotating``); of branches that are joined, without ``derived``.
    """

    mask: AttnMask | Selection
    gate: float = 1.0
    pool_q: Pool = NO_POOL
    pool_k: Pool = NO_POOL
    derived: KeyPool | None = None
    key_weight: int = 1
    turn_q: Turn | None = None
    turn_k: Turn | None = None

    def turned(self, qkv: QKV) -> QKV:
        """The inputs with RoPE."""
        q = qkv.q if self.turn_q is None else self.turn_q.apply(qkv.q)
        return QKV(q, qkv.k if self.turn_k is None else self.turn_k.apply(qkv.k), qkv.v)

    @property
    def kind(self) -> str:
        """``"mask"`` for a static mask, else the kind of its selection."""
        return "mask" if isinstance(self.mask, AttnMask) else self.mask.kind


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of a selector, independent of the inputs.

    Attributes:
        mask: the mask that selections are subsets of: of these queries, and all keys.
        positions: ``[S]``: position of each query among the keys, ascending.
        problem: the problem.
        device: such as ``"cuda:0"``.
        kernels: declaration and implementation of the kernel for each kind of branch.
        grids: cache of :meth:`grid`, by block sizes.
    """

    mask: AttnMask
    positions: IntArray
    problem: Problem
    device: str
    kernels: dict[str, tuple[OperatorInfo, Operator]] = field(repr=False)
    grids: dict[tuple[int, int], Grid] = field(default_factory=dict, repr=False)

    def grid(self, block_q: int, block_k: int) -> Grid:
        """The mask divided into blocks; computed once per plan."""
        if (block_q, block_k) not in self.grids:
            self.grids[block_q, block_k] = block_grid(
                self.mask, block_q, block_k, self.device, self.positions[::block_q]
            )
        return self.grids[block_q, block_k]

    def of_queries(self, mask: AttnMask) -> AttnMask:
        """Of a mask of all tokens (or of pooled ones), the rows of these queries."""
        return rows_of(mask, self.positions)


def rows_of(mask: AttnMask, rows: IntArray) -> AttnMask:
    """The mask of some of its queries, in ascending order."""
    if len(rows) == mask.seq_q:
        return mask
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    runs = np.column_stack([rows[first], np.diff(np.append(first, len(rows)))])
    return mask.restrict(runs, np.array([[0, mask.seq_k]])).simplify()


class PreparedBranch(NamedTuple):
    """A branch, its kernel and the kernel's plan; ``folded``: batches are folded into heads."""

    branch: Branch
    kernel: Operator
    plan: Any
    folded: bool


class BranchResult(NamedTuple):
    """Inputs and outputs of the kernel of a branch."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None


class SelectionResult(NamedTuple):
    """Selection of a forward pass, and results of its branches; ``joined`` as of the selector."""

    prepared: tuple[PreparedBranch, ...]
    results: tuple[BranchResult, ...]
    joined: bool = False

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(prepared.branch for prepared in self.prepared)


class Selector:
    """Base class of selectors; see ``cpbench.core.operator.Operator`` for its four methods.

    Subclasses define ``name``, :meth:`select` (or :meth:`select_from`) and ``branch_kinds``, the
    kinds of the branches that it returns.

    Args:
        kernel: name of the operator that computes the branches; a default by kind if empty.

    Attributes:
        joined: whether its branches are joined by their lse into one softmax, not summed.
        query_block: adjacent queries of the sequence that have one selection.
        keep_selection: keep selections for :meth:`selection_of` even without a backward pass.
    """

    name: str
    query_block: int = 1
    branch_kinds: tuple[str, ...] = ("blocks",)
    joined = False

    def __init__(self, kernel: str = "") -> None:
        self._kernel_name = str(kernel)
        self.states = OutputStates(self.name)  # a SelectionResult each
        self.keep_selection = False

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        """Select the branches to attend to, on the device of q and k, without gradients."""
        raise NotImplementedError

    def select_from(self, qkv: QKV, plan: Plan) -> tuple[Branch, ...]:
        """As :meth:`select`, which a subclass defines unless its selection depends on the values;
        then it defines this one."""
        return self.select(qkv.q, qkv.k, plan)

    def index_figures(
        self, q: torch.Tensor, k: torch.Tensor, spans: Sequence[tuple[int, int]]
    ) -> dict[str, float]:
        """Figures of the index that it searches, if it has one, see ``cpbench.verify.quality``.

        Args:
            spans: ranges of queries of which to measure the recall.
        """
        return {}

    def as_full(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k as they are in the full attention that it approximates."""
        return q, k

    def misfit(self, problem: Problem) -> str | None:
        """Why the files that it was given do not fit a problem, without torch; None if they do."""
        return None

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if reason := self.misfit(problem):
            return reason
        for kind in self.branch_kinds:
            try:
                info, kernel = self._kernel_for(kind, device)
            except ValueError as error:
                return str(error)
            reason = declared_refusal(info, problem, device.partition(":")[0])
            if reason is None and kind in SELECTIONS and not _supports_kind(info, kind):
                supported = ", ".join(info.masks)
                reason = f"{info.name} takes {supported} masks; {self.name} selects {kind}"
            if reason is None and self.joined:
                reason = _joining_refusal(info, device.partition(":")[0])
            reason = reason or kernel.unsupported(problem, mask, device)
            if reason is not None:
                return f"{self.name} computes with {info.name}, and {reason}"
        return None

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``: as the kernels of its branches."""
        kernels = (self._kernel_for(kind, device) for kind in self.branch_kinds)
        return all(is_deterministic(*kernel, problem, device) for kernel in kernels)

    def _kernel_for(self, kind: str, device: str) -> tuple[OperatorInfo, Operator]:
        default = DEFAULT_KERNELS[device.partition(":")[0]][kind]
        info = operator_info(self._kernel_name or default)
        if kind == "mask" and not {"full", "causal", "bands"} <= set(info.masks):
            info = operator_info(default)  # the requested kernel takes selections only
        if info.selects:
            raise ValueError(f"{self.name}: kernel = {info.name!r} is itself a selector")
        return info, implementation(info, {})

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        return self.prepare_rows(mask, np.arange(mask.seq_q), problem, device)

    def prepare_rows(self, mask: AttnMask, rows: IntArray, problem: Problem, device: str) -> Plan:
        """As :meth:`prepare`, for some of the queries of a mask, ascending and in whole blocks of
        ``query_block``; ``problem`` is that of these queries."""
        kernels = {kind: self._kernel_for(kind, device) for kind in self.branch_kinds}
        positions = rows + (mask.seq_k - mask.seq_q)
        return Plan(rows_of(mask, rows), positions, problem, device, kernels)

    # --- the steps of a forward pass: select, prepare_branches, compute -----------------------

    def prepare_branches(
        self, branches: tuple[Branch, ...], plan: Plan
    ) -> tuple[PreparedBranch, ...]:
        """Prepare the kernel of each branch for its selection."""
        return tuple(self._prepare_branch(branch, plan) for branch in branches)

    def _prepare_branch(self, branch: Branch, plan: Plan) -> PreparedBranch:
        info, kernel = plan.kernels[branch.kind]
        mask: Any = branch.mask
        problem = replace(
            plan.problem,
            seq_q=mask.seq_q,
            seq_k=mask.seq_k,
            scale=plan.problem.softmax_scale,
        )
        if branch.derived is not None:
            heads = branch.derived.num_heads(problem.heads_q, problem.heads_kv)
            problem = replace(problem, heads_kv=heads)
        folded = branch.kind in BY_HEAD and branch.kind not in info.masks
        if folded:
            mask = mask.to_heads()
            problem = replace(
                problem,
                batch=1,
                heads_q=problem.batch * problem.heads_q,
                heads_kv=problem.batch * problem.heads_kv,
            )
        return PreparedBranch(branch, kernel, kernel.prepare(mask, problem, plan.device), folded)

    def compute(
        self, qkv: QKV, prepared: tuple[PreparedBranch, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[BranchResult, ...]]:
        """Return out, lse (None unless there is a single softmax), and the result of each
        branch."""
        q = qkv.q
        results = tuple(_run_branch(qkv, branch) for branch in prepared)
        if self.joined:
            return *join(qkv, prepared, results), results
        if len(results) == 1 and _is_plain(prepared[0].branch):
            out, lse = results[0].out, results[0].lse
            if prepared[0].folded and len(q) > 1:
                lse = None if lse is None else unfold_lse(lse, len(q))
                return unfold_batch(out, len(q)), lse, results
            return out, lse, results
        total = None
        for (branch, _, _, folded), result in zip(prepared, results, strict=True):
            out = unfold_batch(result.out, len(q)) if folded else result.out
            out = branch.pool_q.unpool(out.float(), q.shape[1]).mul(branch.gate)
            total = out if total is None else total.add_(out)
        assert total is not None
        return total.to(q.dtype), None, results

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        return self.attend_to(qkv, self.select_from(qkv, plan), plan)

    def attend_to(self, qkv: QKV, branches: tuple[Branch, ...], plan: Plan) -> OutLse:
        """The forward pass after the selection."""
        prepared = self.prepare_branches(branches, plan)
        computed, lse, results = self.compute(qkv, prepared)
        # A new tensor: as a key of the weak table it must not be one that the results refer to.
        out = computed.view_as(computed)
        if self.keep_selection or plan.problem.backward:
            self.states.put(out, SelectionResult(prepared, results, self.joined))
        return out, lse

    def selection_of(self, out: torch.Tensor) -> SelectionResult:
        """The selection behind an output of :meth:`forward`, which must be the same tensor object.

        Raises:
            ValueError: for any other tensor.
        """
        selection: SelectionResult = self.states.get(out)
        return selection

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        dout, q, k, v, out, _ = x
        prepared, results, _ = self.selection_of(out)
        if self.joined:
            return _in_dtypes_of(x.qkv, join_backward(x, prepared, results))
        total: list[torch.Tensor] = []
        for (branch, kernel, kernel_plan, folded), result in zip(prepared, results, strict=True):
            branch_dout = dout if branch.gate == 1.0 else dout * branch.gate
            branch_dout = branch.pool_q.unpool_backward(branch_dout)
            if folded:
                branch_dout = fold_batch(branch_dout)
            inputs = BackwardInputs(branch_dout, *result)  # type: ignore[arg-type]
            grads = list(kernel.backward(inputs, kernel_plan))
            if folded:
                grads = [unfold_batch(grad, len(q)) for grad in grads]
            if len(prepared) == 1 and _is_plain(branch):
                return grads[0], grads[1], grads[2]
            pools = (branch.pool_q, branch.pool_k, branch.pool_k)
            grads = [
                pool.mean_backward(grad.float(), tensor.shape[1])
                for pool, grad, tensor in zip(pools, grads, (q, k, v), strict=True)
            ]
            total = grads if not total else [a + b for a, b in zip(total, grads, strict=True)]
        return _in_dtypes_of(x.qkv, total)


def _supports_kind(info: OperatorInfo, kind: str) -> bool:
    return kind in info.masks or (kind in BY_HEAD and "heads" in info.masks)


def _joining_refusal(info: OperatorInfo, device: str) -> str | None:
    """Return why a kernel cannot compute branches that are joined by their lse."""
    if device not in info.lse_on or not info.mergeable:
        return f"{info.name} returns no lse by which branches are joined"
    if not info.external_lse:
        return f"the backward pass of {info.name} takes no lse of several branches"
    return None


def _in_dtypes_of(qkv: QKV, grads: list[torch.Tensor]) -> Gradients:
    """dq, dk and dv in the dtypes of the inputs."""
    dq, dk, dv = (grad.to(tensor.dtype) for grad, tensor in zip(grads, qkv, strict=True))
    return dq, dk, dv


def _is_plain(branch: Branch) -> bool:
    """Whether a branch has neither gate nor pooling."""
    return branch.gate == 1.0 and branch.pool_q == branch.pool_k == NO_POOL


def _run_branch(qkv: QKV, prepared: PreparedBranch) -> BranchResult:
    branch = prepared.branch
    qkv = branch.turned(qkv)
    if branch.derived is not None:
        inputs = QKV(qkv.q, *branch.derived.derive(qkv))
    else:
        pools = (branch.pool_q, branch.pool_k, branch.pool_k)
        inputs = QKV(*(pool.mean(x) for pool, x in zip(pools, qkv, strict=True)))
    if prepared.folded:
        inputs = QKV(*map(fold_batch, inputs))
    return BranchResult(*inputs, *prepared.kernel.forward(inputs, prepared.plan))
