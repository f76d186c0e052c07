"""Settings of objectives that learn from labels, beside :class:`~nearfield.objectives.kinds.SupConConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from nearfield.errors import BadInputError
from nearfield.objectives.config import NotNegative, ObjectiveSettings, Positive, Reading, Surroundings

if TYPE_CHECKING:
    from nearfield.objectives.gates import SimLAP
    from nearfield.objectives.hierarchy import HiPrBERT
    from nearfield.objectives.subclass_balancing import SBCL

Names = Mapping[int, str] | Sequence[str]


class SBCLConfig(ObjectiveSettings):
    """Subclass-balancing contrastive learning (arXiv 2306.15925) of labels that are ``class/subclass``; each text is encoded
    twice with other dropout."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["sbcl"] = "sbcl"
    temperature: Positive = 0.1
    base_temperature: Positive = 0.07
    """The fine part counts temperature / base_temperature."""
    gamma: NotNegative = 0.25
    """What the coarse part counts."""
    class_temperatures: bool = True
    """Whether the coarse part has a temperature for each class, by how wide it lies."""

    @property
    def reading(self) -> Reading:
        return Reading(views=2)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SBCL:
        from nearfield.objectives.hierarchy import Tree
        from nearfield.objectives.subclass_balancing import SBCL

        return SBCL(self, Tree.of(*_labels(around)))


class HiPrBERTConfig(ObjectiveSettings):
    """Similarity by distance in a tree of labels, whose paths the data give (``animal/dog/poodle``); a working form of ours of
    HiPrBERT (arXiv 2307.00266)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["hiprbert"] = "hiprbert"
    thresholds: Annotated[tuple[float, ...], Field(min_length=1)] = (0.7, 0.5, 0.3)
    """Of level 0 (the same label), 1 (siblings), 2 (cousins) ...: what pairs at most so far apart shall be more similar than,
    and all others less."""
    weights: tuple[NotNegative, ...] | None = None
    """What each level counts; null counts each 1."""
    alpha: Positive = 2.0
    beta: Positive = 50.0

    @model_validator(mode="after")
    def _fits_together(self) -> HiPrBERTConfig:
        if self.weights is not None and len(self.weights) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds have {len(self.weights)} weights")
        if any(a <= b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError("thresholds must fall from level to level, or the tree collapses")
        return self

    def build(self, sources: Names = (), around: Surroundings | None = None) -> HiPrBERT:
        from nearfield.objectives.hierarchy import HiPrBERT, Tree

        return HiPrBERT(self, Tree.of(*_labels(around)))


class SimLAPConfig(ObjectiveSettings):
    """Texts of different labels as positives in a learnt subspace of the two labels (Hydra, SimLAP; arXiv 2410.18200)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["simlap"] = "simlap"
    temperature: Positive = 0.1
    partner: Literal["arbitrary", "identical", "distinct"] = "arbitrary"
    """A text's other label: of a drawn text of the batch, its own, or another one drawn evenly."""
    label_width: Annotated[int, Field(gt=0)] = 512
    hidden: Annotated[int, Field(gt=0)] = 1024
    """Width of the gate's inner layer."""
    project: Annotated[int, Field(ge=0)] = 256
    """Width of a head between embeddings and loss, which is no part of the saved model; 0 for none."""
    project_hidden: Annotated[int, Field(gt=0)] = 2048
    probe: NotNegative = 1.0
    """What the cross-entropy of a linear map from embeddings to labels counts."""
    probe_detached: bool = True
    """Whether the embeddings get no gradient from it."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SimLAP:
        from nearfield.objectives.gates import SimLAP

        around = around or Surroundings()
        if not around.labels or around.width is None:
            raise BadInputError("gates want labels, and the width of embeddings", where="objective")
        return SimLAP(self, around.labels, around.width)


def _labels(around: Surroundings | None) -> tuple[Sequence[tuple[str, str]], int]:
    around = around or Surroundings()
    if not around.labels:
        raise BadInputError("this objective wants to know the labels of the data", where="objective")
    return around.label_names, around.labels
