"""Needles that queries ask for: exact attention finds all, and what sees none finds none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.inputs import InputSequence, Recipe, build_generator, parse, rope
from cpbench.inputs.rope import Rotation
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.sweep import sweep_file
from cpbench.verify import quality
from cpbench.verify.check import rank_inputs
from cpbench.verify.quality import count_shown, found_figures
from cpbench.verify.selection import run_pass_with_selection

TOKENS = 700
OWN_ROPE = "base=500000"


def _found(operator: str, inputs: str, rotation: str = "", **changes: Any) -> dict[str, float]:
    """What the outputs of an operator show."""
    work, recipe, x = _prepared(operator, inputs, rotation, **changes)
    out, _, _ = work.forward(work.inputs_of(x), None)
    return found_figures([count_shown(out, np.arange(TOKENS), work.problem, recipe)])


def _prepared(operator: str, inputs: str, rotation: str = "", **changes: Any) -> Any:
    values = {"batch": 1, "heads_q": 4, "heads_kv": 2, "head_dim": 64, "dtype": "float32"}
    problem = Problem(seq_q=TOKENS, seq_k=TOKENS, direction="fwd", **{**values, **changes})
    world = World.of(problem, masks.build("causal", TOKENS), build("contiguous", TOKENS, 1))
    work = Attention(operator, "single", world, 0, "cpu")
    turned = Rotation(rope.parse(rotation)) if rotation else None
    recipe = Recipe(0, parse(inputs), turned, work.op.info.rotates)
    return work, recipe, rank_inputs(work, recipe, "cpu")


@pytest.mark.parametrize(
    "rotation", ["", "unscaled:base=500000", "yarn:factor=8,original_length=99"]
)
@pytest.mark.parametrize(
    "questions", ["depth=0.0", "depth=1", "keys=8", "values=4", "hops=4,depth=0.1", "length=16"]
)
def test_exact_attention_finds_every_needle(questions: str, rotation: str) -> None:
    found = _found("bands", f"haystack:{questions}", rotation)
    assert found["found"] > 0.97
    assert found["solved"] > 0.9
    half = _found("bands", f"haystack:{questions}", rotation, dtype="bfloat16", head_dim_v=32)
    assert half["found"] > 0.97


def test_a_window_finds_what_is_in_it() -> None:
    window = "minference.a_shape:num_sinks=1,window=128"
    assert _found(window, "haystack:depth=1.0,length=8")["solved"] > 0.97
    assert _found(window, "haystack:depth=0.3,length=8")["found"] < 0.2
    # Links are nearer to one another than the end of the chain is to the question.
    far, near = (_found(window, f"haystack:depth=0.05,hops={hops}") for hops in (2, 6))
    assert far["found"] < 0.2
    assert near["found"] > 0.9
    # One of two links is in the window, of which the other is not.
    half = _found("minference.a_shape:num_sinks=1,window=400", "haystack:depth=0.05,hops=2")
    assert half["solved"] > 0.9
    values = _found(window, "haystack:depth=1.0,values=4")
    assert values["solved"] < 0.2 < values["found"] < 0.9


def test_what_rotates_keys_by_itself_finds_what_it_selects() -> None:
    """At other positions than those of full attention, too."""
    far = "haystack:depth=0.3,length=16"
    assert _found(f"longheads:chunk=32,top_k=5,{OWN_ROPE}", far)["found"] > 0.9
    assert _found(f"lm_infinite:num_sinks=4,window=128,{OWN_ROPE}", far)["found"] < 0.2
    assert _found(f"lm_infinite:num_sinks=4,window=600,{OWN_ROPE}", far)["found"] > 0.97
    docs = f"msa:doc_lens=32,query_len=96,chunk=32,top_k=3,{OWN_ROPE}"
    assert _found(docs, "haystack:depth=0.3,length=64")["found"] > 0.9


@pytest.mark.parametrize("inputs", ["needles:count=4,looking=1.0", "sinks:mass=0.8"])
def test_full_attention_with_their_rope_sees_what_is_planted(inputs: str) -> None:
    work, _, x = _prepared(f"lm_infinite:num_sinks=4,window=600,{OWN_ROPE}", inputs)
    q, k = (cpbench.rope(x[name].double(), base=500000) for name in "qk")
    scores = torch.einsum("shd,thd->hst", q[0], k[0].repeat_interleave(2, 1)) * 0.125
    hidden = ~torch.as_tensor(work.mask.to_dense())
    top = scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, 600:].topk(4, dim=2).values.sum(2)
    assert float(top.mean()) > 0.6  # of normals about a tenth


def test_the_recall_of_selectors_counts_needles_too() -> None:
    work, recipe, x = _prepared("moba:block_size=32,top_k=3", "haystack:depth=0.2,length=16")
    results, selection = run_pass_with_selection(work, x)
    figures = quality.measure_quality(work, x, results, selection)
    assert figures["mass"] < 0.7
    shown = count_shown(results["out"], np.arange(TOKENS), work.problem, recipe)
    assert found_figures([shown])["found"] > 0.9


def test_needles_are_where_they_are_said_to_be() -> None:
    work, recipe, x = _prepared("bands", "haystack:depth=0.25,hops=3,keys=3,length=4")
    haystack = build_generator(recipe.spec)
    for g in range(2):
        sequence = InputSequence(0, TOKENS, TOKENS)
        planted, (last, *links) = haystack.questions(0, work.problem, sequence, g)
        assert len(planted.starts) == len({*planted.code}) == 5
        room = TOKENS - 64 - 4
        wanted = (0.25 + 0.75 * np.array([2, 1, 0]) / 3) * room
        assert (np.abs(planted.starts[:3] - wanted) <= TOKENS // 50).all()
        assert last.tokens.tolist() == list(range(TOKENS - 64, TOKENS))
        assert [link.tokens[0] for link in links] == planted.starts[:2].tolist()
        assert [*last.answers] == [planted.code[0]]
        assert [[*link.answers] for link in links] == [[planted.code[1]], [planted.code[2]]]
        codes = x["v"][0, :, g].double() @ torch.as_tensor(planted.codes).T
        for start, code in zip(planted.starts, planted.code, strict=True):
            assert (codes[start : start + 4].argmax(1) == code).all()


def test_a_problem_without_room_has_no_needles() -> None:
    """As that of the small check, of a few hundred tokens."""
    work, recipe, x = _prepared("bands", "haystack:length=64,keys=4,queries=512")
    normal = rank_inputs(work, Recipe(0, parse("normal")), "cpu")
    assert all(torch.equal(x[name], normal[name]) for name in "qkv")
    assert not count_shown(x["q"], np.arange(TOKENS), work.problem, recipe)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("haystack:depth=1.5", "depth = 1.5 must be from 0 to 1"),
        ("haystack:hops=0", "hops = 0 must be at least 1"),
        ("haystack:mass=1.0", "mass = 1.0 must be above 0 and below 1"),
        ("haystack:hops=2,values=2", "values = 2 and hops = 2: one of them must be 1"),
        ("haystack:keys=40", "head_dim = 64 has room for 32"),
        ("haystack:values=70", "70 needles need more than 64 codes"),
        ("haystack:length=300", "do not fit seq_len = 1024"),
        ("haystack:hops=4,depth=1.0", "do not fit seq_len = 1024"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        sweep_file.expand({"sweep": {"inputs": spec}}, "s")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
