"""Training texts against the texts of benchmarks.

The training side is indexed once and held in memory, the texts of each task stream by. Held for each training text: its words
as hashes (8 bytes a word), the word sequences (24 bytes each), 700 bytes of MinHash and, with an encoder, its vector.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Floats, Index, Ragged, Rows, Vectors, concatenate
from nearfield.console import track
from nearfield.data.contamination import (
    KINDS,
    ROLES,
    TRAINING_ROLES,
    ContaminationReport,
    DecontaminationConfig,
    MatchExample,
    Removal,
    TaskContamination,
)
from nearfield.data.items import canonical_text
from nearfield.data.near_duplicates import EmbedTexts, NearIndex, TextSets, near_vectors, pieces, unit
from nearfield.data.readers import excerpt
from nearfield.data.words import Hashes, WordHashes, hash_normal_forms, hash_texts, hash_words, sequences
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.store import Store

VERSION = 2
"""Raised when the same texts give another report."""

BLOCK = 8192
"""Texts that are looked at together."""
_BLOCK_CHARACTERS = 16 << 20
_SHOWN = 5
_NONE: Hashes = np.empty(0, dtype=np.uint64)

logger = logging.getLogger("nearfield.data")


class TrainingTexts:
    """The different texts of a store's training examples, and what they are there."""

    def __init__(self, store: Store, sources: Sequence[str], split: str) -> None:
        self.store = store
        roles = np.zeros((len(TRAINING_ROLES), store.items.num_rows), dtype=np.bool_)
        for name in sources:
            part = store.examples.take(store.select(name, split))
            roles[0, part["query"].to_numpy()] = True
            for number, column in ((1, "positives"), (2, "negatives")):
                roles[number, Ragged.from_arrow(part[column]).values] = True
        self.items: Rows = np.flatnonzero(roles.any(axis=0)).astype(np.int64)
        self.images = 0
        """Items that are an image without a text: they are not compared."""
        if store.has_images:
            wordless = np.asarray([kind == "image" for kind in store.modalities(self.items)], dtype=np.bool_)
            self.images = int(wordless.sum())
            self.items = self.items[~wordless]
        self.roles = roles[:, self.items]

    def batches(self) -> Iterator[list[str]]:
        """The texts in the order of ``items``."""
        for start in range(0, len(self.items), BLOCK):
            yield self.store.texts(self.items[start : start + BLOCK])


@dataclass
class Matches:
    """Matches of a block: pairs (training text, benchmark text) with their similarity, for one kind."""

    pairs: Rows
    similarity: Floats

    @classmethod
    def equal(cls, index: Index, hashes: Hashes) -> Matches:
        """Those with equal hashes; 0 is no hash."""
        training = index.all(hashes)
        pairs = np.stack([training.values, training.owners()], axis=1)[np.repeat(hashes, training.lengths) != 0]
        return cls(pairs, np.ones(len(pairs)))


class TrainingIndex:
    """Everything that benchmark texts are compared with."""

    def __init__(
        self, batches: Iterable[Sequence[str]], config: DecontaminationConfig, encode: EmbedTexts | None = None
    ) -> None:
        self.config = config
        self.encode = encode
        self.known = WordHashes()
        sets, grams, exact, normal = [], [], [], []
        vectors: list[Vectors] = []
        for texts in batches:
            split = hash_words(texts, self.known)
            sets.append(TextSets.of(texts, self.known, split))
            grams.append(sequences(split, config.ngram).distinct())
            exact.append(hash_texts([canonical_text(text) for text in texts]))
            normal.append(hash_normal_forms(texts))
            if encode is not None:
                vectors.append(unit(encode(texts)))
        self.near = NearIndex(TextSets.join(sets), config)
        self.exact = Index(np.concatenate([_NONE, *exact]))
        # A text of signs alone has no normal form; equal ones are exact matches.
        self.normal = Index(np.concatenate([_NONE, *normal]))
        every = concatenate([Ragged.empty(0, np.uint64), *grams])
        self.gram_counts = every.lengths
        self.gram_owners = every.owners()
        self.grams = Index(every.values)
        self.vectors = np.concatenate(vectors) if vectors else None
        self.long = (self.near.sets.split.lengths >= config.min_words) & (
            self.near.sets.letters >= config.min_characters
        )

    def __len__(self) -> int:
        return len(self.gram_counts)

    def matches(self, texts: Sequence[str]) -> tuple[dict[str, Matches], Rows]:
        """Matches of benchmark texts by kind, and the training texts that share any word sequence with one."""
        split = hash_words(texts, self.known)
        sets = TextSets.of(texts, self.known, split)
        matches = {
            "exact": Matches.equal(self.exact, hash_texts([canonical_text(text) for text in texts])),
            "normalised": Matches.equal(self.normal, hash_normal_forms(texts)),
        }
        matches["ngram"], some = self._sequences(sequences(split, self.config.ngram).distinct())
        matches["minhash"] = Matches(*self.near.matches(sets))
        if self.encode is not None and self.vectors is not None:
            matches["embedding"] = self._vectors(texts, sets)
        return matches, some

    def _sequences(self, grams: Ragged) -> tuple[Matches, Rows]:
        """Pairs by the share of the word sequences of the text with fewer."""
        owners, sizes = grams.owners(), grams.lengths
        width = len(grams)
        parts = []
        counts = self.grams.counts(grams.values)
        for piece in pieces(np.where(counts > self.config.common, 0, counts)):
            training = self.grams.all(grams.values[piece], self.config.common)
            parts.append(self.gram_owners[training.values] * width + owners[piece][training.owners()])
        keys, times = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]), return_counts=True)
        pairs = np.stack([keys // max(width, 1), keys % max(width, 1)], axis=1)
        share = times / np.maximum(np.minimum(self.gram_counts[pairs[:, 0]], sizes[pairs[:, 1]]), 1)
        similar = share >= self.config.ngram_share
        return Matches(pairs[similar], share[similar]), np.unique(pairs[:, 0])

    def _vectors(self, texts: Sequence[str], sets: TextSets) -> Matches:
        assert self.encode is not None and self.vectors is not None
        mine = np.flatnonzero(self.long)
        config = self.config
        theirs = np.flatnonzero((sets.split.lengths >= config.min_words) & (sets.letters >= config.min_characters))
        pairs, cosines = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.float64)]
        if len(theirs) and len(mine):
            vectors = unit(self.encode([texts[place] for place in theirs.tolist()]))
            for part, cosine in near_vectors(self.vectors[mine], vectors, config.cosine):
                pairs.append(np.stack([mine[part[:, 0]], theirs[part[:, 1]]], axis=1))
                cosines.append(cosine.astype(np.float64))
        return Matches(np.concatenate(pairs), np.concatenate(cosines))


