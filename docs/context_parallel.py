"""Train a small language model with its sequence on several ranks.

    python docs/context_parallel.py [--ranks 2] [--strategy ring] [--layout zigzag] [--steps 20]
        [--compile] [--plot docs/context_parallel.svg]

The same model is trained on one rank with torch's own attention, and the losses are compared.  What
context parallelism asks of a training loop is marked with (1) to (5); it takes the place of
``torch.distributed.tensor.experimental.context_parallel``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cpbench
from cpbench import masks

TOKENS, WIDTH, HEADS, KV_HEADS, LAYERS = 509, 64, 4, 2, 3  # 509 does not divide by any layout
HEAD_DIM = WIDTH // HEADS


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of ``[B, S, H, D]`` at these positions."""
    frequency = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = positions[:, None, None] * frequency
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.stack(rotated, dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention and a feed-forward layer, with their residuals."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        x = x + self.out(self.attend(rotate(q, positions), rotate(k, positions), v).flatten(2))
        return x + self.feed(self.norms[1](x))


class Model(nn.Module):
    """A transformer over bytes; every block is checkpointed."""

    def __init__(self, attend) -> None:
        super().__init__()
        torch.manual_seed(0)  # (1) the same weights on every rank
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList([Block(attend) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, positions, use_reentrant=False)
        return self.head(x)


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes of this file and the bytes that follow them, ``[1, TOKENS]`` each."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    starts = [step * 97 % (len(text) - TOKENS - 1) for step in range(steps)]
    return [(text[None, i : i + TOKENS], text[None, i + 1 : i + 1 + TOKENS]) for i in starts]


def train(model: nn.Module, shard, positions: torch.Tensor, options) -> list[float]:
    """The loss of each step.

    Args:
        shard: the tokens of this rank, of a ``[1, TOKENS]`` tensor.
        positions: their positions in the sequence.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    forward = torch.compile(model, backend="aot_eager") if options.compile else model
    losses = []
    for tokens, targets in batches(options.steps):
        logits = forward(shard(tokens), positions)
        # (2) padding has no target; the mean is over the tokens of all ranks
        local_targets = shard(targets).masked_fill(positions >= TOKENS, -100)
        loss = F.cross_entropy(logits[0], local_targets[0], reduction="sum") / TOKENS
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if dist.is_initialized():  # (3) every rank saw a part of the loss
            dist.all_reduce(loss)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        losses.append(float(loss))
    return losses


def on_one_rank(options) -> list[float]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return train(Model(attend), lambda x: x, torch.arange(TOKENS), options)


def on_this_rank(rank: int, options, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    mask = masks.build("causal", TOKENS)
    # (4) which tokens this rank has: zigzag balances a causal mask
    layout = cpbench.layout.build(options.layout, TOKENS, options.ranks, mask)
    positions = torch.as_tensor(layout.positions(rank))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # (5) the only call that communicates in the forward and backward pass
        out, _ = cpbench.distributed_attention(
            q, k, v, mask, strategy=options.strategy, layout=options.layout
        )
        return out

    losses = train(Model(attend), lambda x: layout.shard(x, rank), positions, options)
    if rank == 0:
        torch.save(losses, f"{folder}/losses")
    dist.destroy_process_group()


def plot(one: list[float], several: list[float], options) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.4), layout="constrained")).add_subplot()
    axes.plot(one, color="0.6", linewidth=5, label="one rank, torch's attention")
    axes.plot(several, color="C0", label=f"{options.ranks} ranks, {options.strategy}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.legend()
    figure.savefig(options.plot)


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", default="ring")
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    one = on_one_rank(options)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_this_rank, (options, folder), nprocs=options.ranks)
        several = torch.load(f"{folder}/losses")
    print("step  one rank  several")
    for step in range(0, options.steps, max(1, options.steps // 5)):
        print(f"{step:4}  {one[step]:8.5f}  {several[step]:7.5f}")
    difference = max(abs(a - b) for a, b in zip(one, several, strict=True))
    print(f"largest difference over {options.steps} steps: {difference:.1e}")
    if options.plot:
        plot(one, several, options)
    return difference


if __name__ == "__main__":
    raise SystemExit(main() > 1e-4)
