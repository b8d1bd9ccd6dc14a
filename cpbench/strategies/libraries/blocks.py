"""The blocks that a library computes, each by the operator under test.  Not a strategy.

A library cuts its work into full and causal blocks of its own shapes; the operator's plan for each
shape is made once, before anything runs.  Causal blocks are aligned at their lower right corner.

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
    import torch

    from cpbench.parallel.bound_operator import BoundOperator


@dataclass(frozen=True)
class Packed:
    """Documents packed one after another: the queries of each and the keys that they see.

    Attributes:
        queries, keys: where each begins, and where the last one ends.
        causal: else a query sees all keys of its document.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool

    def documents(self) -> Iterator[tuple[slice, slice]]:
        for i in range(len(self.queries) - 1):
            yield slice(*self.queries[i : i + 2]), slice(*self.keys[i : i + 2])

    def mask(self) -> AttnMask:
        """All documents in one."""
        rows = []
        for q, k in self.documents():
            hi = k.stop - q.stop if self.causal else k.stop
            rows.append((q.start, q.stop, k.start, k.stop, -q.stop, hi))
        return AttnMask.from_slices(self.queries[-1], self.keys[-1], rows)


@dataclass
class Blocks:
    """The operator's plans by the shape of the block.

    Attributes:
        problem: the whole computation.
        packed: the documents, of a library that packs them.
    """

    problem: Problem
    packed: Packed | None = None
    plans: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def plan(
        self, op: BoundOperator, seq_q: int, seq_k: int, causal: bool, heads_q: int, heads_kv: int
    ) -> Any:
        """The plan of one block, made when first asked for.

        Raises:
            Unsupported: when the operator does not take such a block.
        """
        key = (seq_q, seq_k, causal, heads_q, heads_kv)
        if key not in self.plans:
            mask = Packed((0, seq_q), (0, seq_k), causal).mask()
            self.plans[key] = self._made(op, mask, heads_q, heads_kv)
        return self.plans[key]

    def plan_packed(self, op: BoundOperator, heads_q: int, heads_kv: int) -> Any:
        """The plan of all documents in one call, or (:func:`splits`) of every piece of them."""
        assert self.packed is not None
        if not splits(op):
            key = ("packed", heads_q, heads_kv)
            if key not in self.plans:
                self.plans[key] = self._made(op, self.packed.mask(), heads_q, heads_kv)
            return self.plans[key]
        for q, k in self.packed.documents():
            for _ in self._pieces(op, q, k, heads_q, heads_kv):
                pass
        return None

    def forward(
        self, op: BoundOperator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One block; see :meth:`cpbench.core.operator.Operator.forward`."""
        plan = self.plan(op, q.shape[1], k.shape[1], causal, q.shape[2], k.shape[2])
        return op.forward(q, k, v, plan)

    def backward(
        self,
        op: BoundOperator,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One block; see :meth:`cpbench.core.operator.Operator.backward`."""
        plan = self.plan(op, q.shape[1], k.shape[1], causal, q.shape[2], k.shape[2])
        return op.backward(dout, q, k, v, out, lse, plan)

    def forward_packed(
        self, op: BoundOperator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All documents, ``[1, N, H, D]``; the lse is ``[1, H, N]``."""
        import torch

        assert self.packed is not None
        heads = (q.shape[2], k.shape[2])
        if not splits(op):
            return op.forward(q, k, v, self.plan_packed(op, *heads))
        outs, lses = [], []
        for rows, columns in self.packed.documents():
            parts = op.forward_parts(q[:, rows])
            for keys, plan in self._pieces(op, rows, columns, *heads):
                parts.add(k[:, keys], v[:, keys], plan)
            out, lse = parts.finish()
            assert lse is not None
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

    def backward_packed(
        self,
        op: BoundOperator,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of all documents."""
        import torch

        assert self.packed is not None
        heads = (q.shape[2], k.shape[2])
        if not splits(op):
            return op.backward(dout, q, k, v, out, lse, self.plan_packed(op, *heads))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows, columns in self.packed.documents():
            parts = op.backward_parts(
                dout[:, rows], q[:, rows], out[:, rows], lse[:, :, rows].contiguous()
            )
            for keys, plan in self._pieces(op, rows, columns, *heads):
                dk[:, keys], dv[:, keys] = parts.add(k[:, keys], v[:, keys], plan)
            dq[:, rows] = parts.finish()
        return dq, dk, dv

    def _pieces(
        self, op: BoundOperator, q: slice, k: slice, heads_q: int, heads_kv: int
    ) -> Iterator[tuple[slice, Any]]:
        """One document as a full block and a square causal one: keys and plan of each."""
        assert self.packed is not None
        rows = q.stop - q.start
        middle = k.stop - rows if self.packed.causal else k.stop
        if middle > k.start:
            plan = self.plan(op, rows, middle - k.start, False, heads_q, heads_kv)
            yield slice(k.start, middle), plan
        if middle < k.stop:
            yield slice(middle, k.stop), self.plan(op, rows, rows, True, heads_q, heads_kv)

    def _made(self, op: BoundOperator, mask: AttnMask, heads_q: int, heads_kv: int) -> Any:
        problem = local_problem(self.problem, mask.seq_q, mask.seq_k, heads_q, heads_kv)
        queries, keys = (layouts.build("contiguous", n, 1) for n in (mask.seq_q, mask.seq_k))
        world = World(problem, mask, queries, keys, ranks_per_node=1)
        return op.prepare(world.part([0], [0]))


def splits(op: BoundOperator) -> bool:
    """Whether packed documents go to the operator one by one, as full and square causal blocks: it
    takes other masks as a dense one (torch's SDPA), or not at all."""
    return "bands" not in op.info.masks or op.info.name.startswith("sdpa.")
