"""The data recipe: which files examples come from, what their columns mean, and how they are split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nearfield.config import Config
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
from nearfield.data.text_readers import (
    CsvReader,
    DebianReader,
    DocstringsReader,
    EmbeddedReader,
    HubReader,
    JsonlReader,
    ParquetReader,
    SpansReader,
)

if TYPE_CHECKING:
    pass

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
    """Strings put before the text of an item, a role; null leaves it to the training recipe, and there to the base model.

    Where the texts of the task type have no role (classification, clustering, pairs and the like), ``query`` is put before
    all of them, unless ``document`` is stated, too.
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

    @property
    def states_document(self) -> bool:
        """Whether the prompt before documents is stated, and not what a template has where nothing is said of documents."""
        made = None if self.template is None else TEMPLATES[self.template].document
        return self.document is not None and (made is None or self.document != made or bool(self.document_instruction))

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


ReaderConfig = Annotated[
    JsonlReader
    | CsvReader
    | ParquetReader
    | HubReader
    | EmbeddedReader
    | DebianReader
    | DocstringsReader
    | SpansReader
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
