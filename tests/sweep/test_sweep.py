"""Sweeps: products, includes, excludes, mask seeds, conditions, and stable ids."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.parallel import layout
from cpbench.sweep import refusals, sweep_file
from cpbench.sweep.conditions import select_cases

SMALL = st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True)


def cases(**table: Any) -> list[Case]:
    return sweep_file.expand_table(table)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=SMALL,
    batch=SMALL,
    seq_len=SMALL,
    direction=st.lists(st.sampled_from(["fwd", "bwd", "fwd_bwd"]), min_size=1, unique=True),
)
def test_product(
    seed: list[int], batch: list[int], seq_len: list[int], direction: list[str]
) -> None:
    expanded = cases(seed=seed, batch=batch, seq_len=seq_len, direction=direction)
    values = {(case.seed, case.batch, case.seq_len, case.direction) for case in expanded}
    assert values == set(itertools.product(seed, batch, seq_len, direction))
    assert len({case.id for case in expanded}) == len(expanded) == len(values)


def test_sizes() -> None:
    assert [c.seq_len for c in cases(seq_len=["4k", 5])] == [4096, 5]


def test_kv_heads_follow_q_heads() -> None:
    assert [c.num_heads_kv for c in cases(num_heads_q=[2, 8])] == [2, 8]
    assert cases(num_heads_q=8, num_heads_kv=2)[0].num_heads_kv == 2
    assert cases(num_heads_kv=2)[0].num_heads_q == Case().num_heads_q


def test_mask_seeds() -> None:
    """A list of values of a mask's parameter is an axis; doc_lens is a list itself."""
    expected = [Spec.parse(f"causal_document:corpus=pile,seed={seed}") for seed in (0, 1, 2)]
    table = {"name": "causal_document", "corpus": "pile", "seed": [0, 1, 2]}
    assert [c.mask for c in cases(mask="causal_document:corpus=pile,seed=[0,1,2]")] == expected
    assert [c.mask for c in cases(mask=[table])] == expected
    assert len(cases(mask="streaming:num_sinks=[1,2],window=[3,4,5]")) == 6
    (lens,) = cases(mask="full_document:doc_lens=[3,5]", seq_len=8)
    assert lens.mask.kwargs == {"doc_lens": (3, 5)}


def test_include_replaces_keys_of_the_sweep() -> None:
    expanded = sweep_file.expand(
        {
            "sweep": {"mask": ["full", "causal"], "seq_len": 64},
            "include": [{"mask": "full", "world_size": [2, 4], "strategy": "ring"}],
        },
        "s",
    ).cases
    assert [(c.mask.name, c.strategy.name, c.world_size, c.seq_len) for c in expanded] == [
        ("full", "single", 1, 64),
        ("causal", "single", 1, 64),
        ("full", "ring", 2, 64),
        ("full", "ring", 4, 64),
    ]


def test_duplicates_are_removed() -> None:
    expanded = sweep_file.expand({"sweep": {"seed": [1, 1]}, "include": [{"seed": 1}]}, "s").cases
    assert [case.seed for case in expanded] == [1]


def test_exclude_matches_all_keys_and_any_value() -> None:
    table = {
        "sweep": {"strategy": ["ring", "ulysses"], "world_size": [2, 3, 4]},
        "exclude": [{"strategy": "ulysses", "world_size": [3, 4]}],
    }
    left = [(c.strategy.name, c.world_size) for c in sweep_file.expand(table, "s").cases]
    assert left == [("ring", 2), ("ring", 3), ("ring", 4), ("ulysses", 2)]


def test_exclude_by_name_or_by_whole_spec() -> None:
    base = {"mask": ["streaming:window=[3,4]", "full"]}
    by_name = sweep_file.expand({"sweep": base, "exclude": [{"mask": "streaming"}]}, "s").cases
    assert [str(c.mask) for c in by_name] == ["full"]
    whole = sweep_file.expand(
        {"sweep": base, "exclude": [{"mask": "streaming:window=3"}]}, "s"
    ).cases
    assert [str(c.mask) for c in whole] == ["streaming:window=4", "full"]


