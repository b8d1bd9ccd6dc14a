"""Computation of a library's attention blocks by the operator under test.  Not a strategy.

A library divides its work into full and causal blocks of its own shapes; the operator's plan for
each shape is made once, before anything runs.  Causal blocks are aligned at their lower right
corner.

Legend: B batch, S queries, T keys, H and G heads, D head dim, N tokens of packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import Problem, local_problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.parallel.bound_operator import BoundOperator


@dataclass(frozen=True)
class PackedDocuments:
    """Packed documents: the queries of each and the keys that they see.

    Attributes:
        queries, keys: cumulative lengths, from 0.
        causal: whether documents are causal; else a query sees all keys of its document.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool

    def documents(self) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of every document."""
        for i in range(len(self.queries) - 1):
            yield slice(*self.queries[i : i + 2]), slice(*self.keys[i : i + 2])

    def mask(self) -> AttnMask:
        """The mask of all documents."""
        rows = []
        for q, k in self.documents():
            hi = k.stop - q.stop if self.causal else k.stop
            rows.append((q.start, q.stop, k.start, k.stop, -q.stop, hi))
        return AttnMask.from_slices(self.queries[-1], self.keys[-1], rows)


@dataclass
class BlockPlans:
    """The operator's plans by block shape.

    Attributes:
        problem: the global problem.
        packed: the documents, for a library that packs them.
    """

    problem: Problem
    packed: PackedDocuments | None = None
    plans: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def plan(
        self, op: BoundOperator, seq_q: int, seq_k: int, causal: bool, heads_q: int, heads_kv: int
    ) -> Any:
        """The plan of one block, cached.

        Raises:
            Unsupported: if the operator does not take such a block.
        """
        key = (seq_q, seq_k, causal, heads_q, heads_kv)
        if key not in self.plans:
            mask = PackedDocuments((0, seq_q), (0, seq_k), causal).mask()
            self.plans[key] = self._prepare(op, mask, heads_q, heads_kv)
        return self.plans[key]

    def plan_packed(self, op: BoundOperator, heads_q: int, heads_kv: int) -> Any:
        """Plan all documents in one call, or, if they are split, every block of them."""
        assert self.packed is not None
        if not splits_documents(op):
            key = ("packed", heads_q, heads_kv)
            if key not in self.plans:
                self.plans[key] = self._prepare(op, self.packed.mask(), heads_q, heads_kv)
            return self.plans[key]
        for q, k in self.packed.documents():
            for _ in self._document_blocks(op, q, k, heads_q, heads_kv):
                pass
        return None

    def forward(self, op: BoundOperator, qkv: QKV, causal: bool) -> OutLse:
        """Compute one block; see :meth:`cpbench.core.operator.Operator.forward`."""
        return op.forward(qkv, self._plan_of(op, qkv, causal))

    def backward(self, op: BoundOperator, x: BackwardInputs, causal: bool) -> Gradients:
        """Compute one block; see :meth:`cpbench.core.operator.Operator.backward`."""
        return op.backward(x, self._plan_of(op, x.qkv, causal))

    def _plan_of(self, op: BoundOperator, qkv: QKV, causal: bool) -> Any:
        q, k, _ = qkv
        return self.plan(op, q.shape[1], k.shape[1], causal, q.shape[2], k.shape[2])

    def forward_packed(self, op: BoundOperator, qkv: QKV) -> OutLse:
        """Compute all documents, ``[1, N, H, D]``; the lse is ``[1, H, N]``."""
        import torch

        assert self.packed is not None
        q, k, v = qkv
        heads = (q.shape[2], k.shape[2])
        if not splits_documents(op):
            return op.forward(qkv, self.plan_packed(op, *heads))
        outs, lses = [], []
        for rows, columns in self.packed.documents():
            accumulator = op.forward_accumulator(q[:, rows])
            for keys, plan in self._document_blocks(op, rows, columns, *heads):
                accumulator.add(k[:, keys], v[:, keys], plan)
            out, lse = accumulator.finish()
            assert lse is not None
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

    def backward_packed(self, op: BoundOperator, x: BackwardInputs) -> Gradients:
        """Compute the gradients of all documents."""
        import torch

        assert self.packed is not None
        dout, q, k, v, out, lse = x
        heads = (q.shape[2], k.shape[2])
        if not splits_documents(op):
            return op.backward(x, self.plan_packed(op, *heads))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows, columns in self.packed.documents():
            accumulator = op.backward_accumulator(
                dout[:, rows], q[:, rows], out[:, rows], lse[:, :, rows].contiguous()
            )
            for keys, plan in self._document_blocks(op, rows, columns, *heads):
                dk[:, keys], dv[:, keys] = accumulator.add(k[:, keys], v[:, keys], plan)
            dq[:, rows] = accumulator.finish()
        return dq, dk, dv

    def _document_blocks(
        self, op: BoundOperator, q: slice, k: slice, heads_q: int, heads_kv: int
    ) -> Iterator[tuple[slice, Any]]:
        """Split one document into a full block and a square causal one: keys and plan of each."""
        assert self.packed is not None
        rows = q.stop - q.start
        causal_start = k.stop - rows if self.packed.causal else k.stop
        if causal_start > k.start:
            plan = self.plan(op, rows, causal_start - k.start, False, heads_q, heads_kv)
            yield slice(k.start, causal_start), plan
        if causal_start < k.stop:
            yield slice(causal_start, k.stop), self.plan(op, rows, rows, True, heads_q, heads_kv)

    def _prepare(self, op: BoundOperator, mask: AttnMask, heads_q: int, heads_kv: int) -> Any:
        problem = local_problem(self.problem, mask.seq_q, mask.seq_k, heads_q, heads_kv)
        queries, keys = (layouts.build("contiguous", n, 1) for n in (mask.seq_q, mask.seq_k))
        world = World(problem, mask, queries, keys, ranks_per_node=1)
        return op.prepare(world.subproblem([0], [0]))


def splits_documents(op: BoundOperator) -> bool:
    """Whether packed documents are passed to the operator one by one, as full and square causal
    blocks, because it takes other masks as dense ones (torch's SDPA) or not at all."""
    return "bands" not in op.info.masks or op.info.name.startswith("sdpa.")
