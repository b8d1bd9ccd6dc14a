"""Tensors in a safetensors file that the user gives to a selector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.core.user_files import file_tensors, locate

if TYPE_CHECKING:
    import torch


class TensorFile:
    """A file, whose tensors are read when they are asked for.

    Args:
        selector: its name, for messages.
        parameter: of the selector, which names the file.
        file: path of the file.
        wanted: sets of names of which the file holds at least one.

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        ValueError: if there is no such file, or it does not hold the tensors, or if one of them has
            another dtype or values that are not numbers.
    """

    def __init__(
        self, selector: str, parameter: str, file: str, wanted: Sequence[Sequence[str]]
    ) -> None:
        self._file = file
        if not locate(file).is_file():
            raise ValueError(
                f"{selector}: there is no file {file!r}; write {parameter}={parameter}.safetensors"
            )
        inputs = tuple(name for names in wanted for name in names)
        try:
            self.shapes = _checked_shapes(*self._version(), inputs)
        except ValueError as error:
            raise ValueError(f"{selector}: {error}") from None
        if not any({*names} <= self.shapes.keys() for names in wanted):
            single, *several = ([repr(name) for name in names] for names in wanted)
            lacks = [f"no tensor {single[0]}", *(f"not both of {' and '.join(x)}" for x in several)]
            names = ", ".join(sorted(self.shapes)) or "none"
            raise ValueError(f"{selector}: {file} has {', and '.join(lacks)}; it has {names}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; a file that has changed is read again."""
        return _load(*self._version())

    def _version(self) -> tuple[Path, int]:
        path = locate(self._file).resolve()
        return path, path.stat().st_mtime_ns


@functools.lru_cache(maxsize=16)
def _checked_shapes(
    path: Path, modified_ns: int, inputs: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a file, whose ``inputs`` are checked to be numbers."""
    tensors = file_tensors(path)
    for name in inputs:
        if name in tensors and tensors[name].special_values()[0]:
            raise ValueError(f"{name} of {path} has values that are not numbers")
    return {name: tensor.shape for name, tensor in tensors.items()}


@functools.lru_cache(maxsize=4)
def _load(path: Path, modified_ns: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))
