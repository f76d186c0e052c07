"""Infers what the columns of a file mean, and writes the recipes of a project for one's own data.

Columns are told by their names and by what they hold. A project is a data recipe, a suite of its held-out split and a
training recipe.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from nearfield.config import dump_yaml
from nearfield.data.build import components
from nearfield.data.config import (
    DuplicateGroups,
    ExamplesBase,
    GradedExamples,
    HashSplit,
    LabelledExamples,
    RetrievalExamples,
    SourceConfig,
    TaskType,
)
from nearfield.data.items import Example, identity, read_example
from nearfield.data.readers import (
    TABLE_SUFFIXES,
    BadRowError,
    CsvReader,
    HubReader,
    JsonlReader,
    ParquetReader,
    ReaderBase,
)
from nearfield.errors import BadInputError
from nearfield.files import write_text
from nearfield.shipped import refuse, target_in

_FIRST_ROWS = 1000
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
_GIANT = 0.2
"""A group with more than this share of the rows makes fair splits impossible."""
_SCALES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))

_NAMES: dict[str, tuple[str, ...]] = {
    "query": ("query", "queries", "question", "anchor", "search", "searchquery", "q"),
    "positive": (
        *("positive", "positives", "pos", "answer", "answers", "document", "doc", "passage", "response", "context"),
        *("positivepassage", "positivepassages", "positivedocument", "relevant", "gloss"),
    ),
    "negative": ("negative", "negatives", "neg", "negs", "hardnegative", "hardnegatives", "negativepassages"),
    "first": ("sentence1", "text1", "first", "sentencea", "texta", "premise", "question1", "s1"),
    "second": ("sentence2", "text2", "second", "sentenceb", "textb", "hypothesis", "question2", "s2"),
    "score": ("score", "similarity", "similarityscore", "sim", "rating", "grade", "relevance", "relatedness"),
    "label": ("label", "labels", "category", "class", "topic", "intent", "section", "target", "labeltext"),
    "text": ("text", "sentence", "content", "body", "utterance", "review", "item", "document", "title"),
}


@dataclass(frozen=True)
class ColumnSummary:
    """A column as the first rows show it."""

    name: str
    texts: bool
    """Strings, or lists of strings."""
    numbers: bool
    """Finite numbers, or strings that read as such."""
    distinct: int
    filled: int
    mean_length: float
    """Characters of a text."""


@dataclass(frozen=True)
class InferredSource:
    """A source for a file, with what was seen on the way."""

    path: Path
    source: SourceConfig
    rows: int
    bad_rows: int
    groups: int
    largest_group: int
    common_text: int
    """Rows that the most common query or positive is in."""
    common_negative: int
    """Rows that the most common negative is in."""
    examples: tuple[Example, ...]
    """The first five."""
    notes: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> dict[str, str | tuple[str, ...]]:
        """Role -> column(s), e.g. ``{"query": "question", "positives": "answer"}``."""
        settings = self.source.examples.model_dump(exclude={"kind", "scale"}, exclude_none=True)
        return {role: tuple(c) if isinstance(c, list) else c for role, c in settings.items()}


def infer_source(path: str | Path, name: str | None = None) -> InferredSource:
    """Infer how a data file (JSONL, CSV, TSV, Parquet, or a data set on disk) is to be read.

    The file is read once whole: to find groups of rows that share a text, which must stay on one side of a split.
    Raises BadInputError where the file cannot be read or its columns cannot be told apart.
    """
    path = Path(path).expanduser().resolve()
    reader = _reader_for(path)
    rows = [row.values for row in islice(reader.build().rows(()), _FIRST_ROWS) if row.values is not None]
    if not rows:
        raise BadInputError("there is no usable row in this file", where=str(path))
    columns = _summarise_columns(rows)
    examples, task_type = _decide(columns, path)
    source = SourceConfig(
        name=name or safe_name(path),
        task_type=task_type,
        reader=reader,
        examples=examples,
        group=DuplicateGroups(),
        split=HashSplit(fractions=FRACTIONS),
    )
    return _survey(path, source)


def safe_name(path: Path) -> str:
    """A file's name without suffixes, in letters, digits, '.', '_' and '-'."""
    stem = path.name
    for suffix in sorted(TABLE_SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60] or "data"


