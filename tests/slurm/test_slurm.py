"""A real Slurm cluster of six nodes on one host: jobs that are requeued, cancelled, stopped at a
time limit, or lose a node; every case that finishes is measured once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from launch_paths import CASE_IDS, MPICH, SWEEP
from limits import LIMIT_S
from run_cpbench import (
    cpbench,
    faulty_operator,
    leftover_processes,
    record_counts,
    start_cpbench,
    wait_until,
    waits_at_gate,
    write_sweep,
)
from small_disk import small_disk  # noqa: F401

from cpbench.results.store import read_run
from cpbench.slurm import client, submission
from cpbench.slurm.job_states import FORGOTTEN, JobState

pytestmark = [
    pytest.mark.skipif(
        bool(slurm_cluster.missing_requirement()), reason=slurm_cluster.missing_requirement() or "-"
    ),
]
GOOD = ["reference", "bands"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.Cluster]:
    home = Path(tempfile.mkdtemp(prefix="cpb"))
    cluster = slurm_cluster.Cluster(home, nodes=6)
    yield cluster
    cluster.stop()
    shutil.rmtree(home)


@pytest.fixture
def slurm(
    cluster: slurm_cluster.Cluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[slurm_cluster.Cluster]:
    """The cluster, with the environment set for its commands; afterwards without jobs, and with all
    nodes running."""
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.run("scancel", "-u", "root")
    cluster.revive()
    wait_until(lambda: not cluster.run("squeue", "-h"))


def write_profile(folder: Path, name: str = "site", **keys: object) -> Path:
    """Write a site profile for the cluster."""
    base = {
        "partition": "main", "ranks_per_node": 2, "time": "10", "interface": "lo", "poll_s": 1,
        "preflight": False, **keys,
    }  # fmt: skip
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in base.items())
    path = folder / f"{name}.toml"
    path.write_text(text + "\n")
    return path


def cpbench_stdout(*arguments: str | Path) -> str:
    """Standard output of a cpbench command that must succeed."""
    command = [sys.executable, "-m", "cpbench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def latest_jobs(out: Path) -> dict[int, str]:
    """Id of the latest job of each world size."""
    return {job.ranks: job.job for job in submission.submitted_jobs(out) if job.ranks}


def test_requeued_cancelled_and_stopped_jobs_and_a_lost_node(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    sizes = (1, 2, 3, 4)
    file = write_sweep(
        tmp_path / "s.toml", {size: [GOOD[0], faulty_operator("gate"), GOOD[1]] for size in sizes}
    )
    file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", write_profile(tmp_path)
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, stderr = cpbench(*arguments, "--where", "world_size=1,2,4")
    assert code == 0, stderr
    limited = write_profile(tmp_path, "limited", time="2", signal_s=75)  # stops after 45 s
    code, stderr = cpbench(*arguments[:-1], limited, "--where", "world_size=3")
    assert code == 0, stderr
    jobs = latest_jobs(out)
    assert set(jobs) == set(sizes)
    wait_until(lambda: all(waits_at_gate(out, size) for size in (1, 2, 4)))
    before = {key: record.started for key, record in read_run(out).records.items()}
    assert len(before) >= 3

    # Nothing is submitted twice while jobs live.
    # The job with the time limit may have ended already.
    code, stderr = cpbench(*arguments, "--where", "world_size=1,2,4")
    assert re.search(r"\b[1-9]\d* are already in jobs", stderr)
    assert latest_jobs(out) == jobs

    slurm.run("scontrol", "requeue", jobs[1])
    slurm.run("scancel", jobs[2])
    tracker = submission.JobTracker(out)
    wait_until(lambda: not any(tracker.query()[jobs[size]].alive for size in (2, 3)))
    states = tracker.query()
    assert states[jobs[2]].state == "CANCELLED"
    assert states[jobs[3]].code == 75, states[jobs[3]]
    assert states[jobs[3]].interrupted
    (node,) = slurm.run("squeue", "-h", "-j", jobs[4], "-o", "%B").split()
    slurm.kill_node(node)
    slurm.run("scontrol", "update", f"jobid={jobs[1]}", "StartTime=now")

    (out / "open").touch()
    process = start_cpbench(*arguments, "--wait", "--resubmit", "2")
    try:
        wait_until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", jobs[4]))
        slurm.run("scontrol", "update", f"jobid={jobs[4]}", "StartTime=now")
        _, stderr = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert record_counts(out) == dict.fromkeys(record_counts(out), 1), "a case was measured twice"
    records = read_run(out).records
    assert len(records) == 3 * len(sizes)
    assert {record.status for record in records.values()} == {"ok"}
    assert all(records[key].started == started for key, started in before.items())
    wait_until(lambda: not leftover_processes(out))
    status = json.loads(cpbench_stdout("status", out, "--json"))
    assert (status["cases"], status["recorded"], status["alive"]) == (12, 12, False)
    assert (out / "report.md").is_file()


def test_every_launcher_of_slurm_runs_the_same_cases(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    """The sweep of test_nodes.py, of all launchers at once."""
    file, started = tmp_path / "s.toml", {}
    file.write_text(SWEEP)
    for ranks in ("srun", "torchrun", "mpiexec", *(["mpi"] if MPICH.exists() else [])):
        more = {"srun": ["--mpi=pmi2"]} if ranks == "mpi" else {}
        site = write_profile(tmp_path, f"of-{ranks}", ranks=ranks, packing="one", **more)
        if ranks == "mpi":
            library = MPICH.parent.parent / "lib" / "libmpi.so.12"
            environment = f"[environment]\nMPI4PY_LIBMPI = {str(library)!r}\n"
            site.write_text(site.read_text() + environment)
        out = tmp_path / ranks
        words = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait")
        started[out] = start_cpbench(*words)
    for out, process in started.items():
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, f"{out.name}: {stderr}"
        records = read_run(out).records
        assert sorted(records) == CASE_IDS
        for record in records.values():
            assert record.status == "ok"
            assert set(record.errors) == {"small"}
            assert record.ranks_per_node == 2
            assert record.bytes_sent == record.predicted_bytes
        assert len(submission.submitted_jobs(out)) == 2  # one allocation for all, and the report


def test_links_between_nodes_of_an_allocation(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    measure = (
        sys.executable, "-m", "cpbench", "links", "--launcher", "srun", "--nodes", "2",
        "--world-size", "4", "--sizes", "8,1k", "--seconds", "0.02", "--device", "cpu", "--json",
        "--out", str(tmp_path),
    )  # fmt: skip
    reply = slurm.run("salloc", "--quiet", "--nodes", "2", "--ntasks-per-node", "2", *measure)
    table = json.loads(reply)
    assert (table["complete"], table["ranks"], table["ranks_per_node"]) == (True, 4, 2)
    assert {row["link"] for row in table["rows"]} == {"node", "across", "all"}


FAULTS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "hang": ("timeout", "no result after 20 s: rank 0 "),
    "segfault": ("crash", "rank 1 was killed by SIGSEGV"),
    "cut": ("crash", "rank "),
}


def test_a_rank_that_fails_is_one_record_and_leaves_nothing_behind(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    names = [faulty_operator(how, 1) for how in FAULTS]
    file = write_sweep(tmp_path / "s.toml", {2: [*names, "reference"]})
    out, site = tmp_path / "run", write_profile(tmp_path)
    code, stderr = cpbench(
        "run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait"
    )
    assert code == 1, stderr
    for record in read_run(out).records.values():
        how = str(record.case.operator.kwargs.get("how", ""))
        status, reason = FAULTS.get(how, ("ok", ""))
        assert (record.status, (record.reason or "")[: len(reason)]) == (status, reason)
    assert leftover_processes(out) == []
    hung = next(path for path in out.glob("jobs/*/rank0.log") if "in _hang" in path.read_text())
    assert hung, "the stacks of a hung rank were asked for through srun"


def test_values_are_quoted_and_run_nothing(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    evil = "a b;$(touch pwned)`touch pwned`'\"#%j"
    folder = tmp_path / evil
    folder.mkdir()
    file = write_sweep(folder / f"{evil}.toml", {1: ["reference", "bands", "sdpa.math"]})
    site = write_profile(
        tmp_path, sbatch=[f"--comment={evil}"], packing="array", chunk=1, throttle=1,
    )  # fmt: skip
    site.write_text(site.read_text() + f"[environment]\nCPBENCH_ODD = {json.dumps(evil)}\n")
    out = folder / "run"
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, stderr = cpbench(*arguments, "--wait")
    assert code == 0, stderr
    assert "arrays are split at 2 tasks, the MaxArraySize of this site" in stderr
    assert [record.status for record in read_run(out).records.values()] == ["ok"] * 3
    assert not [*Path().glob("pwned"), *tmp_path.rglob("pwned")]
    log = next(path for path in out.glob("slurm/*.log") if "report" not in path.name)
    assert log.is_file()  # where it was meant to be, per cent sign and all


@pytest.mark.parametrize("bad", ["n1", "n2"])
def test_a_bad_node_is_excluded_and_reported(
    slurm: slurm_cluster.Cluster, tmp_path: Path, bad: str
) -> None:
    """With a spare node the job continues, unless the bad node is the supervisor's, the first."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {bad} ] && {{ echo "no such luck" >&2; exit 3; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    file = write_sweep(tmp_path / "s.toml", {4: ["reference"]})
    out, keys = tmp_path / "run", {"preflight": True, "python": [str(python)]}
    site = write_profile(tmp_path, nodelist="n[1-3]", spare_nodes=1, **keys)
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--wait", "--profile")
    code, stderr = cpbench(*arguments, site)
    assert list(submission.bad_nodes(out)) == [bad]
    assert "no such luck" in submission.bad_nodes(out)[bad]
    if bad == "n1":
        assert code == 1
        assert "too few good nodes" in stderr
        code, stderr = cpbench(*arguments, write_profile(tmp_path, "again", **keys))
        last = [job for job in submission.submitted_jobs(out) if job.ranks][-1]
        assert f"--exclude={bad}" in next(out.glob(f"slurm/{last.name}.sbatch")).read_text()
    assert code == 0, stderr
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    assert f"node {bad} is excluded" in cpbench_stdout("status", out)


