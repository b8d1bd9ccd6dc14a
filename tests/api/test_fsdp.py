"""Parameters sharded by FSDP over the ranks that share a sequence."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

import cpbench
from cpbench import masks
from cpbench.layout import build as build_layout

TOKENS, WIDTH, HEADS, STEPS = 64, 32, 2, 4


class Block(nn.Module):
    """Attention with its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, group: object) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(2)
        mask = masks.build("causal", TOKENS)
        if group is None:
            out, _ = cpbench.attention(q, k, v, mask)
        else:
            out, _ = cpbench.distributed_attention(
                q, k, v, mask, strategy="ring", layout="zigzag", group=group
            )
        return x + self.out(out.flatten(2))


def train(blocks: list[Block], x: torch.Tensor, y: torch.Tensor, group: object) -> list[float]:
    """Losses of some steps; on several ranks, the mean over them."""
    parameters = [p for block in blocks for p in block.parameters()]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(STEPS):
        hidden = x
        for block in blocks:
            hidden = block(hidden, group)
        loss = (hidden - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if group is not None:
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        losses.append(mean.item())
    return losses


def example() -> tuple[list[Block], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return [Block() for _ in range(3)], torch.randn(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)


def _on_ranks(rank: int, size: int) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks, x, y = example()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    layout = build_layout("zigzag", TOKENS, size, masks.build("causal", TOKENS))
    return train(blocks, layout.shard(x, rank), layout.shard(y, rank), mesh["cp"])


def test_losses_are_those_of_one_rank() -> None:
    blocks, x, y = example()
    expected = train(blocks, x, y, None)
    for losses in run_ranks(2, _on_ranks):
        assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
