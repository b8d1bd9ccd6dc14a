"""Conditions of ``--where`` pick one element of any axis, in a sweep and in what was measured."""

from __future__ import annotations

from typing import Any

import pytest
from made_records import record, table_of

from cpbench.core.spec import Spec
from cpbench.reports.where import filter_rows
from cpbench.sweep import sweep_file
from cpbench.sweep.conditions import select_cases


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("inputs=haystack:depth=0.25", 2), ("inputs=haystack:depth=0", 2),
        ("inputs=haystack:depth=1,keys=4", 1), ("inputs=haystack:depth=[0,1]", 4),
        ("inputs=haystack", 6), ("inputs=haystack:keys=4,normal", 4),
        ("inputs=haystack:depth=0.25,keys=8", 0), ("inputs=haystack:keys=1", 0),
    ],
)  # fmt: skip
def test_specs_by_any_of_their_parameters(where: str, count: int) -> None:
    depths = [0.0, 0.25, 1.0]
    axis = [{"name": "haystack", "depth": depths}, {"name": "haystack", "depth": depths, "keys": 4}]
    cases = sweep_file.expand_table({"inputs": [*axis, "normal"], "mask": "causal"})
    table = table_of(*(record("bands", 1.0, inputs=case.inputs) for case in cases))
    if count:
        assert len(select_cases(cases, [where])) == len(filter_rows(table, [where])) == count
    else:
        with pytest.raises(ValueError, match="no case has inputs=haystack"):
            select_cases(cases, [where])
        with pytest.raises(ValueError, match="no case has inputs=haystack"):
            filter_rows(table, [where])


@pytest.mark.parametrize(
    ("where", "other", "picked"),
    [
        ("rope=ntk:base=5e5", "none", "ntk:base=500000,factor=8"),
        ("inputs=file:qkv-1.safetensors", "file:file=qkv-12.safetensors",
         "file:file=qkv-1.safetensors"),
        ("operator=moba:top_k=4", "moba:block_size=64,top_k=8", "moba:block_size=64,top_k=4"),
        ("strategy=usp:ulysses=4", "usp:inner=ring,ulysses=2", "usp:inner=ring,ulysses=4"),
        ("mask=streaming:window=[3,4]", "streaming:num_sinks=1,window=5",
         "streaming:num_sinks=1,window=4"),
        ("key_lens=[8k,70]", (1024, 1024), (8192, 70)),
    ],
)  # fmt: skip
def test_one_of_any_axis_of_what_was_measured(where: str, other: Any, picked: Any) -> None:
    key, records = where.partition("=")[0], []
    for value in (other, picked):
        axis = {key: Spec.parse(value) if isinstance(value, str) else value}
        records.append(record(str(axis.pop("operator", "bands")), 1.0, **axis))
    (row,) = filter_rows(table_of(*records), [where]).to_dict("records")
    assert row["id"] == records[1].case.id
