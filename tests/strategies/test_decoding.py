"""Decoding on several ranks: results against plain loops in float64, bytes against their trace and
against formulas; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive_decoding import naive_decode
from ranks import run_ranks

from cpbench.api import Attention, find_disagreement
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Case
from cpbench.inputs import Recipe
from cpbench.masks.paged.batch import PagedBatch
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.world import World
from cpbench.simulator.cluster import load
from cpbench.simulator.prediction import predict
from cpbench.sweep import sweep_file
from cpbench.verify.check import rank_inputs

LENS, DIM, VALUE_DIM = [70, 1, 48, 129, 33], 16, 8
METHODS = [
    ("tree", "paged.gathered", 8, 2),
    ("tree", "bands", 6, 6),
    ("tree", "paged.gathered", 4, 1, [129]),  # fewer sequences than ranks
    ("ulysses", "paged.gathered", 8, 8),
    ("ulysses", "paged.sdpa", 12, 6),  # returns no lse, which nothing needs
    ("ulysses", "bands", 12, 1),  # fewer key/value heads than ranks
    ("ulysses:pad=true", "paged.gathered", 8, 2),  # heads that query heads share unevenly
    ("ulysses:pad=true", "bands", 7, 7),
]


def _case(
    size: int, strategy: str, operator: str, heads_q: int, heads_kv: int,
    lens: list[int] = LENS, **keys: Any,
) -> Case:  # fmt: skip
    table = {
        "phase": "decode", "key_lens": lens, "page_size": 16, "operator": operator,
        "strategy": strategy, "world_size": size, "num_heads_q": heads_q, "num_heads_kv": heads_kv,
        "head_dim": DIM, "head_dim_v": VALUE_DIM,
    }  # fmt: skip
    (case,) = sweep_file.expand_table({**table, **keys})
    return case


def _run(rank: int, size: int) -> list[Any]:
    """Of each method: the fingerprint, largest error, bytes traced and sent to every rank."""
    comm, found = TorchComm(), []
    for method in METHODS:
        case = _case(size, *method)
        world = World.of_case(case, size)
        try:
            work = Attention(case.operator, case.strategy, world, rank, "cpu")
        except Unsupported as refusal:
            found.append(str(refusal))
            continue
        x = rank_inputs(work, Recipe(3), "cpu")
        comm.traffic.clear()
        out, _, _ = work.forward(work.inputs_of(x), comm, need_lse=False)
        counted = list(comm.traffic.bytes_to)
        repeated, lse, _ = work.forward(work.inputs_of(x), comm)
        assert torch.equal(out, repeated)
        found.append((work.fingerprint, _error(case, work, x["q"], out, lse),
                      work.trace.phases["fwd"].bytes_to, counted))  # fmt: skip
    return found


def _error(case: Case, work: Attention, q: torch.Tensor, out: torch.Tensor, lse: Any) -> float:
    """The largest difference from plain loops over the sequences whose queries are here."""
    batch, largest = PagedBatch.of_case(case), 0.0
    for local, b in enumerate(work.world.queries.positions(work.rank)):
        if b >= case.batch:
            continue
        keys, values = (
            Recipe(3).make(name, work.problem, batch.slots_of(int(b)), batches=[0],
                           heads=range(case.num_heads_kv), device="cpu")[0] for name in "kv"
        )  # fmt: skip
        expected, expected_lse = naive_decode(q[0, local, None], [keys], [values])
        largest = max(largest, float((out[0, local] - expected[0]).abs().max()))
        if lse is not None:
            largest = max(largest, float((lse[0, :, local] - expected_lse[0]).abs().max()))
    return largest


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_decode_unequal_lengths(size: int) -> None:
    ranks = run_ranks(size, _run)
    for method, *found in zip(METHODS, *ranks, strict=True):
        strategy, _, heads_q, heads_kv, *_ = method
        if strategy == "ulysses" and (heads_q % size or (heads_kv % size and size % heads_kv)):
            assert all("divisible by the ranks that share them" in reason for reason in found)
            continue
        fingerprints, errors, traced, counted = zip(*found, strict=True)
        assert find_disagreement(fingerprints) is None, method
        assert max(errors) < 2e-6, method
        assert traced == counted, method
        if len(method) == 5 and size == 3:  # all-reduces of q, lse, and numerator with denominator
            tensors = (heads_q * elements * 4 for elements in (DIM, 1, VALUE_DIM + 1))
            assert {sum(row) for row in counted} == {
                2 * (size - 1) * sum(-(-nbytes // size) for nbytes in tensors)
            }
        if method[:1] == ("ulysses",):  # queries and results of a few tokens, and no keys
            a_query = -(-len(LENS) // size) * heads_q * 4 // size
            assert {sum(row) for row in counted} == {a_query * (DIM + VALUE_DIM) * (size - 1)}


def test_the_cache_of_a_rank_is_that_of_its_heads() -> None:
    for strategy, heads, held in (
        ("ulysses", (8, 4), [(0, 1), (2, 3)]),
        ("ulysses", (8, 1), [(0,), (0,)]),
        ("ulysses:pad=true", (6, 3), [(0, 0, 1), (1, 2, 2)]),  # three heads of one query head each
    ):
        case = _case(2, strategy, "paged.gathered", *heads)
        world = World.of_case(case, 2)
        for rank in range(2):
            work = Attention(case.operator, case.strategy, world, rank, "cpu")
            x = rank_inputs(work, Recipe(), "cpu")
            slots = PagedBatch.of_case(case).slots
            assert x["k"].shape == (1, slots, len(held[rank]), DIM)
            whole = Recipe().make("k", work.problem, world.keys.positions(0), batches=[0],
                                  heads=range(heads[1]), device="cpu")  # fmt: skip
            first = whole[:, :, list(held[rank])]
            assert torch.equal(x["k"][:, : first.shape[1]], first)


@pytest.mark.parametrize(
    ("strategy", "heads", "size", "reason"),
    [
        ("ulysses", (8, 2), 3, "num_heads_q divisible by the ranks that share them: 8 on 3"),
        ("ulysses", (12, 3), 2, "num_heads_kv divisible by the ranks"),
        ("ulysses:pad=true", (2, 2), 4, "divides the cache by heads: 2 on 4 ranks"),
        ("ulysses:chunks=2", (8, 2), 2, "ulysses takes no chunks for decoding"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(
    strategy: str, heads: tuple[int, int], size: int, reason: str
) -> None:
    case = _case(size, strategy, "bands", *heads)
    with pytest.raises(ValueError, match=reason):
        Attention(case.operator, case.strategy, World.of_case(case, size), 0, "cpu")


def test_the_time_of_decoding_is_not_predicted() -> None:
    case = _case(2, "tree", "flash_attn.3", 8, 8, head_dim=128, head_dim_v=0, dtype="bfloat16")
    with pytest.raises(ValueError, match="time of decoding is not predicted"):
        predict(case, load("h100-ib"))
