"""What the offloaded strategies have in common: their option, and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.masks.dilated_mask import DilatedMask

if TYPE_CHECKING:
    from cpbench.parallel.world import World

DEFAULT_CHUNK = 1 << 14


class Offloaded:
    """Base of strategies whose tensors are in host memory.

    Args:
        chunk: tokens of a rank that are on the device at a time.
    """

    name: str  # of the strategy, for messages

    def __init__(self, chunk: int = DEFAULT_CHUNK) -> None:
        if chunk < 1:
            raise ValueError(f"{self.name}: chunk = {chunk} must be 1 token or more")
        self.chunk = chunk

    def unsupported(self, world: World) -> str | None:
        if isinstance(world.mask, DilatedMask):
            return f"{self.name}: offload=host cuts masks into chunks, which a dilated one is not"
        return None
