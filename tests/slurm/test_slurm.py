"""A real Slurm of six nodes on this host: jobs that are requeued, cancelled, cut off at their
limit, or lose a node; every case that finishes is measured once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from launch_paths import CASE_IDS, MPICH, SWEEP, needs_mpich
from run_cpbench import cpbench, faulty, lines, start, survivors, sweep, until
from small_disk import small_disk  # noqa: F401

from cpbench.results.store import read_run
from cpbench.slurm import client, submission
from cpbench.slurm.job_states import FORGOTTEN, JobState

pytestmark = [
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "-"),
    pytest.mark.timeout(580),
]
GOOD = ["reference", "bands"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.Cluster]:
    home = Path(tempfile.mkdtemp(prefix="cpb"))
    made = slurm_cluster.Cluster(home, nodes=6)
    yield made
    made.stop()
    shutil.rmtree(home)


@pytest.fixture
def here(cluster: slurm_cluster.Cluster, monkeypatch: pytest.MonkeyPatch) -> slurm_cluster.Cluster:
    """The cluster, with this process's commands speaking to it; no job and no dead node is left
    behind."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.tell("scancel", "-u", "root")
    cluster.revive()
    until(lambda: not cluster.tell("squeue", "-h"))


def profile(folder: Path, name: str = "site", **keys: object) -> Path:
    """A site profile for the cluster."""
    base = {
        "partition": "main", "ranks_per_node": 2, "time": "10", "interface": "lo", "poll_s": 1,
        "preflight": False, **keys,
    }  # fmt: skip
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in base.items())
    path = folder / f"{name}.toml"
    path.write_text(text + "\n")
    return path


