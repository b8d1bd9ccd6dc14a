"""``report --pivot``: one metric of all cases, one fact down and another across."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from made_records import launches, record, write_run

from cpbench.reports.collection import collect
from cpbench.reports.page.data import chart_data
from cpbench.reports.tables.markup import MARKS, MARKUPS
from cpbench.reports.tables.pivot import make_pivot, render
from cpbench.results.record import Record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records: list[Record] = []
    for i, length in enumerate((1024, 16384, 2048)):
        for operator, ms in (("bands", 2.0), ("sdpa.cpu_flash", 3.0)):
            records += launches(operator, [ms * 3**i], seq_len=length)
    for seed, ms in ((0, 5.0), (1, 7.0), (2, 20.0)):
        records += launches("bands", [ms], mask=f"causal_document:corpus=pile,seed={seed}")
    records += launches("flex", [9.0], flags=["unchecked"])
    records.append(record("sdpa.math", status="oom", reason="no room"))
    write_run(tmp_path / "run", records)
    return tmp_path / "run"


def test_values_of_another_head_dim_are_another_problem(tmp_path: Path) -> None:
    records = [
        *launches("bands", [2.0], head_dim=192),
        *launches("bands", [1.0], head_dim=192, head_dim_v=128),
        *launches("triton_band", [3.0], head_dim=192, head_dim_v=128),
    ]
    write_run(tmp_path / "run", records)
    collection = collect([tmp_path / "run"])
    pivot = make_pivot(collection, "head_dim_v,operator", "ms", "")
    rows = next(iter(pivot.blocks.values()))
    assert set(rows) == {"0", "128"}
    assert rows["0"]["bands"].value == 2.0
    text = json.dumps(chart_data(collection)["texts"]["shape"]["values"])
    assert "head_dim 192," in text
    assert "head_dim 192/128," in text
    intensities = collection.table["intensity"]
    assert intensities.notna().all()
    assert intensities.nunique() == 2  # fewer bytes of values and outputs


def test_a_block_for_each_further_fact(run: Path) -> None:
    pivot = make_pivot(collect([run]), "seq_len,operator", "ms", "")
    text = {
        block: {
            down: {across: cell.shown for across, cell in row.items()} for down, row in rows.items()
        }
        for block, rows in pivot.blocks.items()
    }
    assert text == {
        "causal": {
            "1k": {"bands": "2.00", "sdpa.cpu_flash": "3.00", "flex": "9.00*", "sdpa.math": "oom"},
            "2k": {"bands": "18.0", "sdpa.cpu_flash": "27.0"},
            "16k": {"bands": "6.00", "sdpa.cpu_flash": "9.00"},
        },
        "causal_document:corpus=pile": {"1k": {"bands": "7.00"}},
    }
    assert pivot.notes == ["* unchecked", "Medians over up to 3 mask seeds."]
    lines = render(pivot, "run", "table").splitlines()
    assert [line.split()[0] for line in lines[4:9]] == ["seq_len", "-" * 18, "1k", "2k", "16k"]


def test_every_mark_is_written_in_every_markup() -> None:
    for form, markup in MARKUPS.items():
        (text, *_) = markup.title(MARKS)
        assert "?" not in text, form


def test_ratios_to_a_row_or_a_column(run: Path) -> None:
    collection = collect([run], ["mask=causal"])
    (block,) = make_pivot(collection, "seq_len,operator", "ms", "flex").blocks.values()
    assert {cell.shown for row in block.values() for cell in row.values()} == {"", "oom"}
    with pytest.raises(ValueError, match="no case has exposed communication"):
        make_pivot(collection, "seq_len,operator", "exposed", "")
    for pivot, baseline in (("seq_len,operator", "bands"), ("operator,seq_len", "bands")):
        (block,) = make_pivot(collection, pivot, "ms", baseline).blocks.values()
        ratios = {cell.shown for row in block.values() for cell in row.values()}
        assert ratios == {"1.00x", "1.50x", "4.50x*", "oom"}
    (block,) = make_pivot(collection, "seq_len,operator", "ms", "1k").blocks.values()
    cell = block["16k"]["bands"]
    assert (cell.shown, cell.value) == ("3.00x", pytest.approx(3))
    (block,) = make_pivot(collection, "seq_len,operator", "peak", "").blocks.values()
    assert block["1k"]["flex"].shown == "1.00"  # what is unchecked counts for memory


def test_wide_tables_are_turned_in_a_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pivot = make_pivot(collect([run], ["mask=causal"]), "seq_len,operator", "ms", "")
    monkeypatch.setenv("COLUMNS", "42")
    text = render(pivot, "run", "table")
    assert "operator \\ seq_len" in text
    assert max(map(len, text.splitlines())) <= 42
    assert render(pivot, "run", "md").splitlines()[2].startswith("|   seq_len ")


def test_the_command(run: Path) -> None:
    def report(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cpbench", "report", str(run), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    data = json.loads(report("--pivot", "seq_len,operator", "--format", "json").stdout)
    assert len(data) == 9
    assert {row["value"] for row in data if row["operator"] == "sdpa.math"} == {None}
    for words, line in (
        (("--pivot", "seq_len"), "give two of mask, method"),
        (("--pivot", "seq_len,seq_len"), "give two of mask, method"),
        (("--pivot", "seq_len,operator", "--metric", "status"), "is none of ms, fwd"),
        (("--pivot", "seq_len,operator", "--baseline", "no"), "operator is one of bands, "),
        (("--pivot", "seq_len,operator", "-o", str(run / "x.html")), "not written as html"),
        (("--baseline", "bands"), "--baseline goes with --pivot"),
    ):
        done = report(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert line in done.stderr
