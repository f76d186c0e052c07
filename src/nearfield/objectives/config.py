"""Settings of the objectives; ``kind`` picks one. Those of methods that an ordinary run does not need are in ``nearfield.methods``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from nearfield.config import Config, Kinds, KindSettings, NotNegative, Positive, Share
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.encoders.packing import MakeTokenTask
    from nearfield.objectives.batch import Objective
    from nearfield.objectives.infonce import InfoNCE
    from nearfield.objectives.losses import (
        Combined,
        CosineRegression,
        EmbeddingDistillation,
        Ranking,
        ScoreDistillation,
        SigLIP,
        SupCon,
        Triplet,
    )


Part = Annotated[float, Field(gt=0, le=1)]
Names = Mapping[int, str] | Sequence[str]
"""The name of each source by its number."""


def by_number(sources: Names) -> dict[int, str]:
    """The name of each source by its number, as a dictionary."""
    return dict(sources) if isinstance(sources, Mapping) else dict(enumerate(sources))


Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot", "euclidean", "manhattan")
ANY_EXAMPLES = ("retrieval", "graded", "labelled", "text")
Direction = Literal["query_document", "query_query", "document_query", "document_document"]


class ScoreMaskConfig(Config):
    """Candidates that score too well to be true negatives are left out."""

    rule: Literal["absolute", "relative", "cut"] = "absolute"
    """A candidate is left out above: ``absolute`` the positive's score + margin; ``relative`` the positive's score +
    margin x its size; ``cut`` the margin itself. Ties are kept."""
    margin: float = 0.0
    """Qwen3-Embedding: absolute 0.1. RzenEmbed's 95 %: relative -0.05. GISTEmbed: absolute 0 on the guide's scores."""


class HardnessConfig(Config):
    """Negatives count exp(alpha x score) times (LLaVE, arXiv 2503.04812)."""

    alpha: NotNegative
    """LLaVE and RzenEmbed: 9; EmbeddingGemma: 5 on explicit negatives. Not divided by the temperature."""
    on: Literal["in_batch", "explicit", "all"] = "all"
    """The documents that it counts for: those of other queries, the query's own explicit negatives, or both."""
    detach: bool = True
    """Whether the weight is a constant for the gradient."""


class FocalConfig(Config):
    """Each softmax counts (1 - probability of its positive) to the power gamma (KaLM-Embedding-V2, arXiv 2506.20923)."""

    gamma: NotNegative = 0.5
    """How much rows that are solved already lose of their weight; 0 weighs all alike."""
    detach: bool = True
    """Whether the weight is a constant for the gradient."""


class MixingConfig(Config):
    """Negatives made of a query's own explicit negatives in the space of embeddings (KaLM-Embedding-V2).

    They belong to their query alone. The gradient flows through the negatives, not through their shares.
    """

    pairs: Annotated[int, Field(ge=0)] = 1
    """Mixtures of two negatives, with a share drawn from Beta(2, 2)."""
    lists: bool = True
    """One mixture of all negatives, their shares a softmax of their scores."""
    list_temperature: Positive = 0.05
    """Scores are divided by it in that softmax."""

    @model_validator(mode="after")
    def _makes_something(self) -> MixingConfig:
        if not self.pairs and not self.lists:
            raise ValueError("mixing makes nothing: set pairs above 0, or lists")
        return self


class MatryoshkaConfig(Config):
    """The loss of several prefixes of the embeddings at once (arXiv 2205.13147)."""

    dimensions: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    """Lengths of the prefixes; name the full length among them if it is to be trained."""
    weights: tuple[NotNegative, ...] | None = None
    """The weight of each one's loss; null counts each 1."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> MatryoshkaConfig:
        if self.weights is not None and len(self.weights) != len(self.dimensions):
            raise ValueError(f"{len(self.dimensions)} dimensions have {len(self.weights)} weights")
        if self.weights is not None and not any(self.weights):
            raise ValueError("all weights are 0")
        return self


class SpreadConfig(Config):
    """Spread-out regulariser of queries and of documents (Zhang et al. 2017, arXiv 1708.06320): directions that do not
    belong together are to be as orthogonal as pairs drawn at random."""

    mean: NotNegative = 1.0
    """Weight of the squared mean cosine."""
    second_moment: NotNegative = 1.0
    """Weight of what the mean squared cosine has above 1 / dimension."""


@dataclass(frozen=True)
class Surroundings:
    """Facts about the run that an objective is built for."""

    kinds: Mapping[str, str] = field(default_factory=dict)
    """Source -> the kind of its examples, of the sources that are trained on."""
    width: int | None = None
    """Of the encoder's embeddings."""
    guide_width: int | None = None
    labels: int = 0
    """How many labels the examples have."""
    label_names: Sequence[tuple[str, str]] = ()
    """(source, label) of each; none where they have no names."""
    vocabulary: int = 0
    """Of the encoder's tokens."""


