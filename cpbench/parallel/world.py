"""The global view of one computation: problem, mask, layouts and nodes, the same on all ranks.

Strategies plan from a :class:`World`: the subproblems between ranks, their areas, and the mesh of
ranks.  The mask of a subproblem is cut out only when it is read, so a schedule alone
(``cpbench.parallel.tracing``) needs the areas only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpbench import masks
from cpbench.core.problem import DECODE, Case, Problem, local_problem
from cpbench.core.registry import OperatorInfo
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask, per_head
from cpbench.masks.paged.batch import PagedBatch
from cpbench.masks.slices import IntArray, cut_axis
from cpbench.masks.slices import areas as slice_areas
from cpbench.parallel import layout as layouts
from cpbench.parallel.layout import Layout, area_matrix
from cpbench.parallel.local_masks import PairMasks, local_mask
from cpbench.parallel.mesh import Mesh


@dataclass(frozen=True, eq=False)
class World:
    """One computation, as all ranks see it.

    Attributes:
        problem: the global problem.
        mask: ``seq_q x seq_k``, global; a mask per query head runs on one rank only.
        queries, keys: layouts of queries and keys (the same unless their lengths differ).
        ranks_per_node: ranks per node; ranks are numbered node by node.
        placement: the mesh axis to place inside nodes; "" for the default of the strategy.
        kv_heads: which key/value head each of the problem's is, where some are repeated so that
            each has equally many query heads; () for all in order.
        whole: the problem with all heads, where this one has some of them; None otherwise.
        held_heads: of decoding with a cache that is divided by heads: the key/value heads of which
            each rank holds all keys; () where it holds the keys of its tokens, of all heads.
    """

    problem: Problem
    mask: Mask
    queries: Layout
    keys: Layout
    ranks_per_node: int = 0
    placement: str = ""
    kv_heads: tuple[int, ...] = ()
    whole: Problem | None = None
    held_heads: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        problem: Problem,
        mask: Mask,
        layout: Layout,
        ranks_per_node: int = 0,
        placement: str = "",
    ) -> World:
        """Assign queries by the layout of the keys; ``ranks_per_node`` 0 is one node for all."""
        nodes, queries = ranks_per_node or layout.world_size, layout
        if mask.seq_q != layout.seq_len:
            no_documents = AttnMask.from_slices(1, 1, [])  # a few queries have none
            queries = layouts.build(layout.name, mask.seq_q, layout.world_size, no_documents)
        return cls(problem, mask, queries, layout, nodes, placement)

    @classmethod
    def of_case(cls, case: Case, ranks_per_node: int) -> World:
        """The world of a case of a sweep.

        Args:
            ranks_per_node: used if the case does not set it.

        Raises:
            ValueError: if the layout or the number of queries does not fit.
        """
        nodes = case.ranks_per_node or ranks_per_node
        if case.phase == DECODE:
            batch = PagedBatch.of_case(case)
            layout = layouts.build(case.layout, batch.slots, case.world_size)
            return cls.of(case.problem, batch.mask(case.mask), layout, nodes, case.placement)
        mask = masks.build_heads(case.mask, case.seq_len, case.num_heads_q)
        shared = mask if isinstance(mask, AttnMask) else None
        layout = layouts.build(case.layout, case.seq_len, case.world_size, shared)
        if case.queries:
            if isinstance(mask, DilatedMask):
                raise ValueError(
                    f"queries = {case.queries}: mask {case.mask.name} requires all queries"
                )
            mask = mask.crop(case.seq_len - case.queries, case.seq_len, 0, case.seq_len)
        return cls.of(case.problem, mask, layout, nodes, case.placement)

    @property
    def size(self) -> int:
        """The number of ranks, P."""
        return self.keys.world_size

    def held_keys(self, rank: int) -> tuple[IntArray, Sequence[int]]:
        """The global positions of the keys that a rank holds, and their heads."""
        if self.held_heads:
            return np.arange(self.keys.seq_len), self.held_heads[rank]
        return self.keys.positions(rank), range(self.problem.heads_kv)

    def held_shape(self, rank: int) -> tuple[int, int]:
        """The numbers of :meth:`held_keys`."""
        if self.held_heads:
            return self.keys.seq_len, len(self.held_heads[rank])
        return self.keys.local_len, self.problem.heads_kv

    @property
    def shared_mask(self) -> AttnMask:
        """The mask of all heads, where they share one, as strategies of several ranks require."""
        assert isinstance(self.mask, AttnMask)
        return self.mask

    @functools.cached_property
    def areas(self) -> IntArray:
        """Visible pairs between the queries of rank r (row) and the keys of rank s, ``(P, P)``."""
        if per_head(self.mask):
            return np.full((self.size, self.size), math.ceil(self.mask.area / self.size**2))
        return area_matrix(self.shared_mask, self.queries, self.keys)

    @functools.cached_property
    def pair_masks(self) -> PairMasks:
        """The masks of pairs of ranks."""
        return PairMasks(self.shared_mask, self.queries, self.keys)

    def subproblem(self, q_ranks: Sequence[int], k_ranks: Sequence[int]) -> Subproblem:
        """Attention of the queries of ``q_ranks`` to the keys of ``k_ranks``, each concatenated in
        the order given; its area is 0 if nothing is visible."""
        if len(q_ranks) == len(k_ranks) == 1:
            area = int(self.areas[q_ranks[0], k_ranks[0]])
        else:
            area = int(self.areas[np.ix_(list(q_ranks), list(k_ranks))].sum())
        return Subproblem(self, tuple(q_ranks), tuple(k_ranks), area)

    def key_subsets(self, rank: int, keys: Sequence[IntArray]) -> list[KeySubset]:
        """Attention of the queries of one rank to each of several subsets of the keys.

        Args:
            keys: for each subset, its runs of keys, rows (start, length), which are concatenated;
                no key is in two of them.

        For layouts of step 1.
        """
        mask = _mask_of_queries(self, rank)
        subset = np.repeat(np.arange(len(keys)), [len(runs) for runs in keys])
        areas_of_subsets = np.zeros(len(keys), dtype=np.int64)
        if len(subset):
            cut, _, run = cut_axis(mask.slices, np.concatenate(keys), axis=1)
            np.add.at(areas_of_subsets, subset[run], slice_areas(cut))
        areas = areas_of_subsets.tolist()
        return [KeySubset(self, mask, *given) for given in zip(keys, areas, strict=True)]

    def mesh(self, **axes: int) -> Mesh:
        """The ranks as a mesh of ``axes``, outermost first; ``placement`` moves one innermost.

        Raises:
            ValueError: if ``placement`` is not an axis.
        """
        mesh = Mesh.of(axes, self.placement)
        assert np.prod(mesh.sizes) == self.size, f"{axes} does not have {self.size} ranks"
        return mesh

    def changed(self, **fields: Any) -> World:
        """The same tokens on the same ranks with other fields; areas that are known are kept."""
        world = replace(self, **fields)
        if "areas" in self.__dict__:
            world.__dict__["areas"] = self.areas
        return world

    def with_heads(self, heads_q: int, heads_kv: int, kv_heads: tuple[int, ...] = ()) -> World:
        """The same computation with another number of heads."""
        problem = replace(
            self.problem, heads_q=heads_q, heads_kv=heads_kv, scale=self.problem.softmax_scale
        )
        whole = self.whole or self.problem
        world = self.changed(problem=problem, kv_heads=kv_heads, whole=whole)
        world.__dict__["areas"] = self.areas  # computed once, not for each rank that plans
        return world

    def with_inputs_of(self, info: OperatorInfo) -> World:
        """The same computation with the inputs that an operator takes beside q, k and v."""
        gates = info.gate_lanes(self.problem.head_dim)
        initial_state = self.problem.initial_state and info.kind == "mixer"
        if (gates, initial_state) == (self.problem.gates, self.problem.initial_state):
            return self
        problem = replace(self.problem, gates=gates, initial_state=initial_state)
        return self.changed(problem=problem)

    def merged(self, groups: tuple[tuple[int, ...], ...], heads_q: int, heads_kv: int) -> World:
        """Merge each group of ranks into one rank, in this order: the world after an all-to-all
        inside the groups that leaves every member a subset of heads of all their tokens.

        Args:
            groups: equally large groups that together hold every rank once.
            heads_q, heads_kv: heads of the new problem.
        """
        return _merge_groups(self, groups, heads_q, heads_kv)


@functools.lru_cache(maxsize=1)  # shared by all subsets of a rank
def _mask_of_queries(world: World, rank: int) -> AttnMask:
    """The mask of the local queries of a rank, for all keys."""
    every = np.array([[0, world.keys.padded_len]])
    return world.shared_mask.restrict(world.queries.ranges(rank), every)


@functools.lru_cache(maxsize=8)  # shared by all ranks of a trace
def _merge_groups(
    world: World, groups: tuple[tuple[int, ...], ...], heads_q: int, heads_kv: int
) -> World:
    queries = world.queries.merged(groups)
    keys = queries if world.keys is world.queries else world.keys.merged(groups)
    merged = replace(world.with_heads(heads_q, heads_kv), queries=queries, keys=keys, placement="")
    order = np.concatenate([np.asarray(group) for group in groups])
    n, group_size = len(groups), world.size // len(groups)
    blocks = world.areas[np.ix_(order, order)].reshape(n, group_size, n, group_size)
    merged.__dict__["areas"] = blocks.sum((1, 3))  # the value of the cached property
    return merged


@dataclass(frozen=True)
class Subproblem:
    """Attention of the queries of some ranks to the keys of some ranks.

    Attributes:
        world: the world that it belongs to.
        q_ranks, k_ranks: owners of the queries and of the keys, concatenated in this order.
        area: visible pairs.
    """

    world: World
    q_ranks: tuple[int, ...]
    k_ranks: tuple[int, ...]
    area: int

    @property
    def mask(self) -> Mask:
        """The mask in local coordinates; of several ranks, cut out on every access."""
        world = self.world
        if per_head(world.mask):
            assert world.size == 1, "strategies of several ranks refuse a mask per head"
            return world.mask
        if len(self.q_ranks) == len(self.k_ranks) == 1:
            return world.pair_masks.between(self.q_ranks[0], self.k_ranks[0])
        return local_mask(world.shared_mask, world.queries, self.q_ranks, world.keys, self.k_ranks)

    @property
    def problem(self) -> Problem:
        """The problem that the operator computes."""
        world = self.world
        return local_problem(
            world.problem,
            world.queries.local_len * len(self.q_ranks),
            world.keys.local_len * len(self.k_ranks),
            world.problem.heads_q,
            world.problem.heads_kv,
        )


@dataclass(frozen=True, eq=False)
class KeySubset:
    """Attention of the queries of one rank to a subset of keys.

    Attributes:
        world: the world that it belongs to.
        whole: the mask of these queries, for all keys.
        keys: runs of keys, rows (start, length), which are concatenated.
        area: visible pairs.
    """

    world: World
    whole: AttnMask
    keys: IntArray
    area: int

    @property
    def mask(self) -> AttnMask:
        """The mask in local coordinates; of several ranks, cut out on every access."""
        return self.whole.restrict(np.array([[0, self.whole.seq_q]]), self.keys).simplify()

    @property
    def problem(self) -> Problem:
        """The problem that the operator computes."""
        whole = self.world.problem
        seq_q, seq_k = self.whole.seq_q, int(self.keys[:, 1].sum())
        return local_problem(whole, seq_q, seq_k, whole.heads_q, whole.heads_kv)


@dataclass(frozen=True)
class Chunk:
    """Attention of consecutive queries to consecutive keys of a subproblem.

    Attributes:
        world: the world that it belongs to.
        whole: the mask of the subproblem.
        bounds: ``(q0, q1, k0, k1)`` in it.
        area: visible pairs; of a mask per head, their mean, rounded up.
    """

    world: World
    whole: Mask
    bounds: tuple[int, int, int, int]
    area: int

    @property
    def mask(self) -> Mask:
        """The mask in local coordinates; of several ranks, cut out on every access."""
        assert not isinstance(self.whole, DilatedMask), "it cannot be cut"
        return self.whole.crop(*self.bounds).simplify()

    @property
    def problem(self) -> Problem:
        """The problem that the operator computes."""
        whole, (q0, q1, k0, k1) = self.world.problem, self.bounds
        return local_problem(whole, q1 - q0, k1 - k0, whole.heads_q, whole.heads_kv)
