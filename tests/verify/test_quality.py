"""Quality of selections against its definition; a run of selectors from sweep to report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive_selectors as want
import numpy as np
import pytest
import torch
from limits import LIMIT_S
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
from cpbench.reports.frame import load
from cpbench.reports.tables import selection
from cpbench.reports.tables.contest import Contest, Shortage
from cpbench.results.record import Record
from cpbench.results.sealed import seal, unseal
from cpbench.results.store import read_run
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


def test_results_that_are_not_finite_are_wrong_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text(WRONG.replace("*= 1.01", "= float('nan')"))
    (tmp_path / "s.toml").write_text(
        f"[sweep]\noperator = {{name = 'oracle', kernel = '{tmp_path}/nan.py:OP'}}\n"
        "seq_len = 1400\ndirection = 'fwd'\n[measure]\nmax_seconds = 0.1\n"
    )
    command = [sys.executable, "-m", "cpbench", "run", str(tmp_path / "s.toml"),
               "--out", str(tmp_path / "out")]  # fmt: skip
    subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    (record,) = read_run(tmp_path / "out").records.values()
    assert record.status == "wrong"
    assert "out differs from float64" in (record.reason or "")


def _copy(run: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run directory whose records have been changed in place by ``change``."""
    shutil.copytree(run, target)
    for file in (target / "records").glob("*.jsonl"):
        lines = [unseal(line) for line in file.read_bytes().splitlines()]
        for line in lines:
            if line["kind"] == "case":
                change(line)
        file.write_bytes(b"".join(seal(json.dumps(line)) + b"\n" for line in lines))
    return target


def _lower_recall(record: dict[str, Any]) -> None:
    if record["quality"]:
        record["quality"]["mass"] /= 10


