"""``cpbench.distributed_mix`` on ranks of Gloo: against the recurrence in float64, what it sends,
and ranks that disagree."""

from __future__ import annotations

from typing import Any

import naive_mixers
import pytest
import torch
from naive_mixers import Named
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

import cpbench
from cpbench import masks
from cpbench.api.group_member import member_of
from cpbench.layout import build as build_layout

TOKENS, SCALE = 67, 0.3  # not divisible by the ranks
STARTS = (0, 20, 21, 50)
MASK = masks.from_cu_seqlens([*STARTS, TOKENS])


def shards_of(x: Named, rank: int, size: int, layout: str) -> Named:
    chosen = build_layout(layout, TOKENS, size, MASK)
    return {
        name: (y.clone() if name == "initial_state" else chosen.shard(y, rank)).requires_grad_()
        for name, y in x.items()
    }


def _mix(rank: int, size: int, mixer: str, dtype: torch.dtype, ways: list[tuple[str, str]]) -> Any:
    """For each way: out, the state, and gradients by name, of which those of states are summed; and
    whether what was sent is what the trace says."""
    results = []
    for strategy, layout in ways:
        x = naive_mixers.make_inputs(mixer, 1, TOKENS, 4, 6, 5, dtype)
        leaves = shards_of(x, rank, size, layout)
        options = {
            "mixer": mixer, "mask": MASK, "scale": SCALE, "strategy": strategy, "layout": layout,
        }  # fmt: skip
        member = member_of(None)
        cpbench.distributed_mix(**leaves, **options)  # agrees and connects
        traffic = member.comm.traffic
        traffic.clear()
        out, state = cpbench.distributed_mix(**leaves, **options)
        forward = traffic.bytes_sent
        dout, dstate = seeds(dtype)
        chosen = build_layout(layout, TOKENS, size, MASK)
        loss = (out * chosen.shard(dout, rank)).sum() + (state * dstate).sum() / size
        found = torch.autograd.grad(loss, tuple(leaves.values()), retain_graph=True)
        traffic.clear()
        torch.autograd.grad(out.sum(), leaves["q"])
        *_, (_, work) = member.prepared.values()
        phases = work.trace_messages().phases
        counted = (forward, traffic.bytes_sent) == tuple(
            sum(phases[phase].bytes_to) for phase in ("fwd", "bwd")
        )
        by_name = {f"d{name}": y for name, y in zip(leaves, found, strict=True)}
        by_name |= {"out": out.detach(), "state": state.detach()}
        results.append(({name: y.double().numpy() for name, y in by_name.items()}, counted))
    return results


def seeds(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    dout = torch.randn(1, TOKENS, 4, 5, generator=random).to(dtype)
    return dout, torch.randn(1, 4, 6, 5, generator=random)


WAYS = [
    ("scan", "contiguous"), ("scan", "zigzag"), ("scan:by=ring,blocks=2", "contiguous"),
    ("scan:by=ring", "zigzag"), ("scan:by=doubling", "zigzag"), ("scan", "zigzag_document"),
    ("ulysses", "striped"), ("ulysses:pad=true", "dispatch"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mixer", "size", "dtype"),
    [
        ("gated_deltanet", 2, torch.float32), ("kda", 4, torch.float32),
        ("gla", 3, torch.bfloat16), ("retention", 2, torch.float64),
    ],
)  # fmt: skip
def test_real_ranks(mixer: str, size: int, dtype: torch.dtype) -> None:
    x = naive_mixers.make_inputs(mixer, 1, TOKENS, 4, 6, 5, dtype)
    ways = [way for way in WAYS if size != 3 or way[0] != "ulysses"]
    gradients, out, state = naive_mixers.gradients(x, mixer, SCALE, *seeds(dtype), STARTS)
    wanted = {"out": out, "state": state} | {f"d{n}": y for n, y in gradients.items()}
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    by_rank = run_ranks(size, _mix, mixer, dtype, ways)
    for (strategy, layout), *results in zip(ways, *by_rank, strict=True):
        found, counted = zip(*results, strict=True)
        assert all(counted), (strategy, layout)
        for name, y in wanted.items():
            parts = [torch.from_numpy(of_rank[name]) for of_rank in found]
            if name == "state":
                assert all(torch.equal(part, parts[0]) for part in parts)
                whole = parts[0]
            elif name == "dinitial_state":
                whole = torch.stack(parts).sum(0)
            else:
                whole = build_layout(layout, TOKENS, size, MASK).unshard(parts)
            error = max(naive_mixers.head_errors(whole, y, 1 if "state" in name else 2))
            limit = tolerance * (10 if name == "dg" else 1)  # gates of 20 nats a token
            assert error < limit, (strategy, layout, name, error)


def _chained(rank: int, size: int) -> list[Any]:
    """Two calls, the second from the state of the first; the loss uses the second alone."""
    x = naive_mixers.make_inputs("gated_deltanet", 1, 64, 2, 8, 8)
    initial = x.pop("initial_state")
    layout = build_layout("zigzag", 32, size)
    halves = [
        {n: layout.shard(y[:, part], rank).requires_grad_() for n, y in x.items()}
        for part in (slice(32), slice(32, None))
    ]
    _, state = cpbench.distributed_mix(**halves[0], initial_state=initial, layout="zigzag")
    out, last = cpbench.distributed_mix(**halves[1], initial_state=state, layout="zigzag")
    loss = out.square().sum() + last.square().sum() / size
    return [y.numpy() for y in torch.autograd.grad(loss, tuple(halves[0].values()))]


def test_the_state_of_a_call_goes_into_the_next() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 64, 2, 8, 8)
    leaves = {name: y.requires_grad_() for name, y in x.items()}
    out, state = cpbench.mix(**leaves)
    loss = out[:, 32:].square().sum() + state.square().sum()
    names = [name for name in leaves if name != "initial_state"]
    expected = torch.autograd.grad(loss, [leaves[name] for name in names])
    ranks = run_ranks(2, _chained)
    layout = build_layout("zigzag", 32, 2)
    for *parts, whole in zip(*ranks, expected, strict=True):
        shards = [torch.from_numpy(part) for part in parts]
        torch.testing.assert_close(layout.unshard(shards), whole[:, :32])


def _in_pytorch(rank: int, size: int) -> list[Any]:
    x = naive_mixers.make_inputs("kda", 1, TOKENS, 2, 8, 4, torch.float32)
    leaves = shards_of(x, rank, size, "contiguous")
    tensors = tuple(leaves.values())

    def run(*given: torch.Tensor) -> torch.Tensor:
        named = dict(zip(leaves, given, strict=True))
        return cpbench.distributed_mix(**named, mixer="kda", mask=MASK)[0]

    first = torch.autograd.grad(run(*tensors).sum(), tensors)
    kept = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).sum(), tensors)
    same = all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(*tensors).dtype
    with torch.inference_mode():
        inference = run(*(y.clone() for y in tensors)).is_inference()
    messages = []
    (dq,) = torch.autograd.grad(run(*tensors).square().sum(), tensors[:1], create_graph=True)
    for wrong in (lambda: dq.sum().backward(), lambda: change(run(*tensors), leaves["k"])):
        try:
            wrong()
        except RuntimeError as error:
            messages.append(str(error))
    return [same, cast, inference, *messages]


