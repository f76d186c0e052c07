"""Settings of the objectives; ``kind`` picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nearfield.config import Config

if TYPE_CHECKING:
    from nearfield.objectives.infonce import InfoNCE


class InfoNCEConfig(Config):
    """InfoNCE with in-batch and explicit negatives."""

    example_kind: ClassVar[str] = "retrieval"

    kind: Literal["infonce"] = "infonce"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Similarities are divided by it."""
    similarity: Literal["cosine", "dot"] = "cosine"
    in_batch_negatives: bool = True
    """Whether the documents of other queries are negatives; false leaves a query its own documents only."""
    several_positives: Literal["mean_log", "log_sum"] = "mean_log"
    """``mean_log`` averages one softmax a positive; ``log_sum`` takes the positives' summed probability."""
    both_directions: bool = False
    """Average with the loss of documents that look for their query among all queries."""
    mask_known_positives: bool = True
    """Never use an item as a negative of a query that has it as a positive anywhere in the data."""

    def build(self) -> InfoNCE:
        """The objective."""
        from nearfield.objectives.infonce import InfoNCE

        return InfoNCE(self)


ObjectiveConfig = InfoNCEConfig
"""The union of all objectives' settings, discriminated by ``kind``."""
