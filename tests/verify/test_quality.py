"""What a choice is worth, against the definition; and a run of selectors from sweep to report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import naive_selectors as want
import numpy as np
import pytest
import torch

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.inputs import Recipe, parse
from cpbench.kernels.gathered.operator import Gathered
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.reports.frame import load
from cpbench.reports.tables import selection
from cpbench.results.record import Record
from cpbench.results.store import read_run
from cpbench.selectors.common.selection import Blocks, Tokens
from cpbench.verify import check, quality
from cpbench.verify.check import inputs_of
from cpbench.verify.selection import run_and_tell, sampled

DIM = 32
SMALL = 450  # all queries are looked at


def _measured(
    spec: str, inputs: str = "normal", tokens: int = SMALL, mask: str = "causal"
) -> tuple[Attention, dict, dict, object, dict[str, float]]:
    problem = Problem(
        batch=2, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=2, head_dim=DIM, dtype="float32",
        direction="fwd",
    )  # fmt: skip
    world = World.of(problem, masks.build(mask, tokens), build("contiguous", tokens, 1))
    work = Attention(spec, "single", world, 0, "cpu")
    x = inputs_of(work, Recipe(3, parse(inputs)), "cpu")
    found, choice = run_and_tell(work, x)
    return work, x, found, choice, quality.measure(work, x, found, choice)


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
]


@pytest.mark.parametrize("mask", ["causal", "causal_document:doc_lens=[1,100,49,300]"])
@pytest.mark.parametrize("spec", CASES)
def test_figures_are_those_of_the_definition(spec: str, mask: str) -> None:
    if mask != "causal" and spec.startswith(("minference.v", "minference.a", "nsa")):
        return
    work, x, found, choice, told = _measured(spec, mask=mask)
    seen = torch.as_tensor(work.mask.to_dense())  # type: ignore[union-attr]
    probs = want.probabilities(x["q"], x["k"], seen)
    kept = torch.zeros_like(probs, dtype=torch.bool)
    for branch in choice.branches:  # type: ignore[attr-defined]
        if branch.pool_k.size == 1:
            rows = branch.seen
            more = rows.rows(0, SMALL) if isinstance(rows, Blocks | Tokens) else rows.to_dense()
            kept |= torch.as_tensor(more)
    kept &= seen
    dense = torch.einsum("bhst,bthd->bshd", probs, x["v"].double().repeat_interleave(2, 2))
    error = float((found["out"].double() - dense).norm() / dense.norm())
    assert told["rows"] == SMALL
    assert told["density"] == pytest.approx(float(kept.sum()) / float(seen.sum() * 8), rel=1e-9)
    assert told["mass"] == pytest.approx(float((probs * kept).sum(-1).mean()), rel=1e-5)
    assert told["out_error"] == pytest.approx(error, rel=1e-4)
    if len(choice.branches) == 1:  # type: ignore[attr-defined]
        lost = 1 - (probs * kept).sum(-1)
        bound = 2 * lost.permute(0, 2, 1)[..., None] * float(x["v"].norm(dim=-1).max())
        assert ((found["out"] - dense).norm(dim=-1, keepdim=True) <= bound + 1e-4).all()


@pytest.mark.parametrize("spec", [spec for spec in CASES if "vertical" not in spec])
def test_nothing_recovers_more_than_the_best_choice_of_its_kind(spec: str) -> None:
    for inputs in ("normal", "needles:count=4,length=1", "needles:count=4,length=16"):
        *_, told = _measured(spec, inputs)
        if spec.startswith(("nsa", "minference.a_shape")):
            assert "best_mass" not in told
            continue
        assert told["mass"] <= told["best_mass"] + 1e-6
        if spec.startswith("oracle"):
            assert told["mass"] == pytest.approx(told["best_mass"], rel=1e-6)


def test_the_best_choice_of_tokens_and_blocks_is_the_best() -> None:
    _, x, _, _, told = _measured("dsa:top_k=30")
    probs = want.probabilities(x["q"], x["k"], torch.ones(SMALL, SMALL).tril().bool())
    together = probs.sum(1).sort(-1, descending=True).values  # heads share their keys
    total = 0.0
    for t in range(SMALL):
        total += float(together[:, t, : min(t + 1, 30)].sum())
    assert told["best_mass"] == pytest.approx(total / (2 * 4 * SMALL), rel=1e-5)

    _, x, _, choice, told = _measured("moba:block_size=32,top_k=3")
    kept = choice.branches[0].seen.kept  # type: ignore[attr-defined]
    total = 0.0
    for b, h, t in np.ndindex(2, 4, SMALL):
        blocks = torch.stack([part.sum() for part in probs[b, h, t].split(32)])
        count = int(kept[b, h, t, : t // 32 + 1].sum())
        total += float(blocks.sort(descending=True).values[:count].sum())
    assert told["best_mass"] == pytest.approx(total / (8 * SMALL), rel=1e-5)


def test_a_sample_of_queries_tells_what_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "minference.block_sparse:block_size=32,keep=0.2"
    *_, some = _measured(spec, "needles:count=4", tokens=1500)
    monkeypatch.setattr(quality, "ROWS", 10_000)
    *_, every = _measured(spec, "needles:count=4", tokens=1500)
    assert some["rows"] < every["rows"] == 1500
    for name in ("density", "mass", "best_mass"):
        assert some[name] == pytest.approx(every[name], rel=0.15), name


def test_a_shape_misses_the_needles_and_the_oracle_does_not() -> None:
    """At one budget: what a fixed shape keeps is worth much less where there is something to find;
    on independent normals nothing is much better than it."""
    lost = {}
    for inputs in ("needles:count=4,looking=1.0", "normal"):
        for spec in ("oracle:block_size=32,keep=0.2", "minference.a_shape:num_sinks=8,window=100"):
            *_, told = _measured(spec, inputs, tokens=1024)
            lost[inputs, spec[0]] = told["mass"]
    (needles, normal) = ("needles:count=4,looking=1.0", "normal")
    assert lost[needles, "o"] > 2 * lost[needles, "m"]
    assert lost[normal, "o"] < 2 * lost[normal, "m"]


@pytest.mark.parametrize("wrong", ["", "dq", "dk", "dv"])
@pytest.mark.parametrize("spec", ["moba:block_size=64,top_k=3", "nsa:top_k=4,window=64"])
def test_a_wrong_gradient_is_found(spec: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At size, where the last tokens alone have it; by the kernel's own choice."""
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
    x = inputs_of(work, Recipe(), "cpu")
    found, choice = run_and_tell(work, x)
    verdict = check.verdict(sampled(work, x, found, choice, 0, check.Rank("cpu")), "float32")
    assert (verdict is None) == (not wrong)
    if wrong:
        assert verdict is not None
        assert verdict.startswith(f"{wrong} differs from float64")


