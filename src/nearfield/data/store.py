"""The store: items and examples as Arrow files, memory-mapped. After it, everything speaks of row numbers."""

from __future__ import annotations

import dataclasses
import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nearfield.arrays import Ragged, Rows
from nearfield.data.config import Prompts
from nearfield.data.images import open_kept
from nearfield.errors import BadInputError
from nearfield.files import CheckedFile, Sealed, read_json

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("nearfield.data")

FORMAT_VERSION = 2
"""Raised when the files of a store change; 2 has 64-bit offsets everywhere."""
_MEND = "Run the same command again, or `nearfield data build RECIPE`: a store that is damaged is built anew."

ITEMS_SCHEMA = pa.schema(
    [pa.field("id", pa.binary(16), nullable=False), pa.field("text", pa.large_string(), nullable=False)]
)
IMAGE = pa.field("image", pa.int64())
"""The column of items that only stores of images have: a row of ``images.arrow``, or null."""
IMAGES_FILE = "images.arrow"
IMAGES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary(16), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
    ]
)
"""The images of a store, each once; a size is in pixels, as kept and as the file had it."""
EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int32(), nullable=False),
        pa.field("query", pa.int64(), nullable=False),
        pa.field("positives", pa.large_list(pa.int64()), nullable=False),
        pa.field("negatives", pa.large_list(pa.int64()), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("label", pa.large_string()),
        pa.field("group", pa.large_string(), nullable=False),
        pa.field("cluster", pa.large_string(), nullable=False),
        pa.field("split", pa.large_string(), nullable=False),
    ]
)
WEIGHT = pa.field("weight", pa.float64())
"""The column of examples that only stores have in which a source says what its examples count."""


@dataclass(frozen=True)
class SourceInfo:
    """A source as the store describes it."""

    name: str
    kind: str
    """``retrieval``, ``graded``, ``labelled`` or ``text``."""
    task_type: str
    prompts: Prompts


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
    """Rows equal to an earlier row, which are left out."""
    quarantined: Mapping[str, int]
    """Rows that could not be used, by reason."""
    splits: Mapping[str, int]
    """Examples by split."""
    groups: int
    clusters: int


@dataclass(frozen=True)
class StepSummary:
    """The examples and texts that a cleaning step took out, counted."""

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
class Contradictions:
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
    """The counts of a store and of its build."""

    path: Path
    name: str
    fingerprint: str
    items: int
    examples: int
    sources: tuple[SourceSummary, ...]
    conflicts: Contradictions
    shared_between_splits: Mapping[str, int] = field(default_factory=dict)
    """Items that are in examples of two splits, by pair of splits, e.g. ``test+train``. Negatives do not count."""
    steps: tuple[StepSummary, ...] = ()
    """The cleaning steps in their order, with what they took out."""
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
    conflicts = Contradictions(**{**conflicts, "first": tuple(conflicts["first"])})
    steps = tuple(StepSummary(**step) for step in values.pop("steps", ()))
    return DataSummary(path=store, sources=sources, conflicts=conflicts, steps=steps, reused=True, **values)


class Chunks:
    """A mapped column from which single rows are taken; no chunk is copied as a whole."""

    def __init__(self, column: pa.ChunkedArray, what: str, mapped: Mapped) -> None:
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._what, self._mapped = what, mapped

    def take(self, rows: Sequence[int] | Rows) -> list[Any]:
        """The values of rows, in the order asked for."""
        wanted = np.asarray(rows, dtype=np.int64).ravel()
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self._starts[-1]):
            raise IndexError(f"{self._what} rows must be in 0 to {self._starts[-1] - 1}")
        result: list[Any] = [None] * len(wanted)
        which = np.searchsorted(self._starts, wanted, side="right") - 1
        for chunk in np.unique(which).tolist():
            places = np.flatnonzero(which == chunk)
            self._mapped.check_values(self._chunks[chunk], wanted[places] - self._starts[chunk])
            taken = self._chunks[chunk].take(pa.array(wanted[places] - self._starts[chunk])).to_pylist()
            for place, value in zip(places.tolist(), taken, strict=True):
                result[place] = value
        return result


