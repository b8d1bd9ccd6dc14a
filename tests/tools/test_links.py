"""``cpbench links``: its definitions on given times, real runs, and failing ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S
from run_cpbench import leftover_processes, start_cpbench

from cpbench.cli import main as cli
from cpbench.launchers import local
from cpbench.launchers.protocol import Command, GangSpec, Launcher
from cpbench.results.active import registered_as_active
from cpbench.simulator.calibration.links import read_measured
from cpbench.tools import links
from cpbench.tools.links_operations import OPERATIONS, actual_bytes, element_count, format_ranks
from cpbench.tools.links_worker import ACROSS, ALL, COLLECTIVES, NODE, plan_measurements

NAMES = ("p2p", "ring", *COLLECTIVES)
OF_LINK = {NODE: NAMES, ACROSS: NAMES, ALL: ("cross", *COLLECTIVES)}


def row(operation: str, nbytes: int, ranks: int, *times_us: list[float]) -> dict[str, Any]:
    groups = [{"ranks": [i, i + 1], "times_us": times} for i, times in enumerate(times_us)]
    return {
        "link": NODE, "operation": operation, "bytes": nbytes, "ranks": ranks, "groups": groups
    }  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "ranks", "factor"),
    [
        ("p2p", 2, 1.0),
        ("ring", 8, 1.0),
        ("cross", 4, 1.0),
        ("all_to_all", 4, 3 / 4),
        ("all_gather", 2, 1 / 2),
        ("all_gather", 8, 7 / 8),
        ("reduce_scatter", 8, 7 / 8),
        ("all_reduce", 2, 1.0),
        ("all_reduce", 8, 7 / 4),
    ],
)
def test_bandwidth_by_formula(operation: str, ranks: int, factor: float) -> None:
    """3 MB in 1 ms is 3 GB/s."""
    statistics = links.link_statistics(row(operation, 3_000_000, ranks, [900.0, 1000.0, 5000.0]))
    assert statistics["us"] == 1000
    assert statistics["algbw"] == pytest.approx(3.0)
    assert statistics["busbw"] == pytest.approx(3.0 * factor)


def test_figures_of_several_groups() -> None:
    times = [[float(10 + i) for i in range(11)], [100.0] * 11, [20.0] * 11]
    statistics = links.link_statistics(row("p2p", 2000, 2, *times))
    assert (statistics["us"], statistics["slowest_us"], statistics["slowest"]) == (20, 100, [1, 2])
    assert statistics["algbw"] == pytest.approx(0.1)
    assert statistics["slowest_busbw"] == pytest.approx(0.02)
    assert statistics["spread"] == 0  # of the median group, 20 µs throughout
    alone = links.link_statistics(row("p2p", 2000, 2, times[0]))
    assert alone["spread"] == pytest.approx((19 - 11) / 15)


def test_summary_takes_latency_from_the_smallest_and_bandwidth_from_the_best() -> None:
    rows = [
        {**r, **links.link_statistics(r)}
        for r in (
            row("p2p", 8, 2, [5.0], [9.0]),
            row("p2p", 8000, 2, [2.0], [8.0]),
            row("p2p", 80_000, 2, [100.0], [400.0]),
        )
    ]
    (summary,) = links.summarise_links(rows)
    assert (summary["latency_us"], summary["slowest_latency_us"], summary["groups"]) == (7, 9, 2)
    assert (summary["busbw"], summary["at_bytes"]) == (pytest.approx(1.6), 8000)
    assert (summary["slowest_busbw"], summary["slowest"]) == (pytest.approx(1.0), [1, 2])


@pytest.mark.parametrize(
    ("size", "per_node", "links"),
    [(2, 2, {NODE}), (2, 1, {ACROSS}), (8, 4, {NODE, ACROSS, ALL}), (6, 2, {NODE, ACROSS, ALL})],
)
def test_plan(size: int, per_node: int, links: set[str]) -> None:
    plan = plan_measurements(size, per_node)
    assert {link for link, _, _ in plan} == links
    nodes, firsts = range(0, size, per_node), list(range(0, size, per_node))
    for link, operation, rounds in plan:
        for concurrent in rounds:
            ranks = [rank for group in concurrent for rank in group]
            assert len(ranks) == len(set(ranks)), "a rank is in one group at a time"
        groups = sorted(group for concurrent in rounds for group in concurrent)
        if operation == "p2p" and link == NODE:
            assert groups == [(i, i + 1) for i in range(size) if (i + 1) % per_node]
        elif operation == "p2p":
            assert groups == list(itertools.pairwise(firsts))
        elif operation == "cross":
            assert groups == [tuple(range(i, size, per_node)) for i in range(per_node)]
            assert len(rounds) == 1, "all ranks send across at once"
        else:
            whole = {NODE: [tuple(range(i, i + per_node)) for i in nodes], ACROSS: [tuple(firsts)]}
            assert groups == whole.get(link, [tuple(range(size))])
    for link in links:
        assert tuple(operation for name, operation, _ in plan if name == link) == OF_LINK[link]


def test_sizes_are_whole_elements_for_every_rank() -> None:
    assert actual_bytes("p2p", 8, 2) == 8
    assert actual_bytes("p2p", 7, 2) == 4
    assert actual_bytes("ring", 1000, 8) == actual_bytes("cross", 1000, 8) == 1000
    assert actual_bytes("all_gather", 8, 4) == 16
    assert actual_bytes("all_to_all", 1000, 3) == 996
    assert element_count("all_to_all", 1000, 3) == 83


def test_names_of_groups() -> None:
    assert format_ranks([0, 1, 2, 3]) == "0-3"
    assert format_ranks([0, 4]) == "0,4"
    assert format_ranks(range(0, 80, 8)) == "0,8,16,24,…,72"


def measured(
    capsys: pytest.CaptureFixture[str], size: int, launcher: str, per_node: int
) -> dict[str, Any]:
    code = links.run(size, "cpu", launcher, [8, 100_000], per_node, True, seconds=0.05)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    output: dict[str, Any] = json.loads(out)
    assert output["complete"]
    assert (output["ranks"], output["ranks_per_node"]) == (size, per_node or size)
    return output


@pytest.mark.parametrize(
    ("size", "launcher", "per_node"), [(2, "local", 0), (4, "local", 2), (2, "torchrun", 1)]
)
def test_a_run(size: int, launcher: str, per_node: int, capsys: pytest.CaptureFixture[str]) -> None:
    output = measured(capsys, size, launcher, per_node)
    classes = [NODE] if not per_node else [ACROSS] if per_node == 1 else [NODE, ACROSS, ALL]
    pairs = {(row["link"], row["operation"]) for row in output["rows"]}
    assert pairs == {(link, operation) for link in classes for operation in OF_LINK[link]}
    for row in output["rows"]:
        cross = row["operation"] == "cross"
        assert row["ranks"] == (size if row["link"] == ALL and not cross else 2)
        two = cross or (row["link"] == NODE and size == 4)
        assert len(row["groups"]) == (2 if two else 1)
        for group in row["groups"]:
            assert len(group["times_us"]) >= 5
            assert all(0.1 < time_us < 1e7 for time_us in group["times_us"])
        # Below the bandwidth of memory, and above that of a very busy machine.
        assert row["bytes"] <= 16 or 1e-4 < row["slowest_busbw"] <= row["busbw"] < 200
    assert len(output["links"]) == len(pairs)


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rows = [
        {**r, **links.link_statistics(r)}
        for r in (row("p2p", 8, 2, [5.0], [9.0]), row("p2p", 1 << 20, 2, [500.0], [900.0]))
    ]
    hosts = ["a", "a", "b", "b"]
    world: dict[str, Any] = {"ranks": 4, "ranks_per_node": 2, "hosts": hosts}
    world |= {"flags": ["contended"], "device": {"type": "cpu"}}
    links._print_tables(world, rows)
    out = capsys.readouterr().out
    assert out.startswith("4 ranks, 2 per node, on cpu")
    assert "\nflags: contended\n" in out
    first, last = out.strip().split("\n\n")[1:]
    small, slowest = first.splitlines()[2:4]
    assert small.split() == ["node", "p2p", "2", "8", "7", "0", "0.00114", "0.00114"]
    assert slowest.strip() == "slowest: ranks 1-2 (a/b), 9 us"
    assert last.splitlines()[2].split()[:6] == ["node", "p2p", "2", "2", "7", "1.5"]
    assert max(map(len, out.splitlines())) <= 100


def sabotaged(code: str) -> Callable[..., list[Command]]:
    """The commands of a launcher whose rank 1 runs some code before it starts."""

    def commands(spec: GangSpec) -> list[Command]:
        ranks = local.commands(spec)
        start = (
            f"import sys\n{code}\nfrom cpbench.tools.links_worker import main\nmain(sys.argv[1:])"
        )
        argv = (sys.executable, "-c", start, str(spec.job))
        return [ranks[0], dataclasses.replace(ranks[1], argv=argv), *ranks[2:]]

    return commands


DIES = """
import os, signal
from cpbench.tools.links_operations import OPERATIONS
OPERATIONS["all_gather"].run = lambda self, repeat: os.kill(os.getpid(), signal.SIGKILL)
"""
HANGS = """
import time
from cpbench.tools.links_operations import OPERATIONS
OPERATIONS["all_gather"].run = lambda self, repeat: time.sleep(100)
"""
FLIPS = """
from cpbench.parallel.comm_torch import TorchComm
def all_to_all(self, out, x, inner=TorchComm.all_to_all):
    if out.numel() > 1000:  # one bit of the last element
        x.view(-1).view(x.new_empty(0).int().dtype)[-1] ^= 1
    return inner(self, out, x)
