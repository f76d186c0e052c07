"""What a build did, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfield.files import read_json


@dataclass(frozen=True)
class SourceSummary:
    """The counts of one source."""

    name: str
    kind: str
    task_type: str
    rows: int
    """Rows read, usable or not."""
    examples: int
    """Examples in the store."""
    duplicates: int
    """Rows that say the same as an earlier row, and are left out."""
    quarantined: Mapping[str, int]
    """Rows that could not be used, by reason."""
    splits: Mapping[str, int]
    """Examples by split."""
    groups: int
    clusters: int


@dataclass(frozen=True)
class StepSummary:
    """What a cleaning step took out."""

    number: int
    """In the order in which steps run, from 1."""
    kind: str
    source: str | None
    """The source whose step it is; None for a step over all sources."""
    before: Mapping[str, int]
    """Examples by source, of the sources that the step looks at."""
    after: Mapping[str, int]
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Examples that went, by reason, the most frequent first."""
    positives: int = 0
    """Positives taken out of examples that stay."""
    negatives: int = 0


@dataclass(frozen=True)
class Conflicts:
    """Statements of the data that contradict each other."""

    positive_and_negative: int = 0
    """Pairs of a query and a text that is both its positive and its negative; the negative was taken out."""
    examples_changed: int = 0
    """Examples that lost a negative so."""
    labels: int = 0
    """Items with more than one label in a source (not counted for multilabel sources)."""
    scores: int = 0
    """Pairs with more than one score in a source, in either order."""
    first: tuple[Mapping[str, str], ...] = ()
    """A few of them, to look at."""


@dataclass(frozen=True)
class DataSummary:
    """What is in a store, and what its build met."""

    path: Path
    name: str
    fingerprint: str
    items: int
    examples: int
    sources: tuple[SourceSummary, ...]
    conflicts: Conflicts
    shared_between_splits: Mapping[str, int] = field(default_factory=dict)
    """Items that are in examples of two splits, by pair of splits, e.g. ``test+train``. Negatives do not count."""
    steps: tuple[StepSummary, ...] = ()
    """What the cleaning steps took out, in their order."""
    reused: bool = False
    """Whether the store was there already."""

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``: all but where the store lies."""
        values = dataclasses.asdict(self)
        del values["path"], values["reused"]
        if not self.steps:
            del values["steps"]
        return values


def read_summary(store: Path) -> DataSummary:
    """The summary of a store that was built before."""
    values = read_json(store / "summary.json", "store")
    sources = tuple(SourceSummary(**source) for source in values.pop("sources"))
    conflicts = values.pop("conflicts")
    conflicts = Conflicts(**{**conflicts, "first": tuple(conflicts["first"])})
    steps = tuple(StepSummary(**step) for step in values.pop("steps", ()))
    return DataSummary(path=store, sources=sources, conflicts=conflicts, steps=steps, reused=True, **values)
