"""Settings of mining: who scores (teachers), how the corpus is searched, which candidates become negatives (rules), and how
negatives change while a model trains; ``kind`` picks one."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nearfield.config import Config, ConfigPath, Count, Kinds, KindSettings
from nearfield.encoders.config import QueryPrompts, resolve_model
from nearfield.encoders.prompts import base_prompts
from nearfield.encoders.source import locate
from nearfield.errors import BadInputError
from nearfield.files import hash_file

if TYPE_CHECKING:
    from nearfield.arrays import Vectors
    from nearfield.data.store import Store
    from nearfield.data.vectors import EncodeItems
    from nearfield.encoders.config import EncoderConfig
    from nearfield.mining.approximate import VectorIndex
    from nearfield.mining.rules import Rule
    from nearfield.mining.teachers import PairScorer, Scorer, TeacherPool


ModelName = Annotated[str, AfterValidator(resolve_model)]

# Teachers


class TeacherSettings(KindSettings):
    """The base of every teacher's settings."""

    reads_texts_alone: ClassVar[bool] = False
    """Whether it goes by the words of texts, so that images are nothing to it."""

    counts_words: ClassVar[bool] = False
    """Whether it weighs words by how rare they are in the whole corpus, of which it must see all."""

    @property
    def in_words(self) -> str:
        """The teacher, for tables and reports."""
        return self.kind

    def dense_teachers(self) -> list[DenseTeacher]:
        """The teachers in it that make vectors, each once."""
        return []

    def made_of(self, base: EncoderConfig) -> Any:
        """Everything that its scores depend on, as a JSON-able value; ``base`` is the encoder that the recipe trains."""
        return self.identity()

    @abstractmethod
    def build(self, pool: TeacherPool) -> Scorer:
        """The teacher before a pool of queries and documents."""


class DenseTeacher(TeacherSettings):
    """The base of the teachers that make vectors; scores are cosines."""

    spreads: ClassVar[bool] = False
    """Whether the machines of a Ray cluster can make its vectors."""

    @property
    def may_be_zero(self) -> bool:
        """Whether an item may have a vector of zeros."""
        return False

    def dense_teachers(self) -> list[DenseTeacher]:
        """Itself."""
        return [self]

    @abstractmethod
    def encode_items(self, store: Store, base: EncoderConfig, device: str | None = None) -> EncodeItems:
        """A function from items of a store to vectors; ``base`` is the encoder that the recipe trains."""

    @abstractmethod
    def is_shared(self, base: EncoderConfig) -> bool:
        """Whether an item has the same vector as a query and as a document."""

    def build(self, pool: TeacherPool) -> PairScorer:
        """A search among the vectors."""
        from nearfield.mining.teachers import DenseScorer

        return DenseScorer(*pool.vectors(self), pool.searching)


