"""The plan file: one epoch's batches as Parquet, to be read, plotted, diffed and followed.

With it come its figures: who is in it, what was left out and how hard its batches are; and how two plans differ.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nearfield.arrays import Floats, Mask, Ragged, Rows
from nearfield.batching.assign import count_conflicts, find_conflicts
from nearfield.batching.planner import EpochBatches, VectorsOf
from nearfield.batching.streams import PlannedRows, known_of
from nearfield.errors import BadInputError
from nearfield.files import Sealed, atomic_path, hash_file
from nearfield.provenance import generator

VERSION = 3
_METADATA_KEY = b"nearfield.plan"

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("slot", pa.int32()),
        ("example", pa.int64()),
        ("query", pa.int64()),
        ("positives", pa.large_list(pa.int64())),
        ("negatives", pa.large_list(pa.int64())),
        ("query_prompt", pa.int32()),
        ("document_prompt", pa.int32()),
        ("query_tokens", pa.int32()),
        ("document_tokens", pa.int32()),
        ("source", pa.int32()),
        ("stratum", pa.int32()),
    ]
)
OPTIONAL = pa.schema([("score", pa.float64()), ("label", pa.int32())])
"""Columns of plans whose examples have a score or a label; null where an example of such a plan has none."""

SEVERAL_SOURCES = -1
"""The source of a batch that has examples of several."""

Lengths = Callable[[int, Rows], Rows]
"""(prompt number, item rows) -> tokens of each."""
PromptsOf = Callable[[PlannedRows], tuple[Rows, Rows]]
"""Rows -> the (query, document) prompt numbers of each."""


@dataclass(frozen=True)
class Batch:
    """One step of the plan: B examples with their items, as rows of the store."""

    example: Rows
    query: Rows
    positives: list[Rows]
    negatives: list[Rows]
    query_prompt: Rows
    document_prompt: Rows
    source: int
    """``SEVERAL_SOURCES`` where the examples have not one source; prompts are by row."""
    score: Floats | None = None
    """(B,) of graded pairs; not a number where an example has none. None where no example of the plan has one."""
    label: Rows | None = None
    """(B,) of labelled examples, -1 where an example has none: the same number is the same label of the same source."""
    sources: Rows | None = None
    """(B,) the source of each example, where they have several."""


def write_plan(
    path: Path,
    epoch: EpochBatches,
    prompts: Mapping[int, tuple[int, int]] | PromptsOf,
    lengths: Lengths,
    metadata: dict[str, Any],
    *,
    names: Mapping[int, str] | None = None,
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an epoch's plan and return its summary: see :func:`summarise`.

    ``prompts`` gives each source's (query, document) prompt numbers, or those of each row; ``names`` the sources' names;
    ``metadata`` names the inputs (seed, epoch, fingerprints); ``measured`` holds further figures of the batches.
    Both, and the summary, are kept in the file.
    """
    rows = epoch.rows
    if isinstance(prompts, Mapping):
        query_prompt, document_prompt = (_of_source(rows.source, prompts, side) for side in (0, 1))
    else:
        query_prompt, document_prompt = prompts(rows)
    query_tokens, document_tokens = count_tokens(rows, query_prompt, document_prompt, lengths)
    step = epoch.batch_of_rows()
    columns: dict[str, Any] = {
        "step": step,
        "slot": np.arange(len(rows)) - epoch.offsets[step],
        "example": rows.example,
        "query": rows.query,
        "positives": rows.positives.to_arrow(),
        "negatives": rows.negatives.to_arrow(),
        "query_prompt": query_prompt,
        "document_prompt": document_prompt,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
        "source": rows.source,
        "stratum": rows.stratum,
    }
    schema = SCHEMA
    if np.isfinite(rows.score).any():
        columns["score"] = pa.array(rows.score, pa.float64(), from_pandas=True)
        schema = schema.append(OPTIONAL.field("score"))
    if (rows.label >= 0).any():
        columns["label"] = pa.array(rows.label, pa.int32(), mask=rows.label < 0)
        schema = schema.append(OPTIONAL.field("label"))
    summary = summarise(epoch, query_tokens + document_tokens, names or {}) | (measured or {})
    metadata = {"version": VERSION, **metadata, "summary": summary}
    table = pa.table({name: _narrow(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    with atomic_path(path) as aside:
        pq.write_table(table, aside, compression="zstd")
    return {"epoch": metadata.get("epoch"), "file": path.name, "hash": hash_file(path), **summary}


def _of_source(source: Rows, prompts: Mapping[int, tuple[int, int]], side: int) -> Rows:
    table = np.full(max([*prompts, int(source.max(initial=-1))], default=-1) + 1, -1, dtype=np.int64)
    for number, pair in prompts.items():
        table[number] = pair[side]
    return table[source]


def _narrow(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values.astype(kind.to_pandas_dtype(), copy=False))


def count_tokens(rows: PlannedRows, query_prompt: Rows, document_prompt: Rows, lengths: Lengths) -> tuple[Rows, Rows]:
    """Tokens of each row's query, and of all its documents together."""
    queries, documents = np.zeros(len(rows), dtype=np.int64), rows.documents()
    for prompt in np.unique(query_prompt).tolist():
        mine = query_prompt == prompt
        queries[mine] = lengths(prompt, rows.query[mine])
    each = np.zeros(len(documents.values), dtype=np.int64)
    prompt_of = np.repeat(document_prompt, documents.lengths)
    for prompt in np.unique(prompt_of).tolist():
        mine = prompt_of == prompt
        each[mine] = lengths(prompt, documents.values[mine])
    return queries, Ragged(documents.offsets, each).sums()


class Plan:
    """An opened plan of one epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mend = "Plan again: `nearfield plan RECIPE` replaces a plan that is damaged."
        sealed = Sealed(path.parent, mend)
        if path.name in sealed.files:
            sealed.file(path.name, whole=True)
        try:
            table = pq.read_table(path, memory_map=True)
        except FileNotFoundError as error:
            raise BadInputError(
                "this plan does not exist", where=str(path), hint="Run `nearfield plan RECIPE`."
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"this is not a readable plan: {error}", where=str(path), hint=mend) from error
        raw = (table.schema.metadata or {}).get(_METADATA_KEY)
        missing = [name for name in SCHEMA.names if name not in table.schema.names]
        if raw is None or missing:
            detail = f"the columns {', '.join(missing)} are missing" if missing else "its metadata is missing"
            raise BadInputError(f"this Parquet file is not a plan: {detail}", where=str(path), hint=mend)
        self.metadata: dict[str, Any] = json.loads(raw)
        if self.metadata["version"] != VERSION:
            raise BadInputError(
                f"this plan has version {self.metadata['version']}; {VERSION} is wanted",
                where=str(path),
                hint="Plan again: `nearfield plan RECIPE`.",
            )
        # One chunk a column, so that a batch is a slice of an array wherever it is.
        self.table = table.combine_chunks()
        steps = self.table["step"].to_numpy()
        if len(steps) and (np.diff(steps) < 0).any():
            raise BadInputError("the steps of this plan are not in order", where=str(path))
        self._starts = np.searchsorted(steps, np.arange(int(steps[-1]) + 2)) if len(steps) else np.zeros(1, np.int64)
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._starts) - 1

    def column(self, name: str) -> Rows:
        """A column of numbers as an array, shape (rows,)."""
        if name not in self._columns:
            values = self.table[name]
            if name == "label":
                values = values.fill_null(-1)
            kind = np.float64 if name == "score" else np.int64
            self._columns[name] = values.to_numpy().astype(kind)
        column: Rows = self._columns[name]
        return column

    def lists(self, name: str) -> Ragged:
        """The column ``positives`` or ``negatives``."""
        if name not in self._columns:
            self._columns[name] = Ragged.from_arrow(self.table[name])
        lists: Ragged = self._columns[name]
        return lists

    def batch(self, step: int) -> Batch:
        """The batch of one step, in time that does not depend on the step."""
        start, stop = int(self._starts[step]), int(self._starts[step + 1])

        def column(name: str) -> Rows:
            return self.column(name)[start:stop]

        def lists(name: str) -> list[Rows]:
            return [self.lists(name)[row] for row in range(start, stop)]

        source = column("source")
        several = bool((source != source[0]).any())
        has = self.table.schema.names
        return Batch(
            example=column("example"),
            query=column("query"),
            positives=lists("positives"),
            negatives=lists("negatives"),
            query_prompt=column("query_prompt"),
            document_prompt=column("document_prompt"),
            source=SEVERAL_SOURCES if several else int(source[0]),
            score=self.column("score").astype(np.float64)[start:stop] if "score" in has else None,
            label=column("label") if "label" in has else None,
            sources=source if several else None,
        )

    def sources(self) -> Rows:
        """(steps,) the source of each batch, ``SEVERAL_SOURCES`` where it has several."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        source, starts = self.column("source"), self._starts[:-1]
        least, most = np.minimum.reduceat(source, starts), np.maximum.reduceat(source, starts)
        sources: Rows = np.where(least == most, least, SEVERAL_SOURCES)
        return sources

    def epoch(self) -> EpochBatches:
        """The rows of the plan as a planner made them."""
        has = self.table.schema.names
        rows = PlannedRows.of(
            self.column("source"),
            self.column("example"),
            self.column("query"),
            self.lists("positives"),
            self.lists("negatives"),
            stratum=self.column("stratum"),
            score=self.column("score").astype(np.float64) if "score" in has else None,
            label=self.column("label") if "label" in has else None,
        )
        return EpochBatches(rows, self._starts.astype(np.int64))

    def tokens(self) -> Rows:
        """Real tokens of each step, shape (steps,)."""
        total = self.column("query_tokens") + self.column("document_tokens")
        sums: Rows = np.add.reduceat(total, self._starts[:-1]) if len(self) else np.zeros(0, np.int64)
        return sums


def total_steps(plans: Sequence[Plan], max_steps: int | None) -> int:
    """Steps of a run over these epochs, at most ``max_steps``."""
    steps = sum(len(plan) for plan in plans)
    return steps if max_steps is None else min(steps, max_steps)


def plan_files(path: Path) -> list[Path]:
    """The plan files, one an epoch, of a file, a ``plan`` folder or a run's folder."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise BadInputError("there is no plan", where=str(path), hint="Name a run's folder, its plan folder or a file.")
    files = sorted(path.glob("epoch-*.parquet")) or sorted((path / "plan").glob("epoch-*.parquet"))
    if not files:
        raise BadInputError(
            "this folder has no plan: neither epoch-*.parquet nor plan/epoch-*.parquet",
            where=str(path),
            hint="Write one: nearfield plan RECIPE.",
        )
    return files


SEVERAL = "several sources"


def summarise(epoch: EpochBatches, tokens: Rows, names: Mapping[int, str]) -> dict[str, Any]:
    """Batches, rows and tokens, in all and a source, what was dropped and why, and what the planner found.

    ``tokens`` are those of each row. A batch that has examples of several sources counts as such.
    """
    rows, offsets = epoch.rows, epoch.offsets

    def named(source: int) -> str:
        return names.get(source, str(source))

    by_source: dict[str, int] = {}
    if len(epoch):
        first = rows.source[offsets[:-1]]
        least, most = np.minimum.reduceat(rows.source, offsets[:-1]), np.maximum.reduceat(rows.source, offsets[:-1])
        one = least == most
        for source, count in zip(*np.unique(first[one], return_counts=True), strict=True):
            by_source[named(int(source))] = int(count)
        if not one.all():
            by_source[SEVERAL] = int((~one).sum())
    numbers, counts = np.unique(rows.source, return_counts=True)
    sums = [int(tokens[rows.source == number].sum()) for number in numbers]
    sizes = np.unique(epoch.sizes, return_counts=True)
    return {
        "batches": len(epoch),
        "rows": len(rows),
        "tokens": int(tokens.sum()),
        "batches_by_source": by_source,
        "rows_by_source": {named(int(n)): int(count) for n, count in zip(numbers, counts, strict=True)},
        "tokens_by_source": {named(int(n)): total for n, total in zip(numbers, sums, strict=True)},
        "batch_sizes": {str(int(size)): int(count) for size, count in zip(*sizes, strict=True)},
        "dropped": dict(sorted(epoch.dropped.items())),
        "planner": epoch.details,
    }


def count_exceptions(epoch: EpochBatches, known: Ragged | None, apart: bool = False) -> dict[str, int]:
    """How often, in the planned batches, what planners forbid by default is the case: an item that stands twice, an item
    that is a known positive of another query, a label that stands twice. Sources that are ``apart`` do not meet."""
    batch = epoch.batch_of_rows()
    if apart:
        batch = batch * (int(epoch.rows.source.max(initial=0)) + 1) + epoch.rows.source
    repeated, met = count_conflicts(find_conflicts(epoch.rows, distinct=True, known=None), batch)[0], 0
    if known is not None:
        met = count_conflicts(find_conflicts(epoch.rows, distinct=False, known=known), batch)[1]
    labelled = epoch.rows.label >= 0
    pairs = np.stack([batch[labelled], epoch.rows.label[labelled]])
    same = int(labelled.sum()) - np.unique(pairs, axis=1).shape[1]
    return {"repeated_items": repeated, "known_positives": met, "repeated_labels": same}


def positives_as_negatives(epoch: EpochBatches, known: Ragged) -> int:
    """Explicit negatives that are known positives of their own query."""
    negatives, query = epoch.rows.negatives, epoch.rows.query
    queries = np.unique(query)
    known_positives = known_of(known, queries)
    span = int(max(known.values.max(initial=0), negatives.values.max(initial=0))) + 1
    positives = queries[known_positives.owners()] * span + known_positives.values
    return int(np.isin(query[negatives.owners()] * span + negatives.values, positives).sum())


def measure_hardness(
    epoch: EpochBatches, vectors: VectorsOf, seed: int, *, batches: int = 64, rows: int = 256
) -> dict[str, Any]:
    """How hard batches are by a teacher, and how many of their negatives it takes for positives, beside random batches.

    Up to ``batches`` batches are drawn, and up to ``rows`` rows of each. In each the query of a row meets the first
    positive of every other row. ``similarity`` is the mean over these pairs of the teacher's similarity;
    ``false_negatives`` the share of them that score above the query's own positive. The random batches have as many rows
    of the same sources, drawn from the whole epoch. An interval is plus and minus 1.96 standard errors over batches.
    """
    random = generator(seed, "plan", "measure")
    usable = epoch.rows.positives.lengths > 0
    chosen = np.sort(random.permutation(len(epoch))[:batches])
    documents = epoch.rows.positives.first()
    by_source = {int(s): np.flatnonzero((epoch.rows.source == s) & usable) for s in np.unique(epoch.rows.source)}
    measured: dict[str, list[tuple[float, float, int]]] = {"planned": [], "random": []}
    for number in chosen.tolist():
        inside = np.arange(epoch.offsets[number], epoch.offsets[number + 1])
        inside = np.sort(random.permutation(inside[usable[inside]])[:rows])
        if len(inside) < 2:
            continue
        others = [
            random.choice(by_source[int(source)], size=int(count), replace=False)
            for source, count in zip(*np.unique(epoch.rows.source[inside], return_counts=True), strict=True)
        ]
        for name, which in (("planned", inside), ("random", np.concatenate(others))):
            measured[name].append(_pairs(epoch.rows.query[which], documents[which], vectors))
    if not measured["planned"]:
        return {}
    result: dict[str, Any] = {
        "batches": len(measured["planned"]),
        "pairs": sum(pairs for _, _, pairs in measured["planned"]),
    }
    for name, values in measured.items():
        for place, what in enumerate(("similarity", "false_negatives")):
            mean, margin = _mean([value[place] for value in values], [value[2] for value in values])
            result[f"{name}_{what}"] = round(mean, 6)
            result[f"{name}_{what}_margin"] = None if margin is None else round(margin, 6)
    return {"hardness": result}


def _pairs(queries: Rows, documents: Rows, vectors: VectorsOf) -> tuple[float, float, int]:
    """(similarity, share of false negatives, pairs) of queries with the documents of the other rows.

    Documents that are the query's own are no negatives of it.
    """
    left, right = vectors("query", queries).astype(np.float64), vectors("document", documents).astype(np.float64)
    scores = left @ right.T
    positive_scores = np.diagonal(scores)
    other: Mask = (documents[None, :] != documents[:, None]) & (documents[None, :] != queries[:, None])
    count = int(other.sum())
    if not count:
        return 0.0, 0.0, 0
    return float(scores[other].mean()), float((scores > positive_scores[:, None])[other].mean()), count


def _mean(values: list[float], weights: list[int]) -> tuple[float, float | None]:
    """The mean over pairs, and 1.96 standard errors over batches, which are taken as independent."""
    numbers, share = np.asarray(values), np.asarray(weights, dtype=np.float64)
    share /= max(share.sum(), 1.0)
    mean = float((numbers * share).sum())
    if len(numbers) < 2:
        return mean, None
    spread = float(np.sqrt(((share * (numbers - mean)) ** 2).sum() * len(numbers) / (len(numbers) - 1)))
    return mean, 1.96 * spread


FIGURES = ("batches", "rows", "tokens")
HARDNESS = ("planned_similarity", "random_similarity", "planned_false_negatives", "random_false_negatives")


@dataclass(frozen=True)
class PlanDifference:
    """The comparison of two plans."""

    identical: bool
    """Whether every step has the same examples in the same order."""
    steps: tuple[int, int]
    same_step: int
    """Steps that have the same examples, in any order, in both."""
    shared_batches: int
    """Batches of the first whose examples are a batch of the second, in whatever step."""
    examples: tuple[int, int]
    in_both: int
    moved: int
    """Examples in both plans whose step is another one."""
    pairs: tuple[int, int]
    """Pairs of examples that meet in a batch."""
    shared_pairs: int
    figures: list[tuple[str, float | None, float | None]]
    """Numbers of both summaries side by side."""
    settings: list[tuple[str, Any, Any]]
    """Settings and inputs that differ."""

    @property
    def overlap(self) -> float:
        """Pairs that meet in both plans, as a share of those that meet in either (Jaccard)."""
        either = self.pairs[0] + self.pairs[1] - self.shared_pairs
        return self.shared_pairs / either if either else 1.0

    @property
    def smallest_share(self) -> float:
        """Pairs that meet in both, as a share of those of the plan that has fewer."""
        return self.shared_pairs / max(1, min(self.pairs))


def compare_plans(first: Plan, second: Plan) -> PlanDifference:
    """Compare two plans over the same data; examples are told apart by their row in the store.

    Of an example that comes several times in an epoch, the first time counts.
    """
    plans = (first, second)
    batch, example = [plan.column("step") for plan in plans], [plan.column("example") for plan in plans]
    identical = all(
        np.array_equal(first.column(name), second.column(name)) for name in ("step", "example", "query")
    ) and all(
        np.array_equal(first.lists(name).values, second.lists(name).values) for name in ("positives", "negatives")
    )
    sets = [
        [frozenset(example[i][start:stop].tolist()) for start, stop in _edges(batch[i], len(plans[i]))] for i in (0, 1)
    ]
    known = set(sets[1])
    both, left, right = np.intersect1d(example[0], example[1], return_indices=True)
    shared = _shared_pairs(batch[0][left], batch[1][right])
    return PlanDifference(
        identical=identical,
        steps=(len(first), len(second)),
        same_step=sum(one == other for one, other in zip(*sets, strict=False)),
        shared_batches=sum(one in known for one in sets[0]),
        examples=(len(np.unique(example[0])), len(np.unique(example[1]))),
        in_both=len(both),
        moved=int((batch[0][left] != batch[1][right]).sum()),
        pairs=(_count_pairs(batch[0]), _count_pairs(batch[1])),
        shared_pairs=shared,
        figures=_figures(first.metadata["summary"], second.metadata["summary"]),
        settings=_settings(first.metadata, second.metadata),
    )


def _edges(steps: Rows, count: int) -> list[tuple[int, int]]:
    edges = np.searchsorted(steps, np.arange(count + 1)).tolist()
    return list(itertools.pairwise(edges))


def _count_pairs(batch: Rows) -> int:
    sizes = np.unique(batch, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def _shared_pairs(one: Rows, other: Rows) -> int:
    """Pairs of examples that are in one batch in both: those of each cell of the table of batches against batches."""
    cells = np.unique(np.stack([one, other]), axis=1, return_counts=True)[1]
    return int((cells * (cells - 1) // 2).sum())


def _figures(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    figures: list[tuple[str, float | None, float | None]] = [(name, one.get(name), other.get(name)) for name in FIGURES]
    for table in ("batches_by_source", "dropped", "exceptions"):
        names = sorted({*one.get(table, {}), *other.get(table, {})})
        title = table.replace("_", " ").replace("batches by source", "batches of")
        figures += [
            (f"{title}: {name.replace('_', ' ')}", one.get(table, {}).get(name, 0), other.get(table, {}).get(name, 0))
            for name in names
        ]
    hardness = one.get("hardness", {}), other.get("hardness", {})
    if any(hardness):
        figures += [(name.replace("_", " "), hardness[0].get(name), hardness[1].get(name)) for name in HARDNESS]
    return figures


def _settings(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The differences of the metadata, with nested keys joined by dots."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        parts = [flat(child, f"{name}.{key}" if name else str(key)) for key, child in value.items()]
        return {key: child for part in parts for key, child in part.items()}

    left, right = (flat({k: v for k, v in of.items() if k not in ("summary", "labels")}, "") for of in (one, other))
    return [
        (name, left.get(name), right.get(name)) for name in sorted({*left, *right}) if left.get(name) != right.get(name)
    ]
