"""Decoding over pages: operators against plain loops, tables of pages, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import paged_stand_ins
import pytest
import torch
from adapters import PAGED, set_capability
from library_stand_ins import install
from naive_decoding import into_pages, naive_decode
from whole_runs import run_cases

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import QKV, declared_refusal
from cpbench.core.problem import Case, Problem
from cpbench.core.registry import implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.inputs.rope import rotation_of
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.paged.batch import PagedBatch
from cpbench.masks.paged.table import PageTable
from cpbench.sweep import sweep_file
from cpbench.tools.compiler import compilation

LENS = (70, 1, 48, 129)  # partial pages, a single token, whole pages
OPERATORS = [
    "paged.gathered", "paged.gathered:chunk=5", "paged.sdpa", "paged.triton",
    "paged.triton:splits=3", "bands",
]  # fmt: skip


def _sequences(heads: int, dim: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, dim, generator=generator) for tokens in LENS]


def _problem(slots: int, page_size: int, heads: tuple[int, int, int, int]) -> Problem:
    heads_q, heads_kv, dim, dim_v = heads
    return Problem(
        batch=1, seq_q=len(LENS), seq_k=slots, heads_q=heads_q, heads_kv=heads_kv, head_dim=dim,
        head_dim_v=0 if dim == dim_v else dim_v, dtype="float32", direction="fwd",
        page_size=page_size,
    )  # fmt: skip


def _decode(
    operator: str, page_size: int, order: np.ndarray, heads: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    heads_q, heads_kv, dim, dim_v = heads
    q = torch.randn(1, len(LENS), heads_q, dim, generator=torch.Generator().manual_seed(1))
    k, mask = into_pages(_sequences(heads_kv, dim, 2), page_size, order)
    v, _ = into_pages(_sequences(heads_kv, dim_v, 3), page_size, order)
    problem, spec = _problem(k.shape[1], page_size, heads), Spec.parse(operator)
    impl = implementation(operator_info(spec.name), spec.kwargs)
    assert impl.unsupported(problem, mask, "cpu") is None
    out, lse = impl.forward(QKV(q, k, v), impl.prepare(mask, problem, "cpu"))
    return out, lse


def _pages(page_size: int) -> int:
    return sum(-(-tokens // page_size) for tokens in LENS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("page_size", "heads"), [(16, (4, 2, 32, 32)), (48, (3, 3, 16, 8)), (256, (4, 1, 64, 64))]
)
def test_operators_against_plain_loops(
    operator: str, page_size: int, heads: tuple[int, int, int, int]
) -> None:
    if heads[2] != heads[3] and not operator_info(operator.partition(":")[0]).value_dims:
        pytest.skip("takes no values of another head_dim")
    if page_size == 48 and operator.startswith("paged.triton"):
        problem = _problem(96, page_size, heads)
        reason = implementation(operator_info("paged.triton"), {}).unsupported(problem, None, "cpu")
        assert reason == "paged.triton takes pages of a power of two, not 48"
        return
    order = np.random.default_rng(0).permutation(_pages(page_size))
    out, lse = _decode(operator, page_size, order, heads)
    q = torch.randn(1, len(LENS), heads[0], heads[2], generator=torch.Generator().manual_seed(1))
    keys, values = _sequences(heads[1], heads[2], 2), _sequences(heads[1], heads[3], 3)
    expected, expected_lse = naive_decode(q[0], keys, values)
    assert float((out[0] - expected).abs().max()) < 2e-6
    if lse is not None:
        assert float((lse[0].T - expected_lse).abs().max()) < 2e-6


@pytest.mark.parametrize("operator", OPERATORS)
def test_results_do_not_depend_on_where_pages_lie(operator: str) -> None:
    first, _ = _decode(operator, 16, np.arange(_pages(16)), (4, 2, 32, 32))
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(_pages(16))
        out, _ = _decode(operator, 16, order, (4, 2, 32, 32))
        assert float((out - first).abs().max()) < 1e-6


@pytest.mark.parametrize("pattern", ["causal", "sliding_window_causal:window=20"])
def test_tables_hold_the_slots_that_a_batch_shows(pattern: str) -> None:
    batch = PagedBatch(LENS, 16)
    mask = batch.mask(Spec.parse(pattern))
    table = PageTable.of(mask, 16)
    for b, tokens in enumerate(LENS):
        row = masks.build(pattern, tokens).to_dense()[-1]
        shown = np.sort(batch.slots_of(b)[row])
        assert np.array_equal(np.sort(table.slots(b)), shown)
        assert np.array_equal(np.flatnonzero(mask.to_dense()[b]), shown)
        assert np.array_equal(batch.positions[batch.slots_of(b)], np.arange(tokens))
    assert batch.slots % (8 * 16) == 0
    pages, lens, reason = table.block_table()
    if pattern == "causal":
        assert reason is None
        assert lens.tolist() == list(LENS)
        assert len({*batch.table.tolist()}) == len(batch.table)
        for b, tokens in enumerate(LENS):
            slots = pages[b][:, None] * 16 + np.arange(16)
            assert np.array_equal(np.sort(slots.reshape(-1)[:tokens]), np.sort(batch.slots_of(b)))
    else:
        assert "cuts some" in str(reason)


def test_queries_that_see_nothing() -> None:
    """As on a rank that holds no page of a sequence."""
    mask = AttnMask.from_slices(2, 64, [(0, 1, 0, 64, 0, 63)])
    problem = replace(_problem(64, 16, (4, 2, 16, 16)), seq_q=2)
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 64, 2, 16), torch.randn(1, 64, 2, 16)
    for name in ("paged.gathered", "paged.sdpa", "paged.triton"):
        impl = implementation(operator_info(name), {})
        out, lse = impl.forward(QKV(q, k, v), impl.prepare(mask, problem, "cpu"))
        assert not out[0, 1].any()
        assert out[0, 0].any()
        if lse is not None:
            assert torch.isneginf(lse[0, :, 1]).all()
            assert lse[0, :, 0].isfinite().all()


def test_launches_compile_ahead_of_time() -> None:
    targets = ["cuda:80", "cuda:90", "cuda:100"]
    requests = compilation.compile_requests(["paged.triton"], targets, ["bfloat16"], [128], {})
    rows = compilation.compile_kernels(requests)
    assert {row["kernel"] for row in rows} == {"attend", "merge_splits"}
    assert len(rows) == 6
    assert all(map(compilation.compiles_well, rows))


def test_paged_operators_compute_decoding_only() -> None:
    problem = _problem(64, 0, (4, 2, 32, 32))
    for name, info in registry.operators().items():
        if info.paged and not info.requires[1:]:
            assert declared_refusal(info, problem, "cpu") == (
                f"{name} decodes over pages; use phase decode"
            )


def test_positions_of_rope_are_those_in_the_sequences() -> None:
    (case,) = sweep_file.expand_table(
        {"phase": "decode", "key_lens": [40, 70], "page_size": 16, "rope": "unscaled"}
    )
    rotation, problem, batch = rotation_of(case), case.problem, PagedBatch.of_case(case)
    assert rotation is not None
    x = torch.randn(1, 2, 4, 64)
    import cpbench

    assert torch.equal(rotation.apply("q", x, problem, np.arange(2)), cpbench.rope(x, [39, 69]))
    rows = torch.randn(1, 70, 4, 64)
    turned = rotation.apply("k", rows, problem, batch.slots_of(1))
    assert torch.equal(turned, cpbench.rope(rows))


def test_one_batch_is_one_case() -> None:
    def case(**keys: object) -> Case:
        (one,) = sweep_file.expand_table({"phase": "decode", **keys})
        return one

    assert case(batch=2, seq_len=64).id == case(key_lens=[64, 64], page_size=64).id
    unequal = case(key_lens=["1k", 70])
    assert (unequal.batch, unequal.seq_len, unequal.key_lens) == (2, 1024, (1024, 70))
    assert Case.from_json(unequal.to_json()) == unequal
    assert case(key_lens="[1k, 70]").id == unequal.id
    several = sweep_file.expand_table({"phase": "decode", "key_lens": [[5, 6], [7]]})
    assert [one.key_lens for one in several] == [(5, 6), ()]


# --- libraries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGED)
def test_adapters_on_stand_ins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, paged_stand_ins.MODULES)
    set_capability(monkeypatch, (9, 0))
    page_size, heads = (256, (4, 2, 64, 64))
    q = torch.randn(1, 5, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    sequences = [_sequences(2, 64, seed) for seed in (2, 3)]
    order = np.random.default_rng(0).permutation(_pages(page_size))
    (k, mask), (v, _) = (
        into_pages([x.bfloat16() for x in one], page_size, order) for one in sequences
    )
    mask = AttnMask.from_slices(5, mask.seq_k, mask.slices)  # the last one sees nothing
    problem = replace(_problem(k.shape[1], page_size, heads), seq_q=5, dtype="bfloat16")
    impl = implementation(operator_info(name), {})
    assert impl.unsupported(problem, mask, "cuda") is None
    out, lse = impl.forward(QKV(q, k, v), impl.prepare(mask, problem, "cpu"))
    rounded = [[x.bfloat16() for x in one] for one in sequences]
    expected, expected_lse = naive_decode(q[0, :4], *rounded)
    assert float((out[0, :4] - expected).abs().max()) < 1e-2
    assert float((lse[0, :, :4].T - expected_lse).abs().max()) < 1e-4
    assert not out[0, 4].any()
    assert torch.isneginf(lse[0, :, 4]).all()


def test_adapters_refuse_what_libraries_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    set_capability(monkeypatch, (9, 0))
    batch = PagedBatch(LENS, 16)
    problem = _problem(batch.slots, 16, (4, 2, 64, 64))
    causal, window = (
        batch.mask(Spec.parse(x)) for x in ("causal", "sliding_window_causal:window=20")
    )
    flash, infer = (implementation(operator_info(name), {}) for name in PAGED)
    assert "pages of a multiple of 256, not 16" in flash.unsupported(problem, causal, "cuda")
    assert infer.unsupported(problem, causal, "cuda") is None
    assert "whole pages before the last" in infer.unsupported(problem, window, "cuda")


# --- whole runs -----------------------------------------------------------------------------------

READS_WHOLE_PAGES = """
from dataclasses import replace
from cpbench.core.registry import operator_info
from cpbench.kernels.paged.gathered import Chunk, PagedGathered


