"""Cleaning steps: what is taken out of a store while it is built, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath
from nearfield.data.decontamination_config import NearDuplicateConfig

if TYPE_CHECKING:
    from nearfield.data.cleaning.step import Step

Side = Literal["query", "positives", "negatives"]
Sides = Annotated[tuple[Side, ...], Field(min_length=1)]
EVERY_SIDE: tuple[Side, ...] = ("query", "positives", "negatives")
Share = Annotated[float, Field(ge=0, le=1)]


class StepBase(Config):
    """What every step's settings have."""

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        return {}

    def build(self) -> Step:
        """The step."""
        raise NotImplementedError


class LengthStep(StepBase):
    """Texts that are too short or too long. Without bounds nothing is."""

    kind: Literal["length"] = "length"
    unit: Literal["characters", "words"] = "words"
    """Words are what white space separates."""
    least: Annotated[int, Field(ge=0)] = 0
    most: Annotated[int, Field(ge=1)] | None = None
    sides: Sides = EVERY_SIDE

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError("'most' is below 'least': no text would stay")
        return self

    def build(self) -> Step:
        from nearfield.data.cleaning.texts import LengthFilter

        return LengthFilter(self)


class CharactersStep(StepBase):
    """Texts with too few letters or printable characters, or too much of URLs or control characters, as shares.

    The defaults take nothing out.
    """

    kind: Literal["characters"] = "characters"
    min_letters: Share = 0
    """Letters, marks and digits among the characters that are no white space."""
    min_printable: Share = 0
    """Of all characters; white space is printable here."""
    max_urls: Share = 1
    """Characters inside URLs, of all."""
    max_control: Share = 1
    """Control and format characters other than tab and line break, unassigned and private ones, and U+FFFD; of all."""
    sides: Sides = EVERY_SIDE

    def build(self) -> Step:
        from nearfield.data.cleaning.texts import CharactersFilter

        return CharactersFilter(self)


class LanguageStep(StepBase):
    """Texts in none of the languages, by py3langid: offline, 140 languages. Without languages nothing is taken out.

    Only what is surely in another language goes: short texts are hard to tell.
    """

    kind: Literal["language"] = "language"
    languages: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = ()
    """ISO 639-1 codes, e.g. ``en``; ISO 639-2 where a language has none."""
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.9
    """A text goes if another language has at least this probability."""
    min_characters: Annotated[int, Field(ge=1)] = 20
    """Shorter texts stay."""
    sides: Sides = EVERY_SIDE

    def build(self) -> Step:
        from nearfield.data.cleaning.texts import LanguageFilter

        return LanguageFilter(self)


class _Duplicates(StepBase):
    compare: Literal["example", "query", "positives"] = "example"
    """Which texts must be near-duplicates for two examples to be: all but the negatives, or those of one side."""
    keep: tuple[str, ...] = ()
    """Splits whose examples stay before those of others, e.g. ``[test, validation]``."""


class NearDuplicatesStep(NearDuplicateConfig, _Duplicates):
    """Examples whose texts are near-duplicates, by their words, of an earlier example's, which stays.

    Found by MinHash and checked by :class:`nearfield.data.near.NearRule`; texts with one normal form are near-duplicates,
    too. With ``words: false`` and ``normalised: false`` nothing is.
    """

    kind: Literal["near_duplicates"] = "near_duplicates"
    words: bool = True
    normalised: bool = True

    def build(self) -> Step:
        from nearfield.data.cleaning.duplicates import NearDuplicates

        return NearDuplicates(self)


class NearVectorsStep(_Duplicates):
    """The same by embeddings: texts whose vectors have at least this cosine. Null takes nothing out."""

    kind: Literal["near_vectors"] = "near_vectors"
    model: str
    """A sentence-transformers model: a hub id, or a folder."""
    cosine: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter texts are no near-duplicates."""

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        from nearfield.files import hash_folder
        from nearfield.provenance import hub_commit

        if Path(self.model).is_dir():
            return {"model": hash_folder(Path(self.model))}
        commit = hub_commit(self.model, None)
        return {} if commit is None else {"model": commit}

    def build(self) -> Step:
        from nearfield.data.cleaning.duplicates import NearVectors

        return NearVectors(self)


class RemovalListStep(StepBase):
    """Texts named by a file: JSONL with an ``id`` a line, as ``nearfield data decontaminate --remove`` writes it.

    An example goes with its query or its last positive; a negative goes alone.
    """

    kind: Literal["removal_list"] = "removal_list"
    path: ConfigPath
    sides: Sides = EVERY_SIDE

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        from nearfield.data.readers.base import hash_files

        return {"path": list(hash_files([self.path]).values())}

    def build(self) -> Step:
        from nearfield.data.cleaning.texts import RemovalList

        return RemovalList(self)


class PictureSizeStep(StepBase):
    """Pictures whose files are too small, or much longer than wide. The defaults take nothing out.

    ALIGN keeps a shorter side of more than 200 pixels and sides of less than 3 to 1.
    """

    kind: Literal["picture_size"] = "picture_size"
    min_side: Annotated[int, Field(ge=0)] = 0
    """Of the shorter side, in pixels of the file."""
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longer to shorter side; one that is exactly this stays."""
    sides: Sides = EVERY_SIDE

    def build(self) -> Step:
        from nearfield.data.cleaning.pictures import PictureSize

        return PictureSize(self)


class SharedStep(StepBase):
    """Pictures with too many different texts, and texts of too many different pictures. Null takes nothing out.

    A pair is a query and a positive of which one has a picture and the other has none. Run it before anything is drawn from
    the data. ALIGN's bounds are 1,000 and 10.
    """

    kind: Literal["shared"] = "shared"
    texts_per_picture: Annotated[int, Field(ge=1)] | None = None
    pictures_per_text: Annotated[int, Field(ge=1)] | None = None

    def build(self) -> Step:
        from nearfield.data.cleaning.pictures import Shared

        return Shared(self)


class RareWordsStep(StepBase):
    """Texts with a word, or two words side by side, that the data set hardly has. The defaults take nothing out."""

    kind: Literal["rare_words"] = "rare_words"
    vocabulary: Annotated[int, Field(ge=1)] | None = None
    """So many of the most frequent words and pairs are known, and those as frequent as the last; ALIGN's are 100 million."""
    least: Annotated[int, Field(ge=1)] = 1
    """A word or pair is known if it occurs so often in the examples."""
    sides: Sides = ("query", "positives")

    def build(self) -> Step:
        from nearfield.data.cleaning.pictures import RareWords

        return RareWords(self)


class NearPicturesStep(_Duplicates):
    """Examples whose pictures look like an earlier example's, by a difference hash of 64 bits and by colour.

    With ``compare: query`` or ``positives`` the pictures of that side alone count; ``keep: [test]`` takes copies of test
    pictures out of training. Pictures that are one item with a text are not compared.
    """

    kind: Literal["near_pictures"] = "near_pictures"
    bits: Annotated[int, Field(ge=0, le=16)] | None = 3
    """Bits of the hash that may differ; null takes nothing out."""
    tolerance: Annotated[float, Field(ge=0, le=255)] = 8
    """Mean difference of the pictures at 8 x 8 pixels, of 255."""

    def build(self) -> Step:
        from nearfield.data.cleaning.pictures import NearPictures

        return NearPictures(self)


StepConfig = Annotated[
    LengthStep
    | CharactersStep
    | LanguageStep
    | NearDuplicatesStep
    | NearVectorsStep
    | RemovalListStep
    | PictureSizeStep
    | SharedStep
    | RareWordsStep
    | NearPicturesStep,
    Field(discriminator="kind"),
]