class SentenceTransformerTeacher(DenseTeacher):
    """An embedding model by folder (a run's ``model`` too) or hub id; scores are cosines."""

    spreads: ClassVar[bool] = True

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: ModelName | None = None
    """Null takes the model that the recipe trains from, as it is before training."""
    revision: str | None = None
    """The hub's branch, tag or commit; pin a commit so that negatives can be mined again."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Tokens of a text that it reads, at most; null takes the model's own limit. Lower it to encode long documents faster."""
    prompts: QueryPrompts = QueryPrompts()
    """Put before texts; null takes the model's own prompt of the role."""
    trust_remote_code: bool = False
    """Run the code that comes with the model; only for a model that you trust."""

    @property
    def in_words(self) -> str:
        """Its model."""
        return self.model or "the recipe's base model"

    def loaded(self, base: EncoderConfig) -> tuple[str, str | None, int | None, bool]:
        """Its model, revision, length and whether code that comes with it is run: without a model of its own, the base's."""
        if self.model is None:
            return base.model, base.revision, self.max_length or base.max_length, base.trust_remote_code
        return self.model, self.revision, self.max_length, self.trust_remote_code

    def prompt_texts(self, base: EncoderConfig) -> dict[str, str]:
        """Role -> the text before an item: as stated, else the model's own for retrieval."""
        model, revision, *_ = self.loaded(base)
        of_model = base_prompts(locate(model, revision).path, revision)
        stated = {"query": self.prompts.query, "document": self.prompts.document}
        return {role: of_model.of("Retrieval", role) or "" if text is None else text for role, text in stated.items()}

    def made_of(self, base: EncoderConfig) -> Any:
        """The model's content, and how it reads a text."""
        model, revision, length, trusted = self.loaded(base)
        source = locate(model, revision)
        parts = [self.kind, source.name, source.content, length, self.prompt_texts(base)]
        return [*parts, *(["trust_remote_code"] if trusted else [])]

    def encode_items(self, store: Store, base: EncoderConfig, device: str | None = None) -> EncodeItems:
        """The model, which is loaded when the first items come."""
        from nearfield.encoders.encode import ItemEncoder

        model, revision, length, trusted = self.loaded(base)
        prompts = self.prompt_texts(base)
        return ItemEncoder(
            store.path, model, revision, prompts, device=device, max_length=length, trust_remote_code=trusted
        )

    def is_shared(self, base: EncoderConfig) -> bool:
        """Where both roles have one prompt."""
        return len(set(self.prompt_texts(base).values())) == 1


class VectorsTeacher(DenseTeacher):
    """Vectors from files, made by any program; scores are cosines.

    Parquet files have the columns ``id`` (an item's id: 16 bytes, or 32 hex digits) and ``vector``. A ``.npy`` file is float
    [n, d] with the ids beside it in ``NAME.ids.txt``, a line each.
    """

    kind: Literal["vectors"] = "vectors"
    documents: ConfigPath
    """The file of the documents' vectors."""
    queries: ConfigPath | None = None
    """Null looks queries up in the file of documents."""
    zeros: bool = False
    """Whether an item may have a vector of zeros: none, as `mcse` reads it; its cosine with all others is 0."""

    @property
    def in_words(self) -> str:
        """The file."""
        return f"the vectors of {self.documents}"

    @property
    def may_be_zero(self) -> bool:
        """As the setting says."""
        return self.zeros

    def made_of(self, base: EncoderConfig) -> Any:
        """The content of the files."""
        files = [self.documents, *([self.queries] if self.queries else [])]
        listed = [file.with_suffix(".ids.txt") for file in files]
        for file in files:
            if not file.is_file():
                raise BadInputError("this file of vectors does not exist", where=str(file))
        zeros = ["zeros"] if self.zeros else []
        return [self.kind, [hash_file(file) for file in [*files, *listed] if file.is_file()], *zeros]

    def encode_items(self, store: Store, base: EncoderConfig, device: str | None = None) -> EncodeItems:
        """A look into the files."""
        from nearfield.data.vectors import read_vectors

        return read_vectors(store, self.documents, self.queries)

    def is_shared(self, base: EncoderConfig) -> bool:
        """Where there is one file."""
        return self.queries is None


class BM25Teacher(TeacherSettings):
    """Words in common (BM25, by bm25s). A document that shares no word with the query is no candidate."""

    reads_texts_alone: ClassVar[bool] = True
    counts_words: ClassVar[bool] = True

    kind: Literal["bm25"] = "bm25"
    k1: Annotated[float, Field(gt=0)] = 1.5
    """How slowly a word that is repeated in a document stops adding to its score; raise it for long documents."""
    b: Annotated[float, Field(ge=0, le=1)] = 0.75
    """How much long documents are marked down for their length: 0 not at all, 1 in full."""
    language: str | None = "english"
    """Of the Snowball stemmer and, for English, the stop words; null takes words as they are."""

    @property
    def in_words(self) -> str:
        """Its name."""
        return "BM25"

    def build(self, pool: TeacherPool) -> PairScorer:
        """An index of the documents' words."""
        from nearfield.mining.teachers import BM25Scorer

        return BM25Scorer(self, pool)


