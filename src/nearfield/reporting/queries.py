"""Ten queries with their results before and after: the five largest gains and the five largest losses.

Scores a query and the first ten results come from the files beside the results; texts and the relevant documents from
the data store, where a document's id is the hash of its content. Tasks of other origin keep ids only, and the section
says so.

Images are shown without a network, and safe, since each is decoded and encoded anew.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nearfield.data.images import pillow, smaller
from nearfield.evaluation.results import TOP_SUFFIX, UNITS_SUFFIX, read_checked
from nearfield.reporting import text
from nearfield.reporting.comparison import metric_words
from nearfield.reporting.text import AbsentError, Json, Missing, logger, mapping, string

if TYPE_CHECKING:
    from PIL.Image import Image

    from nearfield.data.store import Store


EACH = 5
"""Gains shown, and losses shown, at most."""
SIDES = ("before", "after")


@dataclass(frozen=True)
class Result:
    """A document that was found; ``relevant`` is None where the judgements are not known."""

    rank: int
    document: str
    text: str
    score: str
    relevant: bool | None
    image: str | None = None
    """A data URI, where the document is an image or has one."""


@dataclass(frozen=True)
class Side:
    """One model's results for a query."""

    title: str
    about: str
    results: list[Result]


@dataclass(frozen=True)
class Query:
    """A query with both sides; ``wanted`` are texts of relevant documents that neither found."""

    text: str
    delta: str
    about: str
    sides: list[Side]
    wanted: list[str]
    image: str | None = None
    wanted_images: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QueryGroup:
    """The gains or the losses."""

    kind: str
    title: str
    queries: list[Query]


@dataclass(frozen=True)
class Queries:
    """The section; ``raw`` is what goes into the page's JSON."""

    summary: list[str]
    groups: list[QueryGroup]
    notes: list[str]
    raw: list[dict[str, object]]
    kind: ClassVar[str] = "queries"


@dataclass(frozen=True)
class Change:
    """The score of one query with both models."""

    task: str
    subset: str
    split: str
    query: str
    metric: str
    before: float
    after: float

    @property
    def delta(self) -> float:
        """How much better it is after."""
        return self.after - self.before

    @property
    def key(self) -> tuple[str, str, str]:
        """The query's name in the task's files."""
        return self.subset, self.split, self.query


