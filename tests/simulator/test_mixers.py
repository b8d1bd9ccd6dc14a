"""Sequence mixers: what is recorded of them, their costs, fits to single ranks, and predictions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_calibration import ENVIRONMENT, TABLE, write_links, write_records
from made_records import record

from cpbench import masks
from cpbench.core.problem import Case, Problem
from cpbench.core.registry import implementation, operator_info, strategies
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.trace import trace_rank
from cpbench.parallel.world import World
from cpbench.simulator.calibration.mixers import MixerPoint
from cpbench.simulator.cluster import Cluster, from_table, load
from cpbench.simulator.costs import mix_seconds
from cpbench.simulator.events import Kernel, Mix, Post, Wait
from cpbench.simulator.prediction import predict
from cpbench.simulator.recording import record_rank
from cpbench.simulator.tiles import Tiling
from cpbench.tools.calibration.calibrate import calibrate
from cpbench.tools.recommendation.recommend import recommend

NO_TILES = Tiling((1, 1), (1, 1), "mask")
MIXERS = ("linear", "retention", "ssd", "gla", "gated_deltanet", "kda", "ttt:chunk=16")
WAYS = ("scan", "scan:by=ring,blocks=2", "scan:by=doubling", "ulysses", "ulysses:pad=true")
MIXER = {
    "source": "-", "operators": ["ssd", "gated_deltanet"], "dtype": "bfloat16", "head_dim": 64,
    "fwd": {"tflops": 2, "token_us": 0.03, "call_us": 40},
    "bwd": {"tflops": 3, "token_us": 0.05, "call_us": 60},
}  # fmt: skip
KNOWN = from_table({**TABLE, "mixers": [MIXER]})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def world_of(operator: str, layout: str, mask_text: str, size: int = 4) -> World:
    tokens = 64 * size
    problem = Problem(batch=2, seq_q=tokens, seq_k=tokens, heads_q=8, heads_kv=8, head_dim=16,
                      dtype="bfloat16")  # fmt: skip
    mask = masks.build(mask_text, tokens)
    world = World.of(problem, mask, build_layout(layout, tokens, size, mask), 2)
    return world.with_inputs_of(operator_info(Spec.parse(operator).name))


@pytest.mark.parametrize("operator", MIXERS)
def test_recordings_agree_with_traces_and_compute_each_token_once(operator: str) -> None:
    op = BoundOperator.load(operator, "meta")
    for text, (layout, mask) in itertools.product(
        WAYS, (("zigzag", "causal"), ("contiguous", "causal_document:doc_lens=[96,160]"))
    ):
        spec, world = Spec.parse(text), world_of(operator, layout, mask)
        strategy = implementation(strategies()[spec.name], spec.kwargs, "mixer")
        whole = {"fwd": 0, "bwd": 0}
        for rank in range(4):
            trace = trace_rank(strategy, op, world, rank)
            for phase, program in record_rank(strategy, op, world, rank, NO_TILES).items():
                posts = [event for event in program if isinstance(event, Post)]
                sent = [0] * 4
                for post in posts:
                    for peer, nbytes in post.sends:
                        sent[peer] += nbytes
                assert sent == trace.phases[phase].bytes_to
                assert sorted(e.number for e in program if isinstance(e, Wait)) == sorted(
                    post.number for post in posts
                )
                assert not any(isinstance(event, Kernel) for event in program)
                passes = {"output", "backward", "fwd", "bwd"}
                mixed = [event for event in program if isinstance(event, Mix)]
                whole[phase] += sum(event.flops for event in mixed if event.step in passes)
        assert whole == op.impl.flops(world.problem)  # type: ignore[attr-defined]


def test_the_steps_of_a_scan() -> None:
    """The first of two ranks hands on a state, the second is changed by it; the other way back."""
    strategy = implementation(strategies()["scan"], {}, "mixer")
    op, world = (
        BoundOperator.load("gated_deltanet", "meta"),
        world_of("ssd", "contiguous", "causal", 2),
    )
    world = world.with_inputs_of(op.info)
    steps = [
        [[e.step for e in program if isinstance(e, Mix)] for program in programs.values()]
        for programs in (record_rank(strategy, op, world, rank, NO_TILES) for rank in range(2))
    ]
    assert steps == [
        [["summarise", "output"], ["backward"]],
        [["output", "respond"], ["summarise_back", "backward"]],
    ]
    hidden = record_rank(strategy, op, world, 0, NO_TILES)["fwd"]
    kinds = [type(e).__name__ for e in hidden if not hasattr(e, "stream")]
    assert kinds.index("Post") < max(i for i, kind in enumerate(kinds) if kind == "Mix")
    (summary, output) = (e for e in hidden if isinstance(e, Mix))
    assert summary.flops * 3 == output.flops * 2  # the state is read and updated; out is read too


def test_the_costs_of_a_step() -> None:
    costs = KNOWN.mixers[0]
    assert mix_seconds(Mix("fwd", "output", 1000, 2 * 10**12), costs) == pytest.approx(1 + 7e-5)
    assert mix_seconds(Mix("bwd", "backward", 1000, 3 * 10**12), costs) == pytest.approx(1 + 1.1e-4)
    forward = replace(costs, bwd=None)
    with pytest.raises(ValueError, match="ssd, gated_deltanet: no backward pass was calibrated"):
        mix_seconds(Mix("bwd", "backward", 1, 1), forward)


def single_ranks(
    cluster: Cluster = KNOWN, tokens: tuple[int, ...] = (512, 1024, 4096)
) -> list[Any]:
    """Records of single ranks that take as long as the mixer of a cluster says."""
    records = []
    for operator, length, heads in itertools.product(("ssd", "gated_deltanet"), tokens, (1, 4, 16)):
        one = record(
            operator, mask="causal", seq_len=length, num_heads_q=heads, num_heads_kv=heads,
            head_dim=64, dtype="bfloat16", environment="made",
        )  # fmt: skip
        flops = implementation(operator_info(operator), {}).flops(one.case.problem)
        for phase in ("fwd", "bwd"):
            step = MixerPoint(phase, one.case.problem, flops[phase], 0.0).step
            one.times_us[phase] = [[mix_seconds(step, cluster.mixers[0]) * 1e6] * 3]
        records.append(one)
    return records


def test_known_constants_of_mixers_are_found_and_predict(tmp_path: Path) -> None:
    run = write_records(tmp_path / "run", single_ranks(), {"made": ENVIRONMENT})
    found = calibrate([run], write_links(tmp_path / "links.json"), tmp_path / "known.toml")
    assert [costs.operators for costs in found.cluster.mixers] == [("ssd",), ("gated_deltanet",)]
    for costs, phase in itertools.product(found.cluster.mixers, ("fwd", "bwd")):
        for name, value in MIXER[phase].items():  # type: ignore[attr-defined]
            assert getattr(getattr(costs, phase), name) == pytest.approx(value, rel=0.01), name
    assert (found.cluster.kernels, found.unidentified) == ((), [])
    assert max(found.kernel_errors) < 0.01
    read = load(str(tmp_path / "known.toml"))
    assert read.first_operator == "ssd"
    assert predict(case("single", world_size=1), read)["phases"]["fwd"]["seconds"] == pytest.approx(
        predict(case("single", world_size=1), KNOWN)["phases"]["fwd"]["seconds"], rel=0.02
    )


def test_too_few_points_and_other_parameters_are_refused(tmp_path: Path) -> None:
    few = [one for one in single_ranks(tokens=(512,)) if one.case.operator.name == "ssd"]
    with pytest.raises(
        ValueError, match=r"only 3 of the 4 or more cases of ssd .* \(fwd\) that a fit needs"
    ):
        calibrate([write_records(tmp_path / "few", few)], None, tmp_path / "c.toml")
    spec = Spec.parse("ssd:chunk=16")
    other = [replace(one, case=replace(one.case, operator=spec)) for one in few]
    with pytest.raises(ValueError, match="ssd was measured with different parameters: ssd, ssd:"):
        calibrate([write_records(tmp_path / "two", [*few, *other])], None, tmp_path / "c.toml")


def case(strategy: str, operator: str = "gated_deltanet", **fields: Any) -> Case:
    values = {"seq_len": 1 << 16, "world_size": 4, "ranks_per_node": 2, "num_heads_q": 16,
              "num_heads_kv": 16, "head_dim": 64, "dtype": "bfloat16", **fields}  # fmt: skip
    return Case(strategy=Spec.parse(strategy), operator=Spec.parse(operator),
                layout=Spec("contiguous"), mask=Spec.parse(values.pop("mask", "causal")),
                **values)  # fmt: skip


def test_predictions_add_up_and_an_exchange_hides_behind_the_computation() -> None:
    one = predict(case("scan"), KNOWN)
    for phase in one["phases"].values():
        assert sum(phase["breakdown"].values()) == pytest.approx(phase["seconds"])
        assert phase["tflops_per_gpu"] > 0
    assert one["memory"]["inputs_bytes"] == (1 << 14) * 16 * (4 * 64 * 2 + 2 * 4)  # g, beta
    single = predict(case("single", world_size=1), KNOWN)["phases"]["fwd"]["seconds"]
    forward = one["phases"]["fwd"]
    assert single / 4 < forward["seconds"] < single
    # A link that is so slow that the state takes longer than what it hides behind.
    across = replace(KNOWN.links["across"], gb_per_s=1e-3)
    slow = replace(KNOWN, links={**KNOWN.links, "across": across})
    ring, slow_ring = (predict(case("scan:by=ring"), c)["phases"]["fwd"] for c in (KNOWN, slow))
    assert slow_ring["breakdown"]["exposed"] > 100 * ring["breakdown"]["exposed"]
    timeline = predict(case("scan"), KNOWN, trace=True)["trace"]["traceEvents"]
    assert {"summarise", "output", "respond"} <= {event["name"] for event in timeline}


def test_a_chain_of_ranks_is_replayed_whole() -> None:
    """The last but one of 40 ranks, which also summarises its run, waits for a state that passes
    all those before it."""
    ring = predict(case("scan:by=ring", world_size=40, seq_len=40 * 1024), KNOWN)
    assert len(ring["ranks"]) == 40
    assert ring["phases"]["fwd"]["slowest_rank"] == 38
    hop = (KNOWN.links["node"].alpha_us + KNOWN.links["across"].alpha_us) / 2 * 1e-6
    assert ring["phases"]["fwd"]["breakdown"]["exposed"] > 30 * hop


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"operator": "kda"},
            "has no kernel of kda in bfloat16 with head_dim 64; there are: bands",
        ),
        ({"strategy": "ring"}, "ring distributes attention; gated_deltanet is a sequence mixer"),
        (
            {"strategy": "ulysses:offload=host"},
            "gated_deltanet is a sequence mixer, which takes no",
        ),
        ({"mask": "full"}, "gated_deltanet takes causal, causal_document masks; this one is"),
        ({"num_heads_kv": 4}, "gated_deltanet is a sequence mixer, with as many key/value heads"),
    ],
)
def test_refusals(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        predict(case(**{"strategy": "scan", **changes}), KNOWN)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_ways_to_exchange_states_are_recommended(tmp_path: Path) -> None:
    from cpbench.simulator.calibration.cluster_file import to_toml
    from cpbench.simulator.recommendation.candidates import own_strategies

    (tmp_path / "known.toml").write_text(to_toml(KNOWN, {}), encoding="utf-8")
    names = own_strategies("mixer")
    assert names == ["scan", "ulysses"]
    found = recommend(case("scan", world_size=4), names, str(tmp_path / "known.toml"), sizes=(4,))
    (of_size,) = found["by_ranks"]
    rows = {(row["strategy"], row["layout"]): row for row in of_size["methods"]}
    assert {"scan", "scan:by=ring", "scan:by=doubling", "ulysses"} <= {name for name, _ in rows}
    assert of_size["methods"][0]["status"] == "best"
    assert all(row["status"] != "refused" or "striped" in row["layout"] for row in rows.values())
