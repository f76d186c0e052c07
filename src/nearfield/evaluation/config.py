"""A suite: a named set of benchmark tasks, as it stands in a YAML file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nearfield.config import Config, ConfigPath, Kinds, KindSettings
from nearfield.errors import BadInputError
from nearfield.files import hash_file, hash_folder

if TYPE_CHECKING:
    from nearfield.evaluation.tasks import SuiteTask

OpenStore = Callable[[Path], Any]
"""Turns the path of a data recipe, or of a store folder, into an open store (``nearfield.data.Store``)."""

Language = Annotated[str, Field(pattern=r"^[a-z]{3}-[A-Z][a-z]{3}$")]
"""ISO 639-3 language and ISO 15924 script, e.g. ``eng-Latn``."""
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=120)]
"""A task's name is also the name of its result file."""


Axes = Literal["first", "random", "principal"]
AXES: dict[Axes, str] = {"first": "dim", "random": "random", "principal": "pca"}
"""Axes that vectors are cut on -> what a model that is cut to 64 of them is filed under: ``MODEL-dim64``, ``MODEL-random64``,
``MODEL-pca64``."""


class TaskSettings(KindSettings):
    """The base of all that a suite may list: one task, or several."""

    needs_hub: ClassVar[bool] = False
    """Whether the data come from the hub."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """The tasks, with no data loaded; ``where`` is the suite, for messages."""
        raise NotImplementedError

    @property
    def paths(self) -> list[Path]:
        """Files and folders that the tasks are read from."""
        return []

    def content(self) -> Any:
        """The parts of those files that the scores depend on."""
        return [content_of(path) for path in self.paths]

    def check(self, where: str, key: str) -> None:
        """Raise :class:`BadInputError` for what can be seen to be wrong before anything is built."""


def content_of(path: Path) -> str | None:
    """The hash of a file or folder; None where there is none, which is said before it is read."""
    return hash_folder(path) if path.is_dir() else hash_file(path) if path.is_file() else None


class MtebTasks(TaskSettings):
    """Official tasks, by name or by benchmark; mteb fetches their data from the hub."""

    needs_hub: ClassVar[bool] = True
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

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """mteb's own tasks."""
        from nearfield.evaluation.tasks import official_tasks

        return official_tasks(self, where)


class FolderTasks(TaskSettings):
    """A local task (a folder with meta.json and Parquet files), or a folder of such folders."""

    kind: Literal["folder"] = "folder"
    path: ConfigPath
    """The folder; each folder in it that has a meta.json is a task, or it is one itself."""
    only: list[TaskName] | None = None
    """Names of the tasks to take from a folder of folders; null takes all."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """A task for each folder; files are hashed now."""
        from nearfield.evaluation.folder import folder_task, task_folders

        return [folder_task(folder) for folder in task_folders(self.path, self.only)]

    @property
    def paths(self) -> list[Path]:
        """The folder."""
        return [self.path]

    def content(self) -> Any:
        """The folder's."""
        return content_of(self.path)


class HeldOutTask(TaskSettings):
    """The held-out split of a data recipe's source, as a task of the kind that its examples allow.

    Retrieval examples become a retrieval task, graded pairs an STS task, labelled items a classification (or, with
    ``as: clustering``, a clustering) task. Items may be texts or images; of images, a classification is a linear probe.
    """

    kind: Literal["heldout"] = "heldout"
    name: TaskName
    """The task's name in results and tables; choose one that no other task of the suite has."""
    data: ConfigPath
    """A data recipe (YAML) or a built store (folder)."""
    source: str
    """The source of the data recipe whose examples are scored."""
    split: str = "test"
    """The split that is scored. No training may have seen it."""
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
    """Picks the queries and distractors that are sampled. Scores of different seeds are scores on different data."""
    language: Language = "eng-Latn"
    """The language of the texts in the task's metadata; mteb filters by it."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """The task; the store is opened now."""
        from nearfield.evaluation.tasks import heldout_task

        return [heldout_task(self, open_store)]

    @property
    def paths(self) -> list[Path]:
        """The data recipe or store."""
        return [self.data]

    def content(self) -> Any:
        """That of the store that the data recipe gives."""
        from nearfield.data.build import data_fingerprint
        from nearfield.data.config import DataConfig

        return data_fingerprint(DataConfig.load(self.data)) if self.data.is_file() else content_of(self.data)

    def check(self, where: str, key: str) -> None:
        """The source must be one of the data recipe's."""
        from nearfield.data.config import DataConfig

        if self.data.is_dir():
            return
        sources = [source.name for source in DataConfig.load(self.data).sources]
        if self.source not in sources:
            raise BadInputError(
                f"{key}.source: there is no source {self.source!r} in {self.data}",
                where=where,
                hint=f"Sources: {', '.join(sources)}.",
            )


