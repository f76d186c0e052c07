"""Settings of objectives that learn from more than embeddings: tokens, or features of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nearfield.errors import BadInputError
from nearfield.objectives.config import ANY_EXAMPLES, NotNegative, ObjectiveSettings, Positive, Reading, Surroundings

if TYPE_CHECKING:
    from nearfield.objectives.class_aware import CAROL
    from nearfield.objectives.grounding import MCSE
    from nearfield.objectives.mutual_information import CMIM

Names = Mapping[int, str] | Sequence[str]
Share = Annotated[float, Field(ge=0, le=1)]


class MCSEConfig(ObjectiveSettings):
    """SimCSE with captions that are grounded in the given features of their pictures (MCSE, arXiv 2204.10931)."""

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    kind: Literal["mcse"] = "mcse"
    temperature: Positive = 0.05
    image_temperature: Positive = 0.05
    weight: NotNegative = 0.01
    """What grounding counts."""
    projection: Annotated[int, Field(gt=0)] = 256
    """Width of the heads of texts, captions and pictures; none is part of the saved model."""
    captions: tuple[str, ...] | None = None
    """Sources whose queries are captions; null takes every text with features that are not all 0."""

    @property
    def reading(self) -> Reading:
        return Reading(views=2)

    @property
    def needs_guide(self) -> bool:
        return True

    @property
    def names_sources(self) -> bool:
        return self.captions is not None

    def build(self, sources: Names = (), around: Surroundings | None = None) -> MCSE:
        from nearfield.objectives.grounding import MCSE

        around = around or Surroundings()
        if around.width is None or around.guide_width is None:
            raise BadInputError("grounding wants the widths of embeddings and of pictures' features", where="objective")
        named = dict(sources) if isinstance(sources, Mapping) else dict(enumerate(sources))
        return MCSE(self, named, around.width, around.guide_width)


class CMIMConfig(ObjectiveSettings):
    """Contrastive mutual information machine (arXiv 2509.21511): the queries of any examples, each once."""

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    kind: Literal["cmim"] = "cmim"
    temperature: Positive = 0.1
    weight: NotNegative = 1.0
    """What the contrastive part counts; 0 leaves MIM."""
    deviation: Positive = 0.1
    """Of the latents around their embedding at the start, the same in each dimension; it is learnt."""
    inner: Annotated[int, Field(gt=0)] = 256
    """Width of the decoder, which is no part of the saved model."""

    @property
    def reading(self) -> Reading:
        return Reading(views=1)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CMIM:
        from nearfield.objectives.mutual_information import CMIM

        return CMIM(self, *_for_decoder(around))


class CAROLConfig(ObjectiveSettings):
    """A denoising autoencoder beside supervised contrast, in a working form of ours of CAROL (arXiv 2410.22197)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["carol"] = "carol"
    reconstruction: Share = 0.5
    """The share of the reconstruction in the loss; the contrast has the rest."""
    temperature: Positive = 0.1
    class_weights: Literal["none", "inverse"] = "inverse"
    delete: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """The share of tokens that are left out of each text when it is encoded."""
    inner: Annotated[int, Field(gt=0)] = 256
    """Width of the decoder, which is no part of the saved model."""

    @property
    def reading(self) -> Reading:
        return Reading(deleted=self.delete)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CAROL:
        from nearfield.objectives.class_aware import CAROL

        return CAROL(self, *_for_decoder(around))


def _for_decoder(around: Surroundings | None) -> tuple[int, int]:
    """Width of embeddings, and tokens of the vocabulary."""
    around = around or Surroundings()
    if around.width is None or not around.vocabulary:
        raise BadInputError("a decoder wants the width of embeddings and the encoder's vocabulary", where="objective")
    return around.width, around.vocabulary