def change(out: torch.Tensor, k: torch.Tensor) -> None:
    with torch.no_grad():
        k.mul_(2)
    out.sum().backward()


def test_in_pytorch() -> None:
    for same, cast, inference, twice, in_place in run_ranks(2, _in_pytorch):
        assert same
        assert cast == torch.bfloat16
        assert inference
        assert "differentiate twice" in twice
        assert "inplace operation" in in_place


def _wrong_on_one_rank(rank: int, size: int) -> list[str]:
    """What each mistake of rank 1 raises, each followed by a right call."""
    x = naive_mixers.make_inputs("gated_deltanet", 1, 32, 2, 4, 3, torch.float32)
    layout = build_layout("contiguous", 32, size)
    right = {n: y if n == "initial_state" else layout.shard(y, rank) for n, y in x.items()}
    wrong: list[dict[str, Any]] = [
        {n: right[n][:, :4] for n in ("q", "k", "v", "g", "beta")} | {"mask": right_mask()},
        {"g": None},
        {"g": right["g"].double()},
        {"initial_state": None},
        {"mixer": "atlas"},
        {"mixer": "gated_deltanet:chunk=32"},
        {"strategy": "ring"},
        {"strategy": "scan:by=ring"},
        {"layout": "striped"},
        {"mask": "full"},
        {"scale": float("nan")},
        {"q": right["q"].clone().requires_grad_()},
    ]
    everywhere: list[dict[str, Any]] = [
        {"layout": "striped"}, {"strategy": "ring"}, {"strategy": "scan:by=tree"},
        {"mixer": "gated_deltanet:kernel=triton"}, {"strategy": "ulysses", "layout": "circle"},
    ]  # fmt: skip
    messages = []
    for mistakes, at in ((wrong, rank == 1), (everywhere, True)):
        for mistake in mistakes:
            try:
                cpbench.distributed_mix(**(right | (mistake if at else {})))
                messages.append("")
            except Exception as error:
                messages.append(f"{type(error).__name__}: {error}")
            cpbench.distributed_mix(**right)
    return messages


def right_mask() -> Any:
    return masks.build("causal", 32)


def test_all_ranks_raise_what_one_has_wrong_and_go_on() -> None:
    first, second = run_ranks(2, _wrong_on_one_rank)
    assert first == second
    disagree = "RuntimeError: ranks disagree on the problem: "
    expected = [
        "ValueError: rank 1: q has 4 tokens; layout contiguous assigns 16 of 32 to each of 2 ranks",
        "ValueError: rank 1: gated_deltanet needs g, of shape [1, 16, 2]",
        disagree, disagree,
        "ValueError: rank 1: atlas is not a mixer: its memory is an MLP trained with Muon",
        disagree,
        "ValueError: rank 1: no strategy 'ring' distributes mixers; there are: scan, ulysses",
        disagree, disagree,
        "ValueError: rank 1: gated_deltanet takes the masks causal, causal_document, not <AttnMask",
        "ValueError: rank 1: scale must be a finite number or None, not nan",
        disagree,
        "Unsupported: scan takes layouts contiguous, zigzag, zigzag_document, dispatch, not",
        "ValueError: no strategy 'ring' distributes mixers; there are: scan, ulysses",
        "Unsupported: scan: by = 'tree' is not one of allgather, ring, doubling",
        "Unsupported: scan: gated_deltanet: kernel=triton computes no summaries of runs",
        "Unsupported: no layout 'circle'; there are: contiguous, ",
    ]  # fmt: skip
    for message, start in zip(first, expected, strict=True):
        assert message.startswith(start), message
        assert "\n" not in message
