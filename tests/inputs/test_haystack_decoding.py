"""Needles that the queries of a batch ask for, each in its own sequence over pages of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpbench.api import Attention
from cpbench.core.problem import Case
from cpbench.inputs import InputSequence, build_generator
from cpbench.masks.paged.batch import PagedBatch
from cpbench.parallel.world import World
from cpbench.sweep import sweep_file
from cpbench.verify.check import rank_inputs
from cpbench.verify.quality import count_shown, found_figures
from cpbench.verify.selection import run_pass_with_selection
from cpbench.worker.checks import recipe_of

LENS = [700, 64, 333]


def _case(inputs: str, **keys: Any) -> Case:
    shape = {"num_heads_q": 8, "num_heads_kv": 4}
    if "queries" not in keys:
        shape |= {"phase": "decode", "key_lens": LENS, "page_size": 16}
    (case,) = sweep_file.expand_table({**shape, "inputs": inputs, "direction": "fwd", **keys})
    return case


def _work(case: Case) -> Attention:
    return Attention(case.operator, case.strategy, World.of_case(case, 1), 0, "cpu")


def _found(inputs: str, **keys: Any) -> dict[str, float]:
    case = _case(inputs, **keys)
    work, recipe = _work(case), recipe_of(case)
    x = rank_inputs(work, recipe, "cpu")
    out, _, _ = work.forward(work.inputs_of(x), None)
    return found_figures([count_shown(out, np.arange(len(LENS)), work.problem, recipe)])


@pytest.mark.parametrize(
    "questions", ["depth=0.0", "depth=1.0", "depth=0.3,keys=3", "values=3", "length=4,depth=0.7"]
)
@pytest.mark.parametrize("operator", ["paged.gathered", "paged.sdpa", "bands"])
def test_exact_attention_finds_the_needle_of_each_sequence(questions: str, operator: str) -> None:
    assert _found(f"haystack:{questions}", operator=operator)["found"] > 0.97
    turned = {"rope": "unscaled:base=500000", "page_size": 256, "dtype": "bfloat16"}
    assert _found(f"haystack:{questions}", operator=operator, **turned)["found"] > 0.97


def test_a_window_finds_what_is_in_it() -> None:
    window = {"mask": "sliding_window_causal:window=40", "operator": "paged.gathered"}
    assert _found("haystack:depth=1.0", **window)["solved"] > 0.97
    assert _found("haystack:depth=0.2", **window)["found"] < 0.2
    # Half of the shortest sequence is in the window, and nothing of the others.
    assert 0.3 < _found("haystack:depth=0.7", **window)["found"] < 0.5


def test_needles_are_at_depth_in_the_slots_of_their_sequences() -> None:
    case = _case("haystack:depth=0.25,length=2", operator="bands")
    work, batch, haystack = _work(case), PagedBatch.of_case(case), build_generator(case.inputs)
    x = rank_inputs(work, recipe_of(case), "cpu")
    codes_of = set()
    for b, tokens in enumerate(LENS):
        planted, (asked,) = haystack.questions(0, work.problem, InputSequence(b, tokens, 1), 3)
        assert asked.tokens.tolist() == [tokens - 1]
        (start,) = planted.starts
        assert abs(start - 0.25 * (tokens - 3)) <= max(tokens // 50, 1)
        slots = batch.slots_of(b)
        shown = x["v"][0, torch.as_tensor(slots), 3].double() @ torch.as_tensor(planted.codes).T
        sure = shown.max(1).values > 7.9  # a code has length 8, and normals less along any one
        assert np.flatnonzero(sure.numpy()).tolist() == [start, start + 1]
        assert (shown[start : start + 2].argmax(1) == planted.code[0]).all()
        codes_of.add(int(planted.code[0]))
    assert len(codes_of) > 1


def test_a_page_that_is_left_out_is_noticed() -> None:
    case = _case("haystack:depth=0.5", operator="paged.gathered")
    work, recipe = _work(case), recipe_of(case)
    x = rank_inputs(work, recipe, "cpu")
    slots = PagedBatch.of_case(case).slots_of(0)[304:400]  # pages around the needles of the first
    x["k"][0, torch.as_tensor(slots)] = 0
    out, _, _ = work.forward(work.inputs_of(x), None)
    found = found_figures([count_shown(out, np.arange(3), work.problem, recipe)])["found"]
    assert 0.6 < found < 0.75


def test_ranks_count_what_their_queries_find() -> None:
    """As one rank that has them all; a rank may have none but padding."""
    case = _case("haystack:keys=2,depth=0.7", mask="sliding_window_causal:window=40")
    work, recipe = _work(case), recipe_of(case)
    x = rank_inputs(work, recipe, "cpu")
    out, _, _ = work.forward(work.inputs_of(x), None)
    whole, *parts = (
        count_shown(out[:, np.minimum(own, 2)], np.array(own), work.problem, recipe)
        for own in ([0, 1, 2], [1, 0], [2, 3], [4, 5])
    )
    assert [len(part) for part in parts] == [16, 8, 0]
    assert found_figures(parts) == found_figures([whole])
    assert 0.3 < found_figures(parts)["found"] < 0.5
    assert found_figures(parts[2:]) == {}


@pytest.mark.parametrize(
    ("queries", "operator", "finds"),
    [
        (1, "bands", True),
        (8, "recycled:stride=4,top_k=64", True),
        (1, "quest:block_size=16,keep=0.2", True),
        (1, "scored:top_k=64", False),  # keys of small norms, which needles have not
    ],
)
def test_a_few_queries_ask_for_theirs(queries: int, operator: str, finds: bool) -> None:
    """The selectors that decode take ``queries`` in place of the phase."""
    case = _case("haystack:depth=0.3", queries=queries, operator=operator, seq_len=700, batch=2)
    work, recipe = _work(case), recipe_of(case)
    x = rank_inputs(work, recipe, "cpu")
    if work.op.info.selects:
        out = run_pass_with_selection(work, x)[0]["out"]
    else:
        out, _, _ = work.forward(work.inputs_of(x), None)
    shown = count_shown(out, np.arange(queries), work.problem, recipe)
    assert {n[0] for n in shown.values()} == {queries}
    found = found_figures([shown])["found"]
    assert found > 0.9 if finds else found < 0.2


@pytest.mark.parametrize(
    ("inputs", "keys", "message"),
    [
        ("haystack:hops=2", {}, "hops = 2: the tokens of needles ask for one another"),
        ("haystack:hops=2", {"queries": 8}, "queries = 8 are the last tokens"),
        ("haystack:values=17", {}, "17 needles of 1 tokens at depth 0.5 and 1 queries do not fit "
                                   "seq_len = 64"),
        ("needles", {}, "inputs are one of normal, haystack, file, not needles"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    inputs: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        _case(inputs, **keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