@dataclass
class Texts:
    """Texts and relevant documents by id, from the stores at hand."""

    stores: list[Store] = field(default_factory=list)
    rows: dict[str, tuple[Store, int]] = field(default_factory=dict)

    def find(self, ids: Iterable[str]) -> None:
        """Look up which item of which store each id is; ids that are no item ids are left alone."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = {bytes.fromhex(one) for one in ids if len(one) == 32 and set(one) <= set("0123456789abcdef")}
        for store in self.stores:
            column = store.items.column("id")
            matches = pc.is_in(column, value_set=pa.array(sorted(wanted), column.type))
            for row in np.flatnonzero(matches.to_numpy()).tolist():
                self.rows.setdefault(column[row].as_py().hex(), (store, row))

    def text(self, one: str) -> str | None:
        """The text of an id."""
        if one not in self.rows:
            return None
        store, row = self.rows[one]
        return store.shown([row])[0]

    def image(self, one: str) -> str | None:
        """The image of an id as a data URI; None where it has none."""
        if one not in self.rows:
            return None
        store, row = self.rows[one]
        image = store.images([row])[0] if store.has_images else None
        return None if image is None else data_uri(image)

    def relevant(self, query: str) -> set[str] | None:
        """The ids of the documents that the data calls positives of a query; None where the query is not known."""
        if query not in self.rows:
            return None
        store, row = self.rows[query]
        ids = store.items.column("id")
        return {ids[int(document)].as_py().hex() for document in store.known_positives()[row]}


def result_folders(run: Path, manifest: Json | Missing) -> dict[str, Path]:
    """The results before and after training, as the manifest names them; only folders inside the run count."""
    named = (
        {}
        if isinstance(manifest, Missing)
        else mapping(mapping(mapping(manifest.get("stages")).get("evaluate")).get("results"))
    )
    home = run.resolve()
    folders = {
        side: (home / (string(named.get(side)) or ".")).resolve() for side in SIDES if "\0" not in str(named.get(side))
    }
    return {
        side: folder
        for side, folder in folders.items()
        if folder != home and folder.is_relative_to(home) and folder.is_dir()
    }


def build_queries(run: Path, manifest: Json | Missing, store: Path | None) -> Queries:
    """The section of a run folder, once it is known which results are before and after."""
    folders = result_folders(run, manifest)
    lacking = [side for side in SIDES if side not in folders]
    if lacking:
        raise AbsentError(f"The run has no results {' and '.join(lacking)} training, so queries cannot be compared.")
    names = [
        {file.name.removesuffix(TOP_SUFFIX) for file in folder.glob(f"*{TOP_SUFFIX}")}
        for folder in (folders[side] for side in SIDES)
    ]
    tasks = sorted(set.intersection(*names))
    if not tasks:
        raise AbsentError("No retrieval task was scored before and after, so there are no queries to show.")
    changes: list[Change] = []
    stores: set[str] = set()
    summary, notes = [], []
    for task in tasks:
        of_task, fingerprint = _changes(task, folders)
        if not of_task:
            notes.append(f"{task}: no score of a single query was kept by both models.")
            continue
        changes += of_task
        stores |= {fingerprint} if fingerprint else set()
        summary.append(_summary(task, of_task))
    gains, losses = pick(changes)
    tops = {
        (task, side): _top(folders[side], task, [c for c in gains + losses if c.task == task])
        for task in tasks
        for side in SIDES
    }
    texts = _texts(run, store, stores)
    texts.find(_ids(gains + losses, tops))
    shown = [(QueryGroup("gain", "Largest gains", []), gains), (QueryGroup("loss", "Largest losses", []), losses)]
    raw: list[dict[str, object]] = []
    for group, chosen in shown:
        for change in chosen:
            query, record = _query(change, tops, texts)
            group.queries.append(query)
            raw.append(record)
    if not gains and not losses:
        notes.append("No query's score changed.")
    if any(texts.relevant(change.query) is None for change in gains + losses):
        notes.append(
            "Texts and judgements are known for tasks made from a data store that is at hand; others show ids."
        )
    return Queries(summary, [group for group, _ in shown], notes, raw)


def pick(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """The largest gains and the largest losses, each at most ``EACH``; ties by task and query, so the choice is stable."""
    ordered = sorted(changes, key=lambda change: (-change.delta, change.task, change.key))
    gains = [change for change in ordered[:EACH] if change.delta > 0]
    ordered.sort(key=lambda change: (change.delta, change.task, change.key))
    return gains, [change for change in ordered[:EACH] if change.delta < 0]


def _changes(task: str, folders: dict[str, Path]) -> tuple[list[Change], str | None]:
    """The scores of a task's queries that both models have, and the fingerprint of the store that the task is from."""
    import pyarrow.compute as pc

    values: dict[str, dict[tuple[str, str, str], float]] = {}
    metric, fingerprint = "", None
    for side in SIDES:
        file = folders[side] / f"{task}{UNITS_SUFFIX}"
        if not file.is_file():
            return [], None
        table = read_checked(file)
        table = table.filter(pc.equal(table["unit"], "query"))
        metadata = mapping(json.loads((table.schema.metadata or {}).get(b"nearfield", b"{}")))
        metric = string(metadata.get("main_score")) or "ndcg_at_10"
        fingerprint = string(mapping(metadata.get("details")).get("store")) or fingerprint
        columns = [table[name].to_pylist() for name in ("subset", "split", "id", "metric", "value")]
        rows = zip(*columns, strict=True)
        values[side] = {(subset, split, one): value for subset, split, one, name, value in rows if name == metric}
    shared = sorted(values["before"].keys() & values["after"].keys())
    return [Change(task, *key, metric, values["before"][key], values["after"][key]) for key in shared], fingerprint


def _summary(task: str, changes: Sequence[Change]) -> str:
    up = sum(change.delta > 0 for change in changes)
    down = sum(change.delta < 0 for change in changes)
    return (
        f"{task}: of {text.count(len(changes))} queries, {text.count(up)} score higher after training, "
        f"{text.count(down)} lower and {text.count(len(changes) - up - down)} the same ({metric_words(changes[0].metric)} a query)."
    )


Top = dict[tuple[str, str, str], list[tuple[int, str, float]]]


