"""What all ranks know of one computation: the problem, the mask, who owns which tokens, the nodes.

Strategies plan from a :class:`World`: which parts of the mask lie between which ranks, how large
they are, and how ranks form a mesh.  Masks of parts are cut out only when somebody reads them, so
that a schedule alone (``cpbench.parallel.trace``) costs nothing but areas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpbench import masks
from cpbench.core.problem import Case, Problem, local_problem
from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask, per_head
from cpbench.parallel import layout as layouts
from cpbench.parallel.layout import Layout, area_matrix, local_mask
from cpbench.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class World:
    """One computation as all ranks see it.

    Attributes:
        problem: the whole of it.
        mask: ``seq_q x seq_k``, global; of one rank alone where it differs from head to head.
        queries, keys: which rank owns which queries and keys (one layout, unless they differ).
        ranks_per_node: ranks that share a node; ranks are numbered node by node.
        placement: the mesh axis whose groups are to be neighbours, or "" for the strategy's own
            choice.
    """

    problem: Problem
    mask: Mask
    queries: Layout
    keys: Layout
    ranks_per_node: int = 0
    placement: str = ""

    @classmethod
    def of(
        cls,
        problem: Problem,
        mask: Mask,
        layout: Layout,
        ranks_per_node: int = 0,
        placement: str = "",
    ) -> World:
        """Queries dealt as ``layout`` deals the keys; ``ranks_per_node`` 0 is all on one node."""
        nodes, queries = ranks_per_node or layout.world_size, layout
        if mask.seq_q != layout.seq_len:
            together = AttnMask.from_slices(1, 1, [])  # a few queries have no documents
            queries = layouts.build(layout.name, mask.seq_q, layout.world_size, together)
        return cls(problem, mask, queries, layout, nodes, placement)

    @classmethod
    def of_case(cls, case: Case, ranks_per_node: int) -> World:
        """The world of a row of a sweep.

        Args:
            ranks_per_node: where the case leaves it to the launcher.

        Raises:
            ValueError: for a layout that does not fit.
        """
        mask = masks.build_heads(case.mask, case.seq_len, case.num_heads_q)
        shared = mask if isinstance(mask, AttnMask) else None
        layout = layouts.build(case.layout, case.seq_len, case.world_size, shared)
        if case.queries:
            if isinstance(mask, DilatedMask):
                raise ValueError(f"queries = {case.queries}: {case.mask.name} is of all queries")
            mask = mask.crop(case.seq_len - case.queries, case.seq_len, 0, case.seq_len)
        nodes = case.ranks_per_node or ranks_per_node
        return cls.of(case.problem, mask, layout, nodes, case.placement)

    @property
    def size(self) -> int:
        """P, ranks."""
        return self.keys.world_size

    @property
    def shared_mask(self) -> AttnMask:
        """The mask that all heads share: what a strategy of several ranks works on."""
        assert isinstance(self.mask, AttnMask)
        return self.mask

    @functools.cached_property
    def areas(self) -> IntArray:
        """``(P, P)`` visible pairs between the queries of rank r (row) and the keys of rank s."""
        if per_head(self.mask):
            return np.full((self.size, self.size), math.ceil(self.mask.area / self.size**2))
        return area_matrix(self.shared_mask, self.queries, self.keys)

    def part(self, q_ranks: Sequence[int], k_ranks: Sequence[int]) -> Part:
        """The work between the queries of some ranks and the keys of some, both concatenated in
        the order given; its area is 0 where the mask is empty there."""
        if len(q_ranks) == len(k_ranks) == 1:
            area = int(self.areas[q_ranks[0], k_ranks[0]])
        else:
            area = int(self.areas[np.ix_(list(q_ranks), list(k_ranks))].sum())
        return Part(self, tuple(q_ranks), tuple(k_ranks), area)

    def piece(self, rank: int, keys: IntArray) -> Piece:
        """The work between the queries of one rank and some runs of keys, rows (start, length), one
        after another; for layouts of step 1."""
        queries = self.queries.ranges(rank)
        return Piece(self, self.shared_mask.restrict(queries, keys).simplify())

    def mesh(self, **axes: int) -> Mesh:
        """The ranks as a mesh of ``axes``, outermost first; ``placement`` moves one innermost.

        Raises:
            ValueError: when ``placement`` is no axis.
        """
        mesh = Mesh.of(axes, self.placement)
        assert np.prod(mesh.sizes) == self.size, f"{axes} are not {self.size} ranks"
        return mesh

    def with_heads(self, heads_q: int, heads_kv: int) -> World:
        """The same for some of the heads."""
        problem = replace(self.problem, scale=self.problem.softmax_scale)
        world = replace(self, problem=replace(problem, heads_q=heads_q, heads_kv=heads_kv))
        world.__dict__["areas"] = self.areas
        return world

    def merged(self, groups: tuple[tuple[int, ...], ...], heads_q: int, heads_kv: int) -> World:
        """Groups of ranks as one rank each, in this order: as after an exchange of tokens for
        heads inside the groups, which leaves each member with some heads of all their tokens.

        Args:
            groups: all ranks, each once, in groups of one size.
            heads_q, heads_kv: heads of the new problem.
        """
        return _merged(self, groups, heads_q, heads_kv)


@functools.lru_cache(maxsize=8)  # every rank of a trace asks for the same
def _merged(
    world: World, groups: tuple[tuple[int, ...], ...], heads_q: int, heads_kv: int
) -> World:
    queries = world.queries.merged(groups)
    keys = queries if world.keys is world.queries else world.keys.merged(groups)
    whole = replace(world.with_heads(heads_q, heads_kv), queries=queries, keys=keys, placement="")
    order = np.concatenate([np.asarray(group) for group in groups])
    n, each = len(groups), world.size // len(groups)
    blocks = world.areas[np.ix_(order, order)].reshape(n, each, n, each)
    whole.__dict__["areas"] = blocks.sum((1, 3))  # what the cached property would find
    return whole


@dataclass(frozen=True)
class Part:
    """The work between the queries of some ranks and the keys of some.

    Attributes:
        world: that it is a part of.
        q_ranks, k_ranks: whose queries and whose keys, concatenated in this order.
        area: visible pairs.
    """

    world: World
    q_ranks: tuple[int, ...]
    k_ranks: tuple[int, ...]
    area: int

    @property
    def mask(self) -> Mask:
        """The mask in local coordinates, cut out anew."""
        world = self.world
        if per_head(world.mask):
            assert world.size == 1, "strategies of several ranks refuse a mask for each head"
            return world.mask
        return local_mask(world.shared_mask, world.queries, self.q_ranks, world.keys, self.k_ranks)

    @property
    def problem(self) -> Problem:
        """What an operator computes here."""
        world = self.world
        return local_problem(
            world.problem,
            world.queries.local_len * len(self.q_ranks),
            world.keys.local_len * len(self.k_ranks),
            world.problem.heads_q,
            world.problem.heads_kv,
        )


@dataclass(frozen=True)
class Piece:
    """The work between the queries of one rank and some keys.

    Attributes:
        world: that it is a part of.
        mask: in local coordinates.
    """

    world: World
    mask: AttnMask

    @property
    def area(self) -> int:
        """Visible pairs."""
        return self.mask.area

    @property
    def problem(self) -> Problem:
        """What an operator computes here."""
        whole = self.world.problem
        return local_problem(whole, self.mask.seq_q, self.mask.seq_k, whole.heads_q, whole.heads_kv)
