"""Settings of the objectives beside InfoNCE, and the union of all; ``kind`` picks one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config
from nearfield.encoders.config import TokenTaskConfig
from nearfield.errors import BadInputError
from nearfield.objectives.config import (
    ANY_EXAMPLES,
    OBJECTIVES,
    InfoNCEConfig,
    NotNegative,
    ObjectiveSettings,
    Positive,
    Reading,
    Surroundings,
    compared_as,
)

if TYPE_CHECKING:
    from nearfield.objectives.combined import Combined
    from nearfield.objectives.distillation import EmbeddingDistillation, ScoreDistillation
    from nearfield.objectives.graded import CosineRegression, Ranking
    from nearfield.objectives.infonce import InfoNCE
    from nearfield.objectives.ntxent import NTXent
    from nearfield.objectives.prototypes import Unicom
    from nearfield.objectives.sigmoid import SigLIP
    from nearfield.objectives.supervised import SupCon
    from nearfield.objectives.token_losses import TokenLosses
    from nearfield.objectives.triplet import Triplet

Names = Mapping[int, str] | Sequence[str]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot", "euclidean", "manhattan")
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, le=1)]


class CoSENTConfig(ObjectiveSettings):
    """Pairs with a higher score shall be more similar than pairs with a lower one, over all pairs of the global batch."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    kind: Literal["cosent"] = "cosent"
    temperature: Positive = 0.05
    """Differences of similarities are divided by it."""
    similarity: Similarity = "cosine"
    """Where it is not said, as the base compares its vectors."""

    def for_model(self, similarity: str) -> Self:
        return compared_as(self, "similarity", similarity, SIMILARITIES)

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset({self.similarity})

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Ranking:
        from nearfield.objectives.graded import Ranking

        return Ranking(self.similarity, self.temperature)


class AngleConfig(ObjectiveSettings):
    """CoSENT of the angle in complex space instead of the cosine (AnglE, arXiv 2309.12871)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    kind: Literal["angle"] = "angle"
    temperature: Positive = 0.05

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Ranking:
        from nearfield.objectives.graded import Ranking

        return Ranking("angle", self.temperature)


class CosineRegressionConfig(ObjectiveSettings):
    """The squared difference of a pair's cosine and its score."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    kind: Literal["cosine_regression"] = "cosine_regression"

    @property
    def score_bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CosineRegression:
        from nearfield.objectives.graded import CosineRegression

        return CosineRegression()


class TripletConfig(ObjectiveSettings):
    """A query shall be nearer to its positive than to its own explicit negative, by a margin."""

    kind: Literal["triplet"] = "triplet"
    distance: Similarity = "cosine"
    """Where it is not said, as the base compares its vectors; ``dot`` is the dot product with its sign turned."""
    margin: NotNegative = 0.2
    """Of euclidean distances of vectors that are not of unit length, 5 is common."""

    def for_model(self, similarity: str) -> Self:
        return compared_as(self, "distance", similarity, SIMILARITIES)

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset({self.distance})

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Triplet:
        from nearfield.objectives.triplet import Triplet

        return Triplet(self.distance, self.margin)


class ScoreDistillationConfig(ObjectiveSettings):
    """The student's scores of documents shall be the teacher's."""

    kind: Literal["distil_scores"] = "distil_scores"
    loss: Literal["kl", "margin_mse"] = "kl"
    """``kl``: of the softmaxes over a query's candidates. ``margin_mse``: the squared difference of score(positive) -
    score(negative)."""
    teacher: Literal["scores", "vectors"] = "scores"
    """``scores``: what the miner's teacher gave to an example's positives and negatives. ``vectors``: similarities of the
    guide's vectors."""
    candidates: Literal["own", "in_batch"] = "own"
    """Of ``kl``: a query's own positives and negatives, or (with ``vectors``) all documents of the global batch."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Where it is not said, ``dot`` for a base that compares its vectors so."""
    temperature: Positive = 0.05
    """Of ``kl``: the student's scores are divided by it."""
    teacher_temperature: Positive | None = None
    """Of ``kl``: the teacher's scores are divided by it; null takes the student's. A cross-encoder's scores want one that
    fits their spread."""

    @model_validator(mode="after")
    def _fits_together(self) -> ScoreDistillationConfig:
        if self.candidates == "in_batch" and (self.teacher == "scores" or self.loss == "margin_mse"):
            raise ValueError("candidates in_batch are scored by vectors (teacher: vectors), with the loss kl")
        return self

    def for_model(self, similarity: str) -> Self:
        return compared_as(self, "similarity", similarity, ("cosine", "dot"))

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset({self.similarity})

    @property
    def needs_guide(self) -> bool:
        return self.teacher == "vectors"

    @property
    def needs_teacher_scores(self) -> bool:
        return self.teacher == "scores"

    def build(self, sources: Names = (), around: Surroundings | None = None) -> ScoreDistillation:
        from nearfield.objectives.distillation import ScoreDistillation

        return ScoreDistillation(self)


