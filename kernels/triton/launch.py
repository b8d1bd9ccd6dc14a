"""How the Triton operators run: lists of tiles on the device, and the launches of each pass.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import interpreting
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import DTYPE_BYTES
from cpbench.kernels.triton import configs as triton_configs
from cpbench.kernels.triton import interpreter as triton_interpreter
from cpbench.kernels.triton.configs import Config, padded_head_dim
from cpbench.kernels.triton.plan import Visits, grouped_order, listed, visits
from cpbench.masks.attn_mask import AttnMask

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.problem import Problem


@dataclass(frozen=True, eq=False)
class Pass:
    """What one kernel visits, on the device.

    Attributes:
        config: how it is compiled.
        tensors: the lists, in the order of the kernels' arguments.
        num_items: of a plan.
        splits: ``(m, 3)`` split rows, empty where there are none.
        slots: parts of them.
        per_head: whether each head has a plan of its own.
        listed: whether entirely visible tiles are listed one by one.
    """

    config: Config
    tensors: tuple[torch.Tensor, ...]
    num_items: int
    splits: torch.Tensor
    slots: int
    per_head: bool
    listed: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes of a mask; the backward ones only where gradients are asked for."""

    scale: float
    forward: Pass
    dq: Pass | None
    dkv: Pass | None


MOST_TOKENS = 1 << 30
LARGEST_STEP = 1 << 23  # elements from token to token, times 256 rows of a tile


def gpu_of(device: str) -> str:
    """The name of the device, for what was tuned on it."""
    if interpreting():
        return "interpreter"
    import torch

    return torch.cuda.get_device_name(device)


class Tuning:
    """The parameters that the Triton operators share, in place of the table of configurations.

    Args:
        name: of the operator, for messages.
        per_head: whether it has lists for each head.
        block_q, block_k, num_warps, num_stages, descriptors: of every kernel; 0 leaves them to the
            table, and -1 is none (of descriptors).
    """

    def __init__(
        self, name: str, per_head: bool, block_q: int, block_k: int, **launch: int
    ) -> None:
        for what, block in (("block_q", block_q), ("block_k", block_k)):
            if block and (block < 16 or block & (block - 1)):
                raise ValueError(f"{name}: {what} = {block} must be a power of two from 16 on")
        self._name, self._per_head, self._launch = name, per_head, launch
        self._block_q, self._block_k = block_q, block_k

    def refusal(self, problem: Problem, device: str) -> str | None:
        """Why no Triton operator can do this here, or None."""
        if max(problem.seq_q, problem.seq_k) > MOST_TOKENS:
            return f"{self._name} counts tokens in 32 bits: at most {MOST_TOKENS:,}"
        target = target_of(device)
        reason = triton_configs.unserved(target, problem.head_dim, DTYPE_BYTES[problem.dtype])
        return f"{self._name} {reason}" if reason else None

    def configs(self, problem: Problem, device: str) -> dict[str, Config]:
        """How each kernel is compiled."""
        item = DTYPE_BYTES[problem.dtype]
        target, gpu = target_of(device), gpu_of(device)
        chosen = triton_configs.choose(target, problem.head_dim, item, self._per_head, gpu)
        blocks = {"rows": self._block_q, "cols": self._block_k}
        turned = {"rows": self._block_k, "cols": self._block_q}
        found = {}
        for name, config in chosen.items():
            wanted = {**(turned if name == "backward_dkv" else blocks), **self._launch}
            changes = {key: max(value, 0) for key, value in wanted.items() if value}
            found[name] = Config(**{**vars(config), **changes})
        return found


def target_of(device: str) -> str:
    """``"cuda:90"``, ``"hip:gfx942"`` or ``"interpreter"``."""
    if interpreting():
        return "interpreter"
    import torch

    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"


