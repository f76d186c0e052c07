"""Steps that keep the first of examples whose texts are near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from nearfield.arrays import Rows
from nearfield.console import track
from nearfield.data.cleaning import NearDuplicateConfig, StepBase
from nearfield.data.near_duplicates import first_near_vector, representatives, unit

if TYPE_CHECKING:
    from nearfield.data.cleaning.run import Encoders, ExampleTable, Taken

_SIDES = {"example": ("query", "positives"), "query": ("query",), "positives": ("positives",)}


class DuplicateStep(StepBase):
    """The base of steps that keep the first of examples that say the same."""

    compare: Literal["example", "query", "positives"] = "example"
    """The texts that must be near-duplicates for two examples to be: all but the negatives, or those of one side."""
    keep: tuple[str, ...] = ()
    """Splits whose examples stay before those of others, e.g. ``[test, validation]``."""

    def in_order(self, table: ExampleTable, sources: Sequence[int]) -> Rows:
        """The examples of the sources in the order in which they stay: by split, those of ``keep`` first, then by row."""
        examples = table.of_sources(sources)
        if not self.keep:
            return examples
        rank = {split: number for number, split in enumerate(self.keep)}
        ranks = np.asarray(
            [rank.get(split, len(self.keep)) for split in table.split[examples].tolist()], dtype=np.int64
        )
        return examples[np.argsort(ranks, kind="stable")]

    def by_first_use(self, table: ExampleTable, examples: Rows) -> Rows:
        """The items that are compared, each once, in the order in which the examples first use them."""
        sides = _SIDES[self.compare]
        place = np.full(len(table), -1, dtype=np.int64)
        place[examples] = np.arange(len(examples))
        rows, when = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        if "query" in sides:
            rows.append(table.query[examples])
            when.append(2 * place[examples])
        if "positives" in sides:
            members = table.positives
            mine = np.flatnonzero(members.alive & (place[members.owners] >= 0))
            rows.append(members.rows[mine])
            when.append(2 * place[members.owners[mine]] + 1)
        every = np.concatenate(rows)
        every = every[np.argsort(np.concatenate(when), kind="stable")]
        _, first = np.unique(every, return_index=True)
        return every[np.sort(first)]

    def take_out_repeats(self, taken: Taken, examples: Rows, items: Rows, leaders: Rows, reason: str) -> None:
        """Keep the first example of those that are equal when each item is replaced by its leader.

        Labels and scores count, too, unless only one side is compared.
        """
        table, compare = taken.table, self.compare
        leader = dict(zip(items.tolist(), leaders.tolist(), strict=True))
        lists = table.positives.kept(len(table)) if compare != "query" else None
        labels, scores = table.label.to_pylist(), table.score.to_pylist()
        seen: dict[tuple[object, ...], int] = {}
        gone, like = [], []
        for example in examples.tolist():
            key: list[object] = []
            if compare != "positives":
                key.append(leader[int(table.query[example])])
            if lists is not None:
                key.append(tuple(sorted({leader[row] for row in lists[example].tolist()})))
            if compare == "example":
                key += [labels[example], scores[example]]
            elif compare == "positives" and not key[0]:
                # A labelled item has no positives that could be repeated.
                continue
            first = seen.setdefault(tuple(key), example)
            if first != example:
                gone.append(example)
                like.append(first)
        rows, firsts = np.asarray(gone, dtype=np.int64), np.asarray(like, dtype=np.int64)
        table.alive[rows] = False
        taken.reasons[reason] += len(rows)
        if compare == "positives" and lists is not None:
            texts, others = lists.take(rows).first(), lists.take(firsts).first()
        else:
            texts, others = table.query[rows], table.query[firsts]
        taken.write(rows, "example", [reason] * len(rows), texts, others)


class NearDuplicatesStep(NearDuplicateConfig, DuplicateStep):
    """Examples whose texts are near-duplicates, by their words, of an earlier example's, which stays.

    Found by MinHash and checked by :class:`NearDuplicateConfig`; texts with one normal form are near-duplicates,
    too. With ``words: false`` and ``normalised: false`` nothing is.
    """

    kind: Literal["near_duplicates"] = "near_duplicates"
    words: bool = True
    """Whether texts that share most of their words are near-duplicates."""
    normalised: bool = True
    """Whether texts with one normal form (letters and digits, case folded) are."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        if not (self.words or self.normalised):
            return
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        # An item with an image is like no other by its words alone.
        compared = np.flatnonzero(table.store.image_rows(items) < 0)
        texts = (part for _, part in track(table.texts(items[compared]), "Cleaning: near-duplicates by words"))
        rule = self if self.words else None
        leaders = items.copy()
        if len(compared):
            first = representatives(texts, rule, normalised=self.normalised)
            leaders[compared] = items[compared[first]]
        self.take_out_repeats(taken, examples, items, leaders, "near-duplicate by words")


class NearVectorsStep(DuplicateStep):
    """The same by embeddings: texts whose vectors have at least this cosine. Null takes nothing out."""

    kind: Literal["near_vectors"] = "near_vectors"
    model: str
    """A sentence-transformers model: a hub id, or a folder."""
    cosine: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """The least cosine of near-duplicates; raise it where different texts are found alike. Null takes nothing out."""
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter texts are no near-duplicates."""

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        from nearfield.files import hash_folder
        from nearfield.provenance import hub_commit

        if Path(self.model).is_dir():
            return {"model": hash_folder(Path(self.model))}
        commit = hub_commit(self.model, None)
        return {} if commit is None else {"model": commit}

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them."""
        if self.cosine is None:
            return
        encode = encoders(self.model)
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        places, vectors = [], []
        done = 0
        for rows, texts in track(table.texts(items), "Cleaning: near-duplicates by vectors"):
            seen = table.store.image_rows(rows) >= 0
            long = [p for p, text in enumerate(texts) if len(text.split()) >= self.min_words and not seen[p]]
            if long:
                vectors.append(unit(encode([texts[place] for place in long])))
                places.append(np.asarray(long, dtype=np.int64) + done)
            done += len(rows)
        leaders = items.copy()
        if vectors:
            compared = np.concatenate(places)
            first = first_near_vector(np.concatenate(vectors), self.cosine)
            leaders[compared] = items[compared[first]]
        self.take_out_repeats(taken, examples, items, leaders, "near-duplicate by vectors")
