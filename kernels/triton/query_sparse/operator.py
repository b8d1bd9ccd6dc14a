"""Operator `triton_query_sparse`: blocks of keys, or single keys, selected by each query.

Rows of a program are the query heads that share a key/value head, of as many consecutive queries as
fit.  Blocks are planned on the device, without synchronisation, and cost what the queries of a
program have selected together; dK and dV of them are deterministic.  Listed keys are gathered query
by query.

Legend: B batch, S queries, T keys, H query heads, G key/value heads; X tiles of queries, Y blocks
of keys; n listed keys of a query.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.kernel_launch import Launch
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.triton.block_sparse import compact
from cpbench.kernels.triton.launch import MAX_TOKENS, device_modules, precision
from cpbench.selectors.common.hidden_keys import hidden_key_table
from cpbench.selectors.selections import Blocks, Tokens

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="triton_query_sparse",
        summary="for selectors: blocks or single keys selected by each query, in Triton",
        source="NSA, arXiv 2502.11089; sparse MLA of DeepSeek-V3.2",
        load="cpbench.kernels.triton.query_sparse.operator:TritonQuerySparse",
        masks=("rows", "tokens"),
        requires=("torch", "triton"),
        value_dims=True,
        interpreted_on=("cpu",),
        params=("rows", "cols"),
        compiles="cpbench.kernels.triton.query_sparse.operator:launches",
    ),
)
MIN_EXTENT = 16  # of a matrix instruction
MAX_EXTENT = 128
MAX_HEAD_DIM = 256
GROUPED = 8  # query heads of a key/value head from which on a program has one query's
ROWS, COLS = 32, 32  # of a tile of scores of several queries; larger ones spill registers
WIDE = 128  # head_dim beyond which, as in float32, a tile has fewer rows
WARPS, STAGES = 4, 2
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_DEVICE = "cpbench.kernels.triton.query_sparse.query_device"
_LISTS = ("Kept", "HiddenIndex", "Hidden", "Starts", "Listed")


@dataclass(frozen=True, eq=False)
class Entries:
    """What the programs of a pass go through.

    Attributes:
        starts: ``[B * G, tiles + 1]`` int32, where the entries of each tile begin; None for listed
            keys, where a query is an entry.
        listed: int32 blocks or tiles of queries; or ``[B, G or H, S, n]`` keys, -1 for none.
    """

    starts: torch.Tensor | None
    listed: torch.Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """A selection as the kernels take it.

    Attributes:
        scale: factor of the scores.
        rows: of a program, a power of two.
        heads: query heads of a program.
        width: keys of an entry.
        cols: keys of a step.
        forward: entries of tiles of queries.
        backward: those of blocks of keys; None for listed keys, and without a backward pass.
        kept: ``[B, H, S, Y]`` booleans of blocks.
        hidden: see :func:`hidden_key_table`.
    """

    scale: float
    rows: int
    heads: int
    width: int
    cols: int
    forward: Entries
    backward: Entries | None = None
    kept: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)

    @property
    def queries(self) -> int:
        """Queries of a program."""
        return self.rows // self.heads if self.kept is not None else 1

    @property
    def lists(self) -> tuple[torch.Tensor | None, ...]:
        """Arguments of the kernels that go through tiles of queries."""
        return (self.kept, *self.hidden, self.forward.starts, self.forward.listed)


class TritonQuerySparse:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        rows, cols: of a tile of scores, powers of two from 16 to 128; 0: one query a program where
            at least 8 query heads share keys, else 32 rows (16 in float32); and 32 keys.
    """

    def __init__(self, rows: int = 0, cols: int = 0) -> None:
        for name, extent in (("rows", rows), ("cols", cols)):
            if extent and not (MIN_EXTENT <= extent <= MAX_EXTENT and not extent & (extent - 1)):
                raise ValueError(
                    f"triton_query_sparse: {name} = {extent} must be a power of two from "
                    f"{MIN_EXTENT} to {MAX_EXTENT}, or 0"
                )
        self._rows, self._cols = rows, cols

    def unsupported(self, problem: Problem, mask: object, device: str) -> str | None:
        if max(problem.seq_q, problem.seq_k) > MAX_TOKENS:
            return f"triton_query_sparse takes at most {MAX_TOKENS:,} tokens (int32 token numbers)"
        if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
            return f"triton_query_sparse takes a head_dim of at most {MAX_HEAD_DIM}"
        if problem.group > MAX_EXTENT:
            return f"triton_query_sparse takes at most {MAX_EXTENT} query heads per key/value head"
        adds = isinstance(mask, Tokens) and not self.is_deterministic(problem, device)
        if problem.deterministic and adds:
            return (
                "triton_query_sparse sums gradients of listed keys in any order on cuda: not "
                "deterministic"
            )
        return None

    def is_deterministic(self, problem: Problem, device: str) -> bool:
        """See ``cpbench.core.operator.is_deterministic``; with blocks it always is."""
        return not (problem.backward and device.startswith("cuda"))

    def prepare(self, mask: Blocks | Tokens, problem: Problem, device: str) -> Plan:
        import torch

        if isinstance(mask, Tokens):
            heads = problem.group if mask.index.shape[1] == 1 else 1
            index = mask.index.to(torch.int32)
            if mask.index.shape[1] == 1:
                index = index.expand(-1, problem.heads_kv, -1, -1)
            listed = Entries(None, index.contiguous())
            cols = self._cols or _columns(index.shape[3])
            rows = max(MIN_EXTENT, _power(heads))
            return Plan(problem.softmax_scale, rows, heads, index.shape[3], cols, listed)
        widest = max(problem.head_dim, problem.value_dim)
        rows = self._rows or _rows(problem.group, widest, problem.dtype == "float32")
        rows = max(rows, _power(problem.group))
        kept = (mask.kept & mask.grid.allowed).contiguous()
        selected = _by_tile(kept, problem.heads_kv, rows // problem.group)
        backward = _entries(selected.transpose(1, 2)) if problem.backward else None
        cols = self._cols or _columns(mask.grid.block_k)
        index, hidden = hidden_key_table(mask.grid)
        return Plan(
            problem.softmax_scale, rows, problem.group, mask.grid.block_k, cols,
            _entries(selected), backward, kept.view(torch.uint8),
            (index, hidden.contiguous().view(torch.uint8)),
        )  # fmt: skip

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        kernels = _kernels()
        q, k, v = (_contiguous_rows(x) for x in qkv)
        (B, S, H, _), G = q.shape, k.shape[2]
        out = q.new_empty((B, S, H, v.shape[3]))
        lse = q.new_empty((B, H, S), dtype=torch.float32)
        tiles, parts = -(-S // plan.queries), H // plan.heads
        with _current(q):
            kernels.forward[(tiles, B * parts)](
                q, k, v, out, lse, *plan.lists, *_strides(q, k, v, out),
                tiles, parts, parts // G, S, k.shape[1], _blocks(plan), plan.scale,
                **_constants(plan, q, v), TOKENS=plan.kept is None,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
        return out, lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        import torch

        kernels = _kernels()
        dout, q, k, v = (_contiguous_rows(y) for y in (x.dout, x.q, x.k, x.v))
        (B, S, H, _), G = q.shape, k.shape[2]
        lse2 = (x.lse.float() * kernels.LOG2E.value).masked_fill(x.lse == -torch.inf, torch.inf)
        lse2 = lse2.contiguous()
        delta = (dout.float() * x.out.float()).sum(-1).transpose(1, 2).contiguous()
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        blocks = plan.backward is not None
        new = torch.empty_like if blocks else torch.zeros_like
        dk, dv = (
            new(y, dtype=y.dtype if blocks else torch.float32,
                memory_format=torch.contiguous_format) for y in (k, v)
        )  # fmt: skip
        tiles, parts = -(-S // plan.queries), H // plan.heads
        constants = _constants(plan, q, v)
        launch = {**constants, "num_warps": WARPS, "num_stages": STAGES}
        tensors = q, k, v, dout, lse2, delta
        with _current(q):
            kernels.backward_dq[(tiles, B * parts)](
                *tensors, dq, dk, dv, *plan.lists, *_strides(q, k, v, dout, dq, dk, dv),
                tiles, parts, parts // G, S, k.shape[1], _blocks(plan), plan.scale,
                **launch, TOKENS=not blocks,
            )  # fmt: skip
            if plan.backward is not None:
                steps = -(-plan.width // constants["N"])
                kernels.backward_dkv[(_blocks(plan) * steps, B * G)](
                    *tensors, dk, dv, plan.kept, *plan.hidden,
                    plan.backward.starts, plan.backward.listed,
                    *_strides(q, k, v, dout, dk, dv), parts, S, k.shape[1], _blocks(plan),
                    plan.scale, **launch,
                )  # fmt: skip
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _power(x: int) -> int:
    """The next power of two."""
    return 1 << (x - 1).bit_length()


def _rows(group: int, widest: int, float32: bool) -> int:
    """Rows of a program of selected blocks."""
    return MIN_EXTENT if group >= GROUPED or float32 or widest > WIDE else ROWS


def _columns(width: int) -> int:
    """Keys of a step, of entries of ``width`` keys."""
    return max(MIN_EXTENT, min(COLS, _power(width)))


def _by_tile(kept: torch.Tensor, heads_kv: int, queries: int) -> torch.Tensor:
    """Which blocks some row of a tile has selected: ``[B * G, X, Y]``, of ``[B, H, S, Y]``."""
    import torch

    of_group = kept.unflatten(1, (heads_kv, -1)).any(2).flatten(0, 1)
    missing = -of_group.shape[1] % queries
    tiles = torch.nn.functional.pad(of_group, (0, 0, 0, missing)).unflatten(1, (-1, queries))
    return torch.any(tiles, 2)


def _entries(selected: torch.Tensor) -> Entries:
    """The selected columns of each row of ``[plans, rows, columns]``."""
    import torch

    columns = torch.arange(selected.shape[2], dtype=torch.int32, device=selected.device)
    listed, starts = compact(selected, columns.expand(selected.shape))
    return Entries(starts.contiguous(), listed)


def _blocks(plan: Plan) -> int:
    """Y, or 1 for listed keys."""
    return 1 if plan.kept is None else plan.kept.shape[3]


def _kernels() -> Any:
    """The module with the kernels."""
    device_modules()  # in the interpreter, with bfloat16 as on hardware
    return importlib.import_module(_DEVICE)


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, token and head of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _current(q: torch.Tensor) -> Any:
    """The device of the tensors as the current one."""
    import torch

    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


def _constants(plan: Plan, q: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Compile-time constants of the kernels."""
    import torch

    input_precision = precision(q.dtype == torch.float32, not torch.version.hip)
    sizes = _sizes(q.shape[3], v.shape[3], plan.rows, plan.cols)
    return {
        "R": plan.heads, "QUERIES": plan.queries, "W": plan.width, **sizes,
        "PRECISION": input_precision,
    }  # fmt: skip


def _sizes(head_dim: int, value_dim: int, rows: int, cols: int) -> dict[str, int]:
    """Constants of the shapes of tiles."""
    return {
        "M": rows, "N": cols, "D": max(MIN_EXTENT, _power(head_dim)), "HEAD_DIM": head_dim,
        "DV": max(MIN_EXTENT, _power(value_dim)), "HEAD_DIM_V": value_dim,
    }  # fmt: skip


def launches(
    target: str,
    dtype: str,
    head_dim: int,
    per_head: bool = False,
    split: bool = False,
    head_dim_v: int = 0,
    **config: int,
) -> list[Launch]:
    """The launches of blocks of 64 keys with one query head per key/value head, and of listed keys
    that 16 heads share, to compile them ahead of time; ``per_head`` and ``split`` do not concern
    them."""
    module = importlib.import_module(_DEVICE)
    value_dim = head_dim_v or head_dim
    warps, stages = config.get("num_warps", WARPS), config.get("num_stages", STAGES)
    found = []
    of_blocks = _rows(1, max(head_dim, value_dim), dtype == "float32")
    for tokens, heads, rows, width in ((False, 1, of_blocks, 64), (True, 16, MIN_EXTENT, 2048)):
        for name in ("forward", "backward_dq", "backward_dkv"):
            if tokens and name == "backward_dkv":
                continue
            used_rows, used_cols = config.get("rows", rows), config.get("cols", _columns(width))
            constants: dict[str, Any] = {
                "R": heads, "QUERIES": max(1, used_rows // heads), "W": width,
                **_sizes(head_dim, value_dim, used_rows, used_cols), "TOKENS": tokens,
                "PRECISION": precision(dtype == "float32", target.startswith("cuda")),
            }  # fmt: skip
            if tokens:
                constants |= dict.fromkeys(_LISTS[:4])
            arguments = getattr(module, name).arg_names
            constants = {key: value for key, value in constants.items() if key in arguments}
            types = {x: _type(x, dtype, tokens) for x in arguments if x not in constants}
            strides = [x for x in types if x[-2:] in ("_b", "_s", "_h")]
            pointers = [x for x, type_ in types.items() if type_[0] == "*"]
            label = f"{used_rows}x{used_cols} w{warps} s{stages}"
            found.append(
                Launch(
                    f"{'tokens' if tokens else 'rows'}.{name}", f"{_DEVICE}:{name}", types,
                    constants, (*pointers, *strides), warps, stages, label,
                )
            )  # fmt: skip
    return found


def _type(argument: str, dtype: str, tokens: bool) -> str:
    """The type of an argument of a kernel."""
    if argument in ("Kept", "Hidden"):
        return "*u8"
    if argument in _LISTS:
        return "*i32"
    if argument[0].isupper():
        float32 = argument in ("Lse", "Lse2", "Delta") or (tokens and argument in ("DK", "DV_"))
        return f"*{'fp32' if float32 else _TYPES[dtype]}"
    return "fp32" if argument == "scale" else "i32"
