"""Recordings of the representatives of a case, kept on disk by content.

The key of a recording is a hash of the code that makes it, the problem, the mask, the layout, the
strategy and the tile sizes.  A file that cannot be read or written is no error: it is recorded.
Those used last are kept, up to ``MOST_BYTES``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpbench.simulator.events import Copy, Event, Kernel, Mix, Post, Program, SideWork, Wait
from cpbench.simulator.tiles import TileCounts, Tiling

if TYPE_CHECKING:
    from cpbench.core.problem import Case
    from cpbench.parallel.world import World

T = TypeVar("T")
MOST_BYTES = 256 << 20  # on disk
TRIM_BYTES = 16 << 20  # written by a process, after which it looks whether they are more
PACKAGE = Path(__file__).parents[1]
CODE = ("core", "kernels/mixers", "masks", "parallel", "simulator", "strategies")
_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Kernel, Mix, SideWork, Post, Copy, Wait)
}
_VALUES = {
    kind: attrgetter("__class__.__name__", *(item.name for item in fields(kind)))
    for kind in _KINDS.values()
}
_TILES = attrgetter(*(item.name for item in fields(TileCounts)))


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
    return hashlib.sha256(f"{_content(case, world, tiling)}, rank {rank}".encode()).hexdigest()


@functools.lru_cache(maxsize=4)  # shared by all ranks
def _content(case: Case, world: World, tiling: Tiling) -> str:
    """A text that names all that the recordings of a case depend on."""
    content = {
        "code": [code_hash(), version("torch")],
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
    }
    return json.dumps(content, sort_keys=True)


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
    path = cache_folder() / f"{key}.json.z"
    try:
        value = decode(json.loads(zlib.decompress(path.read_bytes())))
    except (OSError, ValueError, KeyError, IndexError, TypeError, zlib.error):
        pass
    else:
        with suppress(OSError):
            os.utime(path)
        return value
    value = make()
    data = zlib.compress(json.dumps(encode(value), default=_TILES).encode(), level=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(data)
        partial.replace(path)
        _trim_after(len(data))
    except OSError:
        pass
    return value


_unchecked = TRIM_BYTES  # bytes written since the last look; a process begins with one


def _trim_after(nbytes: int) -> None:
    """Remove the files that were used longest ago, if all are more than ``MOST_BYTES``; from time
    to time.  Others that do so at the same time, or read what is removed, are not disturbed."""
    global _unchecked
    _unchecked += nbytes
    if _unchecked < TRIM_BYTES:
        return
    _unchecked = 0
    files = []
    for path in cache_folder().glob("*.*"):
        with suppress(OSError):
            files.append((path, path.stat()))
    files.sort(key=lambda file: file[1].st_mtime_ns, reverse=True)
    sizes = itertools.accumulate(stat.st_size for _, stat in files)
    for (path, _), total in zip(files, sizes, strict=True):
        if total > MOST_BYTES:
            with suppress(OSError):
                path.unlink()


def _to_json(programs: dict[str, Program]) -> dict[str, Any]:
    """Rows of events; the members of communicators, which may be hundreds, are written once."""
    members: dict[tuple[int, ...], int] = {}

    def row(event: Event) -> Any:
        values = _VALUES[type(event)](event)
        if isinstance(event, Post):
            name, number, operation, of_post, *rest = values
            return name, number, operation, members.setdefault(of_post, len(members)), *rest
        return values

    rows = {phase: [row(event) for event in program] for phase, program in programs.items()}
    return {"rows": rows, "members": list(members)}


def _from_json(data: dict[str, Any]) -> dict[str, Program]:
    members = [tuple(one) for one in data["members"]]
    return {
        phase: tuple(_event(members, *row) for row in rows) for phase, rows in data["rows"].items()
    }


def _event(all_members: list[tuple[int, ...]], kind: str, *values: Any) -> Event:
    if kind == "Kernel":
        phase, tiles, *sizes = values
        return Kernel(phase, TileCounts(*tiles), *sizes)
    if kind == "Post":
        number, operation, members, lane, sends, receives = values
        rows = [tuple((peer, nbytes) for peer, nbytes in side) for side in (sends, receives)]
        return Post(number, operation, all_members[members], lane, *rows)
    if kind == "Copy":
        number, to_device, nbytes, pieces, after = values
        return Copy(number, to_device, nbytes, pieces, tuple(after))
    event: Event = _KINDS[kind](*values)
    return event
