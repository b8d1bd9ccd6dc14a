"""Masks that differ between heads on this CPU: `bands` compared with dense attention.

    python tests/microbench/block_sparse.py [--tokens 2048,4096,8192,16384] [--only uniform]
        [--rounds 5] [--flex]

One torch thread, float32, two heads of head_dim 64; medians of CPU time (``time.process_time``) of
interleaved runs; compare ratios within one run only.  *dense* is torch's flash kernel without a
mask, a lower bound for dense kernels.  *masked* is the same with the mask as a dense bias (if that
fits 1 GiB).  *flex* is compiled FlexAttention with a BlockMask per head, forward only on CPUs.
*tiles* is the area of the tiles of 128 x 128 that have a visible pair, over the visible area.
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


def compared_calls(mask: HeadMasks, with_flex: bool) -> Calls:
    """Forward and backward call of each method, by name."""
    n = mask.seq_q
    tensors = [torch.randn(1, n, HEADS, DIM) for _ in range(4)]
    q, k, v, dout = tensors
    problem = Problem(
        batch=1, seq_q=n, seq_k=n, heads_q=HEADS, heads_kv=HEADS, head_dim=DIM, dtype="float32"
    )  # fmt: skip
    op = Bands()
    plan = op.prepare(mask, problem, "cpu")
    out, lse = op.forward(QKV(q, k, v), plan)
    calls: Calls = {
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

        calls[name] = (
            lambda bias=bias: FLASH(qt, kt, vt, 0.0, False, attn_mask=bias), backward
        )  # fmt: skip
    if with_flex:
        calls["flex"] = (_flex(mask, qt, kt, vt, out), None)
    return calls


def _flex(
    mask: HeadMasks, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, expected: torch.Tensor
) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = torch.as_tensor(mask.to_dense())
    blocks = create_block_mask(
        lambda b, h, i, j: visible[h, i, j], None, HEADS, mask.seq_q, mask.seq_k, device="cpu"
    )
    attend = torch.compile(flex_attention, dynamic=False)
    assert torch.allclose(attend(q, k, v, block_mask=blocks).transpose(1, 2), expected, atol=1e-4)
    return lambda: attend(q, k, v, block_mask=blocks)


def medians(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward and backward of each method; nan without a backward."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(rounds):
        for name, passes in calls.items():
            for call, samples in zip(passes, times[name], strict=True):
                start = time.process_time()
                if call is not None:
                    call()
                    samples.append((time.process_time() - start) * 1e3)
    return {
        name: tuple(statistics.median(x) if x else float("nan") for x in passes)  # type: ignore[misc]
        for name, passes in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="2048,4096,8192,16384")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="with FlexAttention: compiles")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("ms forward, forward + backward; in brackets times over bands: above 1, bands is faster")
    for name, spec in MASKS.items():
        if options.only not in name:
            continue
        for tokens in map(int, options.tokens.split(",")):
            mask = build_heads(spec, tokens, HEADS)
            assert isinstance(mask, HeadMasks)
            executed = sum(tiles(head, 128, 128).executed_area for head in mask.masks)
            with_flex = options.flex and tokens <= 8192
            ms = medians(compared_calls(mask, with_flex), options.rounds)
            bands_fwd, bands_bwd = ms["bands"]
            overhead = executed / HEADS / mask.area
            line = f"{name:<21}{tokens:>6} {mask.density:6.1%} tiles {overhead:5.2f}x"
            for method, (fwd, bwd) in ms.items():
                line += f"  {method} {fwd:.0f}"
                line += "" if method == "bands" else f" ({fwd / bands_fwd:.1f}x)"
                if bwd == bwd:
                    ratio = (fwd + bwd) / (bands_fwd + bands_bwd)
                    line += f", {fwd + bwd:.0f}"
                    line += "" if method == "bands" else f" ({ratio:.1f}x)"
            print(line, flush=True)


if __name__ == "__main__":
    main()
