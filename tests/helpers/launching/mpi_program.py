"""The program that test_mpi.py runs under mpiexec: ``python -m mpi4py mpi_program.py``, which ends
all ranks when one fails.  Rank 0 prints the results as one JSON object, on the last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import matrix
import torch
from mpi4py import MPI

from cpbench.parallel import comm_mpi
from cpbench.parallel.comm_mpi import MpiComm


def check_operations(comm: MpiComm, dtype: torch.dtype) -> None:
    """Check the result and the byte counts of every operation of a communicator."""
    rank, size = comm.rank, comm.size
    item_bytes = torch.empty(0, dtype=dtype).element_size()

    def row(sender: int, receiver: int, length: int = 6) -> torch.Tensor:
        """The message of one rank to another; integers that every dtype represents exactly."""
        return (torch.arange(length) % 3 + 4 * sender + receiver).to(dtype)

    def check_traffic(message_bytes: int, messages: int = 1) -> None:
        """Check that every other rank was sent the same number of messages and bytes."""
        peers = size - 1
        assert comm.traffic.bytes_sent == message_bytes * messages * peers
        assert comm.traffic.messages == messages * peers
        assert comm.traffic.largest_message == (message_bytes if peers else 0)
        comm.traffic.clear()

    comm.traffic.clear()
    x = torch.stack([row(rank, peer) for peer in range(size)])
    out = torch.full_like(x, -1)
    comm.all_to_all(out, x).wait()
    assert torch.equal(out, torch.stack([row(peer, rank) for peer in range(size)]))
    check_traffic(6 * item_bytes)

    out = torch.full_like(x, -1)
    comm.all_gather(out, x[0]).wait()
    assert torch.equal(out, torch.stack([row(peer, 0) for peer in range(size)]))
    check_traffic(6 * item_bytes)

    out = torch.full_like(x[0], -1)
    comm.reduce_scatter(out, x).wait()
    assert torch.equal(out, sum(row(peer, rank).double() for peer in range(size)).to(dtype))
    check_traffic(6 * item_bytes)

    # Two messages to each rank, including this one, of lengths that differ between pairs of ranks.
    lengths = {(a, b): 3 + 5 * a + b for a in range(size) for b in range(size)}
    sends = [
        (row(rank, peer, lengths[rank, peer]) + i, peer) for peer in range(size) for i in range(2)
    ]
    recvs = [
        (torch.empty(lengths[peer, rank], dtype=dtype), peer)
        for peer in range(size)
        for _ in range(2)
    ]
    comm.exchange(sends, recvs).wait()
    for i, (tensor, peer) in enumerate(recvs):
        assert torch.equal(tensor, row(peer, rank, lengths[peer, rank]) + i % 2)
    bytes_to = [2 * item_bytes * lengths[rank, peer] * (peer != rank) for peer in range(size)]
    assert comm.traffic.bytes_to == bytes_to
    comm.traffic.clear()
    comm.exchange([], []).wait()
    empty = torch.empty(0, dtype=dtype)
    comm.exchange([(empty, (rank + 1) % size)], [(empty.clone(), (rank - 1) % size)]).wait()
    comm.traffic.clear()


def check_all_reduce(comm: MpiComm) -> None:
    """Check the all-reduce, its byte counts, and its error for bfloat16."""
    size = comm.size
    for dtype in (torch.float32, torch.float64, torch.int64):
        for largest in (False, True):
            comm.traffic.clear()
            x = torch.arange(5, dtype=dtype).add_(comm.rank)
            comm.all_reduce(x, largest).wait()
            offset = size - 1 if largest else size * (size - 1) // 2
            factor = 1 if largest else size
            assert torch.equal(x, torch.arange(5, dtype=dtype) * factor + offset)
            shard_bytes = -(-5 * x.element_size() // size)
            assert comm.traffic.bytes_sent == 2 * shard_bytes * (size - 1)
    message = ""
    try:
        comm.all_reduce(torch.ones(2, dtype=torch.bfloat16))
    except ValueError as error:
        message = str(error)
    assert "not bfloat16: convert the tensor first" in message
    comm.traffic.clear()


def check_groups(comm: MpiComm) -> None:
    """Check sub-communicators of all ranks in reverse order, and of some ranks, which the others do
    not take part in; bytes are counted by the rank in the whole job."""
    reverse = comm.sub(range(comm.size)[::-1])
    assert reverse.rank == comm.size - 1 - comm.rank
    gathered = torch.full((comm.size, 1), -1.0)
    reverse.all_gather(gathered, torch.tensor([float(comm.rank)])).wait()
    assert gathered.flatten().tolist() == list(range(comm.size))[::-1]
    if comm.size < 3 or comm.rank == 0:
        return
    comm.traffic.clear()
    others = comm.sub(range(1, comm.size))  # rank 0 takes no part
    pair = others.sub([0, others.size - 1]) if others.rank in (0, others.size - 1) else None
    x = torch.tensor([float(comm.rank)])
    others.all_reduce(x).wait()
    assert x.item() == sum(range(1, comm.size))
    if pair is not None:
        assert comm.sub([1, comm.size - 1]) is pair
        received = torch.zeros(2)
        peer = 1 - pair.rank
        pair.exchange([(torch.full((2,), 7.0), peer)], [(received, peer)]).wait()
        assert received.tolist() == [7.0, 7.0]
        assert comm.traffic.bytes_to[comm.size - comm.rank] >= 8
    assert comm.traffic.bytes_to[0] == 0


def combinations(size: int) -> Iterator[matrix.Combination]:
    """Every strategy on every layout, cycling through masks and shapes; variants and placements on
    four ranks, on one layout each."""
    names = matrix.names() + ([("single", "contiguous", "")] if size == 1 else [])
    seen = set()
    for index, (strategy, layout, placement) in enumerate(names):
        if ":" in strategy or placement:
            if size < 4 or (strategy, placement) in seen:
                continue
            seen.add((strategy, placement))
        mask = matrix.MASKS[(index + 2 * size) % len(matrix.MASKS)]
        shape = matrix.SHAPES[(index // 3 + size) % len(matrix.SHAPES)]
        nodes = size // 2 if size % 2 == 0 else 1
        yield matrix.Combination(strategy, layout, mask, *shape, placement, nodes)


def run_strategies(comm: MpiComm, ranks: MPI.Comm) -> dict[str, Any]:
    """Run all combinations; on rank 0, their faults, and the strategies that were tried and those
    that computed, each with its layout.  On other ranks empty."""
    cases = list(combinations(comm.size))
    outcomes_by_rank = ranks.gather([matrix.outcome(case, comm) for case in cases])
    if outcomes_by_rank is None:
        return {}
    limit = {"float32": 2e-6, "bfloat16": 1.2e-2}
    faults: list[str] = []
    tried, computed = set(), set()
    for case, *outcomes in zip(cases, *outcomes_by_rank, strict=True):
        faults += matrix.faults(case, outcomes, limit)
        name = case.strategy.partition(":")[0]
        tried.add((name, case.layout))
        if not outcomes[0].refused:
            computed.add((name, case.layout))
    return {"faults": faults, "tried": sorted(tried), "computed": sorted(computed)}


def run_all(ranks: MPI.Comm) -> dict[int, Any]:
    """Check a communicator and run all strategies; the results by the number of ranks."""
    comm = MpiComm(ranks)
    assert comm.pause_s == comm.poll_interval_s == 0
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        check_operations(comm, dtype)
    check_all_reduce(comm)
    check_groups(comm)
    max_count, comm_mpi.MAX_COUNT = comm_mpi.MAX_COUNT, 7  # larger messages are sent as one item
    check_operations(comm, torch.float32)
    check_all_reduce(comm)
    comm_mpi.MAX_COUNT = max_count
    results = run_strategies(MpiComm(ranks, poll_interval_s=1e-4), ranks)
    return {comm.size: results} if results else {}


def main() -> None:
    """Run on all ranks; if those are four, then also on groups of three and one."""
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    results = run_all(world)
    if world.size == 4:
        results |= run_all(world.Split(int(world.rank == 3)))
    results_by_rank = world.gather(results)
    if results_by_rank is not None:
        merged = {size: result for one in results_by_rank for size, result in one.items()}
        print(json.dumps(merged))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