_HERE = "nearfield.mining.config"
TEACHERS = Kinds(
    "teachers",
    f"{_HERE}:TeacherSettings",
    {
        "sentence_transformer": (f"{_HERE}:SentenceTransformerTeacher", "an embedding model, by folder or hub id"),
        "vectors": (f"{_HERE}:VectorsTeacher", "vectors from files, made by any program"),
        "bm25": (f"{_HERE}:BM25Teacher", "words in common"),
        "cross_encoder": (f"{_HERE}:CrossEncoderTeacher", "a cross-encoder scores what another teacher finds"),
        "ensemble": (f"{_HERE}:EnsembleTeacher", "several teachers: each finds candidates, all score them"),
    },
)
TeacherConfig = Annotated[TeacherSettings, TEACHERS]
"""The settings of any teacher."""


class CrossEncoderTeacher(TeacherSettings):
    """A cross-encoder scores the candidates that another teacher finds."""

    reads_texts_alone: ClassVar[bool] = True

    kind: Literal["cross_encoder"] = "cross_encoder"
    model: ModelName
    """The cross-encoder, by folder or hub id; it must give one number a pair."""
    revision: str | None = None
    """The hub's branch, tag or commit; pin a commit so that negatives can be mined again."""
    retrieve: Annotated[TeacherSettings, TEACHERS.without("cross_encoder", "ensemble")] = SentenceTransformerTeacher()
    """The teacher that finds the candidates."""
    scale: Literal["sigmoid", "none"] = "sigmoid"
    """``sigmoid`` brings logits to 0 to 1, where margins mean something; ``none`` takes the model's raw numbers."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Tokens of a pair, at most; null takes the model's own limit."""
    trust_remote_code: bool = False
    """Run the code that comes with the model; only for a model that you trust."""

    @property
    def in_words(self) -> str:
        """Its model."""
        return f"the cross-encoder {self.model}"

    def made_of(self, base: EncoderConfig) -> Any:
        """The model's content, how it reads a pair, and the teacher that finds candidates."""
        source = locate(self.model, self.revision)
        settings = self.identity(exclude={"model", "revision", "retrieve"})
        return [self.kind, source.name, source.content, settings, self.retrieve.made_of(base)]

    def dense_teachers(self) -> list[DenseTeacher]:
        """Those of the teacher that finds candidates."""
        return self.retrieve.dense_teachers()

    def build(self, pool: TeacherPool) -> PairScorer:
        """The model before what the other teacher finds."""
        from nearfield.mining.teachers import CrossEncoderScorer, as_pair_scorer

        return CrossEncoderScorer(self, as_pair_scorer(self.retrieve.build(pool)), pool.texts, pool.searching.device)


class EnsembleTeacher(TeacherSettings):
    """Several teachers: each finds candidates, all score all of them."""

    kind: Literal["ensemble"] = "ensemble"
    members: Annotated[tuple[Annotated[TeacherSettings, TEACHERS.without("ensemble")], ...], Field(min_length=2)]
    """The teachers; each finds candidates."""
    fusion: Literal["rank", "score"] = "rank"
    """``rank`` sums weight / (60 + rank) over the members, ranks counted among the query's candidates and positives
    (reciprocal rank fusion); ``score`` takes the weighted mean of the members' scores, which must be on one scale."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """One a member; null weighs all alike."""

    @model_validator(mode="after")
    def _one_weight_a_member(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights for {len(self.members)} members")
        return self

    @property
    def reads_texts_alone(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(member.reads_texts_alone for member in self.members)

    def made_of(self, base: EncoderConfig) -> Any:
        """All members, and how their scores are fused."""
        return [self.kind, self.fusion, self.weights, [member.made_of(base) for member in self.members]]

    def dense_teachers(self) -> list[DenseTeacher]:
        """Those of all members."""
        return list({dense: None for member in self.members for dense in member.dense_teachers()})

    def build(self, pool: TeacherPool) -> Scorer:
        """All of them, with their scores fused."""
        from nearfield.mining.teachers import EnsembleScorer, as_pair_scorer

        members = [as_pair_scorer(member.build(pool)) for member in self.members]
        return EnsembleScorer(members, self.weights or (1.0,) * len(members), self.fusion)


# Search


class SearchSettings(KindSettings):
    """The base of every search's settings."""

    exact: ClassVar[bool] = False
    """Whether all documents are compared, so that the queries can be searched for in parts, on any machine."""


