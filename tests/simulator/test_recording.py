"""Recordings against traces: the same bytes and visible pairs, and every post is waited for."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from cpbench import masks
from cpbench.core.problem import Case, Problem
from cpbench.core.registry import implementation, operator_info, strategies, strategies_for
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.trace import (
    RankTrace,
    TraceComm,
    count_rank,
    empty_inputs,
    trace_phases,
    trace_rank,
)
from cpbench.parallel.tracing.traced_operator import TracedOperator
from cpbench.parallel.world import World
from cpbench.simulator import recording, recordings
from cpbench.simulator.cluster import load
from cpbench.simulator.events import Copy, Kernel, Post, Program, Recorder, SideWork, Wait
from cpbench.simulator.recommendation.bounds import bound, link_seconds
from cpbench.simulator.recording import record_rank
from cpbench.simulator.recordings import cached, content_key
from cpbench.simulator.representatives import rank_classes, representatives
from cpbench.simulator.side_work.launches import SideWorkMode
from cpbench.simulator.tiles import Tiling

SIZE = 4
CLUSTER = load("h100-ib")
PAIRS = Tiling(fwd=(1, 1), bwd=(1, 1), grid="mask")  # blocks are visible pairs
SPECS = [
    f"{name}:{variant}" if variant else name
    for name, info in strategies_for("attention").items()
    if info.traced and name != "single"
    for variant in ("", *info.variants)
]


DOCUMENTS = "causal_document:doc_lens=[50,29,49]"
LONGER = "causal_document:doc_lens=[200,116,196]"


def world(mask_text: str, layout: str, size: int = SIZE, nodes: int = 2) -> World:
    tokens = 32 * size
    problem = Problem(batch=2, seq_q=tokens, seq_k=tokens, heads_q=16, heads_kv=8, head_dim=16,
                      dtype="bfloat16")  # fmt: skip
    mask = masks.build(mask_text, tokens)
    return World.of(problem, mask, build_layout(layout, tokens, size, mask), nodes)


@pytest.mark.parametrize("spec_text", SPECS)
def test_recordings_agree_with_traces(spec_text: str) -> None:
    spec = Spec.parse(spec_text)
    info, operator = strategies()[spec.name], operator_info("bands")
    strategy = implementation(info, spec.kwargs)
    for layout, mask in (("zigzag", "causal"), ("contiguous", DOCUMENTS)):
        one = world(mask, layout)
        if strategy.unsupported(one):
            continue
        sent, received = Counter[tuple[int, int, int]](), Counter[tuple[int, int, int]]()
        for rank in range(SIZE):
            trace = trace_rank(strategy, operator, one, rank)
            programs = record_rank(strategy, operator, one, rank, PAIRS)
            least = bound(strategy, operator, one, rank, CLUSTER, CLUSTER.kernels[0])
            assert least.pairs == trace.phases["fwd"].pairs
            links = (link_seconds(x, rank, one.ranks_per_node, CLUSTER) for x in programs.values())
            assert least.links == sum(links)
            for phase, program in programs.items():
                expected = trace.phases[phase]
                kernels = [event for event in program if isinstance(event, Kernel)]
                pairs = sum(k.tiles.blocks * k.heads_q // 2 for k in kernels)
                assert pairs == expected.pairs
                posts = [event for event in program if isinstance(event, Post)]
                copies = [event for event in program if isinstance(event, Copy)]
                for to_device, nbytes in ((True, expected.to_device), (False, expected.to_host)):
                    assert sum(x.nbytes for x in copies if x.to_device == to_device) == nbytes
                bytes_to = [0] * SIZE
                for post in posts:
                    for peer, nbytes in post.sends:
                        bytes_to[peer] += nbytes
                        sent[rank, peer, nbytes] += 1
                    for peer, nbytes in post.receives:
                        received[peer, rank, nbytes] += 1
                assert bytes_to == expected.bytes_to
                assert_waited(program, [event.number for event in (*posts, *copies)])
        assert sent == received


@pytest.mark.parametrize("spec_text", SPECS)
def test_remembered_side_work_is_that_of_meta_tensors(
    spec_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec.parse(spec_text)
    strategy, operator = (
        implementation(strategies()[spec.name], spec.kwargs),
        operator_info("bands"),
    )
    one = world("causal", "zigzag")
    if strategy.unsupported(one):
        pytest.skip("not of this world")
    remembered = record_rank(strategy, operator, one, 1, PAIRS)
    monkeypatch.setattr(recording, "strided", lambda x: x)
    assert record_rank(strategy, operator, one, 1, PAIRS) == remembered


def assert_waited(program: Program, posts: list[int]) -> None:
    """Every operation is waited for once, after it was posted."""
    place = {e.number: i for i, e in enumerate(program) if isinstance(e, Post | Copy)}
    waits = [event.number for event in program if isinstance(event, Wait)]
    assert sorted(waits) == sorted(posts)
    assert all(
        place[event.number] < i for i, event in enumerate(program) if isinstance(event, Wait)
    )


class MetaOperator(TracedOperator):
    """Makes every result anew, on torch's device without data."""

    empty = BoundOperator.empty