class MmebTask(TaskSettings):
    """One of MMEB's evaluation files: each row has its own candidates, the first of which is right; the score is hit@1."""

    kind: Literal["mmeb"] = "mmeb"
    name: TaskName
    """The task's name in results and tables; choose one that no other task of the suite has."""
    file: ConfigPath
    """JSONL or Parquet with ``qry_inst``, ``qry_text``, ``qry_img_path``, ``tgt_text`` and ``tgt_img_path``."""
    images: ConfigPath | None = None
    """Where the paths of images start; null is the folder of the file."""
    language: Language = "eng-Latn"
    """The language of the texts in the task's metadata; mteb filters by it."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """The task; rows are read now, images when it runs."""
        from nearfield.evaluation.folder import mmeb_task

        return [mmeb_task(self)]

    @property
    def paths(self) -> list[Path]:
        """The file, and the folder of images if one is named."""
        return [self.file] if self.images is None else [self.file, self.images]


_HERE = "nearfield.evaluation.config"
TASKS = Kinds(
    "tasks",
    f"{_HERE}:TaskSettings",
    {
        "mteb": (f"{_HERE}:MtebTasks", "official tasks of mteb, by name, benchmark or filter"),
        "folder": (f"{_HERE}:FolderTasks", "local tasks: folders with meta.json and Parquet files"),
        "heldout": (f"{_HERE}:HeldOutTask", "the held-out split of a data recipe's source"),
        "mmeb": (f"{_HERE}:MmebTask", "one of MMEB's evaluation files"),
        "limit": ("nearfield.methods.limit:LimitTask", "every pair of some documents is asked for (LIMIT)"),
        "probing": ("nearfield.methods.probing:ProbingTasks", "linguistic probes on sentences of a small grammar"),
    },
)
TaskEntry = Annotated[TaskSettings, TASKS]
"""The settings of any task."""


class SuiteConfig(Config):
    """A named set of tasks."""

    name: str = Field(min_length=1)
    """The suite's name in logs and messages."""
    tasks: list[TaskEntry] = Field(min_length=1)
    """Entries are scored in this order; no two tasks may bear the same name."""

    @classmethod
    def of(cls, suite: SuiteConfig | Path) -> tuple[SuiteConfig, str]:
        """A suite from a YAML file or a folder of tasks (or as it is), and where it comes from."""
        if isinstance(suite, SuiteConfig):
            return suite, "suite"
        if suite.is_dir():
            folder = suite.resolve()
            return cls(name=folder.name or "folder", tasks=[FolderTasks(path=folder)]), str(suite)
        if not suite.exists():
            raise BadInputError(
                "this suite does not exist", where=str(suite), hint="A suite is a YAML file or a folder of tasks."
            )
        return cls.load(suite), str(suite)


def open_suite(
    suite: SuiteConfig | Path, *, only: Sequence[str] | None = None, open_store: OpenStore | None = None
) -> list[SuiteTask]:
    """The tasks of a suite, in its order, with no data loaded; ``only`` keeps the named ones."""
    config, where = SuiteConfig.of(suite)
    open_once = functools.cache(open_store or default_open_store)
    tasks = [task for entry in config.tasks for task in entry.build(where, open_once)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"the task {name!r} stands twice in the suite {config.name!r}", where=where)
    if only is None:
        return tasks
    for name in only:
        if name not in names:
            raise BadInputError(
                f"there is no task {name!r} in the suite {config.name!r}",
                where=where,
                hint=f"Tasks: {', '.join(names)}.",
            )
    return [task for task in tasks if task.name in set(only)]


CACHE = Path("runs/.cache")


def default_open_store(path: Path) -> Any:
    """Open a store folder, or build a data recipe's store below ``runs/.cache`` unless it is there already."""
    from nearfield import data
    from nearfield.encoders.encode import text_encoder

    if path.is_dir():
        return data.Store.open(path)
    return data.prepare_store(data.DataConfig.load(path), CACHE, encoders=text_encoder)
