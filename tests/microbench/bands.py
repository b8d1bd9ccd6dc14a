"""Speed of `bands` on this CPU, compared with torch on the same masks.

    python tests/microbench/bands.py [--quick] [--only "window 512,..."] [--dtype bfloat16] [--flex]

One torch thread; medians of CPU time (``time.process_time``) of interleaved runs, so that other
load matters little; compare ratios within one run only.  Compared with: scaled dot product
attention with a dense mask; one causal flash call over all tokens (which ignores the mask); one
flash call per document; for squares one flash call of the same mask; and compiled FlexAttention
(forward only on CPUs; needs g++ and half a minute).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cpbench.core.operator import QKV, BackwardInputs

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.core.problem import Problem
from cpbench.kernels.bands.operator import Bands
from cpbench.masks import build
from cpbench.masks.attn_mask import AttnMask

Call = Callable[[], object]
SQUARES = (512, 1024, 2048, 4096)  # tokens

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def lengths(n: int, documents: int) -> list[int]:
    """Lengths of random documents that tile n tokens."""
    random = np.random.default_rng(0)
    cuts = np.sort(random.choice(np.arange(1, n), documents - 1, replace=False))
    return [int(x) for x in np.diff([0, *cuts, n])]


def cases(quick: bool) -> dict[str, tuple[AttnMask, list[int]]]:
    """Masks by name; with the document lengths, if the mask is only documents."""
    n = 2048 if quick else 8192
    lens = lengths(n, 16)
    masks = {
        "causal": (build("causal", n), []),
        "window 512": (build("sliding_window_causal", n, window=512), []),
        "streaming": (build("streaming", n, num_sinks=4, window=512), []),
        "share_question": (build("share_question", n, doc_lens=lens), []),
        "global_window": (build("global_sliding_window", n, num_global=64, window=512), []),
        "prefix_lm": (build("prefix_lm_causal", n, prefix_len=n // 4), []),
        "block_document": (
            build("block_causal_document", n, doc_lens=lens, block_size=256), []
        ),
        "document": (build("causal_document", n, doc_lens=lens), lens),
    }  # fmt: skip
    n, count = (1 << 14, 128) if quick else (1 << 17, 1000)
    lens = lengths(n, count)
    masks[f"{count} documents"] = (build("causal_document", n, doc_lens=lens), lens)
    n = 8192 if quick else 1 << 15
    ranges = np.array([[n // 8, n // 8], [n * 6 // 8, n // 8]])  # rank 1 of 4
    window = build("sliding_window_causal", n, window=512)
    masks["window zigzag"] = (window.restrict(ranges, ranges), [])
    masks["window striped"] = (
        build("sliding_window_causal", n, window=4096).stride(4, 1, [2]), []
    )  # fmt: skip
    for n in (512, 1024) if quick else SQUARES:
        masks |= {f"{name} {n}": (build(name, n), [n]) for name in ("full", "causal")}
    return masks


def bands(problem: Problem, mask: AttnMask, tensors: list[torch.Tensor], backward: bool) -> Call:
    q, k, v, dout = tensors
    operator = Bands()
    plan = operator.prepare(mask, problem, "cpu")

    def call() -> object:
        out, lse = operator.forward(QKV(q, k, v), plan)
        return operator.backward(BackwardInputs(dout, q, k, v, out, lse), plan) if backward else out

    return call


def dense(mask: AttnMask, tensors: list[torch.Tensor], backward: bool) -> Call:
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in tensors)
    visible = torch.from_numpy(mask.to_dense())
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)

    def call() -> object:
        leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=bias)
        return torch.autograd.grad(out, leaves, dout) if backward else out

    return call


def documents(
    lens: list[int], tensors: list[torch.Tensor], backward: bool, causal: bool = True
) -> Call:
    """One flash call per document; a single document is a plain call."""
    ends = [0, *np.cumsum(lens).tolist()]
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)

    def call() -> object:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        out = torch.empty_like(q)
        for a, b in itertools.pairwise(ends):
            document = [x[:, :, a:b] for x in (q, k, v)]
            o, lse = FLASH(*document, 0.0, causal)
            out[:, :, a:b] = o
            if backward:
                document_grads = FLASH_BACKWARD(dout[:, :, a:b], *document, o, lse, 0.0, causal)
                for total, grad in zip(grads, document_grads, strict=True):
                    total[:, :, a:b] = grad
        return out, grads

    return call


def flex(mask: AttnMask, tensors: list[torch.Tensor]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, _ = (x.transpose(1, 2).contiguous() for x in tensors)
    assert len(mask.slices) == 1, "one band only"
    lo, hi = mask.slices[0, 4:].tolist()

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j - i >= lo) & (j - i <= hi)

    block_mask = create_block_mask(visible, None, None, mask.seq_q, mask.seq_k, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    with torch.no_grad():
        compiled(q, k, v, block_mask=block_mask)

    def call() -> object:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=block_mask)

    return call


def medians(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of each call, after one warmup; the dense one runs half as often."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-1, repeats):
        for name, call in calls.items():
            if name == "dense" and round_ % 2:
                continue
            begin = time.process_time()
            call()
            if round_ >= 0:
                times[name].append((time.process_time() - begin) * 1e3)
    return {name: statistics.median(samples) for name, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for a smoke test")
    parser.add_argument("--only", default="", help="names of masks, separated by commas")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true", help="compile FlexAttention for the window")
    options = parser.parse_args()
    torch.set_num_threads(1)

    heads, head_dim = options.heads, 64
    print(f"{options.dtype}, {heads} heads, head dim {head_dim}; one thread, median CPU ms;")
    print("ratios are times over that of bands: above 1, bands is faster")
    methods = ("dense", "causal", "per document", "square", "flex")
    head = "".join(f"{name:>19}" for name in methods)
    print(f"{'mask':<21}{'tokens':>7} {'pass':<8}{'bands':>8}{head}")
    for name, (mask, lens) in cases(options.quick).items():
        if options.only and name not in options.only.split(","):
            continue
        n = mask.seq_q
        problem = Problem(
            batch=1, seq_q=n, seq_k=mask.seq_k, heads_q=heads, heads_kv=heads, head_dim=head_dim,
            dtype=options.dtype,
        )  # fmt: skip
        random = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(1, n, heads, head_dim, generator=random).to(getattr(torch, options.dtype))
            for _ in range(4)
        ]
        for backward in (False, True):
            calls = {"bands": bands(problem, mask, tensors, backward)}
            if lens == [n]:
                causal = name.startswith("causal")
                calls["square"] = documents(lens, tensors, backward, causal)
            elif n <= 8192:
                calls["dense"] = dense(mask, tensors, backward)
                calls["causal"] = documents([n], tensors, backward)
            if len(lens) > 1:
                calls["per document"] = documents(lens, tensors, backward)
            if options.flex and name == "window 512" and not backward:
                calls["flex"] = flex(mask, tensors)
            ms = medians(calls, options.repeats * (10 if lens == [n] else 1))
            line = f"{name:<21}{n:>7} {'fwd+bwd' if backward else 'fwd':<8}{ms['bands']:>8.1f}"
            for method in methods:
                cell = ""
                if method in ms:
                    cell = f"{ms[method]:.1f} ({ms[method] / ms['bands']:.2f}x)"
                line += f"{cell:>19}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
