"""Tensors in a safetensors file that the user gives to a selector."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.core.user_files import locate, tensor_shapes

if TYPE_CHECKING:
    import torch


class TensorFile:
    """A file, of which only the shapes are read at first.

    Args:
        selector: its name, for messages.
        parameter: of the selector, which names the file.
        file: path of the file.
        wanted: sets of names of which the file holds at least one.

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        ValueError: if there is no such file, or it does not hold the tensors.
    """

    def __init__(
        self, selector: str, parameter: str, file: str, wanted: Sequence[Sequence[str]]
    ) -> None:
        self._selector, self._file = selector, file
        if not locate(file).is_file():
            raise ValueError(
                f"{selector}: there is no file {file!r}; write {parameter}={parameter}.safetensors"
            )
        try:
            self.shapes = tensor_shapes(locate(file))
        except ValueError as error:
            raise ValueError(f"{selector}: {error}") from None
        if not any({*names} <= self.shapes.keys() for names in wanted):
            single, *several = ([repr(name) for name in names] for names in wanted)
            lacks = [f"no tensor {single[0]}", *(f"not both of {' and '.join(x)}" for x in several)]
            names = ", ".join(sorted(self.shapes)) or "none"
            raise ValueError(f"{selector}: {file} has {', and '.join(lacks)}; it has {names}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; a file that has changed is read again."""
        return _load(self._file, Path(locate(self._file)).stat().st_mtime_ns)

    def not_numbers(self) -> str | None:
        """Which tensor has values that are not numbers, in a message; None if none has."""
        for name, tensor in self.tensors().items():
            if bool(tensor.isnan().any()):
                return f"{self._selector}: {name} of {self._file} has values that are not numbers"
        return None


@functools.lru_cache(maxsize=4)
def _load(file: str, modified_ns: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(locate(file)))
