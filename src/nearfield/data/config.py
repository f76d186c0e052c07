"""The data recipe: which files examples come from, what their columns mean, and how they are split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from nearfield.config import Config, ConfigPath
from nearfield.data.cleaning import STEPS, StepBase
from nearfield.data.prompts import Prompts
from nearfield.data.readers import Column, ReaderConfig

if TYPE_CHECKING:
    from nearfield.data.items import RowValues

TaskType = Literal[
    "Any2AnyMultilingualRetrieval",
    "Any2AnyReranking",
    "Any2AnyRetrieval",
    "BitextMining",
    "Classification",
    "Clustering",
    "Compositionality",
    "DocumentUnderstanding",
    "ImageClassification",
    "ImageClustering",
    "InstructionReranking",
    "InstructionRetrieval",
    "MultilabelClassification",
    "PairClassification",
    "Regression",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
    "VisionCentricQA",
    "VisualSTS(eng)",
    "VisualSTS(multi)",
    "ZeroShotClassification",
]
"""The task types of MTEB whose items are texts and images."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Columns = Column | Annotated[tuple[Column, ...], Field(min_length=1)]


class TextAndImage(Config):
    """The columns that make an item of both. Where one of them is null or empty, the item has only the other."""

    text: Column
    """The column of the text."""
    image: Column
    """The column of the image."""


