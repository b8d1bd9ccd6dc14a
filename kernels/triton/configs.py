"""How each kernel of `triton_band` is compiled: tile extents, warps and stages, by target.

The table comes from ahead-of-time compilation (``cpbench compile``): the largest tiles that spill
nothing where that is possible, that fit the target's shared and tensor memory, and that use its
matrix instruction.  What only a GPU can tell is which of the admitted ones is fastest there;
``cpbench tune`` measures that and writes a file that goes before this table.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

KERNELS = ("forward", "backward_dq", "backward_dkv")


@dataclass(frozen=True)
class Config:
    """Of one kernel.

    Attributes:
        rows, cols: of a tile of scores; rows stay with a program, columns pass by (for
            ``backward_dkv`` rows are keys).
        num_warps, num_stages: as Triton takes them.
        descriptors: 1 to read passing tiles through tensor descriptors (Hopper's and Blackwell's
            copy engine), 0 through addresses.
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    descriptors: int = 0

    def __str__(self) -> str:
        copies = " tma" if self.descriptors else ""
        return f"{self.rows}x{self.cols} w{self.num_warps} s{self.num_stages}{copies}"


INTERPRETED = Config(128, 64, 4, 1)

# By head_dim, padded to a power of two: forward, backward_dq, backward_dkv, for elements of
# two bytes.  Up to head_dim 128 none of them spills.  dK/dV at head_dim 256 fits only in tiles too
# small for Hopper's and Blackwell's own matrix instructions.  Warp specialization is not asked for:
# Triton 3.7 fails to compile it, or ignores it, in loops over lists.
_HALF: dict[str, dict[int, tuple[Config, Config, Config]]] = {
    "cuda:80": {
        64: (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 32, 4, 3)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
        256: (Config(64, 64, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 4, 2)),
    },
    "cuda:86": {  # less shared memory than sm_80
        64: (Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 32, 4, 3)),
        128: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2)),
        256: (Config(64, 32, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 4, 2)),
    },
    "cuda:90": {
        64: (Config(128, 128, 8, 3, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1)),
        128: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(64, 64, 8, 2, 1)),
        256: (Config(128, 64, 8, 2, 1), Config(64, 64, 8, 2, 1), Config(32, 32, 4, 2)),
    },
    "cuda:100": {
        64: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1)),
        128: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(64, 64, 8, 2, 1)),
        256: (Config(64, 64, 8, 2, 1), Config(64, 64, 8, 2, 1), Config(32, 32, 4, 2, 1)),
    },
    "hip:gfx942": {
        64: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        256: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    },
}


# With lists for each head the forward pass takes more registers on Ampere.
_FORWARD_PER_HEAD = {("cuda:80", 64): Config(128, 64, 8, 3), ("cuda:80", 128): Config(64, 64, 4, 3)}


def padded_head_dim(head_dim: int) -> int:
    """``head_dim`` padded to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose(
    target: str, head_dim: int, item_bytes: int, per_head: bool = False, gpu: str = ""
) -> dict[str, Config]:
    """The configuration of each kernel.

    Args:
        target: such as ``"cuda:90"``; one without a table takes that of the newest older one.
        item_bytes: of an element.
        per_head: with lists for each head.
        gpu: name of the device, for what was tuned on it; none for the table alone.

    Raises:
        ValueError: for a file of ``cpbench tune`` that cannot be read.
    """
    if target == "interpreter":
        found = dict.fromkeys(KERNELS, INTERPRETED)
    else:
        key = (_known(target), max(padded_head_dim(head_dim), 64))
        found = dict(zip(KERNELS, _HALF[key[0]][key[1]], strict=True))
        if per_head and key in _FORWARD_PER_HEAD:
            found["forward"] = _FORWARD_PER_HEAD[key]
        if item_bytes > 2:  # twice the memory a tile
            found = {name: _smaller(config) for name, config in found.items()}
    if gpu:
        found |= tuned().get(problem_class(gpu, head_dim, item_bytes, per_head), {})
    return found


def unserved(target: str, head_dim: int, item_bytes: int) -> str | None:
    """What a target lacks for these kernels, in words, or None."""
    family, _, number = target.partition(":")
    if family == "cuda" and int(number) < 80:
        return f"needs compute capability 8.0 or more, not {int(number) / 10:.1f}"
    if family == "hip" and number not in ("gfx942", "gfx950"):
        return f"is for gfx942 and gfx950, not {number}"
    small = family == "cuda" and _known(target) in ("cuda:80", "cuda:86")
    if small and item_bytes > 2 and padded_head_dim(head_dim) > 128:
        return f"takes float32 up to head_dim 128 on sm_{number}: its shared memory is too small"
    return None


def problem_class(gpu: str, head_dim: int, item_bytes: int, per_head: bool) -> str:
    """What is tuned together, as the key of the file."""
    lists = "lists of heads" if per_head else "one list"
    return f"{gpu}, head_dim {padded_head_dim(head_dim)}, {item_bytes} bytes, {lists}"


def _smaller(config: Config) -> Config:
    return Config(max(config.rows // 2, 32), max(config.cols // 2, 32), config.num_warps, 1)


def _known(target: str) -> str:
    """The target of the table that serves: itself, or the newest older one of its kind.

    sm_86, 89 and 120 are of one kind, with less shared memory than their neighbours.
    """
    family, _, number = target.partition(":")
    if family == "hip":
        return "hip:gfx942"
    if 90 <= int(number) < 120:
        return "cuda:90" if int(number) < 100 else "cuda:100"
    return "cuda:80" if int(number) < 86 else "cuda:86"


def cache_file() -> Path:
    """Where ``cpbench tune`` keeps what it measured."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "cpbench" / "tuned.json"


def tuned() -> dict[str, dict[str, Config]]:
    """What was tuned here, by problem class and kernel.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        path = cache_file()
        changed_ns = path.stat().st_mtime_ns
    except (OSError, RuntimeError):  # no file, or no home to have one in
        return {}
    return _read(path, changed_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> dict[str, dict[str, Config]]:
    try:
        table = json.loads(path.read_text())
        return {
            key: {name: Config(**config) for name, config in kernels.items()}
            for key, kernels in table.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what cpbench tune wrote ({error}): delete it, or tune again"
        ) from error
