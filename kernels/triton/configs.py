"""Compile-time configurations of the Triton kernels: tile sizes, warps and stages, by target.

The table comes from ahead-of-time compilation (``cpbench compile``): the largest tiles that do not
spill if that is possible, fit the target's shared and tensor memory, and use its matrix
instruction.  ``cpbench tune`` measures on a GPU which configuration is fastest there, and writes a
file that overrides this table.
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
    """The compile-time configuration of one kernel.

    Attributes:
        rows, cols: of a tile of scores; a program computes one tile of rows and loops over tiles of
            columns (for ``backward_dkv`` rows are keys).
        num_warps, num_stages: options of Triton.
        descriptors: 1 to load the tiles of the loop through tensor descriptors (the copy engine of
            Hopper and Blackwell), 0 through pointers.
        launches: 2 to compute dK and dV in a launch each, whose sums fit in the registers up to
            head_dim 256, for a fifth matrix product; of ``backward_dkv`` only.
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    descriptors: int = 0
    launches: int = 1

    def __str__(self) -> str:
        copies = " tma" if self.descriptors else ""
        each = " each" if self.launches == 2 else ""
        return f"{self.rows}x{self.cols} w{self.num_warps} s{self.num_stages}{copies}{each}"


INTERPRETER_CONFIG = Config(128, 64, 4, 1)

# By target and largest head_dim: forward, backward_dq, backward_dkv, for elements of two bytes.  No
# loop with matrix instructions spills, and no two warps compute the same (``cpbench compile``): on
# Ampere and Hopper a warp has 16 rows, and four share an own matrix instruction of Hopper.  Warp
# specialization is not requested: in loops over lists Triton 3.7 fails to compile it, or ignores
# it.
_CONFIGS_2_BYTES: dict[str, dict[int, tuple[Config, Config, Config]]] = {
    "cuda:80": {
        64: (Config(128, 128, 8, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
        96: (Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 3)),
        192: (Config(128, 32, 8, 2), Config(64, 16, 4, 2), Config(64, 16, 4, 2, launches=2)),
        256: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(64, 32, 4, 2, launches=2)),
    },
    "cuda:86": {  # less shared memory than sm_80
        64: (Config(128, 128, 8, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
        96: (Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        128: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 3)),
        192: (Config(64, 32, 4, 1), Config(32, 16, 2, 2), Config(32, 16, 2, 2, launches=2)),
        256: (Config(64, 32, 4, 2), Config(32, 16, 2, 2), Config(32, 16, 2, 2, launches=2)),
    },
    "cuda:90": {
        64: (Config(128, 128, 8, 3, 1), Config(128, 128, 8, 3, 1), Config(128, 128, 8, 2, 1)),
        96: (Config(128, 128, 8, 3, 1), Config(128, 128, 8, 2, 1), Config(128, 64, 8, 3, 1)),
        128: (Config(128, 128, 8, 3, 1), Config(128, 128, 8, 2, 1), Config(128, 64, 8, 3, 1)),
        192: (Config(128, 64, 8, 3, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1, 2)),
        256: (Config(128, 64, 8, 2, 1), Config(128, 32, 8, 2, 1), Config(128, 32, 8, 2, 1, 2)),
    },
    "cuda:100": {
        64: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1)),
        96: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1)),
        128: (Config(128, 128, 8, 2, 1), Config(128, 64, 8, 2, 1), Config(128, 64, 8, 2, 1)),
        192: (Config(128, 64, 8, 2, 1), Config(64, 64, 8, 2, 1), Config(64, 32, 8, 2, 1, 2)),
        256: (Config(64, 64, 8, 2, 1), Config(128, 32, 8, 1, 1), Config(64, 64, 8, 1, 1, 2)),
    },
    "hip:gfx942": {
        64: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 32, 4, 1)),
        256: (Config(64, 32, 4, 1), Config(32, 32, 2, 1), Config(32, 32, 2, 1)),
    },
}


# With lists per head some kernels take more registers.
_PER_HEAD = {
    ("cuda:80", 128): {"forward": Config(64, 64, 4, 3)},
    ("cuda:80", 192): {"forward": Config(64, 32, 4, 1)},
    ("cuda:80", 256): {"backward_dq": Config(64, 32, 4, 1)},
    ("cuda:100", 256): {
        "forward": Config(64, 32, 4, 2, 1), "backward_dkv": Config(64, 32, 8, 1, 1, 2)
    },
}  # fmt: skip


