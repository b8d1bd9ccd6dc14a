"""Inputs from a file: the q, k and v of a model at work, as safetensors.

Each is ``[B, T, heads, D]``; the first ``seq_len`` tokens are used, and of q the last ``queries``
of those where a case asks for few (or q holds just these).  They are rounded to the case's dtype.
dout is normal.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.inputs.normal import Normal

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.inputs import Wanted


class Captured:
    """The tensors of a file.

    Raises:
        ValueError: when there is no such file, or it holds no such tensors.
    """

    def __init__(self, file: str) -> None:
        path = Path(file)
        if not file or not path.is_file():
            raise ValueError(f"inputs: there is no file {file!r}; write file:qkv.safetensors")
        # As it is now: a file that changed is read again.
        self._file = (str(path.resolve()), path.stat().st_mtime_ns)
        self._shapes = _shapes(*self._file)

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` where the file's shapes do not fit a case."""
        wanted = {"q": case.num_heads_q, "k": case.num_heads_kv, "v": case.num_heads_kv}
        for name, heads in wanted.items():
            shape = self._shapes[name]
            alike = (shape[0], shape[2], shape[3]) == (case.batch, heads, case.head_dim)
            few = name == "q" and case.queries > 0 and shape[1] == case.queries
            if not alike or not (few or shape[1] >= case.seq_len):
                file = Path(self._file[0]).name
                raise ValueError(
                    f"inputs: {name} of {file} is {list(shape)}; the case wants "
                    f"[{case.batch}, at least {case.seq_len}, {heads}, {case.head_dim}]"
                )

    def make(self, wanted: Wanted) -> torch.Tensor:
        import torch

        name, problem = wanted.name, wanted.problem
        if name == "dout":
            return Normal().make(wanted)
        x = _tensor(*self._file, name)
        few = name == "q" and x.shape[1] == problem.seq_q  # just those that attend
        shift = 0 if few or name != "q" else problem.seq_k - problem.seq_q
        rows = torch.as_tensor(wanted.positions + shift)
        # Padding tokens, which nothing sees, repeat the last one.
        some = x[list(wanted.batches)].index_select(1, rows.clamp(max=x.shape[1] - 1))
        some = some.index_select(2, torch.as_tensor(list(wanted.heads)))
        return some.to(device=wanted.device, dtype=getattr(torch, problem.dtype))


@functools.lru_cache(maxsize=16)
def _shapes(path: str, changed: int) -> dict[str, tuple[int, ...]]:
    try:
        with _opened(path, "numpy") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever the library says of a broken file
        told = " ".join(str(error).split())
        raise ValueError(f"inputs: {path} is no safetensors file: {told}") from None
    for name in ("q", "k", "v"):
        if name not in there:
            names = ", ".join(sorted(there)) or "none"
            raise ValueError(f"inputs: {path} has no tensor {name!r}; it has {names}")
        if len(there[name]) != 4:
            raise ValueError(
                f"inputs: {name} of {path} is {list(there[name])}, not [B, T, heads, D]"
            )
    return there


@functools.lru_cache(maxsize=3)
def _tensor(path: str, changed: int, name: str) -> torch.Tensor:
    with _opened(path, "pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    if not (found.is_floating_point() and bool(found.isfinite().all())):
        raise ValueError(f"inputs: {name} of {path} holds other values than finite floats")
    return found


def _opened(path: str, framework: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework=framework)
