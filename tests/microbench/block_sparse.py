"""Masks that differ from head to head on this CPU: `bands` next to dense attention.

    python tests/microbench/block_sparse.py [--tokens 2048,4096,8192,16384] [--only uniform]
        [--rounds 5] [--flex]

One torch thread, float32, two heads of 64 lanes; medians of CPU time (``time.process_time``) of
interleaved runs; compare ratios within one run only.  *dense* is torch's flash kernel without any
mask: what a dense kernel needs at least.  *masked* is the same with the mask as a dense bias (where
that fits in 1 GiB).  *flex* is compiled FlexAttention with a BlockMask for each head, forward only
on CPUs.  *tiles* is what tiles of 128 x 128 execute, over what is visible.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cpbench.core.operator import QKV, BackwardInputs

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.core.problem import Problem
from cpbench.kernels.bands.operator import Bands
from cpbench.masks import build_heads
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.tiling import tiles

HEADS, DIM = 2, 64
MASKS = {
    "uniform 128, 10 %": "block_sparse_uniform:block_size=128,keep=0.1",
    "uniform 128, 30 %": "block_sparse_uniform:block_size=128,keep=0.3",
    "uniform 64, 10 %": "block_sparse_uniform:block_size=64,keep=0.1",
    "variable 128, 10 %": "block_sparse_variable:block_size=128,keep=0.1",
    "vertical_slash 64+64": "vertical_slash:num_vertical=64,num_slash=64",
}
DENSE_BYTES = 1 << 30
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Calls = dict[str, tuple[Callable[[], object], Callable[[], object] | None]]


def contestants(mask: HeadMasks, with_flex: bool) -> Calls:
    """Forward and backward of each, by name."""
    n = mask.seq_q
    tensors = [torch.randn(1, n, HEADS, DIM) for _ in range(4)]
    q, k, v, dout = tensors
    problem = Problem(
        batch=1, seq_q=n, seq_k=n, heads_q=HEADS, heads_kv=HEADS, head_dim=DIM, dtype="float32"
    )  # fmt: skip
    op = Bands()
    plan = op.prepare(mask, problem, "cpu")
    out, lse = op.forward(QKV(q, k, v), plan)
    found: Calls = {
        "bands": (
            lambda: op.forward(QKV(q, k, v), plan),
            lambda: op.backward(BackwardInputs(dout, q, k, v, out, lse), plan),
        )
    }
    qt, kt, vt, dt = (x.transpose(1, 2).contiguous() for x in tensors)
    biases = {"dense": None}
    if HEADS * n * n * 4 <= DENSE_BYTES:
        hidden = ~torch.as_tensor(mask.to_dense())[None]
        biases["masked"] = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    for name, bias in biases.items():
        o, l = FLASH(qt, kt, vt, 0.0, False, attn_mask=bias)  # noqa: E741
        if bias is not None:
            assert torch.allclose(o.transpose(1, 2), out, atol=1e-4), "not the same mask"

        def backward(o=o, l=l, bias=bias):  # noqa: E741
            return FLASH_BACKWARD(dt, qt, kt, vt, o, l, 0.0, False, attn_mask=bias)

        found[name] = (
            lambda bias=bias: FLASH(qt, kt, vt, 0.0, False, attn_mask=bias), backward
        )  # fmt: skip
    if with_flex:
        found["flex"] = (_flex(mask, qt, kt, vt, out), None)
    return found


def _flex(mask: HeadMasks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, want: torch.Tensor):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = torch.as_tensor(mask.to_dense())
    blocks = create_block_mask(
        lambda b, h, i, j: seen[h, i, j], None, HEADS, mask.seq_q, mask.seq_k, device="cpu"
    )
    attend = torch.compile(flex_attention, dynamic=False)
    assert torch.allclose(attend(q, k, v, block_mask=blocks).transpose(1, 2), want, atol=1e-4)
    return lambda: attend(q, k, v, block_mask=blocks)


def medians(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds forward and backward of each; nan where there is none."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(rounds):
        for name, both in calls.items():
            for call, into in zip(both, times[name], strict=True):
                begun = time.process_time()
                if call is not None:
                    call()
                    into.append((time.process_time() - begun) * 1e3)
    return {
        name: tuple(statistics.median(x) if x else float("nan") for x in both)  # type: ignore[misc]
        for name, both in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="2048,4096,8192,16384")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="with FlexAttention: compiles")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("ms forward, forward + backward; in brackets over bands: above 1, bands is faster")
    for name, spec in MASKS.items():
        if options.only not in name:
            continue
        for tokens in map(int, options.tokens.split(",")):
            mask = build_heads(spec, tokens, HEADS)
            assert isinstance(mask, HeadMasks)
            executed = sum(tiles(one, 128, 128).executed_area for one in mask.masks)
            found = medians(contestants(mask, options.flex and tokens <= 8192), options.rounds)
            ours = found["bands"]
            share = executed / HEADS / mask.area
            line = f"{name:<21}{tokens:>6} {mask.density:6.1%} tiles {share:5.2f}x"
            for who, (fwd, bwd) in found.items():
                line += f"  {who} {fwd:.0f}"
                line += "" if who == "bands" else f" ({fwd / ours[0]:.1f}x)"
                if bwd == bwd:
                    line += f", {fwd + bwd:.0f}"
                    line += "" if who == "bands" else f" ({(fwd + bwd) / sum(ours):.1f}x)"
            print(line, flush=True)


if __name__ == "__main__":
    main()
