"""Checks need little memory beside the case, however many heads it has; where they do not fit, the
case is unchecked, and the gang goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS
from whole_runs import run_cases

from cpbench import inputs as inputs_wing
from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.inputs import Recipe, parse
from cpbench.measure.device.cpu import Cpu
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.verify import at_size, check, fit, quality, tiles
from cpbench.verify.fingerprint import Fingerprinter
from cpbench.verify.selection import run_pass_with_selection

TOKENS, DIM = 1024, 64
CHUNK = 1 << 17  # elements: 1 MiB in float64
CONTEXT = check.RankContext("cpu")


def _work(heads: int, operator: str = "bands", dtype: str = "bfloat16") -> Attention:
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=heads, heads_kv=heads // 4, head_dim=DIM,
        dtype=dtype, direction="fwd_bwd" if operator == "bands" else "fwd",
    )  # fmt: skip
    world = World.of(problem, masks.build("causal", TOKENS), build("contiguous", TOKENS, 1))
    return Attention(operator, "single", world, 0, "cpu")


def _checks(heads: int) -> dict[str, Callable[[], Any]]:
    """Every check at size, of results of the right shapes."""
    work, recipe = _work(heads), Recipe(5)
    x = check.rank_inputs(work, recipe, "cpu")
    lse = torch.randn(1, heads, TOKENS, generator=torch.Generator().manual_seed(1))
    results = {"out": x["dout"], "lse": lse, "dq": x["q"], "dk": x["k"], "dv": x["v"]}
    statistics = at_size.query_statistics(work, x, results, CONTEXT)
    arguments = (work, x, results, recipe, 7)
    return {
        "statistics": lambda: at_size.query_statistics(work, x, results, CONTEXT),
        "lines": lambda: at_size.check_sampled(*arguments, CONTEXT, statistics),
        "tiles": lambda: tiles.check_tiles(*arguments, 0.0, CONTEXT, statistics),
        "fingerprint": lambda: Fingerprinter(work).take(results),
    }


def _quality(heads: int) -> Callable[[], Any]:
    work = _work(heads, "oracle:block_size=64,keep=0.2")
    x = check.rank_inputs(work, Recipe(5), "cpu")
    results, selection = run_pass_with_selection(work, x)
    return lambda: quality.measure_quality(work, x, results, selection)


def _peak(compute: Callable[[], Any]) -> int:
    compute()  # caches of masks and the like
    return Cpu(1).peak_bytes(compute)["peak"]


@pytest.mark.parametrize("name", ["statistics", "lines", "tiles", "fingerprint", "quality"])
def test_checks_need_no_more_memory_for_more_heads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CHUNK_ELEMENTS", CHUNK)
    few, many = (
        _peak(_quality(heads) if name == "quality" else _checks(heads)[name]) for heads in (8, 32)
    )
    assert many < 1.2 * few
    assert many < 20 * CHUNK * 8


def test_chunks_change_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors() -> tuple[Any, Any, Any, Any]:
        checks = _checks(8)
        lines = checks["lines"]().errors
        return checks["statistics"](), lines, _tiles(8), _quality(8)()

    whole = errors()
    monkeypatch.setattr(fit, "CHUNK_ELEMENTS", 1 << 12)
    statistics, lines, of_tiles, figures = errors()
    assert all((a == b).all() for a, b in zip(statistics, whole[0], strict=True))
    for name, metrics in lines.items():
        assert metrics == pytest.approx(whole[1][name], rel=1e-9)
    for name, metrics in of_tiles.items():
        assert metrics == pytest.approx(whole[2][name], rel=1e-5)
    assert figures == pytest.approx(whole[3], rel=1e-9)


def _tiles(heads: int) -> Any:
    """Errors of all tiles, of right results."""
    work, recipe = _work(heads), Recipe(5)
    x = check.rank_inputs(work, recipe, "cpu")
    results = check.run_pass(work, x, None)
    statistics = at_size.query_statistics(work, x, results, CONTEXT)
    return tiles.check_tiles(work, x, results, recipe, 7, 1e9, CONTEXT, statistics).errors


@pytest.mark.parametrize("value_dim", [0, DIM // 2, 2 * DIM])
@pytest.mark.parametrize("kind", ["normal", "sinks", "needles:count=4"])
def test_inputs_made_in_chunks_are_the_same(
    kind: str, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, recipe = _work(8), Recipe(5, parse(kind))
    problem = replace(work.problem, head_dim_v=value_dim)
    positions = (work.world.queries.positions(0), work.world.keys.positions(0))
    whole = check.make_inputs(problem, *positions, recipe, "cpu")
    monkeypatch.setattr(inputs_wing, "CHUNK_ELEMENTS", 100 * 8 * DIM)
    in_chunks = check.make_inputs(problem, *positions, recipe, "cpu")
    for name, x in whole.items():
        assert torch.equal(x, in_chunks[name])


@pytest.mark.parametrize(
    ("starved", "seq_len", "heads", "what"),
    [
        ("call=2,mib=13", 4096, 1, "the check at size"),  # takes over 16 MiB
        ("call=4,mib=12", 2048, 8, "the comparison of timed calls"),  # takes over 32 MiB
    ],
)
def test_a_check_that_does_not_fit_on_one_rank_leaves_the_case_unchecked(
    starved: str, seq_len: int, heads: int, what: str, tmp_path: Path
) -> None:
    record, after = run_cases(
        tmp_path,
        {"interleave": 1, "exposure": False, "memory": False},
        operator=[f"{HELPERS / 'planted' / 'starving_operators.py'}:starves:{starved}", "bands"],
        strategy="ring_allgather", mask="full", seq_len=seq_len, num_heads_q=heads, num_heads_kv=1,
        head_dim=256, direction="fwd", world_size=2, dtype="bfloat16",
    )  # fmt: skip
    assert (record.status, record.reason) == ("ok", None)
    assert record.iterations
    assert "unchecked" in record.disqualifications
    (note,) = record.notes
    assert note.startswith(f"unchecked: {what} did not fit in memory: rank 1: RuntimeError: ")
    assert "allocate memory" in note
    assert (after.status, after.writer) == ("ok", record.writer)  # measured by the same gang
    assert "unchecked" not in after.disqualifications
    assert {"small", "sampled", "tiles"} == set(after.errors)
