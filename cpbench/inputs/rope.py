"""RoPE of the inputs of cases: ``rope = {base = 500000, scaling = "yarn", factor = 8, …}``.

As a spec, its name is the scaling: ``none`` (no rotation), ``unscaled``, ``pi``, ``ntk``, ``yarn``,
or ``table`` for frequencies from a text file: D / 2 numbers, radians per position.  Queries and
keys are turned by their global positions after they are made, so that every layout has the same
scores; where ``positions = "document"``, positions restart at each document of the mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench import masks
from cpbench.core.problem import DECODE
from cpbench.core.registry import check_params, operator_info
from cpbench.core.spec import Spec, Value, format_size
from cpbench.core.user_files import locate
from cpbench.inputs.rotary import BASE, Floats, frequencies, rotate
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.paged.batch import PagedBatch
from cpbench.masks.slices import IntArray

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case, Problem

NONE = Spec("none")
_SHARED: dict[str, Any] = {"positions": "sequence"}
_SCALED = {"base": BASE, "factor": None, **_SHARED}
PARAMS: dict[str, dict[str, Any]] = {
    "none": {},
    "unscaled": {"base": BASE, **_SHARED},
    "pi": _SCALED,
    "ntk": _SCALED,
    "yarn": {**_SCALED, "original_length": 0},
    "table": {"file": None, **_SHARED},
}
POSITIONS = ("sequence", "document")
SMALLEST_FREQUENCY = 2.0**-24  # the unit roundoff of float32: a step of less changes no cosine


def parse(source: Any) -> Spec:
    """Parse the spec of a rotation; a table may call its name ``scaling``, and has ``unscaled``
    without one.  Defaults are left out, so that one rotation is one value.

    Raises:
        ValueError: for an invalid spec.
    """
    if isinstance(source, dict) and "name" not in source:
        rest = dict(source)
        source = {"name": rest.pop("scaling", "unscaled"), **rest}
    spec = Spec.parse(source)
    check_names(spec)
    values = {key: _canonical(value) for key, value in spec.params}
    defaults = PARAMS[spec.name]
    return Spec.of(spec.name, **{k: v for k, v in values.items() if v != defaults[k]})


def check_names(spec: Spec) -> None:
    """Raise ``ValueError`` for an unknown scaling or parameter."""
    if spec.name not in PARAMS:
        raise ValueError(f"no scaling {spec.name!r}; there are: {', '.join(PARAMS)}")
    check_params("scaling", spec.name, spec.kwargs, PARAMS[spec.name])


def _canonical(value: Value) -> Value:
    """Whole numbers as integers: 500000 for 5e5."""
    if isinstance(value, tuple):
        return tuple(int(x) if x == int(x) else x for x in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Rotation:
    """The rotation of the queries and keys of a case.

    Attributes:
        spec: see :func:`parse`; not ``none``.
        starts: int64 first tokens of the documents at which positions restart.
        batch: of a case that decodes: its sequences, in which keys and queries have their places.
    """

    spec: Spec
    starts: bytes = np.zeros(1, np.int64).tobytes()
    batch: PagedBatch | None = None

    def apply(
        self, name: str, rows: torch.Tensor, problem: Problem, tokens: IntArray
    ) -> torch.Tensor:
        """Rows of a tensor as rotated; those of others than q and k as they are.

        Args:
            name: of the tensor.
            rows: ``[B, tokens, heads, D]``.
            problem: the problem that they are an input of.
            tokens: global indices of queries (the last of the keys) or of keys.
        """
        if name not in "qk":
            return rows
        theta, magnitude = _frequencies(self.spec, problem.head_dim)
        if self.batch is not None:  # padding repeats the last one
            known = np.array(self.batch.key_lens) - 1 if name == "q" else self.batch.positions
            positions = known[np.minimum(tokens, len(known) - 1)]
        else:
            shift = problem.seq_k - problem.seq_q if name == "q" else 0
            positions = self.positions(tokens + shift)
        return rotate(rows, positions, theta, magnitude)

    def magnitude(self, head_dim: int) -> float:
        """The factor by which it multiplies rows."""
        return _frequencies(self.spec, head_dim)[1]

    def positions(self, tokens: IntArray) -> IntArray:
        """The position of each token of the sequence: within its document, where asked for."""
        starts = np.frombuffer(self.starts, np.int64)
        return tokens - starts[np.searchsorted(starts, tokens, side="right") - 1]


def rotation_of(case: Case) -> Rotation | None:
    """The rotation of the inputs of a case; None for none.

    Raises:
        ValueError: for values that are not allowed, or do not fit the head_dim, the mask or the
            operator.
    """
    spec = case.rope
    if spec == NONE:
        return None
    if operator_info(case.operator.name).rotates:
        raise ValueError(
            f"rope = {spec}: {case.operator.name} applies RoPE itself, by its own parameters; its "
            "inputs have none"
        )
    _frequencies(spec, case.head_dim)
    positions = spec.kwargs.get("positions", POSITIONS[0])
    if positions not in POSITIONS:
        raise ValueError(f"rope: positions = {positions!r} is not one of {', '.join(POSITIONS)}")
    if case.phase == DECODE:
        if positions == POSITIONS[1]:
            raise ValueError("rope: positions = 'document': sequences that are decoded have none")
        return Rotation(spec, batch=PagedBatch.of_case(case))
    if positions == POSITIONS[0]:
        return Rotation(spec)
    mask = masks.build_heads(case.mask, case.seq_len, case.num_heads_q)
    if not isinstance(mask, AttnMask):
        raise ValueError(
            f"rope: positions = 'document' takes masks of documents, which {case.mask.name} is not"
        )
    return Rotation(spec, mask.diagonal_blocks().tobytes())


def _frequencies(spec: Spec, head_dim: int) -> tuple[Floats, float]:
    """The frequencies of a spec, and the factor of cosine and sine.

    Raises:
        ValueError: for values that are not allowed.
    """
    values = PARAMS[spec.name] | spec.kwargs
    if spec.name == "table":
        return _frequencies_of_file(values["file"], head_dim), 1.0
    scaling = None if spec.name == "unscaled" else spec.name
    rest = {k: values[k] for k in ("base", "factor", "original_length") if k in values}
    return frequencies(head_dim, scaling=scaling, **rest)


def _frequencies_of_file(file: Any, head_dim: int) -> Floats:
    if file is None:
        raise ValueError("rope: table needs a file of frequencies: table:file=frequencies.txt")
    if not isinstance(file, str) or not locate(file).is_file():
        raise ValueError(f"rope: there is no file {file!r}; write table:file=frequencies.txt")
    path = locate(file).resolve()
    theta = _read_numbers(str(path), path.stat().st_mtime_ns)
    if 2 * len(theta) != head_dim:
        raise ValueError(
            f"rope: {path.name} has {len(theta)} frequencies; head_dim {head_dim} takes "
            f"{head_dim // 2 if head_dim % 2 == 0 else 'none, being odd'}"
        )
    return theta


@functools.lru_cache(maxsize=16)
def _read_numbers(path: str, modified_ns: int) -> Floats:
    try:
        with open(path, encoding="utf-8-sig") as file:
            theta = np.array([float(word) for word in file.read().split()], np.float64)
    except ValueError:
        raise ValueError(f"rope: {path} is not a text of numbers") from None
    if not (theta > 0).all() or not np.isfinite(theta).all():
        raise ValueError(f"rope: {path} has a frequency that is not a positive number")
    theta.flags.writeable = False
    return theta


def warning_of(case: Case) -> str | None:
    """What speaks against the frequencies of a case, in one line; None if nothing does.

    The slowest pair should turn at most once within the sequence (``base >= (L / 2 pi) ** (D / (D -
    2))``), or distances repeat in all pairs; and a step should turn it by no less than the unit
    roundoff of float32 (``base <= 2 ** (24 D / (D - 2))``).
    """
    if case.rope == NONE or case.head_dim < 4:
        return None
    theta, _ = _frequencies(case.rope, case.head_dim)
    slowest, power = float(theta.min()), case.head_dim / (case.head_dim - 2)
    turns = case.seq_len * slowest / (2 * math.pi)
    size = format_size(case.seq_len)
    base = f"{slowest**-power:.2g}"  # that of unscaled frequencies with this slowest one
    if case.rope.name == "unscaled":
        base = f"a base of {base}"
    else:
        base = f"as with an unscaled base of {base}, which"
    lowest, highest = (case.seq_len / (2 * math.pi)) ** power, SMALLEST_FREQUENCY**-power
    if turns > 1:
        return (
            f"rope {case.rope}: the slowest pair turns {turns:.1f} times within {size} tokens: "
            f"{base} should be at least {lowest:.2g}"
        )
    if slowest < SMALLEST_FREQUENCY:
        return (
            f"rope {case.rope}: a step turns the slowest pair by less than float32 can tell: "
            f"{base} should be at most {highest:.2g}"
        )
    return None


def warnings_of(cases: Iterable[Case]) -> list[str]:
    """The distinct warnings of cases, in order."""
    return list(dict.fromkeys(text for text in map(warning_of, cases) if text))
