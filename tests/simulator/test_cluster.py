"""Cluster files: what is refused and how, packaged ones, and the costs of a kernel."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpbench.simulator.cluster import PACKAGED, from_table, load
from cpbench.simulator.costs import kernel_seconds, mix_seconds, side_seconds
from cpbench.simulator.events import Copy, Kernel, Mix, Post, SideWork, Wait
from cpbench.simulator.replay import replay
from cpbench.simulator.tiles import TileCounts

PHASE = {"tile": [128, 64], "tflops": 500, "tile_us": 2, "empty_us": 0.5, "tail": 0.25,
         "call_us": 10}  # fmt: skip
TABLE: dict[str, Any] = {
    "name": "made", "gpus_per_node": 8,
    "calibrated": {"source": "made", "ranks": 8, "tokens": 8192, "median_error": 0.03,
                   "percentile_90_error": 0.1},
    "gpu": {"source": "made", "sms": 100, "memory_gib": 80, "stream_gb_per_s": 2000,
            "gather_gb_per_s": 1000, "scatter_gb_per_s": 250, "launch_us": 3},
    "kernels": [{"source": "made", "operators": ["bands", "flex"], "dtype": "bfloat16",
                 "head_dim": 128, "grid": "mask", "fwd": PHASE, "bwd": copy.deepcopy(PHASE)}],
    "links": {"node": {"source": "made", "alpha_us": 1, "gb_per_s": 10}},
    "collectives": {"source": "made", "alpha_us": 3, "all_gather": [4, 2],
                    "reduce_scatter": [4, 2], "all_reduce": [4, 2]},
}  # fmt: skip

EVERYTHING: dict[str, Any] = {
    **TABLE,
    "mixers": [{"source": "made", "operators": ["ssd"], "dtype": "float32", "head_dim": 64,
                "fwd": {"tflops": 9, "token_us": 0.1, "call_us": 5}}],
    "links": {**TABLE["links"],
              "across": {"source": "made", "alpha_us": 1, "gb_per_s": 5, "per_node": 4},
              "host": {"source": "made", "alpha_us": 1, "gb_per_s": 20, "per_node": 2}},
    "memory": {"source": "made", "context_gb": 1, "peer_gb": 0.1, "slack": 0.1},
}  # fmt: skip
KERNEL = Kernel("fwd", TileCounts(blocks=50, tiles=10, empty=4, largest=8), heads_q=600, heads_kv=2,
                seq_q=1280, seq_k=640, head_dim=128, value_dim=128, itemsize=2,
                full=False)  # fmt: skip


def changed(path: str, value: Any = None, table: dict[str, Any] = TABLE) -> dict[str, Any]:
    """The table with one value changed, or removed."""
    table = copy.deepcopy(table)
    at: Any = table
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in keys:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("gpu.sms", None, "gpu.sms is missing"),
        ("gpu.sms", 1.5, "gpu.sms = 1.5 is not an integer of 1 or more"),
        ("gpu.stream_gb_per_s", -1, "gpu.stream_gb_per_s = -1 is not a number above 0"),
        ("gpu.stream_gb_per_s", float("nan"), "gpu.stream_gb_per_s = nan is not a number"),
        ("gpu.streams", 1, "no key gpu.streams; did you mean gpu."),
        ("gpu", 3, "gpu must be a table"),
        ("links.nodes", {}, "no link 'nodes'; there are: node, across, host"),
        ("links.node.source", None, "links.node.source is missing"),
        ("links", 3, "links must be tables: [links.node], [links.across]"),
        ("links", {}, "[links] and [collectives] go together"),
        ("collectives", None, "[links] and [collectives] go together"),
        ("links.node.overlaps", True, "no key links.node.overlaps"),
        ("links.host", {"source": "-"}, "links.host.alpha_us is missing"),
        (
            "links.host",
            {"source": "-", "alpha_us": 1, "gb_per_s": 1, "overlaps": 1},
            "links.host.overlaps = 1 is not true or false",
        ),
        ("kernels", [], "kernels must be a list of tables"),
        ("kernels.0.grid", "rows", "kernels[0].grid = 'rows' is none of mask, slices"),
        (
            "kernels.0.dtype",
            "bf16",
            "kernels[0].dtype = 'bf16' is none of float64, float32, bfloat16",
        ),
        ("kernels.0.fwd.tflops", 0, "kernels[0].fwd.tflops = 0 is not a number above 0"),
        ("kernels.0.fwd.call_us", -1, "kernels[0].fwd.call_us = -1 is not a number of 0 or more"),
        ("links.node.gb_per_s", 0, "links.node.gb_per_s = 0 is not a number above 0"),
        ("calibrated.ranks", 0, "calibrated.ranks = 0 is not an integer of 1 or more"),
        ("kernels.0.fwd.tile", [128], "kernels[0].fwd.tile = [128] is not a list of two positive"),
        ("collectives.all_gather", [1, 0], "collectives.all_gather = [1, 0] is not a list of two"),
        ("gpus_per_node", 0, "gpus_per_node = 0 is not an integer of 1 or more"),
        ("digest", "x", "digest is computed, not given"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, line: str) -> None:
    with pytest.raises(ValueError) as error:
        from_table(changed(path, value))
    assert str(error.value).startswith(line) or line in str(error.value)
    assert "\n" not in str(error.value)


def numbers(table: Any, path: str = "") -> Iterator[str]:
    """The paths of all numbers of a table."""
    if isinstance(table, dict | list):
        items = table.items() if isinstance(table, dict) else enumerate(table)
        for key, value in items:
            yield from numbers(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(table, int | float):
        yield path


@pytest.mark.parametrize("path", list(numbers(EVERYTHING)))
def test_no_number_of_0_divides(path: str) -> None:
    """It is refused by its name, or costs nothing."""
    try:
        cluster = from_table(changed(path, 0, EVERYTHING))
    except ValueError as error:
        line = str(error)
        name = path.replace("s.0.", "s[0].").removesuffix(".0").removesuffix(".1")
        assert line.startswith(f"{name} = "), line
        return
    kernel = dataclasses.replace(KERNEL, phase="bwd")
    assert kernel_seconds(kernel, cluster.kernels[0], cluster.gpu) > 0
    assert side_seconds(SideWork(1000, 1000, 1000, 1), cluster.gpu) > 0
    assert mix_seconds(Mix("fwd", "fwd", 64, 1000), cluster.mixers[0]) > 0
    rows = ((1, 1000), (4, 1000))
    events = [Post(1, "exchange", (0, 1, 4), "", rows, rows), Wait(1), Copy(2, True, 1000, 1, ()),
              Wait(2), Post(3, "all_gather", (0, 1, 4), "", rows, rows), Wait(3)]  # fmt: skip
    times = replay({0: tuple(events)}, cluster, 4, lambda _: 0.0)
    assert 0 < times[0].end < 1


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("name = \n")
    with pytest.raises(ValueError, match=r"c\.toml is not TOML"):
        load(str(file))
    file.write_text('name = "x"\n')
    with pytest.raises(ValueError, match=r"c\.toml: kernels must be"):
        load(str(file))
    with pytest.raises(ValueError, match="no cluster 'nosuch'; there are: "):
        load("nosuch")


def test_links_to_the_host_need_no_others() -> None:
    host = {"source": "made", "alpha_us": 1, "gb_per_s": 50, "per_node": 4}
    alone = {key: value for key, value in TABLE.items() if key != "collectives"}
    cluster = from_table({**alone, "links": {"host": host}})
    assert cluster.host is not None
    assert cluster.host.overlaps
    assert [cluster.shares_links(8, offloaded) for offloaded in (False, True)] == [False, True]
    assert from_table(TABLE).host is None
    assert (
        cluster.digest != from_table({**alone, "links": {"host": {**host, "per_node": 0}}}).digest
    )


def test_the_digest_is_of_the_content() -> None:
    assert from_table(TABLE).digest == from_table(copy.deepcopy(TABLE)).digest
    assert from_table(TABLE).digest != from_table(changed("gpu.sms", 101)).digest


@pytest.mark.parametrize("name", sorted(path.stem for path in PACKAGED.glob("*.toml")))
def test_packaged_clusters(name: str) -> None:
    cluster = load(name)
    assert cluster.name == name
    assert cluster.calibrated.percentile_90_error > cluster.calibrated.median_error > 0
    assert all(kernel.fwd.tflops > 0 for kernel in cluster.kernels)


def test_kernels_that_were_not_calibrated_are_refused() -> None:
    cluster = from_table(TABLE)
    assert cluster.kernel("flex", "bfloat16", 128) is cluster.kernels[0]
    for wanted in (("flex", "bfloat16", 64), ("flex", "float16", 128), ("sdpa", "bfloat16", 128)):
        with pytest.raises(ValueError, match=r"made has no kernel of .*; there are: bands, flex"):
            cluster.kernel(*wanted)


def test_the_costs_of_a_kernel() -> None:
    cluster = from_table(TABLE)
    costs, gpu = cluster.kernels[0], cluster.gpu
    kernel = KERNEL
    block = 4 * 128 * 128 * 64 / 5e12
    expected = 600 * (50 * block + 10 * 2e-6 + 4 * 5e-7) / 100 + 0.25 * 8 * block + 1e-5
    assert kernel_seconds(kernel, costs, gpu) == pytest.approx(expected)
    backward = Kernel("bwd", *[getattr(kernel, name) for name in list(kernel.__annotations__)[1:]])
    moved = 7 * 600 * 1280 * 128 * 2 + 2 * 640 * 256 * 10
    expected = 600 * (50 * 2.5 * block + 10 * 2e-6 + 4 * 5e-7) / 100 + 0.25 * 8 * 2.5 * block + 1e-5
    assert kernel_seconds(backward, costs, gpu) == pytest.approx(expected + moved / 2e12)
    few = dataclasses.replace(kernel, heads_q=1)  # the largest tile takes longer than the mean
    assert kernel_seconds(few, costs, gpu) == pytest.approx(1.25 * 8 * block + 1e-5)
    full = dataclasses.replace(costs, fwd=dataclasses.replace(costs.fwd, full_rate=0.5))
    assert kernel_seconds(few, full, gpu) == kernel_seconds(few, costs, gpu)
    few = dataclasses.replace(few, full=True)
    assert kernel_seconds(few, full, gpu) == pytest.approx(2 * 1.25 * 8 * block + 1e-5)
    nothing = Kernel("fwd", TileCounts(0, 0, 9, 0), 6, 2, 1280, 640, 128, 128, 2, False)
    assert kernel_seconds(nothing, costs, gpu) == 0
    forward_only = from_table(changed("kernels.0.bwd"))
    with pytest.raises(ValueError, match="no backward pass was calibrated"):
        kernel_seconds(backward, forward_only.kernels[0], forward_only.gpu)


def test_the_costs_of_side_work() -> None:
    work = SideWork(stream=2 * 10**12, gather=10**12, scatter=10**12, launches=10**6)
    assert side_seconds(work, from_table(TABLE).gpu) == pytest.approx(1 + 1 + 4 + 3)