class Wrong(PagedGathered):
    def prepare(self, mask, problem, device):  # a partial page as if it were full
        plan = super().prepare(mask, problem, device)
        *others, (*whole, last) = plan.chunks
        more = Chunk(last.index.new_tensor([*last.index.tolist(), int(last.index.max()) + 1]), 1)
        return replace(plan, chunks=(*others, (*whole, more)))


OP = replace(operator_info("paged.gathered"), name="wrong", load=Wrong)
"""


def test_runs_check_every_output_and_say_how_fast_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(READS_WHOLE_PAGES)
    records = run_cases(
        tmp_path / "run", {"memory": False, "max_seconds": 0.05}, phase="decode",
        key_lens=[900, 64, 17], page_size=16, seq_len=900, num_heads_q=4, num_heads_kv=2,
        inputs="haystack",
        operator=["paged.gathered", "bands", f"{tmp_path}/wrong.py:OP"],
    )  # fmt: skip
    good, bands, wrong = records
    assert [record.status for record in (good, bands)] == ["ok", "ok"]
    assert set(good.errors) == {"full"}
    assert set(good.errors["full"]) == {"out", "lse"}
    assert good.area == 981
    assert good.quality == bands.quality == {"found": 1.0, "solved": 1.0}
    assert wrong.status == "wrong"
    from cpbench.reports.frame import load

    table = load(tmp_path / "run").set_index("operator")
    row = table.loc["paged.gathered"]
    read = 981 * 2 * 2 * 16 * 4  # keys, K and V, heads, head_dim, bytes
    assert row["kv_gb_s"] == pytest.approx(read / row["time_ms"] / 1e6)
    assert row["token_us"] == pytest.approx(row["time_ms"] * 1e3 / 3)
    assert row["stream_share"] == pytest.approx(row["kv_gb_s"] / row["copy_gb_s"])
    assert row["density"] == 1


def test_several_ranks_decode_over_pages(tmp_path: Path) -> None:
    records = run_cases(
        tmp_path / "run", {"time": False}, phase="decode", key_lens=[300, 41, 700], page_size=32,
        seq_len=700, strategy=["tree", "ulysses"], world_size=2, rope="unscaled",
        operator=["paged.gathered", "bands", "paged.sdpa"], inputs="haystack:depth=0.3",
    )  # fmt: skip
    (refused,) = (record for record in records if record.status != "ok")
    assert len(records) == 6
    assert (refused.case.strategy.name, refused.case.operator.name) == ("tree", "paged.sdpa")
    assert "log-sum-exp" in str(refused.reason)
    assert all(one.quality["found"] == 1 for one in records if one is not refused)
