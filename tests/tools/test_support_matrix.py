"""The support matrix against reality: what it says of this machine is tried."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry
from cpbench.core.operator import Unsupported, declared_refusal
from cpbench.core.problem import DTYPES, Problem
from cpbench.inputs import Recipe
from cpbench.masks.head_masks import AttnMask
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.tools import support_matrix
from cpbench.tools.support_matrix import HEADS, TOKENS
from cpbench.verify.check import inputs_of, run

HERE = sorted(
    name
    for name, info in registry.operators().items()
    if "cpu" in info.devices and registry.missing_package(info) is None
)
SLOW = {"flex", "triton_band", "triton_block_sparse"}  # to compute: that they agree is enough


def _attempt(name: str, world: World) -> tuple[Attention | None, str | None]:
    try:
        return Attention(name, "single", world, 0, "cpu"), None
    except Unsupported as error:
        return None, str(error)


@pytest.mark.parametrize("name", HERE)
def test_what_the_matrix_says_of_cpus_is_so(name: str) -> None:
    info = registry.operator_info(name)
    dtype = next(dtype for dtype in DTYPES if dtype in info.dtypes)
    for text in (*support_matrix.SHARED, *support_matrix.BY_HEAD):
        for direction in ("fwd", "fwd_bwd"):
            said = support_matrix.refusal(info, text, direction, "cpu")
            problem = Problem(
                batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS,
                heads_kv=HEADS, head_dim=16, dtype=dtype, direction=direction,
            )  # fmt: skip
            if declared_refusal(info, problem, "cpu") is not None:
                assert said is not None
                continue
            mask = masks.build_heads(text, TOKENS, HEADS)
            world = World.of(problem, mask, build("contiguous", TOKENS, 1))
            work, why = _attempt(name, world)
            assert (said is None) == (why is None), f"{text} {direction}: {said!r}, but {why!r}"
            if work is None:
                continue
            some = not info.selects or text in ("causal", "full")
            if name not in SLOW and some:
                found = run(work, inputs_of(work, Recipe(), "cpu"), None)
                assert ("dq" in found) == (direction == "fwd_bwd")
                assert all(torch.isfinite(x).all() for n, x in found.items() if n != "lse")


def test_the_matrix_needs_no_torch_and_no_library() -> None:
    code = (
        "import sys\nfrom cpbench import support\n"
        "rows = support.rows('cuda') + support.rows('cpu')\n"
        "assert {'flash_attn.2', 'flashinfer.block_sparse', 'magi.ffa', 'te.cudnn', 'bands'} <= "
        "{row['operator'] for row in rows}\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_adapters_say_of_masks() -> None:
    rows = {row["operator"]: row for row in support_matrix.rows("cuda")}
    documents = rows["flash_attn.2"]["of all heads alike"]
    assert "causal_document" in documents
    assert "streaming" not in documents
    assert rows["flashmask"]["of all heads alike"] == "any"
    assert rows["flashinfer.dense"]["backward"] == "no"
    assert rows["vsa.kernel"]["of selectors"] == "blocks"
    never = {name for name, row in rows.items() if row[""] == "never run"}
    assert never == {n for n, info in registry.operators().items() if info.unproven}
    reason = support_matrix.refusal(
        registry.operator_info("flash_attn.2"), "streaming:num_sinks=4,window=37", "fwd", "cuda"
    )
    assert reason is not None
    assert "documents that follow each other" in reason
    assert isinstance(masks.build("causal", 8), AttnMask)
