"""A suite: a named set of benchmark tasks, as it stands in a YAML file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath

BASELINES = {"bm25": "mteb/baseline-bm25s", "random": "mteb/baseline-random-encoder"}
"""Models that are always there, and the names that their results are filed under."""

Language = Annotated[str, Field(pattern=r"^[a-z]{3}-[A-Z][a-z]{3}$")]
"""ISO 639-3 language and ISO 15924 script, e.g. ``eng-Latn``."""
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=120)]
"""A task's name is also the name of its result file."""


class MtebTasks(Config):
    """Official tasks, by name or by benchmark; mteb fetches their data from the hub."""

    kind: Literal["mteb"] = "mteb"
    names: list[TaskName] = []
    """Names as mteb knows them, e.g. ``SciFact``."""
    benchmark: str | None = None
    """All tasks of a benchmark, e.g. ``MTEB(eng, v2)``."""
    languages: list[str] | None = None
    """Keep the subsets in these languages (ISO 639-3, e.g. ``eng``)."""
    subsets: list[str] | None = None
    """Keep these subsets of the named tasks."""
    splits: list[str] | None = None
    """Score these splits instead of the tasks' own."""
    types: list[str] | None = None
    """Keep tasks of these types, e.g. ``Retrieval``. Without names and benchmark: of all that mteb has."""
    domains: list[str] | None = None
    """Keep tasks that have one of these domains, e.g. ``Legal``."""
    modalities: list[str] | None = None
    """Keep tasks with no other modalities than these, e.g. ``[text]``."""

    @property
    def filtered(self) -> bool:
        """Whether tasks are kept by type, domain or modality."""
        return any(part is not None for part in (self.types, self.domains, self.modalities))

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if (self.names and self.benchmark is not None) or not (self.names or self.benchmark or self.filtered):
            raise ValueError("give either 'names', 'benchmark' or filters ('types', 'domains', 'modalities')")
        if self.names and self.filtered:
            raise ValueError("'types', 'domains' and 'modalities' do not go with 'names': these say all")
        if not self.names and (self.subsets is not None or self.splits is not None):
            raise ValueError("'subsets' and 'splits' go with 'names': a benchmark brings its own")
        return self


class FolderTasks(Config):
    """A local task (a folder with meta.json and Parquet files), or a folder of such folders."""

    kind: Literal["folder"] = "folder"
    path: ConfigPath
    only: list[TaskName] | None = None
    """Names of the tasks to take from a folder of folders; null takes all."""


class HeldOutTask(Config):
    """The held-out split of a data recipe's source, as a task of the kind that its examples allow.

    Retrieval examples become a retrieval task, graded pairs an STS task, labelled items a classification (or, with
    ``as: clustering``, a clustering) task. Items may be texts or pictures; of pictures, a classification is a linear probe.
    """

    kind: Literal["heldout"] = "heldout"
    name: TaskName
    data: ConfigPath
    """A data recipe (YAML) or a built store (folder)."""
    source: str
    split: str = "test"
    train_split: str = "train"
    """Where a classification task takes its few training items from."""
    as_: Literal["auto", "clustering", "zero_shot"] = Field("auto", alias="as")
    """Labelled items alone: ``zero_shot`` gives each the label whose name, as a text, is the most similar."""
    template: Annotated[str, Field(pattern=r"\{label\}")] = "{label}"
    """The text of a label in ``zero_shot``."""
    reverse: bool = False
    """Retrieval examples alone: ask with the documents for the queries."""
    metric: Annotated[str, Field(pattern=r"^(ndcg|map|recall|precision|hit_rate|mrr)_at_(1|3|5|10|20|100)$")] | None = (
        None
    )
    """The main score of a retrieval task; null is ``ndcg_at_10``."""
    distractors: Annotated[int, Field(ge=0)] = 10_000
    """Documents of the source's other splits that are added to a retrieval corpus."""
    max_queries: Annotated[int, Field(ge=1)] | None = None
    """Sample this many queries (pairs, items); null takes all."""
    seed: Annotated[int, Field(ge=0)] = 0
    language: Language = "eng-Latn"


class LimitTask(Config):
    """LIMIT, made here: every pair of some documents is asked for. Its limits are those of the number of dimensions."""

    kind: Literal["limit"] = "limit"
    name: TaskName = "LIMITGenerated"
    documents: Annotated[int, Field(ge=4, le=500)] = 46
    """Documents that are relevant to some query; 46 is the least whose pairs are at least 1,000."""
    queries: Annotated[int, Field(ge=2, le=5_000)] = 1_000
    distractors: Annotated[int, Field(ge=0, le=50_000)] = 0
    """Documents that nobody asks for: 0 is the small set, 49,954 the full one."""
    pattern: Literal["dense", "random", "cycle", "disjoint"] = "dense"
    """Which pairs are asked for: the benchmark's, random ones, neighbours on a ring, pairs that share no document."""
    seed: Annotated[int, Field(ge=0)] = 0


Probe = Literal[
    "Length", "WordContent", "Depth", "TopConstituents", "BigramShift", "Tense", "SubjNumber", "ObjNumber", "OddManOut",
    "CoordinationInversion",
]  # fmt: skip


class ProbingTasks(Config):
    """SentEval's ten probes on sentences that are made here: what a linear classifier reads off a frozen vector."""

    kind: Literal["probing"] = "probing"
    only: list[Probe] | None = None
    """Some of the probes; null takes all ten."""
    sentences: Annotated[int, Field(ge=60, le=20_000)] = 1_200
    """For training, and as many for testing, in equal classes."""
    samples: Annotated[int, Field(ge=2)] = 100
    """Training sentences a class in each of mteb's ten draws."""
    seed: Annotated[int, Field(ge=0)] = 0


class MmebTask(Config):
    """One of MMEB's evaluation files: each row has its own candidates, the first of which is right; the score is hit@1."""

    kind: Literal["mmeb"] = "mmeb"
    name: TaskName
    file: ConfigPath
    """JSONL or Parquet with ``qry_inst``, ``qry_text``, ``qry_img_path``, ``tgt_text`` and ``tgt_img_path``."""
    images: ConfigPath | None = None
    """Where the paths of pictures start; null is the folder of the file."""
    language: Language = "eng-Latn"


TaskEntry = Annotated[
    MtebTasks | FolderTasks | HeldOutTask | LimitTask | ProbingTasks | MmebTask, Field(discriminator="kind")
]


class SuiteConfig(Config):
    """A named set of tasks."""

    name: str = Field(min_length=1)
    tasks: list[TaskEntry] = Field(min_length=1)
