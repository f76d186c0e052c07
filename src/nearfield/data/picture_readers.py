"""Settings of the readers whose rows have pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from nearfield.config import Config, ConfigPath

if TYPE_CHECKING:
    from nearfield.data.readers.base import Reader

EmojiLanguage = Literal["en", "de", "fr", "es", "pt", "ru", "ar", "hi", "ja", "zh"]


class PictureReader(Config):
    """A reader whose rows have pictures: its source needs no ``images``."""


class EmojiReader(PictureReader):
    """Emoji with names and keywords, shipped in the package; one row a picture and language.

    Columns: image, name, keywords, caption (both), language, code, first (code point), flag.
    """

    kind: Literal["emoji"] = "emoji"
    languages: Annotated[tuple[EmojiLanguage, ...], Field(min_length=1)] = ("en",)
    flags: Literal["all", "none", "only"] = "all"
    """The flags of countries are many, and alike."""

    @field_validator("languages")
    @classmethod
    def _once(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(languages)) < len(languages):
            raise ValueError("a language stands twice")
        return languages

    def build(self) -> Reader:
        from nearfield.data.readers.emoji import Emoji

        return Emoji(self.languages, self.flags)


class OpenClipartReader(PictureReader):
    """Drawings of the Open Clip Art Library with title and tags, built on demand from Debian's packages (156 MB).

    Columns: image, title, tags, caption (both), folder, file.
    """

    kind: Literal["openclipart"] = "openclipart"
    cache: ConfigPath | None = None

    def build(self) -> Reader:
        from nearfield.data.readers.openclipart import OpenClipart

        return OpenClipart(self.cache)


class ImageFolderReader(PictureReader):
    """Pictures in a folder and below, with captions: a .txt beside each, or a table that names the files.

    Columns: image, text (of the .txt), texts (its lines), file, folder (the first one below ``path``: often a class).
    With a table: image, and its columns.
    """

    kind: Literal["image_folder"] = "image_folder"
    path: ConfigPath
    captions: ConfigPath | None = None
    """A CSV, JSONL or Parquet file (or a folder of them); null for .txt files."""
    file_column: Annotated[str, Field(min_length=1)] = "file_name"
    """The column of the table that holds paths below ``path``."""

    def build(self) -> Reader:
        from nearfield.data.readers.image_folder import CaptionTable, ImageFolder

        if self.captions is None:
            return ImageFolder(self.path)
        return CaptionTable(self.path, self.captions, self.file_column)


class WebDatasetReader(PictureReader):
    """WebDataset shards: tar files (.gz, .xz, .zst unpacked on the way) whose members of one key are a sample.

    Columns: image, text (.txt), cls (.cls), key, and the keys of the sample's .json. Nothing is unpacked to disk.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: ConfigPath

    def build(self) -> Reader:
        from nearfield.data.readers.webdataset import WebDataset

        return WebDataset(self.path)


class MmebReader(PictureReader):
    """MMEB's training format: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path.

    Columns: query, positives, negatives (items of text, picture or both), and those of the file. The mark ``<|image_1|>``
    becomes ``<image>``; an item without a picture has none.
    """

    kind: Literal["mmeb"] = "mmeb"
    path: ConfigPath
    """JSONL, CSV or Parquet: a file, or a folder of them."""
    image_folder: ConfigPath
    """Where the paths of pictures start."""

    def build(self) -> Reader:
        from nearfield.data.readers.interleaved import Mmeb

        return Mmeb(self.path, self.image_folder)


class ImageTripletsReader(PictureReader):
    """A picture and an instruction ask for another picture, as in MegaPairs; one row an instruction.

    Columns: query (picture and text), positives, negatives, and those of the file.
    """

    kind: Literal["image_triplets"] = "image_triplets"
    path: ConfigPath
    image_folder: ConfigPath
    query_image: Annotated[str, Field(min_length=1)] = "q_img"
    query_text: Annotated[str, Field(min_length=1)] = "q_text"
    """A string or a list of them."""
    target_image: Annotated[str, Field(min_length=1)] = "t_img"
    negative_images: Annotated[str, Field(min_length=1)] | None = "hns"
    """A path or a list of them; null for none."""

    def build(self) -> Reader:
        from nearfield.data.readers.interleaved import ImageTriplets

        columns = (self.query_image, self.query_text, self.target_image, self.negative_images)
        return ImageTriplets(self.path, self.image_folder, *columns)
