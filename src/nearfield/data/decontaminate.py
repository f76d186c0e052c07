"""Decontamination: training texts against the texts of benchmarks, and the report of what they share, task by task.

The training side is indexed once and held in memory, the texts of each task stream by. Held for each training text: its words
as hashes (24 bytes a word) and in their order (17 bytes a word), the word sequences (24 bytes each), 700 bytes of MinHash and, with an encoder, its vector.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nearfield.arrays import Floats, Index, Ragged, Rows, Vectors, concatenate
from nearfield.config import ConfigPath
from nearfield.console import track
from nearfield.data.cleaning import NearDuplicateConfig
from nearfield.data.containment import ContainmentIndex
from nearfield.data.items import canonical_text
from nearfield.data.near_duplicates import (
    EmbedTexts,
    Hashes,
    NearIndex,
    TextSets,
    WordHashes,
    hash_normal_forms,
    hash_texts,
    hash_words,
    near_vectors,
    pieces,
    sequences,
    unit,
)
from nearfield.data.readers import excerpt
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, fingerprint, read_json, write_json

if TYPE_CHECKING:
    from nearfield.data.store import Store


REPORT_VERSION = 2
KINDS = ("exact", "normalised", "ngram", "minhash", "contained", "embedding")
"""The ways in which a training text matches a benchmark text, the strongest first. A text counts once, under the strongest."""
ROLES = ("query", "document", "distractor", "text")
"""The roles of a benchmark text: a query, a document that is relevant for one, any other document of a corpus, or a text of a
task without such sides (pairs, labelled items, clustering, bitext)."""
UNSEEN = (
    "Words show copies, not meanings: of texts of 6 to 12 words inside longer ones 98 in 100 are found, of those of 8 to 12 words "
    "with one word changed 76, of shorter ones fewer; of paraphrases 12 to 28, of translations none"
)
"""As measured: results/decontamination/figures.json."""
SECTION = "## Benchmark texts in the training data"
"""The heading of a model card above all that is said of them."""
_NOT_COMPARED = "training texts were not compared"
COMPARED = "Compared with the texts of: "
"""The beginning of the sentence of a model card that names the tasks."""
TRAINING_ROLES = ("query", "document", "negative")


class DecontaminationConfig(NearDuplicateConfig):
    """The rules by which two texts count as the same. Exact and normalised matches are always looked for."""

    ngram: Annotated[int, Field(ge=5)] = 13
    """Length of the word sequences that two texts may share."""
    ngram_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Texts match that share at least this much of the sequences of the one that has fewer."""
    common: Annotated[int, Field(ge=1)] = 1000
    """A sequence in more training texts than this is boilerplate and does not count."""
    inside: Annotated[float, Field(gt=0, le=1)] = 0.85
    """A text is inside a longer one if words that carry this share of its rarity stand there in order, in one place."""
    chance: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """And if they would be expected at fewer places of the training texts than this by chance."""
    cosine: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Texts match whose embeddings have at least this cosine, where an encoder is given."""


class DecontaminationStageConfig(DecontaminationConfig):
    """The comparison of a run's training texts with a suite, before the first batch is planned; the rules may be set too."""

    suite: ConfigPath | None = None
    """A suite file, or a folder of local tasks; null takes the evaluation's."""
    matches: Literal["report", "leave_out"] = "report"
    """``report`` trains on texts that match and says so; ``leave_out`` trains without them: an example goes with its query or
    its last positive, a negative goes alone."""
    encoder: str | None = None
    """A model whose vectors are compared as well; it encodes all texts of both sides."""

    @property
    def rules(self) -> DecontaminationConfig:
        """The rules alone."""
        return DecontaminationConfig(**{name: getattr(self, name) for name in DecontaminationConfig.model_fields})


@dataclass(frozen=True)
class MatchExample:
    """A pair of texts that match, cut for the eye."""

    kind: str
    similarity: float
    """1 for equal texts; share of word sequences; Jaccard similarity of the words; cosine."""
    training: str
    training_role: str
    benchmark: str
    benchmark_role: str
    benchmark_id: str


