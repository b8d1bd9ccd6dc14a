"""Plans of the Triton operators on the device, and the kernel launches of each pass.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim of queries and
keys, V of values.
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
from cpbench.kernels.triton.configs import Config, head_constants, head_parts
from cpbench.kernels.triton.plan import TilePlan, grouped_order, list_runs, plan_tiles
from cpbench.masks.attn_mask import AttnMask

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.core.problem import Problem


@dataclass(frozen=True, eq=False)
class Pass:
    """The tile lists of one kernel, on the device.

    Attributes:
        config: its compile-time configuration.
        tensors: the lists, in the order of the kernel's arguments.
        num_items: items per plan.
        splits: ``(m, 3)`` split rows, empty if no row is split.
        slots: number of parts of split rows.
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
    """The passes of a mask; the backward ones are None without a backward pass."""

    scale: float
    forward: Pass
    dq: Pass | None
    dkv: Pass | None


MAX_TOKENS = 1 << 30
MAX_TOKEN_STRIDE = 1 << 23  # elements; times 256 rows of a tile, an int32 offset


def gpu_name(device: str) -> str:
    """The name of the device, which is part of the key of its tuned configurations."""
    if interpreting():
        return "interpreter"
    import torch

    return torch.cuda.get_device_name(device)


class ConfigOverrides:
    """Parameters shared by the Triton operators that override the table of configurations.

    Args:
        name: of the operator, for messages.
        per_head: whether each head has its own lists.
        block_q, block_k, num_warps, num_stages, descriptors, launches: for every kernel; 0 uses the
            table, and -1 turns descriptors off.
    """

    def __init__(
        self, name: str, per_head: bool, block_q: int, block_k: int, **launch: int
    ) -> None:
        for parameter, block in (("block_q", block_q), ("block_k", block_k)):
            if block and not (16 <= block <= MAX_TILE and block & (block - 1) == 0):
                raise ValueError(
                    f"{name}: {parameter} = {block} must be a power of two from 16 to {MAX_TILE}"
                )
        self._name, self._per_head, self._launch = name, per_head, launch
        self._block_q, self._block_k = block_q, block_k

    def refusal(self, problem: Problem, device: str) -> str | None:
        """Why the operator cannot run this problem on the device, or None if it can."""
        if max(problem.seq_q, problem.seq_k) > MAX_TOKENS:
            return f"{self._name} takes at most {MAX_TOKENS:,} tokens (int32 token numbers)"
        target = compile_target(device)
        dim = widest_head_dim(problem)
        reason = triton_configs.target_refusal(target, dim, DTYPE_BYTES[problem.dtype])
        return f"{self._name} {reason}" if reason else None

    def configs(self, problem: Problem, device: str) -> dict[str, Config]:
        """The compile-time configuration of each kernel, by name."""
        item = DTYPE_BYTES[problem.dtype]
        target, gpu = compile_target(device), gpu_name(device)
        defaults = triton_configs.kernel_configs(
            target, widest_head_dim(problem), item, self._per_head, gpu
        )
        tile = {"rows": self._block_q, "cols": self._block_k}
        transposed_tile = {"rows": self._block_k, "cols": self._block_q}
        configs = {}
        for name, config in defaults.items():
            parameters = {**(transposed_tile if name == "backward_dkv" else tile), **self._launch}
            overrides = {key: max(value, 0) for key, value in parameters.items() if value}
            configs[name] = Config(**{**vars(config), **overrides})
        return configs


def widest_head_dim(problem: Problem) -> int:
    """The head_dim by which configurations are chosen: a tile of every tensor fits."""
    return max(problem.head_dim, problem.value_dim)


def compile_target(device: str) -> str:
    """The target of compilation: ``"cuda:90"``, ``"hip:gfx942"`` or ``"interpreter"``."""
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
    """Plan the passes of one mask for all heads, or of ``batch * heads_q`` masks.

    Args:
        configs: of the kernels, by name.
        parts: number of parts to split each row of tiles into; 0 depends on the device.
    """
    per_head = len(masks) > 1
    assert len(masks) in (1, problem.batch * problem.heads_q)

    def row_pass(config: Config) -> Pass:
        num_parts = 1 if per_head else parts or _parts_per_row(problem, config, device)
        tile_plan = plan_tiles(masks, config.rows, config.cols, num_parts)
        return _to_device(tile_plan, tile_plan.lists.order, config, per_head, device)

    forward = row_pass(configs["forward"])
    if not problem.backward:
        return Plan(problem.softmax_scale, forward, None, None)
    same = configs["backward_dq"] == configs["forward"]
    dq = forward if same else row_pass(configs["backward_dq"])
    config = configs["backward_dkv"]
    transposed = plan_tiles([mask.transpose() for mask in masks], config.rows, config.cols)
    order = grouped_order(transposed, problem.group) if per_head else transposed.lists.order
    dkv = _to_device(transposed, order, config, per_head, device)
    return Plan(problem.softmax_scale, forward, dq, dkv)


