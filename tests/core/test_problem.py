"""FLOPs, bytes and labels of problems, also where values have a head_dim of their own (MLA)."""

from __future__ import annotations

import pytest

from cpbench.core.problem import Case, Problem

MLA = {"head_dim": 192, "head_dim_v": 128}


def problem(**changes: int) -> Problem:
    sizes = {"batch": 2, "seq_q": 10, "seq_k": 30, "heads_q": 6, "heads_kv": 3, "head_dim": 64}
    return Problem(**{**sizes, **changes}, dtype="bfloat16")


@pytest.mark.parametrize(("dims", "dim", "value_dim"), [({}, 64, 64), (MLA, 192, 128)])
def test_flops_are_those_of_the_matrix_products(
    dims: dict[str, int], dim: int, value_dim: int
) -> None:
    one = problem(**dims)
    pairs = 2 * 6 * 100  # of all batches and query heads
    scores = dq = dk = 2 * dim * pairs  # a multiplication and an addition each
    out = dv = dp = 2 * value_dim * pairs
    assert one.flops(100) == {"fwd": scores + out, "bwd": scores + dp + dv + dk + dq}


@pytest.mark.parametrize(("dims", "dim", "value_dim"), [({}, 64, 64), (MLA, 192, 128)])
def test_bytes_are_those_of_the_tensors(dims: dict[str, int], dim: int, value_dim: int) -> None:
    one = problem(**dims)
    assert one.value_dim == value_dim
    assert one.q_bytes(10) == 2 * 10 * 6 * dim * 2
    assert one.out_bytes(10) == 2 * 10 * 6 * value_dim * 2
    assert one.kv_bytes(30) == 2 * 30 * 3 * (dim + value_dim) * 2
    assert one.softmax_scale == dim**-0.5


def test_labels_name_the_head_dim_of_values_only_where_it_differs() -> None:
    assert " D=64 " in Case().label
    assert " D=192/128 " in Case(**MLA).label
    assert Case(**MLA).problem.head_dim_v == 128


def test_a_stored_head_dim_of_values_is_checked() -> None:
    table = Case(**MLA).to_json()
    assert Case.from_json(table) == Case(**MLA)
    del table["head_dim_v"]  # of an earlier version
    assert Case.from_json(table) == Case(head_dim=192)
    with pytest.raises(ValueError, match="no case has these sizes"):
        Case.from_json(Case(**MLA).to_json() | {"head_dim_v": -1})
