"""Process groups: any subset of ranks, device meshes, and ranks that disagree."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import naive
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.layout import build as build_layout

TOKENS = 32


def shards(rank: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    layout = build_layout("zigzag", TOKENS, size)
    inputs = naive.random_inputs(1, TOKENS, 4, 2, 16, dtype)[:3]
    return [layout.shard(x, rank) for x in inputs]


def right(out: torch.Tensor, rank: int, size: int) -> bool:
    inputs = naive.random_inputs(1, TOKENS, 4, 2, 16, torch.float32)
    expected, _ = cpbench.attention(*inputs[:3], masks.build("causal", TOKENS))
    layout = build_layout("zigzag", TOKENS, size)
    return torch.allclose(layout.shard(expected, rank), out, atol=1e-5)


def call(rank: int, size: int, **options: Any) -> bool:
    mask = masks.build("causal", TOKENS)
    out, _ = cpbench.distributed_attention(*shards(rank, size), mask, **options)
    return right(out, rank, size)


def error_of(run: Any) -> str:
    """The error of a call, which must come within seconds."""
    start = time.monotonic()
    try:
        run()
    except Exception as error:
        assert time.monotonic() - start < 30
        return f"{type(error).__name__}: {error}"
    return ""


def _in_unequally_many_groups(rank: int, size: int) -> list[bool]:
    import torch.distributed as dist

    if rank == 0:  # of which rank 0 is the only member
        for _ in range(2):
            dist.new_group([0], use_local_synchronization=True)
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group, own = pairs[rank % 2], rank // 2
    results = [call(own, 2, group=group), call(own, 2, group=group, strategy="usp:ulysses=2")]
    if rank % 2 == 0:
        everyone = dist.new_group([0, 2], use_local_synchronization=rank < 0)
        del everyone
    else:
        dist.new_group([0, 2])
    results.append(call(rank, 4, strategy="usp:ulysses=2"))
    return results


def test_members_of_unequally_many_groups() -> None:
    assert run_ranks(4, _in_unequally_many_groups) == [[True] * 3] * 4


def _device_meshes(rank: int, size: int) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    whole = init_device_mesh("cpu", (4,))
    return [
        call(rank % 2, 2, group=mesh["cp"]),
        call(rank // 2, 2, group=mesh["dp"]),
        call(rank, 4, group=whole),
        error_of(lambda: call(rank, 4, group=mesh)),
        error_of(lambda: call(rank, 4, group="cp")),
    ]


def test_device_meshes() -> None:
    for *works, two_dimensions, text in run_ranks(4, _device_meshes):
        assert works == [True] * 3
        assert two_dimensions == (
            "ValueError: group is a DeviceMesh of 2 dimensions: use one, such as mesh['cp']"
        )
        assert text == (
            "ValueError: group must be a process group that this rank belongs to, not 'cp'"
        )


def _outside(rank: int, size: int) -> str:
    import torch.distributed as dist

    group = dist.new_group([0])
    return error_of(lambda: call(0, 1, group=group, strategy="single", layout="contiguous"))


def test_a_rank_outside_the_group() -> None:
    inside, outside = run_ranks(2, _outside)
    assert inside == ""
    assert outside.startswith("ValueError: group must be a process group that this rank belongs to")


def _wrong_on_one_rank(rank: int, size: int, warm: bool) -> list[str]:
    """What each mistake of rank 1 raises, each followed by a right call."""
    causal = masks.build("causal", TOKENS)
    wrong: list[dict[str, Any]] = [
        {"inputs": [x[:, :4] for x in shards(rank, size)]},
        {"inputs": shards(rank, size, torch.float64)},
        {"inputs": [x[..., :8] for x in shards(rank, size)]},
        {"inputs": [x[..., 0] for x in shards(rank, size)]},
        {"inputs": [x.tolist() for x in shards(rank, size)]},
        {"mask": "causal"},
        {"mask": masks.build("full", TOKENS)},
        {"strategy": "rink"},
        {"strategy": "ring_allgather"},
        {"scale": float("nan")},
        {"scale": 10**400},
        {"inputs": [x.to("meta") for x in shards(rank, size)]},
        {"inputs": [x.requires_grad_() for x in shards(rank, size)]},
    ]
    found = []
    for mistake in wrong:
        if warm:
            assert call(rank, size)
        options = {"inputs": shards(rank, size), "mask": causal}
        options |= mistake if rank == 1 else {}
        inputs, mask = options.pop("inputs"), options.pop("mask")
        found.append(
            error_of(lambda: cpbench.distributed_attention(*inputs, mask, **options))  # noqa: B023
        )
        assert call(rank, size)
    return found


def test_all_ranks_raise_what_one_has_wrong_and_go_on() -> None:
    for warm in (False, True):
        first, second = run_ranks(2, _wrong_on_one_rank, warm)
        assert first == second
        length, dtype, head_dim, ndim, lists, text, mask, name, strategy, scale, *rest = first
        huge, meta, gradients = rest
        assert huge.startswith("ValueError: rank 1: scale must be a finite number or None, not 100")
        assert meta.startswith("ValueError: rank 1: q must be a dense tensor on cpu or cuda")
        assert length == (
            "ValueError: rank 1: q has 4 tokens; layout zigzag assigns 16 of 32 to each of 2 ranks"
        )
        for message, words in (
            (dtype, ("float32", "(rank 0)", "float64", "(rank 1)")),
            (head_dim, ("head_dim=16", "head_dim=8")),
            (mask, ("mask ",)),
            (strategy, ("ring_allgather", "zigzag")),
            (gradients, ("direction='fwd'", "direction='fwd_bwd'")),
        ):
            assert message.startswith("RuntimeError: ranks disagree on the problem: ")
            assert all(word in message for word in words)
        assert ndim.startswith("ValueError: rank 1: q has shape [1, 16, 4]; shapes are")
        assert lists.startswith("ValueError: rank 1: q must be a torch.Tensor, not [[[")
        assert text.startswith("ValueError: rank 1: mask must be one of cpbench.masks")
        assert name.startswith("ValueError: rank 1: no strategy 'rink'; there are: burst, ")
        assert scale == "ValueError: rank 1: scale must be a finite number or None, not nan"


def _destroyed_groups(rank: int, size: int) -> int:
    """Open files that each of six groups leaves behind."""
    import torch.distributed as dist

    counts = []
    for _ in range(7):
        group = dist.new_group([0, 1])
        assert call(rank, size, group=group)
        dist.destroy_process_group(group)
        del group
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return (counts[-1] - counts[0]) // 6


def test_groups_that_are_destroyed_are_freed() -> None:
    assert run_ranks(2, _destroyed_groups) == [0, 0]


def _lse_on_one_rank(rank: int, size: int) -> list[bool]:
    mask = masks.build("causal", TOKENS)
    inputs = [x.requires_grad_() for x in shards(rank, size)]
    out, lse = cpbench.distributed_attention(*inputs, mask)
    loss = out.sum() + (lse.square().sum() if rank == 0 else 0)
    gradients = torch.autograd.grad(loss, inputs)
    layout = build_layout("zigzag", TOKENS, size)
    whole = [
        x.requires_grad_() for x in naive.random_inputs(1, TOKENS, 4, 2, 16, torch.float32)[:3]
    ]
    out, lse = cpbench.attention(*whole, mask)
    first = torch.as_tensor(layout.positions(0))
    loss = out.sum() + lse[:, :, first].square().sum()
    expected = [layout.shard(x, rank) for x in torch.autograd.grad(loss, whole)]
    agrees = [torch.allclose(x, y, atol=1e-4) for x, y in zip(gradients, expected, strict=True)]
    return [*agrees, call(rank, size)]


def test_a_loss_that_uses_lse_on_one_rank() -> None:
    assert run_ranks(2, _lse_on_one_rank) == [[True] * 4] * 2


def _default_device(rank: int, size: int) -> bool:
    torch.set_default_device("meta")
    inputs = [x.cpu() for x in _on_cpu(rank, size)]
    mask = masks.build("sliding_window_causal:window=5", TOKENS)
    out, _ = cpbench.distributed_attention(*inputs, mask)
    return out.device.type == "cpu"


def _on_cpu(rank: int, size: int) -> list[torch.Tensor]:
    with torch.device("cpu"):
        return shards(rank, size)


def test_another_default_device() -> None:
    assert run_ranks(2, _default_device) == [True, True]