def cpbench_prints(*words: str | Path) -> str:
    """Standard output of a command that must succeed."""
    command = [sys.executable, "-m", "cpbench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def submitted(out: Path) -> dict[int, str]:
    """The newest job of each number of ranks."""
    return {one.ranks: one.job for one in submission.submissions(out) if one.ranks}


def waiting_at_the_gate(out: Path, ranks: int) -> bool:
    """Whether a case of so many ranks is in the operator that waits."""
    return any(
        "check" in path.read_text() and '"done"' in path.read_text()
        for path in out.glob(f"jobs/*-p{ranks}-*/rank0.jsonl")
    )


def test_a_sweep_survives_what_clusters_do(here: slurm_cluster.Cluster, tmp_path: Path) -> None:
    sizes = (1, 2, 3, 4)
    file = sweep(tmp_path / "s.toml", {size: [GOOD[0], faulty("gate"), GOOD[1]] for size in sizes})
    file.write_text(file.read_text().replace("timeout_s = 5.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", profile(tmp_path)
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, said = cpbench(*words, "--where", "world_size=1,2,4")
    assert code == 0, said
    limited = profile(tmp_path, "limited", time="1", signal_s=30)  # cut off after half a minute
    code, said = cpbench(*words[:-1], limited, "--where", "world_size=3")
    assert code == 0, said
    jobs = submitted(out)
    assert set(jobs) == set(sizes)
    until(lambda: all(waiting_at_the_gate(out, size) for size in (1, 2, 4)), 150)
    before = {key: record.started for key, record in read_run(out).records.items()}
    assert len(before) >= 3

    # Nothing is submitted twice while jobs live.
    code, said = cpbench(*words, "--where", "world_size=1,2,4")  # the limited one may have ended
    assert re.search(r"\b[1-9]\d* were in jobs already", said)
    assert submitted(out) == jobs

    here.tell("scontrol", "requeue", jobs[1])
    here.tell("scancel", jobs[2])
    board = submission.Board(out)
    until(lambda: not any(board.look()[jobs[size]].alive for size in (2, 3)), 120)
    states = board.look()
    assert states[jobs[2]].state == "CANCELLED"
    assert states[jobs[3]].code == 75, states[jobs[3]]
    assert states[jobs[3]].may_go_on
    (node,) = here.tell("squeue", "-h", "-j", jobs[4], "-o", "%B").split()
    here.kill_node(node)
    here.tell("scontrol", "update", f"jobid={jobs[1]}", "StartTime=now")

    (out / "open").touch()
    process = start(*words, "--wait", "--resubmit", "2")
    try:
        until(lambda: "Restarts=1" in here.tell("scontrol", "show", "job", jobs[4]), 60)
        here.tell("scontrol", "update", f"jobid={jobs[4]}", "StartTime=now")
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert lines(out) == dict.fromkeys(lines(out), 1), "a case was measured twice"
    found = read_run(out).records
    assert len(found) == 3 * len(sizes)
    assert {record.status for record in found.values()} == {"ok"}
    assert all(found[key].started == when for key, when in before.items())
    until(lambda: not survivors(out), 20)
    status = json.loads(cpbench_prints("status", out, "--json"))
    assert (status["cases"], status["recorded"], status["alive"]) == (12, 12, False)
    assert (out / "report.md").is_file()


@pytest.mark.parametrize(
    "ranks", ["srun", "torchrun", "mpiexec", pytest.param("mpi", marks=needs_mpich)]
)
def test_the_cases_of_every_other_launcher(
    here: slurm_cluster.Cluster, tmp_path: Path, ranks: str
) -> None:
    """See test_nodes.py, whose sweep this is."""
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    more: dict[str, object] = {}
    if ranks == "mpi":
        more = {"srun": ["--mpi=pmi2"]}
    site = profile(tmp_path, ranks=ranks, packing="one", **more)
    if ranks == "mpi":
        library = MPICH.parent.parent / "lib" / "libmpi.so.12"
        site.write_text(f"{site.read_text()}[environment]\nMPI4PY_LIBMPI = {str(library)!r}\n")
    code, said = cpbench(
        "run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait"
    )
    assert code == 0, said
    found = read_run(out)
    assert sorted(found.records) == CASE_IDS
    for record in found.records.values():
        assert record.status == "ok"
        assert set(record.errors) == {"small"}
        assert record.ranks_per_node == 2
        assert record.bytes_sent == record.predicted_bytes
    assert len(submission.submissions(out)) == 2  # one allocation for all, and the report


FAULTS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "hang": ("timeout", "no result after 5 s: rank 0 "),
    "segfault": ("crash", "rank 1 was killed by SIGSEGV"),
    "cut": ("crash", "rank "),
}


def test_a_rank_that_fails_is_one_record_and_leaves_nothing_behind(
    here: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    names = [faulty(how, 1) for how in FAULTS]
    file = sweep(tmp_path / "s.toml", {2: [*names, "reference"]})
    out, site = tmp_path / "run", profile(tmp_path)
    code, said = cpbench(
        "run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait"
    )
    assert code == 1, said
    for record in read_run(out).records.values():
        how = str(record.case.operator.kwargs.get("how", ""))
        status, reason = FAULTS.get(how, ("ok", ""))
        assert (record.status, (record.reason or "")[: len(reason)]) == (status, reason)
    assert survivors(out) == []
    hung = next(path for path in out.glob("jobs/*/rank0.log") if "in _hang" in path.read_text())
    assert hung, "the stacks of a hung rank were asked for through srun"


def test_values_are_quoted_and_run_nothing(here: slurm_cluster.Cluster, tmp_path: Path) -> None:
    evil = "a b;$(touch pwned)`touch pwned`'\"#%j"
    folder = tmp_path / evil
    folder.mkdir()
    file = sweep(folder / f"{evil}.toml", {1: ["reference"]})
    site = profile(
        tmp_path, sbatch=[f"--comment={evil}"], packing="array", chunk=1, throttle=1,
    )  # fmt: skip
    site.write_text(site.read_text() + f"[environment]\nCPBENCH_ODD = {json.dumps(evil)}\n")
    out = folder / "run"
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, said = cpbench(*words, "--wait")
    assert code == 0, said
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    assert not [*Path().glob("pwned"), *tmp_path.rglob("pwned")]
    log = next(path for path in out.glob("slurm/*.log") if "report" not in path.name)
    assert log.is_file()  # where it was meant to be, per cent sign and all


@pytest.mark.parametrize("bad", ["n1", "n2"])
def test_a_bad_node_is_left_out_and_told_of(
    here: slurm_cluster.Cluster, tmp_path: Path, bad: str
) -> None:
    """With a node to spare; but the first node is where the supervisor sits."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {bad} ] && {{ echo "no such luck" >&2; exit 3; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    file = sweep(tmp_path / "s.toml", {4: ["reference"]})
    out, keys = tmp_path / "run", {"preflight": True, "python": [str(python)]}
    site = profile(tmp_path, nodelist="n[1-3]", spare_nodes=1, **keys)
    words = ("run", file, "--out", out, "--launcher", "slurm", "--wait", "--profile")
    code, said = cpbench(*words, site)
    assert list(submission.bad_nodes(out)) == [bad]
    assert "no such luck" in submission.bad_nodes(out)[bad]
    if bad == "n1":
        assert code == 1
        assert "too few good nodes" in said
        code, said = cpbench(*words, profile(tmp_path, "again", **keys))
        last = [one for one in submission.submissions(out) if one.ranks][-1]
        assert f"--exclude={bad}" in next(out.glob(f"slurm/{last.name}.sbatch")).read_text()
    assert code == 0, said
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    assert f"node {bad} is left out" in cpbench_prints("status", out)


def test_jobs_that_will_not_start_are_told_of(here: slurm_cluster.Cluster, tmp_path: Path) -> None:
    file = sweep(tmp_path / "s.toml", {1: ["reference"]})
    out, site = tmp_path / "run", profile(tmp_path, sbatch=["--hold"])
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, said = cpbench(*words, "--wait")
    assert code == 1
    assert "will not start: JobHeldUser" in said
    assert "1 of 1 cases have no result" in said
    code, said = cpbench("cancel", out)
    assert code == 0
    assert not here.tell("squeue", "-h", "-t", "pending")


def test_a_job_that_is_preempted_goes_on_later(here: slurm_cluster.Cluster, tmp_path: Path) -> None:
    file = sweep(tmp_path / "s.toml", {2: ["reference", faulty("gate")]})
    file.write_text(file.read_text().replace("timeout_s = 5.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", profile(tmp_path)
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, said = cpbench(*words)
    assert code == 0, said
    job = submitted(out)[2]
    until(lambda: waiting_at_the_gate(out, 2), 60)
    scratch = Path(f"/tmp/cpbench-{job}")
    urgent = ("sbatch", "--parsable", "-p", "urgent", f"-N{len(here.names)}", "--exclusive")
    other = here.tell(*urgent, "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: here.state(other) == "COMPLETED", 60)
    assert "Restarts=1" in here.tell("scontrol", "show", "job", job)
    (out / "open").touch()
    here.tell("scontrol", "update", f"jobid={job}", "StartTime=now")
    code, said = cpbench(*words, "--wait")
    assert code == 0, said
    assert "1 were in jobs already" in said
    assert list(lines(out).values()) == [1, 1]
    assert not scratch.exists()


def test_two_shells_at_once_submit_every_case_once(
    here: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    """Held jobs count as living, and a run here leaves the cases of jobs alone."""
    file = sweep(tmp_path / "s.toml", {1: ["reference"]})
    out, site = tmp_path / "run", profile(tmp_path, sbatch=["--hold"])
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    both = [start(*words), start(*words)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len([one for one in submission.submissions(out) if one.ranks]) == 1
    code, said = cpbench("run", file, "--out", out)
    assert code == 2
    assert "1 of these cases are in jobs; wait for them, or: cpbench cancel" in said


def test_what_slurm_refuses_is_one_line(here: slurm_cluster.Cluster, tmp_path: Path) -> None:
    file = sweep(tmp_path / "s.toml", {1: ["reference"]})
    site = profile(tmp_path, partition="no_such_partition")
    code, said = cpbench(
        "run", file, "--out", tmp_path / "run", "--launcher", "slurm", "--profile", site
    )
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("cpbench: sbatch: ")
    assert "invalid partition" in line


def test_jobs_that_have_left_the_queue(here: slurm_cluster.Cluster) -> None:
    job = here.tell("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3")
    until(lambda: here.state(job) == "FAILED")
    assert client.states([job])[job].code == 3
    until(lambda: job in client._from_accounting(("sacct", "--completion"), [job]), 20)
    assert client._from_accounting(("sacct", "--completion"), [job])[job].state == "FAILED"
    assert client.states(["99999"]) == {"99999": JobState("99999", FORGOTTEN)}


def test_cancel_ends_the_jobs_and_keeps_the_records(
    here: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    file = sweep(tmp_path / "s.toml", {2: ["reference", faulty("gate")]})
    file.write_text(file.read_text().replace("timeout_s = 5.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", profile(tmp_path)
    code, said = cpbench("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    assert code == 0, said
    until(lambda: waiting_at_the_gate(out, 2), 60)
    code, said = cpbench("cancel", out)
    assert code == 0, said
    until(lambda: not here.tell("squeue", "-h"), 30)
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    until(lambda: not survivors(out), 10)
    assert time.time() - max(path.stat().st_mtime for path in out.glob("slurm/*.log")) < 60


def test_a_full_disk_ends_the_job_and_not_what_is_there(
    here: slurm_cluster.Cluster,
    tmp_path: Path,
    small_disk: Path,  # noqa: F811
) -> None:
    names = ["reference", faulty("fill", 0)]
    file = sweep(tmp_path / "s.toml", {2: names})
    text = file.read_text().replace("_iterations = 1\n", "_iterations = 80\n")
    file.write_text(text.replace("timeout_s = 5.0", "timeout_s = 100.0"))
    out, site = small_disk, profile(tmp_path)
    words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait")
    _, said = cpbench(*words)
    assert "results could not be written" in said, said
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    assert survivors(out) == []
    (out / "ballast").unlink()
    code, said = cpbench(*words, env={"CPBENCH_TEST_CALM": "1"})
    assert code == 0, said
    assert list(lines(out).values()) == [1, 1]