def test_ranks_that_cannot_start_are_reported_with_their_last_words(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path / "s.toml", {2: ["reference"]})
    site = write_profile(tmp_path, srun=["--no-such-option"])
    out = tmp_path / "run"
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait")
    code, stderr = cpbench(*arguments)
    assert code == 1
    why = "workers fail outside of any case"
    job = latest_jobs(out)[2]
    lines = [line for line in stderr.splitlines() if line.startswith(f"job {job} (2 ranks): ")]
    assert f"failed with exit code 70: {why}" in lines[-1]
    assert "srun" in lines[-1]  # it says what it does not know
    assert f"job {job}: {why}" in cpbench_stdout("status", out)


def test_jobs_that_will_not_start_are_reported(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path / "s.toml", {1: ["reference"]})
    out, site = tmp_path / "run", write_profile(tmp_path, sbatch=["--hold"])
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, stderr = cpbench(*arguments, "--wait")
    assert code == 1
    assert "will not start: JobHeldUser" in stderr
    assert "1 of 1 cases have no result" in stderr
    code, stderr = cpbench("cancel", out)
    assert code == 0
    assert not slurm.run("squeue", "-h", "-t", "pending")


def test_a_preempted_job_continues_later(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.toml", {2: ["reference", faulty_operator("gate")]})
    file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", write_profile(tmp_path)
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    code, stderr = cpbench(*arguments)
    assert code == 0, stderr
    job = latest_jobs(out)[2]
    wait_until(lambda: waits_at_gate(out, 2))
    scratch = Path(f"/tmp/cpbench-{job}")
    urgent = ("sbatch", "--parsable", "-p", "urgent", f"-N{len(slurm.names)}", "--exclusive")
    other = slurm.run(*urgent, "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: slurm.state(other) == "COMPLETED")
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", job)
    code, stderr = cpbench(*arguments)  # the gate is shut: the job cannot have ended
    assert code == 0, stderr
    assert "1 are already in jobs" in stderr
    (out / "open").touch()
    slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now")
    code, stderr = cpbench(*arguments, "--wait")
    assert code == 0, stderr
    assert list(record_counts(out).values()) == [1, 1]
    assert not scratch.exists()


def test_two_shells_at_once_submit_every_case_once(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    """Held jobs count as live, and a local run refuses the cases of live jobs."""
    file = write_sweep(tmp_path / "s.toml", {1: ["reference"]})
    out, site = tmp_path / "run", write_profile(tmp_path, sbatch=["--hold"])
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    both = [start_cpbench(*arguments), start_cpbench(*arguments)]
    assert [process.wait(LIMIT_S) for process in both] == [0, 0]
    assert len([job for job in submission.submitted_jobs(out) if job.ranks]) == 1
    code, stderr = cpbench("run", file, "--out", out)
    assert code == 2
    assert "1 of these cases are in jobs; wait for them, or run: cpbench cancel" in stderr


def test_what_slurm_refuses_is_one_line(slurm: slurm_cluster.Cluster, tmp_path: Path) -> None:
    file = write_sweep(tmp_path / "s.toml", {1: ["reference"]})
    site = write_profile(tmp_path, partition="no_such_partition")
    code, stderr = cpbench(
        "run", file, "--out", tmp_path / "run", "--launcher", "slurm", "--profile", site
    )
    assert code == 2
    (line,) = stderr.splitlines()
    assert line.startswith("cpbench: sbatch: ")
    assert "invalid partition" in line


def test_jobs_that_have_left_the_queue(slurm: slurm_cluster.Cluster) -> None:
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 3")
    wait_until(lambda: slurm.state(job) == "FAILED")
    assert client.query_states([job])[job].code == 3
    wait_until(lambda: job in client._from_accounting(("sacct", "--completion"), [job]))
    assert client._from_accounting(("sacct", "--completion"), [job])[job].state == "FAILED"
    assert client.query_states(["99999"]) == {"99999": JobState("99999", FORGOTTEN)}


def test_cancel_ends_the_jobs_and_keeps_the_records(
    slurm: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    file = write_sweep(tmp_path / "s.toml", {2: ["reference", faulty_operator("gate")]})
    file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 300.0"))
    out, site = tmp_path / "run", write_profile(tmp_path)
    code, stderr = cpbench("run", file, "--out", out, "--launcher", "slurm", "--profile", site)
    assert code == 0, stderr
    wait_until(lambda: waits_at_gate(out, 2))
    code, stderr = cpbench("cancel", out)
    assert code == 0, stderr
    wait_until(lambda: not slurm.run("squeue", "-h"))
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    wait_until(lambda: not leftover_processes(out))


def test_a_full_disk_ends_the_job_and_keeps_the_records(
    slurm: slurm_cluster.Cluster,
    tmp_path: Path,
    small_disk: Path,  # noqa: F811
) -> None:
    names = ["reference", faulty_operator("fill", 0)]
    file = write_sweep(tmp_path / "s.toml", {2: names})
    text = file.read_text().replace("_iterations = 1\n", "_iterations = 80\n")
    file.write_text(text.replace("timeout_s = 20.0", "timeout_s = 100.0"))
    out, site = small_disk, write_profile(tmp_path)
    arguments = ("run", file, "--out", out, "--launcher", "slurm", "--profile", site, "--wait")
    _, stderr = cpbench(*arguments)
    assert "results could not be written" in stderr, stderr
    assert [record.status for record in read_run(out).records.values()] == ["ok"]
    assert leftover_processes(out) == []
    (out / "ballast").unlink()
    code, stderr = cpbench(*arguments, env={"CPBENCH_TEST_CALM": "1"})
    assert code == 0, stderr
    assert list(record_counts(out).values()) == [1, 1]
