"""Jobs, batch scripts and site profiles: pure functions, without Slurm."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.cli import main
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.slurm import batch_script, site_profile, submission
from cpbench.slurm.job_states import JobState
from cpbench.slurm.job_step import AllocatedNodes, python_command, srun_options
from cpbench.slurm.site_profile import Profile, from_table, parse_bytes, parse_time_limit


def plan_jobs(cases: list[Case], **keys: Any) -> list[submission.PlannedJob]:
    site = from_table({"ranks_per_node": 2, **keys})
    return submission.plan_jobs("a b/c", cases, MeasureSettings(), site, Path("/out"), "T")


CASES = [
    Case.from_json({**Case().to_json(), "seq_len": 64 * n, "world_size": p, "strategy": s})
    for p, s in ((1, "single"), (2, "ring"), (4, "ring"))
    for n in (1, 2, 3)
]  # fmt: skip


def test_packing() -> None:
    by_size = plan_jobs(CASES)
    assert [(job.batch.ranks, job.batch.nodes, len(job.cases)) for job in by_size] == [
        (1, 1, 3), (2, 1, 3), (4, 2, 3)
    ]  # fmt: skip
    assert all(job.batch.name.startswith("a_b_c-p") for job in by_size)
    (one_job,) = plan_jobs(CASES, packing="one")
    assert (one_job.batch.ranks, one_job.batch.nodes, len(one_job.cases)) == (4, 2, 9)
    arrays = plan_jobs(CASES, packing="array", chunk=2)
    assert [(job.batch.tasks, [len(chunk) for chunk in job.chunks]) for job in arrays] == [
        (2, [2, 1])
    ] * 3
    chained = plan_jobs(CASES, chain=True)
    assert [job.batch.after for job in chained] == [False, True, True]


@pytest.mark.parametrize("ranks", ["srun", "torchrun", "mpi", "mpiexec"])
def test_node_count(ranks: str) -> None:
    site = from_table({"gpus_per_node": 8, "ranks": ranks})
    assert [site.node_count(n) for n in (1, 8, 16, 96)] == [1, 1, 2, 12]
    assert site.node_count(12) == 2
    assert site.node_count(9) == (2 if ranks == "srun" else 3)


def test_a_complete_script() -> None:
    table = {
        "partition": "gpu", "account": "lab", "qos": "long", "gpus_per_node": 8, "time": "4:00:00",
        "signal_s": 300, "exclusive": True, "exclude": ["bad1"], "modules": ["cuda/12.8"],
        "setup": ["ulimit -l unlimited"], "environment": {"NCCL_DEBUG": "WARN"},
        "constraint": "h100&ib", "memory": "0", "sbatch": ["--switches=1"],
    }  # fmt: skip
    site = from_table(table)
    batch = batch_script.BatchJob(name="x", nodes=2, ranks=16, command=("python", "-m", "m", "a b"))
    text = batch_script.render_script(batch, site, Path("/out/r 50%"), ["bad2"])
    for line in (
        "#SBATCH --job-name=x", "#SBATCH --output='/out/r 50%%/slurm/x-%j.log'",
        "#SBATCH --partition=gpu", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gres=gpu:8", "#SBATCH --constraint='h100&ib'", "#SBATCH --exclude=bad1,bad2",
        "#SBATCH --signal=B:USR1@300", "#SBATCH --exclusive", "#SBATCH --switches=1",
        "#SBATCH --requeue", "#SBATCH --mem=0", "module load cuda/12.8",
        "ulimit -l unlimited", "export NCCL_DEBUG=WARN", "exec python -m m 'a b'",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    for memory, option in (("1GiB", "1024M"), ("0.5G", "512M")):
        script = batch_script.render_script(
            batch, from_table({**table, "memory": memory}), Path("/out")
        )
        assert f"#SBATCH --mem={option}" in script.splitlines()
    last = batch_script.render_script(
        submission.report_job("x", Path("/out"), "T"), site, Path("/out"), after="1:2"
    )
    assert "#SBATCH --dependency=afterany:1:2" in last
    assert "gres" not in last


def directives(text: str) -> dict[str, str]:
    """The options in a script, parsed by sbatch's rules of quoting (as a shell's)."""
    import shlex

    lines = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    options = [shlex.split(line) for line in lines]
    assert all(len(words) == 1 for words in options)
    return dict(words[0].partition("=")[::2] for words in options)


printable = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(value=printable, name=printable)
def test_values_are_quoted(value: str, name: str) -> None:
    site = from_table(
        {
            "ranks_per_node": 1, "partition": value, "constraint": value, "scratch": f"/{value}",
            "modules": [value], "environment": {"ODD": value}, "sbatch": [f"--comment={value}"],
        }
    )  # fmt: skip
    batch = batch_script.BatchJob(name="job", nodes=1, ranks=1, command=("echo", value, name))
    text = batch_script.render_script(batch, site, Path("/runs") / name.replace("/", "_"))
    options = directives(text)
    assert options["--comment"] == options["--partition"] == value
    # Run in a real shell with the command replaced by printf: every value arrives unchanged.
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    shell = 'module() { printf "%s\\0" "$2"; }\n' + body.replace(
        "exec ", 'printf "%s\\0" "$ODD" ', 1
    )
    result = subprocess.run(
        ["bash"], input=shell.encode(), capture_output=True, env={"SLURM_JOB_ID": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().split("\0")[:-1] == [value, value, "echo", value, name]


def test_containers_and_binding() -> None:
    table = {"gpus_per_node": 4, "cpus_per_rank": 12, "cpu_bind": "cores", "gpu_bind": "none"}
    pyxis = {"kind": "pyxis", "image": "nvcr.io#x:1", "mounts": ["/a:/a", "/b:/b"]}
    site = from_table({**table, "container": pyxis})
    assert srun_options(site, 4, ["n3"], agents=False) == (
        "--cpus-per-task=12", "--gres=gpu:4", "--exclude=n3", "--cpu-bind=cores",
        "--gpu-bind=none", "--container-image=nvcr.io#x:1", "--container-mounts=/a:/a,/b:/b",
    )  # fmt: skip
    agents = srun_options(site, 4, [], agents=True)
    assert agents[:3] == ("--cpus-per-task=48", "--gres=gpu:4", "--cpu-bind=cores")
    assert not any(option.startswith("--gpu-bind") for option in agents)  # they need all GPUs
    assert python_command(site) == ("python3",)
    apptainer = from_table({**table, "container": {**pyxis, "kind": "apptainer"}})
    assert python_command(apptainer) == (
        "apptainer", "exec", "--nv", "--bind", "/a:/a", "--bind", "/b:/b", "nvcr.io#x:1", "python3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "cores"),
    [
        ({"gpus_per_node": 8}, 4),
        ({"gpus_per_node": 8, "cpus_per_rank": 12}, 12),
        ({"gpus_per_node": 8, "device": "cpu"}, 1),
        ({"ranks_per_node": 8}, 1),
        ({"ranks_per_node": 8, "cpus_per_rank": 2}, 2),
    ],
)
def test_cores_of_a_rank_leave_room_for_nccl(table: dict[str, Any], cores: int) -> None:
    site = from_table(table)
    assert srun_options(site, 8, [], agents=False)[0] == f"--cpus-per-task={cores}"
    assert srun_options(site, 8, [], agents=True)[0] == f"--cpus-per-task={8 * cores}"
    batch = batch_script.BatchJob(name="job", nodes=1, ranks=8, command=("true",))
    options = directives(batch_script.render_script(batch, site, Path("/runs")))
    assert options["--cpus-per-task"] == str(cores)


def test_a_gang_runs_on_good_nodes_only() -> None:
    nodes = AllocatedNodes(
        from_table({"ranks_per_node": 2, "interface": "lo"}), ["a", "b", "c"], ["b"]
    )
    assert nodes.good == ["a", "c"]
    place = nodes.place(4)
    assert (place.nodes, "--exclude=b" in place.options) == (2, True)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"partiton": "x"}, "no key partiton; did you mean partition?"),
        ({"gpus_per_node": "8"}, "gpus_per_node = '8' is not an integer"),
        ({"time": "soon"}, "time = 'soon' is not a time limit"),
        ({"time": "1", "signal_s": 60}, "signal_s = 60 must be less than time"),
        ({"ranks": "pmix"}, "ranks = 'pmix' is none of srun, torchrun, mpi, mpiexec"),
        ({"packing": "jobs"}, "packing = 'jobs' is none of size, array, one"),
        ({"environment": {"A B": "x"}}, "environment: 'A B' is not the name of a variable"),
        ({"account": "a\nb"}, "contains a line break or control character"),
        ({"container": {"image": "x"}}, "container: kind and image go together"),
        ({"container": {"imag": "x"}}, "no key container.imag; did you mean container.image?"),
        ({"device": "cuda"}, "needs gpus_per_node"),
        ({"gpus_per_node": -1}, "gpus_per_node = -1 must be 0 or more"),
        ({"gpu_memory": "much"}, "gpu_memory = 'much' is not a memory size"),
        ({"modules": [3]}, "modules: 3 is not a string"),
        ({"chunk": 0}, "chunk = 0 must be 1 or more"),
        ({"scratch": "here"}, "scratch = 'here' must be an absolute path"),
        ({"container": {"kind": "pyxis", "image": "x", "mounts": "a:b"}}, "are lists of strings"),
    ],
)
def test_bad_profiles_are_one_line(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    path = tmp_path / "site.toml"
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"site\.toml") as caught:
        site_profile.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-0", 172800), ("1-12:30", 131400),
        ("1-01:00:01", 90001),
    ],
)  # fmt: skip
def test_time_limits(text: str, expected: int) -> None:
    assert parse_time_limit(text) == expected


def test_sizes() -> None:
    assert (
        parse_bytes("80GiB", "x") == parse_bytes("80G", "x") == parse_bytes("80 g", "x") == 80 << 30
    )
    assert parse_bytes("1.5T", "x") == 3 << 39
    assert parse_bytes("512", "x") == 512


def test_job_states() -> None:
    pending = JobState("1", "PENDING", "Priority")
    assert (pending.alive, pending.stuck) == (True, False)
    assert pending.description == "pending: Priority"
    stuck = JobState("1", "PENDING", "DependencyNeverSatisfied")
    assert (stuck.stuck, stuck.description) == (True, "will not start: DependencyNeverSatisfied")
    for state in ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "DEADLINE", "FORGOTTEN"):
        assert JobState("1", state).interrupted, state
        assert not JobState("1", state).alive
    for state in ("COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY"):
        assert not JobState("1", state).interrupted, state
    assert JobState("1", "FAILED", code=75).interrupted
    assert JobState("1", "FAILED", code=3).description == "failed with exit code 3"
    assert JobState("1", "FAILED", code=74).description == "results could not be written"


def test_a_dry_run_needs_no_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    site = tmp_path / "site.toml"
    site.write_text('gpus_per_node = 8\ngpu_memory = "80GiB"\n')
    arguments = ["run", "quick", "--out", str(tmp_path / "run"), "--launcher", "slurm"]
    arguments += ["--profile", str(site)]
    assert main.invoke([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.count("#!/bin/bash") == 4
    assert "#SBATCH --gres=gpu:4" in output
    assert "gpu_hours" in output
    assert main.invoke([*arguments, "--dry-run", "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    assert [job["ranks"] for job in jobs] == [1, 2, 4]
    assert all(job["gpu_hours"] > 0 for job in jobs)
    assert main.invoke(arguments) == 2
    assert "sbatch not found: run this on a host with Slurm's commands" in capsys.readouterr().err
    assert not (tmp_path / "run" / "slurm" / "submissions.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "x.toml"], "--profile is for --launcher slurm"),
        (["--launcher", "slurm"], "--launcher slurm needs --profile SITE.toml"),
        (["--wait"], "--wait is for --launcher slurm"),
        (["--nodes", "2"], "--launcher local is for one machine"),
        (["--hosts", "a,b"], "--hosts is for --launcher mpi"),
        (["--launcher", "torchrun", "--nodes", "3"], "ranks do not divide evenly over 3 nodes"),
        (["--transport", "mpi"], "transport mpi needs ranks started by MPI"),
        (["--interleave", "-1"], "Input should be greater than or equal to 0"),
    ],
)
def test_options_that_exclude_each_other(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.invoke(["run", "quick", "--out", str(tmp_path / "run"), *options]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_profile_round_trip() -> None:
    from cpbench.slurm.job_step import profile_table

    table = {"gpus_per_node": 8, "modules": ["a"], "container": {"kind": "pyxis", "image": "x"}}
    site = from_table(table)
    assert from_table(profile_table(site)) == site
    assert Profile() == from_table({})


def test_ids_of_array_tasks() -> None:
    from cpbench.slurm.client import is_task_of

    pairs = itertools.product(("12", "12_3", "123", "123_12"), ("12",))
    assert [is_task_of(*pair) for pair in pairs] == [True, True, False, False]


def test_arrays_are_split_at_the_limit_of_the_site() -> None:
    site = from_table({"packing": "array", "chunk": 2})
    jobs = submission.plan_jobs("x", CASES, MeasureSettings(), site, Path("/o"), "T", 1)
    whole = plan_jobs(CASES, packing="array", chunk=2)
    assert [case for job in jobs for case in job.cases] == [c for job in whole for c in job.cases]
    assert {job.batch.tasks for job in jobs} == {1}
    names = [job.batch.name for job in jobs]
    assert len(set(names)) == len(names) > len(whole)
    assert names[0].endswith("-1of2")


def test_interleaved_cases_stay_in_one_array_task() -> None:
    cases = [
        Case.from_json({**Case().to_json(), "seq_len": 64 * n, "operator": name})
        for n in (1, 2, 3)
        for name in ("bands", "reference", "flex")
    ]
    site = from_table({"packing": "array", "chunk": 2})
    for interleave, chunk_sizes in ((1, [2, 2, 2, 2, 1]), (3, [3, 3, 3]), (0, [3, 3, 3])):
        measure = MeasureSettings(interleave=interleave)
        jobs = submission.plan_jobs("x", cases, measure, site, Path("/o"), "T")
        assert [len(chunk) for chunk in jobs[0].chunks] == chunk_sizes
    assert all(len({case.seq_len for case in chunk}) == 1 for chunk in jobs[0].chunks)
