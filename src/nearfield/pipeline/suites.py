"""The suites that a run is scored on: what their scores depend on, whether their data is there, the prompts of their tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.evaluation.config import FolderTasks, HeldOutTask, MmebTask, MtebTasks, SuiteConfig
from nearfield.files import hash_file, hash_folder
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.prompts import PromptContract
    from nearfield.evaluation.config import TaskEntry
    from nearfield.pipeline.run import Run
    from nearfield.pipeline.stage import Job
    from nearfield.training.evaluating import Evaluate


def suite_content(path: Path, suite: SuiteConfig | None) -> list[Any]:
    """What the scores on a suite depend on: its tasks' settings and data; ``suite`` is None for a folder of tasks."""
    from nearfield.data.build import data_fingerprint
    from nearfield.data.config import DataConfig

    if suite is None:
        return [_content(path)]
    inputs: list[Any] = []
    for task in suite.tasks:
        inputs.append(task.identity(exclude={"data", "path", "file", "images"}))
        if isinstance(task, HeldOutTask):
            recipe = task.data.is_file()
            inputs.append(data_fingerprint(DataConfig.load(task.data)) if recipe else _content(task.data))
        elif task.kind == "folder":
            inputs.append(_content(task.path))
        elif task.kind == "mmeb":
            inputs.append([_content(task.file), *([] if task.images is None else [_content(task.images)])])
    return inputs


def _content(path: Path) -> str | None:
    """The hash of a file or folder; None where there is none, which is said before it is read."""
    return hash_folder(path) if path.is_dir() else hash_file(path) if path.is_file() else None


def suite_notices(run: Run) -> Iterator[Notice]:
    """Data of the evaluation that is not there."""
    evaluation = run.recipe.evaluation
    if evaluation is None:
        return
    suite = run.checked.suite
    if suite is None:
        if not evaluation.suite.is_dir():
            yield Notice("suite-missing", f"the suite {evaluation.suite} does not exist", blocks=True)
        return
    for task in suite.tasks:
        for path in _paths_of(task):
            if not path.exists():
                yield Notice(
                    "suite-data-missing", f"{evaluation.suite}: the data of a task is missing: {path}", blocks=True
                )
        if isinstance(task, MtebTasks) and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"):
            yield Notice(
                "suite-needs-hub",
                "the suite has tasks whose data comes from the hub, and HF_HUB_OFFLINE forbids to fetch it",
            )


def _paths_of(task: TaskEntry) -> list[Path]:
    """Files and folders that a task is read from."""
    if isinstance(task, MmebTask):
        return [task.file] if task.images is None else [task.file, task.images]
    return [task.data] if isinstance(task, HeldOutTask) else [task.path] if isinstance(task, FolderTasks) else []


def suite_prompts(job: Job, contract: PromptContract) -> list[Notice]:
    """What the tasks of the evaluation's suite get that no source was trained for.

    ``contract`` is what the model is saved with. Raises :class:`BadInputError` where a task would get a prompt that the
    training does not allow.
    """
    from nearfield.evaluation.contract import SavedPrompts, TrainedPrompts, check_prompts, untrained_types
    from nearfield.evaluation.local import parts_of
    from nearfield.evaluation.suite import open_suite

    evaluation = job.recipe.evaluation
    if evaluation is None:
        return []
    tasks = open_suite(job.run.checked.suite or evaluation.suite, open_store=job.open_store)
    parts = [part for task in tasks for part in parts_of(task.task)]
    saved = SavedPrompts(contract.model_prompts, contract.default_prompt_name)
    allowed = TrainedPrompts.of(contract.to_json())
    if evaluation.prompts == "contract":
        hint = "State the prompt under prompts.types, or set evaluation.prompts=as-is."
        check_prompts(saved, allowed, parts, where=str(evaluation.suite), hint=hint)
    return [notice for notices in untrained_types(saved, allowed, parts).values() for notice in notices]


def prepare_training_suite(job: Job) -> None:
    """Build what the tasks of the evaluation during the training read, so that one process does it before the others look."""
    from nearfield.evaluation.suite import open_suite

    during = job.recipe.training.evaluation
    if during is not None:
        open_suite(job.run.checked.training_suite or during.suite, open_store=job.open_store)


def evaluation_during_training(job: Job, model: SentenceTransformer, contract: PromptContract) -> Evaluate | None:
    """The function that scores ``model`` on the recipe's small suite; None where none is asked for.

    The model gets the prompts of ``contract``, which it will be saved with: those are the ones it is trained and scored with.
    """
    during = job.recipe.training.evaluation
    if during is None:
        return None
    from nearfield.evaluation.contract import TrainedPrompts
    from nearfield.evaluation.during import DuringTraining

    contract.apply(model)
    return DuringTraining(
        model,
        job.run.checked.training_suite or during.suite,
        name=f"nearfield/{job.recipe.name}",
        metric=during.metric,
        contract=TrainedPrompts.of(contract.to_json()) if during.prompts == "contract" else None,
        open_store=job.open_store,
    )
