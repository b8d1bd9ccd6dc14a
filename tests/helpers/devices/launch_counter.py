"""Counts the kernels that torch would launch on a GPU, and the bytes that they would move.

Run on meta tensors: every operator of torch that computes counts as one kernel that reads each of
its inputs and writes each of its outputs once; views and uninitialised memory are none.  Of the
fused merge, which is no operator of torch, the same is counted from its arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.parallel.partial_results import merge as merging

ROWS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "index_select": lambda inputs, outputs: outputs[0],
    "index_copy_": lambda inputs, outputs: inputs[3],
    "index_add_": lambda inputs, outputs: inputs[3],
}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"}


class LaunchCounter(TorchDispatchMode):
    """Counts while it is active.

    Attributes:
        kernels: number of launches by operator.
        nbytes: bytes read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and name not in FREE:
            reads = not name.startswith("new_") and not name.endswith("_like")
            inputs = [*tree_leaves(args), *tree_leaves(kwargs)] if reads else []
            outputs = tree_leaves(result)
            if name in ROWS:  # of the whole tensor it touches those that are written or read
                inputs, outputs = [ROWS[name](inputs, outputs)], [ROWS[name](inputs, outputs)]
            self.count(name, inputs, outputs)
        return result

    def count(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        self.kernels[name] += 1
        tensors = [x for x in (*inputs, *outputs) if isinstance(x, torch.Tensor)]
        self.nbytes += sum(x.numel() * x.element_size() for x in tensors)

    @property
    def launches(self) -> int:
        return self.kernels.total()


def count_fused_merges(monkeypatch: pytest.MonkeyPatch, counter: LaunchCounter) -> None:
    """Have results merged as on a GPU, where the fused kernel counts as one."""

    def fused(
        out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
        counter.count("merge_results", [out, lse, partial, partial_lse], list(results))
        return results

    monkeypatch.setattr(merging, "merge_eager", lambda *x: pytest.fail("not on a GPU"))
    for user in ("cpbench.parallel.bound_operator", "cpbench.kernels.bands.composed"):
        monkeypatch.setattr(f"{user}.merge", fused)
