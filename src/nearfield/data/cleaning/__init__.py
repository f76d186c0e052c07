"""Cleaning: steps take examples and texts out of a store while it is built, each counted and written down.

Settings and code of a step are one class (:mod:`.steps`); :mod:`.run` applies those of a recipe to a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from nearfield.config import Config, Kinds, KindSettings

if TYPE_CHECKING:
    from nearfield.data.cleaning.run import Encoders, ExampleTable, Taken

Side = Literal["query", "positives", "negatives"]
Sides = Annotated[tuple[Side, ...], Field(min_length=1)]


class StepBase(KindSettings):
    """The base of every cleaning step."""

    def inputs(self) -> dict[str, Any]:
        """The content of files that the step reads."""
        return {}

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out of the examples of the sources what should go, and write it down."""
        raise NotImplementedError


class SidesStep(StepBase):
    """The base of steps that look at some sides of an example."""

    sides: Sides = ("query", "positives", "negatives")
    """The sides that are looked at. An example goes with its query or its last positive; a negative goes alone."""


_HERE = "nearfield.data.cleaning"
_STEPS = f"{_HERE}.steps"
STEPS = Kinds(
    "cleaning",
    f"{_HERE}:StepBase",
    {
        "length": (f"{_STEPS}:LengthStep", "texts that are too short or too long"),
        "characters": (
            f"{_STEPS}:CharactersStep",
            "texts with too few letters, or too many URLs or control characters",
        ),
        "language": (f"{_STEPS}:LanguageStep", "texts in other languages"),
        "near_duplicates": (
            f"{_STEPS}:NearDuplicatesStep",
            "examples that repeat the words of an earlier one",
        ),
        "near_vectors": (
            f"{_STEPS}:NearVectorsStep",
            "examples that repeat an earlier one by their embeddings",
        ),
        "removal_list": (f"{_STEPS}:RemovalListStep", "texts that a file names"),
        "picture_size": (f"{_STEPS}:ImageSizeStep", "images that are too small or too long"),
        "shared": (f"{_STEPS}:SharedStep", "images with too many texts, texts of too many images"),
        "rare_words": (f"{_STEPS}:RareWordsStep", "texts with words that the data hardly has"),
        "near_pictures": (f"{_STEPS}:NearImagesStep", "examples whose images look like an earlier one's"),
    },
)


class NearDuplicateConfig(Config):
    """The rule by which two texts are near-duplicates by their words (:func:`nearfield.data.near_duplicates.words`, each once).

    They are if the shared words are at least ``jaccard`` of all their words; or if one has all words of the other and
    that has at least ``contained`` of them, so that a text with a few words left out is found but not one in which words
    were exchanged. Texts with fewer words or letters than the least are told apart by their normal form alone.
    """

    jaccard: Annotated[float, Field(ge=0.7, le=1)] = 0.85
    """Shared different words, as a share of all different words of the two."""
    contained: Annotated[float, Field(ge=0.7, le=1)] = 0.75
    """The same where one text has all words of the other."""
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter texts are no near-duplicates; their normal form tells them apart."""
    min_characters: Annotated[int, Field(ge=1)] = 12
    """The same for characters."""
