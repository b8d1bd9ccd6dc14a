"""Pictures of masks: the exact visible share of each cell of a coarse grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpbench.core.spec import format_size
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.tiling import tiles

MAX_CELLS = 512  # along a side of a picture
THUMBNAIL_CELLS = 64
SHADES = ["#8dbbe0", "#3f83bd", "#0b3c6f"]
LINE_CELLS = 3  # width of a line that is thinner than a cell, such as a few sinks
MARGIN = 0.012  # of the extent, so that the first tokens do not lie below the axis


def draw(mask: AttnMask, path: str | Path, title: str = "") -> None:
    """Write a PNG of a mask, with keys to the right and queries downward.

    A cell is a square of tokens, and there are at most 512 x 512 cells, so a million tokens are
    drawn as fast as a thousand.  White cells have no visible pair; the shade of the others is
    their exact share of visible pairs.  Lines of a single cell are drawn wider: a few sinks among a
    million tokens would not be seen.

    Args:
        mask: any mask with at least one query and one key.
        path: file to write; its folder must exist.
        title: first line above the picture; area and density are the second.

    Raises:
        ValueError: for a mask without queries or keys.
        OSError: if ``path`` cannot be written.
    """
    # Figure and canvas without pyplot, which keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    share, cell = _shares(mask, MAX_CELLS)
    share = _widen_lines(share) if cell > 1 else share
    # Square tokens, unless the picture would be too narrow.
    aspect = min(max(mask.seq_q / mask.seq_k, 0.2), 3.0)
    figure = Figure(figsize=(6.0, 4.6 * aspect + 1.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("mask", SHADES)
    image = axes.imshow(
        np.ma.masked_equal(share, 0),
        cmap=colours,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        extent=(0, share.shape[1] * cell, share.shape[0] * cell, 0),
        aspect="equal" if aspect == mask.seq_q / mask.seq_k else "auto",
        interpolation="nearest",
    )
    right, bottom = MARGIN * mask.seq_k, MARGIN * mask.seq_q
    axes.set_xlim(-right, mask.seq_k + right)
    axes.set_ylim(mask.seq_q + bottom, -bottom)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for axis, extent in ((axes.xaxis, mask.seq_k), (axes.yaxis, mask.seq_q)):
        ticks = _ticks(extent)
        axis.set_ticks(ticks, [format_size(tick) for tick in ticks])
    summary = f"{mask.area:,} visible pairs, density {mask.density:.3%}"
    figure.suptitle("\n".join(filter(None, [title, summary])), fontsize=10)
    if cell > 1:  # otherwise cells are either white or full
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=[0, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(["0", "10 %", "25 %", "50 %", "100 %"])
        bar.set_label(f"visible share\nof {cell:,} x {cell:,} tokens", fontsize=8)
    figure.savefig(path, format="png")


def thumbnail(mask: AttnMask) -> bytes:
    """A small PNG of a mask without axes: one pixel per cell, transparent without visible pairs.

    Raises:
        ValueError: for a mask without queries or keys.
    """
    import io

    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.image import imsave

    share, _ = _shares(mask, THUMBNAIL_CELLS)
    pixels = LinearSegmentedColormap.from_list("mask", SHADES)(np.sqrt(share))
    pixels[..., 3] = share > 0
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def _shares(mask: AttnMask, cells: int) -> tuple[np.ndarray, int]:
    """The visible share of each cell of a grid, at most ``cells`` along a side.

    Returns:
        ``(rows, columns)`` shares, and the tokens along a side of a cell.
    """
    if mask.seq_q < 1 or mask.seq_k < 1:
        raise ValueError(f"a mask of {mask.seq_q} x {mask.seq_k} tokens has nothing to draw")
    cell = -(-max(mask.seq_q, mask.seq_k) // cells)
    visible = tiles(mask, cell, cell).to_dense()
    heights = np.minimum(cell, mask.seq_q - cell * np.arange(visible.shape[0]))
    widths = np.minimum(cell, mask.seq_k - cell * np.arange(visible.shape[1]))
    return visible / (heights[:, None] * widths[None, :]), cell


def _widen_lines(share: np.ndarray) -> np.ndarray:
    """The shares with lines of single cells widened to ``LINE_CELLS``, into empty cells."""
    widened = share
    for axis in (1, 0):
        drawn = np.moveaxis(widened, axis, -1) > 0
        padded = np.pad(drawn, ((0, 0), (1, LINE_CELLS)))
        alone = drawn & ~padded[:, : drawn.shape[1]]
        for step in range(1, LINE_CELLS + 1):
            alone &= ~padded[:, 1 + step : 1 + step + drawn.shape[1]]
        # A line, not a step of a diagonal: the next cell along it is alone, too.
        alone &= np.pad(alone, ((1, 0), (0, 0)))[:-1] | np.pad(alone, ((0, 1), (0, 0)))[1:]
        target = np.moveaxis(widened.copy(), axis, -1)
        for step in range(1, LINE_CELLS):
            source = np.moveaxis(widened, axis, -1)
            moved = np.where(alone, source, 0)[:, :-step]
            target[:, step:] = np.maximum(target[:, step:], moved)
        widened = np.moveaxis(target, -1, axis)
    return widened


def _ticks(extent: int) -> list[int]:
    """Three to five ticks, at multiples of a power of two."""
    step = 1 << ((extent - 1) // 4).bit_length()
    return list(range(0, extent + 1, step))
