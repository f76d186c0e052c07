"""From a suite (config, YAML file or folder of tasks) to the tasks that mteb runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nearfield.errors import BadInputError
from nearfield.evaluation.config import (
    FolderTasks,
    HeldOutTask,
    LimitTask,
    MmebTask,
    MtebTasks,
    ProbingTasks,
    SuiteConfig,
)
from nearfield.evaluation.folder import folder_task, task_folders
from nearfield.evaluation.heldout import OpenStore, default_open_store, heldout_task
from nearfield.evaluation.limit import limit_task
from nearfield.evaluation.local import SuiteTask
from nearfield.evaluation.mmeb import mmeb_task
from nearfield.evaluation.probing import probing_tasks


def open_suite(
    suite: SuiteConfig | Path, *, only: Sequence[str] | None = None, open_store: OpenStore | None = None
) -> list[SuiteTask]:
    """The tasks of a suite, in its order, with no data loaded; ``only`` keeps the named ones."""
    config, where = _config(suite)
    open_once = functools.cache(open_store or default_open_store)
    tasks: list[SuiteTask] = []
    for entry in config.tasks:
        if isinstance(entry, MtebTasks):
            tasks += _official(entry, where)
        elif isinstance(entry, FolderTasks):
            tasks += [folder_task(folder) for folder in task_folders(entry.path, entry.only)]
        elif isinstance(entry, MmebTask):
            tasks.append(mmeb_task(entry))
        elif isinstance(entry, LimitTask):
            tasks.append(limit_task(entry))
        elif isinstance(entry, ProbingTasks):
            tasks += probing_tasks(entry)
        else:
            assert isinstance(entry, HeldOutTask)
            tasks.append(heldout_task(entry, open_once))
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


def _config(suite: SuiteConfig | Path) -> tuple[SuiteConfig, str]:
    if isinstance(suite, SuiteConfig):
        return suite, "suite"
    if suite.is_dir():
        folder = suite.resolve()
        return SuiteConfig(name=folder.name or "folder", tasks=[FolderTasks(path=folder)]), str(suite)
    if not suite.exists():
        raise BadInputError(
            "this suite does not exist", where=str(suite), hint="A suite is a YAML file or a folder of tasks."
        )
    return SuiteConfig.load(suite), str(suite)


def _official(entry: MtebTasks, where: str) -> list[SuiteTask]:
    import mteb

    try:
        if entry.benchmark is not None:
            tasks = _in_languages(_filtered(_own(mteb.get_benchmark(entry.benchmark).tasks), entry), entry.languages)
        elif entry.filtered:
            known = mteb.get_tasks(exclude_superseded=True, exclude_private=True)
            tasks = _in_languages(_filtered(known, entry), entry.languages)
        else:
            filters = {"languages": entry.languages, "eval_splits": entry.splits, "hf_subsets": entry.subsets}
            tasks = [mteb.get_task(name, **filters) for name in entry.names]
    except (KeyError, ValueError) as error:
        message = str(error.args[0] if error.args else error).removeprefix("KeyError: ")
        raise BadInputError(f"mteb: {message}", where=where) from error
    if not tasks:
        raise BadInputError(
            f"no task of {entry.benchmark or 'mteb'} is left by types, domains, modalities and languages", where=where
        )
    return [SuiteTask(task) for task in tasks]


def _own(tasks: Iterable[Any]) -> list[Any]:
    """Copies of the tasks of a benchmark, which mteb hands to all who ask for it: what is changed of one is changed for all."""
    return [copy.deepcopy(task) for task in tasks]


def _filtered(tasks: Iterable[Any], entry: MtebTasks) -> list[Any]:
    """The tasks of the types, domains and modalities that are asked for."""

    def kept(metadata: Any) -> bool:
        return (
            (entry.types is None or metadata.type in entry.types)
            and (entry.domains is None or bool(set(metadata.domains or ()) & set(entry.domains)))
            and (entry.modalities is None or set(metadata.modalities) <= set(entry.modalities))
        )

    return [task for task in tasks if kept(task.metadata)]


def _in_languages(tasks: list[Any], languages: Sequence[str] | None) -> list[Any]:
    """The tasks of a benchmark that have a subset in one of the languages, cut down to those subsets."""
    if languages is None:
        return tasks
    kept = []
    for task in tasks:
        try:
            kept.append(task.filter_languages(list(languages)))
        except ValueError:  # mteb's way to say that no subset is left
            continue
    return kept
