"""The artifact that a miner leaves: negatives with the teacher's score and rank, an example a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.checksums import Sealed, seal
from nearfield.data.store import Store
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, read_json, write_json
from nearfield.mining.documents import Rows, Vectors
from nearfield.mining.mine import MinedNegatives
from nearfield.mining.pool import Pool
from nearfield.mining.rules import Mask

VERSION = 1
SHORT_FILE = "short.jsonl"
_SHOWN = 200

SCHEMA = pa.schema(
    [
        ("example", pa.int64()),
        ("source", pa.int32()),
        ("query", pa.int64()),
        ("negatives", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("ranks", pa.list_(pa.int32())),
        ("positive_scores", pa.list_(pa.float32())),
        ("kept", pa.bool_()),
    ]
)


def write_negatives(
    out: Path, store: Store, mined: Sequence[tuple[Pool, MinedNegatives]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the folder ``out`` and return its summary.

    ``negatives.parquet`` holds a row for every example, ``short.jsonl`` lists the examples with fewer negatives than wanted,
    ``summary.json`` counts what each rule did. ``metadata`` names the fingerprint, the teacher, the generation.
    """
    metadata = {"version": VERSION, **metadata}
    tables, sources, short = [], {}, 0
    with atomic_path(out) as aside:
        aside.mkdir()
        with (aside / SHORT_FILE).open("w", encoding="utf-8") as file:
            for pool, result in mined:
                tables.append(_table(pool, result))
                sources[pool.name] = _summary(pool, result)
                for number in result.short.tolist():
                    line = {
                        "source": pool.name,
                        "example": int(pool.examples[number]),
                        "query": store.shown(pool.queries[number : number + 1])[0][:_SHOWN],
                        "negatives": len(result.of(number)),
                        "wanted": result.wanted,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                short += len(result.short)
        table = pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by("example")
        table = table.replace_schema_metadata({b"nearfield.negatives": json.dumps(metadata, sort_keys=True).encode()})
        pq.write_table(table, aside / "negatives.parquet", compression="zstd")
        summary = {**metadata, "examples": table.num_rows, "short": short, "sources": sources}
        write_json(aside / "summary.json", summary)
        seal(aside)
    return summary


def _table(pool: Pool, mined: MinedNegatives) -> pa.Table:
    def lists(values: Any, kind: pa.DataType, offsets: Rows = mined.offsets) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))

    columns = [
        pa.array(pool.examples),
        pa.array(np.full(len(pool.examples), pool.source, dtype=np.int32)),
        pa.array(pool.queries),
        lists(pool.documents[mined.rows], pa.int64()),
        lists(mined.scores, pa.float32()),
        lists(mined.ranks.astype(np.int32), pa.int32()),
        lists(mined.positive_scores[pool.positive_order], pa.float32(), pool.positives.offsets),
        pa.array(mined.kept),
    ]
    return pa.table(columns, schema=SCHEMA)


def _summary(pool: Pool, mined: MinedNegatives) -> dict[str, Any]:
    return {
        "examples": len(pool.examples),
        "documents": len(pool.documents),
        "candidates": mined.candidates,
        "dropped": int((~mined.kept).sum()),
        "short": len(mined.short),
        "wanted": mined.wanted,
        "negatives": len(mined.rows),
        "rules": [asdict(count) for count in mined.counts],
    }


class Negatives:
    """Opened negatives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        sealed = Sealed(path, "Run the same command again: it mines anew what is damaged.")
        for name in ("summary.json", "negatives.parquet") if sealed.known else ():
            sealed.file(name, whole=True)
        self.summary: dict[str, Any] = read_json(path / "summary.json", "folder of mined negatives")
        if not isinstance(self.summary, dict) or self.summary.get("version") != VERSION:
            raise BadInputError(
                f"these negatives are not of version {VERSION}",
                where=str(path),
                hint="Mine again: `nearfield mine RECIPE`.",
            )
        self.fingerprint: str = self.summary["fingerprint"]
        self.generation: int = self.summary["generation"]
        try:
            self.table = pq.read_table(path / "negatives.parquet", memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"these negatives cannot be read ({error})", where=str(path)) from error
        self.examples: Rows = self.table["example"].to_numpy()
        lists = self.table["negatives"].combine_chunks()
        self.offsets: Rows = lists.offsets.to_numpy().astype(np.int64)
        self.rows: Rows = lists.values.to_numpy()
        self._kept: Mask = self.table["kept"].to_numpy(zero_copy_only=False).astype(bool)

    def _values(self, column: str) -> Any:
        return self.table[column].combine_chunks().values.to_numpy()

    @property
    def scores(self) -> Vectors:
        """The teacher's score of each of ``rows``."""
        scores: Vectors = self._values("scores")
        return scores

    @property
    def ranks(self) -> Rows:
        """The rank of each of ``rows``."""
        return np.asarray(self._values("ranks"), dtype=np.int64)

    @property
    def positive_scores(self) -> Vectors:
        """The teacher's score of each positive of the store's examples, example after example, in the store's order."""
        scores: Vectors = self._values("positive_scores")
        return scores

    def positions(self, example_rows: Rows) -> Rows:
        """Where examples stand in the table; one that was not mined for is an error of the caller."""
        rows = np.asarray(example_rows, dtype=np.int64)
        positions = np.searchsorted(self.examples, rows)
        if len(rows) and (positions.max() >= len(self.examples) or (self.examples[positions] != rows).any()):
            raise KeyError("examples that were not mined for")
        return positions.astype(np.int64)

    def of(self, example_rows: Rows) -> list[Rows]:
        """The mined negatives (item rows, best first) of each example."""
        return [
            self.rows[self.offsets[place] : self.offsets[place + 1]] for place in self.positions(example_rows).tolist()
        ]

    def kept(self, example_rows: Rows) -> Mask:
        """Whether each example is kept: a rule may have dropped it."""
        return self._kept[self.positions(example_rows)]


def joined(explicit: Sequence[Rows], mined: Sequence[Rows]) -> list[Rows]:
    """The data's own negatives of each example, then the mined ones that are not among them."""
    return [
        np.concatenate([own, new[~np.isin(new, own)]]).astype(np.int64)
        for own, new in zip(explicit, mined, strict=True)
    ]
