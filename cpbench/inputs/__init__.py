"""Seeded inputs, a pure function of the global token index.

Token t of head h of tensor "k" has the same values for every layout, world size and subset of
heads, so all methods compute the same problem, and a check can regenerate only the rows and heads
that it needs.

For independent normals all selections of keys are equally good, so there are also inputs with
planted keys that queries attend to (``cpbench.inputs.planted``) and inputs from a file
(``cpbench.inputs.captured``).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.core.problem import INITIAL_STATE
from cpbench.core.registry import check_params, operator_info
from cpbench.core.spec import Spec

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case, Problem
    from cpbench.inputs.rope import Rotation
    from cpbench.masks.paged.batch import PagedBatch
    from cpbench.masks.slices import IntArray

TENSORS = ("q", "k", "v", "dout")
CHUNK_ELEMENTS = 1 << 26  # made at a time, since making them may take float32 in between
NORMAL = Spec("normal")


@dataclass(frozen=True, kw_only=True)
class InputKind:
    """A kind of inputs.

    Attributes:
        summary: one line for people.
        params: names and defaults of its parameters; None if required.
        gates: whether it makes the gates of sequence mixers, too.
        decodes: whether it makes the inputs of batches that are decoded.
        load: ``"module:class"`` of the generator, whose constructor takes the parameters and
            raises ``ValueError`` for invalid ones.  Its ``make(request)`` returns the tensor of an
            :class:`InputRequest`, before the rotation; ``plant(rows, request)``, if it has one, the
            tensor after it; its ``check(case)`` raises ``ValueError`` for a case that it cannot
            serve, without torch.
    """

    summary: str
    load: str
    params: dict[str, Any] = field(default_factory=dict)
    gates: bool = False
    decodes: bool = False


KINDS = {
    "normal": InputKind(
        summary="independent standard normals",
        load="cpbench.inputs.normal:Normal",
        decodes=True,
    ),
    "sinks": InputKind(
        summary="normals whose first keys get a share of every query's attention",
        load="cpbench.inputs.planted:Sinks",
        params={"count": 4, "mass": 0.5},
    ),
    "needles": InputKind(
        summary="normals with spans of keys that some later queries attend to, and optional sinks",
        load="cpbench.inputs.planted:Needles",
        params={
            "count": 8, "length": 1, "mass": 0.9, "looking": 0.5, "run": 32, "sinks": 0,
            "sink_mass": 0.0,
        },
    ),
    "haystack": InputKind(
        summary="normals, or q, k, v of a file, with needles that the last queries ask for",
        load="cpbench.inputs.haystack:Haystack",
        params={
            "depth": 0.5, "keys": 1, "values": 1, "hops": 1, "length": 1, "mass": 0.9,
            "queries": 64, "file": "",
        },
        decodes=True,
    ),
    "file": InputKind(
        summary="q, k, v [B, T, heads, D] (and g, beta) of a file: file:qkv.safetensors",
        load="cpbench.inputs.captured:Captured",
        params={"file": None},
        gates=True,
        decodes=True,
    ),
    "gates": InputKind(
        summary="normals with unit keys, and gates that forget within tokens or in no sequence",
        load="cpbench.inputs.gates:Gates",
        params={"shortest": 16.0, "longest": 4.0, "initial": False},
        gates=True,
    ),
}  # fmt: skip


class InputSequence(NamedTuple):
    """A sequence of a problem: its number in the batch, how many keys it has, and how many of its
    last tokens are queries."""

    batch: int
    length: int
    queries: int


class Part(NamedTuple):
    """The requested rows of one sequence: their index in the first axis of the result and those in
    the second, and their tokens in the sequence."""

    sequence: InputSequence
    at: int
    rows: slice | IntArray
    tokens: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class InputRequest:
    """A request for rows of a tensor, ``[len(batches), len(positions), len(heads), head_dim]``;
    without the last axis for gates that have none.  Of an initial state positions are dimensions of
    keys, and the last axis has those of values.

    Attributes:
        name: one of ``TENSORS``, or of the other inputs of the problem.
        seed: any integer.
        problem: the problem that it is an input of; determines the dtype.
        positions: global indices of queries (for q and dout) or of keys (for k and v).
        batches, heads: global indices.
        device: torch device of the result.
        deviation: standard deviation of normal rows of q and k after the rotation.
        turned_later: whether the operator rotates q and k by itself.
        decoded: of a case that decodes: its sequences, whose keys the positions are slots of.
    """

    name: str
    seed: int
    problem: Problem
    positions: np.typing.NDArray[np.int64]
    batches: Sequence[int]
    heads: Sequence[int]
    device: str
    deviation: float = 1.0
    turned_later: bool = False
    decoded: PagedBatch | None = None

    @property
    def head_dim(self) -> int:
        """That of the tensor."""
        problem = self.problem
        of_values = self.name in ("v", "dout", INITIAL_STATE)
        return problem.value_dim if of_values else problem.head_dim

    @property
    def gate_lanes(self) -> int | None:
        """Of a gate: its numbers per head and token, 0 for one without an axis; else None."""
        return dict(self.problem.gates).get(self.name)

    def parts(self) -> Iterator[Part]:
        """The rows of each sequence; those that belong to none, which nobody sees, are left out."""
        problem, of_queries = self.problem, self.name in ("q", "dout")
        if self.decoded is None:
            tokens = self.positions + (problem.seq_k - problem.seq_q if of_queries else 0)
            for at, batch in enumerate(self.batches):
                sequence = InputSequence(batch, problem.seq_k, problem.seq_q)
                yield Part(sequence, at, slice(None), tokens)
            return
        lengths = np.array(self.decoded.key_lens)
        owners = np.arange(len(lengths)) if of_queries else self.decoded.owners
        places = lengths - 1 if of_queries else self.decoded.positions
        owner = np.append(owners, -1)[np.minimum(self.positions, len(owners))]
        for batch in np.unique(owner[owner >= 0]).tolist():
            rows = np.flatnonzero(owner == batch)
            sequence = InputSequence(batch, int(lengths[batch]), 1)
            yield Part(sequence, 0, rows, places[self.positions[rows]])


@dataclass(frozen=True)
class Recipe:
    """How to generate inputs: a seed, a kind with its parameters, the rotation of q and k, or
    whether the operator rotates them by itself, and the sequences of a case that decodes."""

    seed: int = 0
    spec: Spec = NORMAL
    rotation: Rotation | None = None
    turned_later: bool = False
    decoded: PagedBatch | None = None

    def make(
        self,
        name: str,
        problem: Problem,
        positions: np.typing.NDArray[np.int64],
        *,
        batches: Sequence[int],
        heads: Sequence[int],
        device: str,
        keep_on: str | None = None,
    ) -> torch.Tensor:
        """Generate rows of a tensor; for arguments and shape see :class:`InputRequest`.

        The initial state is ``[len(batches), len(heads), K, V]``, whatever the positions.

        Args:
            keep_on: device to which the rows are moved then, if another one.
        """
        if name == INITIAL_STATE:
            positions = np.arange(problem.head_dim)
        generator, home = build_generator(self.spec), keep_on or device
        if name in dict(problem.gates) and not input_kind(self.spec).gates:
            raise ValueError(f"inputs = {self.spec} have no {name}: use gates, or a file")

        rotation = self.rotation
        deviation = 1.0 if rotation is None else rotation.magnitude(problem.head_dim)

        def make(part: IntArray) -> torch.Tensor:
            request = InputRequest(
                name=name,
                seed=self.seed,
                problem=problem,
                positions=part,
                batches=batches,
                heads=heads,
                device=device,
                deviation=deviation,
                turned_later=self.turned_later,
                decoded=self.decoded,
            )
            rows: torch.Tensor = generator.make(request)
            if rotation is not None:
                rows = rotation.apply(name, rows, problem, part)
            if hasattr(generator, "plant"):
                rows = generator.plant(rows, request)
            if name == INITIAL_STATE:
                rows = rows.transpose(1, 2).contiguous()
            return rows.to(home)

        lanes = max(problem.head_dim, problem.value_dim)
        step = max(1, CHUNK_ELEMENTS // (len(batches) * len(heads) * lanes))
        if len(positions) <= step or name == INITIAL_STATE:
            return make(positions)
        first = make(positions[:step])
        tensor = first.new_empty((len(batches), len(positions), *first.shape[2:]))
        tensor[:, :step] = first
        for start in range(step, len(positions), step):
            tensor[:, start : start + step] = make(positions[start : start + step])
        return tensor


def parse(source: Any) -> Spec:
    """Parse a spec of inputs; ``file:some/path`` is short for ``file:file=some/path``.

    Raises:
        ValueError: for an invalid spec.
    """
    text = source.strip() if isinstance(source, str) else ""
    if text.startswith("file:") and not text.startswith("file:file="):
        source = {"name": "file", "file": text.removeprefix("file:")}
    return Spec.parse(source)


def input_kind(spec: Spec) -> InputKind:
    """The kind of a spec; the names of its parameters are checked.

    Raises:
        ValueError: for an unknown kind or parameter.
    """
    if spec.name not in KINDS:
        raise ValueError(f"no inputs {spec.name!r}; there are: {', '.join(KINDS)}")
    kind = KINDS[spec.name]
    check_params("inputs", spec.name, spec.kwargs, kind.params)
    return kind


def build_generator(spec: Spec) -> Any:
    """The generator of a spec: see ``load`` of :class:`InputKind`.

    Raises:
        ValueError: for an unknown kind or parameter, or an invalid value.
    """
    kind = input_kind(spec)
    module, _, name = kind.load.partition(":")
    values = kind.params | spec.kwargs
    for key, default in kind.params.items():
        required_type = str if default is None else type(default)
        value = values[key]
        if value is None:
            raise ValueError(f"inputs {spec.name}: {key} must be given")
        if type(value) is not required_type and not (required_type is float and type(value) is int):
            raise ValueError(
                f"inputs {spec.name}: {key} is not of type {required_type.__name__}: {value!r}"
            )
    return getattr(importlib.import_module(module), name)(**values)


def check_case(case: Case) -> None:
    """Raise ``ValueError`` if the inputs of a case do not fit its operator or its sizes."""
    operator = operator_info(case.operator.name)
    if operator.mixer and not input_kind(case.inputs).gates:
        kinds = " or ".join(name for name, kind in KINDS.items() if kind.gates)
        raise ValueError(
            f"inputs = {case.inputs}: {operator.name} is a sequence mixer, whose inputs are {kinds}"
        )
    build_generator(case.inputs).check(case)
