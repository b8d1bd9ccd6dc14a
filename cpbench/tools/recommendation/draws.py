"""Draws of a mask with random documents: its seeds, or a file of lengths in other orders."""

from __future__ import annotations

from cpbench import masks
from cpbench.core.spec import Spec
from cpbench.masks import documents

FIXED = ("seed", "doc_lens")  # parameters that leave nothing to draw


def draw_masks(mask: Spec, seq_len: int, count: int) -> list[Spec]:
    """Masks that stand for others of their kind; the mask itself if it is not random.

    Args:
        count: of draws.

    Raises:
        ValueError: for a file that cannot be read, or no draws.
    """
    if count < 1:
        raise ValueError(f"--draws {count} must be 1 or more")
    given, takes = mask.kwargs, masks.pattern_info(mask).params
    if any(name in given for name in FIXED):
        return [mask]
    if "file" in given:
        rest = {key: value for key, value in given.items() if key not in ("file", "column")}
        file, column = str(given["file"]), given.get("column")
        orders = (
            documents.from_file(seq_len, file, str(column) if column else None, shuffle)
            for shuffle in range(count)
        )
        return [Spec.of(mask.name, **rest, doc_lens=tuple(lens.tolist())) for lens in orders]
    if "seed" in takes:
        return [Spec.of(mask.name, **given, seed=seed) for seed in range(count)]
    return [mask]