class ImagesConfig(Config):
    """The images of a source. Readers of images need nothing of this stated; the others need ``columns`` or ``join``.

    An image is a path below ``folder`` or the bytes of its file. It is decoded, turned as its EXIF says, laid on white
    where it is transparent, made smaller and kept without its metadata. One that cannot be is a bad row.
    """

    columns: tuple[Column, ...] = ()
    """Columns that hold images: a path, bytes, ``{bytes, path}`` as Hugging Face data sets have them, or a list of these."""
    join: dict[Column, TextAndImage] = {}
    """New columns whose items are text and image together; lists are joined member by member."""
    folder: ConfigPath | None = None
    """The folder where paths start; null is the folder of the file that names them. A path that leads out of it is refused."""
    max_side: Annotated[int, Field(ge=8, le=8192)] = 512
    """Pixels of the longer side that an image is made smaller to. Raise it for documents and other fine print."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Null keeps every pixel (lossless WebP); a number keeps lossy WebP, a tenth of the size for photographs."""
    max_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 32 << 20
    """A larger file is not read."""
    max_pixels: Annotated[int, Field(ge=1, le=89_478_485)] = 67_108_864
    """An image whose header states more pixels is not decoded."""
    formats: Annotated[tuple[Literal["png", "jpeg", "webp", "gif", "bmp"], ...], Field(min_length=1)] = (
        *("png", "jpeg", "webp"),
        *("gif", "bmp"),
    )
    """Formats that are decoded, by what the file holds, whatever its name says."""
    animated: Literal["first", "refuse"] = "first"
    """An image with several frames gives the first one, or is a bad row."""

    @field_validator("columns")
    @classmethod
    def _once(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) < len(columns):
            raise ValueError("a column is named twice")
        return columns

    def replaced(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """The columns that the files must have so that there are ``columns``, without repetition."""
        needed: list[str] = []
        for column in columns:
            both = self.join.get(column)
            needed += [column] if both is None else [both.text, both.image]
        return tuple(dict.fromkeys(needed))


class ExamplesBase(Config):
    """The base of the settings of examples."""

    def columns(self) -> tuple[str, ...]:
        """The columns that are read, in a fixed order."""
        raise NotImplementedError

    def read(self, row: RowValues) -> dict[str, Any]:
        """The fields of the example of a row."""
        raise NotImplementedError


class RetrievalExamples(ExamplesBase):
    """A query with any number of positives and negatives. A column holds a string or a list of strings."""

    kind: Literal["retrieval"] = "retrieval"
    query: Column
    """The column of the query."""
    positives: Columns
    """One or several columns of texts that answer the query."""
    negatives: Columns | None = None
    """One or several columns of texts that do not; null for none."""

    def columns(self) -> tuple[str, ...]:
        return (self.query, *_as_tuple(self.positives), *_as_tuple(self.negatives))

    def read(self, row: RowValues) -> dict[str, Any]:
        return {
            "query": row.item(self.query),
            "positives": row.items(_as_tuple(self.positives)),
            "negatives": row.items(_as_tuple(self.negatives), optional=True),
        }


class GradedExamples(ExamplesBase):
    """Two items and a score. With ``scale: [lowest, highest]`` the score is stored as a share from 0 to 1."""

    kind: Literal["graded"] = "graded"
    first: Column
    """The column of one item."""
    second: Column
    """The column of the other."""
    score: Column
    """The column of the score, a number that is higher for more similar items."""
    scale: tuple[float, float] | None = None
    """Lowest and highest possible score; one outside is a bad row. Null keeps scores as they are."""

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not scale[0] < scale[1]:
            raise ValueError("the scale must rise: [lowest, highest]")
        return scale

    def columns(self) -> tuple[str, ...]:
        return (self.first, self.second, self.score)

    def read(self, row: RowValues) -> dict[str, Any]:
        query, second = row.item(self.first), row.item(self.second)
        return {"query": query, "positives": (second,), "score": row.score(self.score, self.scale)}


class LabelledExamples(ExamplesBase):
    """An item and its label."""

    kind: Literal["labelled"] = "labelled"
    item: Column
    """The column of the item."""
    label: Column
    """The column of the label: a string, a whole number or a truth value."""

    def columns(self) -> tuple[str, ...]:
        return (self.item, self.label)

    def read(self, row: RowValues) -> dict[str, Any]:
        return {"query": row.item(self.item), "label": row.key(self.label)}


class TextExamples(ExamplesBase):
    """A text alone, for objectives that need nothing else (``simcse``, ``masked_tokens``)."""

    kind: Literal["text"] = "text"
    text: Column
    """The column of the text."""

    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def read(self, row: RowValues) -> dict[str, Any]:
        return {"query": row.item(self.text)}


ExamplesConfig = Annotated[
    RetrievalExamples | GradedExamples | LabelledExamples | TextExamples, Field(discriminator="kind")
]


def _as_tuple(columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One column, several or none, as a tuple."""
    if columns is None:
        return ()
    return (columns,) if isinstance(columns, str) else columns


class DuplicateGroups(Config):
    """Examples that share a text are one group, over all sources that ask for it."""

    kind: Literal["duplicates"] = "duplicates"
    negatives: bool = True
    """Whether sharing a negative binds, too. Turn it off where all rows draw from a few common negatives."""


class SplitBase(Config):
    """The base of the settings of splits."""

    @property
    def key_column(self) -> str | None:
        """The column that the split of a row depends on."""
        return None

    def split_of(self, group: str, key: str | None) -> str:
        """The split of an example by its group, or by the value of the key column."""
        raise NotImplementedError

    def may_part(self, grouped: bool) -> bool:
        """Whether examples of one group could get different splits; ``grouped`` is whether the recipe states groups."""
        return False


class HashSplit(SplitBase):
    """Each group goes to a split by the hash of its key: the same key, the same split, in every source and order."""

    kind: Literal["hash"] = "hash"
    fractions: dict[Name, float]
    """Split -> share of the groups; the shares sum to 1, e.g. ``{train: 0.8, validation: 0.1, test: 0.1}``."""
    seed: int = Field(default=0, ge=0)
    """Another seed, another division."""
    by: Column | None = None
    """A column that holds a coarser key than ``group``; its values go to one split each."""

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, fractions: dict[str, float]) -> dict[str, float]:
        if not fractions or any(share <= 0 for share in fractions.values()):
            raise ValueError("each fraction must be above 0; leave out a split that gets nothing")
        if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"the fractions sum to {sum(fractions.values()):g}; they must sum to 1")
        return fractions

    @property
    def key_column(self) -> str | None:
        return self.by

    def split_of(self, group: str, key: str | None) -> str:
        return hash_split(group if key is None else key, self.fractions, self.seed)

    def may_part(self, grouped: bool) -> bool:
        return self.by is not None


class ColumnSplit(SplitBase):
    """A column names the split."""

    kind: Literal["column"] = "column"
    column: Column
    """The column that holds the name of the split."""

    @property
    def key_column(self) -> str | None:
        return self.column

    def split_of(self, group: str, key: str | None) -> str:
        assert key is not None
        return key

    def may_part(self, grouped: bool) -> bool:
        return grouped


class WholeSplit(SplitBase):
    """All examples are in one split."""

    kind: Literal["all"] = "all"
    name: Name = "train"
    """The name of the split."""

    def split_of(self, group: str, key: str | None) -> str:
        return self.name


SplitConfig = Annotated[HashSplit | ColumnSplit | WholeSplit, Field(discriminator="kind")]


def hash_split(key: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split that a key goes to. The order in which the fractions are written does not matter."""
    place = hash_fraction(key, seed)
    reached = 0.0
    names = sorted(fractions)
    for name in names[:-1]:
        reached += fractions[name]
        if place < reached:
            return name
    return names[-1]


def hash_fraction(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, spread evenly over keys."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=seed.to_bytes(8, "little"))
    return (int.from_bytes(digest.digest(), "big") >> 11) / (1 << 53)


class SourceConfig(Config):
    """A data set that examples come from."""

    name: Name
    """Unique in the recipe; batches, prompts and reports speak of the source by it."""
    task_type: TaskType
    """MTEB's type of the task that the examples teach; it decides which prompts and roles the items get."""
    prompts: Prompts = Prompts()
    """Strings before the texts of this source."""
    reader: ReaderConfig
    """The files, and how they are read."""
    examples: ExamplesConfig
    """The meaning of the columns."""
    group: Column | DuplicateGroups | None = None
    """Examples of a group stay on one side of a split. Without it, the query is the group."""
    cluster: Column | None = None
    """The unit that statistics resample. Without it, the group."""
    weight: Column | None = None
    """The weight of an example in the loss: a finite number of at least 0. Without it, each counts 1."""
    split: SplitConfig
    """The examples that are trained on, and those that are held out."""
    images: ImagesConfig | None = None
    """The place of the images, and how they are checked and kept. Readers of images have these settings without stating them."""
    steps: tuple[Annotated[StepBase, STEPS], ...] = ()
    """Cleaning steps within this source, in their order, before the common ones."""

    @property
    def group_column(self) -> str | None:
        """The column that names the group, where one does."""
        return self.group if isinstance(self.group, str) else None

    @property
    def duplicate_groups(self) -> DuplicateGroups | None:
        """The settings of groups by shared texts, where groups are made so."""
        return self.group if isinstance(self.group, DuplicateGroups) else None

    def image_rules(self) -> ImagesConfig | None:
        """The settings for the images of this source; None for a source of texts."""
        return ImagesConfig() if self.images is None and self.reader.gives_images else self.images

    def image_folder(self) -> Path:
        """The folder where the paths of images start: the stated folder, else the one of the file that the reader reads."""
        if self.images is not None and self.images.folder is not None:
            return self.images.folder
        path: Path | None = getattr(self.reader, "path", None)
        return Path() if path is None else path if path.is_dir() else path.parent

    def columns(self) -> tuple[str, ...]:
        """The columns that a row of this source must have, in a fixed order, without repetition."""
        wanted = [*self.examples.columns(), self.group_column, self.cluster, self.weight, self.split.key_column]
        return tuple(dict.fromkeys(column for column in wanted if column is not None))

    def read_columns(self) -> tuple[str, ...]:
        """The columns that the files must have: of those above, the ones that are not joined from others."""
        return self.columns() if self.images is None else self.images.replaced(self.columns())


class DataConfig(Config):
    """A data recipe."""

    name: Name
    """Stands in the store, in reports and in model cards."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """The build stops where more than this share of a source's rows cannot be used."""
    max_characters: int = Field(default=1_000_000, ge=1)
    """A longer text is no text but an accident."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The data sets."""
    steps: tuple[Annotated[StepBase, STEPS], ...] = ()
    """Cleaning steps over all sources: near-duplicates are looked for across them."""

    @field_validator("sources")
    @classmethod
    def _unique(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}; a source's name must be unique")
        return sources
