"""torch's own context parallelism: ``context_parallel`` around ``scaled_dot_product_attention``.

Its ring attention uses torch's flash kernels only, so the operator must be that kernel.  On layout
zigzag its load balancing is on (head and tail chunks, the same layout), for causal masks only; on
layout contiguous it is off.

torch dispatches the CUDA kernels to its ring, but not the CPU kernel: during a call, this module
adds handlers that use the same ring.

Source: ``torch.distributed.tensor.experimental`` of torch 2.13 (an experimental API).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import Unsupported
from cpbench.core.registry import StrategyInfo
from cpbench.strategies.libraries.call import LibraryStrategy, common_refusal

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="torch.context_parallel",
    summary="torch's context_parallel with its own flash kernel",
    source="torch.distributed.tensor.experimental.context_parallel",
    load="cpbench.strategies.libraries.torch_context_parallel:ContextParallel",
    layouts=("contiguous", "zigzag"),
    merges=True,
    params=("rotate",),
    traced=False,
)
KERNELS = {"cpu": "sdpa.cpu_flash", "cuda": "sdpa.flash"}
ROTATE_METHODS = ("allgather", "alltoall")
MODULE = "torch.distributed.tensor.experimental._context_parallel"
SEQ_AXIS = 2  # the axis of tokens in [B, H, S, D]


@dataclass(frozen=True)
class Plan:
    """The options of a call.

    Attributes:
        balanced: head and tail chunks.
        pairs: visible pairs of this rank, over all query heads.
    """

    scale: float
    causal: bool
    balanced: bool
    grouped: bool
    backward: bool
    pairs: int


class ContextParallel(LibraryStrategy):
    """The strategy.

    Args:
        rotate: how keys are sent: in one all-gather, or in rounds of all-to-all.
    """

    name = "torch.context_parallel"

    def __init__(self, rotate: str = "allgather") -> None:
        super().__init__()
        if rotate not in ROTATE_METHODS:
            raise ValueError(
                f"{self.name}: rotate = {rotate!r} is not {' or '.join(ROTATE_METHODS)}"
            )
        self.rotate = rotate
        self._meshes: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        balanced = world.keys.name == "zigzag"
        masks = ("causal",) if balanced else ("full", "causal")
        return common_refusal(f"{self.name} with layout {world.keys.name}", world, masks)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        kernel = KERNELS[op.device.partition(":")[0]]
        if op.info.name != kernel:
            raise Unsupported(
                f"{self.name} computes with torch's own kernel: use operator {kernel}, "
                f"not {op.info.name}"
            )
        if importlib.util.find_spec(MODULE) is None:
            raise Unsupported(f"{self.name} requires torch 2.13, which has {MODULE}")
        problem = world.problem
        return Plan(
            scale=problem.softmax_scale,
            causal=world.mask.kind == "causal",
            balanced=world.keys.name == "zigzag",
            grouped=problem.group > 1,
            backward=problem.backward,
            pairs=int(world.areas[rank].sum()) * problem.heads_q,
        )

    def call(self, qkv: QKV, plan: Plan, op: BoundOperator, group: Any) -> OutLse:
        q, k, v = qkv
        from torch.nn import functional

        out = functional.scaled_dot_product_attention(
            q.transpose(1, SEQ_AXIS),
            k.transpose(1, SEQ_AXIS),
            v.transpose(1, SEQ_AXIS),
            is_causal=plan.causal,
            scale=plan.scale,
            enable_gqa=plan.grouped,
        )
        return out.transpose(1, SEQ_AXIS), None

    @contextmanager
    def _context_parallel(self, plan: Plan, device: str, group: Any) -> Iterator[None]:
        import torch
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method
        from torch.distributed.tensor.experimental._context_parallel import _attention as ring
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if group not in self._meshes:
            self._meshes[group] = DeviceMesh.from_group(group, device)
        options = ring._cp_options
        before = options.enable_load_balance, options.rotate_method
        handlers = _cpu_handlers() if device == "cpu" else {}
        ring.custom_ops.update(handlers)
        options.enable_load_balance = plan.balanced
        set_rotate_method(self.rotate)
        # It requires a buffer to shard; q, k, v are sharded already, so it gets an unused one.
        mesh, unused = self._meshes[group], torch.zeros(2 * self._meshes[group].size())
        parallel = context_parallel(
            mesh, buffers=[unused], buffer_seq_dims=[0], no_restore_buffers={unused}
        )
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), parallel:
                yield
        finally:
            options.enable_load_balance, options.rotate_method = before
            for name in handlers:
                del ring.custom_ops[name]

    def pass_context(
        self, plan: Plan, op: BoundOperator, group: Any
    ) -> AbstractContextManager[Any]:
        op.pairs += plan.pairs
        return self._context_parallel(plan, op.device, group)


def _cpu_handlers() -> dict[Any, Any]:
    """DTensor handlers of the CPU flash kernel: torch's ring, as for the CUDA kernels."""
    import torch
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def run(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in op_call._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        mesh = arguments["query"].device_mesh
        local: Any = {
            name: x.to_local() if isinstance(x, DTensor) else x
            for name, x in arguments.items()
            if name != "attn_mask"
        }
        assert arguments.get("attn_mask") is None
        if op_call is forward:
            results = ring._templated_ring_attention(mesh.get_group(), SEQ_AXIS, forward, **local)
        else:
            results = ring._templated_ring_attention_backward(
                mesh.get_group(), SEQ_AXIS, backward, grad_out_name="grad_out", **local
            )
        return tuple(
            DTensor.from_local(x, mesh, [Shard(SEQ_AXIS)], run_check=False) for x in results
        )

    return {forward: run, backward: run}
