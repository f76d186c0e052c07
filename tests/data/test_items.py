"""Ids: equal content, equal id; nothing else."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.data.items import canonical_text, item_id, text_id

texts = st.text(st.characters(codec="utf-8"))


@given(texts)
def test_canonically_equal_texts_have_one_id(text: str) -> None:
    assert text_id(unicodedata.normalize("NFD", text)) == text_id(unicodedata.normalize("NFC", text)) == text_id(text)
    assert canonical_text(canonical_text(text)) == canonical_text(text)


@given(texts, texts)
def test_different_texts_have_different_ids(first: str, second: str) -> None:
    same = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)
    assert (text_id(first) == text_id(second)) == same
    assert len(text_id(first)) == 16


parts = st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=4), st.binary(max_size=4)), max_size=3)


@given(parts, parts)
def test_fields_cannot_run_into_each_other(first: list[tuple[str, bytes]], second: list[tuple[str, bytes]]) -> None:
    assert (item_id("text", first) == item_id("text", second)) == (first == second)


def test_the_modality_counts() -> None:
    assert item_id("text", [("text", b"a")]) != item_id("image", [("text", b"a")])


def test_the_id_of_a_text_stays_what_it_is() -> None:
    assert text_id("caf\u00e9").hex() == text_id("cafe\u0301").hex() == "e63b544e12299467340cad7decadb430"


def test_a_lone_surrogate_has_no_id() -> None:
    with pytest.raises(UnicodeEncodeError):
        text_id("\ud800")
