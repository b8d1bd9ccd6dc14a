"""The grammar of specs: round trips through text, tables and JSON."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.core.spec import Spec, format_size, parse_size, parse_value, three_digits
from cpbench.reports.labels import format_number, signed_percent

MANY = settings(max_examples=200, deadline=None, derandomize=True)

KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8).filter(
    lambda key: key.isidentifier() and key != "name"
)
# Words that are not numbers, booleans or lists, without the commas and brackets of the grammar.
WORDS = (
    st.text(string.ascii_letters + "./- ", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda word: word and parse_value_is_word(word))
)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-(2**40), 2**40), max_size=4).map(tuple),
    WORDS,
)
NAMES = st.from_regex(r"[a-z][a-z0-9_.\-]{0,8}", fullmatch=True) | st.just("./a b/mine.py:my_op")
SPECS = st.builds(
    lambda name, params: Spec.of(name, **params), NAMES, st.dictionaries(KEYS, VALUES, max_size=4)
)


def parse_value_is_word(word: str) -> bool:
    try:
        return parse_value(word) == word
    except ValueError:  # nan, inf
        return False


def identical(first: Spec, second: Spec) -> bool:
    """Equal, with the same types: 1, 1.0 and true are different parameters."""
    return repr(first) == repr(second)


@MANY
@given(SPECS)
def test_text_round_trip(spec: Spec) -> None:
    assert identical(Spec.parse(str(spec)), spec)


@MANY
@given(SPECS)
def test_json_round_trip(spec: Spec) -> None:
    assert identical(Spec.parse(json.loads(json.dumps(spec.to_json()))), spec)


@MANY
@given(st.integers(1, 2**45))
def test_size_round_trip(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("64k", 65536),
        ("64K", 65536),
        ("1m", 1 << 20),
        (" 2 k ", 2048),
        (7, 7),
        ("1_000", 1000),
        ("0", 0),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "64q", "-1", "1.5", "k", "1e3", "0x10", "_1", "1k1", True, "9" * 20]
)
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|digits"):
        parse_size(text)


def test_values() -> None:
    spec = Spec.parse("f:a=64k,b=-1,c=0.5,d=true,e=[1,2k],f=pile,g=1e3")
    assert spec.kwargs == {
        "a": 65536,
        "b": -1,
        "c": 0.5,
        "d": True,
        "e": (1, 2048),
        "f": "pile",
        "g": 1000.0,
    }


def test_order_of_parameters_does_not_matter() -> None:
    assert (
        Spec.parse("f:b=1,a=2")
        == Spec.parse("f:a=2,b=1")
        == Spec.parse({"a": 2, "name": "f", "b": 1})
    )
    assert str(Spec.parse("f:b=1,a=2")) == "f:a=2,b=1"


def test_parsing_a_spec_returns_it() -> None:
    spec = Spec.parse("f:a=1")
    assert Spec.parse(spec) is spec


@pytest.mark.parametrize(
    "source",
    [
        "",
        ":a=1",
        "f:",
        "f:a",
        "f:a=",
        "f:=1",
        "f:a=1,a=2",
        "f:a=1,b",
        "f,g",
        "f g",
        "f:1a=2",
        "f:name=1",
        "f:a=nan",
        "f:a=-inf",
        "f:a=[1,x]",
        "f:a=[1,2",
        5,
        None,
        {},
        {"name": 3},
        {"name": "f", "a": None},
        {"name": "f", "a": [1, "x"]},
        {"name": "f", "a": [True]},
        {"name": "f", "a": {"b": 1}},
        {"name": "f", "a": float("nan")},
    ],
)
def test_invalid_specs(source: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Spec.parse(source)  # type: ignore[arg-type]


def test_three_digits_without_a_minus_before_zero() -> None:
    assert [three_digits(x) for x in (-0.0, 0.0, -1.5, 1234.5)] == ["0", "0", "-1.50", "1,234"]
    assert [signed_percent(x) for x in (-4e-5, 4e-5, -0.012)] == ["0.0%", "0.0%", "-1.2%"]
    assert format_number(-0.01, "+.1f", "%") == "0.0%"
