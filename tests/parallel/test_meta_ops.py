"""Results of operators on tensors without data: those of torch, without its compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_cpbench import cpbench

from cpbench.parallel.meta_ops import MetaOps

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FUNCTIONS: dict[str, Function] = {
    "add": lambda x, y: x + y,
    "add a multiple": lambda x, y: torch.add(x, y, alpha=2),
    "rsub": lambda x, _: 1 - x,
    "mul": lambda x, y: x * y,
    "mul a number": lambda x, _: x * 2,
    "div": lambda x, y: x / y,
    "square": lambda x, _: x.square(),
    "exp": lambda x, _: x.exp(),
    "maximum": torch.maximum,
    "logaddexp": torch.logaddexp,
    "less": lambda x, y: x < y,
    "in place": lambda x, y: x.mul_(y) if x.shape == (x + y).shape else x,
    "nan_to_num_": lambda x, _: x.nan_to_num_(0.0),
    "sum": lambda x, _: x.sum(-1),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x, y.expand_as(x)], 1),
    "cat from the end": lambda x, _: torch.cat([x, x[:, :1]], -3),
    "cat of the channels last": lambda x, y: torch.cat([y, y], 1).expand(2, -1, -1, -1),
}
SHAPES = ((2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 1, 4, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
ORDERS = ((0, 1, 2, 3), (1, 0, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0))


def tensor(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> torch.Tensor:
    """A tensor of ones whose dimensions lie in memory in this order."""
    made = torch.ones([shape[i] for i in order], dtype=dtype)
    return made.permute([order.index(i) for i in range(4)])


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(st.sampled_from(sorted(FUNCTIONS)), st.sampled_from(SHAPES), st.sampled_from(DTYPES),
       st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.sampled_from(ORDERS))  # fmt: skip
def test_shape_dtype_and_strides_are_those_of_real_tensors(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype,
    order: tuple[int, ...], other_order: tuple[int, ...],
) -> None:  # fmt: skip
    function = FUNCTIONS[name]
    x, y = tensor(SHAPES[0], dtype, order), tensor(shape, other, other_order)
    on_meta = [one.as_strided(one.shape, one.stride()).to("meta") for one in (x, y)]
    assert [one.stride() for one in on_meta] == [x.stride(), y.stride()]
    try:
        expected = function(x, y)
    except RuntimeError:
        return  # not of integers, or not into the shape
    with MetaOps():
        result = function(*on_meta)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if order == other_order:
        assert result.stride() == expected.stride()


def test_real_tensors_are_computed() -> None:
    with MetaOps():
        x = torch.ones(3).mul_(2) + 1
        joined = torch.cat([x, x])
    assert joined.tolist() == [3.0] * 6


METHODS = "ring,ulysses,usp,hierarchical,burst,tile,tree,dispatch,distflash"


@pytest.mark.parametrize("line", [
    f"traffic {METHODS} --seq-len 4k --world-size 4",
    "predict ring,ulysses,burst --seq-len 4k --world-size 4",
    "traffic scan --operator ssd --num-heads-kv 64 --seq-len 4k --world-size 4",
    "traffic tile:offload=host,ulysses:offload=host --seq-len 4k --world-size 4",
    "bench --operator bands --strategy tile,ulysses --seq-len 64 --world-size 2 --device cpu",
])  # fmt: skip
def test_torchs_compiler_is_not_imported(tmp_path: Path, line: str) -> None:
    """It takes a second of every process, and of every worker."""
    words = line.split()
    if words[0] == "bench":
        words += ["--out", str(tmp_path / "run")]
    code, stderr = cpbench(*words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    logs = [stderr, *(log.read_text() for log in tmp_path.rglob("rank*.log"))]
    assert code == 0, stderr[-1000:]
    assert len(logs) == (3 if words[0] == "bench" else 1)
    for log in logs:
        assert "import time:" in log
        assert "torch._dynamo" not in log
