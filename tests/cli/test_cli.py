"""Output and exit codes of the commands, in this process or in real ones."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S

from cpbench.cli import main
from cpbench.sweep import runs, sweep_file
from cpbench.sweep.request import Request

CPBENCH = Path(sys.executable).with_name("cpbench")
COMMANDS = (
    "list", "run", "bench", "verify", "report", "mask", "traffic", "predict", "links", "recommend",
    "calibrate", "doctor",
)  # fmt: skip
KINDS = ("operators", "strategies", "layouts", "masks", "inputs", "sweeps", "support")

MINE = """
from cpbench.core.registry import OperatorInfo

print("output of a user's file")


def build(sign=1):
    from cpbench.kernels.reference import Reference

    class Mine(Reference):
        def forward(self, qkv, plan):
            out, lse = super().forward(qkv, plan)
            return sign * out, lse

    return Mine()


my_op = OperatorInfo(name="my_op", summary="the reference again", source="me", load=build,
                     params=("sign",))
"""


def run_command(*arguments: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``cpbench`` as a user does, in a folder."""
    return subprocess.run(
        [CPBENCH, *arguments],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints; it must succeed and print nothing on stderr."""
    assert main.invoke(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(printed(capsys, *arguments, "--json"))


def test_without_arguments_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    bare = printed(capsys)
    assert bare == printed(capsys, "--help")
    assert all(f"\n  {name} " in bare for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, name, "--help")
    assert text.startswith(f"Usage: cpbench {name}")
    for option in text.split("\n  -"):
        assert option.count("[default") <= 1, option
    assert "<str>" not in text.split("Options:")[1], "an option shows a metavar, not its type"
    assert "..." not in printed(capsys).split(f"  {name} ")[1].splitlines()[0], "too long a summary"


def test_help_imports_little() -> None:
    code = (
        "import sys; from cpbench.cli.main import invoke; "
        "invoke(['--help']); invoke(['run', '--help']); "
        "loaded = {'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=LIMIT_S)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version").startswith("cpbench 0.")


@pytest.mark.parametrize("kind", KINDS)
def test_list(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rows = as_json(capsys, "list", kind, "--device", "cpu")
    text = printed(capsys, "list", kind, "--device", "cpu")
    assert rows
    for row in rows:
        name, *_ = row.values()
        assert any(f"{line} ".startswith(f"{name} ") for line in text.splitlines())
    table = [line for line in text.splitlines() if not line.startswith("    ")]
    assert max(map(len, table)) <= 100


def test_list_shows_what_is_available(capsys: pytest.CaptureFixture[str]) -> None:
    available = {
        row["operator"]: row["here"]
        for row in as_json(capsys, "list", "operators", "--device", "cpu")
    }
    assert available["bands"] == "yes"
    assert available["sdpa.flash"] == "no: runs on cuda, not on cpu"
    text = printed(capsys, "list", "operators", "--device", "cpu")
    assert "available" in text.splitlines()[0]
    assert "FlashAttention-2 in torch; not available: runs on cuda, not on cpu" in text


def test_mask(capsys: pytest.CaptureFixture[str]) -> None:
    output = as_json(capsys, "mask", "sliding_window_causal:window=1", "--seq-len", "4")
    assert (output["area"], output["seq_q"], output["density"]) == (7, 4, 0.4375)
    assert output["slice_rows"]
    text = printed(capsys, "mask", "sliding_window_causal:window=1", "--seq-len", "4")
    assert "area      7\n" in text


def test_mask_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mask.png"
    assert str(file) in printed(capsys, "mask", "causal", "--seq-len", "1m", "--png", str(file))
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:])) > 400


def test_report_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert "time_ms" in printed(capsys, "report", "--columns")


def test_dry_run_without_torch(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "triton", "mpi4py"):
        (tmp_path / "blocked" / f"{name}.py").write_text(f"raise ImportError('{name}')\n")
    work = tmp_path / "work"
    work.mkdir()
    done = run_command(
        "run",
        "quick",
        "--dry-run",
        "--json",
        "--launcher",
        "local",
        folder=work,
        PYTHONPATH=str(tmp_path / "blocked"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert {case["id"] for case in plan["cases"]} == {c.id for c in sweep_file.load("quick").cases}
    assert [gang["world_size"] for gang in plan["gangs"]] == [1, 2, 4]
    for gang in plan["gangs"]:
        ranks = [command["env"]["RANK"] for command in gang["commands"]]
        assert ranks == [str(rank) for rank in range(gang["world_size"])]
        for command in gang["commands"]:
            assert command["argv"][1:4] == ["-P", "-m", "cpbench.worker.main"]
            assert command["argv"][4].startswith(str(work / "results" / "quick"))
    assert not list(work.iterdir())


def test_dry_run_for_people(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(
        capsys,
        "run",
        "quick",
        "--dry-run",
        "--launcher",
        "torchrun",
        "--where",
        "world_size=2",
        "--where",
        "strategy=ring",
    )
    assert "torch.distributed.run" in text
    assert "--nproc-per-node 2" in text


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a real run of a user's operator, correct and wrong, and a refused one."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mine.py").write_text(MINE)
    done = run_command(
        "bench",
        "--operator",
        "./mine.py:my_op:sign=[1,-1],bands,sdpa.cudnn",
        "--mask",
        "causal",
        "--seq-len",
        "96",
        "--head-dim",
        "16",
        "--num-heads-q",
        "2",
        "--max-seconds",
        "0.2",
        "--device",
        "cpu",
        "--out",
        "run",
        folder=folder,
    )
    return folder, done


def test_bench(bench: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = bench
    assert done.returncode == 1, "one result is wrong"
    fastest = done.stdout.split("## Fastest method per problem")[1].split("##")[0]
    assert "./mine.py:my_op:sign=1" in fastest
    assert "bands" in fastest
    failed = done.stdout.split("## Failed")[1]
    assert "wrong    ./mine.py:my_op:sign=-1" in failed
    assert "sdpa.cudnn runs on cuda, not on cpu" in done.stdout.split("## Unsupported")[1]
    assert "[4/4]" in done.stderr


def test_bench_again_reruns_nothing(bench: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = bench
    before = sorted((folder / "run" / "jobs").iterdir())
    done = run_command(
        "bench",
        "--operator",
        "./mine.py:my_op:sign=1",
        "--mask",
        "causal",
        "--seq-len",
        "96",
        "--head-dim",
        "16",
        "--num-heads-q",
        "2",
        "--device",
        "cpu",
        "--out",
        "run",
        "--json",
        folder=folder,
    )
    assert done.returncode == 0
    (row,) = json.loads(done.stdout)
    assert row["operator"] == "./mine.py:my_op:sign=1"
    assert sorted((folder / "run" / "jobs").iterdir()) == before


@pytest.mark.parametrize("form", ["table", "md", "csv", "json"])
def test_report(
    form: str,
    bench: tuple[Path, subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    run = str(bench[0] / "run")
    text = printed(capsys, "report", run, "--format", form)
    assert "sdpa.cudnn" in text
    file = tmp_path / "report"
    assert printed(capsys, "report", run, "--format", form, "-o", str(file)) == ""
    assert file.read_text() == text
    if form == "json":
        assert len(json.loads(text)) == 4


def test_verify_json(tmp_path: Path) -> None:
    done = run_command(
        "verify",
        "--operator",
        "reference",
        "--mask",
        "causal",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--json",
        "--out",
        "out",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["operator"], row["failed"]) == ("reference", 0)
    assert row["ok"] > 0


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["bench"], 600.0),
        (["bench", "--timeout", "7"], 7.0),
        (["verify"], 300.0),
        (["verify", "--timeout", "0.5"], 0.5),
    ],
    ids=str,
)
def test_the_timeout_of_a_case(
    arguments: list[str], limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    monkeypatch.setattr(runs, "execute", lambda request, quiet: requests.append(request) or 0)
    assert main.invoke([*arguments, "--out", str(tmp_path), "--json"]) == 0
    assert [request.settings.timeout_s for request in requests] == [limit]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "--operator", "bands,ssd"], {"bands": {"normal"}, "ssd": {"gates"}}),
        (["bench", "--operator", "ssd", "--inputs", "gates:shortest=2"],
         {"ssd": {"gates:shortest=2"}}),
        (["verify", "--operator", "ssd", "--world-size", "1"],
         {"ssd": {"gates", "gates:initial=true", "gates:shortest=0.03"}}),
    ],
    ids=["bench", "bench, given", "verify"],
)  # fmt: skip
def test_mixers_get_inputs_with_gates(
    arguments: list[str],
    expected: dict[str, set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = dict[str, set[str]]()

    def keep(request: Request, quiet: bool) -> int:
        for case in request.cases:
            found.setdefault(case.operator.name, set()).add(str(case.inputs))
        return 0

    monkeypatch.setattr(runs, "execute", keep)
    assert main.invoke([*arguments, "--out", str(tmp_path), "--json"]) == 0
    assert found == expected


def test_doctor_json(tmp_path: Path) -> None:
    done = run_command("doctor", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    checked = {row["what"] for row in json.loads(done.stdout)}
    assert {"torch", "gloo", "operators", "masks"} <= checked


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    for kind in ("layouts", "masks"):
        line = f"{CPBENCH} list {kind} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=LIMIT_S)
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_closed_from_the_start(unbuffered: str) -> None:
    """If stdout is buffered, the pipe breaks at exit, else while the command prints."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [CPBENCH, "list", "masks"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
        timeout=LIMIT_S,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [CPBENCH, "list", "masks"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 1
    assert done.stderr == "cpbench: cannot write the output: No space left on device\n"
