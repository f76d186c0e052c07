"""How training texts are compared with the texts of benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.data.near import NearRule

Share = Annotated[float, Field(gt=0, le=1)]


class NearDuplicateConfig(Config):
    """When two texts are near-duplicates by their words (:class:`nearfield.data.near.NearRule`)."""

    jaccard: Annotated[float, Field(ge=0.7, le=1)] = 0.85
    """Shared different words, as a share of all different words of the two."""
    contained: Annotated[float, Field(ge=0.7, le=1)] = 0.75
    """The same where one text has all words of the other."""
    min_words: Annotated[int, Field(ge=1)] = 4
    """Shorter texts are no near-duplicates; their normal form tells them apart."""
    min_characters: Annotated[int, Field(ge=1)] = 12

    def rule(self) -> NearRule:
        """The rule that these settings describe."""
        from nearfield.data.near import NearRule

        return NearRule(self.jaccard, self.contained, self.min_words, self.min_characters)


class DecontaminationConfig(NearDuplicateConfig):
    """Which texts count as the same. Exact and normalised matches are always looked for."""

    ngram: Annotated[int, Field(ge=5)] = 13
    """Length of the word sequences that two texts may share."""
    ngram_share: Share = 0.5
    """Texts match that share at least this much of the sequences of the one that has fewer."""
    common: Annotated[int, Field(ge=1)] = 1000
    """A sequence in more training texts than this is boilerplate and does not count."""
    cosine: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Texts match whose embeddings have at least this cosine, where an encoder is given."""
