"""Strategies with ``offload=host``: results, device memory under a hard limit, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import any_mask
import matrix
import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from run_cpbench import cpbench as run_command

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import QKV, Unsupported
from cpbench.core.problem import Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.host_memory.account import MemoryAccount, PeakBytes
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.results.store import read_run
from cpbench.tools.traffic import comparison, comparison_lines, predict_traffic, table

SINGLE = "single:offload=host,chunk={}"
LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}


def attention(
    mask: Any, strategy: str, operator: str = "bands", heads: tuple[int, int] = (4, 2), **sizes: Any
) -> Attention:
    values = {"batch": 1, "head_dim": 8, "dtype": "float32", **sizes}
    problem = Problem(
        seq_q=mask.seq_q, seq_k=mask.seq_k, heads_q=heads[0], heads_kv=heads[1], **values
    )
    world = World.of(problem, mask, build("contiguous", mask.seq_k, 1))
    return Attention(operator, strategy, world, 0, "cpu")


def inputs_of(work: Attention) -> list[torch.Tensor]:
    p = work.problem
    dtype = getattr(torch, p.dtype)
    q, k, v, dout = naive.random_inputs(
        p.batch, max(p.seq_q, p.seq_k), p.heads_q, p.heads_kv, p.head_dim, dtype
    )
    return [q[:, : p.seq_q], k[:, : p.seq_k], v[:, : p.seq_k], dout[:, : p.seq_q]]


def results_of(work: Attention, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    *qkv, dout = inputs
    out, lse, saved = work.forward(QKV(*qkv), None)
    gradients = work.backward(dout, saved, None)
    return dict(zip(naive.TENSORS, (out, lse, *gradients), strict=True))


@settings(max_examples=25, deadline=None)
@given(any_mask.masks(), st.integers(1, 9))
def test_any_mask(mask: AttnMask, chunk: int) -> None:
    work = attention(mask, SINGLE.format(chunk), batch=2)
    inputs = inputs_of(work)
    results, expected = results_of(work, inputs), naive.attention(*inputs, mask)
    for name, result in results.items():
        assert naive.error(result, expected[name]) < LIMIT["float32"], name
    assert work.op.pairs == 2 * 4 * mask.area  # each visible pair in both passes


@pytest.mark.parametrize("operator", ["bands", "reference", "sdpa.cpu_flash"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_that_merge(operator: str, dtype: str) -> None:
    mask = masks.build("causal_document:doc_lens=[20,30,13]", 63)
    work = attention(mask, SINGLE.format(10), operator, dtype=dtype)
    inputs = inputs_of(work)
    results, expected = results_of(work, inputs), naive.attention(*inputs, mask)
    for name, result in results.items():
        assert naive.error(result, expected[name]) < LIMIT[dtype], name


def test_a_mask_per_head() -> None:
    mask = masks.build_heads("block_sparse_uniform:block_size=16,keep=0.3", 90, 4)
    work = attention(mask, SINGLE.format(20))
    inputs = inputs_of(work)
    results = results_of(work, inputs)
    for name, expected in results_of(attention(mask, "single"), inputs).items():
        assert naive.error(results[name], expected) < LIMIT["float32"], name


FEW = [
    matrix.Combination(f"{name}:offload=host,chunk=3{more}", layout, mask, *shape, nodes=2)
    for name, more in (("ulysses", ""), ("ring_allgather", ""), ("tile", ",rows=2"))
    for layout, mask, shape in (
        ("zigzag", "causal", matrix.SHAPES[2]),
        ("striped", f"share_question:{matrix.DOCS}", matrix.SHAPES[4]),
    )
]  # fmt: skip


def test_several_chunks_on_each_of_four_ranks() -> None:
    outcomes = zip(*run_ranks(4, matrix.run, FEW), strict=True)
    faults = [
        fault
        for case, ranks in zip(FEW, outcomes, strict=True)
        for fault in matrix.faults(case, list(ranks), LIMIT)
    ]
    assert not faults, "\n".join(faults)


def _gradients(rank: int, size: int, strategy: str) -> list[torch.Tensor]:
    """Through out and lse, by autograd."""
    mask = masks.build("causal", 24)
    layout = build("zigzag", 24, size)
    q, k, v, dout = (
        layout.shard(x, rank) for x in naive.random_inputs(1, 24, 4, 2, 8, torch.float32)
    )
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.distributed_attention(q, k, v, mask, strategy=strategy)
    assert lse is not None
    ((out * dout).sum() + lse.square().sum()).backward()
    return [x.grad for x in (q, k, v) if x.grad is not None]


def _differences(rank: int, size: int, strategies: list[str]) -> list[float]:
    """The largest relative difference from the gradients of ``ring``, by strategy."""
    expected = _gradients(rank, size, "ring")
    return [
        max(map(naive.error, _gradients(rank, size, strategy), expected)) for strategy in strategies
    ]


def test_the_public_function_is_differentiable() -> None:
    strategies = [
        "ulysses:offload=host,chunk=5", "ring_allgather:offload=host,chunk=5",
        "tile:offload=host,chunk=5,rows=2",
    ]  # fmt: skip
    for differences in run_ranks(2, _differences, strategies):
        assert max(differences) < LIMIT["float32"], differences


# --- memory -------------------------------------------------------------------------------------

CHUNK = 64


def peak_of_a_pass(strategy: str, chunks: int, limit: int | None = None) -> PeakBytes:
    """Of a forward and a backward pass with real tensors; inputs count where they are."""
    mask = masks.build("causal", CHUNK * chunks)
    work = attention(mask, strategy, heads=(8, 2), head_dim=32, dtype="bfloat16")
    inputs = inputs_of(work)
    account = MemoryAccount(inputs if work.offloaded else (), limit)
    with account:
        if not work.offloaded:
            inputs = [x.clone() for x in inputs]
        results_of(work, inputs)
    return account.peak


def test_device_memory_has_a_limit_whatever_the_length() -> None:
    offloaded = SINGLE.format(CHUNK)
    peaks = [peak_of_a_pass(offloaded, chunks) for chunks in (3, 6)]
    assert peaks[0].device == peaks[1].device
    assert peaks[1].host > 1.9 * peaks[0].host
    limit = peaks[0].device
    assert peak_of_a_pass(offloaded, 12, limit).device == limit
    with pytest.raises(torch.OutOfMemoryError, match=f"of a device that has {limit}"):
        peak_of_a_pass("single", 12, limit)
    with pytest.raises(torch.OutOfMemoryError):  # the limit is tight
        peak_of_a_pass(offloaded, 3, limit - 1)
    with pytest.raises(torch.OutOfMemoryError):  # a larger chunk does not fit
        peak_of_a_pass(SINGLE.format(2 * CHUNK), 3, limit)


# --- what is refused, and what is said ----------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "operator", "mask", "reason"),
    [
        ("single:offload=disk", "bands", "causal", "single: offload = 'disk' is not host"),
        ("single:offload=host,chunk=0", "bands", "causal", "chunk = 0 must be 1 token or more"),
        ("single:chunk=8", "bands", "causal", "single takes no chunk without offload=host"),
        ("ulysses:offload=host,chunks=2", "bands", "causal", "takes no chunks with offload=host"),
        ("single:offload=host,chunk=x", "bands", "causal", "chunk = 'x' is not an integer"),
        ("single:offload=host", "sdpa.math", "causal", "merges partial results"),
        ("single:offload=host", "moba", "causal", "a selector, which takes no offload"),
        ("single:offload=host", "dilated", "dilated:segment=16,branches=1,ratio=2", "dilated"),
    ],
)
def test_refusals(strategy: str, operator: str, mask: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        attention(masks.build_heads(mask, 32, 4), strategy, operator)
    assert len(str(refused.value).splitlines()) == 1
    assert not isinstance(refused.value, Unsupported) or operator != "bands"


def _refusal_of_gpu_tensors(rank: int, size: int) -> str:
    from cpbench.api.distributed import device_of
    from cpbench.api.group_member import GroupMember
    from cpbench.core.spec import Spec

    member = GroupMember(None)
    strategy = Spec.parse("ulysses:offload=host")
    assert device_of(member, torch.zeros(1), strategy) == "cpu"
    assert device_of(member, torch.zeros(1, device="meta"), Spec("ring")) == "meta"
    with pytest.raises(ValueError, match="in host memory") as refused:
        device_of(member, torch.zeros(1, device="meta"), strategy)
    return str(refused.value)


def test_tensors_have_to_be_in_host_memory() -> None:
    (reason,) = run_ranks(1, _refusal_of_gpu_tensors)
    assert reason.startswith("ulysses:offload=host takes q, k and v in host memory")


SWEEP = """
[sweep]
operator = "bands"
strategy = ["single", "single:offload=host,chunk=128"]
mask = "causal"
seq_len = 512
num_heads_q = 4
num_heads_kv = 2
[measure]
max_iterations = 2
min_iterations = 2
"""


def test_what_a_run_records(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    code, stderr = run_command("run", file, "--out", out, "--trace")
    assert code == 0, stderr
    by_strategy = {str(r.case.strategy): r for r in read_run(out).records.values()}
    alone, record = by_strategy["single"], by_strategy["single:chunk=128,offload=host"]
    assert record.status == alone.status == "ok"
    assert alone.bytes_to_device == alone.predicted_to_host == {}
    assert "single:chunk=128" in record.case.label
    assert record.bytes_to_device == record.predicted_to_device
    assert record.bytes_to_host == record.predicted_to_host
    assert "mispredicted" not in record.flags
    memory = record.memory_bytes
    assert memory["host"] == memory["predicted_host"]
    assert memory["peak"][0] >= memory["predicted"][0]
    assert record.exposure is not None  # of copies, on one rank
    assert alone.exposure is None
    rows = cpbench.load(out).set_index("strategy")
    row = rows.loc["single:chunk=128,offload=host"]
    copied = sum(phase[0] for phase in record.bytes_to_device.values())
    assert row["to_device_mb"] == row["predicted_to_device_mb"] == copied / 1e6
    assert row["host_peak_mb"] == row["predicted_host_peak_mb"] == memory["host"][0] / 1e6
    trace = json.loads((out / "traces" / f"{record.case.id}.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"to device", "to host", "wait for to device"} <= names


def test_cpbench_traffic_shows_copies() -> None:
    case = next(iter(read_case("single:offload=host,chunk=1024")))
    prediction = predict_traffic(case)
    assert prediction["bytes_to_device_per_rank"][0] > prediction["bytes_to_host_per_rank"][0] > 0
    assert prediction["host_buffers_bytes"]["0"] > prediction["buffers_bytes"]["0"]
    (*_, last) = table(prediction)
    assert float(last["MB to device"]) == round(prediction["bytes_to_device_per_rank"][0] / 1e6, 1)
    (plain,) = read_case("single")
    assert not any("MB to device" in row for row in table(predict_traffic(plain)))
    head = " ".join(comparison_lines(comparison([case, plain], None))[:6])
    assert "device" in head
    assert "host" in head


def read_case(strategy: str) -> list[Any]:
    from cpbench.sweep.sweep_file import expand_table

    return list(expand_table({"operator": "bands", "strategy": strategy, "mask": "causal",
                              "seq_len": "8k", "num_heads_q": 8, "num_heads_kv": 2}))  # fmt: skip
