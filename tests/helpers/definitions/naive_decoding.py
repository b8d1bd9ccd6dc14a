"""Decoding as plain loops in float64, and masks of caches whose pages lie where a test wants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cpbench.masks.attn_mask import AttnMask


def naive_decode(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[B, H, Dv]`` and lse ``[B, H]`` of one query per sequence.

    Args:
        q: ``[B, H, D]``.
        keys, values: by sequence, ``[L, G, D]``.
        window: last tokens that are seen; 0 for all.
    """
    out = torch.zeros((*q.shape[:2], values[0].shape[2]), dtype=torch.float64)
    lse = torch.zeros(q.shape[:2], dtype=torch.float64)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        seen = range(max(len(k) - window, 0) if window else 0, len(k))
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            scores = [float(q[b, h].double() @ k[t, g].double()) / q.shape[2] ** 0.5 for t in seen]
            largest = max(scores)
            total = sum(math.exp(score - largest) for score in scores)
            lse[b, h] = largest + math.log(total)
            for t, score in zip(seen, scores, strict=True):
                out[b, h] += math.exp(score - largest) / total * v[t, g].double()
    return out, lse


def into_pages(
    sequences: Sequence[torch.Tensor], page_size: int, order: np.ndarray
) -> tuple[torch.Tensor, AttnMask]:
    """A cache ``[1, slots, G, D]`` of garbage around the keys of sequences, and its mask.

    Args:
        order: the pages of all sequences, one after another.
    """
    cache = torch.full((1, len(order) * page_size, *sequences[0].shape[1:]), 1e4)
    cache = cache.to(sequences[0].dtype)
    rows, at = [], 0
    for b, x in enumerate(sequences):
        for start in range(0, len(x), page_size):
            own, first = x[start : start + page_size], int(order[at]) * page_size
            cache[0, first : first + len(own)] = own
            last = first + len(own)
            rows.append((b, b + 1, first, last, first - b, last - 1 - b))
            at += 1
    return cache, AttnMask.from_slices(len(sequences), cache.shape[1], rows)
