"""The support matrix, compared with what operators accept and refuse on CPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from limits import LIMIT_S

from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry
from cpbench.core.operator import Unsupported, declared_refusal
from cpbench.core.problem import DTYPES, Problem
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.masks.head_masks import AttnMask
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.tools import support_matrix
from cpbench.tools.support_matrix import HEADS, TOKENS
from cpbench.verify.check import rank_inputs, run_pass

AVAILABLE = sorted(
    name
    for name, info in registry.operators().items()
    if "cpu" in info.devices and registry.missing_package(info) is None
)
SLOW = {
    "flex",
    "triton_band",
    "triton_block_sparse",
    "triton_query_sparse",
}  # only checked for refusals, not run


def _try_attention(name: str, world: World) -> tuple[Attention | None, str | None]:
    try:
        return Attention(name, "single", world, 0, "cpu"), None
    except Unsupported as error:
        return None, str(error)


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_matrix_agrees_with_operators_on_cpus(name: str) -> None:
    info = registry.operator_info(name)
    dtype = next(dtype for dtype in DTYPES if dtype in info.dtypes)
    for text in (*support_matrix.SHARED, *support_matrix.BY_HEAD):
        for direction in ("fwd", "fwd_bwd"):
            refusal = support_matrix.refusal(info, text, direction, "cpu")
            problem = Problem(
                batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS,
                heads_kv=HEADS, head_dim=16, dtype=dtype, direction=direction,
            )  # fmt: skip
            if declared_refusal(info, problem, "cpu") is not None:
                assert refusal is not None
                continue
            mask = masks.build_heads(text, TOKENS, HEADS)
            world = World.of(problem, mask, build("contiguous", TOKENS, 1))
            attention, error = _try_attention(name, world)
            assert (refusal is None) == (error is None), (
                f"{text} {direction}: {refusal!r}, but {error!r}"
            )
            if attention is None:
                continue
            computed = not info.selects or text in ("causal", "full")
            if name not in SLOW and computed:
                recipe = Recipe(0, Spec("gates")) if info.mixer else Recipe()
                results = run_pass(attention, rank_inputs(attention, recipe, "cpu"), None)
                assert ("dq" in results) == (direction == "fwd_bwd")
                assert all(torch.isfinite(x).all() for key, x in results.items() if key != "lse")


def test_the_matrix_needs_no_torch_and_no_library() -> None:
    code = (
        "import sys\nfrom cpbench.tools import support_matrix\n"
        "rows = support_matrix.rows('cuda') + support_matrix.rows('cpu')\n"
        "assert {'flash_attn.2', 'flashinfer.block_sparse', 'magi.ffa', 'te.cudnn', 'bands'} <= "
        "{row['operator'] for row in rows}\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr


def test_the_masks_of_adapters() -> None:
    rows = {row["operator"]: row for row in support_matrix.rows("cuda")}
    documents = rows["flash_attn.2"]["of all heads alike"]
    assert "causal_document" in documents
    assert "streaming" not in documents
    assert rows["flashmask"]["of all heads alike"] == "any"
    assert rows["flashinfer.dense"]["backward"] == "no"
    assert rows["vsa.kernel"]["of selectors"] == "blocks"
    never_run = {name for name, row in rows.items() if "never run" in row[""]}
    assert never_run == {name for name, info in registry.operators().items() if info.unproven}
    reason = support_matrix.refusal(
        registry.operator_info("flash_attn.2"), "streaming:num_sinks=4,window=37", "fwd", "cuda"
    )
    assert reason is not None
    assert "consecutive documents" in reason
    assert isinstance(masks.build("causal", 8), AttnMask)
