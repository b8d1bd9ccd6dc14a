"""``cpbench traffic`` of several cases: one table, ranked, with the time of measured links."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from limits import LIMIT_S

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.core.subprocess_call import RequestRefused
from cpbench.tools.link_rates import LinkRates, read_link_rates
from cpbench.tools.traffic import comparison, comparison_lines, link_ms, predict_traffic


def case(strategy: str, **fields: int | str) -> Case:
    values = {"seq_len": 4096, "world_size": 8, "ranks_per_node": 4, "num_heads_q": 8,
              "num_heads_kv": 8, **fields}  # fmt: skip
    layout = Spec.parse(str(values.pop("layout", "zigzag")))
    return Case(operator=Spec("bands"), strategy=Spec.parse(strategy), layout=layout, **values)


def test_the_table_of_volumes_of_mixers() -> None:
    """MiB of the busiest rank, forward (docs/mixers.md): Gated DeltaNet, 32 heads of 128 x 128."""
    shapes = {"num_heads_q": 32, "num_heads_kv": 32, "head_dim": 128, "direction": "fwd"}
    wanted = {("scan", 8): 28, ("scan", 64): 252, ("scan:by=ring", 8): 2, ("scan:by=ring", 64): 2,
              ("scan:by=doubling", 8): 10, ("scan:by=doubling", 64): 22}  # fmt: skip
    cases = [
        replace(case(name, layout="contiguous", world_size=size, **shapes),
                operator=Spec("gated_deltanet"))
        for name, size in wanted
    ]  # fmt: skip
    rows = comparison(cases, None)
    found = {(row["strategy"], row["world_size"]): row["sent_bytes"] / (1 << 20) for row in rows}
    assert found == wanted
    assert all(row["buffers_bytes"] > 0 for row in rows)


def test_mixers_and_strategies_of_attention_refuse_each_other() -> None:
    for operator, strategy, reason in (
        ("bands", "scan", "scan distributes sequence mixers; bands computes attention"),
        ("gla", "ring", "ring distributes attention; gla is a sequence mixer"),
    ):
        with pytest.raises(RequestRefused, match=reason):
            predict_traffic(replace(case(strategy), operator=Spec(operator)))
    few_heads = replace(case("scan", num_heads_kv=2), operator=Spec("gla"))
    window = replace(
        case("ulysses"), operator=Spec("gla"), mask=Spec.parse("sliding_window_causal:window=8")
    )
    for refused, reason in ((few_heads, "not 2 for 8"), (window, "gla takes causal")):
        with pytest.raises(RequestRefused, match=reason):
            predict_traffic(refused)


def link_file(path: Path, **times_us: dict[int, float]) -> Path:
    rows = [
        {"link": link, "operation": operation, "bytes": nbytes, "slowest_us": us, "us": us / 2}
        for link, times in times_us.items()
        for nbytes, us in times.items()
        for operation in ("p2p", "all_gather")
    ]
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_values_of_another_head_dim() -> None:
    cases = [case("ring", head_dim=192, head_dim_v=dim) for dim in (0, 128)]
    rows = comparison(cases, None)
    sent = {row["head_dim_v"]: row["sent_bytes"] for row in rows}
    assert sent[128] * 384 == sent[0] * 320
    lines = "\n".join(comparison_lines(rows))
    assert "head_dim 192, " in lines
    assert "head_dim 128 of values" in lines
    assert predict_traffic(cases[1])["head_dim_v"] == 128


def test_strategies_are_ranked_by_bytes_across_nodes() -> None:
    cases = [case(name, seq_len=n) for n in (4096, 8192)
             for name in ("ring", "ulysses", "usp:ulysses=4", "usp:ulysses=16")]  # fmt: skip
    rows = comparison(cases, None)
    for tokens in (4096, 8192):
        *ranked, last = [row for row in rows if row["seq_len"] == tokens]
        across = [row["across_bytes"] for row in ranked]
        assert across == sorted(across)
        assert len(set(across)) == 3
        assert "ulysses=16" in last["strategy"]
        assert "8" in last["refused"]
    (best,) = (c for c in cases[:4] if str(c.strategy) == rows[0]["strategy"])
    prediction = predict_traffic(best)
    assert rows[0]["across_bytes"] == max(prediction["bytes_across_nodes_per_rank"])
    assert rows[0]["sent_bytes"] == max(prediction["bytes_sent_per_rank"])
    assert rows[0]["buffers_bytes"] == max(prediction["buffers_bytes"].values())
    lines = comparison_lines(rows)
    assert all(len(line) <= 100 for line in lines)
    assert "4k tokens:" in lines
    assert sum(line.startswith("refused: usp:ulysses=16") for line in lines) == 1


def test_links_add_the_time_of_the_busiest_rank(tmp_path: Path) -> None:
    """Bytes over the rate of messages of their mean size, in either class of link."""
    rates = read_link_rates(
        link_file(tmp_path / "links.json", node={1: 1.0, 10**9: 1e4}, across={1: 1.0, 10**9: 1e5})
    )
    assert rates.gb_per_s("node", 2 * 10**9) == pytest.approx(100)
    assert rates.gb_per_s("across", 10**9) == pytest.approx(10)
    assert rates.gb_per_s("across", 10**4.5) == pytest.approx(10**4.5 / 10**2.5 / 1e3)
    prediction = {
        "bytes_same_node_per_rank": [10**9, 0], "bytes_across_nodes_per_rank": [0, 2 * 10**9],
        "messages_per_rank": [1, 2],
    }  # fmt: skip
    assert link_ms(prediction, rates) == pytest.approx(200)
    ring, ulysses = (row["link_ms"] for row in comparison([case("ring"), case("ulysses")], rates))
    assert ring != ulysses
    with pytest.raises(ValueError, match="no links across nodes were measured"):
        comparison([case("ring")], LinkRates({"node": {1: 1.0}}))


def test_the_command(tmp_path: Path) -> None:
    file = link_file(tmp_path / "links.json", node={1024: 10.0, 1 << 20: 100.0})

    def traffic(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cpbench", "traffic", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    sizes = ("--seq-len", "4k", "--world-size", "4")
    done = traffic("ring,ulysses", *sizes, "--links", str(file))
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.split("\n\n")[1].strip().splitlines()
    assert head.split()[-2:] == ["ms", "links"]
    times = [float(row.split()[-1]) for row in rows]
    assert times == sorted(times)
    data = json.loads(traffic("ring,ulysses", *sizes, "--json").stdout)
    assert {row["strategy"] for row in data} == {"ring", "ulysses"}
    one = traffic("ring", *sizes, "--links", str(file))
    assert "links of the busiest rank need" in one.stdout
    (tmp_path / "bad.json").write_text("[]")
    for words, line in (
        (("ring,nosuch", *sizes), "no strategy 'nosuch'"),
        (("ring", *sizes, "--links", str(tmp_path / "bad.json")), "not a file of cpbench links"),
        (("ring,ulysses", *sizes, "--gpus-per-node", "2", "--links", str(file)), "across nodes"),
        (("ulysses,usp:ulysses=16", "--num-heads-kv", "3", "--num-heads-q", "3"), "ulysses"),
    ):
        done = traffic(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert line in done.stderr