@dataclass(frozen=True)
class TaskContamination:
    """The matches of one task, all its evaluated splits and subsets together."""

    task: str
    benchmark: Mapping[str, int]
    """Benchmark texts by role."""
    training: Mapping[str, int] = field(default_factory=dict)
    """Training texts that match one, by the strongest kind; distractors count."""
    matched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Benchmark texts that match a training text: role -> strongest kind -> texts."""
    sides: Mapping[str, int] = field(default_factory=dict)
    """Training texts by the two sides of a match, e.g. ``query/document``: training role, then benchmark role."""
    any_ngram: int = 0
    """Training texts with at least one word sequence in common with the task, however small its share."""
    examples: tuple[MatchExample, ...] = ()
    problem: str | None = None
    """Why the task could not be read; nothing is known of it then."""

    @property
    def contaminated(self) -> int:
        """Benchmark texts that match, distractors left out."""
        return sum(sum(kinds.values()) for role, kinds in self.matched.items() if role != "distractor")

    @property
    def texts(self) -> int:
        """Benchmark texts, distractors left out."""
        return sum(count for role, count in self.benchmark.items() if role != "distractor")


@dataclass(frozen=True)
class Removal:
    """A training text that should go, and why."""

    id: str
    """The item's id, 32 hex digits."""
    kind: str
    task: str
    role: str
    """The role of the benchmark text."""
    text: str


@dataclass(frozen=True)
class ContaminationReport:
    """The training texts of a store against the texts of a suite."""

    data: str
    """Fingerprint of the store."""
    suite: str
    sources: tuple[str, ...]
    split: str
    settings: Mapping[str, Any]
    encoder: str | None
    training: Mapping[str, int]
    """Training texts by role; a text in two roles counts in both."""
    texts: int
    """Different training texts."""
    tasks: tuple[TaskContamination, ...]
    contaminated: int
    """Training texts that match a benchmark text that is no distractor."""
    left_out: bool = False
    """Whether the training texts that match a benchmark text that is no distractor were left out of training."""
    images: int = 0
    """Training images without a text, which were not compared with anything."""
    suite_fingerprint: str = ""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """The rest that the report depends on: the way of comparing, the model of the embeddings, versions."""
    removals: tuple[Removal, ...] = ()
    """Training texts that match a benchmark text that is no distractor. Not part of the JSON: see :meth:`save_removals`."""

    def to_json(self) -> dict[str, Any]:
        """All but the list of removals, whose length it has."""
        values = dataclasses.asdict(dataclasses.replace(self, removals=()))
        del values["removals"]
        for name in ("images", "left_out"):
            if not values[name]:
                del values[name]
        return {"version": REPORT_VERSION, **values}

    def save(self, path: Path) -> None:
        """Write the report as JSON, with its checksum."""
        values = self.to_json()
        write_json(path, {**values, "sum": fingerprint(values)})

    def save_removals(self, path: Path) -> None:
        """Write the texts to remove as JSONL, for the cleaning step ``removal_list``."""
        with atomic_path(path) as aside, aside.open("w", encoding="utf-8") as file:
            for removal in self.removals:
                file.write(json.dumps(dataclasses.asdict(removal), ensure_ascii=True) + "\n")

    def line(self) -> str:
        """One sentence for a model card."""
        unread = [task.task for task in self.tasks if task.problem is not None]
        hit = [task for task in self.tasks if task.contaminated]
        kinds = "exact, normalised, word-sequence and near-duplicate matches" + (
            f", and by embeddings of {self.encoder}" if self.encoder else ""
        )
        if not hit:
            result = "none of their texts was found"
        elif self.left_out:
            result = (
                f"none of their texts is in what was trained on: {self.contaminated:,} training texts that match texts of "
                f"{' and '.join(task.task for task in hit)} were left out"
            )
        else:
            matches = ", ".join(f"{task.task} ({task.contaminated:,} of {task.texts:,} texts)" for task in hit)
            result = f"matches in {matches}; {self.contaminated:,} training texts match"
        rest = f"; not read: {', '.join(unread)}" if unread else ""
        return (
            f"{self.texts:,} training texts compared with {len(self.tasks) - len(unread)} tasks of the suite "
            f"{self.suite} ({kinds}): {result}{rest}"
        )

    @property
    def unseen(self) -> str:
        """One sentence on what the comparison finds in part, and not at all."""
        return UNSEEN

    def lines(self) -> list[str]:
        """The same with a table of the tasks that have matches, in Markdown, and what cannot be found."""
        hit = [task for task in self.tasks if task.matched]
        read = [task.task for task in self.tasks if task.problem is None]
        lines = [f"{self.line()}.", *(["", f"{COMPARED}{', '.join(read)}."] if read else [])]
        lines += ["", f"{self.unseen}."]
        if hit:
            kinds = " | ".join(KINDS)
            lines += ["", f"| task | texts | {kinds} | distractors that match |", "| --- " * (len(KINDS) + 3) + "|"]
        for task in hit:
            counts = [
                sum(matched.get(kind, 0) for role, matched in task.matched.items() if role != "distractor")
                for kind in KINDS
            ]
            rest = sum(task.matched.get("distractor", {}).values())
            cells = " | ".join(f"{count:,}" for count in [task.texts, *counts, rest])
            lines.append(f"| {task.task} | {cells} |")
        return lines