class EmbeddingDistillationConfig(ObjectiveSettings):
    """The student's embeddings of queries and documents shall be the guide's vectors, which are of unit length."""

    example_kinds: ClassVar[tuple[str, ...]] = ("retrieval", "graded", "labelled")

    kind: Literal["distil_embeddings"] = "distil_embeddings"
    distance: Literal["mse", "l2", "cosine"] = "mse"
    projection: Literal["auto", "always"] = "auto"
    """A learnt linear map from the student's to the teacher's width: ``auto`` where they differ. It is no part of the model
    that is saved."""

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset()

    @property
    def needs_guide(self) -> bool:
        return True

    def build(self, sources: Names = (), around: Surroundings | None = None) -> EmbeddingDistillation:
        from nearfield.objectives.distillation import EmbeddingDistillation

        around = around or Surroundings()
        return EmbeddingDistillation(self.distance, self.projection == "always", around.width, around.guide_width)


class SupConConfig(ObjectiveSettings):
    """Supervised contrastive loss (Khosla et al. 2020): texts of one label shall be nearer than all others."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["supcon"] = "supcon"
    temperature: Positive = 0.1
    class_weights: Literal["none", "inverse"] = "none"
    """``inverse``: an anchor counts one over the texts of its label in the batch, scaled to a mean of 1, so that labels count
    alike (the contrastive part of CAROL, arXiv 2410.22197, in a working form of ours)."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SupCon:
        from nearfield.objectives.supervised import SupCon

        return SupCon(self.temperature, self.class_weights == "inverse")


class SigLIPConfig(ObjectiveSettings):
    """A binary decision for each query and document: whether they belong together (SigLIP, arXiv 2303.15343)."""

    kind: Literal["siglip"] = "siglip"
    temperature: Positive = 0.1
    """Of the start; it is learnt."""
    bias: float = -10.0
    """Of the start; it is learnt: most pairs do not belong together."""
    mask_known_positives: bool = True
    """Leave out pairs that are known to belong together, beside the batch's own."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SigLIP:
        from nearfield.objectives.sigmoid import SigLIP

        return SigLIP(self)


class UnicomConfig(ObjectiveSettings):
    """A softmax over learnt prototypes of the labels, a part of them and of the features a step (Unicom, arXiv 2304.05884)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["unicom"] = "unicom"
    scale: Positive = 32.0
    """What cosines are multiplied by."""
    margin: Annotated[float, Field(ge=0, lt=1.57)] = 0.3
    """By which the angle to the own prototype is widened, in radians."""
    classes: Part = 1.0
    """The share of the prototypes that a step takes; those of the batch always."""
    features: Part = 1.0
    """The share of the dimensions that a step compares."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Unicom:
        from nearfield.objectives.prototypes import Unicom

        around = around or Surroundings()
        if not around.labels or around.width is None:
            raise BadInputError("prototypes want labels, and the width of embeddings", where="objective")
        return Unicom(self, around.labels, around.width)


class NTXentConfig(ObjectiveSettings):
    """Each query and the mean of its positives' embeddings against all others of the batch, both ways (DeCLUTR, arXiv
    2006.03659)."""

    kind: Literal["ntxent"] = "ntxent"
    temperature: Positive = 0.05

    def build(self, sources: Names = (), around: Surroundings | None = None) -> NTXent:
        from nearfield.objectives.ntxent import NTXent

        return NTXent(self.temperature)


class SimCSEConfig(ObjectiveSettings):
    """A text encoded twice, with other dropout, against the batch's other texts (SimCSE, arXiv 2104.08821).

    The queries of any examples (the first of a pair, a labelled text) are the texts; what else an example has is not used.
    """

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    kind: Literal["simcse"] = "simcse"
    temperature: Positive = 0.05
    similarity: Literal["cosine", "dot"] = "cosine"
    """Where it is not said, ``dot`` for a base that compares its vectors so."""

    def for_model(self, similarity: str) -> Self:
        return compared_as(self, "similarity", similarity, ("cosine", "dot"))

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset({self.similarity})

    @property
    def reading(self) -> Reading:
        return Reading(views=2)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> InfoNCE:
        return InfoNCEConfig(temperature=self.temperature, similarity=self.similarity).build()


class MaskedTokensConfig(TokenTaskConfig, ObjectiveSettings):
    """Hidden tokens of texts shall be told, before embeddings are trained: masked words, MNTP, or with a decoder RetroMAE.

    The queries of any examples are the texts; alone in a batch, what else an example has is not used.
    """

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    kind: Literal["masked_tokens"] = "masked_tokens"

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset()

    @property
    def reading(self) -> Reading:
        return Reading(views=1)

    @property
    def token_task(self) -> TokenTaskConfig:
        return self

    @property
    def summary(self) -> str:
        decoder = "" if self.decoder is None else f", a decoder that does not see {self.decoder.share:g}"
        return f"masked_tokens, {self.predict}, {self.share:g} of the tokens{decoder}"

    def build(self, sources: Names = (), around: Surroundings | None = None) -> TokenLosses:
        from nearfield.objectives.token_losses import TokenLosses

        return TokenLosses([1.0] if self.decoder is None else [1.0, self.decoder.weight])


class PartConfig(Config):
    """One of several objectives: its sources, and its weight over the run."""

    objective: Annotated[ObjectiveSettings, OBJECTIVES.without("combined")]
    name: str | None = None
    """What figures call it; null takes the objective's kind."""
    sources: tuple[str, ...] | None = None
    """Whose examples it learns from; null takes all that it can."""
    each_source: bool = False
    """Whether the examples of each source are contrasted among themselves, and the losses of all sources added."""
    weight: NotNegative = 1.0
    """What the mean loss of its examples is multiplied by."""
    final_weight: NotNegative | None = None
    """The weight at the end; null keeps it."""
    begin: Share = 0.0
    end: Share = 1.0
    """Shares of the run between which the weight goes evenly from the one to the other; equal ones switch."""

    @model_validator(mode="after")
    def _in_order(self) -> PartConfig:
        if self.begin > self.end:
            raise ValueError(f"begin {self.begin:g} is after end {self.end:g}")
        return self

    def takes(self, source: str, kind: str) -> bool:
        """Whether it learns from a source whose examples are of this kind."""
        return kind in self.objective.learns_from if self.sources is None else source in self.sources

    def weight_at(self, progress: float) -> float:
        """The weight when this share of the run is done."""
        if self.final_weight is None or progress < self.begin:
            return self.weight
        if progress >= self.end:
            return self.final_weight
        share = (progress - self.begin) / (self.end - self.begin)
        return self.weight + share * (self.final_weight - self.weight)


