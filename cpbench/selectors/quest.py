"""Selector `quest`: pages ranked by a bound on what any of their keys can score.

Source: Quest, arXiv 2406.10774: with M and m the largest and least key of a page, channel by
channel, no key of it scores more than the sum over channels of max(q M, q m).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import (
    at_least,
    budget,
    counts,
    products,
    spans,
    top,
    top_of_rows,
    working,
)
from cpbench.selectors.common.selection import Blocks

if TYPE_CHECKING:
    import torch

OPERATORS = (
    OperatorInfo(
        name="quest",
        summary="pages by the bound on their keys' scores, the queries' own page always",
        source="Quest, arXiv 2406.10774",
        load="cpbench.selectors.quest:Quest",
        params=("block_size", "block_q", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,block_q=32,keep=0.3", "block_size=16,block_q=1,keep=0.3"),
        selects=True,
        looks_ahead="block",
    ),
)


class Quest(Selecting):
    """Of a block of queries a page counts what it counts to the query that wants it most.

    Quest is a method for decoding: ``block_q`` 1 is the method itself, for every query.

    Args:
        block_size: keys of a page.
        block_q: queries that share their pages.
        keep: share of the visible pages to keep; 0 keeps ``top_k``.
        top_k: pages to keep, where ``keep`` is 0.
        kernel: see :class:`Selecting`.
    """

    name = "quest"

    def __init__(
        self,
        block_size: int = 64,
        block_q: int = 64,
        top_k: int = 16,
        keep: float = 0.1,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size, block_q=block_q)
        budget(self.name, top_k, keep)
        self.block_size, self.block_q, self.top_k, self.keep = block_size, block_q, top_k, keep
        self.forms = ("rows" if block_q == 1 else "blocks",)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        cells = plan.cells(self.block_q, self.block_size)
        pages = working(k)
        missing = -k.shape[1] % self.block_size
        if missing:  # the last key once more: it changes neither bound
            pages = torch.cat([pages, pages[:, -1:].expand(-1, missing, -1, -1)], 1)
        pages = pages.unflatten(1, (-1, self.block_size))
        high, low = pages.amax(2), pages.amin(2)
        wanted = counts(cells.visible, self.top_k, self.keep)

        def bounds(begin: int, end: int) -> torch.Tensor:
            some = working(q[:, begin:end])
            return products(some.clamp(min=0), high).add_(products(some.clamp(max=0), low))

        if self.block_q == 1:
            shape = (len(q), q.shape[2])
            kept = top_of_rows(bounds, shape, wanted, cells, always=cells.own)
            return (Branch(seen=Blocks(cells, kept)),)
        found = []
        width = len(q) * q.shape[2] * high.shape[1]
        for begin, end in spans(q.shape[1], width, q.device, self.block_q):
            short = -(end - begin) % self.block_q
            bound = torch.nn.functional.pad(bounds(begin, end), (0, 0, 0, short), value=-torch.inf)
            found.append(bound.unflatten(2, (-1, self.block_q)).amax(3))
        kept = top(torch.cat(found, 2), wanted, cells, always=cells.own)
        return (Branch(seen=Blocks(cells, kept)),)