class ExactSearch(SearchSettings):
    """All documents are compared: the true best."""

    exact: ClassVar[bool] = True

    kind: Literal["exact"] = "exact"


class ApproximateSearch(SearchSettings):
    """The base of the searches that do not compare all documents; how much of the true best they find is measured."""

    sample: Count = 1_000
    """Queries that the recall is measured on."""

    @abstractmethod
    def build(self, documents: Vectors, seed: int) -> VectorIndex:
        """An index of documents [m, d] for inner products; the documents that it finds are scored exactly afterwards."""


class IVFSearch(ApproximateSearch):
    """FAISS inverted lists: only the lists nearest to the query are compared."""

    kind: Literal["ivf"] = "ivf"
    lists: Count | None = None
    """Null takes 4 times the square root of the number of documents."""
    probes: Count = 32
    """Lists looked at for a query."""

    def build(self, documents: Vectors, seed: int) -> VectorIndex:
        """The lists, whose centres are found from ``seed``."""
        from nearfield.mining.approximate import inverted_lists

        return inverted_lists(documents, self.lists, self.probes, seed)


class HNSWSearch(ApproximateSearch):
    """FAISS navigable small-world graph."""

    kind: Literal["hnsw"] = "hnsw"
    links: Annotated[int, Field(ge=2, le=512)] = 32
    """Neighbours that each document is linked to in the graph; more find more and take more memory."""
    build_width: Count = 200
    """Candidates held while a document is linked; more make a better graph and take longer to build."""
    width: Count = 256
    """Candidates held while a query is searched; more finds more."""

    def build(self, documents: Vectors, seed: int) -> VectorIndex:
        """The graph."""
        from nearfield.mining.approximate import small_world

        return small_world(documents, self.links, self.build_width, self.width)


SEARCHES = Kinds(
    "searches",
    f"{_HERE}:SearchSettings",
    {
        "exact": (f"{_HERE}:ExactSearch", "all documents are compared"),
        "ivf": (f"{_HERE}:IVFSearch", "lists of near documents, the nearest of which are compared (FAISS)"),
        "hnsw": (f"{_HERE}:HNSWSearch", "a graph of neighbours that is walked (FAISS)"),
    },
)

# Rules


class RuleConfig(KindSettings):
    """The base of every rule's settings."""

    chooses: ClassVar[bool] = False
    """Whether the rule draws the negatives itself, instead of leaving the best of what is kept."""

    def needs(self) -> int:
        """Candidates that a query must at least have been searched for."""
        return 0

    @abstractmethod
    def build(self) -> Rule:
        """The rule."""


class NaiveRule(RuleConfig):
    """Keeps all: the best candidates become negatives, false ones too."""

    kind: Literal["naive"] = "naive"

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import Naive

        return Naive()


class ShiftedRule(RuleConfig):
    """Passes over the first ranks (NV-Retriever, arXiv 2407.15831: top-k shifted by N)."""

    kind: Literal["shifted"] = "shifted"
    skip: Count = 10
    """Ranks that are passed over, where false negatives are likeliest; raise it if the audit shows many."""

    def needs(self) -> int:
        """The ranks passed over."""
        return self.skip

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import Shifted

        return Shifted(self.skip)


class AbsoluteRule(RuleConfig):
    """Keeps candidates that score below a fixed number (NV-Retriever: TopK-Abs)."""

    kind: Literal["absolute"] = "absolute"
    below: float = 0.7
    """Only candidates with a lower score, on the teacher's scale, are kept."""

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import Absolute

        return Absolute(self.below)


