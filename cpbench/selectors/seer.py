"""Selector `seer`: top-k blocks by a learned gate, which the user gives as a file.

Source: SeerAttention, arXiv 2410.13276: the gate of a pair of blocks is the product of the linear
maps of its pooled queries (their mean) and of its pooled keys (maximum, minimum and mean, side by
side).  The file, in safetensors, holds the weights of these maps, or the gates themselves, such as
those of another estimator.  The original also rotates the pooled queries and keys by their
positions (RoPE); maps of that kind come as gates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.selectors.common.base import Branch, Plan
from cpbench.selectors.common.pooled_keys import PooledKeySelector
from cpbench.selectors.common.ranking import block_extremes, block_means, qk_scores, top_blocks
from cpbench.selectors.common.tensor_file import TensorFile
from cpbench.selectors.selections import Blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem

OPERATORS = (
    OperatorInfo(
        name="seer",
        summary="top-k blocks by a learned gate from a file, or by pooled queries and keys",
        source="SeerAttention, arXiv 2410.13276",
        load="cpbench.selectors.seer:Seer",
        params=("gates", "block_size", "top_k", "keep", "kernel"),
        external_lse=False,
        variants=("block_size=16,keep=0.3",),
        selects=True,
        selects_from="pooled_keys",
        looks_ahead="block",
    ),
)


class Seer(PooledKeySelector):
    """For each block of queries, the blocks of keys with the largest gates; the queries' own block
    is forced, and counted.

    Args:
        gates: safetensors file, with either ``gates`` ``[H, X, Y]``, for as many blocks as the
            sequence has or more, or ``q_weight`` ``[H, D, E]`` and ``k_weight`` ``[G, 3 * D, E]``
            (maximum, minimum, mean).  Without a file the maps are the identity and the mean of the
            three, so that it says little of a learned gate.
        block_size: tokens per block, of queries and keys.
        top_k: blocks per row, if ``keep`` is 0.
        keep: share of the visible blocks of each row to keep; 0 uses ``top_k``.
        kernel: see :class:`Selector`.
    """

    name = "seer"

    def __init__(
        self,
        gates: str = "",
        block_size: int = 64,
        top_k: int = 16,
        keep: float = 0.1,
        kernel: str = "",
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        self.query_block = block_size
        self._gates_file = str(gates)
        wanted = ("gates",), ("q_weight", "k_weight")
        self._file = TensorFile(self.name, "gates", str(gates), wanted) if gates else None

    def misfit(self, problem: Problem) -> str | None:
        if self._file is None:
            return None
        shapes, file = self._file.shapes, self._gates_file
        heads, dim = problem.heads_q, problem.head_dim
        if "gates" in shapes:
            rows, columns = (-(-n // self.block_size) for n in (problem.seq_q, problem.seq_k))
            shape = shapes["gates"]
            if len(shape) != 3 or shape[0] != heads or shape[1] < rows or shape[2] < columns:
                needed = f"[{heads}, at least {rows}, at least {columns}]"
                return f"seer: gates of {file} is {list(shape)}; the case needs {needed}"
        else:
            q, k = shapes["q_weight"], shapes["k_weight"]
            if len(q) != 3 or q[:2] != (heads, dim) or k != (problem.heads_kv, 3 * dim, q[2]):
                return (
                    f"seer: q_weight and k_weight of {file} are {list(q)} and {list(k)}; "
                    f"the case needs [{heads}, {dim}, E] and [{problem.heads_kv}, {3 * dim}, E]"
                )
        return None

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in the file; none without a file."""
        return {} if self._file is None else self._file.tensors()

    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *block_extremes(k, self.block_size), block_means(k, self.block_size)

    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        grid = plan.grid(self.block_size, self.block_size)
        gates = self._gates(q, pooled, plan)
        kept = top_blocks(gates, self.budget(grid), grid, forced=grid.diagonal)
        return (Branch(mask=Blocks(grid, kept)),)

    def _gates(self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan) -> torch.Tensor:
        """``[B, H, X, Y]`` float32."""
        import torch

        tensors = self._tensors()
        if "gates" in tensors:
            rows = torch.as_tensor(plan.positions[:: self.block_size] // self.block_size)
            columns = plan.grid(self.block_size, self.block_size).areas.shape[1]
            given = tensors["gates"][:, rows, :columns].to(q.device, torch.float32)
            gates: torch.Tensor = given.expand(len(q), -1, -1, -1).clone()
            return gates
        pooled_q = block_means(q, self.block_size)
        pooled_k = torch.stack(pooled, 3)
        if not tensors:
            return qk_scores(pooled_q, pooled_k.mean(3))
        q_weight, k_weight = (tensors[name].to(pooled_q) for name in ("q_weight", "k_weight"))
        gate_q = torch.einsum("bxhd,hde->bxhe", pooled_q, q_weight)
        gate_k = torch.einsum("bygd,gde->byge", pooled_k.flatten(3), k_weight)
        return qk_scores(gate_q, gate_k)
