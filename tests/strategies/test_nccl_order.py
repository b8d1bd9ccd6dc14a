"""What strategies issue on NCCL ends, and leaves buffers alone until they have been waited for.

The rules are in ``tests/helpers/devices/simulated_nccl.py``.  Here a share of the combinations of
``tests/helpers/matrix.py`` is simulated on 2 to 8 ranks; all of them, in a quarter of an hour:
``python tests/microbench/nccl_order.py``.
"""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
from simulated_nccl import Recorder, SimulatedComm, Work, find_faults, record, record_strategy

SHARES = {2: 5, 3: 7, 4: 7, 5: 23, 6: 23, 7: 37, 8: 17}  # number of ranks: one combination in …


@pytest.mark.parametrize("size", SHARES)
def test_strategies_end_and_leave_buffers_alone(size: int) -> None:
    cases = list(matrix.combinations(size))[:: SHARES[size]]
    recorded = {case: record_strategy(case.strategy, matrix.world_of(case, size)) for case in cases}
    faults = {case: find_faults(ranks) for case, ranks in recorded.items() if ranks is not None}
    assert len(faults) > len(cases) / 2  # others are refused
    assert not any(faults.values()), {case: found for case, found in faults.items() if found}


def passes_of(strategy: str, size: int, layout: str = "zigzag") -> list[Recorder]:
    heads = (10, 5) if "pad" in strategy else (24, 4)
    case = matrix.Combination(
        strategy, layout, "causal", *heads, "bfloat16", nodes=max(size // 2, 1)
    )
    ranks = record_strategy(strategy, matrix.world_of(case, size))
    assert ranks is not None
    return ranks


def test_hops_inside_a_window_do_not_wait_for_those_across() -> None:
    """They take another communicator, and are waited for before those that were issued first."""
    for rank in passes_of("ring:window=3", 6):
        exchanges = [operation for operation in rank.operations if operation.messages]
        across = [operation for operation in exchanges if _crosses(operation)]
        assert len(across) >= 3  # keys in each pass, and gradients that go home
        for operation in exchanges:
            assert operation.group == (tuple(range(6)), "windows" if operation in across else "")
        first, second = exchanges[:2]
        assert (first in across, second in across) == (True, False)
        assert rank.waited.index(second) < rank.waited.index(first)


def _crosses(operation: Any) -> bool:
    """Whether an operation has a message between windows of three ranks."""
    return any(sender // 3 != receiver // 3 for sender, receiver, _ in operation.messages)


@pytest.mark.parametrize(
    "strategy",
    ["ring", "ring:window=2", "ring_reverse", "burst", "tile:rows=2", "distflash", "dispatch",
     "dispatch:by=node", "hierarchical:local=2", "loongtrain:ulysses=1,window=2", "usp:ulysses=2",
     "ulysses:chunks=2", "tree", "ring_allgather:stages=2", "ulysses:chunks=2,pad=true",
     "usp:inner=allgather,ulysses=2", "hierarchical:local=4,pad=true"],
)  # fmt: skip
def test_every_wait_that_comes_too_late_is_found(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each operation that receives, in turn: rank 0 uses the buffer before it has waited."""
    wait = Work.wait
    operations = passes_of(strategy, 4)[0].operations
    receiving = [number for number, operation in enumerate(operations) if operation.writes]
    assert receiving
    for number in receiving:

        def wait_for_others(work: Work, number: int = number) -> None:
            rank = work.recorder
            if rank.rank or rank.operations.index(work.operation) != number:
                wait(work)

        monkeypatch.setattr(Work, "wait", wait_for_others)
        first, *_, last = passes_of(strategy, 4)[0].faults
        assert "which is in flight" in first
        assert "is never waited for" in last


def x(count: int = 4) -> torch.Tensor:
    return torch.empty(count, device="meta")


def _opposite_orders(comm: SimulatedComm, recorder: Recorder) -> None:
    """Rank 0 exchanges and then reduces, rank 1 does the reverse."""
    peer = 1 - comm.rank
    calls = [
        lambda: comm.exchange([(x(), peer)], [(x(), peer)]),
        lambda: comm.all_reduce(x()),
    ]
    for handle in [call() for call in (calls if comm.rank else reversed(calls))]:
        handle.wait()


def _opposite_orders_of_groups(comm: SimulatedComm, recorder: Recorder) -> None:
    """As above in two communicators: NCCL may have room for the kernels of both, or not."""
    parts = [comm.lane("a"), comm.lane("b")]
    comm.connect([((0, 1), "a"), ((0, 1), "b")])
    handles = [part.all_reduce(x()) for part in (parts if comm.rank else reversed(parts))]
    for handle in handles:
        handle.wait()


def _waits_before_it_sends(comm: SimulatedComm, recorder: Recorder) -> None:
    """Both ranks wait for the other's message before they send theirs."""
    peer = 1 - comm.rank
    comm.exchange([], [(x(), peer)]).wait()
    comm.exchange([(x(), peer)], []).wait()


def _groups_in_opposite_orders(comm: SimulatedComm, recorder: Recorder) -> None:
    names = ["a", "b"] if comm.rank else ["b", "a"]
    comm.connect([((0, 1), name) for name in names])


def _messages_in_another_order(comm: SimulatedComm, recorder: Recorder) -> None:
    """Rank 0 sends keys before gradients of the same size; rank 1 expects the reverse."""
    for what in ("keys", "gradients") if comm.rank else ("gradients", "keys"):
        sends, recvs = ([], [(x(), 0)]) if comm.rank else ([(x(), 1)], [])
        comm.exchange(sends, recvs, what).wait()


def _sizes_differ(comm: SimulatedComm, recorder: Recorder) -> None:
    comm.all_reduce(x(3 + comm.rank)).wait()


def _never_waited_for(comm: SimulatedComm, recorder: Recorder) -> None:
    comm.exchange([(x(), 1 - comm.rank)], [(x(), 1 - comm.rank)], "keys")


def _changes_what_it_sends(comm: SimulatedComm, recorder: Recorder) -> None:
    sent = x()
    handle = comm.exchange([(sent, 1 - comm.rank)], [(x(), 1 - comm.rank)], "keys")
    sent[:2].zero_()
    handle.wait()


def _reads_what_it_receives(comm: SimulatedComm, recorder: Recorder) -> None:
    received = x()
    handle = comm.exchange([(x(), 1 - comm.rank)], [(received, 1 - comm.rank)], "keys")
    received[3:] + 1
    handle.wait()


def _sends_what_it_receives(comm: SimulatedComm, recorder: Recorder) -> None:
    received, peer = x(), 1 - comm.rank
    handles = [comm.exchange([(x(), peer)], [(received, peer)], "keys"),
               comm.exchange([(received, peer)], [(x(), peer)], "keys")]  # fmt: skip
    for handle in handles:
        handle.wait()


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        (_opposite_orders, "deadlock: rank 0 at all-reduce"),
        (_opposite_orders_of_groups, "deadlock: rank 0 at all-reduce"),
        (_waits_before_it_sends, "deadlock: rank 0 at exchange"),
        (_groups_in_opposite_orders, "deadlock: rank 0 at start"),
        (_messages_in_another_order, "unmatched"),
        (_sizes_differ, "unmatched"),
        (_never_waited_for, "exchange of keys of ranks 0, 1 is never waited for"),
        (_changes_what_it_sends, "aten.zero_.default writes a buffer of exchange of keys"),
        (_reads_what_it_receives, "aten.add.Tensor reads a buffer of exchange of keys"),
        (_sends_what_it_receives, "exchange of keys reads a buffer of exchange of keys"),
    ],
)
def test_planted_faults_are_found(program: Any, fault: str) -> None:
    found = find_faults(record(2, program))
    assert found
    assert fault in found[0]