def plan(
    masks: Sequence[AttnMask],
    problem: Problem,
    device: str,
    configs: dict[str, Config],
    parts: int = 0,
) -> Plan:
    """The passes of one mask for all heads, or of ``batch * heads_q`` masks."""
    per_head = len(masks) > 1
    assert len(masks) in (1, problem.batch * problem.heads_q)

    def rows_of(config: Config) -> Pass:
        split = 1 if per_head else parts or _parts(problem, config, device)
        found = visits(masks, config.rows, config.cols, split)
        return _on_device(found, found.lists.order, config, per_head, device)

    forward = rows_of(configs["forward"])
    if not problem.backward:
        return Plan(problem.softmax_scale, forward, None, None)
    dq = (
        forward if configs["backward_dq"] == configs["forward"] else rows_of(configs["backward_dq"])
    )
    config = configs["backward_dkv"]
    turned = visits([mask.transpose() for mask in masks], config.rows, config.cols)
    order = grouped_order(turned, problem.group) if per_head else turned.lists.order
    dkv = _on_device(turned, order, config, per_head, device)
    return Plan(problem.softmax_scale, forward, dq, dkv)


def _parts(problem: Problem, config: Config, device: str) -> int:
    """Into how many parts to split each row, so that every processor has two programs."""
    if device == "cpu":
        return 1
    import torch

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = -(-problem.seq_q // config.rows) * problem.batch * problem.heads_q
    return max(1, 2 * processors // max(programs, 1)) if programs < processors else 1


def _on_device(found: Visits, order: Any, config: Config, per_head: bool, device: str) -> Pass:
    import torch

    if per_head:
        found = listed(found)
    lists = found.lists._replace(order=order)
    tensors = tuple(torch.as_tensor(x, device=device).contiguous() for x in lists)
    splits = torch.as_tensor(found.splits, device=device)
    num_items = found.lists.items.shape[1]
    return Pass(config, tensors, num_items, splits, found.slots, per_head, per_head)


def kernels() -> tuple[Any, Any]:
    """The device code of the forward and the backward pass, imported when first needed."""
    if interpreting():
        triton_interpreter.mend()
    from cpbench.kernels.triton import backward_device, forward_device

    return forward_device, backward_device


def _strides(*of: torch.Tensor) -> list[int]:
    """Of batch, token and head, of each tensor."""
    return [stride for x in of for stride in x.stride()[:3]]


def _shape(x: torch.Tensor, config: Config) -> dict[str, int]:
    return {"M": config.rows, "D": padded_head_dim(x.shape[3]), "HEAD_DIM": x.shape[3]}


def precision(float32: bool, cuda: bool) -> str:
    """Of products of float32: three products of 10-bit mantissas, on NVIDIA's matrix units."""
    return "tf32x3" if float32 and cuda else "ieee"


def _precision_of(q: torch.Tensor) -> str:
    import torch

    return precision(q.dtype == torch.float32, not torch.version.hip)


def _descriptors(config: Config, *of: torch.Tensor) -> bool:
    """Whether the copy engine is to read these: as configured, where it can (16-byte steps)."""
    if not config.descriptors:
        return False
    steps = (step * x.element_size() for x in of for step in x.stride()[:3])
    if any(step % 16 for step in steps) or any(x.data_ptr() % 16 for x in of):
        return False
    _allow_descriptors()
    return True


def _allow_descriptors() -> None:
    """Kernels write their descriptors into memory that Triton asks for.  Triton keeps the answer
    for each thread (autograd's backward has threads of its own), so it is given at every launch."""
    import triton

    triton.set_allocator(_scratch)


def _scratch(size: int, align: int, stream: int | None) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=torch.int8, device="cuda")


def _ready(*of: torch.Tensor) -> list[torch.Tensor]:
    """As the kernels read them: the last axis contiguous, offsets within a tile in 32 bits."""
    return [
        x if x.stride(3) == 1 and x.stride(1) < LARGEST_STEP else x.contiguous() for x in of
    ]  # fmt: skip


def _on(x: torch.Tensor) -> Any:
    """Makes the GPU of a tensor the current one: that is where Triton launches."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _constants(
    work: Pass, q: torch.Tensor, group: int, reads: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    """What a pass is compiled for, and how it is launched.

    Args:
        group: query heads to a key/value head.
        reads: the tensors whose tiles it reads one after another.
    """
    config = work.config
    return {
        "GROUP": group, "PER_HEAD": work.per_head, "LISTED": work.listed, "N": config.cols,
        "STAGES": config.num_stages, "PRECISION": _precision_of(q),
        "DESCRIPTORS": _descriptors(config, *reads), "num_warps": config.num_warps,
        "num_stages": config.num_stages, **_shape(q, config),
    }  # fmt: skip


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """out and lse; see ``cpbench.core.operator.Operator.forward``."""
    with _on(qkv.q):
        return _forward(QKV(*_ready(*qkv)), plan)


def _forward(qkv: QKV, plan: Plan) -> OutLse:
    import torch

    q, k, v = qkv
    (B, S, H, D), T, G = q.shape, k.shape[1], k.shape[2]
    out = q.new_empty((B, S, H, D))
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    work, rows, device = plan.forward, plan.forward.config.rows, kernels()[0]
    part = q.new_empty((work.slots, B * H, rows, D), dtype=torch.float32)
    part_lse = part.new_empty(part.shape[:3])
    device.forward[(work.num_items * B * H,)](
        q, k, v, out, lse, part, part_lse, *work.tensors, *_strides(q, k, v, out),
        B * H, H, work.num_items, S, T, plan.scale,
        SPLIT=work.slots > 0, **_constants(work, q, H // G, reads=(k, v)),
    )  # fmt: skip
    if work.slots:
        shape = {**_shape(q, work.config), "ROWS": MERGED_ROWS}
        device.merge_parts[(len(work.splits) * B * H, rows // MERGED_ROWS)](
            part, part_lse, out, lse, work.splits, *_strides(out), B * H, H, S, **shape
        )
    return out, lse


def backward(x: BackwardInputs, plan: Plan) -> Gradients:
    """dq, dk, dv; see ``cpbench.core.operator.Operator.backward``."""
    with _on(x.q):
        dout, q, k, v, out = _ready(*x[:-1])
        return _backward(BackwardInputs(dout, q, k, v, out, x.lse), plan)


def _backward(x: BackwardInputs, plan: Plan) -> Gradients:
    import torch

    dout, q, k, v, out, lse = x
    assert plan.dq is not None
    assert plan.dkv is not None
    (B, S, H, D), T, G = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, lse2 = (q.new_empty((B, H, S), dtype=torch.float32) for _ in range(2))
    device = kernels()[1]
    device.row_terms[(-(-S // TERM_ROWS) * B * H,)](
        out, dout, lse.contiguous(), delta, lse2, *_strides(out, dout), B * H, H, S,
        M=TERM_ROWS, D=padded_head_dim(D), HEAD_DIM=D,
    )  # fmt: skip
    work, rows = plan.dq, plan.dq.config.rows
    part = q.new_empty((work.slots, B * H, rows, D), dtype=torch.float32)
    device.backward_dq[(work.num_items * B * H,)](
        q, k, v, dout, lse2, delta, dq, part, *work.tensors, *_strides(q, k, v, dout, dq),
        B * H, H, work.num_items, S, T, plan.scale,
        SPLIT=work.slots > 0, **_constants(work, q, H // G, reads=(k, v)),
    )  # fmt: skip
    if work.slots:
        shape = {**_shape(q, work.config), "ROWS": MERGED_ROWS}
        device.add_parts[(len(work.splits) * B * H, rows // MERGED_ROWS)](
            part, dq, work.splits, *_strides(dq), B * H, H, S, **shape
        )
    work = plan.dkv
    device.backward_dkv[(work.num_items * B * G,)](
        q, k, v, dout, lse2, delta, dk, dv, *work.tensors, *_strides(q, k, v, dout, dk, dv),
        B * G, G, work.num_items, S, T, plan.scale,
        **_constants(work, q, H // G, reads=(q, dout)),
    )  # fmt: skip
    return dq, dk, dv


TERM_ROWS = 32
MERGED_ROWS = 16  # of a split row's parts, by one program
