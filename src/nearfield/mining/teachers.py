"""Teachers at work: each finds the best documents of a pool for each query, and scores any pair of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from nearfield.arrays import Ragged, Rows, Vectors
from nearfield.console import track
from nearfield.data.vectors import unit
from nearfield.errors import BadInputError
from nearfield.mining.approximate import Recall, approximate_search
from nearfield.mining.search import DEFAULT_MEMORY, ArrayDocuments, Documents, Neighbours, ordered, search

TextsOf = Callable[[str, Rows], list[str]]
"""(role, rows of the pool) -> texts."""
Encode = Callable[[Sequence[str], str], Any]
"""(texts, role) -> vectors [n, d]."""

if TYPE_CHECKING:
    from nearfield.mining.config import (
        ApproximateSearch,
        BM25Teacher,
        CrossEncoderTeacher,
        DenseTeacher,
        SearchSettings,
    )

_RANK_OFFSET = 60


@dataclass(frozen=True)
class Searching:
    """How vectors are searched."""

    method: SearchSettings | None = None
    """None compares all documents."""
    memory: int = DEFAULT_MEMORY
    """Bytes beside the vectors."""
    device: str | None = None
    seed: int = 0
    spread: bool = False
    """Search exactly on a Ray cluster, for parts of the queries at a time."""


@dataclass(frozen=True)
class TeacherPool:
    """The queries and documents that a teacher is put before, both numbered from 0."""

    counts: tuple[int, int]
    """How many queries and documents."""
    texts: TextsOf
    vectors: Callable[[DenseTeacher], tuple[Vectors, Documents]]
    """A teacher that makes vectors -> those of the queries and documents."""
    searching: Searching = field(default_factory=Searching)

    def all_texts(self) -> tuple[list[str], list[str]]:
        """Of the queries, and of the documents."""
        queries, documents = (np.arange(count, dtype=np.int64) for count in self.counts)
        return self.texts("query", queries), self.texts("document", documents)


class Scorer(Protocol):
    """A teacher before a pool of queries and documents, both numbered from 0."""

    def find(self, depth: int, positives: Ragged, excluded: Ragged) -> tuple[Neighbours, Vectors]:
        """The best ``depth`` documents of each query, and the scores of ``positives.values``, on one scale.

        Neither positives nor excluded documents are among those found; ties go by the smaller row.
        """
        ...


class PairScorer:
    """A teacher that can score any pair by itself."""

    def search(self, depth: int, excluded: Ragged) -> Neighbours:
        """The best ``depth`` documents of each query but the excluded ones, ties by the smaller row."""
        raise NotImplementedError

    def score(self, query_rows: Rows, document_rows: Rows) -> Vectors:
        """The score of each pair."""
        raise NotImplementedError

    def find(self, depth: int, positives: Ragged, excluded: Ragged) -> tuple[Neighbours, Vectors]:
        """By the two above."""
        nearest = self.search(depth, positives.union(excluded))
        return nearest, self.score(positives.owners(), positives.values)


@dataclass
class DenseScorer(PairScorer):
    """Inner products of vectors."""

    queries: Vectors
    documents: Documents
    searching: Searching = field(default_factory=Searching)
    recall: Recall | None = field(default=None, init=False)
    """Of the last search, where it was an approximate one."""

    def search(self, depth: int, excluded: Ragged) -> Neighbours:
        """By the method of the settings."""
        how = self.searching
        if how.method is None or how.method.exact:
            device = how.device or "cpu"
            if how.spread:
                from nearfield.mining.ray_engine import spread_search

                return spread_search(
                    self.queries, self.documents, depth, excluded=excluded, memory=how.memory, device=device
                )
            return search(self.queries, self.documents, depth, excluded=excluded, memory=how.memory, device=device)
        if not isinstance(self.documents, ArrayDocuments):
            raise BadInputError(f"the search {how.method.kind} needs the documents' vectors as one array")
        vectors = self.documents.vectors
        method = cast("ApproximateSearch", how.method)
        nearest, self.recall = approximate_search(
            self.queries, vectors, depth, method, excluded=excluded, seed=how.seed, memory=how.memory
        )
        return nearest

    def score(self, query_rows: Rows, document_rows: Rows) -> Vectors:
        """By :func:`~nearfield.mining.search.pair_scores`."""
        return self.documents.pairs(self.queries, query_rows, document_rows)


class BM25Scorer(PairScorer):
    """Words in common, by bm25s; a document without a common word is not found."""

    def __init__(self, config: BM25Teacher, pool: TeacherPool) -> None:
        import bm25s

        queries, documents = pool.all_texts()

        stemmer = None
        if config.language is not None:
            stemming = importlib.import_module("Stemmer")
            if config.language not in stemming.algorithms():
                known = ", ".join(stemming.algorithms())
                raise BadInputError(f"there is no stemmer for {config.language!r}", hint=f"Languages: {known}.")
            stemmer = stemming.Stemmer(config.language)
        stopwords = "en" if config.language == "english" else []
        settings = {"stopwords": stopwords, "stemmer": stemmer, "show_progress": False}
        tokens = bm25s.tokenize(list(documents), **settings)
        self.count = len(documents)
        self.queries: list[list[str]] = bm25s.tokenize(list(queries), return_ids=False, **settings)
        self.index: Any = None
        # Without one word in all documents there is nothing to index, and nothing is found.
        if any(len(ids) for ids in tokens.ids):
            self.index = bm25s.BM25(k1=config.k1, b=config.b)
            self.index.index(tokens, show_progress=False)

    def _scores(self, query: int) -> Vectors:
        words = self.queries[query]
        if self.index is None or not words:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self.index.get_scores(words), dtype=np.float32)

    def search(self, depth: int, excluded: Ragged) -> Neighbours:
        """All documents are scored, a query at a time."""
        rows = np.full((len(self.queries), depth), -1, dtype=np.int64)
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for query in track(range(len(self.queries)), "BM25"):
            line = self._scores(query)
            line[excluded[query]] = 0
            nearest = np.flatnonzero(line > 0)
            if len(nearest) > depth:
                # The least score that is needed; ties with it are sorted out below.
                nearest = nearest[line[nearest] >= np.partition(line[nearest], -depth)[-depth]]
            order = np.lexsort((nearest, -line[nearest]))[:depth]
            rows[query, : len(order)], scores[query, : len(order)] = nearest[order], line[nearest[order]]
        return Neighbours(rows, scores)

    def score(self, query_rows: Rows, document_rows: Rows) -> Vectors:
        """0 where there is no common word."""
        scores = np.zeros(len(query_rows), dtype=np.float32)
        order = np.argsort(query_rows, kind="stable")
        bounds = np.searchsorted(query_rows[order], np.arange(len(self.queries) + 1))
        for query in np.unique(query_rows).tolist():
            places = order[bounds[query] : bounds[query + 1]]
            scores[places] = self._scores(query)[document_rows[places]]
        return scores


class CrossEncoderScorer(PairScorer):
    """A cross-encoder scores what another teacher found."""

    def __init__(self, config: CrossEncoderTeacher, retriever: PairScorer, texts: TextsOf, device: str | None) -> None:
        from sentence_transformers import CrossEncoder
        from torch import nn

        from nearfield.encoders.load import quiet_transformers
        from nearfield.encoders.transformer import check_weights, recorded_loading
        from nearfield.encoders.trials import trial_scores

        self.retriever, self.texts, self.name = retriever, texts, config.model
        try:
            with quiet_transformers(), recorded_loading() as loading:
                self.model = CrossEncoder(
                    config.model,
                    revision=config.revision,
                    device=device,
                    max_length=config.max_length,
                    trust_remote_code=config.trust_remote_code,
                )
        except Exception as error:  # whatever a damaged folder or an unreachable hub raises becomes one message
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise BadInputError(f"the cross-encoder cannot be loaded: {reason}", where=config.model) from error
        if self.model.num_labels != 1:
            raise BadInputError(
                f"this cross-encoder gives {self.model.num_labels} numbers a pair; one is wanted", where=config.model
            )
        # sentence-transformers gives a model without a head for pairs one of random weights.
        check_weights(loading, lambda: trial_scores(self.model), config.model)
        self.activation = nn.Sigmoid() if config.scale == "sigmoid" else nn.Identity()

    def search(self, depth: int, excluded: Ragged) -> Neighbours:
        """The retriever's best ``depth``, in the order of the cross-encoder's scores."""
        return rescored(self.retriever.search(depth, excluded), self.score, depth)

    def score(self, query_rows: Rows, document_rows: Rows) -> Vectors:
        """Each distinct pair once, the longest texts first."""
        scores = np.empty(len(query_rows), dtype=np.float32)
        block = 65_536
        for start in track(range(0, len(query_rows), block), "Cross-encoder"):
            part = slice(start, start + block)
            queries, where_query = np.unique(query_rows[part], return_inverse=True)
            documents, where_document = np.unique(document_rows[part], return_inverse=True)
            left, right = self.texts("query", queries), self.texts("document", documents)
            pairs = [(left[q], right[d]) for q, d in zip(where_query.tolist(), where_document.tolist(), strict=True)]
            scores[part] = self.model.predict(
                pairs, activation_fn=self.activation, show_progress_bar=False, convert_to_numpy=True
            )
            bad = ~np.isfinite(scores[part])
            if bad.any():
                raise BadInputError(
                    f"{int(bad.sum()):,} of {len(pairs):,} pairs have a score that is not finite; the first is of "
                    f"{pairs[int(np.flatnonzero(bad)[0])][0][:100]!r}",
                    where=self.name,
                    hint="Is the cross-encoder in order?",
                )
        return scores


@dataclass(frozen=True)
class EnsembleScorer:
    """Several teachers together."""

    members: Sequence[PairScorer]
    weights: Sequence[float]
    fusion: str

    def find(self, depth: int, positives: Ragged, excluded: Ragged) -> tuple[Neighbours, Vectors]:
        """The union of what the members find, in the order of the fused scores."""
        owners, rows = [], []
        hidden = positives.union(excluded)
        for member in self.members:
            part = member.search(depth, hidden)
            owner, place = np.nonzero(part.rows >= 0)
            owners.append(owner)
            rows.append(part.rows[owner, place])
        union = Ragged.from_pairs(np.concatenate(owners), np.concatenate(rows), len(positives))
        owner = union.owners()
        fused = self._fused(
            np.concatenate([owner, positives.owners()]), np.concatenate([union.values, positives.values])
        )
        width = int(union.lengths.max(initial=0))
        matrix = np.full((len(union), width), -1, dtype=np.int64)
        scores = np.full(matrix.shape, -np.inf, dtype=np.float32)
        place = union.ranks()
        matrix[owner, place], scores[owner, place] = union.values, fused[: len(owner)]
        return Neighbours(*ordered(matrix, scores, depth)), fused[len(owner) :]

    def _fused(self, owners: Rows, rows: Rows) -> Vectors:
        """The fused score of each pair; ranks are counted among the pairs of a query, equal scores by the smaller row."""
        total = np.zeros(len(rows))
        for member, weight in zip(self.members, self.weights, strict=True):
            scores = member.score(owners, rows)
            if self.fusion == "score":
                total += weight * scores.astype(np.float64) / sum(self.weights)
                continue
            order = np.lexsort((rows, -scores, owners))
            ranks = np.empty(len(rows), dtype=np.int64)
            ranks[order] = np.arange(len(rows)) - np.searchsorted(owners[order], owners[order]) + 1
            total += weight / (_RANK_OFFSET + ranks)
        return total.astype(np.float32)


def rescored(neighbours: Neighbours, score: Callable[[Rows, Rows], Vectors], depth: int) -> Neighbours:
    """The same documents with other scores, in their order."""
    owner, place = np.nonzero(neighbours.rows >= 0)
    scores = np.full(neighbours.rows.shape, -np.inf, dtype=np.float32)
    scores[owner, place] = score(owner, neighbours.rows[owner, place])
    return Neighbours(*ordered(neighbours.rows, scores, depth))


def as_pair_scorer(scorer: Scorer) -> PairScorer:
    """The teacher as one that scores pairs by itself, which others build on."""
    if not isinstance(scorer, PairScorer):
        raise BadInputError(f"{type(scorer).__name__} does not score pairs by itself, so no other teacher can use it")
    return scorer


def encoded(encode: Encode, queries: Sequence[str], documents: Sequence[str]) -> DenseScorer:
    """A teacher from any function ``(texts, role) -> vectors``; vectors are brought to length 1."""
    made = [
        unit(np.asarray(encode(texts, role)), np.arange(len(texts)))
        for role, texts in (("query", queries), ("document", documents))
    ]
    return DenseScorer(made[0], ArrayDocuments(made[1]))
