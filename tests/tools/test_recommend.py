"""``cpbench recommend``: the set of the best, why others lose, refusals, and what is written."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from cpbench import masks
from cpbench.cli import main
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.masks.documents import from_file
from cpbench.reports.recommendation import output, text
from cpbench.simulator.cluster import PACKAGED, load
from cpbench.simulator.prediction import predict
from cpbench.simulator.recommendation.candidates import Ranks, candidates, methods, own_strategies
from cpbench.simulator.recommendation.search import search
from cpbench.tools.recommendation import recommend as tool
from cpbench.tools.recommendation.draws import draw_masks
from cpbench.tools.recommendation.recommend import ranked, recommend, world_sizes

CLUSTER = load("h100-ib")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def problem(mask: str = "causal", **fields: Any) -> Case:
    values = {"seq_len": 32768, "world_size": 8, "ranks_per_node": 8, "num_heads_q": 64,
              "num_heads_kv": 8, "head_dim": 128, "dtype": "bfloat16", **fields}  # fmt: skip
    return Case(operator=Spec("flash_attn.3"), mask=Spec.parse(mask), **values)


def rows_of(case: Case, names: list[str]) -> list[dict[str, Any]]:
    """The ranking of all methods of some strategies on one draw."""
    cases = candidates(case, names, masks.build(case.mask, case.seq_len))
    outcomes = search([dataclasses.replace(one, mask=case.mask) for one in cases], CLUSTER)
    return ranked(cases, [[one] for one in outcomes], CLUSTER)


def least(rows: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
    return next(row for row in rows if text.base(row) == strategy)


def test_documents_of_mixed_lengths_are_dispatched() -> None:
    """A long document and many short ones on two nodes: only the long one's keys have to be sent,
    and no other layout is even."""
    documents = f"causal_document:doc_lens=[32768,{','.join(['2048'] * 48)}]"
    case = problem(documents, seq_len=131072, world_size=16)
    rows = rows_of(case, ["dispatch", "ring", "burst"])
    assert rows[0]["status"] == "best"
    assert rows[0]["layout"] == "dispatch"
    others = [row for row in rows if row["layout"] in ("contiguous", "zigzag")]
    others = [row for row in others if text.base(row) != "dispatch"]
    assert {text.base(row) for row in others} == {"ring", "burst"}
    for row in others:
        assert row["status"] == "slower"
        assert row["ratio"] > 1.2
        assert row["why"]


def test_many_heads_in_a_node_are_for_ulysses() -> None:
    """64:64 heads and 2K tokens a rank: heads are exchanged for less than a ring sends."""
    rows = rows_of(
        problem(seq_len=16384, num_heads_kv=64), ["ulysses", "ring", "ring_allgather", "burst"]
    )
    assert text.base(rows[0]) == "ulysses"
    assert {text.base(row) for row in rows if row["status"] == "best"} == {"ulysses"}
    assert min(least(rows, other)["ratio"] for other in ("ring", "ring_allgather", "burst")) > 1.1
    assert any("load imbalance" in row["why"] for row in rows if row["layout"] == "contiguous")


def test_what_is_ruled_out_by_a_bound_is_slower() -> None:
    """Methods that were not predicted take longer than the interval of the best allows."""
    case = problem("causal_document:corpus=pile,seed=1", world_size=16)
    cases = candidates(case, ["ring", "dispatch", "tree"], masks.build(case.mask, case.seq_len))
    outcomes = search(cases, CLUSTER)
    limit = min(
        sum(phase["high"] for phase in one["phases"].values())
        for one in outcomes if "phases" in one
    )  # fmt: skip
    pruned = [i for i, one in enumerate(outcomes) if "phases" not in one]
    assert 0 < len(pruned) < len(cases)
    for i in pruned:
        whole = sum(p["seconds"] for p in predict(cases[i], CLUSTER)["phases"].values())
        assert whole > 0.99 * tool.least_seconds(outcomes[i])
        assert whole > 0.99 * limit


def test_memory_decides() -> None:
    case = problem(seq_len=8192, world_size=4, num_heads_kv=64)
    cases = candidates(case, ["ring", "ring_allgather"], masks.build(case.mask, case.seq_len))
    small = dataclasses.replace(CLUSTER, gpu=dataclasses.replace(CLUSTER.gpu, memory_gib=0.5))
    rows = ranked(cases, [[one] for one in search(cases, small)], small)
    assert {row["status"] for row in rows} == {"does not fit"}
    assert all(row["why"].startswith("memory: needs ") for row in rows)
    times = [row["seconds"] for row in rows]
    assert times == sorted(times)
    assert len(set(times)) > 1


@functools.cache
def script() -> Any:
    path = ROOT / "tests" / "microbench" / "published_points.py"
    spec = importlib.util.spec_from_file_location("published_points", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["published_points"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_set_of_the_best_has_the_true_best() -> None:
    """Published rates of other implementations: what the rule for the set would have named."""
    data = script().load(ROOT / "tests" / "data" / "published_h100.json")
    model = script().Model(data, packs=4)
    cells: dict[Any, list[Any]] = {}
    for point in data.points:
        cells.setdefault((point.mask, point.direction, point.size), []).append(point)
    assert len(cells) == 16
    for points in cells.values():
        times = [1 / model.rate(point, CLUSTER) for point in points]
        outcomes = [
            [{"bound": {"total": 0.0, "attention": 0.0, "links": 0.0, "across": 0, "inside": 0,
                        "balance": 1.0},
              "memory": {"verdict": "fits", "high_bytes": 0},
              "phases": {"fwd": {"seconds": time, "high": time, "breakdown": {
                  "attention": time, "side": 0.0, "exposed": 0.0}}}}]
            for time in times
        ]  # fmt: skip
        cases = [Case(strategy=Spec(point.strategy)) for point in points]
        rows = ranked(cases, outcomes, CLUSTER)
        best = {row["strategy"] for row in rows if row["status"] == "best"}
        rate = max(point.rate for point in points)
        assert max(point.rate for point in points if point.strategy in best) > 0.99 * rate
        assert len(best) < len(points)


def test_candidates() -> None:
    ranks = Ranks(64, 8, 64)
    assert ranks.degrees == [4, 8, 16, 32]
    assert Ranks(8, 8, 64).degrees == [2, 4]
    assert ("usp:ulysses=8", "ring") in methods("usp", ranks)
    assert list(methods("ring", ranks)) == [("ring", ""), ("ring:window=8", "")]
    assert list(methods("usp:ulysses=2", ranks)) == [("usp:ulysses=2", "")]
    assert "single" not in own_strategies()
    assert "torch.context_parallel" not in own_strategies()
    one_band = {"contiguous", "zigzag", "striped"}
    documents = {"contiguous", "zigzag", "zigzag_document", "striped", "dispatch"}
    for mask, expected in (
        ("full", {"contiguous"}), ("causal", one_band),
        ("causal_document:doc_lens=[20000,12768]", documents),
        ("causal_document:corpus=pile", documents - {"striped"}),
    ):  # fmt: skip
        found = candidates(problem(mask), ["ring"], masks.build(mask, 32768))
        assert {one.layout.name for one in found} == expected


def test_numbers_of_ranks() -> None:
    assert world_sizes(64, 8) == [8, 16, 32, 64]
    assert world_sizes(48, 8) == [24, 48]
    assert world_sizes(4, 8) == [4]


def test_draws(tmp_path: Path) -> None:
    drawn = draw_masks(Spec.parse("causal_document:corpus=pile"), 4096, 3)
    assert [str(mask) for mask in drawn] == [
        f"causal_document:corpus=pile,seed={seed}" for seed in range(3)
    ]
    for fixed in ("causal", "causal_document:seed=5", "full_document:doc_lens=[4096]"):
        assert draw_masks(Spec.parse(fixed), 4096, 3) == [Spec.parse(fixed)]
    file = tmp_path / "lengths.txt"
    file.write_text("\n".join(map(str, range(100, 130))), encoding="utf-8")
    first, *others = draw_masks(Spec.of("causal_document", file=str(file)), 2000, 3)
    assert first.kwargs["doc_lens"] == tuple(from_file(2000, str(file)))
    assert len({first, *others}) == 3
    assert all(masks.build(mask, 2000).seq_q == 2000 for mask in (first, *others))


@pytest.fixture(scope="module")
def result(_own_cache: None) -> dict[str, Any]:
    case = problem("causal_document:corpus=prolong64k", world_size=16)
    return recommend(case, ["ring", "dispatch", "usp:ulysses=8", "hierarchical:local=3"],
                     "h100-ib", draws=2)  # fmt: skip


def test_a_recommendation(result: dict[str, Any]) -> None:
    assert [one["ranks"] for one in result["by_ranks"]] == [8, 16]
    assert [one["draws"] for one in result["by_ranks"]] == [1, 2]
    rows = result["by_ranks"][-1]["methods"]
    best = [row for row in rows if row["status"] == "best"]
    assert best == rows[: len(best)]
    assert [row["seconds"] for row in best] == sorted(row["seconds"] for row in best)
    assert best[0]["ratio"] == 1
    for row in best:
        assert len(row["draw_seconds"]) == 2
        assert row["seconds"] == pytest.approx(sum(row["draw_seconds"]) / 2)
        assert row["seconds"] <= best[0]["high"]
        assert sum(row["breakdown"].values()) == pytest.approx(row["seconds"])
        assert row["memory"]["verdict"] == "fits"
    others = rows[len(best) :]
    assert all(row["why"] for row in others)
    refused = [row for row in rows if row["status"] == "refused"]
    assert {row["strategy"] for row in refused} == {"hierarchical:local=3"}
    assert "local = 3 must divide the 16 ranks" in refused[0]["why"]


def test_it_is_deterministic(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, and with another number of processes."""
    monkeypatch.setattr(tool, "usable_cores", lambda: 1)
    case = problem("causal_document:corpus=prolong64k", world_size=16)
    names = ["ring", "dispatch", "usp:ulysses=8", "hierarchical:local=3"]
    assert recommend(case, names, "h100-ib", draws=2) == result


