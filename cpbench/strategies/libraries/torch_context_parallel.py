"""torch's own context parallelism: ``context_parallel`` around ``scaled_dot_product_attention``.

Its ring attention runs over torch's flash kernels alone, so the operator must be the one that is
the same kernel.  On layout zigzag its load balancing is on (head and tail chunks, which is that
layout), for causal masks only; on layout contiguous it is off.

torch dispatches the CUDA kernels to its ring, but not the one for CPUs: handlers are added here,
around the same ring, for the time of a call.

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
from cpbench.strategies.libraries.call import Library, refusal

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="torch.context_parallel",
    summary="torch's context_parallel, over its own flash kernel",
    source="torch.distributed.tensor.experimental.context_parallel",
    load="cpbench.strategies.libraries.torch_context_parallel:ContextParallel",
    layouts=("contiguous", "zigzag"),
    merges=True,
    params=("rotate",),
    traced=False,
)
KERNELS = {"cpu": "sdpa.cpu_flash", "cuda": "sdpa.flash"}
ROTATE = ("allgather", "alltoall")
HOME = "torch.distributed.tensor.experimental._context_parallel"
SEQUENCE = 2  # the axis of tokens in [B, H, S, D]


@dataclass(frozen=True)
class Plan:
    """What a call is given.

    Attributes:
        pairs: visible pairs of this rank, for all its query heads.
        balanced: head and tail chunks.
    """

    scale: float
    causal: bool
    balanced: bool
    grouped: bool
    backward: bool
    pairs: int


class ContextParallel(Library):
    """The strategy.

    Args:
        rotate: how keys travel: gathered at once, or in rounds of all-to-all.
    """

    name = "torch.context_parallel"

    def __init__(self, rotate: str = "allgather") -> None:
        super().__init__()
        if rotate not in ROTATE:
            raise ValueError(f"{self.name}: rotate = {rotate!r} is not {' or '.join(ROTATE)}")
        self.rotate = rotate
        self._meshes: dict[Any, Any] = {}

    def unsupported(self, world: World) -> str | None:
        balanced = world.keys.name == "zigzag"
        masks = ("causal",) if balanced else ("full", "causal")
        return refusal(f"{self.name} with layout {world.keys.name}", world, masks)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        kernel = KERNELS[op.device.partition(":")[0]]
        if op.info.name != kernel:
            raise Unsupported(
                f"{self.name} computes with torch's own kernel: use operator {kernel}, "
                f"not {op.info.name}"
            )
        if importlib.util.find_spec(HOME) is None:
            raise Unsupported(f"{self.name} is built for torch 2.13, where {HOME} is")
        problem = world.problem
        return Plan(
            scale=problem.softmax_scale,
            causal=world.mask.kind == "causal",
            balanced=world.keys.name == "zigzag",
            grouped=problem.group > 1,
            backward=problem.backward,
            pairs=int(world.areas[rank].sum()) * problem.heads_q,
        )

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from torch.nn import functional

        out = functional.scaled_dot_product_attention(
            q.transpose(1, SEQUENCE),
            k.transpose(1, SEQUENCE),
            v.transpose(1, SEQUENCE),
            is_causal=plan.causal,
            scale=plan.scale,
            enable_gqa=plan.grouped,
        )
        return out.transpose(1, SEQUENCE), None

    @contextmanager
    def _entered(self, plan: Plan, device: str, group: Any) -> Iterator[None]:
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
        handlers = _handlers() if device == "cpu" else {}
        ring.custom_ops.update(handlers)
        options.enable_load_balance = plan.balanced
        set_rotate_method(self.rotate)
        # It deals buffers to ranks as well, and cannot do without one; ours are dealt already.
        mesh, idle = self._meshes[group], torch.zeros(2 * self._meshes[group].size())
        parallel = context_parallel(
            mesh, buffers=[idle], buffer_seq_dims=[0], no_restore_buffers={idle}
        )
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), parallel:
                yield
        finally:
            options.enable_load_balance, options.rotate_method = before
            for name in handlers:
                del ring.custom_ops[name]

    def within(self, plan: Plan, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        op.pairs += plan.pairs
        return self._entered(plan, op.device, group)


def _handlers() -> dict[Any, Any]:
    """What DTensor does with the flash kernel for CPUs: torch's ring, as for those of CUDA."""
    import torch
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def run(op_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in op_call._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mesh = given["query"].device_mesh
        local: Any = {
            name: x.to_local() if isinstance(x, DTensor) else x
            for name, x in given.items()
            if name != "attn_mask"
        }
        assert given.get("attn_mask") is None
        if op_call is forward:
            found = ring._templated_ring_attention(mesh.get_group(), SEQUENCE, forward, **local)
        else:
            found = ring._templated_ring_attention_backward(
                mesh.get_group(), SEQUENCE, backward, grad_out_name="grad_out", **local
            )
        return tuple(DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False) for x in found)

    return {forward: run, backward: run}