def test_exclude_applies_to_includes_too() -> None:
    expanded = sweep_file.expand(
        {"sweep": {"seed": 1}, "include": [{"seed": 2}, {"seed": 3}], "exclude": [{"seed": 2}]}, "s"
    ).cases
    assert [case.seed for case in expanded] == [1, 3]


def test_where() -> None:
    expanded = cases(seq_len=["1k", "2k"], mask=["full", "streaming:window=[3,4]"], seed=[1, 2])
    assert len(select_cases(expanded, ["seq_len=1k,2k"])) == len(expanded)
    assert len(select_cases(expanded, ["mask=streaming"])) == 8
    assert len(select_cases(expanded, ["mask=streaming:window=3,full", "seed=1"])) == 4
    assert select_cases(expanded, []) == expanded


def test_split_list() -> None:
    assert sweep_file.split_list("a,b:x=1,y=2,c:z=[1,2],d") == ["a", "b:x=1,y=2", "c:z=[1,2]", "d"]


# Ids identify records on disk: if one changes, its records are lost.
FROZEN: dict[str, dict[str, Any]] = {
    "44136fa355b3": {},
    "114e5a70b8eb": {"mask": "causal_document:corpus=pile,seed=3", "seq_len": "64k"},
    "836f83383a59": {
        "operator": "sdpa.cpu_flash",
        "mask": "sliding_window:window=512",
        "dtype": "bfloat16",
        "direction": "fwd",
    },
    "6ff0bb473cf4": {
        "strategy": "ring",
        "layout": "zigzag",
        "world_size": 4,
        "num_heads_q": 8,
        "num_heads_kv": 2,
    },
    "666091512ad4": {
        "mask": "full_document:doc_lens=[1,1023]",
        "batch": 2,
        "head_dim": 128,
        "seed": 7,
    },
}


def test_ids_are_frozen() -> None:
    assert [cases(**table)[0].id for table in FROZEN.values()] == list(FROZEN)


def test_defaults_are_left_out_of_the_id() -> None:
    defaults = Case().to_json()
    defaults.pop("content")
    swept = {key: [value] for key, value in defaults.items() if value != []}  # key_lens
    assert cases(**swept)[0].id == Case().id
    assert Case.from_json({}).id == Case().id
    assert Case.from_json({**defaults, "field_of_a_newer_version": 1}).id == Case().id


def test_every_key_is_in_the_id() -> None:
    changes = {
        "operator": "reference",
        "strategy": "ring",
        "layout": "zigzag",
        "mask": "full",
        "inputs": "sinks",
        "rope": "unscaled",
        "batch": 2,
        "seq_len": 64,
        "queries": 1,
        "num_heads_q": 8,
        "num_heads_kv": 2,
        "head_dim": 32,
        "head_dim_v": 32,
        "dtype": "bfloat16",
        "direction": "fwd",
        "world_size": 2,
        "ranks_per_node": 1,
        "seed": 1,
        "phase": "decode",
    }
    paged = {"page_size": 16, "key_lens": [7, 9]}
    assert {*changes, *paged, "placement"} == set(sweep_file.KEYS)
    ids = {cases(**{key: value})[0].id for key, value in changes.items()}
    assert len(ids | {Case().id}) == len(changes) + 1
    decoding = [{}, *({key: value} for key, value in paged.items())]
    assert len({cases(phase="decode", **keys)[0].id for keys in decoding}) == 3
    usp = {"strategy": "usp", "world_size": 2}
    assert cases(**usp)[0].id != cases(**usp, placement="ring")[0].id


