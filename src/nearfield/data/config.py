"""The data recipe: which files examples come from, what their columns mean, how they are split, and the prompts before texts.

``tests/data/test_prompts.py`` compares the templates of prompts with the conventions that mteb runs the published models by.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from nearfield.config import Config, ConfigPath, Kinds, KindSettings
from nearfield.data.cleaning import STEPS, StepBase
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


class ExamplesBase(KindSettings):
    """The base of the settings of examples."""

    form: ClassVar[Literal["retrieval", "graded", "labelled", "text"]]
    """The form of the examples: a query with positives, two items with a score, an item with a label, or a text alone."""

    @model_validator(mode="after")
    def _has_a_form(self) -> Self:
        if getattr(self, "form", None) not in ("retrieval", "graded", "labelled", "text"):
            raise ValueError("a kind of examples must say its 'form': retrieval, graded, labelled or text")
        return self

    @property
    def brings_negatives(self) -> bool:
        """Whether examples may come with negatives of their own."""
        return False

    def columns(self) -> tuple[str, ...]:
        """The columns that are read, in a fixed order."""
        raise NotImplementedError

    def read(self, row: RowValues) -> dict[str, Any]:
        """The fields of the example of a row."""
        raise NotImplementedError


class RetrievalExamples(ExamplesBase):
    """A query with any number of positives and negatives. A column holds a string or a list of strings."""

    form = "retrieval"
    kind: Literal["retrieval"] = "retrieval"
    query: Column
    """The column of the query."""
    positives: Columns
    """One or several columns of texts that answer the query."""
    negatives: Columns | None = None
    """One or several columns of texts that do not; null for none."""

    @property
    def brings_negatives(self) -> bool:
        return self.negatives is not None

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

    form = "graded"
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

    form = "labelled"
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

    form = "text"
    kind: Literal["text"] = "text"
    text: Column
    """The column of the text."""

    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def read(self, row: RowValues) -> dict[str, Any]:
        return {"query": row.item(self.text)}


_HERE = "nearfield.data.config"
EXAMPLES = Kinds(
    "examples",
    f"{_HERE}:ExamplesBase",
    {
        "retrieval": (f"{_HERE}:RetrievalExamples", "a query with positives and negatives"),
        "graded": (f"{_HERE}:GradedExamples", "two items and a score"),
        "labelled": (f"{_HERE}:LabelledExamples", "an item and its label"),
        "text": (f"{_HERE}:TextExamples", "a text alone"),
    },
)


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


class SplitBase(KindSettings):
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


SPLITS = Kinds(
    "splits",
    f"{_HERE}:SplitBase",
    {
        "hash": (f"{_HERE}:HashSplit", "by the hash of a group"),
        "column": (f"{_HERE}:ColumnSplit", "a column names it"),
        "all": (f"{_HERE}:WholeSplit", "all examples in one"),
    },
)


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


TemplateName = Literal["e5", "e5-instruct", "qwen3-embedding", "nv-embed", "bge", "instructor"]


@dataclass(frozen=True)
class PromptTemplate:
    """``{instruction}`` in a template stands for the task; one without it takes none."""

    query: str
    """Before queries."""
    document: str
    """Before documents. Used where there is no instruction for documents."""
    source: str
    """The paper and a model that was trained so."""
    pools_prompt: bool = True
    """Whether the published models count the prompt's tokens in pooling."""
    ends_with_eos: bool = False
    """Whether they end texts with the end-of-text token."""

    @property
    def takes_instruction(self) -> bool:
        """Whether the query's prompt has a place for an instruction."""
        return "{instruction}" in self.query


TEMPLATES: dict[TemplateName, PromptTemplate] = {
    "e5": PromptTemplate("query: ", "passage: ", "E5 (arXiv 2212.03533); intfloat/e5-base-v2"),
    "e5-instruct": PromptTemplate(
        "Instruct: {instruction}\nQuery: ",
        "",
        "E5-mistral (arXiv 2401.00368); intfloat/e5-mistral-7b-instruct",
        ends_with_eos=True,
    ),
    "qwen3-embedding": PromptTemplate(
        "Instruct: {instruction}\nQuery:",
        "",
        "Qwen3-Embedding (arXiv 2506.05176); Qwen/Qwen3-Embedding-0.6B: no space behind the colon",
        ends_with_eos=True,
    ),
    "nv-embed": PromptTemplate(
        "Instruct: {instruction}\nQuery: ",
        "",
        "NV-Embed (arXiv 2405.17428, section 4); nvidia/NV-Embed-v2",
        pools_prompt=False,
        ends_with_eos=True,
    ),
    "bge": PromptTemplate(
        "Represent this sentence for searching relevant passages: ",
        "",
        "C-Pack (arXiv 2309.07597); BAAI/bge-base-en-v1.5",
    ),
    "instructor": PromptTemplate(
        "{instruction}: ",
        "",
        "INSTRUCTOR (arXiv 2212.09741): 'Represent the (domain) text_type for task_objective:', on both sides",
        pools_prompt=False,
    ),
}