@dataclass(frozen=True)
class Reading:
    """How the texts of a source's examples are read."""

    views: int | None = None
    """How often each query is encoded (twice: with other dropout) where its examples are their queries alone; None where their
    documents are read too."""
    deleted: float = 0.0
    """The share of a text's tokens that are left out when it is encoded."""


class ObjectiveSettings(KindSettings):
    """The base of every objective's settings."""

    example_kinds: ClassVar[tuple[str, ...]] = ("retrieval",)
    """The kinds of examples that it learns from."""
    views: ClassVar[int | None] = None
    """How often each query is encoded where it learns from queries alone."""
    compared_by: ClassVar[str | None] = None
    """The setting that says how embeddings are compared, for which it lists what it knows; None where it is always the cosine."""

    @abstractmethod
    def build(self, sources: Names = (), around: Surroundings | None = None) -> Objective:
        """The objective; ``sources`` gives the name of each source's number where settings name sources."""

    def for_model(self, similarity: str) -> Self:
        """These settings for a model that compares vectors by ``similarity``: where they can and do not say it themselves, by
        that too."""
        key = self.compared_by
        if key is None or key in self.model_fields_set:
            return self
        known = get_args(type(self).model_fields[key].annotation)
        return self.model_copy(update={key: similarity}) if similarity in known else self

    @property
    def comparisons(self) -> frozenset[str]:
        """The similarities that embeddings are compared by; empty where they are not compared with each other."""
        return frozenset({"cosine" if self.compared_by is None else getattr(self, self.compared_by)})

    @property
    def learns_from(self) -> tuple[str, ...]:
        """The kinds of examples that these settings learn from."""
        return self.example_kinds

    @property
    def names_sources(self) -> bool:
        """Whether settings depend on an example's source."""
        return False

    @property
    def needs_guide(self) -> bool:
        """Whether the batch must bring a guide model's embeddings."""
        return False

    @property
    def needs_teacher_scores(self) -> bool:
        """Whether the batch must bring the scores of the miner's teacher."""
        return False

    @property
    def score_bounds(self) -> tuple[float, float] | None:
        """The range of the similarity that it trains a graded pair to have; None where only the order of scores counts."""
        return None

    def of_source(self, source: str, kind: str) -> Sequence[ObjectiveSettings]:
        """The objectives that learn from a source whose examples are of this kind."""
        return [self] if kind in self.learns_from else []

    @property
    def reading(self) -> Reading:
        """How the texts that it learns from are read."""
        return Reading(views=self.views)

    def readings(self, kinds: Mapping[str, str]) -> dict[str, Reading]:
        """Source -> the kind of its examples, of all that are trained on -> source -> how its texts are read."""
        return dict.fromkeys(kinds, self.reading)

    @property
    def token_task(self) -> MakeTokenTask | None:
        """How the task on tokens is built whose losses the batch must bring, if any."""
        return None

    @property
    def summary(self) -> str:
        """For a model card: the kind, and the temperature where there is one."""
        temperature = getattr(self, "temperature", None)
        return self.kind if temperature is None else f"{self.kind}, temperature {temperature:g}"


