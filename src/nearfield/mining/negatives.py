"""Negatives of a source's examples: the pool that they are mined in, the artifact that a miner leaves, and its audit.

A pool numbers queries and documents from 0 and says what may never be a negative; the artifact has an example a row; the audit looks
at score gaps, asks a second teacher, and shows examples in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.arrays import Floats, Index, Mask, Ragged, Rows, Vectors, beside
from nearfield.data.near_duplicates import Hashes, hash_texts
from nearfield.data.store import Store
from nearfield.errors import BadInputError
from nearfield.files import Sealed, atomic_path, read_json, seal, write_json
from nearfield.mining.rules import MinedNegatives, select
from nearfield.mining.search import Neighbours
from nearfield.mining.teachers import DenseScorer, Scorer
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.mining.config import MiningConfig

_BLOCK = 65_536


@dataclass(frozen=True)
class Pool:
    """The queries that negatives are mined for, and the documents."""

    source: int
    name: str
    examples: Rows
    """[n] example rows of the store."""
    queries: Rows
    """[n] the query item of each."""
    documents: Rows
    """[m] item rows, rising."""
    positives: Ragged
    """For each example, its own positives as numbers of documents, rising."""
    positive_order: Rows
    """Where in ``positives.values`` each positive of the store is, example after example in the order of the data."""
    excluded: Ragged
    """For each example, documents that are known positives of its query anywhere in the data, the query itself, and
    documents that differ from these in case and white space only."""

    def items(self, role: str, rows: Rows) -> Rows:
        """Item rows of queries or documents by their numbers in the pool."""
        chosen: Rows = (self.queries if role == "query" else self.documents)[rows]
        return chosen


def make_pool(store: Store, source: str, split: str, corpus: Sequence[str]) -> Pool:
    """The pool of a source's examples in a split; documents are those of the sources in ``corpus``, in that split."""
    examples = store.select(source, split)
    part = store.examples.take(examples)
    queries = part["query"].to_numpy().astype(np.int64)
    positives = Ragged.from_arrow(part["positives"])
    documents = document_items(store, corpus, split)
    own_rows, owners = Index(documents, rising=True).rows(positives.values), positives.owners()
    order = np.empty(len(own_rows), dtype=np.int64)
    order[np.lexsort((own_rows, owners))] = np.arange(len(own_rows))

    hidden = beside(store.known_positives().take(queries), Ragged.single(queries))
    return Pool(
        store.source_number(source),
        source,
        examples,
        queries,
        documents,
        Ragged.from_pairs(owners, own_rows, len(examples)),
        order,
        _same_text(store, documents, hidden),
    )


def document_items(store: Store, sources: Sequence[str], split: str) -> Rows:
    """All items that are documents of examples of these sources in a split: positives and explicit negatives."""
    rows = [np.empty(0, dtype=np.int64)]
    for source in sources:
        part = store.examples.take(store.select(source, split))
        rows += [Ragged.from_arrow(part[column]).values for column in ("positives", "negatives")]
    return np.unique(np.concatenate(rows)).astype(np.int64)


def _same_text(store: Store, documents: Rows, items: Ragged) -> Ragged:
    """For each list, the documents that have the text and image of one of its items, but for case and white space."""
    all_items, where = np.unique(np.concatenate([documents, items.values]), return_inverse=True)
    _, keys = np.unique(_text_keys(store, all_items), return_inverse=True)
    document_keys, item_keys = keys[where[: len(documents)]], keys[where[len(documents) :]]
    matches = Index(document_keys).all(item_keys)
    return Ragged.from_pairs(items.owners()[matches.owners()], matches.values, len(items))


def _text_keys(store: Store, items: Rows) -> Hashes:
    """64 bits of each item's text in lower case with single spaces, and of its image."""
    keys = np.empty(len(items), dtype=np.uint64)
    for start in range(0, len(items), _BLOCK):
        part = items[start : start + _BLOCK]
        texts, images = store.texts(part), store.image_rows(part).tolist()
        contents = [
            " ".join(text.casefold().split()) if image < 0 else f"{image}\0{' '.join(text.casefold().split())}"
            for text, image in zip(texts, images, strict=True)
        ]
        keys[start : start + len(texts)] = hash_texts(contents)
    return keys


def mine_pool(
    pool: Pool,
    scorer: Scorer,
    config: MiningConfig,
    *,
    seed: int = 0,
    generation: int = 0,
    found: Neighbours | None = None,
) -> MinedNegatives:
    """The negatives of a pool's examples, as numbers of its documents; ``found`` is what :func:`search_share` s found."""
    if found is None:
        found, scores = scorer.find(config.searched, pool.positives, pool.excluded)
    else:
        assert isinstance(scorer, DenseScorer)
        scores = scorer.score(pool.positives.owners(), pool.positives.values)
    return select(
        found,
        pool.positives,
        scores,
        rules=[rule.build() for rule in config.rules],
        negatives=config.negatives,
        seed=seed,
        names=(pool.name, generation),
    )