def test_what_is_not_finite_is_wrong_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text(WRONG.replace("*= 1.01", "= float('nan')"))
    (tmp_path / "s.toml").write_text(
        f"[sweep]\noperator = {{name = 'oracle', kernel = '{tmp_path}/nan.py:OP'}}\n"
        "seq_len = 1400\ndirection = 'fwd'\n[measure]\nmax_seconds = 0.1\n"
    )
    command = [sys.executable, "-m", "cpbench", "run", str(tmp_path / "s.toml"),
               "--out", str(tmp_path / "out")]  # fmt: skip
    subprocess.run(command, capture_output=True, text=True, timeout=120)
    (record,) = read_run(tmp_path / "out").records.values()
    assert record.status == "wrong"
    assert "out differs from float64" in (record.reason or "")


def test_comparing_notices_a_choice_that_recovers_less(run: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    shutil.copytree(run / "out", worse)
    for file in (worse / "records").glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if line.get("quality"):
                line["quality"]["mass"] /= 10
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = [sys.executable, "-m", "cpbench", "compare", str(run / "out"), str(worse),
               "--format", "json"]  # fmt: skip
    told = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
    rows = told["cases"] if isinstance(told, dict) else told
    verdicts = {row["case"]: (row["verdict"], row["why"]) for row in rows}
    verdict, why = next(v for name, v in verdicts.items() if name.startswith("moba"))
    assert verdict == "FAILS"
    assert "of full attention, not" in why


# --- a run --------------------------------------------------------------------------------------

WRONG = '''
from cpbench.core.registry import OperatorInfo


class Wrong:
    """bands that is off by a little where gathered blocks are."""
    def __init__(self):
        from cpbench.kernels.gathered.operator import Gathered
        self.inner = Gathered()
        self.unsupported, self.prepare = self.inner.unsupported, self.inner.prepare
        self.backward = self.inner.backward

    def forward(self, q, k, v, plan):
        out, lse = self.inner.forward(q, k, v, plan)
        out[:, 1300:] *= 1.01
        return out, lse


OP = OperatorInfo(name="wrong", summary="wrong", source="here", load=Wrong,
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr  # for the wrong one
    (folder / "text").write_text(done.stdout)
    return folder


def _records(run: Path) -> dict[tuple[str, int], Record]:
    found = read_run(run / "out").records.values()
    return {(str(one.case.operator), one.case.seq_len): one for one in found}


def test_records_tell_quality_parts_and_what_was_computed(run: Path) -> None:
    records = _records(run)
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
    # Sampled rows, whole blocks of them: about what the whole is.
    assert oracle.quality["density"] == pytest.approx(oracle.area / dense.area, rel=0.2)
    assert oracle.flops["fwd"] == pytest.approx(dense.flops["fwd"] * oracle.area / dense.area)
    assert records["nsa:top_k=4,window=64", 1536].quality["mass"] > 0.3
    refused = records["vsa", 512]
    assert refused.status == "unsupported"
    assert "takes full masks" in (refused.reason or "")


def test_a_wrong_kernel_under_a_selector_is_found_at_size(run: Path) -> None:
    name = next(name for name, tokens in _records(run) if "wrong.py" in name)
    assert _records(run)[name, 512].status == "ok"
    assert _records(run)[name, 1536].status == "wrong"
    assert _records(run)[name, 1536].times_us == {}


def test_reports_keep_what_is_chosen_apart(run: Path) -> None:
    text = (run / "text").read_text()
    winners = text[text.index("## Winners") : text.index("## Sparse choices")]
    assert "bands" in winners
    assert "oracle" not in winners
    table = load(run / "out")
    rows = selection.worth(table, ["tokens"])
    assert {row["method"].partition(":")[0] for row in rows} == {"oracle", "moba", "nsa"}
    by_name = {(row["method"], row["tokens"]): row for row in rows}
    row = by_name["oracle:block_size=32,keep=0.25", "1536"]
    assert row["of best %"] == "100.0"
    assert row["exact"] == "bands"
    record = _records(run)["oracle:block_size=32,keep=0.25", 1536]
    exact = _records(run)["bands", 1536].median_us
    assert row["vs exact"] == f"{exact / record.median_us:.2f}x"  # type: ignore[operator]
    (paid,) = (
        row for row in selection.overtakes(table, ["tokens"]) if row["method"].startswith("oracle")
    )
    assert paid["faster from"] == "not up to 1536"
    data = json.loads(
        subprocess.run(
            [sys.executable, "-m", "cpbench", "report", str(run / "out"), "--format", "json"],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
    )  # fmt: skip
    told = next(row for row in data if row["id"] == record.case.id)
    assert told["recovered"] == pytest.approx(record.quality["mass"])
    assert told["inputs"] == "needles:count=4"


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([(1024, 0.5), (2048, 1.2), (4096, 2.0)], "2k"),
        ([(1024, 1.5), (2048, 0.9), (4096, 2.0)], "4k"),
        ([(1024, 1.5), (2048, 1.6)], "at most 1k"),
        ([(1024, 1.5), (2048, 0.6)], "not up to 2k"),
    ],
)
def test_the_length_from_which_a_choice_pays(ratios: list, words: str) -> None:
    assert selection.faster_from(ratios) == words
