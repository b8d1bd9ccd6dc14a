"""An attention problem (:class:`Problem`) and one row of a sweep (:class:`Case`).

Shapes: q ``[B, S, H, D]``; k ``[B, T, G, D]`` with ``H % G == 0`` (GQA); v ``[B, T, G, Dv]``; out
``[B, S, H, Dv]``; lse ``[B, H, S]`` float32, natural logarithm.  Dv is D unless a problem says
otherwise, as multi-head latent attention (MLA) does.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from cpbench.core.spec import Spec, format_size

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = ("float32", "bfloat16", "float16")
METHOD_FIELDS = ("operator", "strategy", "layout", "placement", "content")
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")
DECODE = "decode"
PHASES = ("sequence", DECODE)
INITIAL_STATE = "initial_state"
PAGES_STEP = 8  # a cache has a multiple of as many pages, which ranks divide


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention computation, whatever the method.

    Attributes:
        batch: B.
        seq_q, seq_k: S and T, tokens.
        heads_q, heads_kv: H and G.
        head_dim: D, of queries and keys.
        head_dim_v: Dv, of values; 0 where it is D (never D itself, so that one problem is one
            value), see :attr:`value_dim`.
        dtype: a name in ``DTYPE_BYTES``.
        direction: ``"fwd"``, ``"bwd"`` or ``"fwd_bwd"``; all but ``"fwd"`` need gradients.
        scale: softmax scale; None for ``head_dim ** -0.5``.
        softcap: reserved; anything but 0 is refused.
        deterministic: whether two runs must be bitwise equal.
        page_size: of a batch that is decoded: tokens of each page of keys (see
            ``cpbench.masks.paged``), whose slots are the keys of the problem; 0 for others.
        gates: the inputs of a sequence mixer beside q, k and v: their names, each with its numbers
            per head and token, 0 for one without an axis (``[B, S, H]``).
        initial_state: whether a sequence mixer is given a state ``[B, H, K, V]`` to start from.
    """

    batch: int
    seq_q: int
    seq_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    dtype: str
    head_dim_v: int = 0
    direction: str = "fwd_bwd"
    scale: float | None = None
    softcap: float = 0.0
    deterministic: bool = False
    page_size: int = 0
    gates: tuple[tuple[str, int], ...] = ()
    initial_state: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs; their gradients have a ``d`` before."""
        states = (INITIAL_STATE,) if self.initial_state else ()
        return ("q", "k", "v", *(name for name, _ in self.gates), *states)

    @property
    def gate_dtype(self) -> str:
        """That of gates and states, and of their gradients."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def value_dim(self) -> int:
        """Dv, the head_dim of values, out and dout."""
        return self.head_dim_v or self.head_dim

    @property
    def backward(self) -> bool:
        return self.direction != "fwd"

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads_q // self.heads_kv

    def flops(self, area: float) -> dict[str, int]:
        """FLOPs of the forward and the backward pass for ``area`` visible pairs per head (mean).

        Forward: two matrix products, ``2 * (D + Dv)`` per visible pair; backward: five,
        ``2 * (3 * D + 2 * Dv)``.  Softmax and masked-out pairs are not counted.
        """
        pairs = round(self.batch * self.heads_q * area)
        dim, value_dim = self.head_dim, self.value_dim
        return {
            "fwd": 2 * (dim + value_dim) * pairs,
            "bwd": 2 * (3 * dim + 2 * value_dim) * pairs,
        }

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens."""
        dims = self.head_dim + self.value_dim
        return self.batch * tokens * self.heads_kv * dims * DTYPE_BYTES[self.dtype]

    def q_bytes(self, tokens: int) -> int:
        """Bytes of the queries of ``tokens`` tokens."""
        return self.batch * tokens * self.heads_q * self.head_dim * DTYPE_BYTES[self.dtype]

    def out_bytes(self, tokens: int) -> int:
        """Bytes of the outputs of ``tokens`` tokens."""
        return self.batch * tokens * self.heads_q * self.value_dim * DTYPE_BYTES[self.dtype]

    def gate_bytes(self, tokens: int) -> int:
        """Bytes of the gates of ``tokens`` tokens."""
        lanes = sum(max(count, 1) for _, count in self.gates)
        return self.batch * tokens * self.heads_q * lanes * DTYPE_BYTES[self.gate_dtype]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a sweep: a problem, and the method that computes it.

    Attributes:
        operator, strategy, layout: the method, each a name with parameters.
        mask: a pattern of ``cpbench.masks`` with parameters.
        batch, num_heads_q, num_heads_kv, head_dim, head_dim_v, dtype, direction: as for
            :class:`Problem`.
        seq_len: tokens.
        queries: number of queries, the last tokens of the sequence, which attend to all ``seq_len``
            keys (decoding, chunked prefill); 0 for all tokens.
        phase: ``"sequence"``, or ``"decode"``: one query for each of ``batch`` sequences, whose
            ``seq_len`` keys lie in pages of a cache.
        key_lens: keys of each sequence that is decoded, where they differ; else ().
        page_size: tokens of each page; 0 unless decoding.
        world_size: number of ranks.
        ranks_per_node: ranks that share a node; 0 for the launcher's placement.
        placement: axis of the strategy's mesh to put inside a node; "" for the strategy's default.
        seed: of the inputs.
        inputs: a kind of ``cpbench.inputs`` with parameters.
        rope: the rotation of queries and keys, see ``cpbench.inputs.rope``.
        content: hash of every file that a parameter refers to, by its path, so that the id depends
            on the content of the file.
    """

    operator: Spec = Spec("bands")
    strategy: Spec = Spec("single")
    layout: Spec = Spec("contiguous")
    mask: Spec = Spec("causal")
    batch: int = 1
    seq_len: int = 1024
    queries: int = 0
    num_heads_q: int = 4
    num_heads_kv: int = 4
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: str = "float32"
    direction: str = "fwd_bwd"
    phase: str = "sequence"
    key_lens: tuple[int, ...] = ()
    page_size: int = 0
    world_size: int = 1
    ranks_per_node: int = 0
    placement: str = ""
    seed: int = 0
    inputs: Spec = Spec("normal")
    rope: Spec = Spec("none")
    content: tuple[tuple[str, str], ...] = field(default=())

    @functools.cached_property
    def id(self) -> str:
        """Hash of all fields that differ from the defaults, twelve hex digits."""
        values: dict[str, Any] = {}
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                values[name] = value.to_json() if isinstance(value, Spec) else value
        for path, digest in self.content:
            values = _replace_text(values, path, digest)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return self.key_lens or (self.seq_len,) * self.batch

    @property
    def problem(self) -> Problem:
        batch, seq_q, seq_k = self.batch, self.queries or self.seq_len, self.seq_len
        if self.phase == DECODE:
            batch, seq_q, seq_k = 1, batch, cache_slots(self.lengths, self.page_size)
        return Problem(
            batch=batch,
            seq_q=seq_q,
            seq_k=seq_k,
            heads_q=self.num_heads_q,
            heads_kv=self.num_heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            direction=self.direction,
            page_size=self.page_size,
            initial_state=self.inputs.kwargs.get("initial") is True,
        )

    @property
    def method_key(self) -> tuple[object, ...]:
        """The method, to compare with others on the same problem."""
        return (str(self.operator), str(self.strategy), str(self.layout), self.placement)

    @property
    def problem_key(self) -> tuple[object, ...]:
        """The problem that methods are compared on: all fields but those of the method."""
        names = [item.name for item in fields(self) if item.name not in METHOD_FIELDS]
        return tuple(str(getattr(self, name)) for name in names)

    @property
    def label(self) -> str:
        """One line for people: method and problem."""
        strategy = ""
        if self.world_size > 1 or self.strategy != Spec("single"):
            placement = f" {self.placement} inside" if self.placement else ""
            per_node = f" ({self.ranks_per_node} per node)" if self.ranks_per_node else ""
            strategy = f" {self.strategy}{placement}/{self.layout} x{self.world_size}{per_node}"
        heads = f"{self.num_heads_q}:{self.num_heads_kv}"
        queries = f"{self.queries} of " if self.queries else ""
        dims = format_head_dims(self.head_dim, self.head_dim_v)
        tokens = f"S={queries}{format_size(self.seq_len)}"
        if self.phase == DECODE:
            lengths = "+".join(map(format_size, self.key_lens))
            lengths = lengths or f"{self.batch}x{format_size(self.seq_len)}"
            tokens = f"decode {lengths} pages of {self.page_size}"
        size = f"{tokens} H={heads} D={dims} {self.dtype}"
        inputs = "" if self.inputs == _DEFAULTS["inputs"] else f" on {self.inputs}"
        rope = "" if self.rope == _DEFAULTS["rope"] else f" rope {self.rope}"
        return f"{self.operator}{strategy} {self.mask} {size} {self.direction}{inputs}{rope}"

    def to_json(self) -> dict[str, Any]:
        """A table of plain values, which :meth:`from_json` reads back."""
        table: dict[str, Any] = {}
        for name in _DEFAULTS:
            value = getattr(self, name)
            table[name] = value.to_json() if isinstance(value, Spec) else value
        table["key_lens"] = list(self.key_lens)
        table["content"] = [list(pair) for pair in self.content]
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any], known_id: str | None = None) -> Case:
        """Read back :meth:`to_json`; keys of newer versions are ignored.

        Args:
            known_id: the id, where it was stored with the table.

        Raises:
            ValueError: for a table that is not a case.
        """
        if not isinstance(table, Mapping):
            raise ValueError(f"{table!r} is no case")
        values = {key: value for key, value in table.items() if key in _NAMES}
        for key in ("operator", "strategy", "layout", "mask", "inputs", "rope"):
            if key in values:
                values[key] = _parse_spec(values[key])
        try:
            values["content"] = tuple((str(a), str(b)) for a, b in values.get("content", ()))
            values["key_lens"] = tuple(values.get("key_lens", ()))
        except (TypeError, ValueError):
            raise ValueError(f"content = {values['content']!r} is no list of pairs") from None
        case = object.__new__(cls)  # a frozen dataclass takes long to fill its fields
        vars(case).update(values)  # the others have their defaults from the class
        case._check_values()
        if isinstance(known_id, str):
            vars(case)["id"] = known_id  # saves computing it
        return case

    def _check_values(self) -> None:
        """Raise ``ValueError`` for a value of the wrong type or sign; the specs are checked."""
        counts, others = _get_counts(self), _get_others(self)
        if {int} != {*map(type, counts), *map(type, others)} or min(counts) < 1 or min(others) < 0:
            sizes = dict(zip((*_COUNTS, *_MAY_BE_ZERO), (*counts, *others), strict=True))
            raise ValueError(f"no case has these sizes: {sizes}")
        if self.phase not in PHASES or (self.phase == DECODE) != (self.page_size > 0):
            raise ValueError(f"no case has phase {self.phase!r}, page_size {self.page_size}")
        if {*map(type, self.key_lens)} - {int} or min(self.key_lens, default=1) < 1:
            raise ValueError(f"no case has key_lens {self.key_lens}")
        if self.dtype not in (*DTYPE_BYTES,) or self.direction not in DIRECTIONS:
            raise ValueError(f"no case has dtype {self.dtype!r}, direction {self.direction!r}")
        if not isinstance(self.placement, str):
            raise ValueError(f"placement = {self.placement!r} is no text")

    @property
    def data_content(self) -> tuple[tuple[str, str], ...]:
        """``content`` of the data, such as document lengths, without the code under test."""
        return tuple(pair for pair in self.content if pair[0] not in self.code)

    @property
    def code(self) -> tuple[str, ...]:
        """Names of the code under test: operator, strategy, a selector's kernel, gates and scores;
        may be files."""
        parts = (self.operator.kwargs.get(key) for key in ("kernel", "gates", "scores"))
        return (self.operator.name, self.strategy.name, *(str(part) for part in parts if part))

    def with_content(self, content: Mapping[str, str]) -> Case:
        """This case with hashes of files by path, see ``content``."""
        return replace(self, content=tuple(sorted(content.items())))


