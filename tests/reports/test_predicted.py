"""Predictions in reports: beside measured times, never among them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made_records import record, section_lines

import cpbench
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.reports.collection import collect
from cpbench.reports.figures.draw import draw
from cpbench.reports.page.write import write_page
from cpbench.reports.tables.render import render
from cpbench.results.prediction import Prediction
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter, read_run

FACTS = {"world_size": 4, "seq_len": 4096, "direction": "fwd"}


def prediction(case: Case, ms: float, cluster: str = "h100-ib") -> Prediction:
    phase = {"seconds": ms / 1e3, "low": ms / 1.1e3, "high": ms / 0.9e3, "tflops_per_gpu": 1.0}
    return Prediction(
        case=case, cluster=cluster, cluster_hash="ab12", phases={"fwd": phase}, writer="predict"
    )


def run_directory(out: Path, *lines: Prediction | Record) -> Path:
    with RecordWriter(out / "records" / "w.jsonl") as writer:
        for line in lines:
            writer.append(line.to_json())
    return out


def measured(strategy: str, ms: float, **fields: object) -> Record:
    return record("bands", ms, strategy=strategy, **{**FACTS, **fields})


def test_a_prediction_is_read_back_and_the_newest_counts(tmp_path: Path) -> None:
    case = measured("ring", 1.0).case
    out = run_directory(tmp_path, prediction(case, 3.0), prediction(case, 2.0))
    run = read_run(out)
    assert not run.records
    assert not run.warnings
    (one,) = run.predictions.values()
    assert dataclasses.replace(one, sequence=0) == prediction(case, 2.0)
    assert one.sequence == 2


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("phases.fwd.seconds", -1.0, "seconds = -1.0 is negative"),
        ("phases.fwd.low", "x", "low = 'x' is not a number"),
        ("phases.fwd.high", None, "high"),
        ("phases", {}, "phases has nothing"),
        ("phases", {"out": {}}, "phases has out"),
        ("cluster", 3, "cluster = 3 is no str"),
        ("id", "000000000000", "the id"),
    ],
)
def test_a_wrong_prediction_is_left_out_with_a_reason(
    tmp_path: Path, path: str, value: object, line: str
) -> None:
    table = json.loads(json.dumps(prediction(measured("ring", 1.0).case, 3.0).to_json()))
    at = table
    *keys, last = path.split(".")
    for key in keys:
        at = at[key]
    at[last] = value
    with RecordWriter(tmp_path / "records" / "w.jsonl") as writer:
        writer.append(table)
    run = read_run(tmp_path)
    assert not run.predictions
    assert line in run.warnings[0]


def test_predictions_stand_beside_measured_times(tmp_path: Path) -> None:
    ring, ulysses, usp = (
        measured(strategy, ms) for strategy, ms in (("ring", 2.0), ("ulysses", 1.0), ("usp", 4.0))
    )
    out = run_directory(
        tmp_path, ring, ulysses, usp, prediction(ring.case, 2.1), prediction(ulysses.case, 2.5),
        prediction(usp.case, 4.0),
    )  # fmt: skip
    collection = collect([out])
    assert len(collection.table) == 3
    text = render(collection, "table")
    (rows,) = [section_lines(text, "Predicted, fastest first")]
    cells = [line.split() for line in rows if "bands" in line]
    assert [line[-1] for line in cells] == ["+5.0%", "+150.0%", "0.0%"]
    joined = " ".join(text.split())
    assert "off by 5.0% in the median" in joined
    assert "of 3 pairs of methods more than 5% apart on one problem, 2 in the right order" in joined


def test_cases_that_were_only_predicted_never_compete(tmp_path: Path) -> None:
    slow = measured("ring", 2.0)
    fast = dataclasses.replace(slow.case, strategy=Spec.parse("ulysses"))
    out = run_directory(tmp_path, slow, prediction(fast, 0.1))
    collection = collect([out])
    assert list(collection.table["strategy"]) == ["ring"]
    text = render(collection, "short")
    assert "1 case, 1 ok; 1 case predicted" in text
    assert "ulysses" not in " ".join(section_lines(text, "Fastest method per problem"))
    rows = cpbench.load(out).set_index("strategy")
    assert rows.loc["ulysses", "status"] == "predicted"
    assert not rows.loc["ulysses", "competes"]
    assert rows.loc["ulysses", "predicted_ms"] == pytest.approx(0.1)
    assert rows["time_ms"].isna().to_dict() == {"ring": False, "ulysses": True}
    assert len(json.loads(render(collection, "json"))) == 2


def test_the_figure_draws_cases_that_were_only_predicted_beside_measured_ones(
    tmp_path: Path,
) -> None:
    slow = measured("ring", 2.0)
    fast = dataclasses.replace(slow.case, strategy=Spec.parse("ulysses"))
    out = run_directory(tmp_path / "run", slow, prediction(slow.case, 2.1), prediction(fast, 0.1))
    draw(collect([out]), "predicted", tmp_path / "figure.svg", [])
    drawn = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "ring/contiguous bands" in drawn
    assert "ulysses/contiguous bands" in drawn


def test_predictions_of_another_directory_are_joined_by_case(tmp_path: Path) -> None:
    ring = measured("ring", 2.0)
    folders = [
        run_directory(tmp_path / "predicted", prediction(ring.case, 2.2)),
        run_directory(tmp_path / "measured", ring),
    ]
    for order in (folders, folders[::-1]):
        collection = collect(order)
        assert list(collection.table["predicted_ms"]) == pytest.approx([2.2])
        assert len(collection.predicted) == 1


def test_a_directory_of_predictions_has_a_report_a_page_and_a_figure(tmp_path: Path) -> None:
    cases = [measured(strategy, 1.0).case for strategy in ("ring", "ulysses")]
    cases += [dataclasses.replace(case, world_size=8) for case in cases]
    folder = tmp_path / "run"
    out = run_directory(folder, *(prediction(case, 1.0 + i) for i, case in enumerate(cases)))
    collection = collect([out])
    text = render(collection, "short")
    assert text.startswith("# run: 4 cases predicted")
    assert "Fastest" not in text
    write_page(collection, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>Predicted</h2>" in page
    assert "<h2>Charts</h2>" not in page
    draw(collection, "predicted", tmp_path / "figure.svg", [])
    assert "ulysses" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert len(collect([out], ["strategy=ring"]).predicted) == 2
