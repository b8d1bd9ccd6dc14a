"""Launches of other machines, software or settings are not pooled, and this is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_records import record
from run_cpbench import cpbench

import cpbench as library
from cpbench.core.environment import collect_environment
from cpbench.reports.collection import collect
from cpbench.results.store import RecordWriter, Run, read_run
from cpbench.results.worlds import describe, differences, world_of

BASE: dict[str, Any] = {
    "host": "n1", "processor": "p", "cores": 8, "affinity": "0-7", "python": "3.11", "commit": "c1",
    "packages": {"torch": "2.10.0"}, "variables": {"SLURM_JOB_ID": "1", "OMP_NUM_THREADS": "1"},
    "device": {"type": "cpu", "threads": 1, "nccl": "2.27.3", "nccl_streams": "high"},
    "ranks": [{"host": "n1", "local_rank": 0}],
}  # fmt: skip


def write_launches(
    out: Path, environments: list[dict[str, Any]], operators: tuple[str, ...] = ("a",)
) -> Run:
    """A launch in each environment, in order, of a case of each operator."""
    for i, environment in enumerate(environments):
        with RecordWriter(out / "records" / f"w{i}.jsonl") as writer:
            writer.append({"kind": "environment", "id": f"e{i}", **environment})
            for operator in operators:
                launch = record(operator, 10.0 + i, environment=f"e{i}", writer=f"w{i}")
                writer.append(launch.to_json())
    return read_run(out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"host": "n2", "ranks": []}, "host n1 instead of n2"),
        ({"processor": "q"}, "processor p instead of q"),
        ({"cores": 4, "affinity": "0-3"}, "cores 8 instead of 4, affinity 0-7 instead of 0-3"),
        ({"affinity": "8-15"}, "affinity 0-7 instead of 8-15"),
        ({"packages": {"torch": "2.9.0"}}, "torch 2.10.0 instead of 2.9.0"),
        ({"packages": {"torch": "2.10.0", "triton": "3"}}, "triton none instead of 3"),
        ({"commit": "c2"}, "cpbench c1 instead of c2"),
        ({"python": "3.12"}, "python 3.11 instead of 3.12"),
        ({"device": {"type": "cpu", "threads": 2}}, "threads per rank 1 instead of 2"),
        ({"device": {**BASE["device"], "nccl": "2.27.5"}}, "NCCL 2.27.3 instead of 2.27.5"),
        (
            {"device": {**BASE["device"], "nccl_streams": "normal"}},
            "priority of NCCL's streams high instead of normal",
        ),
        *(
            ({"variables": {**BASE["variables"], name: "x"}}, f"{name} none instead of x")
            for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD")
        ),
    ],
)
def test_launches_of_another_world_are_left_out_and_named(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    run = write_launches(tmp_path, [BASE, BASE, {**BASE, **change}], ("a", "b"))
    for launches in run.launches.values():
        assert [launch.writer for launch in launches] == ["w2"]
    for launches in run.other_launches.values():
        assert [launch.writer for launch in launches] == ["w0", "w1"]
    assert run.warnings == [
        f"4 of 6 launches of 2 cases had {text}: left out, only launches like the newest are pooled"
    ]
    results = collect([tmp_path])
    assert results.table["launches"].tolist() == [1, 1]
    assert results.table["time_ms"].tolist() == [12.0, 12.0]
    assert results.warnings == run.warnings
    with pytest.warns(UserWarning, match=r"4 of 6 launches of 2 cases had"):
        library.load(tmp_path)


def test_what_concerns_the_job_is_no_difference(tmp_path: Path) -> None:
    others = {"SLURM_JOB_ID": "2", "CUDA_VISIBLE_DEVICES": "3", "TRITON_CACHE_DIR": "/tmp/2"}
    transient = {"peaks": {"float32": 1.0}, "nodes": [{"load": 2.0}]}
    run = write_launches(
        tmp_path, [BASE, {**BASE, **transient, "variables": {**BASE["variables"], **others}}]
    )
    assert [len(launches) for launches in run.launches.values()] == [2]
    assert (run.other_launches, run.warnings) == ({}, [])


def test_launches_whose_environment_is_lost_are_apart(tmp_path: Path) -> None:
    write_launches(tmp_path, [BASE, BASE])
    path = tmp_path / "records" / "w0.jsonl"
    path.write_bytes(b"damaged\n" + path.read_bytes().partition(b"\n")[2])
    run = read_run(tmp_path)
    assert [len(launches) for launches in run.launches.values()] == [1]
    assert run.warnings[1].startswith(
        "1 of 2 launches of 1 case had environment unknown (e0) instead of none: left out"
    )


def test_cases_of_several_worlds_are_said(tmp_path: Path) -> None:
    """Reports compare them."""
    for i, (operators, torch) in enumerate(((("a", "b"), "2.9.0"), (("c",), "2.10.0"))):
        with RecordWriter(tmp_path / "records" / f"{i}.jsonl") as writer:
            environment = {**BASE, "packages": {"torch": torch}}
            writer.append({"kind": "environment", "id": f"e{i}", **environment})
            for operator in operators:
                launch = record(operator, 1.0, environment=f"e{i}", writer=str(i))
                writer.append(launch.to_json())
    assert read_run(tmp_path).warnings == [
        "2 of 3 cases had torch 2.9.0 instead of 2.10.0: they are compared all the same"
    ]


def test_many_differences_are_cut_and_unknown_facts_are_none() -> None:
    packages = {f"p{i}": "1" for i in range(9)}
    found = differences(world_of({**BASE, "packages": packages}, {}), world_of(BASE, {}))
    assert describe(found).endswith("p2 1 instead of none, 6 more differences")
    without = {key: value for key, value in BASE.items() if key != "affinity"}  # an old version
    assert differences(world_of(without, {}), world_of(BASE, {})) == ()


SWEEP = """
[sweep]
operator = "reference"
seq_len = 64
num_heads_q = 1
head_dim = 16
direction = "fwd"

