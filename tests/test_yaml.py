"""Numbers of YAML 1.2, and texts that read as they were written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nearfield.config import dump_yaml, load_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("+1.5e+2", 150.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("6.02e23", 6.02e23),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", 1000),
        ("-12", -12),
        ("0", 0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1:30", "1:30"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("2026-01-01", "2026-01-01"),
        ("2026-01-01 10:00:00", "2026-01-01 10:00:00"),
        ("=", "="),
        ("'2e-5'", "2e-5"),
        ("true", True),
        ("null", None),
    ],
)
def test_numbers(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_and_no_tags_of_python() -> None:
    assert math.isnan(load_yaml(".nan"))
    with pytest.raises(yaml.YAMLError):
        load_yaml("!!python/object/apply:os.getcwd []")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1e-.", max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(values)
def test_what_is_written_is_read(value: Any) -> None:
    assert load_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("text", ["2026-01-01", "2026-01-01T10:00:00Z", "=", "<<", "no", "0x1F", ".inf"])
def test_texts_with_a_meaning_in_some_version_stay_texts_for_both_readers(text: str) -> None:
    written = dump_yaml({"a": text})
    assert load_yaml(written) == yaml.safe_load(written) == {"a": text}


@given(st.from_regex(r"[-+]?[0-9]{0,3}(\.[0-9]{0,2})?([eE][-+]?[0-9]{1,2})?", fullmatch=True))
def test_texts_like_numbers_stay_texts_for_both_readers(text: str) -> None:
    written = dump_yaml({"a": text})
    assert load_yaml(written) == {"a": text}
    assert yaml.safe_load(written) == {"a": text}