def _parts_per_row(problem: Problem, config: Config, device: str) -> int:
    """The number of parts to split each row into, so that every processor has two programs."""
    if device == "cpu":
        return 1
    import torch

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = -(-problem.seq_q // config.rows) * problem.batch * problem.heads_q
    return max(1, 2 * processors // max(programs, 1)) if programs < processors else 1


def _to_device(
    tile_plan: TilePlan, order: Any, config: Config, per_head: bool, device: str
) -> Pass:
    import torch

    if per_head:
        tile_plan = list_runs(tile_plan)
    lists = tile_plan.lists._replace(order=order)
    tensors = tuple(torch.as_tensor(array, device=device).contiguous() for array in lists)
    splits = torch.as_tensor(tile_plan.splits, device=device)
    num_items = tile_plan.lists.items.shape[1]
    return Pass(config, tensors, num_items, splits, tile_plan.slots, per_head, per_head)


def device_modules() -> tuple[Any, Any]:
    """The modules with the kernels of the forward and the backward pass."""
    if interpreting():
        triton_interpreter.patch_interpreter()
    from cpbench.kernels.triton import backward_device, forward_device

    return forward_device, backward_device


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, token and head of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _constants_of(kernel: Any, q: torch.Tensor, v: torch.Tensor, **more: Any) -> dict[str, Any]:
    """The constants of a kernel: those of the head dimensions that it has, and ``more``."""
    constants = head_constants(q.shape[3], v.shape[3])
    return {**{name: constants[name] for name in kernel.arg_names if name in constants}, **more}


def precision(float32: bool, cuda: bool) -> str:
    """The input precision of dot products: on NVIDIA GPUs float32 is three TF32 products."""
    return "tf32x3" if float32 and cuda else "ieee"


def _precision_of(q: torch.Tensor) -> str:
    import torch

    return precision(q.dtype == torch.float32, not torch.version.hip)


def _use_descriptors(config: Config, *tensors: torch.Tensor) -> bool:
    """Whether to read tensors through descriptors: if configured, and all strides and addresses are
    multiples of 16 bytes, as the copy engine needs."""
    strides = [stride * x.element_size() for x in tensors for stride in x.stride()[:3]]
    aligned = all(stride > 0 and stride % 16 == 0 for stride in strides)
    addresses = [x.data_ptr() for x in tensors]
    return bool(config.descriptors) and aligned and not any(at % 16 for at in addresses)


def _sources(config: Config, *tensors: torch.Tensor) -> tuple[bool, list[list[Any]]]:
    """What a kernel reads the tiles of its loop from: whether those are descriptors, and for each
    tensor ``[B, S, H, D]`` the arguments for the first and the second part of D."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not _use_descriptors(config, *tensors):
        return False, [[x, None] for x in tensors]
    return True, [
        [
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, config.cols, 1, part])
            if part
            else None
            for part in head_parts(x.shape[3])
        ]
        for x in tensors
    ]


def _section(streamed: tuple[torch.Tensor, ...], batch_heads: int, group: int) -> int:
    """The number of heads that are computed side by side: whole groups, as many as share half of
    the L2 cache with what they read in their loops.

    Args:
        streamed: the tensors whose tiles are loaded in a loop.
        batch_heads: heads of all batches.
        group: consecutive ones that read the same.
    """
    nbytes = sum(x.numel() * x.element_size() for x in streamed)
    groups = cache_bytes(streamed[0]) // 2 * batch_heads // max(nbytes * group, 1)
    return min(max(groups, 1) * group, batch_heads)


def cache_bytes(x: torch.Tensor) -> int:
    """Size of the L2 cache of a tensor's device; of a small one in the interpreter."""
    import torch

    if not x.is_cuda:
        return INTERPRETER_CACHE_BYTES
    return int(torch.cuda.get_device_properties(x.device).L2_cache_size)


def _readable(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy tensors that kernels cannot read: the last axis must be contiguous, and offsets within a
    tile must fit 32 bits."""
    return [
        x if x.stride(3) == 1 and x.stride(1) < MAX_TOKEN_STRIDE else x.contiguous()
        for x in tensors
    ]


def _current_device(x: torch.Tensor) -> Any:
    """Context in which the GPU of a tensor is the current one, on which Triton launches."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launch_constants(
    kernel: Any, tile_pass: Pass, q: torch.Tensor, v: torch.Tensor, group: int, descriptors: bool
) -> dict[str, Any]:
    """The compile-time constants of the kernel of a pass, and its launch options.

    Args:
        group: query heads per key/value head.
        descriptors: whether it loads the tiles of its loop through descriptors.
    """
    config = tile_pass.config
    return _constants_of(
        kernel, q, v, M=config.rows, N=config.cols, GROUP=group, PER_HEAD=tile_pass.per_head,
        LISTED=tile_pass.listed, STAGES=config.num_stages, PRECISION=_precision_of(q),
        DESCRIPTORS=descriptors, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def forward(qkv: QKV, plan: Plan) -> OutLse:
    """out and lse; see ``cpbench.core.operator.Operator.forward``."""
    with _current_device(qkv.q):
        return _forward(QKV(*_readable(*qkv)), plan)


def _forward(qkv: QKV, plan: Plan) -> OutLse:
    import torch

    q, k, v = qkv
    (B, S, H, _), (_, T, G, V) = q.shape, v.shape
    out = q.new_empty((B, S, H, V))
    lse = q.new_empty((B, H, S), dtype=torch.float32)
    tile_pass, config, kernels = plan.forward, plan.forward.config, device_modules()[0]
    partial = q.new_empty((tile_pass.slots, B * H, config.rows, V), dtype=torch.float32)
    partial_lse = partial.new_empty(partial.shape[:3])
    descriptors, (k_source, v_source) = _sources(config, k, v)
    kernels.forward[(tile_pass.num_items * B * H,)](
        q, *k_source, *v_source, out, lse, partial, partial_lse, *tile_pass.tensors,
        *_strides(q, k, v, out),
        B * H, H, _section((k, v), B * H, H // G), tile_pass.num_items, S, T, plan.scale,
        SPLIT=tile_pass.slots > 0,
        **_launch_constants(kernels.forward, tile_pass, q, v, H // G, descriptors),
    )  # fmt: skip
    if tile_pass.slots:
        constants = _constants_of(kernels.merge_partials, q, v, M=config.rows, ROWS=MERGE_ROWS)
        kernels.merge_partials[(len(tile_pass.splits) * B * H, config.rows // MERGE_ROWS)](
            partial, partial_lse, out, lse, tile_pass.splits, *_strides(out), B * H, H, S,
            **constants,
        )  # fmt: skip
    return out, lse


def backward(x: BackwardInputs, plan: Plan) -> Gradients:
    """dq, dk, dv; see ``cpbench.core.operator.Operator.backward``."""
    with _current_device(x.q):
        dout, q, k, v, out = _readable(*x[:-1])
        return _backward(BackwardInputs(dout, q, k, v, out, x.lse), plan)


def _backward(x: BackwardInputs, plan: Plan) -> Gradients:
    import torch

    dout, q, k, v, out, lse = x
    assert plan.dq is not None
    assert plan.dkv is not None
    (B, S, H, D), T, G = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    padded = -(-S // MAX_TILE) * MAX_TILE
    delta, lse2 = (q.new_empty((B, H, padded), dtype=torch.float32) for _ in range(2))
    kernels = device_modules()[1]
    kernels.row_terms[(padded // ROW_TERMS_ROWS * B * H,)](
        out, dout, lse.contiguous(), delta, lse2, *_strides(out, dout), B * H, H, S, padded,
        **_constants_of(kernels.row_terms, q, v, M=ROW_TERMS_ROWS),
    )  # fmt: skip
    tile_pass, config = plan.dq, plan.dq.config
    partial = q.new_empty((tile_pass.slots, B * H, config.rows, D), dtype=torch.float32)
    descriptors, (k_source, v_source) = _sources(config, k, v)
    kernels.backward_dq[(tile_pass.num_items * B * H,)](
        q, *k_source, *v_source, dout, lse2, delta, dq, partial, *tile_pass.tensors,
        *_strides(q, k, v, dout, dq),
        B * H, H, _section((k, v), B * H, H // G), tile_pass.num_items, S, T, padded,
        plan.scale, SPLIT=tile_pass.slots > 0,
        **_launch_constants(kernels.backward_dq, tile_pass, q, v, H // G, descriptors),
    )  # fmt: skip
    if tile_pass.slots:
        constants = _constants_of(kernels.sum_partials, q, v, M=config.rows, ROWS=MERGE_ROWS)
        kernels.sum_partials[(len(tile_pass.splits) * B * H, config.rows // MERGE_ROWS)](
            partial, dq, tile_pass.splits, *_strides(dq), B * H, H, S, **constants
        )
    tile_pass, config = plan.dkv, plan.dkv.config
    descriptors, (q_source, dout_source) = _sources(config, q, dout)
    wanted = (kernels.BOTH,) if config.launches == 1 else (kernels.ONLY_DK, kernels.ONLY_DV)
    for gradients in wanted:
        kernels.backward_dkv[(tile_pass.num_items * B * G,)](
            *q_source, k, v, *dout_source, lse2, delta, dk, dv, *tile_pass.tensors,
            *_strides(q, k, v, dout, dk, dv),
            B * G, G, _section((q, dout), B * G, 1), tile_pass.num_items, S, T, padded,
            plan.scale, WANTED=gradients.value,
            **_launch_constants(kernels.backward_dkv, tile_pass, q, v, H // G, descriptors),
        )  # fmt: skip
    return dq, dk, dv


ROW_TERMS_ROWS = 32  # rows per program of row_terms
MAX_TILE = 256  # rows or columns of a tile
MERGE_ROWS = 16  # rows per program of merge_partials and sum_partials
INTERPRETER_CACHE_BYTES = 1 << 16