TorchComm.all_to_all = all_to_all
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (DIES, "all_gather (node) of 8 bytes: rank 1 was killed by SIGKILL; see "),
        (HANGS, "all_gather (node) of 8 bytes: no progress within 6 s: rank 0 start, rank 1 start"),
        (
            FLIPS,
            "all_to_all (node) of 100000 bytes, ranks 0-1: rank 1 received wrong data: element",
        ),
    ],
)
def test_a_bad_rank_is_one_line(
    code: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the logs of a failure are kept
    monkeypatch.setitem(links.LAUNCHERS, "local", Launcher("local", sabotaged(code)))
    monkeypatch.setattr(links, "HANG_TIMEOUT_S", 6.0)
    assert links.run(2, "cpu", "local", [8, 100_000], 0, True, seconds=0.02) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("cpbench: ")
    assert message in err
    assert list(tmp_path.glob("cpbench-links-*/rank1.log"))
    output = json.loads(out)
    assert not output["complete"]
    assert [r["operation"] for r in output["rows"]][:2] == ["p2p", "p2p"], (
        "rows measured before the failure"
    )


def test_bad_input() -> None:
    assert links.parse_sizes("64k, 8,8") == [8, 65536]
    for text in ("", "8,", "x", "0", "-8", "2048m"):
        with pytest.raises(ValueError, match=r"size|bytes"):
            links.parse_sizes(text)
    with pytest.raises(ValueError, match="give 2 ranks or more"):
        links.run(1, "cpu", "local", [8])
    with pytest.raises(ValueError, match="must divide the 4 ranks"):
        links.run(4, "cpu", "local", [8], ranks_per_node=3)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (
        ["--world-size", "1"],
        ["--world-size", "4", "--ranks-per-node", "3"],
        ["--sizes", "many"],
    ):
        assert cli.invoke(["links", *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
    options = ["--sizes", "8", "--device", "cpu", "--seconds", "0.01", "--json"]
    assert cli.invoke(["links", *options]) == 0
    output = json.loads(capsys.readouterr().out)
    assert {r["operation"] for r in output["rows"]} == set(OPERATIONS) - {"cross"}  # one node


def test_nodes_that_join(tmp_path: Path) -> None:
    """Two agents of torchrun on this machine stand for two nodes."""
    out = tmp_path / "links"
    options = ("--world-size", "4", "--sizes", "8,100k", "--seconds", "0.02", "--device", "cpu")
    join = start_cpbench("join", out, "--interface", "lo", "--patience", "60")
    try:
        first = start_cpbench(
            "links", *options, "--launcher", "torchrun", "--nodes", "2", "--interface", "lo",
            "--out", out, "--json",
        )  # fmt: skip
        stdout, stderr = first.communicate(timeout=LIMIT_S)
        assert first.returncode == 0, stderr
        _, stderr = join.communicate(timeout=LIMIT_S)
        assert join.returncode == 0, stderr
    finally:
        join.kill()
        join.wait()
    (tmp_path / "links.json").write_text(stdout)
    measured = read_measured(tmp_path / "links.json")
    assert (measured.ranks, measured.ranks_per_node) == (4, 2)
    assert {row["link"] for row in measured.rows} == {NODE, ACROSS, ALL}
    assert leftover_processes(out) == []


def test_a_folder_that_is_missing_or_in_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(["links", "--launcher", "torchrun", "--nodes", "2"]) == 2
    assert capsys.readouterr().err == (
        "cpbench: 2 nodes need --out, a folder on a file system they share\n"
    )
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file", "is a file"), ("/proc/nosuch", "cannot write")):
        assert cli.invoke(["links", "--out", str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert reason in err
    with registered_as_active(tmp_path, ["links"]):
        assert cli.invoke(["links", "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("cpbench: process ")
    assert cli.invoke(["links", "--launcher", "srun"]) == 2
    assert "inside an allocation of Slurm" in capsys.readouterr().err
