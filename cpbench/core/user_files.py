"""Files that users name: code of operators, strategies and masks, document lengths, tensors, TOML.

A relative path in a sweep counts from the folder of the sweep; where that has no such file, and on
the command line, from the working directory.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import math
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
_folder = Path()
# Floating types of safetensors: torch's name, and what bits are read as, the exponent's among them.
_FLOATS = {
    "F64": ("float64", "<u8", 0x7FF << 52), "F32": ("float32", "<u4", 0xFF << 23),
    "BF16": ("bfloat16", "<u2", 0xFF << 7), "F16": ("float16", "<u2", 0x1F << 10),
}  # fmt: skip
_CHUNK = 1 << 22  # values that are looked at together
ROTATED = "rotated"  # metadata of captured tensors: whether q and k have RoPE


def count_from(folder: Path) -> None:
    """Let relative paths count from a folder first, in this process."""
    global _folder
    _folder = folder


def counted_from() -> Path:
    """The folder from which relative paths count first."""
    return _folder


def locate(name: str) -> Path:
    """The path of a file that a user names; it need not exist."""
    in_folder = _folder / name
    return in_folder if in_folder.exists() else Path(name)


def load_from_file(name: str, kind: Any, what: str) -> Any:
    """The object that ``path/file.py:attribute`` names; a file is loaded once.

    Args:
        kind: class that it must be an instance of.
        what: the same in words (``"operator"``), for messages.

    Raises:
        ValueError: when there is no such file or attribute, or the file cannot be loaded.
    """
    given, _, attribute = name.rpartition(":")
    path = locate(given)
    if not path.is_file():
        raise ValueError(f"{what} {name!r}: there is no file {given!r}{_searched(given)}")
    try:
        module = _load_module(path.resolve())
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ValueError(f"{what} {name!r}: {type(error).__name__}: {error}") from error
    info = getattr(module, attribute, None)
    if not isinstance(info, kind):
        names = [key for key, value in vars(module).items() if isinstance(value, kind)]
        raise ValueError(
            f"{what} {name!r}: {attribute!r} is not among the {kind.__name__} objects of "
            f"{given!r}: {', '.join(names) or 'it has none'}"
        )
    return info


@functools.cache
def _load_module(path: Path) -> ModuleType:
    """Import a file as a module of its own.  Anything may be raised."""
    module_name = f"cpbench_user_{path.stem}"
    if module_name in sys.modules:  # another file of that name
        module_name += f"_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        with redirect_stdout(sys.stderr):  # stdout may carry JSON
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _searched(name: str) -> str:
    """Where a file was looked for, if that is not the working directory alone."""
    if Path(name).is_absolute() or _folder.resolve() == Path.cwd():
        return ""
    return f" in {_folder} or here"


class FileTensor(NamedTuple):
    """What the header of a safetensors file says of a tensor, and where its values begin."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int

    def special_values(self) -> tuple[bool, bool]:
        """Whether it has NaN, and infinite values: all of it is read, without torch.

        Raises:
            ValueError: for another dtype than float64, float32, bfloat16 and float16.
        """
        if self.dtype not in _FLOATS:
            names = ", ".join(name for name, *_ in _FLOATS.values())
            raise ValueError(f"{self.name} of {self.file} is {self.dtype}, not {names}")
        _, bits, infinity = _FLOATS[self.dtype]
        count, nan, infinite = math.prod(self.shape), False, False
        for start in range(0, count, _CHUNK):
            begin = self.begin + start * np.dtype(bits).itemsize
            values = np.fromfile(self.file, bits, min(_CHUNK, count - start), offset=begin)
            values &= np.iinfo(bits).max >> 1  # without the sign
            nan |= bool((values > infinity).any())
            infinite |= bool((values == infinity).any())
        return nan, infinite


def file_tensors(path: str | Path) -> dict[str, FileTensor]:
    """The tensors in a safetensors file, by name, of which only the header is read.

    Raises:
        ValueError: for any other file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:  # checks all of the header
            names = list(file.keys())
        with open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except Exception as error:  # the library raises many types for broken files
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a safetensors file: {reason}") from None
    return {
        name: FileTensor(
            Path(path), name, tuple(header[name]["shape"]), header[name]["dtype"],
            8 + size + header[name]["data_offsets"][0],
        )
        for name in names
    }  # fmt: skip


def file_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, which :func:`file_tensors` takes."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def load_toml(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What ``parse`` makes of the table in a TOML file.

    Raises:
        ValueError: for a file that is not TOML in UTF-8, and as ``parse``.
        OSError: when the file cannot be read.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    try:
        return parse(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def require_known(key: str, known: Collection[str], prefix: str = "") -> None:
    """Raise a ValueError for a key that is not known, with the closest one or all of them."""
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no key {prefix}{key}; {hint}")


def some_names(name: str, known: Iterable[str], most: int = 30) -> str:
    """The names to choose from for one that does not exist: all, or of many the closest ones."""
    names = sorted(known)
    if len(names) <= most:
        return ", ".join(names)
    alike = difflib.SequenceMatcher(b=name)

    def ratio(candidate: str) -> float:
        alike.set_seq1(candidate)
        return alike.ratio()

    closest = sorted(names, key=ratio, reverse=True)[: most // 3]
    return f"{', '.join(closest)}, and {len(names) - len(closest)} more"