@dataclass(frozen=True, slots=True)
class BenchmarkText:
    """A text of a task; a query or document that has several forms comes several times in a row."""

    id: str
    role: str
    """One of :data:`nearfield.data.contamination.ROLES`."""
    text: str


@dataclass(frozen=True)
class BenchmarkTask:
    """A task's name and its texts, which are read when they are asked for. Reading may raise BadInputError."""

    name: str
    texts: Callable[[], Iterable[BenchmarkText]]


class _Tally:
    """The matches of one task, added up block by block."""

    def __init__(self, training: TrainingTexts) -> None:
        self.training = training
        count = len(training.items)
        none = len(KINDS)
        self.best = np.full((len(ROLES), count), none, dtype=np.uint8)
        """[roles, n]: the strongest kind of each training text against texts of a role."""
        self.texts: Counter[str] = Counter()
        self.matched: dict[tuple[str, str], int] = {}
        self.any_ngram = np.zeros(count, dtype=np.bool_)
        self.examples: dict[int, list[MatchExample]] = {}
        self._last: tuple[str, str] | None = None

    def add(self, texts: Sequence[BenchmarkText], matches: dict[str, Matches], some: Rows) -> None:
        """Take in the matches of a block."""
        for text in texts:
            if (text.role, text.id) != self._last:
                self._last = (text.role, text.id)
                self.texts[text.role] += 1
        self.any_ngram[some] = True
        roles = np.fromiter((ROLES.index(text.role) for text in texts), dtype=np.int64, count=len(texts))
        for kind, name in enumerate(KINDS):
            if name not in matches:
                continue
            pairs = matches[name].pairs
            np.minimum.at(self.best, (roles[pairs[:, 1]], pairs[:, 0]), kind)
            for place in np.unique(pairs[:, 1]).tolist():
                key = (texts[place].role, texts[place].id)
                self.matched[key] = min(self.matched.get(key, kind), kind)
            self._show(kind, texts, matches[name], roles)

    def _show(self, kind: int, texts: Sequence[BenchmarkText], matches: Matches, roles: Rows) -> None:
        shown = self.examples.setdefault(kind, [])
        if len(shown) >= _SHOWN or not len(matches.pairs):
            return
        distractor = ROLES.index("distractor")
        for pair, similarity in zip(matches.pairs.tolist(), matches.similarity.tolist(), strict=True):
            first, second = pair
            # A pair that a stronger kind found says nothing new; neither does a distractor.
            if roles[second] == distractor or self.best[roles[second], first] < kind:
                continue
            role = np.flatnonzero(self.training.roles[:, first])[0]
            text = texts[second]
            training = self.training.store.texts([self.training.items[first]])[0]
            shown.append(
                MatchExample(
                    KINDS[kind],
                    round(float(similarity), 4),
                    excerpt(training),
                    TRAINING_ROLES[role],
                    excerpt(text.text),
                    text.role,
                    text.id[:200],
                )
            )
            if len(shown) == _SHOWN:
                return

    def result(self, name: str) -> TaskContamination:
        """The sums of the matches of the task."""
        strongest = self.best.min(axis=0)
        matched: dict[str, Counter[str]] = {}
        for (role, _), kind in self.matched.items():
            matched.setdefault(role, Counter())[KINDS[kind]] += 1
        sides = {
            f"{mine}/{theirs}": int(np.count_nonzero(self.training.roles[i] & (self.best[j] < len(KINDS))))
            for i, mine in enumerate(TRAINING_ROLES)
            for j, theirs in enumerate(ROLES)
        }
        return TaskContamination(
            task=name,
            benchmark={role: self.texts[role] for role in ROLES if self.texts[role]},
            training=_in_order({kind: int(np.count_nonzero(strongest == i)) for i, kind in enumerate(KINDS)}, KINDS),
            matched={role: _in_order(matched[role], KINDS) for role in ROLES if role in matched},
            sides={side: count for side, count in sides.items() if count},
            any_ngram=int(np.count_nonzero(self.any_ngram)),
            examples=tuple(example for kind in sorted(self.examples) for example in self.examples[kind]),
        )


