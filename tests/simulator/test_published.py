"""The packaged cluster on the published points that it was fitted to, and what each term is for."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from types import ModuleType

import pytest
from paths import ROOT

from cpbench.simulator.cluster import Cluster, load

FILE = ROOT / "tests" / "data" / "published_h100.json"
SCRIPT = ROOT / "tests" / "microbench" / "published_points.py"


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_points", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["published_points"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def model() -> object:
    return script().Model(script().load(FILE), packs=8)


def judged(cluster: Cluster) -> object:
    points = script().load(FILE).points
    return script().judge(points, [model().rate(point, cluster) for point in points])  # type: ignore[attr-defined]


def test_the_packaged_cluster_meets_the_points_that_it_was_fitted_to() -> None:
    judgement = judged(load("h100-ib"))
    assert judgement.points == 80  # type: ignore[attr-defined]
    assert judgement.median < 0.035  # type: ignore[attr-defined]
    assert judgement.percentile_90 < 0.11  # type: ignore[attr-defined]
    assert judgement.tau > 0.97  # type: ignore[attr-defined]
    assert judgement.regret < 0.01  # type: ignore[attr-defined]


@pytest.mark.parametrize("term", ["side work", "links", "empty thread blocks"])
def test_errors_grow_without(term: str) -> None:
    cluster = load("h100-ib")
    free = 1e9
    if term == "side work":
        gpu = dataclasses.replace(cluster.gpu, gather_gb_per_s=free, scatter_gb_per_s=free,
                                  stream_gb_per_s=free)  # fmt: skip
        cluster = dataclasses.replace(cluster, gpu=gpu)
    elif term == "links":
        links = {
            name: dataclasses.replace(link, gb_per_s=free) for name, link in cluster.links.items()
        }
        both = (free, free)
        collectives = dataclasses.replace(cluster.collectives, all_gather=both, reduce_scatter=both)
        cluster = dataclasses.replace(cluster, links=links, collectives=collectives)
    else:
        (kernel,) = cluster.kernels
        assert kernel.bwd is not None
        kernel = dataclasses.replace(kernel, bwd=dataclasses.replace(kernel.bwd, empty_us=0.0))
        cluster = dataclasses.replace(cluster, kernels=(kernel,))
    assert judged(cluster).percentile_90 > 0.14  # type: ignore[attr-defined]


def test_how_predictions_are_judged() -> None:
    """Pairs within 5 % are not ordered; those within 10 % of the predicted best are chosen from."""
    points = [
        script().Point("full", "fwd", name, 8, rate)
        for name, rate in (("a", 100.0), ("b", 98.0), ("c", 50.0), ("d", 80.0))
    ]
    judgement = script().judge(points, [100.0, 105.0, 70.0, 60.0])
    assert judgement.tau == pytest.approx(3 / 5)
    assert judgement.regret == 0
    assert judgement.median == pytest.approx((0.0714286 + 0.25) / 2)
    worst = script().judge(points, [10.0, 12.0, 100.0, 95.0])
    assert worst.regret == pytest.approx(0.2)
    assert worst.tau == pytest.approx(-1)


def test_the_rate_of_the_next_smaller_world_size() -> None:
    data = script().load(FILE)
    rows = script().copied(data.points)
    assert len(rows) == 40
    assert {point.size for point, _ in rows} == {32}
    assert ("full", "fwd", "ulysses", 32, 581) in [
        tuple(point) for point, rate in rows if rate == 603
    ]
