"""Every column, figure and message of the plan file, on an epoch written by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nearfield.batching
from nearfield.arrays import Ragged, Rows
from nearfield.batching import SingleSourceConfig
from nearfield.batching.plan import SCHEMA, SEVERAL_SOURCES, VERSION, Plan, total_steps, write_plan
from nearfield.batching.planner import EpochBatches
from nearfield.batching.streams import PlannedRows, SourceExamples
from nearfield.errors import BadInputError
from nearfield.files import hash_file
from tests.batching.making import batches_of, items_of

PROMPTS = {0: (0, 1), 1: (5, 5), 2: (2, 3)}
"""Source 1 has no batch in the epoch below."""

# Batches of three, two epochs, of the two sources below.
GOLDEN_EXAMPLES = [[1006, 1004], [1001, 1007, 1000], [5, 3, 2], [1005, 1003, 1002], [7, 0, 4], [6, 1]]
GOLDEN_ITEMS = [[6, 161, 162, 561], [4, 140, 141, 540]]
GOLDEN_NEXT_EPOCH = [[1000, 1004, 1006], [1, 7, 2], [1005, 1007, 1003], [1002, 1001], [5, 3, 6], [4, 0]]


def rows(*numbers: int) -> Rows:
    return np.asarray(numbers, dtype=np.int64)


def epoch() -> EpochBatches:
    """Two batches of source 2, one of source 0; the last row of all has no document."""
    made = PlannedRows.of(
        [2, 2, 0, 2, 2],
        [20, 21, 3, 22, 23],
        [1, 2, 7, 3, 4],
        Ragged.from_lists([[10, 11], [13], [14], [17], []]),
        Ragged.from_lists([[12], [], [15, 16], [], []]),
        stratum=rows(-1, 4, -1, -1, -1),
    )
    return EpochBatches(made, rows(0, 2, 3, 5), Counter({"z": 2, "a": 1}), {"moved": 1})


def lengths(prompt: int, items: Rows) -> Rows:
    assert items.dtype == np.int64
    return items + 100 * prompt


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    path = tmp_path / "epoch-007.parquet"
    write_plan(path, epoch(), PROMPTS, lengths, {"seed": 3, "epoch": 7})
    return path


def test_the_file_holds_the_epoch(path: Path) -> None:
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert {name: (str(type)) for name, type in zip(SCHEMA.names, SCHEMA.types, strict=True)} == {
        "step": "int64",
        "slot": "int32",
        "example": "int64",
        "query": "int64",
        "positives": "large_list<item: int64>",
        "negatives": "large_list<item: int64>",
        "query_prompt": "int32",
        "document_prompt": "int32",
        "query_tokens": "int32",
        "document_tokens": "int32",
        "source": "int32",
        "stratum": "int32",
    }
    assert table.to_pydict() == {
        "step": [0, 0, 1, 2, 2],
        "slot": [0, 1, 0, 0, 1],
        "example": [20, 21, 3, 22, 23],
        "query": [1, 2, 7, 3, 4],
        "positives": [[10, 11], [13], [14], [17], []],
        "negatives": [[12], [], [15, 16], [], []],
        "query_prompt": [2, 2, 0, 2, 2],
        "document_prompt": [3, 3, 1, 3, 3],
        "query_tokens": [201, 202, 7, 203, 204],
        "document_tokens": [933, 313, 345, 317, 0],
        "source": [2, 2, 0, 2, 2],
        "stratum": [-1, 4, -1, -1, -1],
    }
    metadata = json.loads(table.schema.metadata[b"nearfield.plan"])
    assert set(table.schema.metadata) == {b"nearfield.plan"}
    assert {name: metadata[name] for name in ("epoch", "seed", "version")} == {
        "epoch": 7,
        "seed": 3,
        "version": VERSION,
    }
    assert metadata["summary"]["rows"] == 5
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_summary(tmp_path: Path) -> None:
    path = tmp_path / "epoch-007.parquet"
    assert write_plan(path, epoch(), PROMPTS, lengths, {"epoch": 7}) == {
        "epoch": 7,
        "file": "epoch-007.parquet",
        "hash": hash_file(path),
        "batches": 3,
        "rows": 5,
        "tokens": 403 + 933 + 313 + 7 + 345 + 407 + 317,
        "batches_by_source": {"0": 1, "2": 2},
        "rows_by_source": {"0": 1, "2": 4},
        "tokens_by_source": {"0": 7 + 345, "2": 403 + 933 + 313 + 407 + 317},
        "batch_sizes": {"1": 1, "2": 2},
        "dropped": {"a": 1, "z": 2},
        "planner": {"moved": 1},
    }
    assert "summary" in Plan(path).metadata


def test_names_and_measurements_are_in_the_summary_and_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    summary = write_plan(
        path, epoch(), PROMPTS, lengths, {}, names={0: "zero", 2: "two"}, measured={"hardness": {"pairs": 3}}
    )
    assert summary["batches_by_source"] == {"zero": 1, "two": 2}
    assert summary["hardness"] == {"pairs": 3}
    inside = Plan(path).metadata["summary"]
    assert inside == {name: value for name, value in summary.items() if name not in ("epoch", "file", "hash")}


def test_a_batch_of_several_sources(tmp_path: Path) -> None:
    made = epoch()
    mixed = EpochBatches(made.rows, rows(0, 3, 5))
    summary = write_plan(tmp_path / "plan", mixed, PROMPTS, lengths, {})
    assert summary["batches_by_source"] == {"2": 1, "several sources": 1}
    batch = Plan(tmp_path / "plan").batch(0)
    assert batch.source == SEVERAL_SOURCES
    assert batch.sources is not None and len(set(batch.sources.tolist())) > 1
    assert batch.query_prompt.tolist() == [2, 2, 0]
    assert batch.document_prompt.tolist() == [3, 3, 1]


def test_scores_and_labels_are_columns_where_there_are_any(tmp_path: Path) -> None:
    made = epoch()
    scored = replace(made.rows, score=np.array([0.5, np.nan, 1.0, 0.0, 0.25]), label=rows(-1, 7, 8, -1, 7))
    write_plan(tmp_path / "plan", EpochBatches(scored, made.offsets), PROMPTS, lengths, {})
    table = pq.read_table(tmp_path / "plan")
    assert table.schema.names[-2:] == ["score", "label"]
    assert table["score"].to_pylist() == [0.5, None, 1.0, 0.0, 0.25]
    assert table["label"].to_pylist() == [None, 7, 8, None, 7]
    batch = Plan(tmp_path / "plan").batch(2)
    assert batch.score is not None and batch.score.tolist() == [0.0, 0.25]
    assert batch.label is not None and batch.label.tolist() == [-1, 7]
    first = Plan(tmp_path / "plan").batch(0)
    assert first.score is not None and first.score[0] == 0.5 and np.isnan(first.score[1])
    again = Plan(tmp_path / "plan").epoch()
    assert again.rows.positives.values.tolist() == scored.positives.values.tolist()
    assert again.rows.label.tolist() == scored.label.tolist()
    assert again.offsets.tolist() == made.offsets.tolist()


def test_the_opened_plan(path: Path) -> None:
    plan = Plan(path)
    assert (plan.path, len(plan)) == (path, 3)
    assert (plan.metadata["version"], plan.metadata["seed"], plan.metadata["epoch"]) == (VERSION, 3, 7)
    assert plan.tokens().tolist() == [403 + 933 + 313, 7 + 345, 407 + 317]
    batch = plan.batch(2)
    assert batch.source == 2
    for name in ("example", "query", "query_prompt", "document_prompt"):
        assert getattr(batch, name).dtype == np.int64
    assert batch.example.tolist() == [22, 23]
    assert batch.query.tolist() == [3, 4]
    assert batch.query_prompt.tolist() == [2, 2]
    assert batch.document_prompt.tolist() == [3, 3]
    assert all(part.dtype == np.int64 for part in (*batch.positives, *batch.negatives))
    assert [part.tolist() for part in batch.positives] == [[17], []]
    assert [part.tolist() for part in batch.negatives] == [[], []]
    assert plan.batch(1).source == 0
    assert [part.tolist() for part in plan.batch(1).negatives] == [[15, 16]]


def test_an_epoch_without_batches(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    summary = write_plan(path, EpochBatches.of([]), PROMPTS, lengths, {})
    assert (summary["rows"], summary["tokens"], summary["epoch"]) == (0, 0, None)
    plan = Plan(path)
    assert len(plan) == 0
    assert plan.tokens().tolist() == []
    assert plan.tokens().dtype == np.int64


def test_the_order_of_the_metadata_does_not_matter(tmp_path: Path) -> None:
    for name, metadata in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        write_plan(tmp_path / name, epoch(), PROMPTS, lengths, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_steps_of_a_run(path: Path) -> None:
    plan = Plan(path)
    assert total_steps([plan, plan], None) == 6
    assert total_steps([plan, plan], 4) == 4
    assert total_steps([plan], 4) == 3
    assert total_steps([], None) == 0


def refusal(path: Path) -> BadInputError:
    with pytest.raises(BadInputError) as error:
        Plan(path)
    assert error.value.where == str(path)
    return error.value


def test_words_of_the_refusals(tmp_path: Path, path: Path) -> None:
    """Each kind of damage is named in its own words, with what to do."""
    missing = refusal(tmp_path / "none.parquet")
    assert missing.what == "this plan does not exist"
    assert missing.hint == "Run `nearfield plan RECIPE`."
    table = pq.read_table(path)
    other = tmp_path / "other.parquet"
    other.write_text("not parquet")
    assert refusal(other).what.startswith("this is not a readable plan: ")
    pq.write_table(table.drop_columns(["slot", "stratum"]), other)
    assert refusal(other).what == "this Parquet file is not a plan: the columns slot, stratum are missing"
    pq.write_table(table.replace_schema_metadata(None), other)
    assert refusal(other).what == "this Parquet file is not a plan: its metadata is missing"
    pq.write_table(table.replace_schema_metadata({b"nearfield.plan": b'{"version": 99}'}), other)
    assert refusal(other).what == f"this plan has version 99; {VERSION} is wanted"
    assert refusal(other).hint == "Plan again: `nearfield plan RECIPE`."
    pq.write_table(pa.concat_tables([table.slice(3), table.slice(0, 3)]), other)
    assert refusal(other).what == "the steps of this plan are not in order"


def test_defaults_and_bounds() -> None:
    assert SingleSourceConfig().model_dump() == {
        "kind": "single_source",
        "batch_size": 64,
        "positives": 1,
        "negatives": 1,
        "negative_choice": "uniform",
        "margin_bins": 10,
        "duplicates": "forbid",
        "known_positives": "forbid",
        "same_label": "allow",
        "drop_last": True,
        "sampling": {"kind": "proportional"},
        "pools": {},
        "homogeneous": 1.0,
    }
    for wrong in ({"batch_size": 1}, {"positives": 0}, {"negatives": -1}, {"duplicates": "x"}):
        with pytest.raises(ValueError, match=re.escape(next(iter(wrong)))):
            SingleSourceConfig.model_validate(wrong)


def source(number: int, name: str, count: int = 8) -> SourceExamples:
    """Examples that share no item: query i, positives 100 + 10 i and the next two, negatives 500 + 10 i and the next."""
    return SourceExamples(
        number,
        name,
        np.arange(count) + 1000 * number,
        np.arange(count),
        Ragged.from_lists([100 + 10 * i + np.arange(3) for i in range(count)]),
        Ragged.from_lists([500 + 10 * i + np.arange(2) for i in range(count)]),
    )


def test_a_seed_gives_the_plan_that_it_always_gave() -> None:
    """Written down once: if this changes, plans of old runs cannot be made again, and VERSION of the plan must rise."""
    plan = SingleSourceConfig(batch_size=3, positives=2, drop_last=False).build()
    epoch = plan.plan([source(0, "first"), source(1, "second")], 11, 2)
    assert batches_of(epoch) == GOLDEN_EXAMPLES
    assert items_of(epoch)[0] == GOLDEN_ITEMS
    assert batches_of(plan.plan([source(0, "first"), source(1, "second")], 11, 3)) == GOLDEN_NEXT_EPOCH
    refreshed = plan.plan([source(0, "first"), source(1, "second")], 11, 2, generation=1)
    assert batches_of(refreshed) != GOLDEN_EXAMPLES


def test_a_batch_of_one_is_never_kept() -> None:
    """A softmax over one query's own documents alone is no batch; two are."""
    for count, kept in ((4, [3]), (5, [3, 2])):
        plan = SingleSourceConfig(batch_size=3, drop_last=False).build().plan([source(0, "a", count)], 0, 0)
        assert sorted(plan.sizes.tolist(), reverse=True) == kept
        assert plan.dropped == Counter({"in a batch that did not fill": count - sum(kept)})


def test_what_repeats_itself_is_counted() -> None:
    examples = SourceExamples(0, "a", rows(0, 1, 2), rows(5, 6, 7), Ragged.from_lists([[5], [8], [9]]), Ragged.empty(3))
    plan = SingleSourceConfig(batch_size=2).build().plan([examples], 0, 0)
    assert plan.dropped == Counter({"the same item twice in one example": 1})
    assert sorted(batches_of(plan)[0]) == [1, 2]


def test_what_is_exported_is_there() -> None:
    assert "SingleSourceConfig" in nearfield.batching.__all__
    assert all(hasattr(nearfield.batching, name) for name in nearfield.batching.__all__)
