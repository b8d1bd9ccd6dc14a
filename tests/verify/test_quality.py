"""Quality of selections against its definition."""

from __future__ import annotations

from dataclasses import replace

import naive_selectors as want
import numpy as np
import pytest
import torch
from made_records import table_of

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core import tolerance
from cpbench.core.problem import Case, Problem
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe, parse
from cpbench.kernels.gathered.operator import Gathered
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.reports.tables import selection
from cpbench.results.record import Record
from cpbench.selectors.selections import Selection
from cpbench.verify import check, quality
from cpbench.verify.check import rank_inputs
from cpbench.verify.selection import check_sampled, run_pass_with_selection

DIM = 32
SMALL = 450  # short enough that all queries are sampled


def _measured(
    spec: str, inputs: str = "normal", tokens: int = SMALL, mask: str = "causal"
) -> tuple[Attention, dict, dict, object, dict[str, float]]:
    problem = Problem(
        batch=2, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=2, head_dim=DIM, dtype="float32",
        direction="fwd",
    )  # fmt: skip
    world = World.of(problem, masks.build(mask, tokens), build("contiguous", tokens, 1))
    work = Attention(spec, "single", world, 0, "cpu")
    x = rank_inputs(work, Recipe(3, parse(inputs)), "cpu")
    results, selection = run_pass_with_selection(work, x)
    return work, x, results, selection, quality.measure_quality(work, x, results, selection)


CASES = [
    "oracle:block_size=32,keep=0.2",
    "oracle:block_size=40,keep=0.2",
    "oracle:block_size=48,keep=0.3",
    "moba:block_size=32,top_k=3",
    "quest:block_size=16,block_q=64,keep=0.3",
    "minference.block_sparse:block_size=32,top_k=3",
    "minference.vertical_slash:vertical=40,slash=101,block_size=16",
    "minference.a_shape:num_sinks=8,window=60",
    "xattention:block_size=32,threshold=0.5",
    "nsa:block_size=16,top_k=4,window=32",
    "dsa:top_k=30",
    "landmark:block_size=32,top_k=3",
    "retrieval:top_k=20,num_sinks=8,window=32,step=16",
    "hax:buckets=4,latest=20,top_k=20",
    "seer:block_size=32,keep=0.2",
    "cca:group_size=16,window=64",
    "lm_infinite:num_sinks=8,window=60",
    "longheads:chunk=32,top_k=3",
    "msa:doc_lens=64,query_len=100,prefix=16,chunk=16,top_k=2",
]
ONLY_CAUSAL = (
    "minference.v", "minference.a", "nsa", "landmark", "retrieval", "hax", "cca", "lm_infinite",
    "msa", "longheads",
)  # fmt: skip


@pytest.mark.parametrize("mask", ["causal", "causal_document:doc_lens=[1,100,49,300]"])
@pytest.mark.parametrize("spec", CASES)
def test_quality_follows_its_definition(spec: str, mask: str) -> None:
    if mask != "causal" and spec.startswith(ONLY_CAUSAL):
        return
    work, x, results, selection, figures = _measured(spec, mask=mask)
    visible = torch.as_tensor(work.mask.to_dense())  # type: ignore[union-attr]
    q, k = x["q"], x["k"]
    if work.op.info.rotates:  # full attention has RoPE too
        q, k = (cpbench.rope(tensor.double()) for tensor in (q, k))
    probs = want.probabilities(q, k, visible)
    selected = torch.zeros_like(probs, dtype=torch.bool)
    for branch in selection.branches:  # type: ignore[attr-defined]
        if branch.pool_k.size == 1 and branch.derived is None:
            branch_mask = branch.mask
            is_selection = isinstance(branch_mask, Selection)
            dense = branch_mask.dense_rows(0, SMALL) if is_selection else branch_mask.to_dense()
            selected |= torch.as_tensor(dense)
    selected &= visible
    full = torch.einsum("bhst,bthd->bshd", probs, x["v"].double().repeat_interleave(2, 2))
    error = float((results["out"].double() - full).norm() / full.norm())
    density = float(selected.sum()) / float(visible.sum() * 8)
    assert figures["rows"] == SMALL
    assert figures["density"] == pytest.approx(density, rel=1e-9)
    assert figures["mass"] == pytest.approx(float((probs * selected).sum(-1).mean()), rel=1e-5)
    assert figures["out_error"] == pytest.approx(error, rel=1e-4)
    if len(selection.branches) == 1:  # type: ignore[attr-defined]
        lost = 1 - (probs * selected).sum(-1)
        bound = 2 * lost.permute(0, 2, 1)[..., None] * float(x["v"].norm(dim=-1).max())
        assert ((results["out"] - full).norm(dim=-1, keepdim=True) <= bound + 1e-4).all()


@pytest.mark.parametrize("spec", [spec for spec in CASES if "vertical" not in spec])
def test_no_attention_recall_exceeds_the_oracle(spec: str) -> None:
    for inputs in ("normal", "needles:count=4,length=1", "needles:count=4,length=16"):
        *_, figures = _measured(spec, inputs)
        if spec.startswith(("nsa", "minference.a_shape", "cca", "msa")):
            assert "best_mass" not in figures
            continue
        assert figures["mass"] <= figures["best_mass"] + 1e-6
        if spec.startswith("oracle"):
            assert figures["mass"] == pytest.approx(figures["best_mass"], rel=1e-6)


