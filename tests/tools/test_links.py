"""``cpbench links``: its definitions on given times, real runs, and what it says of bad links."""

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

from cpbench.cli import main as cli
from cpbench.launchers import local
from cpbench.launchers.protocol import Command, Launcher
from cpbench.tools import links as linkcheck
from cpbench.tools.links_operations import WORKS, actual_bytes, elements, named
from cpbench.tools.links_worker import ACROSS, ALL, COLLECTIVES, NODE, plan

OPERATIONS = ("p2p", *COLLECTIVES)


def row(operation: str, nbytes: int, ranks: int, *times_us: list[float]) -> dict[str, Any]:
    groups = [{"ranks": [i, i + 1], "times_us": times} for i, times in enumerate(times_us)]
    return {
        "link": NODE, "operation": operation, "bytes": nbytes, "ranks": ranks, "groups": groups
    }  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "ranks", "factor"),
    [
        ("p2p", 2, 1.0),
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
    found = linkcheck.figures(row(operation, 3_000_000, ranks, [900.0, 1000.0, 5000.0]))
    assert found["us"] == 1000
    assert found["algbw"] == pytest.approx(3.0)
    assert found["busbw"] == pytest.approx(3.0 * factor)


def test_figures_of_several_groups() -> None:
    times = [[float(10 + i) for i in range(11)], [100.0] * 11, [20.0] * 11]
    found = linkcheck.figures(row("p2p", 2000, 2, *times))
    assert (found["us"], found["slowest_us"], found["slowest"]) == (20, 100, [1, 2])
    assert found["algbw"] == pytest.approx(0.1)
    assert found["slowest_busbw"] == pytest.approx(0.02)
    assert found["spread"] == 0  # of the group in the middle, 20 µs throughout
    alone = linkcheck.figures(row("p2p", 2000, 2, times[0]))
    assert alone["spread"] == pytest.approx((19 - 11) / 15)


def test_summary_takes_latency_from_the_smallest_and_bandwidth_from_the_best() -> None:
    rows = [
        {**one, **linkcheck.figures(one)}
        for one in (
            row("p2p", 8, 2, [5.0], [9.0]),
            row("p2p", 8000, 2, [2.0], [8.0]),
            row("p2p", 80_000, 2, [100.0], [400.0]),
        )
    ]
    (found,) = linkcheck.summary(rows)
    assert (found["latency_us"], found["slowest_latency_us"], found["groups"]) == (7, 9, 2)
    assert (found["busbw"], found["at_bytes"]) == (pytest.approx(1.6), 8000)
    assert (found["slowest_busbw"], found["slowest"]) == (pytest.approx(1.0), [1, 2])


@pytest.mark.parametrize(
    ("size", "per_node", "links"),
    [(2, 2, {NODE}), (2, 1, {ACROSS}), (8, 4, {NODE, ACROSS, ALL}), (6, 2, {NODE, ACROSS, ALL})],
)
def test_plan(size: int, per_node: int, links: set[str]) -> None:
    found = plan(size, per_node)
    assert {link for link, _, _ in found} == links
    nodes, firsts = range(0, size, per_node), list(range(0, size, per_node))
    for link, operation, rounds in found:
        for at_once in rounds:
            ranks = [rank for group in at_once for rank in group]
            assert len(ranks) == len(set(ranks)), "a rank is in one group at a time"
        groups = sorted(group for at_once in rounds for group in at_once)
        if operation == "p2p" and link == NODE:
            assert groups == [(i, i + 1) for i in range(size) if (i + 1) % per_node]
        elif operation == "p2p":
            assert groups == list(itertools.pairwise(firsts))
        else:
            whole = {NODE: [tuple(range(i, i + per_node)) for i in nodes], ACROSS: [tuple(firsts)]}
            assert groups == whole.get(link, [tuple(range(size))])
    for link in links:
        wanted = COLLECTIVES if link == ALL else OPERATIONS
        assert tuple(operation for where, operation, _ in found if where == link) == wanted


def test_sizes_are_whole_elements_for_every_rank() -> None:
    assert actual_bytes("p2p", 8, 2) == 8
    assert actual_bytes("p2p", 7, 2) == 4
    assert actual_bytes("all_gather", 8, 4) == 16
    assert actual_bytes("all_to_all", 1000, 3) == 996
    assert elements("all_to_all", 1000, 3) == 83


def test_names_of_groups() -> None:
    assert named([0, 1, 2, 3]) == "0-3"
    assert named([0, 4]) == "0,4"
    assert named(range(0, 80, 8)) == "0,8,16,24,…,72"


def measured(
    capsys: pytest.CaptureFixture[str], size: int, launcher: str, per_node: int
) -> dict[str, Any]:
    code = linkcheck.run(size, "cpu", launcher, [8, 100_000], per_node, True, seconds=0.05)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    told: dict[str, Any] = json.loads(out)
    assert told["complete"]
    assert (told["ranks"], told["ranks_per_node"]) == (size, per_node or size)
    return told


@pytest.mark.parametrize(
    ("size", "launcher", "per_node"), [(2, "local", 0), (4, "local", 2), (2, "torchrun", 1)]
)
def test_a_run(size: int, launcher: str, per_node: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = measured(capsys, size, launcher, per_node)
    links = [NODE] if not per_node else [ACROSS] if per_node == 1 else [NODE, ACROSS, ALL]
    met = {(one["link"], one["operation"]) for one in told["rows"]}
    assert met == {
        (link, operation)
        for link in links
        for operation in (COLLECTIVES if link == ALL else OPERATIONS)
    }
    for one in told["rows"]:
        assert one["ranks"] == (size if one["link"] == ALL else 2)
        assert len(one["groups"]) == (2 if one["link"] == NODE and size == 4 else 1)
        for group in one["groups"]:
            assert len(group["times_us"]) >= 5
            assert all(0.1 < time_us < 1e7 for time_us in group["times_us"])
        # From what memory cannot do, down to what a busy machine may be held to.
        assert one["bytes"] <= 16 or 1e-4 < one["slowest_busbw"] <= one["busbw"] < 200
    assert len(told["links"]) == len(met)


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rows = [
        {**one, **linkcheck.figures(one)}
        for one in (row("p2p", 8, 2, [5.0], [9.0]), row("p2p", 1 << 20, 2, [500.0], [900.0]))
    ]
    hosts = ["a", "a", "b", "b"]
    about: dict[str, Any] = {"ranks": 4, "ranks_per_node": 2, "hosts": hosts}
    about |= {"flags": ["contended"], "device": {"type": "cpu"}}
    linkcheck._print_tables(about, rows)
    out = capsys.readouterr().out
    assert out.startswith("4 ranks, 2 a node, on cpu")
    assert "\nflagged: contended\n" in out
    first, last = out.strip().split("\n\n")[1:]
    small = first.splitlines()[2].split()
    assert small == ["node", "p2p", "2", "8", "7", "0", "0.00114", "0.00114", "1-2", "a/b", "9"]
    assert last.splitlines()[2].split()[:6] == ["node", "p2p", "2", "2", "7", "1.5"]
    assert max(map(len, out.splitlines())) <= 100


def sabotaged(code: str) -> Callable[..., list[Command]]:
    """A launcher whose rank 1 runs some code before it starts."""

    def commands(job: Path, size: int, module: str) -> list[Command]:
        made = local.commands(job, size, module=module)
        start = f"import sys\n{code}\nfrom cpbench import links\nlinks.main(sys.argv[1:])"
        argv = (sys.executable, "-c", start, str(job))
        return [made[0], dataclasses.replace(made[1], argv=argv), *made[2:]]

    return commands


DIES = """
import os, signal
from cpbench.tools.links_operations import WORKS
WORKS["all_gather"].once = lambda self, turn: os.kill(os.getpid(), signal.SIGKILL)
"""
HANGS = """
import time
from cpbench.tools.links_operations import WORKS
WORKS["all_gather"].once = lambda self, turn: time.sleep(100)
"""
FLIPS = """
from cpbench.parallel.comm import TorchComm
def all_to_all(self, out, x, inner=TorchComm.all_to_all):
    if out.numel() > 1000:  # one bit of the last element
        x.view(-1).view(x.new_empty(0).int().dtype)[-1] ^= 1
    return inner(self, out, x)
TorchComm.all_to_all = all_to_all
"""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (DIES, "all_gather (node) of 8 bytes: rank 1 was killed by SIGKILL; see "),
        (HANGS, "all_gather (node) of 8 bytes: no answer within 6 s: rank 0 start, rank 1 start"),
        (
            FLIPS,
            "all_to_all (node) of 100000 bytes, ranks 0-1: rank 1 received wrong data: element",
        ),
    ],
)
def test_a_bad_rank_is_one_line(
    code: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what went wrong is kept there
    monkeypatch.setitem(linkcheck.LAUNCHERS, "local", Launcher("local", sabotaged(code)))
    monkeypatch.setattr(linkcheck, "SILENCE_S", 6.0)
    assert linkcheck.run(2, "cpu", "local", [8, 100_000], 0, True, seconds=0.02) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("cpbench: ")
    assert words in err
    assert list(tmp_path.glob("cpbench-links-*/rank1.log"))
    told = json.loads(out)
    assert not told["complete"]
    assert [one["operation"] for one in told["rows"]][:2] == ["p2p", "p2p"], "what was measured"


def test_bad_input() -> None:
    assert linkcheck.sizes("64k, 8,8") == [8, 65536]
    for text in ("", "8,", "x", "0", "-8", "2048m"):
        with pytest.raises(ValueError, match=r"size|bytes"):
            linkcheck.sizes(text)
    with pytest.raises(ValueError, match="two ends"):
        linkcheck.run(1, "cpu", "local", [8])
    with pytest.raises(ValueError, match="must divide the 4 ranks"):
        linkcheck.run(4, "cpu", "local", [8], ranks_per_node=3)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--world-size", "1"],
        ["--world-size", "4", "--ranks-per-node", "3"],
        ["--sizes", "many"],
    ):
        assert cli.invoke(["links", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
    words = ["--sizes", "8", "--device", "cpu", "--seconds", "0.01", "--json"]
    assert cli.invoke(["links", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["operation"] for one in told["rows"]} == set(WORKS)