_HERE, _METHODS = "nearfield.objectives.config", "nearfield.methods"
OBJECTIVES = Kinds(
    "objectives",
    f"{_HERE}:ObjectiveSettings",
    {
        "infonce": (f"{_HERE}:InfoNCEConfig", "in-batch and explicit negatives, masks and weights"),
        "cosent": (f"{_HERE}:CoSENTConfig", "graded pairs: pairs with higher scores are more similar"),
        "angle": (f"{_HERE}:AngleConfig", "cosent of the angle in complex space"),
        "cosine_regression": (f"{_HERE}:CosineRegressionConfig", "graded pairs: the cosine is the score"),
        "triplet": (f"{_HERE}:TripletConfig", "the positive is nearer than the negative by a margin"),
        "distil_scores": (f"{_HERE}:ScoreDistillationConfig", "the student scores documents as the teacher does"),
        "distil_embeddings": (f"{_HERE}:EmbeddingDistillationConfig", "the student's embeddings are the guide's"),
        "supcon": (f"{_HERE}:SupConConfig", "labelled texts: those of one label are nearer than all others"),
        "sbcl": (f"{_METHODS}.sbcl:SBCLConfig", "labelled texts: supcon of labels and of subclasses of equal size"),
        "hiprbert": (
            f"{_METHODS}.hiprbert:HiPrBERTConfig",
            "labelled texts: the nearer in a tree of labels, the more similar",
        ),
        "simlap": (
            f"{_METHODS}.simlap:SimLAPConfig",
            "labelled texts: the parts of a vector that a pair of labels is about",
        ),
        "carol": (f"{_METHODS}.carol:CAROLConfig", "texts: rebuild what was deleted, and contrast"),
        "unicom": (
            f"{_METHODS}.unicom:UnicomConfig",
            "labelled texts or images: a margin softmax over a prototype a label",
        ),
        "siglip": (f"{_HERE}:SigLIPConfig", "pairs: a sigmoid of each pair instead of a softmax"),
        "simcse": (f"{_HERE}:SimCSEConfig", "texts: two passes with other dropout are a pair"),
        "mcse": (f"{_METHODS}.mcse:MCSEConfig", "texts and images: simcse, grounded in the images"),
        "ntxent": (f"{_METHODS}.ntxent:NTXentConfig", "pairs: both texts look for each other among all texts"),
        "cmim": (f"{_METHODS}.cmim:CMIMConfig", "texts and images: mutual information of their vectors"),
        "masked_tokens": (f"{_METHODS}.masked_tokens:MaskedTokensConfig", "texts: predict hidden tokens"),
        "combined": (f"{_HERE}:CombinedConfig", "a weighted sum of objectives"),
    },
)
ObjectiveConfig = Annotated[ObjectiveSettings, OBJECTIVES]
"""The settings of any objective."""


