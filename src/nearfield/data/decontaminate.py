"""Training texts against the texts of benchmarks.

The training side is indexed once and held in memory, the texts of each task stream by.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.console import track
from nearfield.data.contamination import (
    KINDS,
    ROLES,
    TRAINING_ROLES,
    ContaminationReport,
    MatchExample,
    Removal,
    TaskContamination,
)
from nearfield.data.decontamination_config import DecontaminationConfig
from nearfield.data.near import Encode
from nearfield.data.readers.base import excerpt
from nearfield.data.shingles import Rows
from nearfield.data.training_index import BLOCK, Found, TrainingIndex, TrainingTexts
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.data.store import Store

VERSION = 1
"""Raised when the same texts give another report."""

_BLOCK_CHARACTERS = 16 << 20
_SHOWN = 5

logger = logging.getLogger("nearfield.data")


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

    def add(self, texts: Sequence[BenchmarkText], found: dict[str, Found], some: Rows) -> None:
        """Take in the matches of a block."""
        for text in texts:
            if (text.role, text.id) != self._last:
                self._last = (text.role, text.id)
                self.texts[text.role] += 1
        self.any_ngram[some] = True
        roles = np.fromiter((ROLES.index(text.role) for text in texts), dtype=np.int64, count=len(texts))
        for kind, name in enumerate(KINDS):
            if name not in found:
                continue
            pairs = found[name].pairs
            np.minimum.at(self.best, (roles[pairs[:, 1]], pairs[:, 0]), kind)
            for place in np.unique(pairs[:, 1]).tolist():
                key = (texts[place].role, texts[place].id)
                self.matched[key] = min(self.matched.get(key, kind), kind)
            self._show(kind, texts, found[name], roles)

    def _show(self, kind: int, texts: Sequence[BenchmarkText], found: Found, roles: Rows) -> None:
        shown = self.examples.setdefault(kind, [])
        if len(shown) >= _SHOWN or not len(found.pairs):
            return
        distractor = ROLES.index("distractor")
        for pair, similarity in zip(found.pairs.tolist(), found.similarity.tolist(), strict=True):
            first, second = pair
            # A pair that a stronger kind found says nothing new; neither does a distractor.
            if roles[second] == distractor or self.best[roles[second], first] < kind:
                continue
            own = np.flatnonzero(self.training.roles[:, first])[0]
            text = texts[second]
            training = self.training.store.texts([self.training.items[first]])[0]
            shown.append(
                MatchExample(
                    KINDS[kind],
                    round(float(similarity), 4),
                    excerpt(training),
                    TRAINING_ROLES[own],
                    excerpt(text.text),
                    text.role,
                    text.id[:200],
                )
            )
            if len(shown) == _SHOWN:
                return

    def result(self, name: str) -> TaskContamination:
        """What the task's matches add up to."""
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
    suite_fingerprint: str = "",
    sources: Sequence[str] | None = None,
    split: str = "train",
    encode: Encode | None = None,
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
    if training.pictures:
        logger.warning(
            "%s training pictures are not compared with the suite: only texts are; see the cleaning step near_pictures",
            f"{training.pictures:,}",
        )
    if training.pictures and not len(training.items):
        raise BadInputError(
            f"the examples of {', '.join(names)} in the split {split!r} are pictures alone, and only texts can be compared",
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
        suite_fingerprint=suite_fingerprint,
        sources=names,
        split=split,
        settings=config.model_dump(mode="json"),
        encoder=encoder,
        training={role: int(n) for role, n in zip(TRAINING_ROLES, training.roles.sum(axis=1).tolist(), strict=True)},
        texts=len(training.items),
        pictures=training.pictures,
        tasks=tuple(results),
        contaminated=len(removals),
        removals=removals,
    )


class _Removals:
    """The strongest match of each training text over all tasks, distractors left out."""

    def __init__(self, training: TrainingTexts) -> None:
        self.training = training
        self.found: dict[int, tuple[int, str, str]] = {}

    def add(self, task: str, best: npt.NDArray[np.uint8]) -> None:
        """Take in the matches of a task, [roles, n]."""
        for number, role in enumerate(ROLES):
            if role == "distractor":
                continue
            for place in np.flatnonzero(best[number] < len(KINDS)).tolist():
                kind = int(best[number, place])
                if place not in self.found or kind < self.found[place][0]:
                    self.found[place] = (kind, task, role)

    def result(self) -> tuple[Removal, ...]:
        """In the order of the store's items."""
        places = sorted(self.found)
        rows = self.training.items[np.asarray(places, dtype=np.int64)]
        ids = self.training.store.items["id"].take(rows).to_pylist()
        texts = self.training.store.texts(rows)
        return tuple(
            Removal(identity.hex(), KINDS[self.found[place][0]], *self.found[place][1:], excerpt(text))
            for place, identity, text in zip(places, ids, texts, strict=True)
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
