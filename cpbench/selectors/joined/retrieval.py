"""Selector `retrieval`: the keys with the highest inner products, from an index, with sinks and a
window.

Source: RetrievalAttention, arXiv 2409.10516: attention to keys that an index retrieves for each
query and head is merged by lse with that to the first and the latest keys.  The reference retrieves
exactly; ``index=hnsw`` searches a graph (Malkov and Yashunin, arXiv 1603.09320) through hnswlib, in
host memory.  The original builds its graph from the queries of the prompt, since they lie outside
the distribution of the keys, which costs a graph of keys alone some of its recall.
"""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.core.registry import OperatorInfo
from cpbench.masks.slices import IntArray
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import (
    check_minimum,
    largest,
    qk_scores,
    row_chunks,
    upcast,
)
from cpbench.selectors.common.windows import window_begins, window_mask
from cpbench.selectors.selections import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="retrieval",
        summary="top-k keys per query and head, exact or from an HNSW index; sinks and a window",
        source="RetrievalAttention, arXiv 2409.10516",
        load="cpbench.selectors.joined.retrieval:Retrieval",
        masks=("causal",),
        params=("top_k", "num_sinks", "window", "step", "index", "links", "effort", "kernel"),
        external_lse=False,
        variants=("top_k=16,num_sinks=4,window=24,step=8",),
        selects=True,
        selects_from="keys",
        selects_for="head",
    ),
)
INDICES = ("exact", "hnsw")


