"""Readers: what is written comes back, and what cannot be read says where."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data.readers import HubReader, JsonlReader, read_delimited, read_jsonl, read_parquet
from nearfield.errors import BadInputError

texts = st.text(st.characters(codec="utf-8"), max_size=20)
rows = st.lists(st.fixed_dictionaries({"query": texts, "positives": st.lists(texts, max_size=3)}), max_size=8)
cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


def in_folder(check: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
@settings(max_examples=25, deadline=None)
@given(rows)
def test_jsonl_comes_back(packed: str, rows: list[dict[str, object]]) -> None:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[packed]

    def check(folder: Path) -> None:
        path = folder / f"rows.jsonl{packed}"
        path.write_bytes(pack(data))
        read = list(read_jsonl(path))
        assert [row.values for row in read] == rows
        assert [row.line for row in read] == list(range(1, len(rows) + 1))

    in_folder(check)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".tsv.gz", "\t")])
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(cells, cells), max_size=8))
def test_csv_comes_back(suffix: str, delimiter: str, rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("query", "positive"), *rows])
    data = buffer.getvalue().encode()

    def check(folder: Path) -> None:
        path = folder / f"rows{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        read = [row.values for row in read_delimited(path, columns=["query"])]
        assert read == [{"query": query, "positive": positive} for query, positive in rows]

    in_folder(check)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_parquet_comes_back(rows: list[dict[str, object]]) -> None:
    schema = pa.schema([("query", pa.string()), ("positives", pa.list_(pa.string()))])

    def check(folder: Path) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rows.parquet")
        assert [row.values for row in read_parquet(folder / "rows.parquet")] == rows

    in_folder(check)


def test_parquet_with_bad_utf8_loses_that_row_only(tmp_path: Path) -> None:
    bad = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"ok\xff\xfeok")
    )
    pq.write_table(pa.table({"query": bad}), tmp_path / "rows.parquet")
    read = list(read_parquet(tmp_path / "rows.parquet", ["query"]))
    assert [(row.line, row.values, row.reason) for row in read] == [
        (1, {"query": "ok"}, ""),
        (2, None, "not UTF-8"),
        (3, {"query": "ok"}, ""),
    ]


def test_csv_rows_bear_the_line_they_begin_on(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(
        b'\xef\xbb\xbfquery,positive\r\n"a\nb",c\r\nd\r\n\r\n\xff,f\r\n"x"y,z\r\nlast,row\r\n'
    )
    read = [(row.line, row.values, row.reason) for row in read_delimited(tmp_path / "rows.csv", columns=["query"])]
    assert read == [
        (2, {"query": "a\nb", "positive": "c"}, ""),
        (4, None, "wrong number of cells"),
        (6, None, "not UTF-8"),
        (7, None, "not valid CSV"),
        (8, {"query": "last", "positive": "row"}, ""),
    ]


def test_a_long_line_is_skipped_without_reading_it_whole(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}\n')
    read = [(row.line, row.values, row.reason) for row in read_jsonl(tmp_path / "rows.jsonl", max_line_bytes=100)]
    assert read == [(1, {"a": 1}, ""), (2, None, "line longer than 100 bytes"), (3, {"a": 2}, "")]


def test_unicode_line_ends_do_not_end_a_json_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert [row.values for row in read_jsonl(tmp_path / "rows.jsonl")] == [{"a": "x\u2028y\x85z"}]


def test_a_folder_means_its_files_in_the_order_of_names(tmp_path: Path) -> None:
    for name, value in (("b.jsonl", 2), ("a.jsonl", 1), ("note.txt", 3)):
        (tmp_path / name).write_text(json.dumps({"n": value}))
    reader = JsonlReader(path=tmp_path).build()
    assert [row.values for row in reader.rows(())] == [{"n": 1}, {"n": 2}]
    assert list(reader.inputs()) == ["0:a.jsonl", "1:b.jsonl"]


def test_a_file_with_a_hostile_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "[*]; rm -rf $(x) \n'\".jsonl"
    path.write_text('{"a": 1}\n')
    assert [row.values for row in JsonlReader(path=path).build().rows(())] == [{"a": 1}]


def test_data_sets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"query": ["a", "b"], "positives": [["x"], ["y", "z"]], "other": [1, 2]})
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    data.save_to_disk(str(tmp_path / "one"))
    for name in ("dict", "one"):
        read = [row.values for row in HubReader(path=tmp_path / name).rows(["query", "positives"])]
        assert read == [{"query": "a", "positives": ["x"]}, {"query": "b", "positives": ["y", "z"]}]
    with pytest.raises(BadInputError, match="no split 'test'") as error:
        list(HubReader(path=tmp_path / "dict", split="test").rows(["query"]))
    assert error.value.hint == "Splits here: train."
    with pytest.raises(BadInputError, match="no column 'querry'"):
        list(HubReader(path=tmp_path / "one").rows(["querry"]))


def test_hub_data_sets_are_loaded_at_their_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[object] = []

    def load_dataset(*names: object, **options: object) -> object:
        asked.append((names, options))
        return datasets.Dataset.from_dict({"query": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reader = HubReader(name="org/data", revision="abc", subset="en", split="dev")
    assert [row.values for row in reader.rows(["query"])] == [{"query": "a"}]
    assert asked == [(("org/data", "en"), {"revision": "abc", "split": "dev"})]
    assert reader.inputs() == {"org/data/en/dev": "abc"}


def test_a_hub_data_set_that_cannot_be_loaded_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*names: object, **options: object) -> object:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadInputError, match=r"cannot be loaded \(no network\)") as error:
        list(HubReader(name="org/data", revision="abc").rows(["query"]))
    assert error.value.where == "org/data@abc (train)"