@dataclass(frozen=True)
class ContaminationStatement:
    """Lines of a model card on benchmark texts in the training data."""

    tasks: frozenset[str]
    """Tasks whose texts were compared."""
    matched: Mapping[str, int]
    """Task -> its texts that the training data hold."""


def read_statement(card: str) -> ContaminationStatement | None:
    """The statement of a card that holds the lines of :meth:`ContaminationReport.lines`; None where nothing was compared.

    Of several reports in its section, as of several sets of training data, each must have compared a task.
    """
    section = re.split(r"^## ", card.partition(SECTION)[2], maxsplit=1, flags=re.MULTILINE)[0]
    summaries = list(_SUMMARY.finditer(section))
    if not summaries or _NOT_COMPARED in section or any(int(one["texts"].replace(",", "")) == 0 for one in summaries):
        return None
    lists = [line.removeprefix(COMPARED) for line in section.splitlines() if line.startswith(COMPARED)]
    tasks = [frozenset(filter(None, line.removesuffix(".").split(", "))) for line in lists]
    matched: dict[str, int] = {}
    for summary in summaries:
        for task, count in _MATCH.findall(summary["found"].partition("; not read: ")[0]):
            matched[task] = max(matched.get(task, 0), int(count.replace(",", "")))
    every = frozenset.intersection(*tasks) if len(tasks) == len(summaries) else frozenset()
    return ContaminationStatement(every, matched)


_SUMMARY = re.compile(
    r"^(?P<texts>[\d,]+) training texts compared with \d+ tasks of the suite .+? \(.+?\): (?P<found>.+)$", re.MULTILINE
)
_MATCH = re.compile(r"(?:matches in |, )(\S+) \(([\d,]+) of [\d,]+ texts\)")


def read_report(path: Path) -> ContaminationReport:
    """A report that :meth:`ContaminationReport.save` wrote."""
    values = read_json(path, "contamination report")
    if isinstance(values, dict) and values.pop("sum", None) not in (None, fingerprint(values)):
        hint = "Compare again: nearfield data decontaminate."
        raise BadInputError("this contamination report is damaged", where=str(path), hint=hint)
    if not isinstance(values, dict) or values.pop("version", None) != REPORT_VERSION:
        raise BadInputError("this is not a contamination report of this version", where=str(path), hint="Run it again.")
    tasks = tuple(
        TaskContamination(**{**task, "examples": tuple(MatchExample(**e) for e in task["examples"])})
        for task in values.pop("tasks")
    )
    values["sources"] = tuple(values["sources"])
    return ContaminationReport(**values, tasks=tasks)


VERSION = 3
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
        parts = [Ragged.empty(0, np.uint64)]
        vectors: list[Vectors] = []
        for texts in batches:
            split = hash_words(texts, self.known)
            parts.append(split)
            sets.append(TextSets.of(texts, self.known, split))
            grams.append(sequences(split, config.ngram).distinct())
            exact.append(hash_texts([canonical_text(text) for text in texts]))
            normal.append(hash_normal_forms(texts))
            if encode is not None:
                vectors.append(unit(encode(texts)))
        self.near = NearIndex(TextSets.join(sets), config)
        self.inside = ContainmentIndex(concatenate(parts), config)
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
        matches["contained"] = Matches(*self.inside.matches(split))
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
    """One of :data:`nearfield.data.decontaminate.ROLES`."""
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
    every task, whatever the sides: equal, equal after normalisation, by shared word sequences, one inside the other, by near-duplicates of words
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