def test_what_a_terminal_shows(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = text.lines(result)
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    assert lines[0].startswith("Fastest: ")
    for words in ("within its interval", "why it loses", "x best", "2 draws", "must divide"):
        assert words in shown
    far = text.lines(result | {"warnings": ["extrapolated: far"]})
    assert far[0] == "extrapolated: far"


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_pages_and_figures(result: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    path, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    output.write(result, path)
    output.write(result, again)
    assert path.read_bytes() == again.read_bytes()
    assert len(path.read_bytes()) > 5000


NARROW = ("recommend", "--seq-len", "4k", "--world-size", "4")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--head-dim", "64"), "has no kernel of flash_attn.3 in bfloat16 with head_dim 64"),
        (("--dtype", "float16"), "has no kernel of flash_attn.3 in float16"),
        (("--operator", "bands"), "has no kernel of bands"),
        (("--cluster", "nosuch"), "no cluster 'nosuch'; there are: h100-ib"),
        (("--strategy", "rng"), "no strategy 'rng'"),
        (("--strategy", "ulysses:chunks=1", "--num-heads-q", "6", "--num-heads-kv", "2"), "6 on 4"),
        (("--strategy", "torch.context_parallel"), "sends through a library"),
        (("--mask", "dilated:block=64"), "mask"),
        (("--draws", "0"), "--draws 0 must be 1 or more"),
        (("--strategy", "usp", "--world-size", "2"), "usp: no usual parameters for 2 ranks"),
        (("--memory", "-1"), "--memory -1.0 must be"),
        (("--seq-len", "4k,8k"), "one problem, not 2"),
        (("--mask", "causal,full"), "one problem, not 2"),
        (("--gpus-per-node", "two"), "'two'"),
        (("-o", "page.pptx"), "is written as .html, .svg, .png, .pdf"),
        (("-o", "nowhere/page.html"), "there is no folder nowhere"),
    ],
)
def test_refusals(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.invoke([*NARROW, *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert line in shown.err


def test_a_cluster_of_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (PACKAGED / "h100-ib.toml").read_text(encoding="utf-8")
    begin, end = table.index("[links.across]"), table.index("[collectives]")
    file = tmp_path / "node.toml"
    file.write_text(table[:begin] + table[end:], encoding="utf-8")
    words = ["recommend", "--world-size", "16", "--cluster", str(file)]
    assert main.invoke(words) == 2
    assert "has no [links.across]: at most 8 ranks, those of a node" in capsys.readouterr().err
