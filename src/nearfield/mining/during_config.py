"""Settings of negatives that change while a model trains; ``kind`` picks one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config

Positive = Annotated[int, Field(ge=1)]


class ScheduledNegatives(Config):
    """From easy to hard: a window over each example's mined candidates moves along their ranks, with the steps.

    At the first step negatives are taken from rank ``start`` on, at the share ``over`` of all steps and after it from rank
    ``end`` on; between them the rank goes in a straight line. Ranks count from 0, the hardest; lists that are too short give
    their last ones.
    """

    kind: Literal["scheduled"] = "scheduled"
    start: Annotated[int, Field(ge=0)] = 20
    end: Annotated[int, Field(ge=0)] = 0
    over: Annotated[float, Field(gt=0, le=1)] = 1.0

    def least(self, wanted: int) -> int:
        """Candidates without which nothing would change, where batches take ``wanted``."""
        return wanted + 1


class DynamicNegatives(Config):
    """Negatives that the model no longer finds hard give way to the next of the mined candidates.

    ``conan_v1`` (Conan-embedding, arXiv 2408.15710): an example has a block of n candidates, at first those of ranks 0 to
    n - 1. Every ``check_every`` steps it is replaced if ``ratio`` x its mean score now is below its mean score when it was
    first used, and the size of its mean score now is below ``ceiling``; the i-th block after the first is of the n candidates
    from rank ``skip`` + (i - 1) n on. ``conan_v2`` (Conan-embedding-v2): a single negative that scores below ``below`` gives
    way to the next unused candidate when its example comes next. Scores are cosines of the model in training. An example
    whose candidates are used up keeps the negatives that it has.
    """

    kind: Literal["dynamic"] = "dynamic"
    rule: Literal["conan_v1", "conan_v2"] = "conan_v1"
    check_every: Positive = 100
    ratio: Annotated[float, Field(ge=1)] = 1.15
    ceiling: Annotated[float, Field(gt=0)] = 0.8
    skip: Annotated[int, Field(ge=0)] = 10
    below: Annotated[float, Field(ge=-1, le=1)] = 0.4

    def least(self, wanted: int) -> int:
        """Candidates without which nothing would change, where batches take ``wanted``."""
        return self.skip + wanted if self.rule == "conan_v1" else wanted + 1


class RefreshedNegatives(Config):
    """Negatives mined anew from the weights in training (as ANCE does, arXiv 2007.00808; there beside the training).

    Every ``every_steps`` steps, or ``every_epochs`` epochs, training stops while all ranks encode queries and documents, search
    exactly and apply the mining rules. A pool has a generation number; the negatives of a step are all of one generation.
    """

    kind: Literal["refresh"] = "refresh"
    every_steps: Positive | None = None
    every_epochs: Positive | None = None

    def least(self, wanted: int) -> int:
        """Candidates without which batches would lack some."""
        return wanted

    @model_validator(mode="after")
    def _one_rhythm(self) -> Self:
        if (self.every_steps is None) == (self.every_epochs is None):
            raise ValueError("give every_steps or every_epochs, one of the two")
        return self


DuringConfig = Annotated[ScheduledNegatives | DynamicNegatives | RefreshedNegatives, Field(discriminator="kind")]
