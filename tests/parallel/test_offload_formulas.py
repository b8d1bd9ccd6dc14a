"""Traffic and memory of strategies with ``offload=host``: the closed formulas of docs/offload.md
against the trace, exactly."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from cpbench import masks
from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.layout import build
from cpbench.parallel.tracing.memory_trace import peak_bytes
from cpbench.parallel.tracing.trace import MODULUS, RankTrace, trace_rank
from cpbench.parallel.world import World

CHUNK = 8
CHUNKS = 4  # of the tokens of a rank
UNEQUAL = {"head_dim": 24, "head_dim_v": 16}


@dataclass(frozen=True)
class Sizes:
    """Bytes of ``tokens`` tokens of a rank: q, out, keys and values, keys or values alone
    (whichever are more), and a float32 per query and head."""

    q: int
    o: int
    k: int
    k_or_v: int
    r: int
    f: int  # 4 / e

    @classmethod
    def of(cls, problem: Problem, tokens: int, replicas: int = 1) -> Sizes:
        f = 4 // DTYPE_BYTES[problem.dtype]
        k = problem.kv_bytes(tokens) * replicas
        largest = max(problem.head_dim, problem.value_dim)
        k_or_v = k * largest // (problem.head_dim + problem.value_dim)
        r = 4 * problem.batch * tokens * problem.heads_q
        return cls(problem.q_bytes(tokens), problem.out_bytes(tokens), k, k_or_v, r, f)


def world_of(size: int, mask_text: str = "full", tokens: int = 0, **changes: Any) -> World:
    tokens = tokens or CHUNK * CHUNKS * size
    values = {"batch": 1, "heads_q": 24, "heads_kv": 2, "head_dim": 16, "dtype": "bfloat16"}
    problem = Problem(seq_q=tokens, seq_k=tokens, **{**values, **changes})
    mask = masks.build(mask_text, tokens)
    return World.of(problem, mask, build("contiguous", tokens, size, mask))


def strategy_of(text: str) -> Any:
    spec = Spec.parse(text)
    return implementation(strategy_info(spec.name), spec.kwargs)


def offloaded(name: str, *more: str, chunk: int = CHUNK) -> str:
    return f"{name}:{','.join(('offload=host', f'chunk={chunk}', *more))}"


@functools.lru_cache(maxsize=1)
def traced(strategy: str, world: World) -> list[RankTrace]:
    """The traces of all ranks, whose checksums match."""
    made, op = strategy_of(strategy), operator_info("bands")
    ranks = [trace_rank(made, op, world, rank) for rank in range(world.size)]
    assert sum(rank.checksum for rank in ranks) % MODULUS == 0
    return ranks


def copied(strategy: str, world: World, phase: str) -> tuple[int, int]:
    """Bytes to the device and to host memory; all ranks copy the same under these masks."""
    phases = [rank.phases[phase] for rank in traced(strategy, world)]
    (copies,) = {(trace.to_device, trace.to_host) for trace in phases}
    return copies


def sent(strategy: str, world: World, phase: str) -> list[int]:
    return [sum(rank.phases[phase].bytes_to) for rank in traced(strategy, world)]


def streamed(s: Sizes, rows: int, columns: int, visits: int, f_dk: int = 1) -> Any:
    """What a grid of chunks copies: (to device, to host) forward, and backward.

    Args:
        s: of a chunk.
        visits: of chunks of keys to the device.
        f_dk: bytes of a gradient of keys over those of keys.
    """
    again = visits - columns
    forward = rows * s.q + visits * s.k, rows * (s.o + s.r)
    backward = (
        rows * (s.q + 2 * s.o + s.r) + visits * s.k + again * s.f * s.k,
        rows * s.q + again * s.f * s.k + columns * f_dk * s.k,
    )
    return forward, backward


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [{}, UNEQUAL, {"heads_kv": 24, "batch": 2}])
@pytest.mark.parametrize(
    ("mask", "visits"),
    [
        ("full", CHUNKS**2),
        ("causal", CHUNKS * (CHUNKS + 1) // 2 - 1),  # the first chunk serves two rows in turn
        (f"sliding_window_causal:window={CHUNK}", CHUNKS),  # each chunk serves two rows in turn
        (f"causal_document:doc_lens=[{CHUNK},{CHUNK},{2 * CHUNK}]", 2 + 2),
    ],
)
def test_copies_of_single(mask: str, visits: int, shape: dict[str, Any], dtype: str) -> None:
    world = world_of(1, mask, dtype=dtype, **shape)
    forward, backward = streamed(Sizes.of(world.problem, CHUNK), CHUNKS, CHUNKS, visits)
    assert copied(offloaded("single"), world, "fwd") == forward
    assert copied(offloaded("single"), world, "bwd") == backward


def test_one_chunk_is_copied_once() -> None:
    world = world_of(1, "causal")
    local = Sizes.of(world.problem, CHUNK * CHUNKS)
    assert copied("single:offload=host", world, "fwd") == (local.q + local.k, local.o + local.r)
    backward = local.q + 2 * local.o + local.r + local.k, local.q + local.k
    assert copied("single:offload=host", world, "bwd") == backward


def test_chunks_that_are_not_seen_are_not_copied() -> None:
    """The first half sees nothing and is not seen."""
    tokens = CHUNK * CHUNKS
    mask = masks.AttnMask.from_slices(tokens, tokens, [(16, tokens, 16, tokens, -100, 100)])
    problem = world_of(1).problem
    world = World.of(problem, mask, build("contiguous", tokens, 1, mask))
    forward, backward = streamed(Sizes.of(problem, CHUNK), CHUNKS // 2, CHUNKS // 2, 4)
    assert copied(offloaded("single"), world, "fwd") == forward
    assert copied(offloaded("single"), world, "bwd") == backward


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [{}, UNEQUAL])
def test_ulysses(size: int, shape: dict[str, Any]) -> None:
    world = world_of(size, **shape)
    replicas = max(2, size) // 2  # two key/value heads on P ranks
    s, own = (Sizes.of(world.problem, CHUNK * CHUNKS, n) for n in (replicas, 1))
    chunk = Sizes.of(world.problem, CHUNK, replicas)
    (down, up), (down_b, up_b) = streamed(chunk, CHUNKS, CHUNKS, CHUNKS**2)
    strategy = offloaded("ulysses")
    forward = down + s.q + own.k + s.o, up + s.q + s.k + s.o
    assert copied(strategy, world, "fwd") == forward
    assert copied(strategy, world, "bwd") == (down_b + s.o + s.q + s.k, up_b + s.o + s.q + own.k)
    exchanged = (s.q + s.o + s.k) * (size - 1) // size
    assert sent(strategy, world, "fwd") == sent(strategy, world, "bwd") == [exchanged] * size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ring_allgather(size: int, dtype: str) -> None:
    world = world_of(size, dtype=dtype)
    s, n = Sizes.of(world.problem, CHUNK * CHUNKS), size - 1
    chunk, columns = Sizes.of(world.problem, CHUNK), size * CHUNKS
    (down, up), (down_b, up_b) = streamed(chunk, CHUNKS, columns, CHUNKS * columns, s.f)
    strategy = offloaded("ring_allgather")
    assert copied(strategy, world, "fwd") == (down + s.k, up + size * s.k)
    assert copied(strategy, world, "bwd") == (down_b + size * s.f * s.k, up_b + s.k)
    assert sent(strategy, world, "fwd") == [n * s.k] * size
    assert sent(strategy, world, "bwd") == [n * s.f * s.k] * size  # keys are kept in host memory


@pytest.mark.parametrize(("a", "b"), [(1, 4), (2, 2), (4, 1), (2, 4)])
@pytest.mark.parametrize("shape", [{}, UNEQUAL])
def test_tile(a: int, b: int, shape: dict[str, Any]) -> None:
    world = world_of(a * b, **shape)
    s, chunk = Sizes.of(world.problem, CHUNK * CHUNKS), Sizes.of(world.problem, CHUNK)
    rows, columns = a * CHUNKS, b * CHUNKS
    (down, up), (down_b, up_b) = streamed(chunk, rows, columns, rows * columns, s.f)
    strategy = offloaded("tile", f"rows={a}")
    queries, keys, results = (a - 1) * s.q, (b - 1) * s.k, s.o + s.r
    forward = down + queries + keys + a * results, up + queries + keys + results
    assert copied(strategy, world, "fwd") == forward
    # Deltas instead of outputs; dq in float32; then sums go back to their owners.
    received = (a - 1) * (s.o + 2 * s.r)
    down_b += a * (s.r - s.o) + 2 * s.o + received + s.f * (a * s.q + b * s.k)
    up_b += a * (s.f - 1) * s.q + s.r + received + s.q + s.k
    assert copied(strategy, world, "bwd") == (down_b, up_b)
    size = a * b
    assert sent(strategy, world, "fwd") == [(a - 1) * (s.q + results) + keys] * size
    returned = (a - 1) * s.f * s.q + (b - 1) * s.f * s.k
    assert sent(strategy, world, "bwd") == [received + returned] * size


def peaks(s: Sizes, name: str, size: int) -> tuple[int, int]:
    """Peak bytes on the device, forward and backward."""
    cast = s.f > 1  # results are not float32
    f = s.f if cast else 0
    forward = s.q + 2 * s.k + (2 + 2 * f) * s.o + 2 * s.r
    backward = (3 + f) * s.q + 2 * s.o + 2 * s.r + (3 + 2 * s.f) * s.k
    if name in ("single", "ulysses"):
        backward += cast * s.k
    if name == "ulysses":
        exchanged = 5 * max(s.q, s.o)
        return max(forward, exchanged), max(backward, exchanged)
    if name == "ring_allgather":
        gathered = (2 * size + 2) * s.k_or_v
        return max(forward, gathered), max(backward, s.f * gathered)
    if name == "tile":
        merged, received = (5 + 2 * f) * s.o + 6 * s.r, 4 * max(s.q, s.k_or_v)
        outputs = (1 + s.f) * s.q + (1 + 2 * s.f) * s.o + 5 * s.r + (2 + 2 * s.f) * s.k
        delta = (4 + (3 * s.f if cast else 1)) * s.o + s.r
        summed = (1 + 4 * s.f) * max(s.q, s.k_or_v)
        return max(forward, merged, received), max(backward + s.r, outputs * cast, delta, summed)
    return forward, backward


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [{}, UNEQUAL, {"heads_kv": 24}])
@pytest.mark.parametrize(
    ("name", "size"),
    [("single", 1), ("ulysses", 2), ("ulysses", 4), ("ring_allgather", 2), ("ring_allgather", 6),
     ("tile", 4)],
)  # fmt: skip
def test_peak_memory_of_the_device(name: str, size: int, shape: dict[str, Any], dtype: str) -> None:
    more = ["rows=2"] if name == "tile" else []
    strategy = strategy_of(offloaded(name, *more))
    world = world_of(size, dtype=dtype, **shape)
    assert strategy.unsupported(world) is None
    replicas = max(1, size // world.problem.heads_kv) if name == "ulysses" else 1
    expected = peaks(Sizes.of(world.problem, CHUNK, replicas), name, size)
    for direction, peak in zip(("fwd", "bwd"), expected, strict=True):
        world = world_of(size, dtype=dtype, direction=direction, **shape)
        found = peak_bytes(strategy, operator_info("bands"), world, 0)
        assert found.device == peak, direction
        assert found.host > 0


def test_the_peak_does_not_grow_with_the_sequence_but_that_of_the_host_does() -> None:
    strategy = strategy_of(offloaded("single"))
    found = [
        peak_bytes(strategy, operator_info("bands"), world_of(1, "causal", tokens=tokens), 0)
        for tokens in (CHUNK * 3, CHUNK * 8, CHUNK * 16, CHUNK * 24 + 3)
    ]
    assert found[0].device == found[1].device == found[2].device >= found[3].device
    assert found[0].host < found[1].host < found[2].host < found[3].host


def test_other_strategies_have_nothing_in_host_memory() -> None:
    assert peak_bytes(strategy_of("single"), operator_info("bands"), world_of(1), 0).host == 0