@pytest.mark.parametrize("spec_text", SPECS)
def test_traces_of_shapes_equal_those_of_meta_tensors(spec_text: str) -> None:
    """So do the counts, which leave out the checksum; four of 16 ranks on four nodes."""
    spec = Spec.parse(spec_text)
    info, operator = strategies()[spec.name], operator_info("bands")
    strategy = implementation(info, spec.kwargs)
    for layout, mask in (("zigzag", "causal"), ("contiguous", LONGER), ("dispatch", LONGER)):
        one = world(mask, layout, size=16, nodes=4)
        if layout not in info.layouts or strategy.unsupported(one):
            continue
        for rank in (0, 3, 10, 15):
            comm = TraceComm(rank, one.size, log=True)
            op = MetaOperator(operator)
            phases = trace_phases(strategy, op, one, comm, empty_inputs(one))
            trace = trace_rank(strategy, operator, one, rank, log=True)
            assert trace == RankTrace(phases, comm.checksum, comm.parts, comm.log or [])
            assert count_rank(strategy, operator, one, rank) == phases


def test_side_work_by_kind() -> None:
    recorder = Recorder()
    x = torch.empty((8, 4), device="meta")
    index = torch.empty(2, dtype=torch.int64, device="meta")
    with SideWorkMode(recorder):
        x.view(4, 8)
        torch.empty_like(x)
        y = x.bfloat16()
        y.add_(y)
    with SideWorkMode(recorder):
        rows = x.index_select(0, index)
        x.index_copy_(0, index, rows)
    (event,) = recorder.take()
    assert event == SideWork(stream=128 + 64 + 3 * 64, gather=2 * 32, scatter=2 * 32, launches=4)


def test_side_work_of_a_ring_is_what_it_launches() -> None:
    """A merge is one kernel that reads both results; the last one is followed by a cast."""
    strategy = implementation(strategies()["ring"], {})
    programs = record_rank(strategy, operator_info("bands"), world("full", "contiguous"), 1, PAIRS)
    work = [event for event in programs["fwd"] if isinstance(event, SideWork)]
    b, s, h, d = 2, 32, 16, 16
    elements, rows = b * s * h * d, 4 * b * s * h
    first = 2 * elements + 2 * elements + 4 * elements + 3 * rows
    later = 4 * elements + 2 * elements + 4 * elements + 3 * rows
    cast = 4 * elements + 2 * elements
    assert [w.stream for w in work] == [first, *[later] * (SIZE - 3), later + cast]


def test_classes_of_alike_ranks() -> None:
    """A full mask: ranks differ by their place in the node.  Causal and zigzag: no two are alike,
    as the ranks before one need half of its queries, and those after it half of its keys."""
    full = world("full", "contiguous")
    assert rank_classes(full).tolist() == [0, 1, 0, 1]
    assert representatives(full) == {0: 2, 1: 2}
    assert len(set(rank_classes(world("causal", "zigzag")))) == SIZE
    ragged = world("causal", "contiguous", size=16)
    chosen = representatives(ragged, most=4)
    assert chosen == {2: 4, 7: 4, 10: 4, 15: 4}, "places in nodes of two alternate"
    for nodes, mask in ((2, "full"), (4, "full"), (2, "causal"), (2, "full")):  # remembered
        one = world(mask, "zigzag", size=8, nodes=nodes)
        for _ in range(2):
            assert len(set(rank_classes(one))) == (nodes if mask == "full" else 8)