class Retrieval(Selector):
    """Keys enter the index ``step`` at a time, when they leave the window of the next queries.

    Args:
        top_k: retrieved keys per query.
        num_sinks: first keys, visible to every query.
        window: least number of keys in the window.
        step: keys that enter the index at a time.
        index: ``"exact"`` or ``"hnsw"``.
        links: of hnsw: links per key (its M).
        effort: of hnsw: candidates of a search, and of an insertion (its ef), at least ``top_k``.
        kernel: see :class:`Selector`.
    """

    name = "retrieval"
    branch_kinds = ("mask", "tokens")
    joined = True

    def __init__(
        self,
        top_k: int = 100,
        num_sinks: int = 128,
        window: int = 512,
        step: int = 64,
        index: str = "exact",
        links: int = 16,
        effort: int = 128,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, top_k=top_k, window=window, step=step, effort=effort)
        check_minimum(self.name, 0, num_sinks=num_sinks)
        check_minimum(self.name, 2, links=links)
        if index not in INDICES:
            raise ValueError(f"retrieval: index = {index!r} is not one of {', '.join(INDICES)}")
        self.top_k, self.num_sinks, self.window, self.step = top_k, num_sinks, window, step
        self.index, self.links, self.effort = index, links, max(effort, top_k)

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if self.index == "hnsw" and importlib.util.find_spec("hnswlib") is None:
            return (
                "retrieval with index=hnsw needs the Python package hnswlib, which is not "
                "installed: pip install hnswlib"
            )
        return super().unsupported(problem, mask, device)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        begins = window_begins(k.shape[1], self.window, self.step)
        near = plan.of_queries(window_mask(begins, self.num_sinks))
        branches, count = [Branch(mask=near)], self._count(begins)
        if count > 0:
            index = self._search(q, k, begins[plan.positions], count)[0]
            branches.append(Branch(mask=Tokens(plan.mask, index, q.shape[2])))
        return tuple(branches)

    def index_figures(
        self, q: torch.Tensor, k: torch.Tensor, spans: Sequence[tuple[int, int]]
    ) -> dict[str, float]:
        """Recall, build time and size of a graph; see ``Selector.index_figures``."""
        begins = window_begins(k.shape[1], self.window, self.step)
        if self.index == "exact" or self._count(begins) < 1:
            return {}
        index, figures = self._search(q, k, begins, self._count(begins))
        found = wanted = 0
        for begin, end in spans:
            exact = self._exact(q, k, begins, begin, end)
            listed = index[:, :, begin:end]
            equal = (listed[..., None] == exact[..., None, :]) & (exact >= 0)[..., None, :]
            found, wanted = found + int(equal.sum()), wanted + int((exact >= 0).sum())
        recall = {"index_recall": found / wanted} if wanted else {}
        return {**recall, **figures}

    def _count(self, begins: IntArray) -> int:
        """The keys that the last query of the sequence retrieves, of which there may be none."""
        return min(self.top_k, int(begins[-1]) - self.num_sinks)

    def _search(
        self, q: torch.Tensor, k: torch.Tensor, begins: IntArray, count: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """At most ``count`` retrieved keys of each query ``[B, H, S, n]``, -1 for none, and figures
        of the graph.

        Args:
            begins: ``[S]``, of the windows of the queries.
        """
        import torch

        shape = (len(q), q.shape[2], q.shape[1], count)
        if self.index == "hnsw":
            searched = self._search_graphs(upcast(q).cpu(), upcast(k).cpu(), begins, shape)
            figures = {
                "index_build_us": searched.build_us,
                "index_bytes": float(searched.nbytes),
            }
            return torch.as_tensor(searched.keys, device=q.device), figures
        index = torch.full(shape, -1, dtype=torch.int32, device=q.device)
        width = len(q) * q.shape[2] * k.shape[1]
        for begin, end in row_chunks(q.shape[1], width, q.device):
            top = self._exact(q, k, begins, begin, end)
            index[:, :, begin:end, : top.shape[3]] = top
        return index, {}

    def _exact(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        begins: IntArray,
        begin: int,
        end: int,
    ) -> torch.Tensor:
        """The keys with the highest products of queries ``[begin, end)``, ``[B, H, rows, n]``."""
        import torch

        first, last = (max(int(x), self.num_sinks) for x in (begins[begin], begins[end - 1]))
        scores = qk_scores(upcast(q[:, begin:end]), upcast(k[:, self.num_sinks : last]))
        key = torch.arange(first, last, device=q.device)  # all queries see those before
        outside = key >= torch.as_tensor(begins[begin:end], device=q.device)[:, None]
        scores[..., first - self.num_sinks :].masked_fill_(outside, -torch.inf)
        values, indices = largest(scores, min(self.top_k, scores.shape[3]))
        return indices.add_(self.num_sinks).masked_fill_(values == -torch.inf, -1).to(torch.int32)

    def _search_graphs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        begins: IntArray,
        shape: tuple[int, ...],
    ) -> GraphSearch:
        """As :meth:`_search`, on the host, with a graph for each key/value head."""
        import hnswlib

        index = np.full(shape, -1, dtype=np.int32)
        group, build_us, nbytes = q.shape[2] // k.shape[2], 0.0, 0
        for b, g in np.ndindex(len(k), k.shape[2]):
            keys, queries = k[b, :, g].numpy(), q[b, :, g * group : (g + 1) * group].numpy()
            graph = hnswlib.Index("ip", k.shape[3])
            graph.init_index(len(keys), M=self.links, ef_construction=self.effort, random_seed=0)
            graph.set_ef(self.effort)
            held = self.num_sinks
            edges = np.flatnonzero(np.diff(begins)) + 1
            for rows in np.split(np.arange(len(begins)), edges):
                entered = int(begins[rows[0]])
                if entered <= held and held == self.num_sinks:
                    continue
                if entered > held:
                    start = time.perf_counter()
                    # By one thread: the graph depends on the order of insertion.
                    graph.add_items(keys[held:entered], np.arange(held, entered), num_threads=1)
                    build_us += (time.perf_counter() - start) * 1e6
                    held = entered
                of_rows = queries[rows].reshape(-1, keys.shape[1])
                found = _nearest(graph, of_rows, min(self.top_k, held - self.num_sinks))
                found = found.reshape(len(rows), group, -1).swapaxes(0, 1)
                heads = slice(g * group, (g + 1) * group)
                index[b, heads, rows[0] : rows[-1] + 1, : found.shape[2]] = found
            nbytes += graph.index_file_size()
        return GraphSearch(index, build_us, nbytes)


class GraphSearch(NamedTuple):
    """Keys that graphs returned ``[B, H, S, n]``, the time to build the graphs and their size."""

    keys: np.typing.NDArray[np.int32]
    build_us: float
    nbytes: int


def _nearest(
    graph: object, queries: np.typing.NDArray[np.float32], count: int
) -> np.typing.NDArray[np.int64]:
    """The labels that a graph returns for each query; fewer than ``count`` where its search reaches
    no more, which it reports as an error.  As many threads search as torch has."""
    import torch

    while True:
        try:
            labels, _ = graph.knn_query(  # type: ignore[attr-defined]
                queries, k=count, num_threads=torch.get_num_threads()
            )
        except RuntimeError:
            if count == 1:
                raise
            count = count // 2
        else:
            found: np.typing.NDArray[np.int64] = labels.astype(np.int64)
            return found
