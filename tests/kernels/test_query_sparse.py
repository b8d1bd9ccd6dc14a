"""`triton_query_sparse`: selections of single queries compared with dense float64."""

from __future__ import annotations

import naive
import pytest
import torch
from selected_pairs import NoSynchronisation, problem_of, reference

import cpbench
from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.kernels.triton.query_sparse.operator import TritonQuerySparse
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.selections import Blocks, Selection, Tokens, block_grid
from cpbench.tools.compiler import compilation


def compare(
    selection: Selection, problem: Problem, operator: TritonQuerySparse, limit: float
) -> None:
    """All results of a selection against float64."""
    shape = (problem.batch, problem.heads_q, problem.heads_kv, problem.head_dim)
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator().manual_seed(0)
    B, H, G, D = shape
    S, T, V = problem.seq_q, problem.seq_k, problem.value_dim
    sizes = (B, S, H, D), (B, T, G, D), (B, T, G, V), (B, S, H, V)
    q, k, v, dout = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    assert operator.unsupported(problem, selection, "cpu") is None
    plan = operator.prepare(selection, problem, "cpu")
    out, lse = operator.forward(QKV(q, k, v), plan)
    grads = operator.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    expected = reference([q, k, v, dout], selection.dense_rows(0, S).numpy())
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    assert all(x.dtype == dtype for name, x in results.items() if name != "lse")
    for name in naive.TENSORS:
        error = naive.error(results[name], expected[name])
        assert error < limit, f"{name} has an error of {error:.2g}"


def blocks_of(mask: AttnMask, problem: Problem, block: int, share: float = 0.4) -> Blocks:
    """Random blocks of each query and head."""
    grid = block_grid(mask, 1, block, "cpu")
    shape = (problem.batch, problem.heads_q, *grid.areas.shape)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    kept[0, 0, 3] = False  # a query that sees nothing
    return Blocks(grid, kept)


@pytest.mark.parametrize(
    ("mask", "block", "operator", "changes"),
    [
        ("causal", 16, {}, {}),
        ("causal_document:doc_lens=[13,40,17]", 24, {"rows": 16, "cols": 16}, {"head_dim": 24}),
        ("sliding_window:window=9", 32, {"rows": 32}, {"heads_kv": 4, "head_dim_v": 16}),
        ("full", 64, {"cols": 32}, {"heads_q": 3, "heads_kv": 1}),
        ("causal", 20, {}, {"heads_q": 9, "heads_kv": 1, "batch": 1}),
    ],
)
def test_blocks_of_each_query(
    mask: str, block: int, operator: dict[str, int], changes: dict[str, int]
) -> None:
    problem = problem_of(70, 70, **{"head_dim": 16, **changes})
    selection = blocks_of(masks.build(mask, 70), problem, block)
    compare(selection, problem, TritonQuerySparse(**operator), 2e-6)


def test_fewer_queries_than_keys_in_bfloat16() -> None:
    problem = problem_of(30, 70, dtype="bfloat16", head_dim=16)
    mask = masks.build("causal", 70).crop(40, 70, 0, 70)
    compare(blocks_of(mask, problem, 16), problem, TritonQuerySparse(), 1e-2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_listed_keys(shared: bool, dtype: str) -> None:
    problem = problem_of(20, 50, head_dim=16, head_dim_v=24, dtype=dtype)
    heads, generator = 1 if shared else problem.heads_q, torch.Generator().manual_seed(2)
    order = torch.rand(2, heads, 20, 50, generator=generator).argsort(-1)[..., :19]
    order[..., 11:][torch.rand(2, heads, 20, 8, generator=generator) < 0.5] = -1
    order[0, 0, 3] = -1
    selection = Tokens(masks.build("full", 50).crop(0, 20, 0, 50), order, problem.heads_q)
    compare(selection, problem, TritonQuerySparse(), 2e-6 if dtype == "float32" else 1e-2)


def test_blocks_are_planned_without_synchronisation() -> None:
    problem = problem_of(70, 70, head_dim=16)
    selection = blocks_of(masks.build("causal", 70), problem, 16)
    TritonQuerySparse().prepare(selection, problem, "cpu")  # caches what the mask hides
    with NoSynchronisation():
        TritonQuerySparse().prepare(selection, problem, "cpu")


@pytest.mark.parametrize(
    "spec",
    ["moba:block_size=16,top_k=2", "nsa:block_size=16,stride=8,top_k=3,window=20", "dsa:top_k=9"],
)
def test_selectors_take_it_as_their_kernel(spec: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 70, h, 16, generator=generator) for h in (4, 2, 2))
    results = []
    for kernel in ("gathered", "triton_query_sparse"):
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = cpbench.attention(
            *tensors, masks.build("causal", 70), operator=f"{spec},kernel={kernel}"
        )
        out.backward(torch.ones_like(out))
        results.append([out.detach(), *(x.grad for x in tensors)])
    for a, b in zip(*results, strict=True):
        assert naive.error(b, a) < 2e-6


def test_launches_compile_ahead_of_time() -> None:
    targets = ["cuda:80", "cuda:90", "cuda:100"]
    requests = compilation.compile_requests(
        ["triton_query_sparse"], targets, ["bfloat16"], [64, 128], {}
    )
    rows = compilation.compile_kernels(requests)
    assert len(rows) == len(targets) * 2 * 5
    assert all(map(compilation.compiles_well, rows))
    assert all(row["hot_local_bytes"] == 0 for row in rows)


def test_extents_and_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rows = 24 must be a power of two from 16 to 128"):
        TritonQuerySparse(rows=24)
    wide = problem_of(70, 70, head_dim=320)
    assert "head_dim of at most 256" in str(TritonQuerySparse().unsupported(wide, None, "cpu"))
