"""Invalid command lines: exit code 2, one line on stderr that says what is wrong and what is
allowed, no output, no files, and torch is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import malformed
import pytest
from limits import LIMIT_S

from cpbench.cli import main

# A command line, and texts that the error message must contain.
LINES: dict[str, tuple[list[str], list[str]]] = {
    "command": (
        ["benchmark"],
        [
            "'benchmark'",
            "list, init, run, bench, verify, report, plot, compare, gate, race, history, traffic, "
            "predict, links, recommend, calibrate",
        ],
    ),
    "option": (["run", "quick", "--fast"], ["--fast", "cpbench run --help"]),
    "extra word": (["doctor", "now"], ["now", "cpbench doctor --help"]),
    "list nothing": (["list"], ["KIND", "operators, strategies, layouts, masks, inputs"]),
    "list kind": (["list", "kernels"], ["'kernels'", "'operators', 'strategies'"]),
    "list device": (["list", "masks", "--device", "tpu"], ["'tpu'", "'cpu', 'cuda'"]),
    "run without sweep": (["run"], ["SWEEP", "cpbench run --help"]),
    "run missing": (["run", "no.toml"], ["no.toml", "No such file"]),
    "run folder": (["run", "folder.toml"], ["folder.toml", "directory"]),
    "run binary": (["run", "binary.py.toml"], ["binary.py.toml", "UTF-8"]),
    "run packaged": (
        ["run", "quik"],
        ["'quik'", "context_parallel, context_parallel_quick, decode, kernels, longca"],
    ),
    "run launcher": (
        ["run", "quick", "--launcher", "ssh"],
        ["'ssh'", "'local', 'torchrun', 'mpi'"],
    ),
    "run device": (["run", "quick", "--device", "gpu"], ["'gpu'", "'cpu', 'cuda'"]),
    "run retry": (["run", "quick", "--retry", "failed"], ["'failed'", "ok, unsupported, oom"]),
    "run where form": (["run", "quick", "--where", "mask"], ["'mask'", "key=value", "world_size"]),
    "run where key": (["run", "quick", "--where", "rank=2"], ["'rank'", "world_size"]),
    "run where value": (["run", "quick", "--where", "seq_len=4q"], ["'4q'", "64k"]),
    "run where mask": (["run", "quick", "--where", "mask=casual"], ["'casual'", "causal"]),
    "run where none": (["run", "quick", "--where", "world_size=3"], ["world_size=3", "1, 2, 4"]),
    "run out file": (["run", "quick", "--out", "good.txt"], ["good.txt", "give a folder"]),
    "run out below file": (["run", "quick", "--out", "good.txt/x"], ["good.txt", "give a folder"]),
    "bench out file": (["bench", "--out", "good.txt"], ["good.txt", "give a folder"]),
    "bench operator": (["bench", "--operator", "bands,x"], ["'x'", "bands"]),
    "bench no operator": (["bench", "--operator", ""], ["operator", "name:key=value"]),
    "bench mask": (["bench", "--mask", "causal", "--mask", "casual"], ["'casual'", "causal"]),
    "bench size": (["bench", "--seq-len", "1k,,2k"], ["seq_len", "''", "64k"]),
    "bench negative": (["bench", "--seq-len", "-5"], ["seq_len", "'-5'", "64k"]),
    "bench huge": (["bench", "--seq-len", "1000000m"], ["1000000m", "at most 64m"]),
    "bench no lengths": (
        ["bench", "--phase", "decode", "--key-lens", "[]"],
        ["key_lens = []", "at least one"],
    ),
    "bench rope": (["bench", "--rope", "none,ntk"], ["ntk needs the factor"]),
    "bench heads": (["bench", "--num-heads-q", "4", "--num-heads-kv", "8"], ["(4)", "(8)"]),
    "bench precision": (["bench", "--precision", "high"], ["--precision", "number"]),
    "bench precision nan": (["bench", "--precision", "nan"], ["precision = nan", "finite"]),
    "bench seconds": (["bench", "--max-seconds", "-1"], ["max_seconds = -1.0", "0 or more"]),
    "bench timeout": (["bench", "--timeout", "0"], ["timeout_s = 0.0", "positive"]),
    "bench timeout text": (["bench", "--timeout", "soon"], ["--timeout", "number"]),
    "bench direction": (["bench", "--direction", "both"], ["'both'", "fwd, bwd, fwd_bwd"]),
    "bench fraction": (
        ["bench", "--strategy", "usp:ulysses=0.5", "--world-size", "2"],
        ["ulysses = 0.5", "integer"],
    ),
    "traffic negative": (
        ["traffic", "usp:ulysses=-2"],
        ["ulysses = -2", "a number of ranks, or 0"],
    ),
    "traffic pages": (["traffic", "ring", "--page-size", "16"], ["page_size", "phase decode"]),
    "traffic text": (["traffic", "ulysses:chunks=x"], ["chunks = 'x'", "integer"]),
    "traffic strategy": (["traffic", "x"], ["'x'", "ring"]),
    "tune operator": (["tune", "--operator", "paged.triton"], ["'paged.triton'", "triton_band, "]),
    "traffic operator": (["traffic", "scan", "--operator", "x"], ["'x'", " more"]),
    "traffic kinds": (["traffic", "scan"], ["scan distributes sequence mixers", "bands"]),
    "bench kinds": (
        ["bench", "--operator", "ssd", "--strategy", "ring"],
        ["ring distributes attention", "ssd is a sequence mixer"],
    ),
    "bench needles": (
        ["bench", "--phase", "decode", "--batch", "2", "--inputs", "haystack:hops=2"],
        ["hops = 2", "queries = 1"],
    ),
    "bench inputs": (
        ["bench", "--operator", "bands,ssd", "--inputs", "normal"],
        ["inputs = normal", "ssd is a sequence mixer", "gates"],
    ),
    "traffic heads": (["traffic", "ulysses", "--world-size", "48"], ["64 on 48", "divisible"]),
    "recommend strategy": (["recommend", "--strategy", "rng"], ["'rng'", "ring"]),
    "recommend problems": (["recommend", "--seq-len", "4k,8k"], ["one problem", "no lists"]),
    "recommend output": (["recommend", "-o", "x.pptx"], ["x.pptx", ".html, .svg, .png, .pdf"]),
    "recommend draws": (["recommend", "--draws", "0"], ["--draws 0", "1 or more"]),
    "links seconds": (["links", "--seconds", "nan"], ["--seconds nan", "more than 0"]),
    "calibrate nothing": (["calibrate"], ["run directories", "-o cluster.toml"]),
    "calibrate output": (["calibrate", "started", "-o", "x.json"], ["x.json", "end in .toml"]),
    "calibrate folder": (["calibrate", "no", "-o", "x.toml"], ["no is not a run directory"]),
    "calibrate empty": (["calibrate", "started", "-o", "x.toml"], ["started: no checked times"]),
    "calibrate links": (
        ["calibrate", "started", "--links", "good.txt", "-o", "x.toml"],
        ["good.txt: not a file of cpbench links"],
    ),
    "calibrate no links": (
        ["calibrate", "started", "--links", "no.json", "-o", "x.toml"],
        ["--links no.json", "no such file"],
    ),
    "predict cluster file": (
        ["predict", "ring", "--cluster", "no.toml"],
        ["cluster no.toml", "no such file"],
    ),
    "predict ranks": (["predict", "ring", "--world-size", "0"], ["world_size = 0", "positive"]),
    "predict tokens": (["predict", "ring", "--seq-len", "-5"], ["seq_len", "'-5'"]),
    "links no ranks": (["links", "--world-size", "0"], ["--world-size"]),
    "bench launches": (["bench", "--launches", "0"], ["--launches", "equal to 1"]),
    "links ranks": (["links", "--world-size", "3000"], ["--world-size 3000", "at most 256"]),
    "verify operator": (["verify", "--operator", "x"], ["'x'", "bands"]),
    "verify strategy": (["verify", "--strategy", "x"], ["'x'", "ring"]),
    "verify mask": (["verify", "--mask", "x"], ["'x'", "causal"]),
    "verify dtype": (["verify", "--dtype", "int8"], ["'int8'", "float32, bfloat16"]),
    "verify world": (["verify", "--world-size", "two"], ["'two'", "64k"]),
    "verify world 0": (["verify", "--world-size", "0"], ["world_size = 0", "positive"]),
    "verify timeout": (["verify", "--timeout", "-1"], ["timeout_s = -1.0", "positive"]),
    "verify timeout nan": (["verify", "--timeout", "nan"], ["timeout_s = nan", "finite"]),
    "verify out": (["verify", "--out", "good.txt"], ["good.txt", "give a folder"]),
    "mask name": (["mask", "casual", "--seq-len", "1k"], ["'casual'", "causal"]),
    "mask size": (["mask", "causal", "--seq-len", "1z"], ["'1z'", "64k"]),
    "mask huge": (["mask", "full_document", "--seq-len", "1000000m"], ["at most 64m"]),
    "mask no size": (["mask", "causal"], ["--seq-len", "cpbench mask --help"]),
    "mask png kind": (["mask", "causal", "--seq-len", "9", "--png", "x.jpg"], ["x.jpg", ".png"]),
    "mask png folder": (
        ["mask", "causal", "--seq-len", "9", "--png", "no/x.png"],
        ["no/x.png", "No such file"],
    ),
    "report nothing": (["report"], ["run directory", "--columns"]),
    "report missing": (["report", "no"], ["no is not a run directory", "records"]),
    "report other folder": (["report", "folder.toml"], ["folder.toml", "records"]),
    "report file": (["report", "good.txt"], ["good.txt", "records"]),
    "report empty": (["report", "started"], ["no finished case"]),
    "report damaged": (["report", "damaged"], ["no finished case", "torn or damaged"]),
    "report format": (["report", "started", "--format", "xml"], ["'xml'", "'table', 'html', 'md'"]),
}
REAL = [
    "command",
    "run missing",
    "run folder",
    "run binary",
    "run where none",
    "run out file",
    "bench operator",
    "bench huge",
    "verify strategy",
    "mask name",
    "report missing",
    "report format",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return malformed.working_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", LINES)
def test_line(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv, parts = LINES[name]
    malformed.check_command(argv, parts, folder, capfd)


@pytest.mark.parametrize("name", REAL)
def test_real_command(name: str, folder: Path) -> None:
    argv, parts = LINES[name]
    before = malformed.files(folder)
    done = subprocess.run(
        [Path(sys.executable).with_name("cpbench"), *argv],
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    malformed.check_refused(done.returncode, done.stdout, done.stderr, parts)
    assert malformed.files(folder) == before


def test_report_into_what_cannot_be_written(
    folder: Path, capfd: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    for target, part in (("no/x.md", "no folder no"), ("folder.toml", "is a folder")):
        malformed.check_command(
            ["report", str(finished_run), "-o", target],
            [target, part, "give a file"],
            folder,
            capfd,
        )


def test_report_leaves_a_device_a_device(finished_run: Path) -> None:
    assert main.invoke(["report", str(finished_run), "-o", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


@pytest.fixture
def finished_run(folder: Path) -> Path:
    """A run directory with one record."""
    from cpbench.core.problem import Case
    from cpbench.results.record import Record
    from cpbench.results.store import RecordWriter

    run = folder / "finished"
    record = Record(case=Case(), status="unsupported", reason="not today")
    with RecordWriter(run / "records" / "a.jsonl") as records:
        records.append(record.to_json())
    return run


def test_no_torch() -> None:
    """A refusal in a process of its own loads no torch: the other tests may share one that has."""
    text = (
        "import sys; from cpbench.cli import main; code = main.invoke(['bench', '--operator', 'x'])"
    )
    text += "; assert code == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, timeout=LIMIT_S)
