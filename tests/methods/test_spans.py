"""Spans of documents, as DeCLUTR draws them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from nearfield.methods.spans import SpansReader, draw_spans, least_words
from nearfield.provenance import generator
from tests.data.making import build_rows, write_rows

NOWHERE = {"kind": "embedded", "name": "wordnet/lemma_gloss"}


def settings(**changes: object) -> SpansReader:
    return SpansReader.model_validate({"of": NOWHERE, "column": "gloss", **changes})


def test_lengths_and_places() -> None:
    config = settings(longest=200, shortest=20)
    drawn = [draw_spans(900, config, generator(seed, "x")) for seed in range(5000)]
    anchors = np.array([anchor for document in drawn for anchor, _ in document])
    positives = np.array([span for document in drawn for _, spans in document for span in spans])
    assert len(anchors) == 10_000 and len(positives) == 20_000
    # int() cuts off half a word on the mean.
    assert np.diff(anchors).mean() == pytest.approx(20 + 2 / 3 * 180 - 0.5, rel=0.01)
    assert np.diff(positives).mean() == pytest.approx(20 + 1 / 3 * 180 - 0.5, rel=0.01)
    assert positives.min() >= 0 and positives.max() <= 900
    for document in drawn[:500]:
        (first, _), (second, _) = sorted(document)
        assert first[1] <= second[0], "anchors do not overlap"
        for (begin, end), spans in document:
            assert all(start <= end and stop >= begin for start, stop in spans), "positives touch or overlap"


@pytest.mark.parametrize("anchors", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["any", "inside", "beside"])
def test_the_shortest_document_has_room(anchors: int, place: str) -> None:
    config = settings(longest=10, shortest=2, anchors=anchors, place=place)
    words = least_words(config)
    for seed in range(200):
        found = draw_spans(words, config, generator(seed, "x"))
        assert len(found) == anchors
        for (begin, end), spans in found:
            for start, stop in spans:
                assert 0 <= start < stop <= words
                if place == "inside":
                    assert begin <= start and stop <= end
                elif place == "beside":
                    assert stop == begin or start == end


def test_from_documents_to_examples(tmp_path: Path) -> None:
    documents = [{"text": " ".join(f"d{d}w{i}" for i in range(45))} for d in range(3)]
    path = write_rows(tmp_path / "documents.jsonl", documents)
    reader = {
        "kind": "spans",
        "of": {"kind": "jsonl", "path": str(path)},
        "column": "text",
        "longest": 10,
        "shortest": 3,
    }
    examples = {"kind": "retrieval", "query": "anchor", "positives": "positives"}
    store = build_rows(tmp_path, [], reader=reader, examples=examples, group="document")
    rows = store.examples.to_pylist()
    assert len(rows) == 6
    for row in rows:
        anchor = store.texts([row["query"]])[0]
        own = next(d["text"] for d in documents if anchor in d["text"])
        assert all(text in own for text in store.texts(row["positives"]))
    (tmp_path / "again").mkdir()
    again = build_rows(tmp_path / "again", [], reader=reader, examples=examples, group="document")
    assert again.examples.to_pylist() == rows


def test_short_documents_are_bad_rows(tmp_path: Path) -> None:
    from nearfield.errors import BadInputError

    path = write_rows(tmp_path / "documents.jsonl", [{"text": "too short"}])
    reader = {"kind": "spans", "of": {"kind": "jsonl", "path": str(path)}, "column": "text"}
    with pytest.raises(BadInputError, match="a document of fewer than 1536 words"):
        build_rows(
            tmp_path, [], reader=reader, examples={"kind": "retrieval", "query": "anchor", "positives": "positives"}
        )
    with pytest.raises(ValidationError, match="shortest span"):
        settings(longest=10, shortest=11)
    assert json.loads(settings().model_dump_json())["of"]["kind"] == "embedded"
