"""Replays against closed forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cpbench.simulator.cluster import Cluster, from_table
from cpbench.simulator.events import Copy, Event, Kernel, Post, Program, SideWork, Wait
from cpbench.simulator.replay import RankTimes, replay

GB = 10**9
PHASE = {"tile": [128, 128], "tflops": 500, "tile_us": 0, "empty_us": 0, "tail": 0, "call_us": 0}
TABLE: dict[str, Any] = {
    "name": "made", "gpus_per_node": 4,
    "calibrated": {"source": "made", "ranks": 8, "tokens": 8192, "median_error": 0.03,
                   "percentile_90_error": 0.1},
    "gpu": {"source": "made", "sms": 100, "memory_gib": 80, "stream_gb_per_s": 2000,
            "gather_gb_per_s": 1000, "scatter_gb_per_s": 250, "launch_us": 0},
    "kernels": [{"source": "made", "operators": ["bands"], "dtype": "bfloat16", "head_dim": 128,
                 "grid": "mask", "fwd": PHASE, "bwd": PHASE}],
    "links": {"node": {"source": "made", "alpha_us": 1e5, "gb_per_s": 10},
              "across": {"source": "made", "alpha_us": 2e5, "gb_per_s": 1, "per_node": 1}},
    "collectives": {"source": "made", "alpha_us": 3e5, "all_gather": [4, 2],
                    "reduce_scatter": [4, 2], "all_reduce": [4, 2]},
}  # fmt: skip
CLUSTER = from_table(TABLE)
EVERYONE = (0, 1, 2, 3)


def compute(seconds: float) -> SideWork:
    """Work of so many seconds, see :func:`run`."""
    return SideWork(stream=round(seconds * 1e6))


def post(number: int, sends: list[Any], receives: list[Any], operation: str = "exchange",
         lane: str = "", members: tuple[int, ...] = EVERYONE) -> Post:  # fmt: skip
    return Post(number, operation, members, lane, tuple(sends), tuple(receives))


def run(
    programs: dict[int, Program], nodes: int = 4, alone: bool = False, cluster: Cluster = CLUSTER
) -> dict[int, RankTimes]:
    def seconds(event: Kernel | SideWork) -> float:
        assert isinstance(event, SideWork)
        return event.stream / 1e6

    groups = [[rank] for rank in programs] if alone else []
    return replay(programs, cluster, nodes, seconds, groups)


def ring(rank: int, size: int, nbytes: int, step: float) -> Program:
    events: list[Event] = []
    members = tuple(range(size))
    for turn in range(size):
        if turn + 1 < size:
            sends, receives = [((rank + 1) % size, nbytes)], [((rank - 1) % size, nbytes)]
            events.append(post(turn, sends, receives, members=members))
        events.append(compute(step))
        if turn + 1 < size:
            events.append(Wait(turn))
    return tuple(events)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("step", [0.25, 2.0])
def test_a_ring_takes_the_longer_of_compute_and_hop(step: float, alone: bool) -> None:
    hop = 0.1 + 10 * GB / (10 * GB)
    times = run({rank: ring(rank, 4, 10 * GB, step) for rank in range(4)}, alone=alone)
    for one in times.values():
        assert one.end == pytest.approx(3 * max(step, hop) + step)
        assert one.exposed == pytest.approx(3 * max(0.0, hop - step))
        assert one.side == pytest.approx(4 * step)


def test_the_slowest_hop_sets_the_pace_of_a_ring() -> None:
    """Two nodes: two of the eight hops cross, at a tenth of the rate; all ranks come to wait."""
    across = 0.2 + 10.0
    times = run({rank: ring(rank, 8, 10 * GB, 1.0) for rank in range(8)})
    slowest = max(one.end for one in times.values())
    assert slowest == pytest.approx(7 * across + 1.0, rel=0.01)


def test_a_slow_rank_delays_its_peers() -> None:
    programs = {rank: ring(rank, 4, GB, 1.0) for rank in range(4)}
    programs[2] = ring(2, 4, GB, 3.0)
    times = run(programs)
    assert times[2].exposed == 0
    assert times[2].end == pytest.approx(12)
    assert times[3].exposed > 0


@pytest.mark.parametrize(("nodes", "rate"), [(4, 4), (2, 2)])
def test_an_all_gather_starts_when_all_have_entered(nodes: int, rate: int) -> None:
    def program(rank: int) -> Program:
        rows = [(peer, GB) for peer in EVERYONE if peer != rank]
        return compute(rank * 0.5 + 0.01), post(1, rows, rows, "all_gather"), Wait(1)

    times = run({rank: program(rank) for rank in range(4)}, nodes=nodes)
    assert [one.end for one in times.values()] == pytest.approx([1.51 + 0.3 + 3 / rate] * 4)
    assert times[0].exposed == pytest.approx(1.8 + 3 / rate)


@pytest.mark.parametrize(
    ("members", "rate"), [((0, 1), 4), ((0, 2), 1), ((0, 1, 2, 3), 2), ((0, 1, 2), 1)]
)
def test_an_all_gather_has_the_links_of_its_ranks(members: tuple[int, ...], rate: int) -> None:
    """Of two ranks a node, which together receive 2 GB/s each from the other; rank 2 of three is
    alone on its node."""

    def program(rank: int) -> Program:
        rows = [(peer, GB) for peer in members if peer != rank]
        return post(0, rows, rows, "all_gather", members=members), Wait(0)

    times = run({rank: program(rank) for rank in members}, nodes=2)
    longest = max(one.end for one in times.values())
    assert longest == pytest.approx(0.3 + (len(members) - 1) / rate)


def test_ranks_of_a_node_share_its_link_where_few_ranks_stand_for_many() -> None:
    """Of eight ranks, two on each node, the replayed node sends to one that is not replayed."""

    def program(rank: int) -> Program:
        away = [((rank + 2) % 8, GB)], [((rank - 2) % 8, GB)]
        return post(0, *away, members=tuple(range(8))), Wait(0)

    programs = {rank: program(rank) for rank in (4, 5)}
    assert run(programs, nodes=2)[4].end == pytest.approx(0.2 + 2)
    assert run(programs, nodes=2, alone=True)[4].end == pytest.approx(0.2 + 1)


def test_an_all_to_all_in_chunks_overlaps() -> None:
    """Each chunk arrives while the one before is computed."""
    chunks, step = 5, 0.3
    arrival = 0.1 + 3 * GB / (10 * GB)

    def program(rank: int) -> Program:
        rows = [(peer, GB) for peer in EVERYONE if peer != rank]
        events: list[Event] = [post(0, rows, rows, "all_to_all")]
        for chunk in range(chunks):
            events.append(Wait(chunk))
            if chunk + 1 < chunks:
                events.append(post(chunk + 1, rows, rows, "all_to_all"))
            events.append(compute(step))
        return tuple(events)

    times = run({rank: program(rank) for rank in range(4)})
    expected = arrival + (chunks - 1) * max(arrival, step) + step
    assert [one.end for one in times.values()] == pytest.approx([expected] * 4)


def test_an_all_to_all_across_nodes_uses_both_classes_of_links() -> None:
    """Two ranks a node: 1 GB inside, 2 GB across the one link that the ranks of a node share."""

    def program(rank: int) -> Program:
        rows = [(peer, GB) for peer in EVERYONE if peer != rank]
        return post(1, rows, rows, "all_to_all"), Wait(1)

    times = run({rank: program(rank) for rank in range(4)}, nodes=2)
    assert [one.end for one in times.values()] == pytest.approx([0.2 + 2 * 2] * 4)


def test_messages_on_one_link_share_it() -> None:
    """Ranks 0 and 1 share the link of their node.  The first sends 3 GB from 0 s on, the second
    1 GB from 1 s on: half a GB per second each until the second is done."""
    programs = {
        0: (post(1, [(2, 3 * GB)], [], members=(0, 2)), Wait(1)),
        1: (compute(1.0), post(1, [(3, GB)], [], members=(1, 3)), Wait(1)),
        2: (post(1, [], [(0, 3 * GB)], members=(0, 2)), Wait(1)),
        3: (post(1, [], [(1, GB)], members=(1, 3)), Wait(1)),
    }
    times = run(programs, nodes=2)
    assert times[1].end == pytest.approx(1.2 + 2)
    assert times[0].end == pytest.approx(0.2 + 4)
    own = copy.deepcopy(TABLE)
    own["links"]["across"]["per_node"] = 2
    times = run(programs, nodes=2, cluster=from_table(own))
    assert times[1].end == pytest.approx(1.2 + 1)
    assert times[0].end == pytest.approx(0.2 + 3)


@pytest.mark.parametrize(("lane", "end"), [("", 4.1 + 4.1), ("other", 0.1 + 8)])
def test_operations_of_one_communicator_run_one_after_another(lane: str, end: float) -> None:
    """In a lane of its own the second shares the link with the first, and its latency overlaps."""
    programs = {
        rank: (
            post(1, *([(1, 40 * GB)], []) if rank == 0 else ([], [(0, 40 * GB)])),
            post(2, *([(1, 40 * GB)], []) if rank == 0 else ([], [(0, 40 * GB)]), lane=lane),
            Wait(1), Wait(2),
        )
        for rank in (0, 1)
    }  # fmt: skip
    assert run(programs)[0].end == pytest.approx(end)


def test_messages_match_in_order() -> None:
    """The receiver posts for the second message only after a while: it starts then."""
    programs = {
        0: (post(1, [(1, GB)], []), post(2, [(1, GB)], []), Wait(1), Wait(2)),
        1: (post(1, [], [(0, GB)]), compute(5.0), post(2, [], [(0, GB)]), Wait(1), Wait(2)),
    }
    times = run(programs)
    assert times[1].end == pytest.approx(5.2)
    assert times[0].end == pytest.approx(5.2)


def test_ranks_that_wait_for_ever_are_named() -> None:
    with pytest.raises(ValueError, match="rank 0 waits for ever for its operation 1"):
        run({0: (post(1, [(1, GB)], []), Wait(1)), 1: (compute(1.0),)})


def test_links_that_are_not_in_the_cluster() -> None:
    table = copy.deepcopy(TABLE)
    del table["links"]["across"]
    with pytest.raises(ValueError, match=r"no \[links\.across\]"):
        run({rank: ring(rank, 4, GB, 1.0) for rank in range(4)}, 2, cluster=from_table(table))


def test_replays_are_deterministic() -> None:
    programs = {rank: ring(rank, 8, 7 * GB + rank, 0.7 + rank / 10) for rank in range(8)}
    assert run(programs) == run(programs)


def with_host(**link: Any) -> Cluster:
    host = {"source": "made", "alpha_us": 1e5, "gb_per_s": 10, **link}
    return from_table({**TABLE, "links": {**TABLE["links"], "host": host}})


@pytest.mark.parametrize("step", [0.25, 2.0])
def test_copies_overlap_with_work_unless_both_are_one_memory(step: float) -> None:
    """A chunk is copied while the one before is computed: 0.1 s for each of two parts, 1 s."""
    copies = [Copy(n, True, 10 * GB, pieces=2) for n in range(3)]
    program: list[Event] = [copies[0]]
    for n in range(3):
        program += [Wait(n), *copies[n + 1 : n + 2], compute(step)]
    (times,) = run({0: tuple(program)}, cluster=with_host()).values()
    assert times.end == pytest.approx(1.2 + 2 * max(1.2, step) + step)
    assert times.exposed == pytest.approx(times.end - 3 * step)
    assert {span.name for span in times.spans if span.kind == "transfer"} == {
        "to device 0", "to device 1", "to device 2",
    }  # fmt: skip
    (times,) = run({0: tuple(program)}, cluster=with_host(overlaps=False)).values()
    assert times.end == pytest.approx(3 * (1.2 + step))


def test_copies_of_one_direction_and_after_others_wait_for_them() -> None:
    """Two to the host take turns; one to the device runs beside the first of them, another only
    after the second, whose memory it reads."""
    out = [Copy(n, False, 10 * GB, pieces=1) for n in (1, 2)]
    back = [Copy(3, True, 10 * GB, pieces=1), Copy(4, True, 10 * GB, pieces=1, after=(2,))]
    together = (*out, *back, *map(Wait, (3, 1, 2, 4)))
    (times,) = run({0: together}, cluster=with_host()).values()
    ends = {s.name: s.end for s in times.spans if s.kind == "transfer"}
    assert ends == pytest.approx(
        {"to host 1": 1.1, "to host 2": 2.2, "to device 3": 1.1, "to device 4": 3.3}
    )


@pytest.mark.parametrize(("per_node", "end"), [(0, 1.1), (4, 1.1), (2, 2.1), (1, 4.1)])
def test_ranks_of_a_node_share_the_links_to_its_host(per_node: int, end: float) -> None:
    program = (Copy(1, True, 10 * GB, pieces=1), Wait(1))
    times = run(dict.fromkeys(range(4), program), cluster=with_host(per_node=per_node))
    assert [one.end for one in times.values()] == pytest.approx([end] * 4)