def head_parts(head_dim: int) -> tuple[int, int]:
    """The parts of a head dimension in the kernels: one power of two (and 0) or two, from 16 on,
    whichever pads less; 192 is 128 and 64, 80 is 64 and 16, and 112 is 128."""
    whole = _power_of_two(head_dim)
    if whole == 16:
        return 16, 0
    rest = _power_of_two(head_dim - whole // 2)
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


def _power_of_two(number: int) -> int:
    """The least power of two of at least ``number`` and 16."""
    return max(16, 1 << (number - 1).bit_length())


def padded_head_dim(head_dim: int) -> int:
    """``head_dim`` padded to the sum of its parts."""
    return sum(head_parts(head_dim))


def head_constants(head_dim: int, head_dim_v: int) -> dict[str, int]:
    """The constants of the kernels for the head dimensions of queries and keys, and of values."""
    (d0, d1), (v0, v1) = head_parts(head_dim), head_parts(head_dim_v)
    return {
        "D0": d0, "D1": d1, "HEAD_DIM": head_dim, "V0": v0, "V1": v1, "HEAD_DIM_V": head_dim_v,
    }  # fmt: skip


def kernel_configs(
    target: str, head_dim: int, item_bytes: int, per_head: bool = False, gpu: str = ""
) -> dict[str, Config]:
    """The configuration of each kernel, by name.

    Args:
        target: such as ``"cuda:90"``; one without a table uses that of the newest older target.
        item_bytes: bytes per element.
        per_head: with lists per head.
        gpu: name of the device, to use its tuned configurations; empty for the table alone.

    Raises:
        ValueError: if the file of ``cpbench tune`` cannot be read.
    """
    if target == "interpreter":
        configs = dict.fromkeys(KERNELS, INTERPRETER_CONFIG)
    else:
        by_dim = _CONFIGS_2_BYTES[_table_target(target)]
        key = (_table_target(target), min(dim for dim in by_dim if dim >= head_dim))
        configs = dict(zip(KERNELS, by_dim[key[1]], strict=True))
        if per_head:
            configs |= _PER_HEAD.get(key, {})
        if item_bytes > 2:  # a tile takes twice the memory
            configs = {name: _halved(config) for name, config in configs.items()}
    if gpu:
        configs |= tuned_configs().get(problem_class(gpu, head_dim, item_bytes, per_head), {})
    return configs


def target_refusal(target: str, head_dim: int, item_bytes: int) -> str | None:
    """Why these kernels do not run on a target, to follow an operator's name; None if they do."""
    family, _, number = target.partition(":")
    if family == "cuda" and int(number) < 80:
        return f"needs compute capability 8.0 or more, not {int(number) / 10:.1f}"
    if family == "hip" and number not in ("gfx942", "gfx950"):
        return f"is for gfx942 and gfx950, not {number}"
    small = family == "cuda" and _table_target(target) in ("cuda:80", "cuda:86")
    if small and item_bytes > 2 and padded_head_dim(head_dim) > 128:
        return f"takes float32 up to head_dim 128 on sm_{number}: its shared memory is too small"
    return None


def problem_class(gpu: str, head_dim: int, item_bytes: int, per_head: bool) -> str:
    """The key of tuned configurations in their file: problems that are tuned together."""
    lists = "lists of heads" if per_head else "one list"
    return f"{gpu}, head_dim {padded_head_dim(head_dim)}, {item_bytes} bytes, {lists}"


def _halved(config: Config) -> Config:
    rows = max(config.rows // 2, 32)
    warps = min(config.num_warps, rows // 16)
    cols = min(config.cols, max(config.cols // 2, 32))
    return Config(rows, cols, warps, 1, launches=config.launches)


def _table_target(target: str) -> str:
    """The target in the table to use: the same, or the newest older one of its kind.

    sm_86, 89 and 120 are of one kind, with less shared memory than sm_80, 90 and 100.
    """
    family, _, number = target.partition(":")
    if family == "hip":
        return "hip:gfx942"
    if 90 <= int(number) < 120:
        return "cuda:90" if int(number) < 100 else "cuda:100"
    return "cuda:80" if int(number) < 86 else "cuda:86"


def cache_file() -> Path:
    """The file of configurations that ``cpbench tune`` writes."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "cpbench" / "tuned.json"


def tuned_configs() -> dict[str, dict[str, Config]]:
    """Tuned configurations by problem class and kernel; empty without a file.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        path = cache_file()
        changed_ns = path.stat().st_mtime_ns
    except (OSError, RuntimeError):  # no file, or no home to have one in
        return {}
    return _read_tuned(path, changed_ns)


@functools.lru_cache(maxsize=4)
def _read_tuned(path: Path, changed_ns: int) -> dict[str, dict[str, Config]]:
    try:
        table = json.loads(path.read_text("utf-8"))
        return {
            key: {name: Config(**config) for name, config in kernels.items()}
            for key, kernels in table.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid file of cpbench tune ({error}): delete it, or tune again"
        ) from error
