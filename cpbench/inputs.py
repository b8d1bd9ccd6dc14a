"""Seeded inputs, a pure function of the global token index: what kinds there are, and normals.

Whatever the layout, the world size and the subset of heads, token t of head h of tensor "k" has
the same values: every way of computing a problem computes the same problem, and a check can
regenerate just the rows and heads that it needs.

On independent normals no choice of keys is better than another, so there are also inputs with
something to find (``cpbench.planted``) and inputs from a file (``cpbench.captured``).

Normals: (seed, tensor, batch, token, head) is mixed to 64 bits a row, those with
the lane to 32 bits, and each pair of lanes goes through Box-Muller.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.registry import check_params
from cpbench.spec import Spec

if TYPE_CHECKING:
    import torch

    from cpbench.problem import Case, Problem

TENSORS = ("q", "k", "v", "dout")
NORMAL = Spec("normal")
GOLDEN = 0x9E3779B97F4A7C15
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 16  # elements made at a time on CPUs, so that temporaries stay in cache


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of inputs.

    Attributes:
        summary: one line for people.
        params: names with their defaults; None for what must be given.
        load: ``"module:class"``, made with the parameters (a ``ValueError`` tells a wrong one).
            Its ``make(wanted)`` returns a :class:`Wanted`; its ``check(case)`` raises
            ``ValueError`` for a case that it does not fit, without torch.
    """

    summary: str
    load: str
    params: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "normal": Kind(summary="independent standard normals", load="cpbench.planted:Normal"),
    "sinks": Kind(
        summary="normals whose first keys draw a share of every query's attention",
        load="cpbench.planted:Sinks",
        params={"count": 4, "mass": 0.5},
    ),
    "needles": Kind(
        summary="normals with spans of keys that some later queries look for, and sinks if asked",
        load="cpbench.planted:Needles",
        params={
            "count": 8, "length": 1, "mass": 0.9, "looking": 0.5, "run": 32, "sinks": 0,
            "sink_mass": 0.0,
        },
    ),
    "file": Kind(
        summary="q, k and v [B, T, heads, D] of a safetensors file: file:qkv.safetensors",
        load="cpbench.captured:Captured",
        params={"file": None},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """Some rows and heads of a tensor, ``[len(batches), len(positions), len(heads), D]``.

    Attributes:
        name: one of ``TENSORS``.
        seed: any integer.
        problem: of which it is an input, in its dtype.
        positions: of queries (for q and dout) or of keys, each counted by itself.
        batches, heads: global indices.
        device: where.
    """

    name: str
    seed: int
    problem: Problem
    positions: np.typing.NDArray[np.int64]
    batches: Sequence[int]
    heads: Sequence[int]
    device: str


@dataclass(frozen=True)
class Recipe:
    """What inputs are made of: a seed and a kind with its parameters."""

    seed: int = 0
    spec: Spec = NORMAL

    def make(
        self,
        name: str,
        problem: Problem,
        positions: np.typing.NDArray[np.int64],
        *,
        batches: Sequence[int],
        heads: Sequence[int],
        device: str,
    ) -> torch.Tensor:
        """What is :class:`Wanted`, of this recipe."""
        made: torch.Tensor = generator(self.spec).make(
            Wanted(
                name=name,
                seed=self.seed,
                problem=problem,
                positions=positions,
                batches=batches,
                heads=heads,
                device=device,
            )
        )
        return made


def parse(source: Any) -> Spec:
    """A spec of inputs; ``file:some/path`` needs no name of its parameter.

    Raises:
        ValueError: for what is no spec.
    """
    text = source.strip() if isinstance(source, str) else ""
    if text.startswith("file:") and not text.startswith("file:file="):
        source = {"name": "file", "file": text.removeprefix("file:")}
    return Spec.parse(source)


def kind_of(spec: Spec) -> Kind:
    """The kind that a spec names.

    Raises:
        ValueError: for an unknown kind or parameter.
    """
    if spec.name not in KINDS:
        raise ValueError(f"no inputs {spec.name!r}; there are: {', '.join(KINDS)}")
    kind = KINDS[spec.name]
    check_params("inputs", spec.name, spec.kwargs, kind.params)
    return kind


def generator(spec: Spec) -> Any:
    """What makes inputs of a kind.

    Raises:
        ValueError: for an unknown kind or parameter, or a value that is not allowed.
    """
    kind = kind_of(spec)
    module, _, name = kind.load.partition(":")
    values = kind.params | spec.kwargs
    for key, default in kind.params.items():
        wanted = str if default is None else type(default)
        value = values[key]
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits:
            missing = value is None
            told = "must be given" if missing else f"is not of type {wanted.__name__}: {value!r}"
            raise ValueError(f"inputs {spec.name}: {key} {told}")
    return getattr(importlib.import_module(module), name)(**values)


def check_case(case: Case) -> None:
    """Raise ``ValueError`` where a case asks for inputs that do not fit it."""
    generator(case.inputs).check(case)


def normal(
    tensor: str,
    seed: int,
    positions: np.typing.NDArray[np.int64],
    *,
    batches: Sequence[int],
    heads: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    """``[len(batches), len(positions), len(heads), head_dim]`` of normals.

    Args:
        tensor: ``"q"``, ``"k"``, ``"v"`` or ``"dout"``.
        seed: any integer.
        positions: global token indices.
        batches, heads: global batch and head indices.
    """
    import torch

    base = _mix_int(seed * len(TENSORS) + TENSORS.index(tensor))
    head = torch.as_tensor(list(heads), device=device)
    token = torch.as_tensor(positions, device=device) * (1 << 20)
    lane = torch.arange(-(-head_dim // 2), device=device, dtype=torch.int32) * _signed32(GOLDEN)
    out = torch.empty(
        (len(batches), len(positions), len(heads), head_dim), dtype=dtype, device=device
    )
    step = max(1, (_CHUNK if device == "cpu" else 64 * _CHUNK) // (len(heads) * head_dim))
    for place, b in enumerate(batches):
        start = signed64(_mix_int(base + b))
        for t in range(0, len(positions), step):
            row = mix64((token[t : t + step, None] + head) * signed64(GOLDEN) + start)
            out[place, t : t + step] = _gaussian(_mix32(row, lane))[..., :head_dim]
    return out


def mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, which wraps as unsigned would: one word a row."""
    for shift, factor in _SPLITMIX:
        x = (x ^ shifted(x, shift, 64)) * signed64(factor)
    return x ^ shifted(x, 31, 64)


def _mix32(row: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """One int32 a lane, from both halves of the row's word (the mixer lowbias32)."""
    import torch

    x = row.to(torch.int32).unsqueeze(-1) + lane
    x ^= shifted(x, 16, 32)
    x *= _signed32(0x7FEB352D)
    x ^= (row >> 32).to(torch.int32).unsqueeze(-1)
    x ^= shifted(x, 15, 32)
    x *= _signed32(0x846CA68B)
    return x.bitwise_xor_(shifted(x, 16, 32))


def _gaussian(bits: torch.Tensor) -> torch.Tensor:
    """Box-Muller: 16 bits of radius, 16 of angle, two normals."""
    import torch

    radius = (bits & 0xFFFF).float().add_(0.5).mul_(2.0**-16)  # in (0, 1): the log is finite
    radius.log_().mul_(-2.0).sqrt_()
    angle = (bits >> 16).float().mul_(2.0**-16 * 2 * math.pi)
    return torch.cat([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)], dim=-1)


def shifted(x: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (width - bits)) - 1)  # logical, not arithmetic


def _mix_int(x: int) -> int:
    x = (x + GOLDEN) % 2**64
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 31)


def signed64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _signed32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31