def test_alike_ranks_have_equal_recordings() -> None:
    strategy = implementation(strategies()["ring"], {})
    full = world("full", "contiguous")
    shapes = []
    for rank in (1, 3):
        program = record_rank(strategy, operator_info("bands"), full, rank, PAIRS)["bwd"]
        shapes.append([
            (e.operation, [((peer - rank) % SIZE, n) for peer, n in e.sends])
            if isinstance(e, Post) else e for e in program
        ])  # fmt: skip
    assert shapes[0] == shapes[1]


def test_copies_beyond_the_device_are_posted_ahead_and_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are read a chunk ahead; kept sums of gradients are read after they were written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    strategy = implementation(strategies()["single"], {"offload": "host", "chunk": 8})
    one = world("full", "contiguous", size=1)
    programs = record_rank(strategy, operator_info("bands"), one, 0, PAIRS)
    copies = [event for event in programs["bwd"] if isinstance(event, Copy)]
    written = {copy.number for copy in copies if not copy.to_device}
    ordered = [copy for copy in copies if copy.after]
    assert ordered
    assert all(copy.to_device and written.issuperset(copy.after) for copy in ordered)
    assert {copy.pieces for copy in copies} == {1, 2}  # batch 2: chunks of tokens, and flat sums
    first_kernel = next(i for i, e in enumerate(programs["fwd"]) if isinstance(e, Kernel))
    ahead = [e for e in programs["fwd"][:first_kernel] if isinstance(e, Copy)]
    waited = [e for e in programs["fwd"][:first_kernel] if isinstance(e, Wait)]
    assert len(ahead) == len(waited) + 2  # k and v of the next chunk
    assert cached("key", lambda: programs) == cached("key", lambda: pytest.fail("again"))


def test_recordings_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    strategy, one = implementation(strategies()["usp"], {}), world("causal", "zigzag")
    case = Case(strategy=Spec("usp"), operator=Spec("bands"))
    key = content_key(case, one, PAIRS, 3)
    made = cached(key, lambda: record_rank(strategy, operator_info("bands"), one, 3, PAIRS))
    assert cached(key, lambda: pytest.fail("recorded again")) == made
    others = {
        content_key(case, one, PAIRS, 2),
        content_key(case, world("full", "zigzag"), PAIRS, 3),
        content_key(case, world("causal", "contiguous"), PAIRS, 3),
        content_key(Case(strategy=Spec("ring")), one, PAIRS, 3),
    }
    assert len({key, *others}) == 5
    (file,) = tmp_path.rglob("*.json.z")
    for damaged in (b"broken", file.read_bytes()[:-9], zlib.compress(b"{}")):
        file.write_bytes(damaged)
        assert cached(key, lambda: made) is made
        assert cached(key, lambda: pytest.fail("recorded again")) == made


def test_recordings_that_cannot_be_written_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs = {"fwd": (Wait(1),)}
    cached("a", lambda: programs)

    def refused(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(os, "utime", refused)
    assert cached("a", lambda: pytest.fail("recorded again")) == programs


def test_recordings_that_were_used_longest_ago_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(recordings, "TRIM_BYTES", 0)
    programs = {"fwd": (Wait(1),)}
    for i, key in enumerate("abc"):
        cached(key, lambda: programs)
        os.utime(recordings.cache_folder() / f"{key}.json.z", (i, i))
    cached("a", lambda: pytest.fail("it was used last of these three"))
    files = sum(file.stat().st_size for file in tmp_path.rglob("*.z"))
    monkeypatch.setattr(recordings, "MOST_BYTES", files)
    cached("d", lambda: programs)
    assert {file.name[0] for file in tmp_path.rglob("*.z")} == {"a", "c", "d"}
