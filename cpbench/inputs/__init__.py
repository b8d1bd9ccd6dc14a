"""Seeded inputs, a pure function of the global token index: which kinds there are.

Whatever the layout, the world size and the subset of heads, token t of head h of tensor "k" has
the same values: every way of computing a problem computes the same problem, and a check can
regenerate just the rows and heads that it needs.

On independent normals no choice of keys is better than another, so there are also inputs with
something to find (``cpbench.inputs.planted``) and inputs from a file (``cpbench.inputs.captured``).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import check_params
from cpbench.core.spec import Spec

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case, Problem

TENSORS = ("q", "k", "v", "dout")
NORMAL = Spec("normal")


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
    "normal": Kind(summary="independent standard normals", load="cpbench.inputs.normal:Normal"),
    "sinks": Kind(
        summary="normals whose first keys draw a share of every query's attention",
        load="cpbench.inputs.planted:Sinks",
        params={"count": 4, "mass": 0.5},
    ),
    "needles": Kind(
        summary="normals with spans of keys that some later queries look for, and sinks if asked",
        load="cpbench.inputs.planted:Needles",
        params={
            "count": 8, "length": 1, "mass": 0.9, "looking": 0.5, "run": 32, "sinks": 0,
            "sink_mass": 0.0,
        },
    ),
    "file": Kind(
        summary="q, k and v [B, T, heads, D] of a safetensors file: file:qkv.safetensors",
        load="cpbench.inputs.captured:Captured",
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