def test_compare_finds_a_lower_attention_recall(run: Path, tmp_path: Path) -> None:
    worse = _copy(run / "out", tmp_path / "worse", _lower_recall)
    command = [sys.executable, "-m", "cpbench", "compare", str(run / "out"), str(worse),
               "--format", "json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    comparison = json.loads(done.stdout)
    rows = comparison["cases"] if isinstance(comparison, dict) else comparison
    verdicts = {row["case"]: (row["verdict"], row["why"]) for row in rows}
    verdict, why = next(v for name, v in verdicts.items() if name.startswith("moba"))
    assert verdict == "FAILS"
    assert re.fullmatch(r"attention recall [\d.]+%, was [\d.]+%", why)


# --- a run --------------------------------------------------------------------------------------

WRONG = '''
from cpbench.core.registry import OperatorInfo


class Wrong:
    """gathered, with a small error in late tokens."""
    def __init__(self):
        from cpbench.kernels.gathered.operator import Gathered
        self.inner = Gathered()
        self.unsupported, self.prepare = self.inner.unsupported, self.inner.prepare
        self.backward = self.inner.backward

    def forward(self, qkv, plan):
        out, lse = self.inner.forward(qkv, plan)
        out[:, 1300:] *= 1.01
        return out, lse


OP = OperatorInfo(name="wrong", summary="wrong", source="tests", load=Wrong,
                  masks=("blocks", "rows"))
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "wrong.py").write_text(WRONG)
    (folder / "s.toml").write_text(
        f"""
[sweep]
operator = ["bands", "oracle:block_size=32,keep=0.25", "moba:block_size=64,top_k=3",
            "nsa:window=64,top_k=4", "vsa",
            {{name = "oracle", block_size = 32, kernel = "{folder}/wrong.py:OP"}}]
seq_len = [512, 1536]
inputs = "needles:count=4"
direction = "fwd_bwd"
[measure]
max_seconds = 0.2
min_iterations = 3
max_iterations = 3
"""
    )
    command = [sys.executable, "-m", "cpbench", "run", str(folder / "s.toml"),
               "--out", str(folder / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, done.stdout + done.stderr  # because of the wrong operator
    (folder / "text").write_text(done.stdout)
    return folder


def _records(out: Path) -> dict[tuple[str, int], Record]:
    records = read_run(out).records.values()
    return {(str(record.case.operator), record.case.seq_len): record for record in records}


def test_records_of_selectors_have_quality_step_times_and_selected_area(run: Path) -> None:
    records = _records(run / "out")
    oracle = records["oracle:block_size=32,keep=0.25", 1536]
    assert oracle.status == "ok"
    assert "approximate" in oracle.flags
    assert set(oracle.parts_us) == {"select", "plan", "kernel"}
    assert all(len(ranks) == 1 and 1 <= len(ranks[0]) <= 3 for ranks in oracle.parts_us.values())
    assert set(oracle.errors) == {"small", "sampled"}
    dense = records["bands", 1536]
    assert dense.parts_us == dense.quality == {}
    assert oracle.area is not None
    assert dense.area is not None
    # Density is of sampled rows, area of all.
    assert oracle.quality["density"] == pytest.approx(oracle.area / dense.area, rel=0.2)
    assert oracle.flops["fwd"] == pytest.approx(dense.flops["fwd"] * oracle.area / dense.area)
    assert records["nsa:top_k=4,window=64", 1536].quality["mass"] > 0.3
    refused = records["vsa", 512]
    assert refused.status == "unsupported"
    assert "takes full masks" in (refused.reason or "")


def test_a_wrong_kernel_under_a_selector_is_found_at_size(run: Path) -> None:
    records = _records(run / "out")
    name = next(name for name, tokens in records if "wrong.py" in name)
    assert records[name, 512].status == "ok"
    assert records[name, 1536].status == "wrong"
    assert records[name, 1536].times_us == {}


def _set_times(record: dict[str, Any]) -> None:
    """100 us per phase for the exact method, 250 us for selectors."""
    us = 100.0 if record["case"]["operator"]["name"] == "bands" else 250.0
    record["times_us"] = {phase: [[us] * 7] for phase in record["times_us"]}
    record["turns"] = [1] * 7


def test_reports_list_selectors_apart_from_exact_methods(run: Path, tmp_path: Path) -> None:
    text = (run / "text").read_text()
    fastest = text[text.index("## Fastest method") : text.index("## Sparse selection")]
    assert "bands" in fastest
    assert "oracle" not in fastest
    out = _copy(run / "out", tmp_path / "out", _set_times)
    table = load(out)
    rows = selection.recall_rows(table, ["tokens"])
    assert {row["method"].partition(":")[0] for row in rows} == {"oracle", "moba", "nsa"}
    by_name = {(row["method"], row["tokens"]): row for row in rows}
    row = by_name["oracle:block_size=32,keep=0.25", "1536"]
    assert row["% of oracle"] == "100.0"
    assert row["exact"] == "bands"
    assert row["vs exact"] == "0.40x"
    record = _records(out)["oracle:block_size=32,keep=0.25", 1536]
    (paid,) = (
        row
        for row in selection.break_even_rows(table, ["tokens"])
        if row["method"].startswith("oracle")
    )
    assert paid["faster from"] == "not up to 1536"
    data = json.loads(
        subprocess.run(
            [sys.executable, "-m", "cpbench", "report", str(out), "--format", "json"],
            capture_output=True, text=True, timeout=LIMIT_S, check=True,
        ).stdout
    )  # fmt: skip
    row = next(row for row in data if row["id"] == record.case.id)
    assert row["recovered"] == pytest.approx(record.quality["mass"])
    assert row["inputs"] == "needles:count=4"


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        ({1024: False, 2048: True, 4096: True}, "2k"),
        ({1024: True, 2048: False, 4096: True}, "4k"),
        ({1024: True, 2048: True}, "at most 1k"),
        ({1024: True, 2048: False}, "not up to 2k"),
        ({1024: True, 2048: Shortage("launch", 1, 5)}, "inconclusive"),
    ],
)
def test_the_length_from_which_a_selector_is_faster(
    faster: dict[int, bool | Shortage], expected: str
) -> None:
    contests = [(tokens, Contest((won,))) for tokens, won in faster.items()]
    assert selection.break_even_length(contests) == expected
