"""A source's examples as a pool: queries and documents numbered from 0, with what may never be a negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfield.arrays import Index, Ragged, Rows, beside
from nearfield.data.store import Store
from nearfield.data.words import Hashes, hash_texts
from nearfield.mining.config import MiningConfig
from nearfield.mining.rules import MinedNegatives, select
from nearfield.mining.search import Neighbours
from nearfield.mining.teachers import DenseScorer, Scorer

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
    """For each list, the documents that have the text and picture of one of its items, but for case and white space."""
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
