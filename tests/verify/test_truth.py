"""Whole runs of operators whose errors only the measuring code can find."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import HELPERS
from whole_runs import run_cases

from cpbench.results.record import Record

OPERATORS = HELPERS / "planted" / "wrong_operators.py"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    names = ["overwrites", "when_watched", "native", "right"]
    records = run_cases(
        tmp_path_factory.mktemp("truth"),
        operator=[f"{OPERATORS}:{name}" for name in names],
        direction="fwd",
    )
    return dict(zip(names, records, strict=True))


def test_an_operator_that_overwrites_its_input_is_wrong(records: dict[str, Record]) -> None:
    record = records["overwrites"]
    assert record.status == "wrong"
    assert record.times_us == {}


def test_a_timed_call_that_differs_from_the_checked_one_is_wrong(
    records: dict[str, Record],
) -> None:
    record = records["when_watched"]
    assert record.status == "wrong"
    assert "did not return what the checked one did: out" in str(record.reason)
    assert record.times_us == {}


@pytest.mark.parametrize("name", ["native", "right"])
def test_native_masks_and_right_results_pass(records: dict[str, Record], name: str) -> None:
    record = records[name]
    assert record.status == "ok", record.reason
    assert set(record.errors) == {"small", "sampled", "tiles"}
    assert record.median_us is not None
    assert record.first_call_us is not None
    assert record.mask_us is not None


def test_results_of_other_conditions_are_not_reused(tmp_path: Path) -> None:
    (unchecked,) = run_cases(tmp_path, {"check_sampled": False}, seq_len=400)
    assert "unchecked" in unchecked.flags
    (checked,) = run_cases(tmp_path, seq_len=400)
    assert checked.flags.count("unchecked") == 0
    assert "sampled" in checked.errors
    with pytest.raises(ValueError, match="holds results of device cpu, not cuda: choose another"):
        run_cases(tmp_path, device="cuda", seq_len=400)
    with pytest.raises(ValueError, match="holds results of threads 1, not 2"):
        run_cases(tmp_path, {"threads": 2}, seq_len=400)


def test_peak_memory_in_reports_includes_the_plan(tmp_path: Path) -> None:
    from cpbench.reports.frame import tidy_table
    from cpbench.results.store import Run

    (record,) = run_cases(
        tmp_path, operator="sdpa.cpu_flash", mask="sliding_window:window=9", seq_len=1024
    )
    assert record.memory_bytes["plan"] == [1024 * 1024 * 4]  # its dense bias
    assert tidy_table(Run({record.case.id: record}), "")["peak_mb"][0] > 4.19


def test_ulysses_is_balanced_and_ring_is_not(tmp_path: Path) -> None:
    ring, ulysses = run_cases(
        tmp_path, strategy=["ring", "ulysses"], mask="causal", seq_len=512, world_size=2
    )
    assert ring.balance is not None
    assert ring.balance[1] > 2.9 * ring.balance[0]
    assert ulysses.balance is not None
    assert ulysses.balance[0] == ulysses.balance[1]


def test_bytes_sent_and_peak_memory_are_as_predicted(tmp_path: Path) -> None:
    records = run_cases(
        tmp_path, strategy=["ring", "ulysses", "tile:rows=2"], mask="causal", seq_len=2048,
        num_heads_q=4, head_dim=64, world_size=2, ranks_per_node=1,
    )  # fmt: skip
    for record in records:
        assert "mispredicted" not in record.flags
        assert record.bytes_sent == record.predicted_bytes == record.bytes_across
        assert min(record.bytes_sent["bwd"]) > 0
        # On a busy machine, each of Gloo's two threads may release its last message late.
        late = 2 * max(record.largest_message.values())
        peaks = zip(record.memory_bytes["predicted"], record.memory_bytes["peak"], strict=True)
        for predicted, peak in peaks:  # the operator's own temporaries are not predicted
            assert predicted < 1.02 * peak
            assert 0.6 * (peak - late) < predicted