class InfoNCEConfig(ObjectiveSettings):
    """InfoNCE with in-batch and explicit negatives, masks and weights."""

    compared_by: ClassVar[str] = "similarity"
    kind: Literal["infonce"] = "infonce"
    temperature: Positive = 0.05
    """Similarities are divided by it."""
    learn_temperature: bool = False
    """Learn the temperature's logarithm, from ``temperature`` on; it is not decayed."""
    temperature_bounds: tuple[Positive, Positive] = (0.01, 1.0)
    """Least and greatest value of a temperature that is learnt."""
    tasks: dict[str, str] = {}
    """Source -> task: each task learns a temperature of its own; sources that are not named share one."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Where it is not said, ``dot`` for a base that compares its vectors so."""
    in_batch_negatives: bool = True
    """Whether the documents of other queries are negatives; false leaves a query its own documents only."""
    shared_negatives: bool = True
    """Whether explicit negatives of other queries are negatives too."""
    several_positives: Literal["mean_log", "log_sum"] = "mean_log"
    """``mean_log`` averages one softmax a positive; ``log_sum`` takes the positives' summed probability."""
    both_directions: bool = False
    """Average with the loss of documents that look for their query among all queries: short for ``directions`` of
    query_document and document_query with a ``per_direction`` softmax."""
    directions: Annotated[tuple[Direction, ...], Field(min_length=1)] = ("query_document",)
    """The similarities in the softmax beside the positive's: a query's with documents and with other queries, the
    positive's with other queries and with documents of other queries (GTE, arXiv 2308.03281, has all four)."""
    softmax: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or the mean of a softmax for each."""
    mask_known_positives: bool = True
    """Never use an item as a negative of a query that has it as a positive anywhere in the data."""
    mask_same_label: bool = False
    """Never use an example's texts as negatives of an example with the same label."""
    score_mask: ScoreMaskConfig | None = None
    """Leave candidates out by the score that the model itself gives them."""
    guide_mask: ScoreMaskConfig | None = None
    """Leave candidates out by the score that a guide model gives them (GISTEmbed, arXiv 2402.16829)."""
    hardness: HardnessConfig | None = None
    """Weigh negatives by their scores; null weighs all alike."""
    focal: FocalConfig | None = None
    """Weigh rows by how far they are from solved; null weighs all alike."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the positive and all candidates."""
    source_weights: dict[str, NotNegative] = {}
    """Source -> what the loss of its examples is multiplied by; sources that are not named keep theirs. Not part of what the
    sum is divided by, so that it holds for batches of one source as well."""
    mixing: MixingConfig | None = None
    """Make further negatives of a query's own; null makes none. Where mined negatives are few, it adds harder ones."""
    queue: Annotated[int, Field(ge=0)] = 0
    """How many positives of earlier steps are candidates of queries too, as they were embedded then and without gradient
    (MoCo, arXiv 1911.05722; XBM, arXiv 1912.06798). A query sees those of its own source."""
    matryoshka: MatryoshkaConfig | None = None
    """Train prefixes of the embeddings too, so that they can be cut short; null trains the full length alone."""
    spread: SpreadConfig | None = None
    """Add a regulariser that spreads embeddings over the sphere; null adds none."""
    implementation: Literal["auto", "dense", "blockwise"] = "auto"
    """``dense`` holds the matrix of logits, ``blockwise`` only a tile of it; ``auto`` takes the faster that fits."""
    tiles: Literal["auto", "torch", "triton"] = "auto"
    """The code that works on the tiles of ``blockwise``: torch's operations, or Triton's kernels on CUDA; ``auto`` takes these where
    Triton is installed and the embeddings are on CUDA."""

    @model_validator(mode="after")
    def _fits_together(self) -> InfoNCEConfig:
        low, high = self.temperature_bounds
        if self.learn_temperature and not low <= self.temperature <= high:
            raise ValueError(f"temperature {self.temperature:g} is not within temperature_bounds [{low:g}, {high:g}]")
        if self.tasks and not self.learn_temperature:
            raise ValueError("tasks have temperatures of their own only where learn_temperature is true")
        if self.both_directions and (self.directions != ("query_document",) or self.softmax != "joint"):
            raise ValueError("both_directions says what directions and softmax are; give one or the other")
        if len(set(self.directions)) < len(self.directions):
            raise ValueError("a direction stands twice")
        if self.softmax == "per_direction" and {"query_query", "document_document"} & set(self.directions):
            raise ValueError(
                "a softmax of query_query or document_document alone holds no positive; use softmax: joint"
            )
        if "query_document" not in self.directions and (self.hardness or self.mixing or self.queue):
            raise ValueError(
                "hardness, mixing and queue weigh and make documents for queries: add the direction query_document"
            )
        if self.queue and not self.in_batch_negatives:
            raise ValueError("queue brings documents of other queries, which in_batch_negatives: false leaves out")
        return self

    @property
    def all_directions(self) -> tuple[Direction, ...]:
        """The directions, with what ``both_directions`` is short for."""
        return ("query_document", "document_query") if self.both_directions else self.directions

    @property
    def joint(self) -> bool:
        """Whether there is one softmax over all directions."""
        return self.softmax == "joint" and not self.both_directions

    @property
    def names_sources(self) -> bool:
        """Whether settings depend on an example's source."""
        return bool(self.tasks or self.source_weights)

    @property
    def needs_guide(self) -> bool:
        """Whether the batch must bring a guide model's embeddings."""
        return self.guide_mask is not None

    def build(self, sources: Names = (), around: Surroundings | None = None) -> InfoNCE:
        """The objective; ``sources`` gives the name of each source's number where settings name sources."""
        from nearfield.objectives.infonce import InfoNCE

        return InfoNCE(self, by_number(sources))


class CoSENTConfig(ObjectiveSettings):
    """Pairs with a higher score are to be more similar than pairs with a lower one, over all pairs of the global batch."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    compared_by: ClassVar[str] = "similarity"
    kind: Literal["cosent"] = "cosent"
    temperature: Positive = 0.05
    """Differences of similarities are divided by it."""
    similarity: Similarity = "cosine"
    """Where it is not said, as the base compares its vectors."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Ranking:
        from nearfield.objectives.losses import Ranking

        return Ranking(self.similarity, self.temperature)


class AngleConfig(ObjectiveSettings):
    """CoSENT of the angle in complex space instead of the cosine (AnglE, arXiv 2309.12871)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    kind: Literal["angle"] = "angle"
    temperature: Positive = 0.05
    """Differences of angles are divided by it."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Ranking:
        from nearfield.objectives.losses import Ranking

        return Ranking("angle", self.temperature)


class CosineRegressionConfig(ObjectiveSettings):
    """The squared difference of a pair's cosine and its score."""

    example_kinds: ClassVar[tuple[str, ...]] = ("graded",)

    kind: Literal["cosine_regression"] = "cosine_regression"

    @property
    def score_bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    def build(self, sources: Names = (), around: Surroundings | None = None) -> CosineRegression:
        from nearfield.objectives.losses import CosineRegression

        return CosineRegression()


