"""Results of operators on tensors without data: those of torch, without its compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from paths import ROOT
from run_cpbench import cpbench

from cpbench.parallel.tracing.meta_ops import MetaOps

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FUNCTIONS: dict[str, Function] = {
    "add": lambda x, y: x + y,
    "add one number of a tensor": lambda x, y: x + y[0, 0, 0, 0],
    "div of a part": lambda x, y: x[..., :-1] / y[..., :1],
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
    "masked_fill_": lambda x, y: x.masked_fill_(y[..., :1] > 0, 0.0),
    "nan_to_num_": lambda x, _: x.nan_to_num_(0.0),
    "sum": lambda x, _: x.sum(-1),
    "sum of some": lambda x, _: x.sum((0, -2), keepdim=True),
    "sum of all": lambda x, _: x.sum(),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat from the end": lambda x, _: torch.cat([x, x[:, :1]], -3),
    "stack": lambda x, y: torch.stack([x, y]),
    "stack at the end": lambda x, _: torch.stack([x, x, x], -1),
    "zeros like": lambda x, _: torch.zeros_like(x),
    "zeros like, of a dtype": lambda x, _: torch.zeros_like(x, dtype=torch.float64),
    "zeros like a part": lambda x, _: torch.zeros_like(x[:, :1, ::2]),
    "empty like, in order": lambda x, _: torch.empty_like(x, memory_format=torch.contiguous_format),
    "mul a complex number": lambda x, _: x * 1j,
    "cat of the channels last": lambda _, y: torch.cat([y, y], 1),
}
SHAPES = ((2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 1, 4, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
ORDERS = ((0, 1, 2, 3), (1, 0, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0))


def tensor(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> torch.Tensor:
    """A tensor without data whose dimensions lie in memory in this order."""
    made = torch.empty([shape[i] for i in order], dtype=dtype, device="meta")
    return made.permute([order.index(i) for i in range(4)])


def steps(x: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have several indices."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


shapes, dtypes, orders = map(st.sampled_from, (SHAPES, DTYPES, ORDERS))


@settings(deadline=None, max_examples=400, derandomize=True, database=None)
@given(st.sampled_from(sorted(FUNCTIONS)), st.tuples(shapes, dtypes, orders),
       st.tuples(shapes, dtypes, orders))  # fmt: skip
def test_shape_dtype_and_strides_are_those_of_torch(
    name: str, left: tuple[Any, Any, Any], right: tuple[Any, Any, Any]
) -> None:
    function, x, y = FUNCTIONS[name], tensor(*left), tensor(*right)
    try:
        expected = function(x, y)
    except RuntimeError:
        reject()  # not of these shapes
    with MetaOps():
        result = function(x, y)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if left[2] == right[2]:
        assert steps(result) == steps(expected)


def test_real_tensors_are_computed() -> None:
    with MetaOps():
        x = torch.ones(3).mul_(2) + 1
        joined = torch.cat([x, x])
    assert joined.tolist() == [3.0] * 6


METHODS = "ring,ulysses,usp,hierarchical,burst,tile,tree,dispatch,distflash"
AT_EXIT = """
import atexit, os, sys
def write():
    with open(os.path.join(os.environ["LOADED"], str(os.getpid())), "w") as file:
        print(*(name in sys.modules for name in ("torch", "torch._dynamo", "sympy")), file=file)
atexit.register(write)
"""


@pytest.mark.parametrize("line", [
    f"traffic {METHODS} --seq-len 4k --world-size 4",
    "predict ring,ulysses,burst,tree --seq-len 4k --world-size 4",
    "traffic scan --operator ssd --num-heads-kv 64 --seq-len 4k --world-size 4",
    "traffic tile:offload=host,ulysses:offload=host --seq-len 4k --world-size 4",
    "bench --strategy tile,ulysses,hierarchical --seq-len 64 --world-size 2 --device cpu",
])  # fmt: skip
def test_torchs_compiler_is_not_imported(tmp_path: Path, line: str) -> None:
    """It takes a second of every process, and of every worker."""
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    path = f"{tmp_path}:{ROOT}"
    environment = {"PYTHONPATH": path, "LOADED": str(loaded), "XDG_CACHE_HOME": str(tmp_path)}
    code, stderr = cpbench(*line.split(), env=environment)
    assert code == 0, stderr[-1000:]
    processes = [file.read_text().split() for file in loaded.iterdir()]
    assert ["True", "False", "False"] in processes
    assert not [loaded for loaded in processes if "True" in loaded[1:]]
