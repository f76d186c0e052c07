"""Readers, cleaning steps, examples and splits from outside: named by their import path, run like ours, part of the fingerprint."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from nearfield.config import _source, allow_local_code
from nearfield.data import DataConfig, Store, build_data
from nearfield.data.build import data_fingerprint
from tests.data.making import config, examples_of, source, write_rows

CODE = """
    from nearfield.data.cleaning.steps import TextStep
    from nearfield.data.readers import ReaderBase, Row


    class CountingReader(ReaderBase):
        upto: int = 100

        def inputs(self):
            return {"numbers": str(self.upto)}

        def rows(self, columns):
            for number in range(1, self.upto + 1):
                yield Row("numbers", number, {"query": str(number), "positives": [f"{number} and one"], "negatives": []})


    class EvenStep(TextStep):
        factor: int = 2

        def reason(self, text):
            return f"no multiple of {self.factor}" if text.isdigit() and int(text) % self.factor else None
"""


def test_a_reader_and_a_step_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "numbers_of_mine.py"
    file.write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    step = {"kind": "numbers_of_mine:EvenStep", "factor": 3, "sides": ["query"]}
    with allow_local_code():
        recipe = config(source(reader={"kind": "numbers_of_mine:CountingReader", "upto": 30}), steps=[step])
        summary = build_data(recipe, tmp_path / "store")
        assert summary.sources[0].rows == 30
        assert summary.steps[0].reasons == {"query: no multiple of 3": 20}
        store = Store.open(tmp_path / "store")
        assert store.texts(store.examples["query"].to_pylist()) == [str(n) for n in range(3, 31, 3)]
        before = data_fingerprint(recipe)
        assert before == store.fingerprint
        # Other code, another store.
        file.write_text(file.read_text() + "\n# changed\n")
        _source.cache_clear()
        assert data_fingerprint(recipe) != before
        _source.cache_clear()


MEANING = """
    from nearfield.data.config import ExamplesBase, SplitBase


    class Halves(ExamplesBase):
        form = "retrieval"
        text: str

        def columns(self):
            return (self.text,)

        def read(self, row):
            query, _, positive = row.item(self.text).partition("|")
            return {"query": query, "positives": (positive,)}


    class Formless(Halves):
        form = None


    class ByLength(SplitBase):
        most: int

        def split_of(self, group, key):
            return "short" if len(key or "") <= self.most else "long"

        @property
        def key_column(self):
            return "text"
"""


def test_examples_and_splits_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meaning_of_mine.py").write_text(textwrap.dedent(MEANING))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"{'a' * n}|answer {n}"} for n in range(1, 6)])
    split = {"kind": "meaning_of_mine:ByLength", "most": 11}

    def recipe(examples: str) -> DataConfig:
        return config(source(rows, examples={"kind": f"meaning_of_mine:{examples}", "text": "text"}, split=split))

    with allow_local_code():
        summary = build_data(recipe("Halves"), tmp_path / "store")
        assert (summary.sources[0].kind, summary.sources[0].splits) == ("retrieval", {"long": 3, "short": 2})
        store = Store.open(tmp_path / "store")
        assert examples_of(store)[0] == ("a", ("answer 1",), ())
        assert store.sources[0].kind == "retrieval"
        with pytest.raises(ValueError, match="must say its 'form'"):
            recipe("Formless")
