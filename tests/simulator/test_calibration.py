"""Calibration on measurements that follow from known constants: what is found, and what refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_calibration import (
    DENSE,
    ENVIRONMENT,
    KNOWN,
    links_table,
    single_rank_records,
    two_ranks,
    write_links,
    write_records,
)

from cpbench import masks
from cpbench.cli import main as cli
from cpbench.simulator.calibration.cluster_file import to_toml
from cpbench.simulator.calibration.kernels import Point, choose_tiling
from cpbench.simulator.calibration.links import fit_links, read_measured
from cpbench.simulator.calibration.solve import solve, solve_identified
from cpbench.simulator.cluster import load
from cpbench.simulator.tiles import Tiling
from cpbench.tools.calibration import calibrate as calibration
from cpbench.tools.calibration import tables


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> calibration.Calibration:
    folder = tmp_path_factory.mktemp("known")
    run, links = write_records(folder / "run", single_rank_records()), folder / "links.json"
    return calibration.calibrate([run], write_links(links), folder / "known.toml")


def test_known_constants_are_found(fitted: calibration.Calibration) -> None:
    (known,), (found,) = KNOWN.kernels, fitted.cluster.kernels
    assert found.tiling == known.tiling
    for phase in ("fwd", "bwd"):
        for name in ("tflops", "tile_us", "empty_us", "tail", "call_us", "full_rate"):
            value = getattr(getattr(found, phase), name)
            assert value == pytest.approx(getattr(getattr(known, phase), name), rel=0.01), name
    for name, link in KNOWN.links.items():
        assert fitted.cluster.links[name].alpha_us == pytest.approx(link.alpha_us, rel=0.01)
        assert fitted.cluster.links[name].gb_per_s == pytest.approx(link.gb_per_s, rel=0.01)
        assert fitted.cluster.links[name].per_node == link.per_node
    assert fitted.cluster.collectives is not None
    assert KNOWN.collectives is not None
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        expected = getattr(KNOWN.collectives, name)
        assert getattr(fitted.cluster.collectives, name) == pytest.approx(expected, rel=0.01)
    assert dataclasses.replace(fitted.cluster.gpu, source="-") == KNOWN.gpu
    assert fitted.unidentified == []
    assert all(max(errors) < 0.01 for errors in fitted.errors().values())


def test_the_file_is_read_back(fitted: calibration.Calibration, tmp_path: Path) -> None:
    (tmp_path / "known.toml").write_text(fitted.text, encoding="utf-8")
    read = load(str(tmp_path / "known.toml"))
    assert read.kernels[0].fwd.tflops == pytest.approx(fitted.cluster.kernels[0].fwd.tflops, 1e-3)
    assert "single ranks in" in read.kernels[0].source
    assert "a GPU" in read.kernels[0].source
    assert "cpbench links" in read.links["across"].source
    assert (read.gpus_per_node, read.calibrated.ranks, read.calibrated.tokens) == (2, 4, 4096)
    h100 = load("h100-ib")
    (tmp_path / "h100-ib.toml").write_text(to_toml(h100, {"gpu.sms": "a note"}), encoding="utf-8")
    assert load(str(tmp_path / "h100-ib.toml")) == h100


def test_intervals_hold_the_constants() -> None:
    """Of 100 fits to times with 2 % of noise, most of their intervals hold the true value, and they
    are not wide."""
    held = 0
    for seed in range(100):
        noise = random.Random(seed)
        points = [
            (n, (5 + n / 40) * math.exp(noise.gauss(0, 0.02))) for n in (1, 50, 400, 900, 4000)
        ]

        def residuals(x: dict[str, float], points: Any = points) -> list[float]:
            return [math.log((x["alpha"] + n / x["rate"]) / t) for n, t in points]

        fit = solve(residuals, {"alpha": 1.0, "rate": 10.0})
        low, high = fit.intervals["rate"]
        assert high / low < 1.3
        held += low <= 40 <= high
    assert held >= 85


def test_what_no_point_tells_is_named() -> None:
    """Times of one size give a sum, not its parts; the part with a neutral value is left out."""

    def residuals(x: dict[str, float]) -> list[float]:
        return [math.log((x["fixed"] + 100 / x["rate"]) / t) for t in (10.0, 10.1, 9.9, 10.0)]

    guess = {"rate": 5.0, "fixed": 1.0}
    assert set(solve(residuals, guess).unidentified) == {"rate", "fixed"}
    fit = solve_identified(residuals, guess, {"fixed": 0.0})
    assert fit.unidentified == ("fixed",)
    assert fit.constants == {"rate": pytest.approx(10.0, rel=0.01), "fixed": 0.0}
    alone = solve(lambda x: [math.log(100 / x["rate"] / 10)], {"rate": 5.0})
    assert alone.unidentified == ("rate",)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> calibration.Calibration:
    """Without documents and without links."""
    folder = tmp_path_factory.mktemp("dense")
    run = write_records(folder / "run", single_rank_records(DENSE))
    return calibration.calibrate([run], None, folder / "dense.toml")


def test_constants_that_these_records_do_not_tell(
    dense: calibration.Calibration, tmp_path: Path
) -> None:
    """Without documents there are no empty thread blocks, and both grids are the same; without
    links the cluster has one rank."""
    assert "bands bfloat16 64 grid" in dense.unidentified
    assert "bands bfloat16 64 bwd empty_us" in dense.unidentified
    (tmp_path / "dense.toml").write_text(dense.text, encoding="utf-8")
    assert load(str(tmp_path / "dense.toml")).kernels[0].fwd.empty_us == 0
    assert set(load(str(tmp_path / "dense.toml")).links) == {"host"}


def test_links_to_the_host_are_those_that_were_measured(tmp_path: Path) -> None:
    """Of an earlier version they were not; on a CPU both are one memory, whose copies are known."""
    peaks = {key: value for key, value in ENVIRONMENT["peaks"].items() if "host" not in key}
    run = write_records(
        tmp_path / "run", single_rank_records(DENSE), {"made": {**ENVIRONMENT, "peaks": peaks}}
    )
    found = calibration.calibrate([run], None, tmp_path / "gpu.toml")
    assert "links.host gb_per_s" in found.unidentified
    assert found.cluster.host is None
    assert "links.host: gb_per_s" in " ".join(tables.error_lines(found))
    device = {"type": "cpu", "threads": 1}
    run = write_records(
        tmp_path / "cpu", single_rank_records(DENSE), {"made": {**ENVIRONMENT, "device": device}}
    )
    host = calibration.calibrate([run], None, tmp_path / "cpu.toml").cluster.host
    assert host is not None
    assert (host.gb_per_s, host.overlaps) == (100, False)


def test_cases_of_several_ranks_are_judged_and_not_fitted(
    dense: calibration.Calibration, tmp_path: Path
) -> None:
    """A ring that took a second, where its kernels take milliseconds, changes no constant."""
    busy = two_ranks(mask="full", flags=["contended"])
    records = [*single_rank_records(DENSE), two_ranks(), busy]
    run, links = write_records(tmp_path / "run", records), write_links(tmp_path / "links.json")
    found = calibration.calibrate([run], links, tmp_path / "known.toml")
    assert found.cluster.kernels[0].fwd == dense.cluster.kernels[0].fwd
    assert [(one.method, one.phase) for one in found.judged] == [
        ("ring/zigzag x2", "fwd"), ("ring/zigzag x2", "bwd"),
    ]  # fmt: skip
    assert all(-1 < one.error < -0.9 for one in found.judged)
    known = load(str(tmp_path / "known.toml")).calibrated
    assert known.median_error > 0.9
    assert "2 times of several ranks" in known.source
    assert found.notes == ["records left out: 1 contended (other processes used the cores)"]


def other_machine(changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"made": ENVIRONMENT, "other": {**ENVIRONMENT, "device": {"type": "cuda", **changes}}}


def unchecked() -> dict[str, Any]:
    return {"conditions": {"device": "cuda", "checked": False}}


REFUSED: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "no folder": (lambda f: [str(f / "no")], ["no is not a run directory"]),
    "no records": (
        lambda f: [str(write_records(f / "run", []))],
        ["run: no checked times of a single rank; cpbench run calibration measures them"],
    ),
    "unchecked": (
        lambda f: [str(write_records(f / "run", single_rank_records(DENSE, **unchecked())))],
        ["no checked times of a single rank (24 unchecked)"],
    ),
    "contended": (
        lambda f: [str(write_records(f / "run", single_rank_records(DENSE, flags=["contended"])))],
        ["no checked times of a single rank (24 contended (other processes used the cores))"],
    ),
    "several ranks only": (
        lambda f: [str(write_records(f / "run", [two_ranks()]))],
        ["no checked times of a single rank"],
    ),
    "machines": (
        lambda f: [
            str(write_records(
                f / "run",
                [*single_rank_records(DENSE), *single_rank_records(DENSE, environment="other",
                                                                  batch=2)],
                other_machine({"name": "another GPU", "multiprocessors": 20}),
            ))
        ],
        ["single ranks of several machines (a GPU; another GPU): give those of one"],
    ),
    "few": (
        lambda f: [str(write_records(f / "run", single_rank_records(DENSE)[:3]))],
        ["only 3 of the 4 or more cases of bands in bfloat16 with head_dim 64 (fwd) that a fit"],
    ),
    "few that were not busy": (
        lambda f: [
            str(write_records(
                f / "run",
                [*single_rank_records(DENSE)[:1],
                 *single_rank_records(DENSE, flags=["contended"], batch=2)],
            ))
        ],
        ["only 1 of the 4", "; left out are 24 contended (other processes used the cores): measure "
         'on an idle machine, or in CPU time (clock = "cpu")'],
    ),
    "no peaks": (
        lambda f: [
            str(write_records(f / "run", single_rank_records(DENSE),
                              {"made": {**ENVIRONMENT, "peaks": {"copy_gb_s": 3.0}}}))
        ],
        ["the records have no measured gather_gb_s", "measure again"],
    ),
    "other links": (
        lambda f: [str(write_records(f / "run", single_rank_records(DENSE))), "--links",
                   str(write_links(f / "l.json", rows=[{"latency": 3}]))],
        ["l.json: not a file of cpbench links --json"],
    ),
    "links not JSON": (
        lambda f: ["run", "--links", str(write_records(f / "run", []) / "records" / "w.jsonl")],
        ["w.jsonl: not a file of cpbench links --json"],
    ),
    "failed links": (
        lambda f: ["run", "--links", str(write_links(f / "l.json", complete=False))],
        ["l.json: that run of cpbench links failed"],
    ),
    "old links": (
        lambda f: ["run", "--links", str(write_links(f / "l.json", rows=[
            row for row in links_table()["rows"] if row["operation"] != "ring"]))],
        ["l.json: has no ring: an earlier version", "run cpbench links --json again"],
    ),
    "links of another device": (
        lambda f: [str(write_records(f / "run", single_rank_records(DENSE))), "--links",
                   str(write_links(f / "l.json", device={"type": "cpu"}))],
        ["was measured on cpu, the records on cuda"],
    ),
    "no run": (lambda f: [], ["calibrate needs run directories and a file: -o cluster.toml"]),
    "output": (lambda f: ["run", "-o", str(f / "here.json")], ["here.json", "end in .toml"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, parts = REFUSED[name][0](tmp_path), REFUSED[name][1]
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "here.toml")]
    assert cli.invoke(["calibrate", *arguments, *output]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for part in parts:
        assert part in err
    assert not list(tmp_path.glob("here.*"))


def test_links_of_one_node(tmp_path: Path) -> None:
    rows = [row for row in links_table()["rows"] if row["link"] == "node"]
    measured = read_measured(write_links(tmp_path / "l.json", rows=rows, ranks=2))
    fit = fit_links(measured, "made")
    assert set(fit.links) == {"node"}
    assert fit.collectives.all_gather == pytest.approx((30, 30))  # across: never used
    assert fit.all_to_all


def test_tables_and_json(
    fitted: calibration.Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tables.constant_rows(fitted)
    assert {"of": "bands bfloat16 64 fwd", "constant": "tflops"}.items() <= rows[6].items()
    assert json.loads(json.dumps(fitted.to_json()))["errors"]["single_rank"]["count"] == 84


def test_tiles_of_another_operator_are_found() -> None:
    costs = dataclasses.replace(KNOWN.kernels[0].fwd, tile=(64, 32), empty_us=1.0)
    kernel = dataclasses.replace(KNOWN.kernels[0], grid="mask", packs_heads=True, fwd=costs)
    other = dataclasses.replace(KNOWN, kernels=(kernel,))
    points = [
        Point("fwd", masks.build(one.case.mask, one.case.seq_len), one.case.problem,
              one.times_us["fwd"][0][0] * 1e-6)
        for one in single_rank_records(cluster=other)
    ]  # fmt: skip
    tiling, grid_known = choose_tiling({"fwd": points}, KNOWN.gpu)
    assert (tiling, grid_known) == (Tiling((64, 32), (64, 32), "mask", True), True)