[measure]
min_iterations = 2
max_iterations = 2
warmup = 0
check_sampled = false
memory = false
"""


def test_launches_are_counted_in_the_present_world(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)

    def counts() -> tuple[int, ...]:
        run = read_run(out)
        return tuple(sum(map(len, kind.values())) for kind in (run.launches, run.other_launches))

    code, stderr = cpbench("run", file, "--out", out, "--launches", "2")
    assert (code, counts()) == (0, (2, 0)), stderr
    code, stderr = cpbench("run", file, "--out", out, "--launches", "2")
    assert (code, counts()) == (0, (2, 0)), stderr  # the parent sees the world of the ranks

    capped = {"ATEN_CPU_CAPABILITY": "default"}
    code, stderr = cpbench("run", file, "--out", out, env=capped)
    assert (code, counts()) == (0, (2, 0)), stderr  # one launch may be of any world
    code, stderr = cpbench("run", file, "--out", out, "--launches", "2", env=capped)
    assert (code, counts()) == (0, (2, 2)), stderr
    assert (
        f"cpbench: {out}: what runs now has ATEN_CPU_CAPABILITY default instead of none: launches "
        "of both are not pooled"
    ) in stderr.splitlines()

    code, stderr = cpbench("run", file, "--out", out, "--launches", "3")
    assert (code, counts()) == (0, (3, 2)), stderr  # two of them were there
    assert "2 of 4 launches of 1 case had " in stderr
    (newest,) = read_run(out).records.values()
    assert newest.threads_after == [1]


def test_variables_are_recorded_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = (
        "ATEN_CPU_CAPABILITY", "DNNL_VERBOSE", "ONEDNN_MAX_CPU_ISA", "TORCH_LOGS", "LD_PRELOAD",
        "PYTORCH_TUNABLEOP_ENABLED", "GOMP_CPU_AFFINITY", "MALLOC_ARENA_MAX",
        "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "UCX_IB_PKEY",
    )  # fmt: skip
    secret = (
        "NVIDIA_API_KEY", "CUDA_APIKEY", "TORCH_HUB_TOKEN", "nvidia_password", "TORCH_SECRET_X",
        "NVIDIA_AUTH", "MALLOC_CREDENTIALS", "AWS_REGION",
    )  # fmt: skip
    variables = dict.fromkeys((*recorded, *secret), "1")
    variables["TORCHINDUCTOR_REDIS_URL"] = "redis://me:word@host"
    environment = collect_environment(variables)
    assert sorted(environment["variables"]) == sorted(recorded)
    assert "word" not in str(environment)


def test_launches_that_returned_different_results_do_not_compete(tmp_path: Path) -> None:
    sums = [1.0, -2.0, 0.5, 3.0, 0.0, 0.0, 1.5, 2.0]
    for number, change in enumerate((0.0, 1e-7, 0.5)):
        launch = record("bands", 1.0)
        launch.writer, launch.fingerprint = (
            f"w{number}",
            {"out": [sums[0] + change, *sums[1:], 9.0]},
        )
        with RecordWriter(tmp_path / "records" / f"w{number}.jsonl") as writer:
            writer.append(launch.to_json())
        competes = not read_run(tmp_path).records[launch.case.id].disqualifications
        assert competes == (change < 0.1)
