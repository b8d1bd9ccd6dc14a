"""Selector `scored`: top-k keys by scores of the keys, which the user gives as a file.

Methods that rank the cached keys of a head once, whatever the query, differ in where the scores
come from: a draft model's attention (SpecKV, in Draft-based Approximate Inference, arXiv
2506.08373), or the keys alone.  Without a file, a key with a small norm has a high score (arXiv
2406.11430).

Legend: B batch, S queries, T keys, H query heads, G key/value heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.ranking import check_minimum, row_chunks, upcast
from cpbench.selectors.common.tensor_file import TensorFile
from cpbench.selectors.selections import Tokens, dense_mask_rows

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="scored",
        summary="top-k keys by scores of the keys from a file, or by their norms",
        source="SpecKV, arXiv 2506.08373",
        load="cpbench.selectors.scored:Scored",
        params=("scores", "top_k", "kernel"),
        external_lse=False,
        variants=("top_k=20",),
        selects=True,
        selects_from="keys",
        selects_for="all",
    ),
)


class Scored(Selector):
    """For each query and head, the visible keys with the highest scores; no key is forced, and none
    is selected whose score is -inf.

    Args:
        scores: safetensors file with ``scores`` ``[heads, T]`` or ``[B, heads, T]`` of the keys of
            a layer, for at least as many keys as the sequence has; heads are H, G or 1.
        top_k: keys per query.
        kernel: see :class:`Selector`.
    """

    name = "scored"
    branch_kinds = ("tokens",)

    def __init__(self, scores: str = "", top_k: int = 2048, kernel: str = "") -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, top_k=top_k)
        self.top_k, self._scores_file = top_k, str(scores)
        wanted = (("scores",),)
        self._file = TensorFile(self.name, "scores", str(scores), wanted) if scores else None

    def misfit(self, problem: Problem) -> str | None:
        if self._file is None:
            return None
        shape = self._file.shapes["scores"]
        heads = dict.fromkeys((problem.heads_q, problem.heads_kv, 1))
        batches = shape[:-2] in ((), (problem.batch,))
        if not batches or len(shape) < 2 or shape[-2] not in heads or shape[-1] < problem.seq_k:
            needed = f"{' or '.join(map(str, heads))}, at least {problem.seq_k}"
            return (
                f"scored: scores of {self._scores_file} is {list(shape)}; the case needs "
                f"[{needed}] or [{problem.batch}, {needed}]"
            )
        return None

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        scores = self._scores(k)  # [B, heads, T]
        if scores.shape[1] > 1:
            scores = scores.repeat_interleave(q.shape[2] // scores.shape[1], 1)
        (b, heads, t), s = scores.shape, q.shape[1]
        max_keys = min(self.top_k, t)
        index = torch.full((b, heads, s, max_keys), -1, dtype=torch.int32, device=q.device)
        for begin, end in row_chunks(s, b * heads * t, q.device):
            top, chosen = self._top_of_rows(scores, plan, begin, end)
            chosen = chosen.masked_fill_(top == -torch.inf, -1)
            index[:, :, begin:end, : chosen.shape[3]] = chosen
        return (Branch(mask=Tokens(plan.mask, index, q.shape[2])),)

    def _top_of_rows(
        self, scores: torch.Tensor, plan: Plan, begin: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers of the keys of queries ``[begin, end)``, ``[B, heads, S, n]`` both.

        Most keys that one of them sees, all see: the best of these are found once, and each query
        has them and the others to choose from.
        """
        import torch

        visible = dense_mask_rows(plan.mask, begin, end, "cpu")
        shared = visible.all(0)
        others = torch.nonzero(visible.any(0) & ~shared)[:, 0]
        seen = torch.ones((end - begin, min(self.top_k, int(shared.sum()))), dtype=torch.bool)
        seen = torch.cat([seen, visible[:, others]], 1).to(scores.device)
        shared, others = shared.to(scores.device), others.to(scores.device)
        found = seen.shape[1] - len(others)
        best = scores.masked_fill(~shared, -torch.inf).topk(found, dim=-1, sorted=False).indices
        keys = torch.cat([best, others.expand(*scores.shape[:2], -1)], 2)
        of_rows = scores.gather(2, keys)[:, :, None].masked_fill(~seen, -torch.inf)
        top = of_rows.topk(min(self.top_k, keys.shape[2]), dim=-1)
        chosen = keys[:, :, None].expand(-1, -1, end - begin, -1).gather(3, top.indices)
        return top.values, chosen

    def _scores(self, k: torch.Tensor) -> torch.Tensor:
        """``[B, heads, T]`` in float32 at least."""
        if self._file is None:
            norms: torch.Tensor = upcast(k).norm(dim=-1)
            return -norms.transpose(1, 2)
        given = upcast(self._file.tensors()["scores"][..., : k.shape[1]].to(k.device))
        scores: torch.Tensor = given.expand(len(k), *given.shape[-2:])
        return scores