def _top(folder: Path, task: str, changes: Sequence[Change]) -> Top:
    """The kept results of the chosen queries: (rank, document, score), by rank."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = {change.key for change in changes}
    if not wanted:
        return {}
    table = read_checked(folder / f"{task}{TOP_SUFFIX}")
    table = table.filter(pc.is_in(table["query_id"], pa.array(sorted({change.query for change in changes}))))
    results_of: Top = {}
    for row in table.to_pylist():
        key = (row.get("subset", ""), row.get("split", ""), row["query_id"])
        if key in wanted:
            results_of.setdefault(key, []).append((row["rank"], row["doc_id"], row["score"]))
    return {key: sorted(results) for key, results in results_of.items()}


def _texts(run: Path, store: Path | None, fingerprints: set[str]) -> Texts:
    """The run's store and those that the tasks were made from, as far as they are at hand."""
    from nearfield.data.store import Store
    from nearfield.errors import NearfieldError

    folders = [] if store is None else [store]
    plain = {one for one in fingerprints if one.isalnum()}
    homes = {run.parent / ".cache" / "data", *(folder.parent for folder in folders)}
    folders += [home / one for one in sorted(plain) for home in sorted(homes) if (home / one).is_dir()]
    texts = Texts()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        try:
            texts.stores.append(Store.open(folder))
        except (NearfieldError, KeyError, TypeError, ValueError) as error:
            logger.warning("report: the store %s cannot be opened: %s", folder, error)
    return texts


def _ids(changes: Sequence[Change], tops: dict[tuple[str, str], Top]) -> set[str]:
    ids = {change.query for change in changes}
    return ids | {document for top in tops.values() for results in top.values() for _, document, _ in results}


def _query(change: Change, tops: dict[tuple[str, str], Top], texts: Texts) -> tuple[Query, dict[str, object]]:
    relevant = texts.relevant(change.query)
    query = texts.text(change.query)
    sides, seen = [], set()
    first: dict[str, str] = {}
    results_json: dict[str, list[dict[str, object]]] = {}
    for side, value in zip(SIDES, (change.before, change.after), strict=True):
        hits = tops[change.task, side].get(change.key, [])
        results = []
        for rank, document, points in hits:
            known = texts.text(document)
            marked = None if relevant is None else document in relevant
            results.append(
                Result(
                    rank,
                    document,
                    document if known is None else known,
                    f"{points:.3f}".replace("-", "−"),
                    marked,
                    texts.image(document),
                )
            )
        seen |= {document for _, document, _ in hits}
        ranks = [result.rank for result in results if result.relevant]
        if relevant is not None:
            first[side] = f"rank {ranks[0]}" if ranks else "not found"
        sides.append(Side(side.capitalize(), f"{metric_words(change.metric)} {text.score(value)}", results))
        results_json[side] = [
            {"rank": r.rank, "id": r.document, "text": r.text, "relevant": r.relevant, "score": points}
            for r, (_, _, points) in zip(results, hits, strict=True)
        ]
    about = f"{metric_words(change.metric)} {text.score(change.before)} → {text.score(change.after)}"
    if first:
        about += f", first relevant: {first['before']} → {first['after']}"
    record: dict[str, object] = {
        "task": change.task,
        "subset": change.subset,
        "split": change.split,
        "id": change.query,
        "text": query,
        "metric": change.metric,
        "before": change.before,
        "after": change.after,
        "results": results_json,
    }
    unseen = sorted((relevant or set()) - seen)
    texts.find(unseen)
    wanted = [document for document in (texts.text(one) for one in unseen[:3]) if document is not None]
    found_one = any(result.relevant for side in sides for result in side.results)
    images = [image for image in (texts.image(one) for one in unseen[:3]) if image is not None]
    full = Query(
        text=change.query if query is None else query,
        delta=text.signed(change.delta),
        about=f"{about} · {change.task}",
        sides=sides,
        wanted=[] if found_one else wanted,
        image=texts.image(change.query),
        wanted_images=[] if found_one else images,
    )
    return full, record


SIDE = 56
"""Pixels of the longer side: ten queries with ten results on both sides stay below half a megabyte."""


def data_uri(image: Image) -> str:
    """An RGB image as a data URI of a small WebP."""
    target = io.BytesIO()
    flat = pillow().new("RGB", image.size)
    # Onto a new image: metadata does not travel.
    flat.paste(image)
    smaller(flat, SIDE).save(target, "WEBP", quality=70, method=4)
    return "data:image/webp;base64," + base64.b64encode(target.getvalue()).decode("ascii")
