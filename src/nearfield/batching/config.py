"""Settings of the planners; ``kind`` picks one."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from nearfield.config import Config, Kinds, KindSettings, Positive

if TYPE_CHECKING:
    from nearfield.batching.planner import StreamPlanner


class SourceSampling(KindSettings):
    """The base of every sampling's settings: how often each source comes in an epoch."""

    turns: ClassVar[bool] = False
    """Whether sources take turns."""

    @property
    def exponent(self) -> float | None:
        """The power of a source's size that its share is proportional to; None takes all batches of all sources."""
        return None

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each source's or pool's share; all or none are named."""
        return {}

    @property
    def repeats(self) -> bool:
        """Whether a source that runs out begins anew."""
        return False


class ProportionalSampling(SourceSampling):
    """All batches of all sources, so that each source comes in proportion to its size."""

    kind: Literal["proportional"] = "proportional"


class UnequalSampling(SourceSampling):
    """Sources that do not come in proportion to their size, so that some run out before the others."""

    exhausted: Literal["stop", "repeat"] = "stop"
    """Where a source has fewer examples than its share asks for: ``stop`` ends the epoch with it and leaves the rest of
    the others for another epoch, ``repeat`` begins it anew. Both are counted in the summary."""

    @property
    def exponent(self) -> float | None:
        """All sources alike."""
        return 0.0

    @property
    def repeats(self) -> bool:
        """As the setting says."""
        return self.exhausted == "repeat"


class TemperatureSampling(UnequalSampling):
    """Sources in proportion to size ** alpha: 1 is proportional, 0 gives all sources the same share."""

    kind: Literal["temperature"] = "temperature"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The power of a source's size; lower it where a large source drowns the small ones."""

    @property
    def exponent(self) -> float | None:
        """Alpha."""
        return self.alpha


class RoundRobinSampling(UnequalSampling):
    """Sources take turns, a batch each, in the order of the data recipe."""

    turns: ClassVar[bool] = True

    kind: Literal["round_robin"] = "round_robin"


class SharesSampling(UnequalSampling):
    """Sources (or pools) in proportion to given weights."""

    kind: Literal["shares"] = "shares"
    shares: Annotated[dict[str, Positive], Field(min_length=1)]
    """Source or pool -> its weight; every source that is trained on needs one."""

    @property
    def weights(self) -> dict[str, float]:
        """The shares."""
        return self.shares


_HERE = "nearfield.batching.config"
SAMPLINGS = Kinds(
    "samplings",
    f"{_HERE}:SourceSampling",
    {
        "proportional": (f"{_HERE}:ProportionalSampling", "all batches of all sources"),
        "temperature": (f"{_HERE}:TemperatureSampling", "in proportion to a power of a source's size"),
        "round_robin": (f"{_HERE}:RoundRobinSampling", "sources take turns"),
        "shares": (f"{_HERE}:SharesSampling", "in proportion to given weights"),
    },
)


