"""Selectors: computation for a given selection, causality, and the methods of selections."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import choosing
import naive
import pytest
import torch
from choosing import BATCH, CASES, DIM, DOCUMENTS, HEADS_Q, IDS, TOKENS

import cpbench
from cpbench import masks
from cpbench.core import registry, tolerance
from cpbench.core.operator import QKV, BackwardInputs, Unsupported
from cpbench.core.problem import Case, Problem
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.base import Branch
from cpbench.selectors.common.pooling import NO_POOL, Pool
from cpbench.selectors.selections import Blocks, LandmarkBlocks, Lines, block_grid
from cpbench.sweep import sweep_file

# --- computation for a given selection ----------------------------------------------------------


def _mean_matrix(tokens: int, pool: Pool) -> torch.Tensor:
    """Mean pooling as a matrix, ``[n, T]``."""
    matrix = torch.zeros(pool.num_windows(tokens), tokens, dtype=torch.float64)
    for i in range(len(matrix)):
        window = slice(i * pool.stride, min(i * pool.stride + pool.size, tokens))
        matrix[i, window] = 1 / (window.stop - window.start)
    return matrix


def _expected(
    branches: tuple[Branch, ...], inputs: list[torch.Tensor], joined: bool = False
) -> dict[str, torch.Tensor]:
    """float64 autograd of the definition: a sum over branches of softmaxes within their masks, with
    constant factors or by their lse."""
    q, k, v, dout = inputs
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outs, lses = [], []
    for branch in branches:
        mean_q, mean_k = _mean_matrix(TOKENS, branch.pool_q), _mean_matrix(TOKENS, branch.pool_k)
        q_, k_, v_ = (
            torch.einsum("nt,bthd->bnhd", mean, x)
            for mean, x in zip((mean_q, mean_k, mean_k), branch.turned(QKV(*leaves)), strict=True)
        )
        if branch.derived is not None:
            k_, v_ = branch.derived.derive(QKV(*leaves))
        k_, v_ = (x.repeat_interleave(HEADS_Q // x.shape[2], 2) for x in (k_, v_))
        scores = torch.einsum("bshd,bthd->bhst", q_, k_) * DIM**-0.5
        if isinstance(branch.mask, LandmarkBlocks):
            scores = _weighted_by_landmarks(scores, branch.mask.grid.block_k)
        if isinstance(branch.mask, AttnMask):
            visible = torch.as_tensor(branch.mask.to_dense())
        else:
            visible = branch.mask.dense_rows(0, TOKENS)
        lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1, True)
        probs = torch.where(visible, (scores - lse.nan_to_num(neginf=0.0)).exp(), 0.0)
        out = torch.einsum("bhst,bthd->bshd", probs, v_)
        if branch.pool_q != NO_POOL:
            out = out.repeat_interleave(branch.pool_q.size, 1)[:, :TOKENS]
        outs.append(branch.gate * out)
        lses.append(lse[..., 0] + math.log(branch.key_weight))
    lse = torch.stack(lses).logsumexp(0) if joined else lses[0]
    if joined:
        weights = [(x - lse).exp().transpose(1, 2)[..., None] for x in lses]
        outs = [weight * out for weight, out in zip(weights, outs, strict=True)]
    total = torch.stack(outs).sum(0)
    grads = torch.autograd.grad(total, leaves, dout.double())
    results = {"out": total.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    if joined or len(branches) == 1:
        results["lse"] = lse.detach()
    return results


def _weighted_by_landmarks(scores: torch.Tensor, block: int) -> torch.Tensor:
    """Scores by which the softmax of a block has the probability of its last key."""
    weighted = scores.clone()
    for begin in range(0, TOKENS - block + 1, block):
        own, landmark = scores[..., begin : begin + block - 1], begin + block - 1
        shift = scores[..., landmark : landmark + 1] - own.logsumexp(-1, True)
        weighted[..., begin:landmark] = own + shift
    return weighted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "mask"), CASES, ids=IDS)
def test_results_match_the_selection(spec: str, mask: str, dtype: torch.dtype) -> None:
    inputs = choosing.inputs(dtype)
    selector, plan = choosing.load_selector(spec, mask)
    out, lse = selector.forward(QKV(*inputs[:3]), plan)
    grads = selector.backward(BackwardInputs(inputs[3], *inputs[:3], out, lse), plan)
    results = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    expected = _expected(selector.selection_of(out).branches, inputs, selector.joined)
    limit = 2e-6 if dtype == torch.float32 else 1.5e-2
    assert (lse is not None) == ("lse" in expected)
    empty_rows = ~torch.as_tensor(masks.build(mask, TOKENS).to_dense()).any(1)
    assert not out[:, empty_rows].any()
    assert not grads[0][:, empty_rows].any()
    for name, value in expected.items():
        actual = results[name]
        assert actual is not None
        if name != "lse":
            assert actual.dtype == dtype
        assert naive.error(actual, value) < limit, name


@pytest.mark.parametrize(
    "kernel", ["reference", "sdpa.cpu_flash", "bands", "gathered", "triton_block_sparse"]
)
def test_any_kernel_that_takes_blocks_computes_them(kernel: str) -> None:
    inputs = choosing.inputs()
    spec = f"oracle:block_size=16,keep=0.3,kernel={kernel}"
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    mask = masks.build(DOCUMENTS, TOKENS)
    out, _ = cpbench.attention(q, k, v, mask, operator=spec)
    out.backward(inputs[3])
    branches = choosing.select(spec, DOCUMENTS)
    expected = _expected(branches, inputs)
    for name, value in (("out", out), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
        assert naive.error(value.detach(), expected[name]) < 2e-6, name


def test_the_backward_pass_reuses_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = choosing.inputs()
    selector, plan = choosing.load_selector("moba:block_size=16,top_k=4", "causal")
    out, lse = selector.forward(QKV(*inputs[:3]), plan)
    monkeypatch.setattr(selector, "select", None)
    selector.backward(BackwardInputs(inputs[3], *inputs[:3], out, lse), plan)
    with pytest.raises(ValueError, match="the output that its own forward returned"):
        selector.backward(BackwardInputs(inputs[3], *inputs[:3], out.clone(), lse), plan)


@pytest.mark.parametrize("spec", [spec for spec, mask in CASES if mask == "causal"])
def test_a_selection_is_freed_with_its_output(spec: str) -> None:
    """Selections do not accumulate from call to call."""
    inputs = choosing.inputs()
    selector, plan = choosing.load_selector(spec, "causal")
    for _ in range(3):
        out, lse = selector.forward(QKV(*inputs[:3]), plan)
        selector.backward(BackwardInputs(inputs[3], *inputs[:3], out, lse), plan)
    assert len(selector.states) == 1
    del out, lse
    gc.collect()
    assert len(selector.states) == 0


# --- causality ----------------------------------------------------------------------------------


def _first_changed_query(spec: str, first: int) -> int:
    """The first query whose output changes if the tokens from ``first`` on are perturbed."""
    selector, plan = choosing.load_selector(spec, "causal")
    before, _ = selector.forward(QKV(*choosing.inputs()[:3]), plan)
    changed = torch.zeros(TOKENS, dtype=torch.bool)
    for seed in range(1, 6):
        perturbed = choosing.inputs()
        for x, y in zip(perturbed[:3], choosing.inputs(seed=seed)[:3], strict=True):
            x[:, first:] = 3 * y[:, first:]
        out, _ = selector.forward(QKV(*perturbed[:3]), plan)
        changed |= ((out - before).abs() > 1e-4).any(3).any(2).any(0)  # more than rounding
    return int(torch.nonzero(changed)[0, 0])


CAUSAL_CASES = [
    (spec, id_) for (spec, mask), id_ in zip(CASES, IDS, strict=True) if mask == "causal"
]


@pytest.mark.parametrize("spec", [s for s, _ in CAUSAL_CASES], ids=[i for _, i in CAUSAL_CASES])
def test_selectors_look_ahead_exactly_as_declared(spec: str) -> None:
    info = registry.operator_info(Spec.parse(spec).name)
    block = Spec.parse(spec).kwargs.get("block_q", 16)
    if block == 1:
        return
    perturbed = 5 * 32 + 9  # inside a block of either size
    first = _first_changed_query(spec, perturbed)
    if info.looks_ahead == "":
        assert first >= perturbed
    elif info.looks_ahead == "block":
        assert perturbed // block * block <= first < perturbed, "declared: within its block"
    else:
        assert first < perturbed, "declared: within the sequence"


def test_vsa_looks_ahead_everywhere() -> None:
    assert registry.operator_info("vsa").looks_ahead == "sequence"
    q, k, v, _ = choosing.inputs()
    with pytest.raises(Unsupported, match="takes full masks"):
        cpbench.attention(q, k, v, masks.build("causal", TOKENS), operator="vsa")


# --- methods of selections ----------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "mask"), CASES, ids=IDS)
def test_a_selection_agrees_with_its_dense_rows(spec: str, mask: str) -> None:
    for branch in choosing.select(spec, mask):
        selection = branch.mask
        if isinstance(selection, AttnMask):
            continue
        dense = selection.dense_rows(0, TOKENS)
        assert torch.equal(dense[:, :, 50:61], selection.dense_rows(50, 61))
        assert selection.area == pytest.approx(int(dense.sum()) / BATCH / HEADS_Q)
        for b, h, line in ((0, 0, 0), (1, 2, 77), (1, 3, TOKENS - 1)):
            keys = torch.nonzero(dense[b, h, line])[:, 0]
            assert selection.visible_keys(b, h, line).tolist() == keys.tolist()
            key = min(line, selection.seq_k - 1)  # of pooled ones there are fewer
            queries = torch.nonzero(dense[b, h, :, key])[:, 0]
            assert selection.visible_queries(b, h, key).tolist() == queries.tolist()
        if isinstance(selection, Blocks | Lines):
            heads = torch.as_tensor(selection.to_heads().to_dense()).view(dense.shape)
            assert torch.equal(heads, dense)


def test_diagonal_blocks_of_few_queries_are_at_the_end() -> None:
    mask = masks.build("causal", 100, seq_q=10)
    diagonal = block_grid(mask, 4, 16, "cpu").diagonal
    assert [torch.nonzero(row)[:, 0].tolist() for row in diagonal] == [[5], [5, 6], [6]]


def test_a_few_queries_of_many_tokens() -> None:
    q, k, v, dout = choosing.inputs()
    q, dout = q[:, -3:], dout[:, -3:]
    mask = masks.build("causal", TOKENS, seq_q=3)
    whole, _ = cpbench.attention(q, k, v, mask)
    for spec in ("quest:block_q=1,keep=1.0", "oracle:keep=1.0", "dsa:top_k=500", "moba:keep=1.0"):
        out, _ = cpbench.attention(q, k, v, mask, operator=spec)
        assert naive.error(out, whole) < 2e-6, spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("oracle:block_size=0", "block_size = 0 must be at least 1"),
        ("oracle:keep=1.5", "keep = 1.5 is a share"),
        ("xattention:stride=7", "stride = 7 must divide block_size = 128"),
        ("nsa:top_k=2", "top_k = 2 must be at least 3"),
        ("nsa:stride=24", "stride = 24 must divide"),
        ("flexprefill:gamma=2.0", "gamma = 2.0 must be from 0 to 1"),
        ("moba:kernel=bands", "moba selects rows"),
        ("moba:kernel=oracle", "is itself a selector"),
        ("oracle:kernel=nothing", "no operator 'nothing'"),
        ("minference.vertical_slash:vertical=0", "vertical = 0 must be at least 1"),
    ],
)
def test_bad_parameters_are_refused_in_one_line(spec: str, words: str) -> None:
    q, k, v, _ = choosing.inputs()
    with pytest.raises(ValueError, match=words) as caught:
        cpbench.attention(q, k, v, masks.build("causal", TOKENS), operator=spec)
    assert "\n" not in str(caught.value)


def test_a_kernel_in_a_file_enters_the_id_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"

    def case() -> Case:
        spec = {"name": "oracle", "kernel": f"{file}:OP"}
        return sweep_file.expand({"sweep": {"operator": spec}}, "s").cases[0]

    text = (
        "from cpbench.core.registry import OperatorInfo\n"
        "OP = OperatorInfo(name='mine', summary='', source='', load='a:b')\n"
    )
    file.write_text(text)
    before = case()
    file.write_text(f"{text}# changed\n")
    assert case().id != before.id
    assert before.data_content == ()
    spec = {"name": "oracle", "kernel": f"{tmp_path}/nowhere.py:OP"}
    with pytest.raises(ValueError, match="there is no file"):
        sweep_file.expand({"sweep": {"operator": spec}}, "s")


def test_a_kernel_without_lse_has_its_rows_sampled() -> None:
    from cpbench.api import Attention
    from cpbench.inputs import Recipe
    from cpbench.parallel.layout import build
    from cpbench.parallel.world import World
    from cpbench.verify import check, selection

    problem = Problem(batch=1, seq_q=300, seq_k=300, heads_q=4, heads_kv=2, head_dim=16,
                      dtype="float32")  # fmt: skip
    world = World.of(problem, masks.build("causal", 300), build("contiguous", 300, 1))
    work = Attention("oracle:block_size=16,kernel=sdpa.math", "single", world, 0, "cpu")
    x = check.rank_inputs(work, Recipe(), "cpu")
    results, selected = selection.run_pass_with_selection(work, x)
    errors = selection.check_sampled(work, x, results, selected, 0, check.RankContext("cpu"))
    assert set(errors) == {"out", "dq"}
    assert tolerance.violation(errors, "float32", work.op.info) is None


@pytest.mark.parametrize(
    ("spec", "mask"),
    [
        ("nsa:block_size=16,top_k=4,compress=8,stride=4,window=24", "causal"),
        ("vsa:block_size=16,keep=0.2", "full"),
    ],
)
def test_limits_of_branches_that_are_added_up_grow_with_their_scores(spec: str, mask: str) -> None:
    """Errors of 1e-5 are right where scores are in the hundreds, though the result has no lse."""
    from cpbench.api import Attention
    from cpbench.inputs import Recipe
    from cpbench.parallel.layout import build
    from cpbench.parallel.world import World
    from cpbench.verify import check, selection

    problem = Problem(batch=2, seq_q=300, seq_k=300, heads_q=4, heads_kv=2, head_dim=16,
                      dtype="float32")  # fmt: skip
    world = World.of(problem, masks.build(mask, 300), build("contiguous", 300, 1))
    work = Attention(spec, "single", world, 0, "cpu")
    x = check.rank_inputs(work, Recipe(), "cpu")
    x = {**x, "q": x["q"] * 64}
    results, selected = selection.run_pass_with_selection(work, x)
    assert "lse" not in results
    context = check.RankContext("cpu")
    for errors in (
        selection.check_small(work, x, context),
        selection.check_sampled(work, x, results, selected, 0, context),
    ):
        assert errors["out"]["scores"] > 100
        assert tolerance.violation(errors, "float32", work.op.info) is None
        errors["out"].pop("scores")
        assert tolerance.violation(errors, "float32", work.op.info) is not None
