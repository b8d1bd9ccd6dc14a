"""``cpbench predict``: its output, refusals and warnings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.simulator.cluster import PACKAGED, load
from cpbench.simulator.prediction import predict
from cpbench.tools.prediction import lines, memory_text, table


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def case(strategy: str = "ring", **fields: int | str) -> Case:
    values = {"seq_len": 32768, "world_size": 4, "ranks_per_node": 8, "num_heads_q": 64,
              "num_heads_kv": 8, "head_dim": 128, "dtype": "bfloat16", **fields}  # fmt: skip
    specs = {key: Spec.parse(str(values.pop(key, default))) for key, default in
             (("layout", "zigzag"), ("operator", "flash_attn.3"), ("mask", "causal"))}  # fmt: skip
    return Case(strategy=Spec.parse(strategy), **specs, **values)  # type: ignore[arg-type]


def test_a_prediction_adds_up() -> None:
    cluster = load("h100-ib")
    one = predict(case(), cluster)
    assert one["cluster_hash"] == cluster.digest
    assert one["warnings"] == []
    assert set(one["phases"]) == {"fwd", "bwd"}
    for phase in one["phases"].values():
        assert sum(phase["breakdown"].values()) == pytest.approx(phase["seconds"])
        assert phase["low"] < phase["seconds"] < phase["high"]
        assert 100 < phase["tflops_per_gpu"] < 1000
        assert phase["imbalance"] >= 1
    assert predict(case(), cluster) == one  # read from the cache


def test_a_direction_alone() -> None:
    whole = predict(case(), load("h100-ib"))["phases"]
    for direction in ("fwd", "bwd"):
        phases = predict(case(direction=direction), load("h100-ib"))["phases"]
        assert phases == {direction: whole[direction]}


def test_a_timeline_shows_what_the_prediction_adds_up() -> None:
    """Per rank and phase: kernels and waits of the timeline are those of the slowest rank."""
    one = predict(case(mask="causal_document:corpus=prolong64k,seed=1"), load("h100-ib"), True)
    events = [event for event in one["trace"]["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == set(range(4))
    begins = {e["name"]: e["ts"] for e in events if e["cat"] == "phase" and e["pid"] == 0}
    for name, phase in one["phases"].items():
        rank = phase["slowest_rank"]
        inside = [
            event for event in events
            if event["pid"] == rank
            and begins[name] <= event["ts"] < begins[name] + 1e6 * phase["seconds"] - 0.01
        ]  # fmt: skip
        for category, part in (("compute", "attention"), ("waiting", "exposed")):
            total = sum(event["dur"] for event in inside if event["cat"] == category)
            assert total == pytest.approx(phase["breakdown"][part] * 1e6, rel=1e-3, abs=1)
        assert any(event["cat"] == "transfer" for event in inside)
    assert len(one["trace"]["otherData"]["stragglers"]) == 2
    assert "trace" not in predict(case(), load("h100-ib"))


def test_an_unbalanced_layout_is_slower() -> None:
    even, uneven = (
        predict(case(layout=layout, direction="fwd"), load("h100-ib"))["phases"]["fwd"]
        for layout in ("zigzag", "contiguous")
    )
    assert uneven["seconds"] > 1.5 * even["seconds"]
    assert uneven["slowest_rank"] == 3
    assert uneven["imbalance"] > 1.4


def test_far_from_what_was_calibrated() -> None:
    many = predict(case("ring_allgather", mask="full", world_size=136, seq_len=136 * 128,
                        direction="fwd"), load("h100-ib"))  # fmt: skip
    assert many["warnings"] == [
        "extrapolated: 136 ranks, more than 4 times the 32 that h100-ib was calibrated on"
    ]
    long = predict(case("single", layout="contiguous", world_size=1, seq_len=1 << 16,
                        direction="fwd"), load("h100-ib"))  # fmt: skip
    assert long["warnings"][0].startswith("extrapolated: 65,536 tokens per rank, more than 4 times")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"head_dim": 64}, "has no kernel of flash_attn.3 in bfloat16 with head_dim 64"),
        ({"dtype": "float16"}, "has no kernel of flash_attn.3 in float16"),
        ({"operator": "bands"}, "has no kernel of bands"),
        ({"strategy": "torch.context_parallel"}, "sends through a library"),
        ({"strategy": "sparse_fetch"}, "sparse_fetch sends what is selected by the data"),
        ({"strategy": "ulysses", "num_heads_q": 6, "num_heads_kv": 2}, "6 on 4"),
        ({"strategy": "single", "layout": "contiguous"}, "1 rank"),
    ],
)
def test_refusals(changes: dict[str, int | str], line: str) -> None:
    with pytest.raises(ValueError) as error:
        predict(case(**changes), load("h100-ib"))  # type: ignore[arg-type]
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_copies_to_host_memory_need_its_links() -> None:
    cluster = load("h100-ib")
    offloaded = case("ulysses:offload=host,chunk=4k", layout="contiguous")
    one = predict(offloaded, cluster)
    plain = predict(case("ulysses", layout="contiguous"), cluster)
    slow = {**cluster.links, "host": dataclasses.replace(cluster.links["host"], gb_per_s=1)}
    slower = predict(offloaded, dataclasses.replace(cluster, links=slow))
    for phase, known in one["phases"].items():
        assert plain["phases"][phase]["seconds"] < known["seconds"]
        assert known["seconds"] < slower["phases"][phase]["seconds"]
    assert one["memory"]["inputs_bytes"] == 0 < one["memory"]["host_bytes"]
    assert "GiB of host memory" in memory_text(one["memory"])
    without = {name: link for name, link in cluster.links.items() if name != "host"}
    with pytest.raises(ValueError, match=r"has no \[links.host\], which the copies of ulysses:"):
        predict(offloaded, dataclasses.replace(cluster, links=without))


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cpbench", "predict", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_refused_strategy_does_not_lose_the_others() -> None:
    words = ("--world-size", "7", "--seq-len", "8k")
    done = command("ulysses,ring", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ring/contiguous x7" in done.stdout
    assert "refused: flash_attn.3 ulysses/contiguous x7" in done.stdout
    predicted, refused = json.loads(command("ulysses,ring", *words, "--json").stdout)
    assert predicted["phases"]["fwd"]["seconds"] > 0
    assert refused["refused"].startswith("ulysses needs num_heads_q divisible by the ranks")
    done = command("ring", "--dtype", "float32,bfloat16", *words)
    assert done.returncode == 0
    assert "refused: flash_attn.3 ring/contiguous x7" in done.stdout
    assert "has no kernel of flash_attn.3 in float32" in " ".join(done.stdout.split())
    done = command("ulysses", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cpbench: flash_attn.3 ulysses/contiguous x7")
    assert done.stderr.count("\n") == 1


def test_selectors_are_refused(tmp_path: Path) -> None:
    text = (PACKAGED / "h100-ib.toml").read_text().replace("flash_attn.3", "quest")
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match="quest selects by the data"):
        predict(case(operator="quest"), load(str(file)))


def test_the_command() -> None:

    sizes = ("--seq-len", "16k", "--world-size", "2", "--layout", "zigzag", "--direction", "fwd")
    done = command("ring", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["phases"]["fwd"]["seconds"] > 0
    for words, line in (
        (("ring", *sizes, "--cluster", "nosuch"), "no cluster 'nosuch'; there are: h100-ib"),
        (("ring", *sizes, "--head-dim", "64"), "with head_dim 64; there are: flash_attn.3"),
    ):
        done = command(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert line in done.stderr


def test_warnings_come_first() -> None:
    reply = {
        "case": "flash_attn.3 ring x2 S=16k",
        **predict(case(direction="fwd"), load("h100-ib")),
    }
    cluster = f"flash_attn.3 on h100-ib ({load('h100-ib').digest})"
    assert lines([reply]) == [f"{cluster}, ring x2 S=16k:"]
    assert lines([reply | {"warnings": ["extrapolated"]}])[0] == "extrapolated"
    (row,) = table([reply])
    assert "case" not in row
    other = reply | {"case": "flash_attn.3 usp x2 S=16k"}
    assert lines([reply, other]) == [f"{cluster}, x2 S=16k:"]
    assert [row["case"] for row in table([reply, other])] == ["ring", "usp"]
    longer = reply | {"case": "flash_attn.3 usp x2 S=16k fwd"}
    assert table([reply, longer])[0]["case"] == reply["case"]
    milliseconds = reply["phases"]["fwd"]["seconds"] * 1e3
    assert float(row["ms"]) == pytest.approx(milliseconds, rel=0.01)
    low, high = map(float, row["interval"].split(" to "))
    assert low < milliseconds < high