class MarginToPositiveRule(RuleConfig):
    """Keeps candidates that score below the positive's score less a margin (NV-Retriever: TopK-MarginPos)."""

    kind: Literal["margin_to_positive"] = "margin_to_positive"
    margin: Annotated[float, Field(ge=0)] = 0.05
    """How far below the positive's score a candidate must lie, on the teacher's scale; raise it against false negatives."""

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import MarginToPositive

        return MarginToPositive(self.margin)


class PercentOfPositiveRule(RuleConfig):
    """Keeps candidates that score below a share of the positive's score (NV-Retriever: TopK-PercPos).

    The bar lies (1 - share) of the score's size below it, also where the score is negative.
    """

    kind: Literal["percent_of_positive"] = "percent_of_positive"
    share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The share of the positive's score that a candidate must stay below; lower it against false negatives."""

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import PercentOfPositive

        return PercentOfPositive(self.share)


class AdaptiveMarginRule(RuleConfig):
    """Keeps candidates below the positive's score less a margin that moves with that score (after LG-ANNA, arXiv 2506.07438).

    The paper's constants are unknown; these are ours: the margin goes in a straight line from ``at_zero`` to ``at_one``, as
    the positive's score goes from 0 to 1. A pair that the teacher doubts needs the wider gap.
    """

    kind: Literal["adaptive_margin"] = "adaptive_margin"
    at_zero: Annotated[float, Field(ge=0)] = 0.1
    """The margin where the positive scores 0 or less."""
    at_one: Annotated[float, Field(ge=0)] = 0.05
    """The margin where the positive scores 1 or more."""

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import AdaptiveMargin

        return AdaptiveMargin(self.at_zero, self.at_one)


class RankWindowRule(RuleConfig):
    """Draws negatives evenly from a window of ranks, counted from 0 (KaLM-Embedding-V2, arXiv 2506.20923: 50 to 100)."""

    chooses: ClassVar[bool] = True

    kind: Literal["rank_window"] = "rank_window"
    start: Annotated[int, Field(ge=0)] = 50
    """The first rank that is drawn from; the ranks before it are likely to hold false negatives."""
    stop: Count = 100
    """The rank that the window ends before; a later one brings easier negatives."""

    def needs(self) -> int:
        """The end of the window."""
        return self.stop

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start >= self.stop:
            raise ValueError(f"the window from {self.start} to {self.stop} is empty")
        return self

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import RankWindow

        return RankWindow(self.start, self.stop)


class SampledTopKRule(RuleConfig):
    """Draws negatives among the best ``k`` kept, likelier the higher they score (NV-Retriever: sampled top-k)."""

    chooses: ClassVar[bool] = True

    kind: Literal["sampled_top_k"] = "sampled_top_k"
    k: Count = 10
    """Candidates that are drawn among, the best ones that the other rules keep."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Scores are divided by it before the softmax that candidates are drawn by; a large one draws evenly."""
    keep_first: bool = False
    """Always take the best one and draw the rest."""

    def needs(self) -> int:
        """Those drawn from."""
        return self.k

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import SampledTopK

        return SampledTopK(self.k, self.temperature, self.keep_first)


class ConsistencyRule(RuleConfig):
    """Keeps an example only if its best positive is among the first ``top`` of the corpus (E5, arXiv 2212.03533: 2; KaLM: 51).

    Documents that score exactly as much as the positive do not count against it.
    """

    kind: Literal["consistency"] = "consistency"
    top: Count = 2
    """The ranks that the best positive must be among; a small number keeps only pairs that the teacher agrees with."""

    def needs(self) -> int:
        """The ranks looked at."""
        return self.top

    def build(self) -> Rule:
        """The rule."""
        from nearfield.mining.rules import Consistency

        return Consistency(self.top)


