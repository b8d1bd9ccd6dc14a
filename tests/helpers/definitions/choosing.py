"""Small cases of every selector, and helpers that load selectors and run their selection."""

from __future__ import annotations

from typing import Any

import naive
import torch

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV
from cpbench.core.problem import Problem
from cpbench.core.spec import Spec
from cpbench.selectors.common.base import Branch, Selector
from cpbench.selectors.selections import Blocks

BATCH, TOKENS, HEADS_Q, HEADS_KV, DIM = 2, 203, 4, 2, 16
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
DOCUMENTS = "causal_document:doc_lens=[1,60,100,42]"

# Specs of every selector at this size, each with a mask.
CASES = [
    ("oracle:block_size=16,keep=0.3", "causal"),
    ("oracle:block_size=16,keep=0.3", DOCUMENTS),
    ("oracle:block_size=16,keep=0.3", "full"),
    ("quest:block_size=16,block_q=32,keep=0.3", "causal"),
    ("quest:block_size=16,block_q=1,keep=0.3", DOCUMENTS),
    ("moba:block_size=16,top_k=4", "causal"),
    ("moba:block_size=16,top_k=4", DOCUMENTS),
    ("xattention:block_size=16,stride=4,threshold=0.6", "causal"),
    ("xattention:block_size=16,stride=4,threshold=0.6", "full"),
    ("minference.a_shape:num_sinks=4,window=40", "causal"),
    ("minference.vertical_slash:vertical=40,slash=101,block_size=16", "causal"),
    ("minference.vertical_slash:vertical=40,slash=101,block_size=16,whole_blocks=true", "causal"),
    ("minference.block_sparse:block_size=16,top_k=4", "causal"),
    ("flexprefill:block_size=16,min_budget=32", "causal"),
    ("flexprefill:block_size=16,min_budget=32,tau=1.0,gamma=0.4", "causal"),
    ("nsa:block_size=16,top_k=4,compress=8,stride=4,window=24", "causal"),
    ("nsa:block_size=16,top_k=3,compress=64,stride=16,window=24", "causal"),
    ("dsa:top_k=20", "causal"),
    ("dsa:top_k=20,index_dim=8", DOCUMENTS),
    ("vsa:block_size=16,keep=0.2", "full"),
    ("vsa:block_size=16,keep=0.2,gate=0.0", "full"),
    ("landmark:block_size=16,top_k=4", "causal"),
    ("landmark:block_size=48,keep=1.0", "causal"),
    ("cca:group_size=8,window=20", "causal"),
    ("pyramid:window=12,ratio=4,scales=3", "causal"),
    ("retrieval:top_k=16,num_sinks=4,window=24,step=8", "causal"),
    ("retrieval:top_k=16,num_sinks=40,window=1,step=1", "causal"),
    ("lm_infinite:num_sinks=4,window=24", "causal"),
    ("msa:doc_lens=[16,32],query_len=60,prefix=16,chunk=8,top_k=2", "causal"),
    ("longheads:chunk=16,top_k=4", "causal"),
    ("hax:buckets=4,latest=12,top_k=8", "causal"),
    ("hax:buckets=8,latest=12,top_k=8,hash=sign,center=true", "causal"),
    ("hax:buckets=4,latest=300,top_k=0", "causal"),
    ("seer:block_size=16,keep=0.3", "causal"),
    ("seer:block_size=16,keep=0.3", DOCUMENTS),
    ("scored:top_k=20", DOCUMENTS),
    ("recycled:stride=8,top_k=16", "causal"),
    ("recycled:stride=7,top_k=16", DOCUMENTS),
    # Entire blocks of queries that see nothing.
    ("oracle:block_size=16,keep=0.3", "causal:offset=-40"),
    ("moba:block_size=16,top_k=4", "causal:offset=-40"),
    ("dsa:top_k=20", "causal:offset=-40"),
]
IDS = [f"{spec.partition(':')[0]}-{number}" for number, (spec, _) in enumerate(CASES)]


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    return naive.random_inputs(BATCH, TOKENS, HEADS_Q, HEADS_KV, DIM, dtype, seed)


def load_selector(spec: str, mask: str) -> tuple[Selector, Any]:
    """A selector and its plan."""
    parsed = Spec.parse(spec)
    selector = registry.implementation(registry.operator_info(parsed.name), parsed.kwargs)
    problem = Problem(
        batch=BATCH, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS_Q, heads_kv=HEADS_KV, head_dim=DIM,
        dtype="float32",
    )  # fmt: skip
    return selector, selector.prepare(masks.build(mask, TOKENS), problem, "cpu")


def select(spec: str, mask: str) -> tuple[Branch, ...]:
    """The branches that a selector returns for ``inputs()``."""
    selector, plan = load_selector(spec, mask)
    return selector.select_from(QKV(*inputs()[:3]), plan)


def kept_blocks(branch: Branch) -> torch.Tensor:
    """The allowed blocks that a branch keeps, ``[B, H, X, Y]``."""
    assert isinstance(branch.mask, Blocks)
    return branch.mask.kept & branch.mask.grid.allowed


def causal_blocks(blocks: int) -> torch.Tensor:
    """``[X, X]``: blocks on and below the diagonal."""
    return torch.ones(blocks, blocks, dtype=torch.bool).tril()


def budget(visible: int, keep: float) -> int:
    """The number of blocks that are a share of the visible ones."""
    return max(1, int(visible * keep + 0.5))