def _reader_for(path: Path) -> ReaderBase:
    if not path.exists():
        raise BadInputError("this file does not exist", where=str(path))
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return HubReader(path=path)
        hint = "Give a file, or a folder written by save_to_disk."
        raise BadInputError("this folder is not a Hugging Face data set", where=str(path), hint=hint)
    for reader in (JsonlReader, CsvReader, ParquetReader):
        if path.name.endswith(reader.suffixes):
            return reader(path=path)
    hint = "Known are .jsonl, .csv, .tsv (also .gz, .xz, .zst) and .parquet."
    raise BadInputError("the name of this file does not say what it is", where=str(path), hint=hint)


def _summarise_columns(rows: Sequence[Mapping[str, object]]) -> list[ColumnSummary]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def _column(name: str, values: Sequence[object]) -> ColumnSummary:
    filled = [value for value in values if value is not None and value != "" and value != []]
    texts = [text for value in filled for text in (value if isinstance(value, list | tuple) else [value])]
    strings = [text for text in texts if isinstance(text, str)]
    return ColumnSummary(
        name=name,
        texts=bool(filled) and len(strings) == len(texts) > 0,
        numbers=bool(filled) and all(_is_number(value) for value in filled),
        distinct=len({str(value) for value in filled}),
        filled=len(filled),
        mean_length=sum(map(len, strings)) / max(len(strings), 1),
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _named(columns: Sequence[ColumnSummary], role: str) -> list[str]:
    """The columns with a name of a role, the best known name first; a number at the end does not count for negatives."""

    def key(column: ColumnSummary) -> str:
        plain = re.sub(r"[^a-z0-9]", "", column.name.lower())
        return re.sub(r"\d+$", "", plain) if role == "negative" else plain

    known = _NAMES[role]
    return [c.name for c in sorted((c for c in columns if key(c) in known), key=lambda c: known.index(key(c)))]


def _decide(columns: list[ColumnSummary], path: Path) -> tuple[ExamplesBase, TaskType]:
    texts = [c for c in columns if c.texts and not c.numbers]
    numbers = [c for c in columns if c.numbers]
    negatives = _named(texts, "negative")
    others = [c for c in texts if c.name not in negatives]
    first, second = _pair(others)
    # A score is a column of numbers with such a name; 0 and 1 in a "label" of two texts grade them, too.
    score = _named(numbers, "score") or (_named(numbers, "label") if second else [])
    if first and second and score and not negatives:
        return GradedExamples(first=first, second=second, score=score[0]), "STS"
    labels = [name for name in _named(columns, "label") if name not in (first, second)]
    explicit = bool(_named(others, "query") and _named(others, "positive"))
    if labels and first and second and not explicit and not negatives and _repeats(columns, labels[0]):
        raise _unclear(path, columns, f"two texts and the label {labels[0]!r} can mean several things")
    if first and second and not (labels and not explicit):
        return RetrievalExamples(query=first, positives=second, negatives=tuple(negatives) or None), "Retrieval"
    items = _named(others, "text") or [c.name for c in sorted(others, key=lambda c: -c.mean_length)]
    items = [name for name in items if name not in labels]
    labels = labels or [c.name for c in columns if c.name not in items and _few(c)]
    if items and labels:
        return LabelledExamples(item=items[0], label=labels[0]), "Classification"
    raise _unclear(path, columns, "the columns do not tell the query, the positives, a score or a label apart")


def _pair(texts: list[ColumnSummary]) -> tuple[str | None, str | None]:
    """The two columns of a pair: by their names, or by what they hold, where two columns of free text are left."""
    for one, other in (("query", "positive"), ("first", "second")):
        names = _named(texts, one), _named(texts, other)
        if names[0] and names[1] and names[0][0] != names[1][0]:
            return names[0][0], names[1][0]
    for role in ("query", "positive", "first", "second"):
        named = _named(texts, role)
        rest = [c for c in texts if c.name not in named[:1] and not _few(c) and not _named([c], "label")]
        if named and len(rest) == 1:
            pair = (named[0], rest[0].name)
            return pair if role in ("query", "first") else (pair[1], pair[0])
    free = [c for c in texts if not _few(c) and not _named([c], "label")]
    if len(free) == 2:
        query, positive = sorted(free, key=lambda c: c.mean_length)
        return query.name, positive.name
    return None, None


def _few(column: ColumnSummary) -> bool:
    """Whether the column has few values that repeat, as labels do."""
    return column.filled >= 4 and column.distinct <= max(2, column.filled // 4) and column.mean_length <= 60


def _repeats(columns: list[ColumnSummary], name: str) -> bool:
    return any(c.name == name and c.distinct < c.filled for c in columns)


def _unclear(path: Path, columns: list[ColumnSummary], what: str) -> BadInputError:
    names = ", ".join(repr(column.name) for column in columns[:30])
    hint = (
        f"Columns here: {names}. Rename them (query, positive, negative; sentence1, sentence2, score; text, label), or "
        "write a data recipe by hand, like those in data_recipes/."
    )
    return BadInputError(what, where=str(path), hint=hint)


class _Groups:
    """Groups of rows that share a text: with (tight) and without (loose) the ties by a shared negative."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._queries = array("q")
        self._loose = array("q")
        self._by_negative = array("q")
        self._used: Counter[int] = Counter()
        self._avoided: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._queries)

    def add(self, example: Example) -> None:
        """Take in the texts of a row."""
        query, *others = (
            self._numbers.setdefault(identity(item), len(self._numbers))
            for item in (example.query, *example.positives, *example.negatives)
        )
        positives, negatives = others[: len(example.positives)], others[len(example.positives) :]
        self._queries.append(query)
        self._used.update({query, *positives})
        self._avoided.update(negatives)
        for ties, members in ((self._loose, positives), (self._by_negative, negatives)):
            for member in members:
                ties.extend((query, member))

    def sizes(self, by_negative: bool) -> tuple[int, int]:
        """The number of groups, and the rows in the largest."""
        ties = [np.asarray(self._loose, dtype=np.int64), np.asarray(self._by_negative, dtype=np.int64)]
        edges = np.concatenate(ties if by_negative else ties[:1]).reshape(-1, 2)
        counts = np.bincount(components(edges, len(self._numbers))[np.asarray(self._queries, dtype=np.int64)])
        return int(np.count_nonzero(counts)), int(counts.max(initial=0))

    @property
    def common_text(self) -> int:
        """Rows that the most common query or positive is in."""
        return max(self._used.values())

    @property
    def common_negative(self) -> int:
        """Rows that the most common negative is in."""
        return max(self._avoided.values(), default=0)


def _survey(path: Path, source: SourceConfig) -> InferredSource:
    """Read the whole file: count rows, find the range of scores and the groups with and without negatives."""
    groups = _Groups()
    examples: list[Example] = []
    scores: list[float] = []
    rows = bad = 0
    for row in source.reader.build().rows(source.columns()):
        rows += 1
        try:
            if row.values is None:
                raise BadRowError(row.reason)
            example = read_example(source, row.values, 1_000_000)
        except BadRowError:
            bad += 1
            continue
        if len(examples) < 5:
            examples.append(example)
        if example.score is not None:
            scores.append(example.score)
        groups.add(example)
    if not len(groups):
        raise BadInputError("no row of this file can be used", where=str(path), hint="Check its columns.")
    notes: list[str] = []
    if bad:
        notes.append(f"{bad:,} of {rows:,} rows cannot be used; the build writes them to quarantine.jsonl")
    count, largest = groups.sizes(by_negative=True)
    changes: dict[str, object] = {}
    giant = _GIANT * len(groups) if len(groups) >= 10 else math.inf
    if largest > giant and groups.sizes(by_negative=False)[1] < largest:
        count, largest = groups.sizes(by_negative=False)
        changes["group"] = DuplicateGroups(negatives=False)
        notes.append(
            "many rows share their negatives, so rows that share only a negative may be in different splits "
            "(group: {kind: duplicates, negatives: false})"
        )
    if largest > giant:
        notes.append(
            f"one group of rows that share texts holds {largest:,} of {len(groups):,} rows; splits will be uneven"
        )
    if count * FRACTIONS["test"] < 50:
        notes.append(
            f"the test split will hold about {count * FRACTIONS['test']:.0f} groups; its scores will be uncertain"
        )
    if scores and isinstance(source.examples, GradedExamples):
        changes["examples"] = source.examples.model_copy(update={"scale": _scale(scores)})
    return InferredSource(
        path=path,
        source=source.model_copy(update=changes),
        rows=rows,
        bad_rows=bad,
        groups=count,
        largest_group=largest,
        common_text=groups.common_text,
        common_negative=groups.common_negative,
        examples=tuple(examples),
        notes=tuple(notes),
    )


def _scale(scores: Sequence[float]) -> tuple[float, float] | None:
    low, high = min(scores), max(scores)
    for scale in _SCALES:
        if scale[0] <= low and high <= scale[1]:
            return scale
    return (low, high) if low < high else None


_HEAD = "# Written by `nearfield init --data`. Check the columns and the split before you train.\n"


@dataclass(frozen=True)
class Project:
    """The files of a project, relative to its folder."""

    name: str
    data: str
    suite: str
    recipe: str


def write_project(inferred: InferredSource, folder: Path, force: bool = False) -> Project:
    """Write the files for an inferred source; nothing is written if one would replace a file that differs, unless ``force``."""
    name = inferred.source.name
    files = {f"data_recipes/{name}.yaml": data_recipe(inferred, folder / "data_recipes")}
    files[f"eval/suites/{name}.yaml"] = suite(name)
    recipe = f"training/recipes/{name}.yaml"
    files[recipe] = training_recipe(inferred)
    texts = {file: _HEAD + dump_yaml(value, width=110) for file, value in files.items()}
    differ = [
        file
        for file, text in texts.items()
        if target_in(folder, file).exists() and target_in(folder, file).read_bytes() != text.encode()
    ]
    if differ and not force:
        refuse(folder, differ)
    for file, text in texts.items():
        write_text(target_in(folder, file), text)
    return Project(name, f"data_recipes/{name}.yaml", f"eval/suites/{name}.yaml", recipe)


def data_recipe(inferred: InferredSource, folder: Path) -> dict[str, object]:
    """The data recipe as YAML values; the path of the data is relative where it lies in the project."""
    source = inferred.source.model_dump(mode="json", exclude_none=True)
    if not source["steps"]:
        del source["steps"]
    project = folder.parent.resolve()
    if inferred.path.is_relative_to(project):
        source["reader"]["path"] = Path(os.path.relpath(inferred.path, folder.resolve())).as_posix()
    if not source["prompts"]:
        source["prompts"] = {"query": None, "document": None}
    return {"name": inferred.source.name, "max_bad_rows": 0.01, "sources": [source]}


def suite(name: str) -> dict[str, object]:
    """The suite: the held-out split of the source."""
    task = {
        "kind": "heldout",
        "name": task_name(name),
        "data": f"../../data_recipes/{name}.yaml",
        "source": name,
        "split": "test",
    }
    return {"name": name, "tasks": [task]}


def task_name(name: str) -> str:
    """``my-data`` as ``MyData``, the form that names of tasks have."""
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", name) if part]
    return "".join(part[:1].upper() + part[1:] for part in parts) or "Data"


OBJECTIVES: dict[str, dict[str, object]] = {
    "retrieval": {"kind": "infonce", "temperature": 0.05},
    "graded": {"kind": "cosent", "temperature": 0.05},
    "labelled": {"kind": "supcon", "temperature": 0.1},
}
"""The objective for each kind of examples."""


def training_recipe(inferred: InferredSource) -> dict[str, object]:
    """A recipe that fits the rows: at least four steps an epoch, at most 64 examples a step.

    An item stands in a batch once. Where a negative is in so many rows that few batches could be filled, the recipe leaves
    the explicit negatives out; where a query or a positive is, it lets items repeat in a batch.
    """
    size = 64
    while size > 2 and size * 4 > inferred.rows * FRACTIONS["train"]:
        size //= 2
    batches: dict[str, object] = {"kind": "single_source", "batch_size": size}
    batches["negatives"] = int(0 < inferred.common_negative * size <= inferred.rows * FRACTIONS["train"])
    if inferred.common_text * size > inferred.rows * FRACTIONS["train"]:
        batches["duplicates"] = "allow"
    return {
        "name": inferred.source.name,
        "seed": 0,
        "data": f"../../data_recipes/{inferred.source.name}.yaml",
        "encoder": {"model": "sentence-transformers/all-MiniLM-L6-v2"},
        "objective": OBJECTIVES[inferred.source.examples.form],
        "batches": batches,
        "training": {"epochs": 1, "max_length": 128, "learning_rate": 2.0e-5},
        "evaluation": {"suite": f"../../eval/suites/{inferred.source.name}.yaml"},
        "decontaminate": {"matches": "report"},
    }