RULES = Kinds(
    "rules",
    f"{_HERE}:RuleConfig",
    {
        "naive": (f"{_HERE}:NaiveRule", "keep all candidates"),
        "shifted": (f"{_HERE}:ShiftedRule", "pass over the first ranks"),
        "absolute": (f"{_HERE}:AbsoluteRule", "keep scores below a number"),
        "margin_to_positive": (f"{_HERE}:MarginToPositiveRule", "keep scores below the positive's less a margin"),
        "percent_of_positive": (f"{_HERE}:PercentOfPositiveRule", "keep scores below a share of the positive's"),
        "adaptive_margin": (f"{_HERE}:AdaptiveMarginRule", "a margin that moves with the positive's score"),
        "rank_window": (f"{_HERE}:RankWindowRule", "draw from a window of ranks"),
        "sampled_top_k": (f"{_HERE}:SampledTopKRule", "draw among the best by their scores"),
        "consistency": (f"{_HERE}:ConsistencyRule", "keep examples whose positive ranks high"),
    },
)


class NegativesSettings(KindSettings):
    """The base of the ways in which mined negatives change while the model trains."""

    mines_anew: ClassVar[bool] = False
    """Whether negatives are mined again during the training, from all documents of the sources."""
    whole_batches: ClassVar[bool] = False
    """Whether the embeddings of whole batches must be in one place."""

    def least(self, wanted: int) -> int:
        """Candidates that an example needs, where batches take ``wanted``: with fewer nothing would change, or some lack."""
        raise NotImplementedError

    def build(self, inputs: Any, trainer: Any) -> Any:
        """The part of the trainer that changes the negatives of each batch.

        ``inputs`` is a :class:`nearfield.training.changing_negatives.NegativeInputs`, the result its ``ChangingNegatives``.
        """
        raise NotImplementedError


_TRAINED = "nearfield.training.config"
NEGATIVES = Kinds(
    "negatives",
    f"{_HERE}:NegativesSettings",
    {
        "scheduled": (f"{_TRAINED}:ScheduledNegatives", "from easy to hard, by the steps"),
        "dynamic": (f"{_TRAINED}:DynamicNegatives", "those that are no longer hard give way to the next (Conan)"),
        "refresh": (f"{_TRAINED}:RefreshedNegatives", "mined anew from the weights in training (ANCE)"),
    },
)


class MiningConfig(Config):
    """Hard negatives for the examples of the training split."""

    teacher: TeacherConfig | None = None
    """Null takes the recipe's ``teacher``."""
    rules: tuple[Annotated[RuleConfig, RULES], ...] = (PercentOfPositiveRule(),)
    """Applied one after another."""
    negatives: Count = 4
    """Negatives an example; one that is left with fewer has fewer, and is listed."""
    depth: Count | None = None
    """Candidates that the rules see; null takes 100, or more where a rule needs it."""
    corpus: Literal["source", "sources"] = "source"
    """Where negatives come from: the documents of the example's own source, or of all sources that are trained on."""
    explicit: Literal["keep", "replace"] = "keep"
    """Whether negatives that the data brings stay beside the mined ones."""
    search: Annotated[SearchSettings, SEARCHES] = ExactSearch()
    """How the corpus is searched: all documents, or approximately, where an exact search takes too long."""
    memory_mib: Annotated[int, Field(ge=16)] = 1_024
    """Memory that an exact search may hold beside the vectors."""
    during: Annotated[NegativesSettings, NEGATIVES] | None = None
    """How negatives change while the model trains; null leaves those of the plan."""

    @property
    def searched(self) -> int:
        """Candidates that the rules see."""
        return self.depth or max(100, self.least)

    @property
    def least(self) -> int:
        """Candidates that the rules at least need."""
        return max([self.negatives, *(rule.needs() for rule in self.rules)])

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        choosing = [rule for rule in self.rules if rule.chooses]
        if len(choosing) > 1:
            raise ValueError(f"only one rule can draw the negatives; {' and '.join(r.kind for r in choosing)} both do")
        if choosing and self.rules[-1] is not choosing[0]:
            raise ValueError(f"the rule {choosing[0].kind} draws the negatives, so it must be the last")
        if self.depth is not None and self.depth < self.least:
            raise ValueError(f"depth {self.depth} is less than the {self.least} candidates that the rules need")
        return self
