"""Operator `paged.triton`: decoding over pages with split keys, in Triton.

The pages of a sequence are divided among programs, so that few sequences fill a GPU, and their
results merged (``triton.paged_device``).  Keys and values are read where they lie.

Legend: B sequences, one query each; T slots of the cache; H query heads, G key/value heads, D head
dim of queries and keys, Dv of values.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import interpreting
from cpbench.core.kernel_launch import Launch
from cpbench.core.registry import OperatorInfo
from cpbench.masks.paged.table import PageTable

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="paged.triton",
        summary="decoding: pages are divided among programs, and their results merged",
        source="Flash-Decoding (Dao et al. 2023); PagedAttention, arXiv 2309.06180",
        load="cpbench.kernels.triton.paged:PagedTriton",
        requires=("torch", "triton"),
        value_dims=True,
        interpreted_on=("cpu",),
        backward_on=(),
        paged=True,
        params=("splits",),
        variants=("splits=3",),
        compiles="cpbench.kernels.triton.paged:launches",
    ),
)
MAX_BLOCK = 64  # slots that are read at a time
MAX_ELEMENTS = 4096  # of a block in float32, whose products take three passes
MIN_ROWS = 16  # of a matrix instruction
MAX_SPLITS = 64
WARPS, STAGES = 4, 2
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_DEVICE = "cpbench.kernels.triton.paged_device"


@dataclass(frozen=True, eq=False)
class Plan:
    """The table of pages on the device.

    Attributes:
        scale: factor of the scores.
        page_size: slots of a page.
        table: ``indptr``, ``pages``, ``first`` and ``count`` of a :class:`PageTable`, int32.
        splits: parts of each sequence.
    """

    scale: float
    page_size: int
    table: tuple[torch.Tensor, ...]
    splits: int


class PagedTriton:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        splits: parts of each sequence; 0: as many as give every processor two programs.
    """

    def __init__(self, splits: int = 0) -> None:
        if type(splits) is not int or not 0 <= splits <= MAX_SPLITS:
            raise ValueError(
                f"paged.triton: splits = {splits!r} must be from 1 to {MAX_SPLITS}, or 0"
            )
        self._splits = splits

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        size = problem.page_size
        if size & (size - 1):
            return f"paged.triton takes pages of a power of two, not {size}"
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        import torch

        table = PageTable.of(mask, problem.page_size)
        arrays = (table.indptr, table.pages, table.first, table.count)
        tensors = [torch.as_tensor(x, dtype=torch.int32, device=device) for x in arrays]
        splits = self._splits or _splits(table, problem, device)
        return Plan(problem.softmax_scale, problem.page_size, tuple(tensors), splits)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        from cpbench.kernels.triton.launch import device_modules, precision

        device_modules()  # in the interpreter, with bfloat16 as on hardware
        from cpbench.kernels.triton import paged_device

        q, k, v = (x[0] if x.stride(3) == 1 else x[0].contiguous() for x in qkv)
        (B, H, D), (G, Dv) = q.shape, v.shape[1:]
        out = q.new_empty((1, B, H, Dv))
        lse = q.new_empty((1, H, B), dtype=torch.float32)
        partial = q.new_empty((B, plan.splits, H, Dv), dtype=torch.float32)
        partial_lse = partial.new_empty((B, plan.splits, H))
        constants = _constants(H // G, D, Dv, plan.page_size, q.dtype == torch.float32)
        constants["PRECISION"] = precision(q.dtype == torch.float32, not torch.version.hip)
        current = torch.cuda.device(q.device) if q.is_cuda else nullcontext()
        with current:
            paged_device.attend[(B, G, plan.splits)](
                q, k, v, partial, partial_lse, *plan.table,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], H, plan.splits, plan.scale,
                **constants, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
            paged_device.merge_splits[(B, H)](
                partial, partial_lse, out, lse, B, H, plan.splits,
                DV=constants["DV"], HEAD_DIM_V=Dv,
            )  # fmt: skip
        return out, lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        raise NotImplementedError("decoding has no backward pass")


def _constants(
    group: int, head_dim: int, value_dim: int, page_size: int, float32: bool
) -> dict[str, Any]:
    """Compile-time constants of the kernels."""

    def power(x: int) -> int:
        return max(16, 1 << (x - 1).bit_length())

    widest = power(max(head_dim, value_dim))
    block = min(page_size, MAX_BLOCK, max(16, MAX_ELEMENTS // widest) if float32 else MAX_BLOCK)
    return {
        "GROUP": group, "ROWS": max(MIN_ROWS, power(group)), "N": page_size,
        "BLOCK": block, "D": power(head_dim), "HEAD_DIM": head_dim,
        "DV": power(value_dim), "HEAD_DIM_V": value_dim,
    }  # fmt: skip


def _splits(table: PageTable, problem: Problem, device: str) -> int:
    """Parts of each sequence: every processor gets two programs, and a program a page at least."""
    if interpreting() or device == "cpu":
        return min(2, max(table.largest, 1))
    import torch

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-2 * processors // max(problem.seq_q * problem.heads_kv, 1))
    return max(1, min(wanted, table.largest, MAX_SPLITS))


def launches(
    target: str,
    dtype: str,
    head_dim: int,
    per_head: bool = False,
    split: bool = False,
    head_dim_v: int = 0,
    **config: int,
) -> list[Launch]:
    """The launches of a call with pages of 64 and four query heads per key/value head, to compile
    them ahead of time; ``per_head`` and ``split`` do not concern them."""
    import importlib

    from cpbench.kernels.triton.launch import precision

    device = importlib.import_module(_DEVICE)
    warps, stages = config.get("num_warps", WARPS), config.get("num_stages", STAGES)
    constants = _constants(4, head_dim, head_dim_v or head_dim, 64, dtype == "float32")
    constants["PRECISION"] = precision(dtype == "float32", target.startswith("cuda"))
    found = []
    for name, multiplies in (("attend", True), ("merge_splits", False)):
        arguments = getattr(device, name).arg_names
        own = {key: value for key, value in constants.items() if key in arguments}
        types = {}
        for argument in arguments:
            if argument in own:
                continue
            if argument in ("indptr", "pages", "first", "count"):
                types[argument] = "*i32"
            elif argument[0].isupper():
                is_float32 = argument in ("Partial", "PartialLse", "Lse")
                types[argument] = f"*{'fp32' if is_float32 else _TYPES[dtype]}"
            else:
                types[argument] = "fp32" if argument == "scale" else "i32"
        pointers = [key for key, value in types.items() if value[0] == "*"]
        strides = [key for key in types if key[-2:] in ("_s", "_h")]
        label = f"{constants['ROWS']}x{constants['BLOCK']} w{warps} s{stages}"
        found.append(
            Launch(
                name, f"{_DEVICE}:{name}", types, own, (*pointers, *strides), warps, stages,
                label, multiplies,
            )
        )  # fmt: skip
    return found