def search_share(pool: Pool, scorer: DenseScorer, config: MiningConfig, share: tuple[int, int]) -> Neighbours:
    """The result of an exact search for the m-th of n even shares of the queries; ``share`` is (m, n).

    Shares one after another are what :meth:`Scorer.find` finds, bit for bit.
    """
    start, stop = (len(pool.queries) * edge // share[1] for edge in (share[0], share[0] + 1))
    part = DenseScorer(scorer.queries[start:stop], scorer.documents, scorer.searching)
    return part.search(config.searched, pool.positives.union(pool.excluded).slice(start, stop))


VERSION = 2
SHORT_FILE = "short.jsonl"
_SHOWN = 200

SCHEMA = pa.schema(
    [
        ("example", pa.int64()),
        ("source", pa.int32()),
        ("query", pa.int64()),
        ("negatives", pa.large_list(pa.int64())),
        ("scores", pa.large_list(pa.float32())),
        ("ranks", pa.large_list(pa.int32())),
        ("positive_scores", pa.large_list(pa.float32())),
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
                        "negatives": len(result.lists[number]),
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
    def lists(values: Any, kind: pa.DataType, like: Ragged = mined.lists) -> pa.Array:
        return Ragged(like.offsets, values).to_arrow(kind)

    columns = [
        pa.array(pool.examples),
        pa.array(np.full(len(pool.examples), pool.source, dtype=np.int32)),
        pa.array(pool.queries),
        lists(pool.documents[mined.lists.values], pa.int64()),
        lists(mined.scores, pa.float32()),
        lists(mined.ranks.astype(np.int32), pa.int32()),
        lists(mined.positive_scores[pool.positive_order], pa.float32(), pool.positives),
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
        "negatives": len(mined.lists.values),
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
        self.lists = self._lists("negatives")
        """The mined negatives (item rows, best first) of each of ``examples``."""
        self._places = Index(self.examples, rising=True)
        self._kept: Mask = self.table["kept"].to_numpy(zero_copy_only=False).astype(bool)

    def _lists(self, column: str) -> Ragged:
        return Ragged.from_arrow(self.table[column].combine_chunks())

    @property
    def scores(self) -> Vectors:
        """The teacher's score of each value of ``lists``."""
        return self._lists("scores").values

    @property
    def ranks(self) -> Rows:
        """The rank of each value of ``lists``."""
        return self._lists("ranks").values.astype(np.int64)

    @property
    def positive_score_lists(self) -> Ragged:
        """The teacher's score of each positive of each of ``examples``."""
        return self._lists("positive_scores")

    @property
    def positive_scores(self) -> Vectors:
        """The teacher's score of each positive of the store's examples, example after example, in the store's order."""
        return self.positive_score_lists.values

    def positions(self, example_rows: Rows) -> Rows:
        """Where examples stand in the table; one that was not mined for is an error of the caller."""
        return self._places.rows(example_rows, "examples that were not mined for")

    def of(self, example_rows: Rows) -> list[Rows]:
        """The mined negatives (item rows, best first) of each example."""
        return [self.lists[place] for place in self.positions(example_rows).tolist()]

    def kept(self, example_rows: Rows) -> Mask:
        """Whether each example is kept: a rule may have dropped it."""
        return self._kept[self.positions(example_rows)]


Judge = Callable[[int, Rows, Rows], Vectors]
"""(source number, query items, document items) -> a second teacher's scores of these pairs."""


@dataclass(frozen=True)
class Proportion:
    """Of ``n`` trials ``hits`` hit; with Wilson's interval at 95 %."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share; not a number where nothing was tried."""
        return self.hits / self.n if self.n else math.nan


def wilson(hits: int, n: int, z: float = 1.959964) -> Proportion:
    """Wilson's score interval of a share (Wilson 1927): it stays within 0 and 1 and holds for few hits too."""
    if n == 0:
        return Proportion(0, 0, 0.0, 1.0)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Proportion(
        hits, n, 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)
    )


@dataclass(frozen=True)
class ShownNegative:
    """A negative in words."""

    text: str
    score: float
    rank: int
    judged: float
    """The second teacher's score."""


@dataclass(frozen=True)
class ShownExample:
    """An example in words."""

    source: str
    example: int
    query: str
    positives: tuple[tuple[str, float], ...]
    negatives: tuple[ShownNegative, ...]


@dataclass(frozen=True)
class Audit:
    """The result of :func:`audit`."""

    summary: dict[str, Any]
    """As :func:`nearfield.mining.negatives.write_negatives` left it."""
    sample: tuple[ShownExample, ...]
    gaps: Floats
    """The smallest score of an example's positives less that of its negative, one a negative."""
    positive_scores: Floats
    """The smallest score of the positives of each kept example."""
    negative_scores: Floats
    judge: str
    false_negatives: dict[str, Proportion]
    """Source -> of the judged negatives, those that the second teacher scores higher than the positive."""
    shared: Proportion
    """The same over all sources."""


def audit(
    store: Store,
    negatives: Negatives,
    judge: Judge,
    judge_name: str,
    *,
    shown: int = 10,
    judged: int = 500,
    seed: int = 0,
) -> Audit:
    """Look at mined negatives: ``shown`` examples in words, and ``judged`` negatives of each source before a second teacher.

    At most one negative an example is judged, so that the trials are independent. A negative counts as false where the
    judge scores it higher than the example's lowest positive: an estimate by that judge, not the truth.
    """
    counts, table = negatives.lists.lengths, negatives.table
    positives = negatives.positive_score_lists
    scores = positives.values.astype(np.float64)
    lowest = np.minimum.reduceat(scores, positives.offsets[:-1]) if len(counts) else np.empty(0)
    gaps = lowest[negatives.lists.owners()] - negatives.scores.astype(np.float64)
    random = generator(seed, "mine", "audit")
    sources = table["source"].to_numpy()
    shares: dict[str, Proportion] = {}
    for number, source in enumerate(store.sources):
        some = np.flatnonzero((sources == number) & (counts > 0))
        if not len(some):
            continue
        some = np.sort(random.choice(some, min(judged, len(some)), replace=False))
        picks = negatives.lists.offsets[some] + random.integers(0, counts[some])
        shares[source.name] = _judge(store, negatives, judge, number, some, picks)
    kept = table["kept"].to_numpy(zero_copy_only=False).astype(bool)
    chosen = np.flatnonzero(counts > 0)
    chosen = np.sort(random.choice(chosen, min(shown, len(chosen)), replace=False))
    return Audit(
        summary=negatives.summary,
        sample=tuple(_show(store, negatives, judge, chosen)),
        gaps=gaps,
        positive_scores=lowest[kept],
        negative_scores=negatives.scores.astype(np.float64),
        judge=judge_name,
        false_negatives=shares,
        shared=wilson(sum(one.hits for one in shares.values()), sum(one.n for one in shares.values())),
    )


def _judge(store: Store, negatives: Negatives, judge: Judge, source: int, places: Rows, picks: Rows) -> Proportion:
    queries = negatives.table["query"].to_numpy()[places]
    examples = store.examples.take(negatives.examples[places])["positives"].to_pylist()
    lengths = [len(rows) for rows in examples]
    items = np.concatenate([negatives.lists.values[picks], np.concatenate([np.asarray(rows) for rows in examples])])
    asked = np.concatenate([queries, np.repeat(queries, lengths)])
    scores = judge(source, asked, items.astype(np.int64))
    mine, theirs = scores[: len(places)], scores[len(places) :]
    lowest = np.minimum.reduceat(theirs, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64))
    # Strictly: two scores of 0, as of BM25 without a common word, say nothing.
    return wilson(int((mine > lowest).sum()), len(places))


def _show(store: Store, negatives: Negatives, judge: Judge, places: Rows) -> Iterator[ShownExample]:
    rows = [negatives.table.slice(place, 1).to_pylist()[0] for place in places.tolist()]
    # A judge may have to read the whole corpus: it is asked once a source.
    for source in sorted({row["source"] for row in rows}):
        mine = [row for row in rows if row["source"] == source]
        items = [np.asarray(row["negatives"], dtype=np.int64) for row in mine]
        queries = np.repeat([row["query"] for row in mine], [len(part) for part in items]).astype(np.int64)
        scores = iter(judge(source, queries, np.concatenate(items)).tolist())
        for row, part in zip(mine, items, strict=True):
            positives = store.examples.take([row["example"]])["positives"].to_pylist()[0]
            texts, positive_texts = store.shown(part), store.shown(positives)
            yield ShownExample(
                store.sources[source].name,
                row["example"],
                store.shown([row["query"]])[0],
                tuple(zip(positive_texts, row["positive_scores"], strict=True)),
                tuple(
                    ShownNegative(text, score, rank, next(scores))
                    for text, score, rank in zip(texts, row["scores"], row["ranks"], strict=True)
                ),
            )
