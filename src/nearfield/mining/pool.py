"""A source's examples as a pool: queries and documents numbered from 0, with what may never be a negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from nearfield.data.store import Store
from nearfield.mining.config import MiningConfig
from nearfield.mining.documents import RowLists, Rows
from nearfield.mining.mine import MinedNegatives, select
from nearfield.mining.search import Neighbours
from nearfield.mining.teachers import DenseScorer, Scorer

_BLOCK = 65_536


@dataclass(frozen=True)
class Pool:
    """What negatives are mined for and from."""

    source: int
    name: str
    examples: Rows
    """[n] example rows of the store."""
    queries: Rows
    """[n] the query item of each."""
    documents: Rows
    """[m] item rows, rising."""
    positives: RowLists
    """For each example, its own positives as numbers of documents, rising."""
    positive_order: Rows
    """Where in ``positives.rows`` each positive of the store is, example after example in the order of the data."""
    excluded: RowLists
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
    positives = part["positives"].combine_chunks()
    counts = np.diff(positives.offsets.to_numpy().astype(np.int64))
    own_items = positives.flatten().to_numpy().astype(np.int64)
    owners = np.repeat(np.arange(len(examples), dtype=np.int64), counts)
    documents = document_items(store, corpus, split)
    own_rows = np.searchsorted(documents, own_items).astype(np.int64)
    own = RowLists.from_pairs(owners, own_rows, len(examples))
    order = np.empty(len(own_rows), dtype=np.int64)
    order[np.lexsort((own_rows, owners))] = np.arange(len(own_rows))

    known = store.known_positives()
    starts, stops = known.offsets[queries], known.offsets[queries + 1]
    owner = np.repeat(np.arange(len(queries), dtype=np.int64), stops - starts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(stops - starts) - (stops - starts), stops - starts)
    hidden_owner = np.concatenate([owner, np.arange(len(queries), dtype=np.int64)])
    hidden_items = np.concatenate([known.rows[np.repeat(starts, stops - starts) + place], queries])
    return Pool(
        store.source_number(source),
        source,
        examples,
        queries,
        documents,
        own,
        order,
        _same_text(store, documents, hidden_owner, hidden_items, len(examples)),
    )


def document_items(store: Store, sources: Sequence[str], split: str) -> Rows:
    """All items that are documents of examples of these sources in a split: positives and explicit negatives."""
    found = [np.empty(0, dtype=np.int64)]
    for source in sources:
        part = store.examples.take(store.select(source, split))
        found += [part[column].combine_chunks().flatten().to_numpy() for column in ("positives", "negatives")]
    return np.unique(np.concatenate(found)).astype(np.int64)


def _same_text(store: Store, documents: Rows, owners: Rows, items: Rows, count: int) -> RowLists:
    """For each owner, the documents that have the text and picture of one of its items, but for case and white space."""
    all_items, where = np.unique(np.concatenate([documents, items]), return_inverse=True)
    _, keys = np.unique(_text_keys(store, all_items), return_inverse=True)
    document_keys, item_keys = keys[where[: len(documents)]], keys[where[len(documents) :]]
    order = np.argsort(document_keys, kind="stable")
    starts = np.searchsorted(document_keys[order], item_keys)
    lengths = np.searchsorted(document_keys[order], item_keys, side="right") - starts
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = order[np.repeat(starts, lengths) + place]
    return RowLists.from_pairs(np.repeat(owners, lengths), found.astype(np.int64), count)


def _text_keys(store: Store, items: Rows) -> Rows:
    """64 bits of each item's text in lower case with single spaces, and of its picture."""
    keys = np.empty(len(items), dtype=np.int64)
    for start in range(0, len(items), _BLOCK):
        part = items[start : start + _BLOCK]
        texts, pictures = store.texts(part), store.picture_rows(part).tolist()
        contents = [
            " ".join(text.casefold().split()) if picture < 0 else f"{picture}\0{' '.join(text.casefold().split())}"
            for text, picture in zip(texts, pictures, strict=True)
        ]
        keys[start : start + len(texts)] = [
            int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big") - 2**63 for content in contents
        ]
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
        scores = scorer.score(pool.positives.owners(), pool.positives.rows)
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
    """What an exact search finds for the m-th of n even shares of the queries; ``share`` is (m, n).

    Shares one after another are what :meth:`Scorer.find` finds, bit for bit.
    """
    start, stop = (len(pool.queries) * edge // share[1] for edge in (share[0], share[0] + 1))
    part = DenseScorer(scorer.queries[start:stop], scorer.documents, scorer.searching)
    return part.search(config.searched, pool.positives.merged(pool.excluded).slice(start, stop))