_NAMES = frozenset(item.name for item in fields(Case))
_DEFAULTS = {item.name: item.default for item in fields(Case) if item.name != "content"}
_COUNTS = ("batch", "seq_len", "num_heads_q", "num_heads_kv", "head_dim", "world_size")
_MAY_BE_ZERO = ("queries", "head_dim_v", "page_size", "ranks_per_node", "seed")
_get_counts, _get_others = attrgetter(*_COUNTS), attrgetter(*_MAY_BE_ZERO)
_parsed_specs: dict[str, Spec] = {}


def _parse_spec(source: Any) -> Spec:
    """:meth:`Spec.parse` with a cache: many cases share few specs."""
    plain = type(source) is dict and len(source) == 1 and type(source.get("name")) is str
    key = source["name"] if plain else repr(source)  # tells 1 from true
    if key not in _parsed_specs:
        _parsed_specs[key] = Spec.parse(source)
    return _parsed_specs[key]


def _replace_text(value: Any, old: str, new: str) -> Any:
    """Replace a text wherever it is a value of nested tables."""
    if isinstance(value, dict):
        return {key: _replace_text(item, old, new) for key, item in value.items()}
    return new if isinstance(value, str) and value == old else value


def cache_slots(lengths: Sequence[int], page_size: int) -> int:
    """Slots of a cache that holds sequences of these lengths in pages of their own."""
    pages = sum(-(-tokens // page_size) for tokens in lengths)
    return -(-pages // PAGES_STEP) * PAGES_STEP * page_size


def different_or_zero(head_dim_v: int, head_dim: int) -> int:
    """The ``head_dim_v`` of a problem whose values have this head_dim: 0 where it is that of
    queries and keys."""
    return 0 if head_dim_v == head_dim else head_dim_v


def format_head_dims(head_dim: int, head_dim_v: int) -> str:
    """``64``, or ``192/128`` where values have a head_dim of their own."""
    return f"{head_dim}/{head_dim_v}" if head_dim_v else str(head_dim)


def local_problem(problem: Problem, seq_q: int, seq_k: int, heads_q: int, heads_kv: int) -> Problem:
    """The problem of one rank, with the softmax scale of the global one."""
    scale = problem.softmax_scale
    assert math.isfinite(scale)
    return replace(
        problem, seq_q=seq_q, seq_k=seq_k, heads_q=heads_q, heads_kv=heads_kv, scale=scale
    )