class CombinedConfig(ObjectiveSettings):
    """A weighted sum of objectives, each of the mean loss of its sources' examples in the batch."""

    kind: Literal["combined"] = "combined"
    parts: Annotated[tuple[PartConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_task_on_tokens(self) -> CombinedConfig:
        if sum(part.objective.token_task is not None for part in self.parts) > 1:
            raise ValueError("only one part can be masked_tokens: a text is read with one set of hidden tokens")
        return self

    def for_model(self, similarity: str) -> Self:
        parts = [part.model_copy(update={"objective": part.objective.for_model(similarity)}) for part in self.parts]
        return self.model_copy(update={"parts": tuple(parts)})

    @property
    def comparisons(self) -> frozenset[str]:
        return frozenset().union(*(part.objective.comparisons for part in self.parts))

    @property
    def token_task(self) -> TokenTaskConfig | None:
        return next((part.objective.token_task for part in self.parts if part.objective.token_task is not None), None)

    @property
    def learns_from(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for part in self.parts for kind in part.objective.learns_from))

    def of_source(self, source: str, kind: str) -> Sequence[ObjectiveSettings]:
        return [part.objective for part in self.parts if part.takes(source, kind)]

    def readings(self, kinds: Mapping[str, str]) -> dict[str, Reading]:
        found = {}
        for name, kind in kinds.items():
            parts = [part.objective for part in self.parts if part.takes(name, kind)]
            # Losses on tokens are of the queries, however the other parts read the rest.
            ways = {part.reading for part in parts if part.token_task is None} or {part.reading for part in parts}
            if len(ways) > 1:
                listed = " and ".join(dict.fromkeys(part.kind for part in parts if part.token_task is None))
                raise BadInputError(
                    f"{listed} do not read the texts of the source {name!r} alike (each query's documents or its own second"
                    " view, with or without tokens deleted)",
                    where="objective.parts",
                    hint="Give each part its 'sources', or make one of them a stage of its own.",
                )
            found[name] = ways.pop() if ways else Reading()
        return found

    @property
    def needs_guide(self) -> bool:
        return any(part.objective.needs_guide for part in self.parts)

    @property
    def needs_teacher_scores(self) -> bool:
        return any(part.objective.needs_teacher_scores for part in self.parts)

    @property
    def names_sources(self) -> bool:
        return True

    @property
    def summary(self) -> str:
        return "; ".join(part.objective.summary for part in self.parts)

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Combined:
        from nearfield.objectives.combined import Combined

        return Combined(self, dict(sources) if isinstance(sources, Mapping) else dict(enumerate(sources)), around)