def test_figures_of_an_index_are_in_the_table_of_selectors() -> None:
    pytest.importorskip("hnswlib")
    spec = "retrieval:top_k=20,num_sinks=8,window=32,step=16,index=hnsw"
    *_, figures = _measured(spec)
    assert 0.8 < figures["index_recall"] <= 1
    assert figures["index_bytes"] > 2 * 2 * (SMALL - 64) * DIM * 4
    case = Case(operator=Spec.parse(spec), seq_len=SMALL)
    records = [
        Record(case=case, status="ok", quality=figures, flags=["approximate"]),
        Record(case=replace(case, operator=Spec("moba")), status="ok", flags=["approximate"],
               quality={"mass": 0.5, "density": 0.5}),
    ]  # fmt: skip
    retrieval, moba = selection.recall_rows(table_of(*records), ["tokens"])
    if retrieval["method"].startswith("moba"):
        retrieval, moba = moba, retrieval
    assert retrieval["index recall %"] == f"{figures['index_recall'] * 100:.1f}"
    assert float(retrieval["index MB"]) == pytest.approx(figures["index_bytes"] / 1e6, rel=0.01)
    assert float(retrieval["index ms"]) == pytest.approx(figures["index_build_us"] / 1e3, rel=0.01)
    assert moba["index recall %"] == moba["index MB"] == moba["index ms"] == ""
    (row,) = selection.recall_rows(table_of(records[1]), ["tokens"])
    assert not [name for name in row if "index" in name]


def test_the_oracle_of_tokens_and_blocks_is_the_best_selection() -> None:
    _, x, _, _, figures = _measured("dsa:top_k=30")
    probs = want.probabilities(x["q"], x["k"], torch.ones(SMALL, SMALL).tril().bool())
    summed = probs.sum(1).sort(-1, descending=True).values  # heads share their keys
    total = 0.0
    for t in range(SMALL):
        total += float(summed[:, t, : min(t + 1, 30)].sum())
    assert figures["best_mass"] == pytest.approx(total / (2 * 4 * SMALL), rel=1e-5)

    _, x, _, selection, figures = _measured("moba:block_size=32,top_k=3")
    kept = selection.branches[0].mask.kept  # type: ignore[attr-defined]
    total = 0.0
    for b, h, t in np.ndindex(2, 4, SMALL):
        blocks = torch.stack([part.sum() for part in probs[b, h, t].split(32)])
        count = int(kept[b, h, t, : t // 32 + 1].sum())
        total += float(blocks.sort(descending=True).values[:count].sum())
    assert figures["best_mass"] == pytest.approx(total / (8 * SMALL), rel=1e-5)


def test_sampled_queries_represent_all(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "minference.block_sparse:block_size=32,keep=0.2"
    *_, sampled = _measured(spec, "needles:count=4", tokens=1500)
    monkeypatch.setattr(quality, "SAMPLED_QUERIES", 10_000)
    *_, complete = _measured(spec, "needles:count=4", tokens=1500)
    assert sampled["rows"] < complete["rows"] == 1500
    for name in ("density", "mass", "best_mass"):
        assert sampled[name] == pytest.approx(complete[name], rel=0.15), name


def test_a_shape_misses_the_needles_and_the_oracle_does_not() -> None:
    """At one budget, a fixed shape has a much lower attention recall than the oracle on needles; on
    independent normals no selection is much better."""
    recall = {}
    for inputs in ("needles:count=4,looking=1.0", "normal"):
        for spec in ("oracle:block_size=32,keep=0.2", "minference.a_shape:num_sinks=8,window=100"):
            *_, figures = _measured(spec, inputs, tokens=1024)
            recall[inputs, spec[0]] = figures["mass"]
    (needles, normal) = ("needles:count=4,looking=1.0", "normal")
    assert recall[needles, "o"] > 2 * recall[needles, "m"]
    assert recall[normal, "o"] < 2 * recall[normal, "m"]


@pytest.mark.parametrize("wrong", ["", "dq", "dk", "dv"])
@pytest.mark.parametrize("spec", ["moba:block_size=64,top_k=3", "nsa:top_k=4,window=64"])
def test_a_wrong_gradient_is_found(spec: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At size, where only the last tokens are wrong, given the operator's own selection."""
    problem = Problem(
        batch=1, seq_q=1300, seq_k=1300, heads_q=4, heads_kv=2, head_dim=DIM, dtype="float32"
    )
    world = World.of(problem, masks.build("causal", 1300), build("contiguous", 1300, 1))
    work = Attention(spec, "single", world, 0, "cpu")
    right = Gathered.backward

    def backward(self: Gathered, *given: object) -> tuple[torch.Tensor, ...]:
        grads = dict(zip(("dq", "dk", "dv"), right(self, *given), strict=True))
        if wrong:
            grads[wrong][:, 1100:] *= 1.01
        return tuple(grads.values())

    monkeypatch.setattr(Gathered, "backward", backward)
    x = rank_inputs(work, Recipe(), "cpu")
    results, selection = run_pass_with_selection(work, x)
    errors = check_sampled(work, x, results, selection, 0, check.RankContext("cpu"))
    violation = tolerance.violation(errors, "float32", work.op.info)
    assert (violation is None) == (not wrong)
    if wrong:
        assert violation is not None
        assert violation.startswith(f"{wrong} differs from float64")
