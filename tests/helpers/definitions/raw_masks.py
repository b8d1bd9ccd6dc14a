"""Masks written as raw slices, for tests of operators that compute any mask."""

from __future__ import annotations

from cpbench.masks.attn_mask import AttnMask

Slices = list[tuple[int, int, int, int, int, int]]


FAR = 10**6


def documents(*ends: int, causal: bool = True) -> Slices:
    hi = 0 if causal else FAR
    return [(a, b, a, b, -FAR, hi) for a, b in zip((0, *ends), ends, strict=False)]


MASKS: dict[str, tuple[int, int, Slices]] = {
    "causal": (300, 300, [(0, 300, 0, 300, -FAR, 0)]),
    "full": (65, 130, [(0, 65, 0, 130, -FAR, FAR)]),
    "bottom_right": (70, 1500, [(0, 70, 0, 1500, -FAR, 1430)]),
    "continued": (300, 900, [(0, 300, 0, 900, -FAR, 600)]),
    "continued_beside_others": (
        600, 1000, [(0, 300, 0, 1000, -FAR, 500), (300, 600, 500, 1000, -FAR, 400)]
    ),
    "wide": (140, 2600, [(0, 140, 0, 2600, -FAR, 2460)]),
    "window": (450, 450, [(0, 450, 0, 450, -256, 0)]),
    "narrow_two_sided": (333, 333, [(0, 333, 0, 333, -3, 2)]),
    "wide_two_sided": (333, 333, [(0, 333, 0, 333, -100, 140)]),
    "documents": (500, 500, documents(1, 2, 129, 130, 193, 500)),
    "tiny_documents": (150, 150, documents(1, 2, 5, 9, 10, 17, 20, 31, 33, 40, 41, 90, 97, 150)),
    "full_documents": (140, 140, documents(3, 70, 71, 140, causal=False)),
    "prefix": (260, 260, [(0, 260, 0, 50, -FAR, FAR), (0, 260, 50, 260, -FAR, 0)]),
    "sinks_window": (400, 400, [(0, 400, 0, 4, -FAR, 0), (0, 400, 4, 400, -64, 0)]),
    "global_window": (
        300,
        300,
        [(0, 9, 0, 300, -FAR, FAR), (9, 300, 0, 9, -FAR, FAR), (9, 300, 9, 300, -40, 40)],
    ),
    "empty_rows": (200, 150, [(10, 50, 0, 60, -FAR, 0), (55, 60, 3, 4, -FAR, FAR),
                              (70, 150, 40, 100, -20, 20)]),
    "empty_rows_in_tile": (40, 40, [*documents(5, 9), (15, 21, 0, 3, -FAR, FAR)]),
    "crossing_bands": (200, 200, [(0, 200, 0, 200, d, d + 2) for d in (-80, -30, -3)]),
    "one_pair": (1, 1, [(0, 1, 0, 1, 0, 0)]),
    "empty": (20, 30, []),
}  # fmt: skip


def mask_of(name: str) -> AttnMask:
    return AttnMask.from_slices(*MASKS[name])
