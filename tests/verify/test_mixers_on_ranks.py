"""Sequence mixers on several ranks through the harness: checked, measured, and faults found."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import HELPERS
from whole_runs import run_cases

from cpbench.api import Attention
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.parallel.world import World
from cpbench.results.record import Record
from cpbench.verify import check

STRATEGIES = HELPERS / "planted" / "wrong_mixer_strategies.py"
DOCUMENTS = "causal_document:doc_lens=[100,7,193,800]"
FAULTS = {
    "no_exchange": "differs from float64",
    "no_transition": "differs from float64",
    "gate_cut_at_shards": "dg differs from float64",
    "no_boundaries": "differs from float64",
    "tf32_fold": "differs from float64",
    "bfloat16_fold": "differs from float64",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    records = run_cases(
        tmp_path_factory.mktemp("run"), {"time": False},
        operator="gated_deltanet", mask=DOCUMENTS, dtype=["float32", "bfloat16"], world_size=3,
        layout="zigzag", num_heads_q=4,
        strategy=[f"{STRATEGIES}:{name}" for name in ("right", *FAULTS)],
    )  # fmt: skip
    return {(r.case.strategy.name.rpartition(":")[2], r.case.dtype): r for r in records}


# An error of 2e-4 of a state is within what inputs of 16 bits allow.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (n, d)
        for n in FAULTS
        for d in ("float32", "bfloat16")
        if (n, d) != ("tf32_fold", "bfloat16")
    ],
)
def test_planted_faults_are_found(
    faulty: dict[tuple[str, str], Record], name: str, dtype: str
) -> None:
    right, wrong = faulty["right", dtype], faulty[name, dtype]
    assert right.status == "ok", right.reason
    assert wrong.status == "wrong", wrong.errors
    assert FAULTS[name] in str(wrong.reason)


def test_they_are_measured(tmp_path: Path) -> None:
    records = run_cases(
        tmp_path, {"max_iterations": 3, "min_iterations": 3},
        operator=["gated_deltanet", "bands"], strategy=["scan", "ulysses", "ring"], world_size=2,
        inputs="gates",
    )  # fmt: skip
    by_name = {(r.case.operator.name, r.case.strategy.name): r for r in records}
    assert set(by_name) == {
        ("gated_deltanet", "scan"), ("gated_deltanet", "ulysses"),
        ("bands", "ulysses"), ("bands", "ring"),
    }  # fmt: skip
    for (operator, strategy), record in by_name.items():
        assert record.status == "ok", (operator, strategy, record.reason)
        assert set(record.exposure_us) == {"whole", "compute", "transfer"}
        assert not {"untracked-traffic", "mispredicted"} & set(record.flags)
        assert record.predicted_bytes == record.bytes_sent
    scan = by_name["gated_deltanet", "scan"]
    assert set(scan.errors) == {"small", "full"}
    assert scan.computes == "gated_deltanet"
    state, transition = 4 * 2 * 16 * 16, 4 * 2 * 16 * 16
    assert scan.bytes_sent == {"fwd": [state + transition] * 2, "bwd": [state] * 2}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_the_small_problem_cuts_no_chunk_of_a_definition(layout: str, size: int) -> None:
    documents = Spec.parse("causal_document:doc_lens=[16,272,64,416]")
    for mask in (Spec("causal"), documents):
        case = Case(
            operator=Spec.parse("ttt:chunk=16"), strategy=Spec("scan"), layout=Spec(layout),
            mask=mask, seq_len=1536 if mask.name == "causal" else 768, world_size=size,
            inputs=Spec("gates"),
        )  # fmt: skip
        method = case.operator, case.strategy
        work = Attention(*method, World.of_case(case, size), 0, "cpu")
        small = check.reduced_world(work)
        assert check.SMALL_TOKENS / 2 < small.mask.seq_q < case.seq_len
        Attention(*method, small, 0, "cpu")
