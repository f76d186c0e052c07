"""Settings of the readers of texts; ``kind`` picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath

if TYPE_CHECKING:
    from nearfield.data.readers.base import Reader


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


class SpansReader(Config):
    """Spans of long documents as examples: anchors, and positives near each (DeCLUTR, arXiv 2006.03659), counted in words.

    Columns are ``anchor``, ``positives`` and ``document``. A document that is too short for its anchors is a bad row.
    """

    kind: Literal["spans"] = "spans"
    of: Annotated[
        JsonlReader | CsvReader | ParquetReader | HubReader | EmbeddedReader | DebianReader,
        Field(discriminator="kind"),
    ]
    """What reads the documents."""
    column: Annotated[str, Field(min_length=1)]
    """The documents' text."""
    anchors: Annotated[int, Field(ge=1)] = 2
    """Of each document; none overlaps another."""
    positives: Annotated[int, Field(ge=1)] = 2
    """Of each anchor."""
    longest: Annotated[int, Field(ge=2)] = 384
    shortest: Annotated[int, Field(ge=1)] = 24
    """Words of a span: anchors are long ones as a rule, Beta(4, 2) between the two, positives short ones, Beta(2, 4)."""
    place: Literal["any", "inside", "beside"] = "any"
    """Where positives are: from touching the anchor on its left to touching it on its right; within it; next to it."""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"the shortest span ({self.shortest}) is longer than the longest ({self.longest})")
        return self

    def build(self) -> Reader:
        from nearfield.data.readers.spans import Spans

        return Spans(self, self.of.build())
