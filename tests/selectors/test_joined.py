"""Branches that are joined by their lse: results and gradients by definition, and their checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import naive_joined
import naive_selectors
import numpy as np
import pytest
import torch
from choosing import HEADS_KV, HEADS_Q, kept_blocks
from naive_selectors import Head, assert_top_k

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry, tolerance
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.selectors.common.base import Branch, SelectionResult, Selector, rows_of
from cpbench.selectors.joined.landmark import past_blocks_grid, past_blocks_mask
from cpbench.selectors.joined.pyramid import Pyramid
from cpbench.selectors.selections import Blocks, Tokens, block_grid
from cpbench.sweep import sweep_file
from cpbench.verify import check, joined, selection
from cpbench.verify.check import Tensors
from cpbench.verify.variants import InputVariants

TOKENS = 83  # definitions in loops are slow


def _loaded(spec: str) -> tuple[Selector, Any]:
    """A selector and its plan."""
    parsed = Spec.parse(spec)
    selector = registry.implementation(registry.operator_info(parsed.name), parsed.kwargs)
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=HEADS_Q, heads_kv=HEADS_KV, head_dim=16,
        dtype="float32",
    )  # fmt: skip
    return selector, selector.prepare(masks.build("causal", TOKENS), problem, "cpu")


def _inputs() -> list[torch.Tensor]:
    return naive.random_inputs(1, TOKENS, HEADS_Q, HEADS_KV, 16, torch.float32)


def _results(spec: str, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    selector, plan = _loaded(spec)
    out, lse = selector.forward(QKV(*inputs[:3]), plan)
    assert lse is not None
    dq, dk, dv = selector.backward(BackwardInputs(inputs[3], *inputs[:3], out, lse), plan)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def _chosen_blocks(spec: str) -> list[list[set[int]]]:
    """The past blocks of each query, by head."""
    chosen: list[list[set[int]]] = [[set() for _ in range(TOKENS)] for _ in range(HEADS_Q)]
    selector, plan = _loaded(spec)
    for branch in selector.select_from(QKV(*_inputs()[:3]), plan)[1:]:
        for _, h, t, block in torch.nonzero(kept_blocks(branch)).tolist():
            assert block not in chosen[h][t]
            chosen[h][t].add(block)
    return chosen


@pytest.mark.parametrize("budget", ["top_k=4", "keep=1.0"])
def test_landmark_follows_its_grouped_softmax(budget: str) -> None:
    spec = f"landmark:block_size=16,{budget}"
    chosen, inputs = _chosen_blocks(spec), _inputs()
    for h in range(HEADS_Q):
        head = Head(inputs[0], inputs[1], 0, h)
        for t in range(TOKENS):
            past = t // 16
            count = min(past, 3) if budget == "top_k=4" else past
            kept = torch.zeros(5, dtype=torch.bool)
            kept[list(chosen[h][t])] = True
            scores = [float(head.q[t] @ head.k[y * 16 + 15]) for y in range(past)]
            scores += [0.0] * (5 - past)
            assert_top_k(kept, scores, torch.arange(5) < past, set(), count)
    expected = naive_joined.results(inputs, lambda b, h: naive_joined.landmark(chosen[h], 16))
    for name, value in _results(spec, inputs).items():
        assert naive.error(value, expected[name]) < 2e-6, name


@pytest.mark.parametrize("tokens", [95, 96, 100])
def test_the_grid_of_past_blocks_is_that_of_their_mask(tokens: int) -> None:
    positions = np.array([0, 3, 15, 16, 50, 51, 94])
    mask = rows_of(past_blocks_mask(tokens, 16), positions)
    grid = past_blocks_grid(mask, 16, positions, "cpu")
    assert torch.equal(grid.areas, block_grid(mask, 1, 16, "cpu").areas)
    assert grid.starts.tolist() == positions.tolist()


@pytest.mark.parametrize(
    ("over_heads", "over_tokens", "top_k"),
    [("mean", "max", 2), ("max", "mean", 1), ("mean", "last", 3), ("max", "max", 16)],
)
def test_msa_pools_the_documents_with_the_best_chunks(
    over_heads: str, over_tokens: str, top_k: int
) -> None:
    spec = (
        f"msa:doc_lens=[8,16],query_len=20,prefix=8,chunk=4,top_k={top_k},"
        f"over_heads={over_heads},over_tokens={over_tokens}"
    )
    inputs, over = _inputs(), (over_heads, over_tokens)
    documents, query = naive_joined.msa_documents(TOKENS, [8, 16], 20, 8, 4)
    assert [len(x) for x in documents] == [8, 16, 8, 16, 4], "the query cuts the last one"
    selector, plan = _loaded(spec)
    pooled = selector.select(*inputs[:2], plan)[1].mask
    assert isinstance(pooled, Tokens)
    chunks = pooled.visible_keys(0, 0, TOKENS - 1).tolist()
    kept = torch.tensor([x.start // 4 in chunks for x in documents])
    chosen = torch.nonzero(kept)[:, 0].tolist()
    assert chunks == [c // 4 for i in chosen for c in documents[i][::4]]
    scores = naive_selectors.msa(*inputs[:2], 0, documents, query, 4, over)
    assert_top_k(kept, scores, torch.ones(5, dtype=torch.bool), set(), top_k)
    attend = naive_joined.msa(documents, query, chosen, 8, 4, 8 + top_k)
    expected = naive_joined.results(inputs, lambda b, h: attend)
    for name, value in _results(spec, inputs).items():
        assert naive.error(value, expected[name]) < 2e-6, name


@pytest.mark.parametrize(("top_k", "nearest"), [(4, 2), (2, 1), (5, 3), (100, 2)])
def test_longheads_takes_the_chunks_with_the_best_representatives(top_k: int, nearest: int) -> None:
    spec, inputs = f"longheads:chunk=12,top_k={top_k},nearest={nearest}", _inputs()
    past = _chosen_blocks(spec)
    chosen = [[[*sorted(past[h][t]), t // 12] for t in range(TOKENS)] for h in range(HEADS_Q)]
    for h in range(HEADS_Q):
        head = Head(inputs[0], inputs[1], 0, h)
        chunks = naive_selectors.longheads(*inputs[:3], 0, h, 12)  # type: ignore[call-arg]
        for t in range(TOKENS):
            own = t // 12
            scores = [float(head.q[t] @ chunk) for chunk in chunks]
            kept = torch.zeros(len(chunks), dtype=torch.bool)
            kept[list(past[h][t])] = True
            forced = {0, *range(max(own - nearest + 1, 0), own)}
            assert_top_k(kept, scores, torch.arange(len(chunks)) < own, forced, top_k - 1)
    expected = naive_joined.results(inputs, lambda b, h: naive_joined.longheads(chosen[h], 12))
    for name, value in _results(spec, inputs).items():
        assert naive.error(value, expected[name]) < 2e-6, name


@pytest.mark.parametrize("spec", ["msa", "msa:prefix=128", "msa:query_len=1,chunk=64,doc_lens=64"])
def test_msa_of_short_sequences(spec: str) -> None:
    """Without documents a sequence is a query, or a prefix, in causal attention with RoPE."""
    inputs = _inputs()
    found = _results(spec, inputs)
    if "chunk" not in spec:
        expected = _results(f"lm_infinite:window={TOKENS}", inputs)
        assert all(naive.error(x, expected[name].double()) < 2e-6 for name, x in found.items())
    else:  # one document, which is chosen, and a query of 19 tokens
        attend = naive_joined.msa([range(64)], range(64, TOKENS), [0], 0, 64, 16)
        expected = naive_joined.results(inputs, lambda b, h: attend)
        assert all(naive.error(x, expected[name]) < 2e-6 for name, x in found.items())


@pytest.mark.parametrize(
    ("spec", "attend"),
    [
        ("cca:group_size=8,window=20", naive_joined.cca(8, 20)),
        ("cca:group_size=7,window=1", naive_joined.cca(7, 1)),
        ("pyramid:window=12,ratio=4,scales=3", naive_joined.pyramid(12, 4, 3)),
        ("pyramid:window=5,ratio=3,scales=2", naive_joined.pyramid(5, 3, 2)),
        ("lm_infinite:num_sinks=3,window=20", naive_joined.lm_infinite(3, 20, 10000.0)),
        ("lm_infinite:num_sinks=0,window=1,base=50.0", naive_joined.lm_infinite(0, 1, 50.0)),
        ("lm_infinite:num_sinks=30,window=9,base=50", naive_joined.lm_infinite(30, 9, 50.0)),
        ("lm_infinite:window=200,base=50", naive_joined.lm_infinite(4, 200, 50.0)),
    ],
)
def test_results_that_no_choice_decides_and_their_gradients(spec: str, attend: Any) -> None:
    inputs = _inputs()
    expected = naive_joined.results(inputs, lambda b, h: attend)
    for name, value in _results(spec, inputs).items():
        assert naive.error(value, expected[name]) < 2e-6, name


def test_a_pyramid_has_every_past_key_once() -> None:
    for window, ratio, scales in ((12, 4, 3), (5, 3, 2), (1, 2, 6)):
        selector = Pyramid(window, ratio, scales)
        begins = [selector.scale_begins(TOKENS, scale).tolist() for scale in range(scales + 1)]
        for t in range(TOKENS):
            runs = naive_joined.pyramid_runs(t, window, ratio, scales)
            assert sorted(j for run in runs for j in run) == list(range(t + 1))
            for scale in range(scales + 1):
                of_scale = [run for run in runs if len(run) == ratio**scale]
                if of_scale:
                    assert begins[scale][t] == of_scale[-1].start


def test_a_pyramid_of_equal_keys_is_full_attention() -> None:
    """A mean stands for its tokens: with the same keys within every run nothing is lost."""
    q, k, v, dout = _inputs()
    k = k[:, ::16].repeat_interleave(16, 1)[:, :TOKENS]
    full = naive.attention(q, k, v, dout, masks.build("causal", TOKENS))
    found = _results("pyramid:window=12,ratio=4,scales=2", [q, k, v, dout])
    for name in ("out", "lse"):
        assert naive.error(found[name], full[name]) < 2e-6, name


def test_a_window_of_all_keys_is_full_attention_with_rope() -> None:
    q, k, v, dout = _inputs()
    scaled = {"base": 500, "scaling": "yarn", "factor": 4, "original_length": 40}
    params = ",".join(f"{key}={value}" for key, value in scaled.items())
    found = _results(f"lm_infinite:window={TOKENS},{params}", [q, k, v, dout])
    turned = [x.double().requires_grad_() for x in (q, k)]
    at = [cpbench.rope(x, **scaled) for x in turned]  # type: ignore[arg-type]
    full = naive.attention(*(x.detach() for x in at), v, dout, masks.build("causal", TOKENS))
    grads = torch.autograd.grad(at, turned, [full["dq"], full["dk"]])
    expected = {**full, "dq": grads[0], "dk": grads[1]}
    for name, value in found.items():
        assert naive.error(value, expected[name]) < 2e-6, name


def test_a_case_whose_inputs_have_rope_is_refused_in_one_line() -> None:
    data = {"sweep": {"operator": "lm_infinite", "rope": "unscaled", "seq_len": 256}}
    with pytest.raises(ValueError, match="lm_infinite applies RoPE itself") as caught:
        sweep_file.expand(data, "s")
    assert "\n" not in str(caught.value)


def test_kernels_that_take_an_external_lse_compute_joined_branches() -> None:
    inputs = _inputs()
    expected = _results("landmark:block_size=16,top_k=4", inputs)
    found = _results("landmark:block_size=16,top_k=4,kernel=reference", inputs)
    for name, value in found.items():
        assert naive.error(value, expected[name]) < 2e-6, name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("landmark:block_size=1", "block_size = 1 must be at least 2"),
        ("landmark:kernel=bands", "bands takes .* masks; landmark selects landmarks"),
        ("cca:window=0", "window = 0 must be at least 1"),
        ("cca:kernel=sdpa.math", "sdpa.math returns no lse by which branches are joined"),
        ("pyramid:ratio=1", "ratio = 1 must be at least 2"),
        ("lm_infinite:window=0", "window = 0 must be at least 1"),
        ("msa:doc_lens=[64,100]", r"doc_lens = \(64, 100\): 100 is not a multiple of chunk = 64"),
        ("longheads:top_k=2", "top_k = 2 must be at least 3"),
        ("msa:prefix=10", "prefix = 10 is not a multiple of chunk = 64"),
        ("msa:over_heads=last", "over_heads = 'last' is not one of mean, max"),
        ("msa:over_tokens=min", "over_tokens = 'min' is not one of max, mean, last"),
        ("lm_infinite:base=1", "base = 1 must be above 1"),
        ("lm_infinite:base=true", "base = True is not a number"),
        ("lm_infinite:scaling=new", "scaling = 'new' is not one of pi, ntk, yarn"),
        ("lm_infinite:scaling=yarn,factor=4", "yarn needs that of the training"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        _work(spec, 256)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "landmark:block_size=16,top_k=4",
        "pyramid:window=12,ratio=4,scales=2",
        "retrieval:top_k=8,num_sinks=4,window=12,step=4",
        "hax:buckets=4,latest=12,top_k=8",
        "seer:block_size=16,keep=0.3",
        "lm_infinite:num_sinks=3,window=20",
    ],
)
def test_parts_of_the_queries_give_the_results_of_all(spec: str) -> None:
    q, k, v, dout = _inputs()
    expected = _results(spec, [q, k, v, dout])
    selector, plan = _loaded(spec)
    mask = masks.build("causal", TOKENS)
    blocks = torch.arange(TOKENS) // 16 < 2  # the second part sees only a few blocks
    sums = [torch.zeros_like(x) for x in (k, v)]
    for part in (0, 1):
        rows = torch.nonzero(blocks == bool(part))[:, 0]
        problem = replace(plan.problem, seq_q=len(rows))
        own = selector.prepare_rows(mask, rows.numpy(), problem, "cpu")
        own_q, own_dout = q[:, rows], dout[:, rows]
        # What ranks select is put together branch by branch.
        assert len(selector.select(own_q, k, own)) == len(selector.select(q, k, plan))
        out, lse = selector.forward(QKV(own_q, k, v), own)
        assert lse is not None
        dq, *grads = selector.backward(BackwardInputs(own_dout, own_q, k, v, out, lse), own)
        for name, value in (("out", out), ("dq", dq)):
            assert naive.error(value, expected[name][:, rows]) < 2e-6, name
        assert naive.error(lse, expected["lse"][..., rows]) < 2e-6
        sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
    for name, total in zip(("dk", "dv"), sums, strict=True):
        assert naive.error(total, expected[name]) < 2e-6, name


# --- checks -------------------------------------------------------------------------------------


def _work(spec: str, tokens: int, dtype: str = "float32") -> Attention:
    problem = Problem(batch=2, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=2, head_dim=16,
                      dtype=dtype)  # fmt: skip
    world = World.of(problem, masks.build("causal", tokens), build("contiguous", tokens, 1))
    return Attention(spec, "single", world, 0, "cpu")


CHECKED = [
    "landmark:block_size=16,top_k=4",
    "cca:group_size=8,window=20",
    "pyramid:window=12,ratio=4,scales=2",
    "lm_infinite:num_sinks=3,window=20,scaling=yarn,factor=4,original_length=64",
    "msa:doc_lens=[8,16],query_len=20,prefix=8,chunk=4,top_k=2",
    "longheads:chunk=12,top_k=4",
]


CONTEXT = check.RankContext("cpu")


def _pass(work: Attention) -> tuple[Tensors, Tensors, SelectionResult]:
    """Inputs, results and selection of a pass."""
    x = check.rank_inputs(work, Recipe(), "cpu")
    return x, *selection.run_pass_with_selection(work, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", CHECKED)
def test_both_checks_pass_right_results(spec: str, dtype: str) -> None:
    work = _work(spec, 200, dtype)
    x, results, selected = _pass(work)
    small = selection.check_small(work, x, CONTEXT)
    for errors in (small, selection.check_sampled(work, x, results, selected, 0, CONTEXT)):
        assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
        assert tolerance.violation(errors, dtype, work.op.info) is None


@pytest.mark.parametrize("spec", CHECKED)
def test_the_sampled_check_finds_wrong_results(spec: str) -> None:
    work = _work(spec, 100)
    x, results, selected = _pass(work)
    # Rows are compared with the inputs alone, columns also with out and lse of the results.
    for names in (("out", "lse", "dq"), ("dk", "dv")):
        wrong = {n: results[n] + 0.01 if n == "lse" else results[n] * 1.01 for n in names}
        errors = selection.check_sampled(work, x, {**results, **wrong}, selected, 0, CONTEXT)
        for name in names:
            found = tolerance.violation({name: errors[name]}, "float32", work.op.info)
            assert found is not None, name


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        (
            "landmark:block_size=16,top_k=4",
            {"mask": lambda branch: Blocks(branch.mask.grid, branch.mask.kept)},
        ),
        ("cca:group_size=8,window=20", {"key_weight": 8}),
        ("pyramid:window=12,ratio=4,scales=2", {"key_weight": 1}),
        ("lm_infinite:num_sinks=3,window=20", {"turn_q": None}),
        ("lm_infinite:num_sinks=3,window=20", {"turn_k": None, "turn_q": None}),
        ("longheads:chunk=12,top_k=4", {"turn_q": None}),
        ("msa:doc_lens=[8,16],query_len=50,prefix=8,chunk=4,top_k=3", {"turn_k": None}),
    ],
)
def test_both_checks_follow_how_a_branch_is_joined(spec: str, wrong: dict[str, Any]) -> None:
    """Results are wrong for branches that claim to be joined in another way."""

    work = _work(spec, 200)
    x, results, selected = _pass(work)

    def changed(branch: Branch) -> Branch:
        values = {name: x(branch) if callable(x) else x for name, x in wrong.items()}
        return replace(branch, **values)

    claimed = selected._replace(
        prepared=tuple(
            one if i == 0 else one._replace(branch=changed(one.branch))
            for i, one in enumerate(selected.prepared)
        )
    )
    errors = selection.check_sampled(work, x, results, claimed, 0, CONTEXT)
    assert tolerance.violation(errors, "float32", work.op.info) is not None
    scale = work.problem.softmax_scale
    expected = joined.reference_results(claimed.branches, x, scale)
    assert naive.error(results["out"].transpose(1, 2), expected["out"]) > 1e-3


@pytest.mark.parametrize("spec", [*CHECKED, "retrieval:top_k=16,num_sinks=4,window=24,step=8"])
def test_timed_calls_of_changed_inputs_return_what_the_checked_one_did(spec: str) -> None:
    work = _work(spec, 200)
    x = check.rank_inputs(work, Recipe(), "cpu")
    results, _ = selection.run_pass_with_selection(work, x)
    inputs = InputVariants(work, x, {}, 0, 0.0, {})
    inputs.expect(results)
    for _ in range(2):
        inputs.before_call()
        inputs.after_call(selection.run_pass_with_selection(work, inputs.inputs)[0])
    assert inputs.finish() == ""
