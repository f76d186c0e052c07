"""The data recipe: which files examples come from, what their columns mean, and how they are split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nearfield.config import Config, ConfigPath
from nearfield.data.cleaning_config import StepConfig
from nearfield.data.picture_config import ImagesConfig
from nearfield.data.picture_readers import (
    EmojiReader,
    ImageFolderReader,
    ImageTripletsReader,
    MmebReader,
    OpenClipartReader,
    PictureReader,
    WebDatasetReader,
)
from nearfield.data.prompt_templates import TEMPLATES, TemplateName, render

if TYPE_CHECKING:
    from nearfield.data.readers.base import Reader

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
"""The task types of MTEB whose items are texts and pictures."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Column = Annotated[str, Field(min_length=1)]
Columns = Column | Annotated[tuple[Column, ...], Field(min_length=1)]


Phrasings = Annotated[tuple[str, ...], Field(min_length=1)]


class Prompts(Config):
    """Strings put before the text of an item, a role; null is none.

    Several phrasings of one prompt are a list: training draws one for each example and epoch, and the model keeps the first.
    Instead of the strings a ``template`` of a published model can be named, with instructions for the places that it has.
    """

    query: str | Phrasings | None = None
    document: str | Phrasings | None = None
    template: TemplateName | None = None
    """Makes the strings that are not stated."""
    instruction: str | Phrasings | None = None
    """What the template puts before queries: the task, in one or several phrasings."""
    document_instruction: str | None = None
    """The same for documents; null leaves them as the template has them without one."""

    @model_validator(mode="before")
    @classmethod
    def _from_template(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            return stated
        # Whoever reads JSON strictly takes a list for a tuple, but not what comes out of here.
        stated = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        if not isinstance(stated.get("template"), str):
            return stated
        template = TEMPLATES.get(stated["template"])
        if template is None:
            return stated
        instruction = stated.get("instruction")
        phrasings = list(instruction) if isinstance(instruction, (list, tuple)) else [instruction]
        made = [render(template, phrasing, stated.get("document_instruction")) for phrasing in phrasings]
        queries = [query for query, _ in made]
        return {"query": tuple(queries) if len(queries) > 1 else queries[0], "document": made[0][1], **stated}

    @model_validator(mode="after")
    def _instructions_need_a_template(self) -> Self:
        if self.template is None and (self.instruction is not None or self.document_instruction is not None):
            raise ValueError("an instruction needs a template that says where it stands")
        return self

    @field_validator("query", "document")
    @classmethod
    def _different(cls, prompt: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(prompt, tuple) and len(set(prompt)) < len(prompt):
            raise ValueError("a phrasing stands twice")
        return prompt


class JsonlReader(Config):
    """One JSON object a line; .gz, .xz and .zst are unpacked on the way. A folder means all its JSONL files."""

    kind: Literal["jsonl"] = "jsonl"
    path: ConfigPath

    def build(self) -> Reader:
        from nearfield.data.readers.jsonl import JsonlFiles

        return JsonlFiles(self.path)


class CsvReader(Config):
    """Comma- or tab-separated values with a header line; the delimiter follows from the suffix unless it is given."""

    kind: Literal["csv"] = "csv"
    path: ConfigPath
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None

    def build(self) -> Reader:
        from nearfield.data.readers.delimited import DelimitedFiles

        return DelimitedFiles(self.path, self.delimiter)


class ParquetReader(Config):
    """A Parquet file, or a folder of them."""

    kind: Literal["parquet"] = "parquet"
    path: ConfigPath

    def build(self) -> Reader:
        from nearfield.data.readers.parquet import ParquetFiles

        return ParquetFiles(self.path)


class HubReader(Config):
    """A Hugging Face data set: a folder written by ``save_to_disk`` (``path``), or ``name`` and ``revision`` on the hub."""

    kind: Literal["hub"] = "hub"
    path: ConfigPath | None = None
    name: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str = "train"

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either 'path' (a folder on disk) or 'name' and 'revision' (on the hub)")
        if self.name is not None and not self.revision:
            raise ValueError("'revision' is required with 'name': a branch moves, a commit does not")
        if self.path is not None and (self.revision or self.subset):
            raise ValueError("'revision' and 'subset' go with 'name', not with 'path'")
        return self

    def build(self) -> Reader:
        from nearfield.data.readers.hub import HubDataset

        return HubDataset(self)


class EmbeddedReader(Config):
    """A data set that is shipped in the package."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["wordnet/lemma_gloss", "wordnet/gloss_similarity"]

    def build(self) -> Reader:
        from nearfield.data.readers.wordnet import WordNet

        return WordNet(self.name)


class DebianReader(Config):
    """Short and long descriptions of Debian packages, one a source package, built on demand from apt's lists."""

    kind: Literal["debian_descriptions"] = "debian_descriptions"
    max_repeats: int = Field(default=50, ge=1)
    """A sentence that occurs in more descriptions than this says nothing about a package and is dropped."""
    cache: ConfigPath | None = None

    def build(self) -> Reader:
        from nearfield.data.readers.debian import DebianDescriptions

        return DebianDescriptions(self.max_repeats, self.cache)


class DocstringsReader(Config):
    """Docstring and code of the functions in the installed Python packages; parsed, never imported."""

    kind: Literal["docstrings"] = "docstrings"
    packages: tuple[str, ...] | None = None
    """Names of the distributions to read; null means all that are installed."""
    max_lines: int = Field(default=100, ge=1)
    """Functions with more lines of code are left out."""
    cache: ConfigPath | None = None

    def build(self) -> Reader:
        from nearfield.data.readers.docstrings import Docstrings

        return Docstrings(self.packages, self.max_lines, self.cache)


ReaderConfig = Annotated[
    JsonlReader
    | CsvReader
    | ParquetReader
    | HubReader
    | EmbeddedReader
    | DebianReader
    | DocstringsReader
    | EmojiReader
    | OpenClipartReader
    | ImageFolderReader
    | WebDatasetReader
    | MmebReader
    | ImageTripletsReader,
    Field(discriminator="kind"),
]


class RetrievalExamples(Config):
    """A query with any number of positives and negatives. A column holds a string or a list of strings."""

    kind: Literal["retrieval"] = "retrieval"
    query: Column
    positives: Columns
    negatives: Columns | None = None


class GradedExamples(Config):
    """Two items and a score. With ``scale: [lowest, highest]`` the score is stored as a share from 0 to 1."""

    kind: Literal["graded"] = "graded"
    first: Column
    second: Column
    score: Column
    scale: tuple[float, float] | None = None

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not scale[0] < scale[1]:
            raise ValueError("the scale must rise: [lowest, highest]")
        return scale


class LabelledExamples(Config):
    """An item and its label."""

    kind: Literal["labelled"] = "labelled"
    item: Column
    label: Column


class TextExamples(Config):
    """A text alone, for objectives that need nothing else (``simcse``, ``masked_tokens``)."""

    kind: Literal["text"] = "text"
    text: Column


ExamplesConfig = Annotated[
    RetrievalExamples | GradedExamples | LabelledExamples | TextExamples, Field(discriminator="kind")
]


class DuplicateGroups(Config):
    """Examples that share a text are one group, over all sources that ask for it."""

    kind: Literal["duplicates"] = "duplicates"
    negatives: bool = True
    """Whether sharing a negative binds, too. Turn it off where all rows draw from a few common negatives."""


class HashSplit(Config):
    """Each group goes to a split by the hash of its key: the same key, the same split, in every source and order."""

    kind: Literal["hash"] = "hash"
    fractions: dict[Name, float]
    seed: int = Field(default=0, ge=0)
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


class ColumnSplit(Config):
    """A column names the split."""

    kind: Literal["column"] = "column"
    column: Column


class WholeSplit(Config):
    """All examples are in one split."""

    kind: Literal["all"] = "all"
    name: Name = "train"


SplitConfig = Annotated[HashSplit | ColumnSplit | WholeSplit, Field(discriminator="kind")]


class SourceConfig(Config):
    """A data set that examples come from."""

    name: Name
    task_type: TaskType
    prompts: Prompts = Prompts()
    reader: ReaderConfig
    examples: ExamplesConfig
    group: Column | DuplicateGroups | None = None
    """Examples of a group stay on one side of a split. Without it, the query is the group."""
    cluster: Column | None = None
    """The unit that statistics resample. Without it, the group."""
    weight: Column | None = None
    """What each example counts in the loss: a finite number of at least 0. Without it, each counts 1."""
    split: SplitConfig
    images: ImagesConfig | None = None
    """Where the pictures are and what becomes of them. Readers of pictures have these settings without stating them."""
    steps: tuple[StepConfig, ...] = ()
    """Cleaning steps within this source, in their order, before the common ones."""

    def pictures(self) -> ImagesConfig | None:
        """The settings for the pictures of this source; None for a source of texts."""
        return ImagesConfig() if self.images is None and isinstance(self.reader, PictureReader) else self.images

    def columns(self) -> tuple[str, ...]:
        """The columns that a row of this source must have, in a fixed order, without repetition."""
        examples = self.examples
        wanted: list[str | None] = []
        if isinstance(examples, RetrievalExamples):
            wanted += [examples.query, *as_tuple(examples.positives), *as_tuple(examples.negatives)]
        elif isinstance(examples, GradedExamples):
            wanted += [examples.first, examples.second, examples.score]
        elif isinstance(examples, LabelledExamples):
            wanted += [examples.item, examples.label]
        else:
            wanted += [examples.text]
        wanted += [self.group if isinstance(self.group, str) else None, self.cluster, self.weight]
        if isinstance(self.split, HashSplit):
            wanted.append(self.split.by)
        elif isinstance(self.split, ColumnSplit):
            wanted.append(self.split.column)
        return tuple(dict.fromkeys(column for column in wanted if column is not None))

    def read_columns(self) -> tuple[str, ...]:
        """The columns that the files must have: of those above, the ones that are not joined from others."""
        return self.columns() if self.images is None else self.images.replaced(self.columns())


def as_tuple(columns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One column, several or none, as a tuple."""
    if columns is None:
        return ()
    return (columns,) if isinstance(columns, str) else columns


class DataConfig(Config):
    """A data recipe."""

    name: Name
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """The build stops where more than this share of a source's rows cannot be used."""
    max_characters: int = Field(default=1_000_000, ge=1)
    """A longer text is no text but an accident."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    steps: tuple[StepConfig, ...] = ()
    """Cleaning steps over all sources: near-duplicates are looked for across them."""

    @field_validator("sources")
    @classmethod
    def _unique(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called {name!r}; a source's name must be unique")
        return sources
