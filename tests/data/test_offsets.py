"""Offsets of 64 bits: lists and strings of a store do not wrap at 2^31."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nearfield.arrays import Ragged, starts
from nearfield.data import Store, build_data
from nearfield.data.build import RAW_SCHEMA, ensure_store_at
from nearfield.data.store import EXAMPLES_SCHEMA, FORMAT_VERSION, IMAGES_SCHEMA, ITEMS_SCHEMA
from nearfield.errors import BadInputError
from nearfield.files import read_json, seal, write_json
from tests.data.making import build_rows, config, source, write_rows

ROWS = [
    {"query": f"q{n}", "positives": [f"p{n}", f"r{n}"], "negatives": [f"n{n}"], "topic": f"t{n % 3}"} for n in range(9)
]
STEP = {"kind": "length", "unit": "characters", "least": 2, "sides": ["query"]}


def short_offsets(schema: pa.Schema) -> list[str]:
    """Columns whose values lie at offsets of 32 bits."""
    short = (pa.types.is_string, pa.types.is_binary, pa.types.is_list)
    return [field.name for field in schema if any(kind(field.type) for kind in short)]


def test_no_schema_has_short_offsets() -> None:
    assert short_offsets(pa.schema([("a", pa.list_(pa.int64())), ("b", pa.string()), ("c", pa.int64())])) == ["a", "b"]
    for schema in (EXAMPLES_SCHEMA, ITEMS_SCHEMA, IMAGES_SCHEMA, RAW_SCHEMA):
        assert short_offsets(schema) == []


@pytest.mark.parametrize("steps", [[], [STEP]])
def test_written_files_have_long_offsets(tmp_path: Path, steps: list[dict[str, object]]) -> None:
    """Those of a build, and those that cleaning writes anew."""
    write_rows(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "query": "q", "negatives": []}])
    made = config(source(tmp_path / "rows.jsonl"), steps=steps)
    build_data(made, tmp_path / "store")
    for name in ("examples", "items"):
        with pa.memory_map(str(tmp_path / "store" / f"{name}.arrow")) as file:
            table = pa.ipc.open_stream(file).read_all()
        assert short_offsets(table.schema) == []
    chunk = Store.open(tmp_path / "store").examples["positives"].chunk(0)
    assert chunk.offsets.type == pa.int64()
    assert len(Store.open(tmp_path / "store").examples) == 10 - len(steps)


def test_lists_beyond_two_to_the_31_do_not_wrap() -> None:
    """Values of type null take no memory, so that the lengths can be as large as they like."""
    each = 2**30
    kind = EXAMPLES_SCHEMA.field("positives").type
    offsets = starts(np.full(3, each, dtype=np.int32))
    assert offsets.tolist() == [0, each, 2 * each, 3 * each]
    lists = type(pa.array([], kind)).from_arrays(pa.array(offsets), pa.nulls(3 * each))
    assert lists.offsets.to_pylist() == offsets.tolist()
    assert lists.value_lengths().to_pylist() == [each] * 3
    with pytest.raises(pa.ArrowInvalid):
        pa.ListArray.from_arrays(pa.array(offsets), pa.nulls(3 * each))
    assert Ragged(offsets, np.empty(0, dtype=np.int64)).lengths.tolist() == [each] * 3


def test_an_older_store_is_refused_in_a_line_and_built_again(tmp_path: Path) -> None:
    store = build_rows(tmp_path, ROWS)
    meta = read_json(store.path / "store.json", "store")
    write_json(store.path / "store.json", {**meta, "format_version": 1, "fingerprint": "0" * 32})
    seal(store.path)
    with pytest.raises(BadInputError, match=f"has format version 1; {FORMAT_VERSION} is wanted") as error:
        Store.open(store.path)
    assert "\n" not in error.value.what
    assert not ensure_store_at(config(source(tmp_path / "rows.jsonl")), store.path).reused
    assert Store.open(store.path).examples.num_rows == len(ROWS)
