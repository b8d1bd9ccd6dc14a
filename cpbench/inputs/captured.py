"""Inputs from a file: q, k and v captured from a model, as safetensors; of sequence mixers also g
``[B, T, heads]`` or ``[B, T, heads, D]`` and beta ``[B, T, heads]``.

q, k and v are ``[B, T, heads, D]``.  The first ``seq_len`` tokens are used, or all of a sequence
that is decoded; of q, the last ``queries`` of those if a case has fewer queries than keys (the
file may also hold just these).
Values are rounded to the dtype of the case, gates to that of states.  dout is normal.

q and k have the model's RoPE, unless the metadata of the file says ``rotated = "false"``: only then
a case, or its operator, may rotate them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.core.registry import operator_info
from cpbench.core.user_files import ROTATED, file_metadata, file_tensors, locate
from cpbench.inputs.normal import Normal

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.inputs import InputRequest, InputSequence
    from cpbench.masks.slices import IntArray

INPUTS = ("q", "k", "v", "g", "beta")


class Captured:
    """Inputs from a safetensors file.

    Args:
        file: its path.

    Attributes:
        source: its whole path and the time of its modification.
        rotated: whether q and k have RoPE.

    Raises:
        ValueError: if the file does not exist or does not hold the tensors, or if one of them has
            another dtype or values that are not finite.
    """

    def __init__(self, file: str) -> None:
        path = locate(file)
        if not file or not path.is_file():
            raise ValueError(f"inputs: there is no file {file!r}; write file:qkv.safetensors")
        # The time of modification is part of cache keys: a changed file is read again.
        self.source = (str(path.resolve()), path.stat().st_mtime_ns)
        self._shapes = _shapes(*self.source)
        self.rotated = _rotated(*self.source)

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` if the file does not fit a case."""
        file, operator = Path(self.source[0]).name, operator_info(case.operator.name)
        if self.rotated and case.rope.name != "none":
            raise ValueError(
                f"rope = {case.rope}: q and k of {file} are used as captured, after the "
                "model's own rotation; rope = none leaves them so"
            )
        if self.rotated and operator.rotates:
            raise ValueError(
                f"inputs = {case.inputs}: {operator.name} applies RoPE, which q and k of {file} "
                "have already; cpbench capture --before-rope writes those without"
            )
        heads_kv, dims = case.num_heads_kv, (case.head_dim, case.problem.value_dim)
        for name, heads, dim in (
            ("q", case.num_heads_q, dims[0]), ("k", heads_kv, dims[0]), ("v", heads_kv, dims[1])
        ):  # fmt: skip
            shape = self._shapes[name]
            fits = (shape[0], shape[2], shape[3]) == (case.batch, heads, dim)
            only_queries = name == "q" and case.queries > 0 and shape[1] == case.queries
            if not fits or not (only_queries or shape[1] >= case.seq_len):
                raise ValueError(
                    f"inputs: {name} of {file} is {list(shape)}; the case needs "
                    f"[{case.batch}, at least {case.seq_len}, {heads}, {dim}]"
                )
        for name, lanes in operator.gate_lanes(case.head_dim):
            wanted = [case.num_heads_q, *([lanes] if lanes else [])]
            if name not in self._shapes:
                raise ValueError(
                    f"inputs: {file} has no tensor {name!r}, which {operator.name} takes"
                )
            shape = self._shapes[name]
            if shape[0] != case.batch or shape[1] < case.seq_len or list(shape[2:]) != wanted:
                needed = ", ".join(map(str, wanted))
                raise ValueError(
                    f"inputs: {name} of {file} is {list(shape)}; the case needs "
                    f"[{case.batch}, at least {case.seq_len}, {needed}]"
                )

    def make(self, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem."""
        import torch

        if request.name == "dout":
            return Normal().make(request)
        problem = request.problem
        dtype = problem.dtype if request.gate_lanes is None else problem.gate_dtype
        heads = torch.as_tensor(list(request.heads))
        parts = list(request.parts())
        rows = [
            captured_rows(self.source, request.name, part.sequence, part.tokens)
            .index_select(1, heads)
            .to(device=request.device, dtype=getattr(torch, dtype))
            for part in parts
        ]
        if request.decoded is None:
            return torch.stack(rows)
        x = Normal().make(request)  # of slots without a key
        for part, own in zip(parts, rows, strict=True):
            x[part.at, part.rows] = own
        return x


def captured_rows(
    source: tuple[str, int], name: str, sequence: InputSequence, tokens: IntArray
) -> torch.Tensor:
    """``[T, heads, D]`` (of gates fewer axes): tokens of a sequence, as they are in the file.

    Args:
        source: of a :class:`Captured`.
    """
    import torch

    x = _tensor(*source, name)[sequence.batch]
    only_queries = name == "q" and len(x) == sequence.queries
    first = sequence.length - sequence.queries if only_queries else 0
    # Padding tokens, which are never visible, repeat the last token.
    return x.index_select(0, torch.as_tensor(tokens - first).clamp(max=len(x) - 1))


@functools.lru_cache(maxsize=16)
def _shapes(path: str, modified_ns: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a file, checked, and the values of those that are inputs."""
    try:
        tensors = file_tensors(path)
        special = {name: tensors[name].special_values() for name in INPUTS if name in tensors}
    except ValueError as error:
        raise ValueError(f"inputs: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in ("q", "k", "v"):
        if name not in shapes:
            names = ", ".join(sorted(shapes)) or "none"
            raise ValueError(f"inputs: {path} has no tensor {name!r}; it has {names}")
        if len(shapes[name]) != 4:
            raise ValueError(
                f"inputs: {name} of {path} is {list(shapes[name])}, not [B, T, heads, D]"
            )
    for name, found in special.items():
        if any(found):
            raise ValueError(f"inputs: {name} of {path} has values that are not finite")
    return shapes


@functools.lru_cache(maxsize=16)
def _rotated(path: str, modified_ns: int) -> bool:
    """Whether q and k of a file have RoPE, as those of files have that do not say so."""
    mark = file_metadata(path).get(ROTATED, "true")
    if mark not in ("true", "false"):
        raise ValueError(f"inputs: metadata {ROTATED} of {path} is {mark!r}, not true or false")
    return mark == "true"


@functools.lru_cache(maxsize=3)
def _tensor(path: str, modified_ns: int, name: str) -> torch.Tensor:
    """A tensor of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