def _in_order(counts: dict[str, int] | Counter[str], names: Sequence[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts.get(name)}


def decontaminate(
    store: Store,
    tasks: Iterable[BenchmarkTask],
    config: DecontaminationConfig | None = None,
    *,
    suite: str = "",
    sources: Sequence[str] | None = None,
    split: str = "train",
    encode: EmbedTexts | None = None,
    encoder: str | None = None,
) -> ContaminationReport:
    """Compare the training texts of a store with the texts of tasks.

    Queries, positives and negatives of the ``split`` of the ``sources`` (null takes all) are compared with every text of
    every task, whatever the sides: equal, equal after normalisation, by shared word sequences, by near-duplicates of words
    (MinHash) and, with ``encode``, of vectors. Raises BadInputError where no example is in the split.
    """
    config = config or DecontaminationConfig()
    names = tuple(source.name for source in store.sources) if sources is None else tuple(sources)
    training = TrainingTexts(store, names, split)
    if training.images:
        logger.warning(
            "%s training images are not compared with the suite: only texts are; see the cleaning step near_pictures",
            f"{training.images:,}",
        )
    if training.images and not len(training.items):
        raise BadInputError(
            f"the examples of {', '.join(names)} in the split {split!r} are images alone, and only texts can be compared",
            where=str(store.path),
        )
    if not len(training.items):
        raise BadInputError(f"no example of {', '.join(names)} is in the split {split!r}", where=str(store.path))
    index = TrainingIndex(track(training.batches(), "Indexing the training texts"), config, encode)
    results, why = [], _Removals(training)
    for task in tasks:
        tally = _Tally(training)
        try:
            for block in _blocks(track(task.texts(), f"Comparing with {task.name}")):
                tally.add(block, *index.matches([text.text for text in block]))
        except BadInputError as error:
            results.append(TaskContamination(task.name, {}, problem=str(error)))
            continue
        if not tally.texts:
            results.append(TaskContamination(task.name, {}, problem="the task has no text that could be compared"))
            continue
        results.append(tally.result(task.name))
        why.add(task.name, tally.best)
    removals = why.result()
    return ContaminationReport(
        data=store.fingerprint,
        suite=suite,
        sources=names,
        split=split,
        settings=config.model_dump(mode="json"),
        encoder=encoder,
        training={role: int(n) for role, n in zip(TRAINING_ROLES, training.roles.sum(axis=1).tolist(), strict=True)},
        texts=len(training.items),
        images=training.images,
        tasks=tuple(results),
        contaminated=len(removals),
        removals=removals,
    )


class _Removals:
    """The strongest match of each training text over all tasks, distractors left out."""

    def __init__(self, training: TrainingTexts) -> None:
        self.training = training
        self.kinds = np.full(len(training.items), len(KINDS), dtype=np.uint8)
        self.sources = np.zeros(len(training.items), dtype=np.int64)
        """The task and role that the strongest match is with, a number of ``names``."""
        self.names: list[tuple[str, str]] = []

    def add(self, task: str, best: npt.NDArray[np.uint8]) -> None:
        """Take in the matches of a task, [roles, n]."""
        for role, kinds in zip(ROLES, best, strict=True):
            stronger = kinds < self.kinds
            if role != "distractor" and stronger.any():
                self.kinds[stronger], self.sources[stronger] = kinds[stronger], len(self.names)
                self.names.append((task, role))

    def result(self) -> tuple[Removal, ...]:
        """In the order of the store's items."""
        places = np.flatnonzero(self.kinds < len(KINDS))
        store, rows = self.training.store, self.training.items[places]
        ids, texts = store.items["id"].take(rows).to_pylist(), store.texts(rows)
        sources = [self.names[source] for source in self.sources[places].tolist()]
        return tuple(
            Removal(identity.hex(), KINDS[kind], task, role, excerpt(text))
            for identity, kind, (task, role), text in zip(ids, self.kinds[places].tolist(), sources, texts, strict=True)
        )


def _blocks(texts: Iterable[BenchmarkText]) -> Iterator[list[BenchmarkText]]:
    block: list[BenchmarkText] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text.text)
        if len(block) >= BLOCK or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block
