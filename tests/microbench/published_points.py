"""The simulator against published rates of other people's implementations.

    python tests/microbench/published_points.py FILE [--packs 0] [--json FILE]

FILE holds points (mask, direction, strategy, world size, TFLOP/s per GPU), a chart of the kernel
alone, and the packs of documents of every world size, as ``tests/data/published_h100.json`` does.
The sequences of the baselines are in ``tests/helpers/records/published_baselines.py``.

Constants are fitted in stages: those of the kernel to its chart, then those of links and side work
to whole runs; their number is printed.  Each fit is judged on points that it has not seen: another
world size, a strategy left out, a mask left out.  Beside it stands the baseline: the rate of the
next smaller world size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

from published_baselines import BASELINES
from published_sequence import TILING, D, G, H

from cpbench.simulator.calibration.solve import solve
from cpbench.simulator.cluster import Cluster, from_table
from cpbench.simulator.costs import event_seconds, kernel_seconds
from cpbench.simulator.events import Kernel, Program
from cpbench.simulator.replay import replay
from cpbench.simulator.tiles import count_by_slice, count_documents, transposed

FLOPS = {"fwd": 4, "bwd": 10}  # per visible pair and element of a head
# Fixed: the data sheet of the GPU, latencies of a launch and of NCCL.
FIXED = {"sms": 132, "stream": 2900.0, "launch_us": 3.0, "alpha_us": 15.0, "tail": 0.0}
KERNEL = {  # constant: first guess
    "fwd_tflops": 720.0, "fwd_tile_us": 1.0, "fwd_call_us": 5.0,
    "bwd_tflops": 620.0, "bwd_tile_us": 2.0, "bwd_call_us": 20.0,
}  # fmt: skip
WHOLE = {
    "full_rate": 0.95, "gather": 1500.0, "scatter": 800.0, "empty_us": 0.3, "node": 250.0,
    "across": 40.0, "collective_node": 250.0, "collective_across": 200.0,
}  # fmt: skip
# What the hardware cannot exceed: NVLink and its share of a collective, a NIC, and memory.
MOST = {
    "node": 400.0, "collective_node": 400.0, "across": 50.0, "collective_across": 400.0,
    "gather": 2900.0, "scatter": 2900.0,
}  # fmt: skip
NEAR = 0.05  # rates that are closer are not ordered
CHOICE = 0.10  # a recommendation names all within this of the best


class Point(NamedTuple):
    """One published rate."""

    mask: str
    direction: str
    strategy: str
    size: int
    rate: float


class Data(NamedTuple):
    """What a file holds."""

    points: list[Point]
    tokens: int
    packs: dict[int, list[list[int]]]
    chart: list[tuple[bool, str, int, float]]  # causal, direction, tokens, TFLOP/s


def load(path: Path) -> Data:
    """Read a file of points."""
    table = json.loads(path.read_text())
    points = [
        Point(p["mask"], p["direction"], p["strategy"], p["world_size"], p["tflops_per_gpu"])
        for p in table["points"]
        if p["strategy"] in BASELINES
    ]
    chart = [
        (name.startswith("causal"), name[-3:], 1024 << i, rate)
        for name, rates in table["kernel"]["fa3"].items()
        for i, rate in enumerate(rates)
    ]
    packs = {int(size): lengths for size, lengths in table["packs"].items()}
    return Data(points, table["setting"]["tokens_per_gpu"], packs, chart)


def pairs(lengths: Sequence[int], causal: bool) -> float:
    """Visible pairs of documents."""
    return float(sum(n * (n + 1) / 2 if causal else n * n for n in lengths))


def cluster_of(constants: dict[str, float]) -> Cluster:
    """A cluster of these constants."""
    source = "fitted to published points"

    def phase(name: str) -> dict[str, Any]:
        costs = {x: constants[f"{name}_{x}"] for x in ("tflops", "tile_us", "call_us")}
        tile = list(TILING.fwd if name == "fwd" else TILING.bwd)
        if name == "fwd":  # a persistent kernel launches no empty thread blocks
            costs |= {"empty_us": 0.0, "full_rate": constants["full_rate"]}
        else:
            costs |= {"empty_us": constants["empty_us"]}
        return {"tile": tile, "tail": FIXED["tail"], **costs}

    both = [constants["collective_node"], constants["collective_across"]]
    rates = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"), both)
    link = {"source": source, "alpha_us": FIXED["alpha_us"]}
    return from_table({
        "name": "fitted", "gpus_per_node": 8,
        "calibrated": {
            "source": source, "ranks": 32, "tokens": 8192, "median_error": 0.0,
            "percentile_90_error": 0.0,
        },
        "gpu": {
            "source": source, "sms": FIXED["sms"], "memory_gib": 80,
            "stream_gb_per_s": FIXED["stream"], "gather_gb_per_s": constants["gather"],
            "scatter_gb_per_s": constants["scatter"], "launch_us": FIXED["launch_us"],
        },
        "kernels": [{
            "source": source, "operators": ["flash_attn_3"], "dtype": "bfloat16", "head_dim": D,
            "grid": "slices", "fwd": phase("fwd"), "bwd": phase("bwd"),
        }],
        "links": {
            "node": {**link, "gb_per_s": constants["node"]},
            "across": {**link, "gb_per_s": constants["across"], "per_node": 8},
        },
        "collectives": {**link, **rates},
    })  # fmt: skip


@functools.cache
def chart_kernel(causal: bool, phase: str, tokens: int) -> Kernel:
    """The kernel of a point of the chart."""
    if phase == "fwd":
        tiles = count_documents([tokens], [tokens], causal, *TILING.fwd)
    else:
        slices = np.array([[0, tokens, 0, tokens, -tokens, 0 if causal else tokens]])
        tiles = count_by_slice(transposed(slices), TILING.bwd[1], TILING.bwd[0])
    return Kernel(phase, tiles, H, G, tokens, tokens, D, D, 2, full=False)


def chart_rates(chart: Iterable[tuple[bool, str, int, float]], cluster: Cluster) -> list[float]:
    """The predicted rates of points of the chart."""
    rates = []
    for causal, phase, tokens, _ in chart:
        kernel = chart_kernel(causal, phase, tokens)
        seconds = kernel_seconds(kernel, cluster.kernels[0], cluster.gpu)
        rates.append(FLOPS[phase] * D * H * pairs([tokens], causal) / seconds / 1e12)
    return rates


def fit_kernel(data: Data) -> dict[str, float]:
    """The constants of the kernel, from its chart."""

    seen = [row for row in data.chart if row[1:3] != ("fwd", 1024)]  # those are bound by launches

    def residuals(constants: dict[str, float]) -> list[float]:
        predicted = chart_rates(seen, cluster_of({**WHOLE, **constants}))
        return [np.log(p / rate) for p, (*_, rate) in zip(predicted, seen, strict=True)]

    return solve(residuals, KERNEL, tolerance=1e-6).constants


class Model:
    """Predicted rates of points.

    Args:
        packs: how many packs of documents are averaged over; 0 for all.
    """

    def __init__(self, data: Data, packs: int = 0) -> None:
        self._data, self._packs = data, packs
        self._programs: dict[Any, list[tuple[Program, float]]] = {}

    def programs(self, point: Point) -> list[tuple[Program, float]]:
        """The program of every pack, and the FLOPs of a GPU."""
        key = point[:4]
        if key not in self._programs:
            causal = point.mask.endswith("causal")
            whole = [[point.size * self._data.tokens]]
            packs = self._data.packs[point.size] if "varlen" in point.mask else whole
            self._programs[key] = [
                (
                    BASELINES[point.strategy](
                        np.array(lengths), causal, point.direction, point.size
                    ),
                    FLOPS[point.direction] * D * H * pairs(lengths, causal) / point.size,
                )
                for lengths in (packs[: self._packs] if self._packs else packs)
            ]
        return self._programs[key]

    def rate(self, point: Point, cluster: Cluster) -> float:
        """TFLOP/s per GPU, the mean over packs."""
        cost = functools.partial(event_seconds, costs=cluster.kernels[0], cluster=cluster)
        rank = point.size - 1
        rates = []
        for program, flops in self.programs(point):
            times = replay({rank: program}, cluster, 8, cost)
            rates.append(flops / times[rank].end / 1e12)
        return float(np.mean(rates))


def fit_whole(
    data: Data, model: Model, kernel: dict[str, float], points: Sequence[Point],
    guess: dict[str, float] = WHOLE,
) -> dict[str, float]:  # fmt: skip
    """All constants: those of links and side work from whole runs."""

    def residuals(constants: dict[str, float]) -> list[float]:
        cluster = cluster_of({**kernel, **constants})
        return [np.log(model.rate(point, cluster) / point.rate) for point in points]

    return {**kernel, **solve(residuals, guess, MOST).constants}


@dataclasses.dataclass
class Judgement:
    """Predicted against published rates: relative errors, and what they mean for a choice."""

    median: float
    percentile_90: float
    tau: float
    regret: float
    points: int

    def __str__(self) -> str:
        return (
            f"median {self.median:6.1%}, 90th percentile {self.percentile_90:6.1%}, "
            f"tau {self.tau:5.2f}, regret {self.regret:6.1%}, {self.points} points"
        )


def judge(points: Sequence[Point], predicted: Sequence[float]) -> Judgement:
    """Errors; Kendall's tau over pairs of one cell more than 5 % apart; and the regret: how much
    slower than the best of a cell the best strategy is of those predicted within 10 % of the best,
    the largest over cells."""
    errors = [abs(p / point.rate - 1) for point, p in zip(points, predicted, strict=True)]
    cells: dict[Any, list[tuple[float, float]]] = {}
    for point, p in zip(points, predicted, strict=True):
        cells.setdefault((point.mask, point.direction, point.size), []).append((point.rate, p))
    agree, count, regrets = 0, 0, [float("nan")]  # of cells with one strategy there is none
    for rows in cells.values():
        if len(rows) == 1:
            continue
        for (a, pa), (b, pb) in itertools.combinations(rows, 2):
            if abs(a - b) > NEAR * max(a, b):
                agree += int(np.sign((a - b) * (pa - pb)))
                count += 1
        best, best_predicted = max(a for a, _ in rows), max(p for _, p in rows)
        named = max(a for a, p in rows if p >= (1 - CHOICE) * best_predicted)
        regrets.append(1 - named / best)
    return Judgement(
        float(np.median(errors)), float(np.quantile(errors, 0.9)),
        agree / count if count else float("nan"), float(np.fmax.reduce(regrets)), len(points),
    )  # fmt: skip


def copied(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Points whose next smaller world size is known, each with its rate there."""
    sizes = sorted({point.size for point in points})
    smaller = dict(zip(sizes[1:], sizes, strict=False))
    rates = {point[:4]: point.rate for point in points}
    return [
        (point, rates[*point[:3], smaller[point.size]])
        for point in points
        if (*point[:3], smaller.get(point.size)) in rates
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--packs", type=int, default=0, help="packs averaged over in fits; 0: all")
    parser.add_argument("--json", type=Path, help="write the constants and judgements")
    options = parser.parse_args()
    data = load(options.file)
    fitting, judging = Model(data, options.packs), Model(data)
    kernel = fit_kernel(data)
    print(f"{len(KERNEL)} constants of the kernel, {len(WHOLE)} of links and side work")
    result: dict[str, Any] = {"judgements": {}}

    def predict(constants: dict[str, float], points: Sequence[Point]) -> list[float]:
        cluster = cluster_of(constants)
        return [judging.rate(point, cluster) for point in points]

    predicted = chart_rates(data.chart, cluster_of({**WHOLE, **kernel}))
    errors = [abs(p / rate - 1) for p, (*_, rate) in zip(predicted, data.chart, strict=True)]
    print(f"chart of the kernel: median {np.median(errors):.1%}, most {max(errors):.1%}")
    everything = fit_whole(data, fitting, kernel, data.points)
    result["constants"] = everything
    for name, value in everything.items():
        bound = "  at its bound: not identified" if value > 0.98 * MOST.get(name, np.inf) else ""
        print(f"  {name:20} {value:10.3f}{bound}")

    sizes = sorted({point.size for point in data.points})

    def report(name: str, points: Sequence[Point], predicted: Sequence[float]) -> None:
        judgement = judge(points, predicted)
        result["judgements"][name] = dataclasses.asdict(judgement)
        print(f"{name:44} {judgement}", flush=True)

    report("fitted to all", data.points, predict(everything, data.points))
    result["points"] = [
        [*point, rate]
        for point, rate in zip(data.points, predict(everything, data.points), strict=True)
    ]
    splits = [
        *((f"world size {size} from the others", lambda p, x=size: p.size == x) for size in sizes),
        *((f"without {x}", lambda p, x=x: p.strategy == x) for x in BASELINES),
        *((f"without {x}", lambda p, x=x: p.mask == x)
          for x in dict.fromkeys(point.mask for point in data.points)),
    ]  # fmt: skip
    for name, held_out in splits:
        seen = [point for point in data.points if not held_out(point)]
        unseen = [point for point in data.points if held_out(point)]
        if seen and unseen:
            constants = fit_whole(data, fitting, kernel, seen, {x: everything[x] for x in WHOLE})
            report(name, unseen, predict(constants, unseen))
    if rows := copied(data.points):
        report("the rate of the next smaller world size", *zip(*rows, strict=True))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
