"""What the columns of a file mean, guessed from their names and from what they hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from nearfield.data.config import (
    DuplicateGroups,
    ExamplesConfig,
    GradedExamples,
    HashSplit,
    LabelledExamples,
    RetrievalExamples,
    SourceConfig,
    TaskType,
)
from nearfield.data.examples import BadRowError, Example, identity, read_example
from nearfield.data.readers import delimited, jsonl, parquet
from nearfield.data.text_readers import CsvReader, HubReader, JsonlReader, ParquetReader
from nearfield.errors import BadInputError

LOOK_AT_ROWS = 1000
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
class Column:
    """What the first rows say about a column."""

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
class Guess:
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


def guess_columns(path: str | Path, name: str | None = None) -> Guess:
    """Guess how a data file (JSONL, CSV, TSV, Parquet, or a data set on disk) is to be read.

    The file is read once whole: to find groups of rows that share a text, which must stay on one side of a split.
    Raises BadInputError where the file cannot be read or its columns cannot be told apart.
    """
    path = Path(path).expanduser().resolve()
    reader = _reader_for(path)
    rows = [row.values for row in islice(reader.build().rows(()), LOOK_AT_ROWS) if row.values is not None]
    if not rows:
        raise BadInputError("there is no usable row in this file", where=str(path))
    columns = _look(rows)
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
    for suffix in sorted((*jsonl.SUFFIXES, *delimited.SUFFIXES, *parquet.SUFFIXES), key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:60] or "data"


def _reader_for(path: Path) -> JsonlReader | CsvReader | ParquetReader | HubReader:
    if not path.exists():
        raise BadInputError("this file does not exist", where=str(path))
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return HubReader(path=path)
        hint = "Give a file, or a folder written by save_to_disk."
        raise BadInputError("this folder is no Hugging Face data set", where=str(path), hint=hint)
    if path.name.endswith(jsonl.SUFFIXES):
        return JsonlReader(path=path)
    if path.name.endswith(delimited.SUFFIXES):
        return CsvReader(path=path)
    if path.name.endswith(parquet.SUFFIXES):
        return ParquetReader(path=path)
    hint = "Known are .jsonl, .csv, .tsv (also .gz, .xz, .zst) and .parquet."
    raise BadInputError("the name of this file does not say what it is", where=str(path), hint=hint)


def _look(rows: Sequence[Mapping[str, object]]) -> list[Column]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def _column(name: str, values: Sequence[object]) -> Column:
    filled = [value for value in values if value is not None and value != "" and value != []]
    texts = [text for value in filled for text in (value if isinstance(value, list | tuple) else [value])]
    strings = [text for text in texts if isinstance(text, str)]
    return Column(
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


def _named(columns: Sequence[Column], role: str) -> list[str]:
    """The columns with a name of a role, the best known name first; a number at the end does not count for negatives."""

    def key(column: Column) -> str:
        plain = re.sub(r"[^a-z0-9]", "", column.name.lower())
        return re.sub(r"\d+$", "", plain) if role == "negative" else plain

    known = _NAMES[role]
    return [c.name for c in sorted((c for c in columns if key(c) in known), key=lambda c: known.index(key(c)))]


def _decide(columns: list[Column], path: Path) -> tuple[ExamplesConfig, TaskType]:
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
    raise _unclear(path, columns, "the columns do not say what is a query, a positive, a score or a label")


def _pair(texts: list[Column]) -> tuple[str | None, str | None]:
    """The two columns of a pair: by their names, or by what they hold, where two columns of free text are left."""
    for one, other in (("query", "positive"), ("first", "second")):
        names = _named(texts, one), _named(texts, other)
        if names[0] and names[1] and names[0][0] != names[1][0]:
            return names[0][0], names[1][0]
    for role in ("query", "positive", "first", "second"):
        named = _named(texts, role)
        rest = [c for c in texts if c.name not in named[:1] and not _few(c) and not _named([c], "label")]
        if named and len(rest) == 1:
            found = (named[0], rest[0].name)
            return found if role in ("query", "first") else (found[1], found[0])
    free = [c for c in texts if not _few(c) and not _named([c], "label")]
    if len(free) == 2:
        query, positive = sorted(free, key=lambda c: c.mean_length)
        return query.name, positive.name
    return None, None


def _few(column: Column) -> bool:
    """Whether the column has few values that repeat, as labels do."""
    return column.filled >= 4 and column.distinct <= max(2, column.filled // 4) and column.mean_length <= 60


def _repeats(columns: list[Column], name: str) -> bool:
    return any(c.name == name and c.distinct < c.filled for c in columns)


def _unclear(path: Path, columns: list[Column], what: str) -> BadInputError:
    names = ", ".join(repr(column.name) for column in columns[:30])
    hint = (
        f"Columns here: {names}. Rename them (query, positive, negative; sentence1, sentence2, score; text, label), or "
        "write a data recipe by hand, like those in data_recipes/."
    )
    return BadInputError(what, where=str(path), hint=hint)


def _survey(path: Path, source: SourceConfig) -> Guess:
    """Read the whole file: count rows, find the range of scores and the groups with and without negatives."""
    tight, loose = _UnionFind(), _UnionFind()
    ends: list[bytes] = []
    examples: list[Example] = []
    scores: list[float] = []
    rows = bad = 0
    used: Counter[bytes] = Counter()
    avoided: Counter[bytes] = Counter()
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
        query = identity(example.query)
        positives = [identity(item) for item in example.positives]
        negatives = [identity(item) for item in example.negatives]
        ends.append(query)
        used.update({query, *positives})
        avoided.update(negatives)
        for positive in positives:
            tight.join(query, positive)
            loose.join(query, positive)
        for negative in negatives:
            tight.join(query, negative)
    if not ends:
        raise BadInputError("no row of this file can be used", where=str(path), hint="Check its columns.")
    notes: list[str] = []
    if bad:
        notes.append(f"{bad:,} of {rows:,} rows cannot be used; the build writes them to quarantine.jsonl")
    groups, largest = tight.sizes(ends)
    changes: dict[str, object] = {}
    if len(ends) >= 10 and largest > _GIANT * len(ends) and loose.sizes(ends)[1] < largest:
        groups, largest = loose.sizes(ends)
        changes["group"] = DuplicateGroups(negatives=False)
        notes.append("rows share so many negatives that a shared negative does not bind rows into a group")
    if len(ends) >= 10 and largest > _GIANT * len(ends):
        notes.append(
            f"one group of rows that share texts holds {largest:,} of {len(ends):,} rows; splits will be uneven"
        )
    if groups * FRACTIONS["test"] < 50:
        notes.append(
            f"the test split will hold about {groups * FRACTIONS['test']:.0f} groups; its scores will be uncertain"
        )
    if scores and isinstance(source.examples, GradedExamples):
        changes["examples"] = source.examples.model_copy(update={"scale": _scale(scores)})
    return Guess(
        path=path,
        source=source.model_copy(update=changes),
        rows=rows,
        bad_rows=bad,
        groups=groups,
        largest_group=largest,
        common_text=max(used.values()),
        common_negative=max(avoided.values(), default=0),
        examples=tuple(examples),
        notes=tuple(notes),
    )


def _scale(scores: Sequence[float]) -> tuple[float, float] | None:
    low, high = min(scores), max(scores)
    for scale in _SCALES:
        if scale[0] <= low and high <= scale[1]:
            return scale
    return (low, high) if low < high else None


class _UnionFind:
    """Groups of texts, by their ids."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}

    def find(self, member: bytes) -> bytes:
        parents = self._parents
        while (parent := parents.setdefault(member, member)) != member:
            parents[member] = parents[parent]
            member = parent
        return member

    def join(self, first: bytes, second: bytes) -> None:
        self._parents[self.find(first)] = self.find(second)

    def sizes(self, members: Sequence[bytes]) -> tuple[int, int]:
        """The number of groups among members, and the members in the largest."""
        counts: dict[bytes, int] = {}
        for member in members:
            root = self.find(member)
            counts[root] = counts.get(root, 0) + 1
        return len(counts), max(counts.values(), default=0)
