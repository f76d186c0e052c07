"""The section on the data: what went into the store, what was set aside, what was said twice, what contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfield.reporting import text
from nearfield.reporting.run import AbsentError, Json, Missing, listing, load_object, mapping, part, real, string, total

EXAMPLES = 10
"""Quarantined rows and conflicts that are shown, at most."""


@dataclass(frozen=True)
class Quarantine:
    """Rows set aside: how many of how many, by reason, and the first ones as (where, reason, excerpt)."""

    sentence: str
    reasons: list[tuple[str, str]]
    examples: list[tuple[str, str, str]]


@dataclass(frozen=True)
class SourceTable:
    """The store's sources; the last columns, from ``numeric_from`` on, are counts."""

    heads: list[str]
    rows: list[list[str]]
    numeric_from: int


@dataclass(frozen=True)
class Conflict:
    """A few contradictions, each as pairs of a name and a text."""

    title: str
    examples: list[list[tuple[str, str]]]


@dataclass(frozen=True)
class Data:
    """The section."""

    facts: list[tuple[str, str]]
    sources: SourceTable
    quarantine: Quarantine | Missing
    findings: list[str]
    conflicts: list[Conflict]


def build_data(store: Path | None) -> Data:
    """The section of a store folder (None: the manifest names none, or it is gone)."""
    if store is None:
        raise AbsentError("The data store that this run was made from is not at hand, so its summary cannot be shown.")
    summary = load_object(store / "summary.json", "The data store has no summary.json.")
    sources = [mapping(one) for one in listing(summary.get("sources"))]
    facts = [(label, words) for label, words in (
        ("store", string(summary.get("name"))),
        ("fingerprint", string(summary.get("fingerprint"))),
        ("items", _count(summary.get("items"))),
        ("examples", _count(summary.get("examples"))),
    ) if words is not None]  # fmt: skip
    return Data(
        facts=facts,
        sources=_source_table(sources),
        quarantine=part("the quarantine", lambda: _quarantine(store, sources)),
        findings=_findings(summary, sources),
        conflicts=_conflicts(mapping(summary.get("conflicts"))),
    )


def _count(value: object) -> str | None:
    number = real(value)
    return None if number is None else text.count(number)


def _source_table(sources: Sequence[Json]) -> SourceTable:
    splits = list(dict.fromkeys(split for source in sources for split in mapping(source.get("splits"))))
    counted = ["rows", "examples", "duplicates", "groups", "clusters"]
    rows = []
    for source in sources:
        of_split = mapping(source.get("splits"))
        row = [string(source.get(name)) or "–" for name in ("name", "kind", "task_type")]
        row += [_count(source.get(name)) or "–" for name in counted]
        rows.append(row + [_count(of_split.get(split)) or "0" for split in splits])
    return SourceTable(["source", "examples are", "task type", "rows read", *counted[1:], *splits], rows, 3)


def _quarantine(store: Path, sources: Sequence[Json]) -> Quarantine:
    reasons: dict[str, float] = {}
    for source in sources:
        for reason, value in mapping(source.get("quarantined")).items():
            reasons[reason] = reasons.get(reason, 0.0) + (real(value) or 0.0)
    bad, read = sum(reasons.values()), total(source.get("rows") for source in sources)
    if bad:
        sentence = f"{text.count(bad)} of {text.count(read)} rows ({text.percent(bad, read)}) cannot be used and are kept in quarantine.jsonl."
    else:
        sentence = f"All {text.count(read)} rows that were read can be used."
    counted = [(reason, text.count(value)) for reason, value in sorted(reasons.items(), key=lambda item: -item[1])]
    return Quarantine(sentence, counted, _first_rows(store / "quarantine.jsonl"))


def _first_rows(path: Path) -> list[tuple[str, str, str]]:
    """The first rows of the quarantine as (file and line, reason, excerpt); empty where there is no file."""
    rows: list[tuple[str, str, str]] = []
    if not path.is_file():
        return rows
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = mapping(json.loads(line))
            except (ValueError, RecursionError):
                continue
            place = f"{Path(string(row.get('file')) or '?').name}:{string(row.get('line')) or '?'}"
            excerpt = row.get("excerpt")
            shown = excerpt if isinstance(excerpt, str) else json.dumps(excerpt, ensure_ascii=False)
            rows.append((place, string(row.get("reason")) or "?", shown))
            if len(rows) == EXAMPLES:
                break
    return rows


def _findings(summary: Json, sources: Sequence[Json]) -> list[str]:
    findings = []
    if any("duplicates" in source for source in sources):
        duplicates = total(source.get("duplicates") for source in sources)
        read = total(source.get("rows") for source in sources)
        findings.append(
            f"{text.count(duplicates)} rows ({text.percent(duplicates, read)}) say the same as an earlier row and were merged with it."
            if duplicates
            else "No row says the same as another."
        )
    conflicts = mapping(summary.get("conflicts"))
    found = [
        (
            real(conflicts.get("positive_and_negative")),
            "pairs of a query and a text are called positive and negative; the positive counts",
        ),
        (real(conflicts.get("labels")), "items bear more than one label"),
        (real(conflicts.get("scores")), "pairs have more than one score"),
    ]
    findings += [f"{text.count(value)} {words}." for value, words in found if value]
    if conflicts and not any(value for value, _ in found):
        findings.append("No two statements of the data contradict each other.")
    shared = {pair: real(value) or 0.0 for pair, value in mapping(summary.get("shared_between_splits")).items()}
    findings += [
        f"{text.count(value)} items are in examples of two splits: {pair.replace('+', ' and ')}."
        for pair, value in shared.items()
        if value
    ]
    return findings


def _conflicts(conflicts: Json) -> list[Conflict]:
    examples = [
        [(name, string(value) or text.plain(value)) for name, value in mapping(one).items()]
        for one in listing(conflicts.get("first"))
    ]
    return [Conflict("The first contradictions", examples[:EXAMPLES])] if examples else []
