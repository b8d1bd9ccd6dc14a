"""Recordings of the representatives of a case, kept on disk by content.

The key of a recording is a hash of the code that makes it, the problem, the mask, the layout, the
strategy and the tile sizes.  A file that cannot be read or written is no error: it is recorded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpbench.simulator.events import Copy, Event, Kernel, Mix, Post, Program, SideWork, Wait
from cpbench.simulator.tiles import TileCounts, Tiling

if TYPE_CHECKING:
    from cpbench.core.problem import Case
    from cpbench.parallel.world import World

T = TypeVar("T")
PACKAGE = Path(__file__).parents[1]
CODE = ("core", "kernels/mixers", "masks", "parallel", "simulator", "strategies")
_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Kernel, Mix, SideWork, Post, Copy, Wait)
}


def cache_folder() -> Path:
    """Where recordings are kept: ``$XDG_CACHE_HOME/cpbench/recordings``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cpbench" / "recordings"


@functools.cache
def code_hash() -> str:
    """Hash of the source of everything that recordings depend on."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def content_key(case: Case, world: World, tiling: Tiling, rank: int) -> str:
    """The key of the recording of one rank."""
    content = {
        "code": code_hash(),
        "files": case.content,
        "problem": asdict(world.problem),
        "strategy": str(case.strategy),
        "operator": str(case.operator),
        "mask": world.shared_mask.digest,
        "layouts": [
            [x.seq_len, x.world_size, x.step, hashlib.sha256(x.segments.tobytes()).hexdigest()]
            for x in (world.queries, world.keys)
        ],
        "nodes": [world.ranks_per_node, world.placement],
        "tiling": asdict(tiling),
        "rank": rank,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached(key: str, record: Callable[[], dict[str, Program]]) -> dict[str, Program]:
    """The recording of that key: from disk, else recorded and kept."""
    return cached_value(key, record, _to_json, _from_json)


def cached_value(
    key: str, make: Callable[[], T], encode: Callable[[T], Any], decode: Callable[[Any], T]
) -> T:
    """The value of that key: from disk, else made and kept.

    Args:
        encode, decode: to and from plain values.
    """
    path = cache_folder() / f"{key}.json"
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(encode(value)), encoding="utf-8")
        partial.replace(path)
    except OSError:
        pass
    return value


def _to_json(programs: dict[str, Program]) -> dict[str, Any]:
    return {
        phase: [[type(event).__name__, *_values(event)] for event in program]
        for phase, program in programs.items()
    }


def _values(event: Event) -> list[Any]:
    values = [getattr(event, item.name) for item in fields(event)]
    return [list(asdict(x).values()) if isinstance(x, TileCounts) else x for x in values]


def _from_json(data: dict[str, Any]) -> dict[str, Program]:
    return {phase: tuple(_event(*row) for row in rows) for phase, rows in data.items()}


def _event(kind: str, *values: Any) -> Event:
    if kind == "Kernel":
        phase, tiles, *sizes = values
        return Kernel(phase, TileCounts(*tiles), *sizes)
    if kind == "Post":
        number, operation, members, lane, sends, receives = values
        rows = [tuple((peer, nbytes) for peer, nbytes in side) for side in (sends, receives)]
        return Post(number, operation, tuple(members), lane, *rows)
    if kind == "Copy":
        number, to_device, nbytes, pieces, after = values
        return Copy(number, to_device, nbytes, pieces, tuple(after))
    event: Event = _KINDS[kind](*values)
    return event