def test_a_head_dim_of_values_that_is_that_of_keys_is_the_same_case() -> None:
    same = cases(head_dim=[48, 64], head_dim_v=[0, 48])
    assert [(c.head_dim, c.head_dim_v) for c in same] == [(48, 0), (48, 0), (64, 0), (64, 48)]
    assert same[0].id == same[1].id == Case(head_dim=48).id
    assert cases(head_dim_v=64)[0].id == Case().id


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"head_dim_v": -1}, "head_dim_v = -1 must be 0 or more"),
        ({"head_dim_v": 1 << 15}, "head_dim_v = 32768 is too large: at most 16k"),
        ({"placement": "ring"}, "placement = 'ring': single has no mesh"),
        ({"strategy": "usp", "placement": "node"}, "placement = 'node': usp takes ring, ulysses"),
        ({"placement": 3, "strategy": "usp"}, "placement = 3 is not the name of a mesh axis"),
        ({"ranks_per_node": -1}, "ranks_per_node = -1 must be 0 or more"),
        ({"queries": 1024}, "queries (1024) must be fewer than seq_len (1024), or 0 for all"),
    ],
)
def test_topology_and_queries_are_checked_beforehand(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        cases(**table)
    assert message in str(error.value)


def test_one_and_true_are_different_parameters() -> None:
    assert Case(mask=Spec.of("f", a=1)).id != Case(mask=Spec.of("f", a=True)).id
    with pytest.raises(ValueError, match="window must be an integer"):
        cases(mask=["sliding_window:window=1", "sliding_window:window=true"])


def test_json_round_trip() -> None:
    for case in sweep_file.load("quick").cases:
        assert Case.from_json(case.to_json()) == case


def test_ids_depend_on_the_content_of_files(tmp_path: Path) -> None:
    file, copy, different = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    file.write_text("600\n424\n")
    copy.write_text("600\n424\n")
    different.write_text("500\n524\n")

    def case_of(path: Path) -> Case:
        return cases(mask={"name": "full_document", "file": str(path)})[0]

    assert case_of(file).id == case_of(copy).id != case_of(different).id
    before = case_of(file)
    file.write_text("1024\n")
    assert case_of(file).id != before.id
    assert Case.from_json(before.to_json()).id == before.id  # a recorded case keeps its id


OPERATORS = """
from cpbench.core.registry import OperatorInfo
one = OperatorInfo(name="one", summary="", source="", load=dict)
two = OperatorInfo(name="two", summary="", source="", load=dict)

def seen(seq_len):
    "Everything."
    from cpbench import masks
    return masks.build("full", seq_len)

def hidden(seq_len):
    "Nothing above the diagonal."
    from cpbench import masks
    return masks.build("causal", seq_len)
"""


@pytest.mark.parametrize(
    ("key", "names"), [("operator", ("one", "two")), ("mask", ("seen", "hidden"))]
)
def test_ids_depend_on_the_content_of_python_files(
    key: str, names: tuple[str, str], tmp_path: Path
) -> None:
    file, copy = tmp_path / "file.py", tmp_path / "copy.py"
    file.write_text(OPERATORS)
    copy.write_text(OPERATORS)
    first, second = cases(**{key: [f"{file}:{name}" for name in names]})
    assert first.id != second.id
    assert cases(**{key: f"{copy}:{names[0]}"})[0].id == first.id
    copy.write_text(OPERATORS + "# changed\n")
    assert cases(**{key: f"{copy}:{names[0]}"})[0].id != first.id


@pytest.mark.parametrize("name", sweep_file.packaged_sweeps())
def test_packaged(name: str) -> None:
    expanded = sweep_file.load(name)
    assert sweep_file.packaged_sweeps()[name]
    assert len({case.id for case in expanded.cases}) == len(expanded.cases) > 0
    specs = {(c.operator.name, c.strategy.name, c.layout.name) for c in expanded.cases}
    assert {a for a, _, _ in specs} <= set(registry.operators())
    assert {b for _, b, _ in specs} <= set(registry.strategies())
    assert {c for _, _, c in specs} <= set(layout.names())
    for mask, seq_len in {(case.mask, case.seq_len) for case in expanded.cases}:
        assert masks.build_heads(mask, seq_len, 1).area > 0
    for case in expanded.cases:
        accepted = registry.strategies()[case.strategy.name].layouts
        assert case.layout.name in accepted, f"{case.label} can only ever be refused"


def test_cases_that_no_machine_can_run_are_left_out() -> None:
    """A [sweep] with several ranks beside strategies in [[include]] does not ask for ``single``."""
    table: dict[str, Any] = {
        "sweep": {"world_size": 64, "seq_len": "64k"},
        "include": [{"strategy": ["ring", "ring_flash_attn.zigzag"],
                     "layout": ["contiguous", "zigzag"]}],
    }  # fmt: skip
    sweep = sweep_file.expand(table, "s")
    assert [(case.strategy.name, case.layout.name) for case in sweep.cases] == [
        ("ring", "contiguous"), ("ring", "zigzag"), ("ring_flash_attn.zigzag", "zigzag"),
    ]  # fmt: skip
    assert refusals.describe(sweep.left_out) == (
        "left out, since no machine can run them: 1 case (single runs on one rank); "
        "1 case (ring_flash_attn.zigzag takes layouts zigzag)"
    )
    # Where a strategy has no other case, the report is to say why.
    table["include"] = [{"strategy": "ring_flash_attn.zigzag", "layout": "contiguous"}]
    (case,) = sweep_file.expand(table, "s").cases
    assert refusals.certain_refusal(case) == "ring_flash_attn.zigzag takes layouts zigzag"
    with pytest.raises(ValueError, match="nothing to run: single runs on one rank; give a strat"):
        sweep_file.expand({"sweep": {"world_size": 64}}, "s")


def test_a_list_of_lengths_is_cut_for_every_length_of_a_sweep() -> None:
    with pytest.warns(UserWarning, match="the list is (cut|repeated)"):
        found = cases(mask="causal_document:doc_lens=[10,20]", seq_len=[16, 30, 64])
    assert [case.seq_len for case in found] == [16, 30, 64]


BROKEN = """
from cpbench.core.registry import StrategyInfo


def fails():
    raise ZeroDivisionError("no")


def made(load):
    return StrategyInfo(name="mine", summary="x", source="x", load=load)


NO_MODULE, NO_NAME = made("nowhere.module:Thing"), made("cpbench.strategies.ring:Nothing")
RAISES, LACKS = made(fails), made(object)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NO_MODULE", "mine: cannot load nowhere.module:Thing: No module named 'nowhere'"),
        ("NO_NAME", "cannot load cpbench.strategies.ring:Nothing: module"),
        ("RAISES", "mine: cannot be made: ZeroDivisionError: no"),
        ("LACKS", "mine: object has no unsupported, prepare, forward, backward"),
    ],
)
def test_strategies_that_cannot_be_loaded(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    with pytest.raises(ValueError) as refused:
        cases(strategy=f"{tmp_path}/broken.py:{name}", world_size=2)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cases_by_id() -> None:
    found = cases(seq_len=[64, 128, 256])
    assert select_cases(found, [f"id={found[2].id},{found[0].id}"]) == [found[0], found[2]]
    with pytest.raises(ValueError, match="no case has id=x; id is one of: "):
        select_cases(found, ["id=x"])


# What the published configurations leave out, and why: a new operator is in them, or here.
NOT_DENSE = {
    "reference": "float64, to compare with", "dilated": "takes dilated masks alone",
    "gathered": "takes selections alone", "vsa.kernel": "takes selected blocks alone",
    "triton_block_sparse": "takes blocks", "flashinfer.block_sparse": "takes blocks",
    "triton_query_sparse": "takes selections alone", "flashinfer.variable": "takes blocks",
    "sdpa.math": "holds all scores, up to 48K",
}  # fmt: skip


@pytest.mark.parametrize("name", ["kernels", "longca"])
def test_the_published_configuration_names_every_dense_operator(name: str) -> None:
    declared = registry.operators().values()
    dense = {info.name for info in declared if not (info.selects or info.mixer or info.paged)}
    named = {case.operator.name for case in sweep_file.load(name).cases}
    assert named >= dense - set(NOT_DENSE)
    assert set(NOT_DENSE) <= dense


def test_the_published_configuration_names_every_strategy() -> None:
    cases_of_sweep = sweep_file.load("longca_cp").cases
    for ranks in (8, 16, 32, 48, 64, 96):
        named = {case.strategy.name for case in cases_of_sweep if case.world_size == ranks}
        indivisible = {"ulysses", "deepspeed.ulysses"} if 64 % ranks else set()
        exact = {name for name, info in registry.strategies_for("attention").items()
                 if info.selectors != "pooled"}  # fmt: skip
        assert named == exact - {"single"} - indivisible
        assert {c.seq_len for c in cases_of_sweep if c.world_size == ranks} == {8192 * ranks}
