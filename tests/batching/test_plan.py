"""The plan file: written, read, summarised, refused when it is something else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nearfield.arrays import Rows
from nearfield.batching import SingleSourceConfig
from nearfield.batching.plan import Plan, total_steps, write_plan
from nearfield.errors import BadInputError
from tests.batching.making import make_source


def lengths(prompt: int, items: Rows) -> Rows:
    return items % 7 + 1 + 100 * prompt


def test_round_trip(tmp_path: Path) -> None:
    sources = [make_source(0, 40, 1000, 1), make_source(1, 30, 1000, 2)]
    epoch = SingleSourceConfig(batch_size=8, negatives=2).build().plan(sources, 0, 0)
    path = tmp_path / "epoch-000.parquet"
    summary = write_plan(path, epoch, {0: (0, 1), 1: (2, 2)}, lengths, {"seed": 0, "epoch": 0, "data": "abc"})
    plan = Plan(path)
    assert len(plan) == len(epoch) == summary["batches"]
    assert plan.metadata["data"] == "abc"
    tokens = []
    for step in range(len(epoch)):
        batch, rows = plan.batch(step), epoch.batch(step)
        assert batch.example.tolist() == rows.example.tolist()
        assert batch.query.tolist() == rows.query.tolist()
        assert [p.tolist() for p in batch.positives] == [rows.positives[row].tolist() for row in range(len(rows))]
        assert [n.tolist() for n in batch.negatives] == [rows.negatives[row].tolist() for row in range(len(rows))]
        assert batch.source == rows.source[0]
        assert batch.score is None and batch.label is None
        query_prompt, document_prompt = {0: (0, 1), 1: (2, 2)}[batch.source]
        assert set(batch.query_prompt.tolist()) == {query_prompt}
        assert set(batch.document_prompt.tolist()) == {document_prompt}
        tokens.append(
            int(lengths(query_prompt, rows.query).sum()) + int(lengths(document_prompt, rows.documents().values).sum())
        )
    assert plan.tokens().tolist() == tokens
    assert summary["tokens"] == sum(tokens)
    assert summary["rows"] + sum(summary["dropped"].values()) == 70
    assert sum(summary["batches_by_source"].values()) == len(plan)
    assert total_steps([plan, plan], None) == 2 * len(plan)
    assert total_steps([plan, plan], 3) == 3


def test_the_same_plan_is_the_same_file(tmp_path: Path) -> None:
    epoch = SingleSourceConfig(batch_size=8).build().plan([make_source(0, 40, 1000, 1)], 0, 0)
    summaries = [write_plan(tmp_path / name, epoch, {0: (0, 0)}, lengths, {"epoch": 0}) for name in ("a", "b")]
    assert summaries[0]["hash"] == summaries[1]["hash"]


@pytest.mark.parametrize("kind", ["missing", "text", "other parquet", "other version", "disorder"])
def test_what_is_no_plan_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "plan.parquet"
    epoch = SingleSourceConfig(batch_size=8).build().plan([make_source(0, 40, 1000, 1)], 0, 0)
    if kind == "text":
        path.write_text("not parquet")
    elif kind == "other parquet":
        pq.write_table(pa.table({"a": [1]}), path)
    elif kind in ("other version", "disorder"):
        write_plan(path, epoch, {0: (0, 0)}, lengths, {"version": 99 if kind == "other version" else 2})
        table = pq.read_table(path)
        if kind == "disorder":
            pq.write_table(
                table.take(list(reversed(range(table.num_rows)))).replace_schema_metadata(table.schema.metadata), path
            )
    with pytest.raises(BadInputError) as error:
        Plan(path)
    assert str(path) in str(error.value)
