"""Seconds of kernels, side work and messages, from the constants of a cluster.

Blocks of a kernel are computed at its rate; thread blocks, empty ones and the end of the largest
one cost extra.  The backward pass also reads and writes dQ in float32, and dK and dV where query
heads share them.
"""

from __future__ import annotations

from cpbench.simulator.cluster import Cluster, Costs, Gpu, KernelCosts, MixerCosts, Phase
from cpbench.simulator.events import Kernel, Mix, SideWork


def kernel_seconds(kernel: Kernel, costs: KernelCosts, gpu: Gpu) -> float:
    """The time of one kernel call.

    Raises:
        ValueError: for a backward pass of a kernel that has none.
    """
    phase = costs.fwd if kernel.phase == "fwd" else costs.bwd
    if phase is None:
        raise ValueError(f"{', '.join(costs.operators)}: no backward pass was calibrated")
    if not kernel.tiles.blocks:
        return 0.0
    seconds = tiles_seconds(kernel, phase, gpu)
    if kernel.phase == "bwd":
        seconds += backward_bytes(kernel) / (gpu.stream_gb_per_s * 1e9)
    return seconds


def tiles_seconds(kernel: Kernel, phase: Phase, gpu: Gpu) -> float:
    """The time of the thread blocks of one call, which are spread over all multiprocessors and take
    at least as long as the largest."""
    tiles, (queries, keys) = kernel.tiles, phase.tile
    dims = kernel.head_dim + kernel.value_dim
    if kernel.phase == "bwd":
        dims = 3 * kernel.head_dim + 2 * kernel.value_dim
    rate = phase.tflops * 1e12 * (phase.full_rate if kernel.full else 1.0) / gpu.sms
    block_s = 2 * dims * queries * keys / rate
    per_head = tiles.blocks * block_s + tiles.tiles * phase.tile_us * 1e-6
    per_head += tiles.empty * phase.empty_us * 1e-6
    largest = tiles.largest * block_s
    total = max(kernel.heads_q * per_head / gpu.sms, largest)
    return total + phase.tail * largest + phase.call_us * 1e-6


def backward_bytes(kernel: Kernel) -> int:
    """Bytes that a backward pass moves beside its tiles: the row sums of dout * out and zeros in a
    float32 dQ, its conversion, and the same of dK and dV where query heads share them."""
    q = kernel.heads_q * kernel.seq_q * kernel.head_dim * kernel.itemsize
    kv = kernel.heads_kv * kernel.seq_k * (kernel.head_dim + kernel.value_dim)
    shared = kv * (4 + 4 + kernel.itemsize) if kernel.heads_q > kernel.heads_kv else 0
    return 7 * q + shared


def side_seconds(work: SideWork, gpu: Gpu) -> float:
    """The time of side work."""
    return (
        work.stream / (gpu.stream_gb_per_s * 1e9)
        + work.gather / (gpu.gather_gb_per_s * 1e9)
        + work.scatter / (gpu.scatter_gb_per_s * 1e9)
        + work.launches * gpu.launch_us * 1e-6
    )


def mix_seconds(mix: Mix, costs: MixerCosts) -> float:
    """The time of one step of a mixer.

    Raises:
        ValueError: for a backward pass of a mixer that has none.
    """
    phase = costs.fwd if mix.phase == "fwd" else costs.bwd
    if phase is None:
        raise ValueError(f"{', '.join(costs.operators)}: no backward pass was calibrated")
    return mix.flops / (phase.tflops * 1e12) + (mix.tokens * phase.token_us + phase.call_us) * 1e-6


def event_seconds(event: Kernel | Mix | SideWork, costs: Costs, cluster: Cluster) -> float:
    """The time of a kernel, of a step of a mixer, or of side work."""
    if isinstance(event, Kernel):
        assert isinstance(costs, KernelCosts)
        return kernel_seconds(event, costs, cluster.gpu)
    if isinstance(event, Mix):
        assert isinstance(costs, MixerCosts)
        return mix_seconds(event, costs)
    return side_seconds(event, cluster.gpu)