class PlannerSettings(KindSettings):
    """The base of every planner's settings: what all planners share."""

    needs_samples: ClassVar[bool] = False
    """Whether it must know which examples are of one sample."""

    @property
    def needs_vectors(self) -> bool:
        """Whether the planner, or a part of it, cannot do without a teacher's vectors."""
        return False

    batch_size: Annotated[int, Field(ge=2)] = 64
    """Examples a step, over all devices."""
    positives: Annotated[int, Field(ge=1)] = 1
    """Positives of an example that are used in an epoch, drawn anew each epoch; fewer where it has fewer."""
    negatives: Annotated[int, Field(ge=0)] = 1
    """Explicit negatives of an example that are used in an epoch, likewise."""
    negative_choice: Literal["uniform", "balanced_margins"] = "uniform"
    """``balanced_margins`` cuts the margins (the teacher's score of the positive less that of the negative) of a query into
    bins, and draws a bin, then a negative in it."""
    margin_bins: Annotated[int, Field(ge=1, le=1000)] = 10
    """Bins of ``balanced_margins``; more tell margins apart more finely, where queries have many negatives."""
    duplicates: Literal["forbid", "allow"] = "forbid"
    """Whether an item may stand twice in a batch."""
    known_positives: Literal["forbid", "allow"] = "forbid"
    """Whether an item may be in a batch with a query that has it as a positive elsewhere in the data."""
    same_label: Literal["forbid", "allow"] = "allow"
    """Whether two labelled examples of one label may be in a batch."""
    drop_last: bool = True
    """Leave out batches that stay smaller than ``batch_size``; the summary counts what is left out."""
    sampling: Annotated[SourceSampling, SAMPLINGS] = ProportionalSampling()
    """How often each source comes."""
    pools: dict[str, tuple[str, ...]] = {}
    """Sources to be treated as one, under a name for them."""

    @classmethod
    def shared_settings(cls) -> list[str]:
        """The names of the settings that all planners have."""
        return [name for name in PlannerSettings.model_fields if name != "kind"]

    @abstractmethod
    def build(self) -> StreamPlanner:
        """The planner."""

    @field_validator("pools")
    @classmethod
    def _pools_are_apart(cls, pools: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        seen: dict[str, str] = {}
        for pool, members in pools.items():
            if not members:
                raise ValueError(f"the pool {pool!r} is empty")
            for member in members:
                if member in seen:
                    raise ValueError(f"the source {member!r} is twice in pools ({seen[member]!r} and {pool!r})")
                seen[member] = pool
        return pools

    @model_validator(mode="after")
    def _labels_are_items(self) -> Self:
        if self.same_label == "forbid" and self.duplicates == "allow":
            raise ValueError("same_label: forbid needs duplicates: forbid")
        return self


class ShuffledConfig(PlannerSettings):
    """Shuffled batches that mix the examples of all sources: the classic way, to compare the others with."""

    kind: Literal["shuffled"] = "shuffled"
    run: Annotated[int, Field(ge=1)] = 1
    """Examples of one source in a row (interleaved sub-batches, VLM2Vec, arXiv 2507.04590): a batch is made of runs of so many;
    ``batch_size`` is a multiple of it. 1 mixes example by example."""

    @model_validator(mode="after")
    def _runs_fill_a_batch(self) -> Self:
        if self.batch_size % self.run:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of run {self.run}: a batch is made of whole runs"
            )
        return self

    def build(self) -> StreamPlanner:
        """The planner."""
        from nearfield.batching.planner import ShuffledPlanner

        return ShuffledPlanner(self)


class SeparatedConfig(PlannerSettings):
    """The base of the planners whose batches have one source each."""

    homogeneous: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of examples whose batches are of this kind; the others are mixed over all sources."""

    def over_all_sources(self) -> ShuffledConfig:
        """The settings that all planners share, for batches that mix sources."""
        return ShuffledConfig(**{name: getattr(self, name) for name in self.shared_settings()})


class SingleSourceConfig(SeparatedConfig):
    """Shuffled global batches of one source each, no item twice in a batch."""

    kind: Literal["single_source"] = "single_source"

    def build(self) -> StreamPlanner:
        """The planner."""
        from nearfield.batching.planner import SingleSourcePlanner

        return SingleSourcePlanner(self)


class KMeansStrataConfig(SeparatedConfig):
    """Batches of one cluster of one source each: spherical k-means on a teacher's vectors (arXiv 2407.18887)."""

    kind: Literal["kmeans_strata"] = "kmeans_strata"
    side: Literal["query", "document"] = "query"
    """The side whose vectors are clustered: queries, or the first positive of each."""
    clusters: Annotated[int, Field(ge=1)] = 10
    """Clusters a source; fewer where it has not ``batch_size`` examples for each."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """Rounds of k-means, at most; it ends early where nothing moves."""
    sample: Annotated[int, Field(ge=1)] | None = None
    """Fit the centroids on so many examples, drawn at random; null takes all."""
    small: Literal["merge", "drop"] = "merge"
    """A cluster with fewer than ``batch_size`` examples joins the nearest, or is left out."""

    @property
    def needs_vectors(self) -> bool:
        """Clusters are made of them."""
        return True

    def build(self) -> StreamPlanner:
        """The planner."""
        from nearfield.batching.groups import KMeansStrataPlanner

        return KMeansStrataPlanner(self)


class CommunitiesConfig(SeparatedConfig):
    """Batches that are unions of communities: small groups of examples that are hard for one another (B3, arXiv 2505.11293)."""

    kind: Literal["communities"] = "communities"
    community_size: Annotated[int, Field(ge=2)] = 32
    """Examples a community (K); ``batch_size`` is a multiple of it."""
    rank_from: Annotated[int, Field(ge=0)] = 30
    """The first so many ranks of a query are no edges: they are likely to be positives (p)."""
    rank_to: Annotated[int, Field(ge=1)] = 130
    """The rank that edges end before (p + m)."""
    search: Literal["exact", "ivf"] = "exact"
    """``ivf`` is approximate and faster on millions of examples; its recall is in the summary."""
    cluster_negatives: Annotated[int, Field(ge=0)] = 0
    """Negatives an example that are drawn for its whole community (B3++), behind its own explicit ones."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.batch_size % self.community_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of community_size {self.community_size}: "
                "a batch is a union of whole communities"
            )
        if self.rank_to <= self.rank_from:
            raise ValueError(f"rank_to {self.rank_to} must be above rank_from {self.rank_from}")
        return self

    @property
    def needs_vectors(self) -> bool:
        """Communities are made of them."""
        return True

    def build(self) -> StreamPlanner:
        """The planner."""
        from nearfield.batching.groups import CommunityPlanner

        return CommunityPlanner(self)


