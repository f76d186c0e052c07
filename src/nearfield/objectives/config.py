"""Settings of the objectives; ``kind`` picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.objectives.infonce import InfoNCE


class InfoNCEConfig(Config):
    """InfoNCE with in-batch and explicit negatives."""

    example_kind: ClassVar[str] = "retrieval"

    kind: Literal["infonce"] = "infonce"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Similarities are divided by it."""
    learn_temperature: bool = False
    """Learn the temperature's logarithm, from ``temperature`` on; it is not decayed."""
    temperature_bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.01, 1.0)
    """Least and greatest value of a temperature that is learnt."""
    similarity: Literal["cosine", "dot"] = "cosine"
    in_batch_negatives: bool = True
    """Whether the documents of other queries are negatives; false leaves a query its own documents only."""
    several_positives: Literal["mean_log", "log_sum"] = "mean_log"
    """``mean_log`` averages one softmax a positive; ``log_sum`` takes the positives' summed probability."""
    both_directions: bool = False
    """Average with the loss of documents that look for their query among all queries."""
    mask_known_positives: bool = True
    """Never use an item as a negative of a query that has it as a positive anywhere in the data."""

    @model_validator(mode="after")
    def _bounds_hold_the_temperature(self) -> InfoNCEConfig:
        low, high = self.temperature_bounds
        if self.learn_temperature and not low <= self.temperature <= high:
            raise ValueError(f"temperature {self.temperature:g} is not within temperature_bounds [{low:g}, {high:g}]")
        return self

    def build(self) -> InfoNCE:
        """The objective."""
        from nearfield.objectives.infonce import InfoNCE

        return InfoNCE(self)


ObjectiveConfig = InfoNCEConfig
"""The union of all objectives' settings, discriminated by ``kind``."""
