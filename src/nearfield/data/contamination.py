"""The report of a decontamination: for each task, the texts that training shares with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nearfield.data.cleaning import NearDuplicateConfig
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, fingerprint, read_json, write_json

REPORT_VERSION = 2
KINDS = ("exact", "normalised", "ngram", "minhash", "embedding")
"""The ways in which a training text matches a benchmark text, the strongest first. A text counts once, under the strongest."""
ROLES = ("query", "document", "distractor", "text")
"""The roles of a benchmark text: a query, a document that is relevant for one, any other document of a corpus, or a text of a
task without such sides (pairs, labelled items, clustering, bitext)."""
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
    cosine: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Texts match whose embeddings have at least this cosine, where an encoder is given."""


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
        if not self.images:
            del values["images"]
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
        result = (
            "none of their texts was found"
            if not hit
            else "matches in "
            + ", ".join(f"{t.task} ({t.contaminated:,} of {t.texts:,} texts)" for t in hit)
            + f"; {self.contaminated:,} training texts match"
        )
        rest = f"; not read: {', '.join(unread)}" if unread else ""
        return (
            f"{self.texts:,} training texts compared with {len(self.tasks) - len(unread)} tasks of the suite "
            f"{self.suite} ({kinds}): {result}{rest}"
        )

    @property
    def unseen(self) -> str:
        """One sentence on what the comparison cannot find."""
        least, ngram = (int(self.settings.get(name, standard)) for name, standard in (("min_words", 4), ("ngram", 13)))
        longer = 100 / float(self.settings.get("contained", 0.75)) - 100
        return (
            f"This comparison does not see a text of {min(least, ngram - 1)} to {ngram - 1} words inside one that is longer by "
            f"over {longer:.0f} %: neither a short benchmark text in a long training text nor the other way round"
        )

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
    """The statement of a card that holds the lines of :meth:`ContaminationReport.lines`; None where nothing was compared."""
    summary = _SUMMARY.search(card)
    if summary is None:
        return None
    tasks = next((line.removeprefix(COMPARED) for line in card.splitlines() if line.startswith(COMPARED)), "")
    result = summary["found"].partition("; not read: ")[0]
    matched = {task: int(count.replace(",", "")) for task, count in _MATCH.findall(result)}
    return ContaminationStatement(frozenset(filter(None, tasks.removesuffix(".").split(", "))), matched)


_SUMMARY = re.compile(
    r"^[\d,]+ training texts compared with \d+ tasks of the suite .+? \(.+?\): (?P<found>.+)$", re.MULTILINE
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
