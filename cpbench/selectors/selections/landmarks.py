"""Selections of blocks of keys that their landmarks weight, and their grouped softmax.

The last key of a block is its landmark.  The probability of a landmark goes to its block, within
which a softmax of its own divides it among the other keys (Landmark Attention, arXiv 2305.16300).
That is one softmax over all selected keys, if to the score of each is added the score of its
landmark minus the log-sum-exp of its block: :func:`weighted_scores`.

Legend: B batch, H query heads, T keys; w keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.selectors.selections.blocks import Blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class LandmarkBlocks(Blocks):
    """A selection of whole blocks of keys per query, weighted by their landmarks, which the mask of
    its grid hides."""

    @property
    def kind(self) -> str:
        return "landmarks"

    def dense_blocks(self, begin: int, end: int) -> torch.Tensor:
        """``[B, H, end - begin, T]`` booleans: the keys of the blocks that queries ``[begin, end)``
        selected, with their landmarks."""
        kept = self.kept[:, :, begin:end] & self.grid.allowed[begin:end]
        return kept.repeat_interleave(self.grid.block_k, 3)[..., : self.seq_k]


def weighted_scores(scores_w: torch.Tensor) -> torch.Tensor:
    """Scores ``[…, w]`` of blocks as those of one softmax over all blocks; that of the landmark,
    the last one, is -inf.  Overwrites them.

    A block whose scores are all -inf is not selected, and stays as it is.
    """
    import torch

    landmark = scores_w[..., -1:].clone()
    scores_w[..., -1] = -torch.inf
    lse = torch.logsumexp(scores_w, -1, True)
    return scores_w.add_(landmark.sub_(lse.masked_fill_(lse == -torch.inf, 0.0)))


def score_gradients(dscores_w: torch.Tensor, probs_w: torch.Tensor) -> torch.Tensor:
    """Gradients of scores, landmarks included, from those of their weighted scores.  Overwrites
    them.

    Args:
        dscores_w, probs_w: ``[…, w]``: gradients, and probabilities within all blocks.
    """
    import torch

    total = dscores_w.sum(-1, True)
    within = probs_w / probs_w.sum(-1, True).clamp_(min=torch.finfo(probs_w.dtype).tiny)
    dscores_w.sub_(within.mul_(total))
    dscores_w[..., -1] = total[..., 0]
    return dscores_w
