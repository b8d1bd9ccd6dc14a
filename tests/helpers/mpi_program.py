"""What test_mpi.py runs under mpiexec: ``python -m mpi4py mpi_program.py``, which ends all ranks
when one fails.  Rank 0 prints what was found as one JSON object, on the last line."""

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


def operations(comm: MpiComm, dtype: torch.dtype) -> None:
    """Every operation of a communicator does what it is defined to do, and counts its bytes."""
    me, size = comm.rank, comm.size
    width = torch.empty(0, dtype=dtype).element_size()

    def row(sender: int, receiver: int, length: int = 6) -> torch.Tensor:
        """What one rank has for another; whole numbers that every dtype holds."""
        return (torch.arange(length) % 3 + 4 * sender + receiver).to(dtype)

    def counted(each: int, messages: int = 1) -> None:
        """Every other rank was sent as much."""
        others = size - 1
        assert comm.traffic.bytes_sent == each * messages * others
        assert comm.traffic.messages == messages * others
        assert comm.traffic.largest == (each if others else 0)
        comm.traffic.clear()

    comm.traffic.clear()
    x = torch.stack([row(me, peer) for peer in range(size)])
    out = torch.full_like(x, -1)
    comm.all_to_all(out, x).wait()
    assert torch.equal(out, torch.stack([row(peer, me) for peer in range(size)]))
    counted(6 * width)

    out = torch.full_like(x, -1)
    comm.all_gather(out, x[0]).wait()
    assert torch.equal(out, torch.stack([row(peer, 0) for peer in range(size)]))
    counted(6 * width)

    out = torch.full_like(x[0], -1)
    comm.reduce_scatter(out, x).wait()
    assert torch.equal(out, sum(row(peer, me).double() for peer in range(size)).to(dtype))
    counted(6 * width)

    # Two messages to each rank, oneself too, of lengths that differ from pair to pair.
    lengths = {(a, b): 3 + 5 * a + b for a in range(size) for b in range(size)}
    sends = [(row(me, p, lengths[me, p]) + i, p) for p in range(size) for i in range(2)]
    recvs = [(torch.empty(lengths[p, me], dtype=dtype), p) for p in range(size) for i in range(2)]
    comm.exchange(sends, recvs).wait()
    for i, (tensor, peer) in enumerate(recvs):
        assert torch.equal(tensor, row(peer, me, lengths[peer, me]) + i % 2)
    sent = [2 * width * lengths[me, peer] * (peer != me) for peer in range(size)]
    assert comm.traffic.bytes_to == sent
    comm.traffic.clear()
    comm.exchange([], []).wait()
    nothing = torch.empty(0, dtype=dtype)
    comm.exchange([(nothing, (me + 1) % size)], [(nothing.clone(), (me - 1) % size)]).wait()
    comm.traffic.clear()


def reductions(comm: MpiComm) -> None:
    """All-reduce, and what it refuses."""
    size = comm.size
    for dtype in (torch.float32, torch.float64, torch.int64):
        for largest in (False, True):
            comm.traffic.clear()
            x = torch.arange(5, dtype=dtype).add_(comm.rank)
            comm.all_reduce(x, largest).wait()
            want = size - 1 if largest else size * (size - 1) // 2
            assert torch.equal(x, torch.arange(5, dtype=dtype) * (1 if largest else size) + want)
            part = -(-5 * x.element_size() // size)
            assert comm.traffic.bytes_sent == 2 * part * (size - 1)
    refusal = ""
    try:
        comm.all_reduce(torch.ones(2, dtype=torch.bfloat16))
    except ValueError as error:
        refusal = str(error)
    assert "not bfloat16: convert it first" in refusal
    comm.traffic.clear()


def groups(comm: MpiComm) -> None:
    """Sub-communicators of all, backwards, and of some, without the others; bytes are noted under
    the ranks of the whole job."""
    backwards = comm.sub(range(comm.size)[::-1])
    assert backwards.rank == comm.size - 1 - comm.rank
    gathered = torch.full((comm.size, 1), -1.0)
    backwards.all_gather(gathered, torch.tensor([float(comm.rank)])).wait()
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
        got = torch.zeros(2)
        pair.exchange([(torch.full((2,), 7.0), 1 - pair.rank)], [(got, 1 - pair.rank)]).wait()
        assert got.tolist() == [7.0, 7.0]
        assert comm.traffic.bytes_to[comm.size - comm.rank] >= 8
    assert comm.traffic.bytes_to[0] == 0


def combinations(size: int) -> Iterator[matrix.Combination]:
    """Every strategy on every layout, with masks and shapes in turn; variants and placements on
    four ranks, on one layout each."""
    names = matrix.names() + ([("single", "contiguous", "")] if size == 1 else [])
    seen = set()
    for turn, (strategy, layout, placement) in enumerate(names):
        if ":" in strategy or placement:
            if size < 4 or (strategy, placement) in seen:
                continue
            seen.add((strategy, placement))
        mask = matrix.MASKS[(turn + 2 * size) % len(matrix.MASKS)]
        shape = matrix.SHAPES[(turn // 3 + size) % len(matrix.SHAPES)]
        nodes = size // 2 if size % 2 == 0 else 1
        yield matrix.Combination(strategy, layout, mask, *shape, placement, nodes)


def strategies(comm: MpiComm, ranks: MPI.Comm) -> dict[str, Any]:
    """Faults by combination, and which strategies were met and computed on which layouts; told by
    the first of the ranks."""
    wanted = list(combinations(comm.size))
    of_ranks = ranks.gather([matrix.outcome(one, comm) for one in wanted])
    if of_ranks is None:
        return {}
    limit = {"float32": 2e-6, "bfloat16": 1.2e-2}
    faults: list[str] = []
    met, computed = set(), set()
    for one, *outcomes in zip(wanted, *of_ranks, strict=True):
        faults += matrix.faults(one, outcomes, limit)
        name = one.strategy.partition(":")[0]
        met.add((name, one.layout))
        if not outcomes[0].refused:
            computed.add((name, one.layout))
    return {"faults": faults, "met": sorted(met), "computed": sorted(computed)}


def everything(ranks: MPI.Comm) -> dict[int, Any]:
    """What was found on some ranks, by their number."""
    comm = MpiComm(ranks)
    assert comm.pause_s == comm.nap_s == 0
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        operations(comm, dtype)
    reductions(comm)
    groups(comm)
    large, comm_mpi.LARGEST = comm_mpi.LARGEST, 7  # bytes: whatever is more is sent as one item
    operations(comm, torch.float32)
    reductions(comm)
    comm_mpi.LARGEST = large
    found = strategies(MpiComm(ranks, nap_s=1e-4), ranks)
    return {comm.size: found} if found else {}


def main() -> None:
    """On all ranks; of four, then also on three beside one."""
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    found = everything(world)
    if world.size == 4:
        found |= everything(world.Split(int(world.rank == 3)))
    of_ranks = world.gather(found)
    if of_ranks is not None:
        print(json.dumps({size: told for one in of_ranks for size, told in one.items()}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