class TripletConfig(ObjectiveSettings):
    """A query is to be nearer to its positive than to its own explicit negative, by a margin."""

    compared_by: ClassVar[str] = "distance"
    kind: Literal["triplet"] = "triplet"
    distance: Similarity = "cosine"
    """Where it is not said, as the base compares its vectors; ``dot`` is the dot product with its sign turned."""
    margin: NotNegative = 0.2
    """Of euclidean distances of vectors that are not of unit length, 5 is common."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Triplet:
        from nearfield.objectives.losses import Triplet

        return Triplet(self.distance, self.margin)


class ScoreDistillationConfig(ObjectiveSettings):
    """The student learns the teacher's scores of documents."""

    compared_by: ClassVar[str] = "similarity"
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

    @property
    def needs_guide(self) -> bool:
        return self.teacher == "vectors"

    @property
    def needs_teacher_scores(self) -> bool:
        return self.teacher == "scores"

    def build(self, sources: Names = (), around: Surroundings | None = None) -> ScoreDistillation:
        from nearfield.objectives.losses import ScoreDistillation

        return ScoreDistillation(self)


class EmbeddingDistillationConfig(ObjectiveSettings):
    """The student learns the guide's vectors of queries and documents, which have unit length."""

    example_kinds: ClassVar[tuple[str, ...]] = ("retrieval", "graded", "labelled")

    kind: Literal["distil_embeddings"] = "distil_embeddings"
    distance: Literal["mse", "l2", "cosine"] = "mse"
    """The distance that is made small: the mean squared difference of coordinates, the Euclidean distance, or 1 less the cosine."""
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
        from nearfield.objectives.losses import EmbeddingDistillation

        around = around or Surroundings()
        return EmbeddingDistillation(self.distance, self.projection == "always", around.width, around.guide_width)


class SupConConfig(ObjectiveSettings):
    """Supervised contrastive loss (Khosla et al. 2020): texts of one label are to be nearer to each other than to all others."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["supcon"] = "supcon"
    temperature: Positive = 0.1
    """Cosines are divided by it; lower puts more weight on the hardest texts of other labels."""
    class_weights: Literal["none", "inverse"] = "none"
    """``inverse``: an anchor counts one over the texts of its label in the batch, scaled to a mean of 1, so that labels count
    alike (the contrastive part of CAROL, arXiv 2410.22197, in a working form of ours)."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SupCon:
        from nearfield.objectives.losses import SupCon

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
        from nearfield.objectives.losses import SigLIP

        return SigLIP(self)


class SimCSEConfig(ObjectiveSettings):
    """A text encoded twice, with other dropout, against the batch's other texts (SimCSE, arXiv 2104.08821).

    The queries of any examples (the first of a pair, a labelled text) are the texts; what else an example has is not used.
    """

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    compared_by: ClassVar[str] = "similarity"
    views: ClassVar[int] = 2
    kind: Literal["simcse"] = "simcse"
    temperature: Positive = 0.05
    """Similarities are divided by it; lower puts more weight on the hardest texts."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Where it is not said, ``dot`` for a base that compares its vectors so."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> InfoNCE:
        return InfoNCEConfig(temperature=self.temperature, similarity=self.similarity).build()


class PartConfig(Config):
    """One of several objectives: its sources, and its weight over the run."""

    objective: Annotated[ObjectiveSettings, OBJECTIVES.without("combined")]
    """The loss of this part; any kind but ``combined``."""
    name: str | None = None
    """Its name in figures; null takes the objective's kind."""
    sources: tuple[str, ...] | None = None
    """The sources that it learns from; null takes all that it can."""
    each_source: bool = False
    """Whether the examples of each source are contrasted among themselves, and the losses of all sources added."""
    weight: NotNegative = 1.0
    """The factor of the mean loss of its examples."""
    final_weight: NotNegative | None = None
    """The weight at the end; null keeps it."""
    begin: Share = 0.0
    """The share of the run at which the weight begins to change."""
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
    """The objectives that are added."""

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
    def token_task(self) -> MakeTokenTask | None:
        return next((part.objective.token_task for part in self.parts if part.objective.token_task is not None), None)

    @property
    def learns_from(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for part in self.parts for kind in part.objective.learns_from))

    def of_source(self, source: str, kind: str) -> Sequence[ObjectiveSettings]:
        return [part.objective for part in self.parts if part.takes(source, kind)]

    def readings(self, kinds: Mapping[str, str]) -> dict[str, Reading]:
        readings = {}
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
            readings[name] = ways.pop() if ways else Reading()
        return readings

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
        from nearfield.objectives.losses import Combined

        return Combined(self, by_number(sources), around)
