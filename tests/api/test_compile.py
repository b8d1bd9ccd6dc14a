"""The public functions inside ``torch.compile``: dense operators stay in the graph."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from typing import Any

import naive
import pytest
import torch
from limits import LIMIT_S
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.layout import build as build_layout

BACKENDS = ["eager", "aot_eager", "inductor"]
IN_GRAPH = ["bands", "reference", "sdpa.cpu_flash"]
BREAKING = ["sdpa.math", *sorted(i.name for i in registry.operators().values() if i.selects)]
TOKENS = 128


@pytest.fixture(autouse=True)
def _new_caches() -> None:
    torch._dynamo.reset()


def inputs_of(batch: int = 1) -> list[torch.Tensor]:
    *qkv, dout = naive.random_inputs(batch, TOKENS, 4, 2, 32, torch.float32)
    return [*(x.requires_grad_() for x in qkv), dout]


class Block(torch.nn.Module):
    """Attention between operations that a compiler would like to fuse."""

    def __init__(self, operator: str, lse: bool = False) -> None:
        super().__init__()
        self.operator, self.lse = operator, lse
        self.mask = masks.build("full" if operator == "vsa" else "causal", TOKENS)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = cpbench.attention(q.sin(), k.cos(), v * 2, self.mask, self.operator)
        if self.lse:
            assert lse is not None
            out = out + lse.transpose(1, 2).unsqueeze(-1)
        return out.relu() + 1


def run(block: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    *qkv, dout = inputs
    out = block(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def assert_same(block: Block, compiled: Any, inputs: list[torch.Tensor]) -> None:
    for x, y in zip(run(block, inputs), run(compiled, inputs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(block(*inputs[:3]), compiled(*inputs[:3]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", IN_GRAPH)
@pytest.mark.parametrize("lse", [False, True])
def test_dense_operators_stay_in_the_graph(backend: str, operator: str, lse: bool) -> None:
    block = Block(operator, lse)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    assert_same(block, compiled, inputs_of())


@pytest.mark.parametrize("operator", BREAKING)
def test_other_operators_break_the_graph(operator: str) -> None:
    """What a back end compiles is around the break, and the same for all of them."""
    block = Block(operator)
    backend = "aot_eager" if operator in ("sdpa.math", "moba") else "eager"
    assert_same(block, torch.compile(block, backend=backend), inputs_of())


def test_lengths_of_the_batch_may_change_and_masks_are_told_apart() -> None:
    block = Block("bands")
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (1, 2, 3):
        assert_same(block, compiled, inputs_of(batch))
    for name in ("full", "sliding_window:window=16"):
        block.mask = masks.build(name, TOKENS)
        assert_same(block, compiled, inputs_of(2))


def test_masks_that_are_built_inside_or_have_no_name() -> None:
    cut = masks.build("causal", TOKENS).crop(8, TOKENS, 0, TOKENS)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first, _ = cpbench.attention(q * 1, k, v, masks.build("causal", q.shape[1]))
        second, _ = cpbench.attention(q[:, 8:], k, v, cut)
        return first[:, 8:] + second

    inputs = inputs_of()
    inputs[3] = inputs[3][:, 8:].contiguous()
    compiled = torch.compile(attend, backend="aot_eager")
    for x, y in zip(run(attend, inputs), run(compiled, inputs), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.from_cu_seqlens(torch.tensor([0, 50, TOKENS])),
        lambda: masks.AttnMask.from_slices(TOKENS, TOKENS, [[0, TOKENS, 0, TOKENS, -9, 0]]),
        lambda: masks.build("causal", TOKENS * 2).crop(0, TOKENS, 0, TOKENS),
        lambda: masks.build("causal", TOKENS).transpose().transpose().simplify(),
    ],
    ids=["cu_seqlens", "slices", "crop", "transpose"],
)
def test_masks_of_any_making_inside(make: Any) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cpbench.attention(q * 1, k, v, make())[0] + 1

    inputs = inputs_of()
    compiled = torch.compile(attend, backend="aot_eager")
    for x, y in zip(run(attend, inputs), run(compiled, inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_copies_of_masks() -> None:
    inputs = inputs_of()
    for copied in (pickle.loads(pickle.dumps(masks.build("sliding_window:window=31", TOKENS))),
                   copy.deepcopy(masks.build("sliding_window:window=33", TOKENS))):  # fmt: skip
        block = Block("bands")
        block.mask = copied
        masks._build_cached.cache_clear()
        gc.collect()
        assert_same(block, torch.compile(block, backend="aot_eager"), inputs)


def test_importing_does_not_import_the_compiler() -> None:
    code = "import sys, cpbench.api; print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_autocast_and_inference_mode() -> None:
    block = Block("bands")
    compiled = torch.compile(block, backend="aot_eager")
    inputs = inputs_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block(*inputs[:3])
        found = compiled(*inputs[:3])
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    with torch.inference_mode():
        clones = [x.clone() for x in inputs[:3]]
        torch.testing.assert_close(compiled(*clones), block(*clones))


def test_bad_input_is_the_same_error() -> None:
    block = Block("bands")
    compiled = torch.compile(block, backend="aot_eager")
    q, k, v, _ = inputs_of()
    with pytest.raises(ValueError, match="do not fit a mask of 128 queries"):
        compiled(q[:, :64], k[:, :64], v[:, :64])


@pytest.mark.parametrize("how", ["mask", "operator", "axes", "nan", "inf"])
def test_mistakes_are_one_line(how: str) -> None:
    mask = masks.build("causal", TOKENS)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if how == "mask":
            return cpbench.attention(q, k, v, torch.ones(2, 2))
        if how == "axes":
            return cpbench.attention(q[0], k, v, mask)
        options: dict[str, Any] = (
            {"scale": float(how)} if how in ("nan", "inf") else {"operator": "band"}
        )
        return cpbench.attention(q, k, v, mask, **options)

    with pytest.raises(
        ValueError, match=r"mask must be|no operator|shapes are|scale must"
    ) as error:
        torch.compile(attend, backend="eager")(*inputs_of()[:3])
    assert "\n" not in str(error.value)


def _compiled_on_shards(rank: int, size: int) -> list[bool]:
    mask = masks.build("causal", TOKENS)
    layout = build_layout("zigzag", TOKENS, size, mask)
    *qkv, dout = (layout.shard(x.detach(), rank) for x in inputs_of())
    leaves = [x.requires_grad_() for x in qkv]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = cpbench.distributed_attention(q.sin(), k, v * 2, mask, strategy="ring")
        return out.relu() + 1

    inputs = [*leaves, dout]
    results = []
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=backend)
        pairs = zip(run(attend, inputs), run(compiled, inputs), strict=True)
        results += [torch.allclose(x, y, atol=1e-5, rtol=1e-4) for x, y in pairs]
    return results


def test_strategies_break_the_graph() -> None:
    assert run_ranks(2, _compiled_on_shards) == [[True] * 8] * 2


FRESH = """
import torch, cpbench
from cpbench import masks
mask = masks.build("causal", 64)
def f(q, k, v):
    return cpbench.attention(q.sin(), k, v, mask, "{operator}")[0].relu()
inputs = [torch.randn(1, 64, 2, 16, requires_grad=True) for _ in range(3)]
out = torch.compile(f, backend="{backend}")(*inputs)
found = torch.autograd.grad(out.sum(), inputs)
expected = torch.autograd.grad(f(*inputs).sum(), inputs)
assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected))
"""


@pytest.mark.parametrize(
    ("operator", "backend"), [("bands", "eager"), ("bands", "inductor"), ("moba", "aot_eager")]
)
def test_the_first_call_of_a_process_may_be_compiled(operator: str, backend: str) -> None:
    code = FRESH.format(backend=backend, operator=operator)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
