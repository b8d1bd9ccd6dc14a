"""The solver of the layout ``dispatch``: equal token counts and nearly equal areas per rank, with
few keys to send.

Connected blocks of the mask (documents) are short, if they fit on a rank by tokens and by area, or
long.  Long ones are spread over as few ranks as possible (``long_blocks``).  Where every block has
room on a rank, an assignment of whole ones is tried first (``whole_blocks``): if it is balanced and
sends fewer keys, it is taken.
"""

from __future__ import annotations

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import IntArray
from cpbench.parallel.dispatch_solver.long_blocks import assign_long
from cpbench.parallel.dispatch_solver.tokens import TokenBlocks, merge_adjacent
from cpbench.parallel.dispatch_solver.whole_blocks import assign_whole


def assign_tokens(mask: AttnMask, ranks: int) -> IntArray:
    """Assign tokens to ranks: ``(n, 3)`` segments (rank, start, length), sorted.

    Every rank gets ``ceil(S / P)`` tokens; positions from S on are padding.
    """
    blocks = TokenBlocks(mask, ranks)
    assigned, whole = assign_long(blocks), assign_whole(blocks)
    if whole is not None:
        assigned = min(assigned, whole, key=blocks.keys_sent)
    rows = [(rank, *run) for rank, runs in enumerate(assigned) for run in merge_adjacent(runs)]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