PLANNERS = Kinds(
    "planners",
    f"{_HERE}:PlannerSettings",
    {
        "shuffled": (f"{_HERE}:ShuffledConfig", "shuffled batches that mix all sources"),
        "single_source": (f"{_HERE}:SingleSourceConfig", "shuffled batches of one source each"),
        "kmeans_strata": (f"{_HERE}:KMeansStrataConfig", "batches of one cluster of vectors each"),
        "communities": (f"{_HERE}:CommunitiesConfig", "batches of examples that are near each other"),
        "patterns": (
            "nearfield.methods.sail:PatternsConfig",
            "batches of whole samples, with what each source has of them",
        ),
        "mixed": (f"{_HERE}:MixedConfig", "examples are dealt to several kinds by weight"),
    },
)


class MixedPart(Config):
    """One kind of a mixture."""

    weight: Positive = 1.0
    """Its part of the examples, in proportion to the weights of all parts."""
    planner: Annotated[PlannerSettings, PLANNERS.without("patterns", "mixed")]
    """Its settings; those that all planners share are set on the mixture."""

    @field_validator("planner")
    @classmethod
    def _shared_settings_stand_above(cls, planner: PlannerSettings) -> PlannerSettings:
        twice = sorted(planner.model_fields_set.intersection(planner.shared_settings()))
        if twice and twice != ["batch_size"]:
            raise ValueError(f"{', '.join(twice)} must be set on the mixture, not on a part of it")
        return planner


class MixedConfig(PlannerSettings):
    """A mixture: examples are dealt to planners of other kinds by weight, anew each epoch."""

    kind: Literal["mixed"] = "mixed"
    parts: Annotated[tuple[MixedPart, ...], Field(min_length=1)]
    """The kinds that are mixed, and how much each gets."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        for part in self.parts:
            if "batch_size" in part.planner.model_fields_set and part.planner.batch_size != self.batch_size:
                raise ValueError(
                    f"a part has batch_size {part.planner.batch_size}, the mixture {self.batch_size}: leave it out of the part"
                )
        assert self.part_configs  # they must be possible with the mixture's settings
        return self

    @property
    def part_configs(self) -> tuple[PlannerSettings, ...]:
        """The settings of the parts, with those of the mixture that all planners share."""
        shared = {name: getattr(self, name) for name in self.shared_settings()}
        kinds = (
            type(part.planner)(**{**part.planner.model_dump(exclude=set(shared)), **shared}) for part in self.parts
        )
        return tuple(kinds)

    @property
    def needs_vectors(self) -> bool:
        """Where a part needs them."""
        return any(part.needs_vectors for part in self.part_configs)

    def build(self) -> StreamPlanner:
        """The planner."""
        from nearfield.batching.planner import MixedPlanner

        return MixedPlanner(self)


BatchConfig = Annotated[PlannerSettings, PLANNERS]
"""The settings of any planner."""