def render(template: PromptTemplate, query: str | None, document: str | None) -> tuple[str, str]:
    """The query's and the document's prompt for these instructions; None is no instruction.

    Raises ValueError where the template wants an instruction that is missing, or takes none.
    """
    if template.takes_instruction != (query is not None) or (document is not None and not template.takes_instruction):
        raise ValueError(
            "this template wants an instruction" if template.takes_instruction else "this template takes no instruction"
        )
    if not template.takes_instruction:
        return template.query, template.document
    put = {role: (text or "").strip().removesuffix(":") for role, text in (("query", query), ("document", document))}
    if not put["query"]:
        raise ValueError("the instruction is empty")
    before = template.query.replace("{instruction}", put["query"])
    behind = template.query.replace("{instruction}", put["document"]) if put["document"] else template.document
    return before, behind


Phrasings = Annotated[tuple[str, ...], Field(min_length=1)]


class Prompts(Config):
    """Strings put before the text of an item, a role; null leaves it to the training recipe, and there to the base model.

    Where the texts of the task type have no role (classification, clustering, pairs and the like), ``query`` is put before
    all of them, unless ``document`` is stated, too.
    Several phrasings of one prompt are a list: training draws one for each example and epoch, and the model keeps the first.
    Instead of the strings a ``template`` of a published model can be named, with instructions for the places that it has.
    """

    query: str | Phrasings | None = None
    """Before queries; an empty string is no prompt, null leaves it to the training recipe."""
    document: str | Phrasings | None = None
    """Before documents."""
    template: TemplateName | None = None
    """Makes the strings that are not stated."""
    instruction: str | Phrasings | None = None
    """The task, in one or several phrasings; the template puts it before queries."""
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
            raise ValueError("a phrasing is given twice")
        return prompt


class InContextConfig(Config):
    """Examples of the training split, put before a query's prompt (LG-ANNA, arXiv 2506.07438); documents carry none.

    A few sets of examples are drawn once a source, each of 1 to ``most`` examples. Training draws for each example and
    epoch one of the sets that hold neither its query nor one of its positives, or none.
    """

    sources: tuple[str, ...] | None = None
    """The sources whose queries get examples; null means all."""
    draws: Annotated[int, Field(ge=1, le=256)] = 8
    """Sets a source. Queries are tokenised once with each."""
    most: Annotated[int, Field(ge=1, le=64)] = 3
    """Examples in a set, at most."""
    none: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the rows that get no examples, so that the model works without."""
    max_words: Annotated[int, Field(ge=1)] = 32
    """Longer texts in an example are cut to so many words."""
    query_tokens: Annotated[int, Field(ge=1)] = 64
    """Room that a prompt with examples must leave below the encoder's maximum length."""
    head: str = "Examples:\n"
    """The text before the examples."""
    example: str = "query: {query}\ndocument: {document}\n"
    """The text of each example, with its two places."""
    evaluated: Literal["plain", "examples"] = "plain"
    """Whether the model is saved with the prompt alone, or with the first set of examples before it."""

    @field_validator("example")
    @classmethod
    def _has_both(cls, template: str) -> str:
        if set(re.findall(r"\{([^{}]*)\}", template)) != {"query", "document"}:
            raise ValueError("the template of an example must hold {query} and {document}, and nothing else in braces")
        return template


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
    examples: Annotated[ExamplesBase, EXAMPLES]
    """The meaning of the columns."""
    group: Column | DuplicateGroups | None = None
    """Examples of a group stay on one side of a split. Without it, the query is the group."""
    cluster: Column | None = None
    """The unit that statistics resample. Without it, the group."""
    weight: Column | None = None
    """The weight of an example in the loss: a finite number of at least 0. Without it, each counts 1."""
    split: Annotated[SplitBase, SPLITS]
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

    def all_steps(self) -> list[tuple[StepBase, int | None]]:
        """The steps in the order in which they run, each with the number of its source: sources' own first, then the common."""
        own = [(step, number) for number, source in enumerate(self.sources) for step in source.steps]
        return [*own, *((step, None) for step in self.steps)]