class Mapped:
    """An Arrow file in memory by a map, whose bytes are checked before they are read.

    All but the values of one column are checked when it is opened: they are small. Those are checked as they are asked for.
    """

    def __init__(self, path: Path, file: CheckedFile, lazy: str | None) -> None:
        self._file = file
        with path.open("rb") as stream:
            buffer = pa.py_buffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        self._base = buffer.address
        file.check(0, 1)
        self.table: pa.Table = pa.ipc.open_stream(buffer).read_all()
        chunks = [] if lazy is None else self.table.column(lazy).chunks
        # One without a byte lies nowhere in the file.
        values = [each for each in (chunk.buffers()[-1] for chunk in chunks) if each is not None and each.size]
        starts = np.array([each.address - self._base for each in values], dtype=np.int64)
        sizes = np.array([each.size for each in values], dtype=np.int64)
        file.check_outside(starts, starts + sizes)

    def check_values(self, chunk: pa.Array, rows: Rows) -> None:
        """Check the bytes of some values (strings or binaries) of a chunk of the lazy column."""
        ends, values = chunk.buffers()[-2:]
        if values is None or not values.size:
            return
        if ends is None or chunk.type not in (pa.large_string(), pa.large_binary()):
            self._file.check()
            return
        offsets = np.frombuffer(ends, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        start = values.address - self._base
        self._file.check_ranges(start + offsets[rows], start + offsets[rows + 1])


class Store:
    """An opened store. Nothing is read before it is asked for, and nothing unchecked where it has checksums."""

    def __init__(self, path: Path, name: str, fingerprint: str, sources: tuple[SourceInfo, ...]) -> None:
        self.path = path
        self._sealed = Sealed(path, _MEND)
        self.name = name
        self.fingerprint = fingerprint
        self.sources = sources

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store in a folder; raise :class:`BadInputError` where there is none or it is of another version."""
        path = Path(path)
        if not path.is_dir():
            raise BadInputError(
                "this store does not exist", where=str(path), hint="Build it: nearfield data build RECIPE."
            )
        sealed = Sealed(path, _MEND)
        if not sealed.known and (path / "store.json").is_file():
            logger.warning("%s has no checksums (an earlier version wrote it) and is read unchecked", path)
        elif sealed.known:
            sealed.file("store.json", whole=True)
        meta = read_json(path / "store.json", "store")
        version = meta.get("format_version") if isinstance(meta, dict) else None
        if version != FORMAT_VERSION:
            raise BadInputError(
                f"this store has format version {version}; {FORMAT_VERSION} is wanted",
                where=str(path),
                hint="Build it again: nearfield data build RECIPE.",
            )
        sources = tuple(
            SourceInfo(entry["name"], entry["kind"], entry["task_type"], Prompts(**entry["prompts"]))
            for entry in meta["sources"]
        )
        return cls(path, meta["name"], meta["fingerprint"], sources)

    @cached_property
    def items(self) -> pa.Table:
        """All items: ``id`` (16 bytes), ``text``, and in stores with images ``image``."""
        return self._items.table

    @cached_property
    def _items(self) -> Mapped:
        return self._map("items.arrow", "text")

    @cached_property
    def examples(self) -> pa.Table:
        """All examples; ``query``, ``positives`` and ``negatives`` are row numbers of ``items``."""
        return self._map("examples.arrow", None).table

    def _map(self, name: str, lazy: str | None) -> Mapped:
        file = self._sealed.file(name)
        try:
            return Mapped(self.path / name, file, lazy)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise BadInputError(
                f"{name} of this store cannot be read ({reason})", where=str(self.path), hint=_MEND
            ) from error

    @cached_property
    def _texts(self) -> Chunks:
        return Chunks(self.items.column("text"), "item", self._items)

    def texts(self, rows: Sequence[int] | Rows) -> list[str]:
        """The texts of items, in the order asked for. Row by row from the map: no chunk is copied as a whole."""
        return self._texts.take(rows)

    @property
    def has_images(self) -> bool:
        """Whether a source of the store may have items with images."""
        return IMAGE.name in self.items.column_names

    @cached_property
    def image_table(self) -> pa.Table:
        """All images, each once: ``id``, ``data``, ``width``, ``height``, ``original_width``, ``original_height``."""
        if not self.has_images:
            raise ValueError(f"the store {self.path} has no images")
        return self._mapped_images.table

    @cached_property
    def _mapped_images(self) -> Mapped:
        return self._map(IMAGES_FILE, "data")

    @cached_property
    def _image_data(self) -> Chunks:
        return Chunks(self.image_table.column("data"), "image", self._mapped_images)

    @cached_property
    def _rows_of_images(self) -> Rows:
        column = self.items.column(IMAGE.name) if self.has_images else pa.nulls(self.items.num_rows, pa.int64())
        rows: Rows = column.fill_null(-1).to_numpy().astype(np.int64)
        return rows

    def image_rows(self, rows: Sequence[int] | Rows) -> Rows:
        """The row of each item's image in :attr:`image_table`, [n]; -1 where it has none."""
        return self._rows_of_images[np.asarray(rows, dtype=np.int64).ravel()]

    def images(self, rows: Sequence[int] | Rows) -> list[Image | None]:
        """The images of items, RGB, in the order asked for; None where an item has none.

        An image that is asked for several times in one call is decoded once, and the same object.
        """
        wanted = self.image_rows(rows)
        distinct = np.unique(wanted[wanted >= 0])
        stored = self._image_data.take(distinct) if len(distinct) else []
        decoded = dict(zip(distinct.tolist(), map(open_kept, stored), strict=True))
        return [decoded.get(row) for row in wanted.tolist()]

    def image_sizes(self, rows: Sequence[int] | Rows) -> Rows:
        """Width and height of the images of items as they are kept, [n, 2]; 0 and 0 where an item has none."""
        return self._sizes("", self.image_rows(rows))

    def original_sizes(self, rows: Sequence[int] | Rows) -> Rows:
        """The same of the files that the images came from."""
        return self._sizes("original_", self.image_rows(rows))

    def _sizes(self, prefix: str, images: Rows) -> Rows:
        sizes = np.zeros((len(images), 2), dtype=np.int64)
        there = images >= 0
        for number, name in enumerate(("width", "height") if there.any() else ()):
            sizes[there, number] = self.image_table.column(prefix + name).to_numpy()[images[there]]
        return sizes

    def modalities(self, rows: Sequence[int] | Rows) -> list[str]:
        """``text``, ``image`` or ``text+image`` for each item."""
        images = self.image_rows(rows)
        if not (images >= 0).any():
            return ["text"] * len(images)
        texts = self.texts(rows)
        return [
            "text" if row < 0 else "text+image" if text else "image"
            for row, text in zip(images.tolist(), texts, strict=True)
        ]

    def shown(self, rows: Sequence[int] | Rows) -> list[str]:
        """Items in words, for people: the text, and an image as ``[image 64x48]`` before it."""
        sizes = self.image_sizes(rows).tolist()
        return [
            f"[image {width}x{height}] {text}".strip() if width else text
            for text, (width, height) in zip(self.texts(rows), sizes, strict=True)
        ]

    def source_number(self, name: str) -> int:
        """The number that the examples of a source bear."""
        for number, source in enumerate(self.sources):
            if source.name == name:
                return number
        names = ", ".join(source.name for source in self.sources)
        raise BadInputError(
            f"there is no source {name!r} in this store", where=str(self.path), hint=f"Sources: {names}."
        )

    def select(self, source: str, split: str) -> Rows:
        """The row numbers of the examples of a source that are in a split, rising; empty if there are none."""
        of_source = pc.equal(self.examples.column("source"), self.source_number(source))
        both = pc.and_(of_source, pc.equal(self.examples.column("split"), split))
        return np.flatnonzero(both.to_numpy()).astype(np.int64)

    def weights(self) -> npt.NDArray[np.float64] | None:
        """The weight of each example in the loss, 1 where its source does not say; None where no source does."""
        if WEIGHT.name not in self.examples.column_names:
            return None
        weights: npt.NDArray[np.float64] = self.examples[WEIGHT.name].fill_null(1.0).to_numpy()
        return weights

    def known_positives(self) -> Ragged:
        """For each item, its positives (item rows, rising) in all retrieval examples of all sources and splits.

        Graded pairs are left out: the second item of a pair with a low score is no positive.
        """
        return self._known_positives

    @cached_property
    def _known_positives(self) -> Ragged:
        none = np.empty(0, dtype=np.int64)
        queries, positives = [none], [none]
        for batch in self.examples.select(["query", "positives", "score"]).to_batches():
            lists = Ragged.from_arrow(batch.column("positives"))
            owners = lists.owners()
            graded = batch.column("score").is_valid().to_numpy(zero_copy_only=False)[owners]
            queries.append(batch.column("query").to_numpy()[owners[~graded]])
            positives.append(lists.values[~graded])
        return Ragged.from_pairs(np.concatenate(queries), np.concatenate(positives), self.items.num_rows)
