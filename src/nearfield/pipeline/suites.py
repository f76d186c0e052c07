"""The suites that a run is scored on: what their scores depend on, whether their data is there, the prompts of their tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.evaluation.config import SuiteConfig, content_of, open_suite
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.prompts import PromptContract
    from nearfield.pipeline.run import Run
    from nearfield.pipeline.stage import Job
    from nearfield.training.evaluation import Evaluate


def suite_content(path: Path, suite: SuiteConfig | None) -> list[Any]:
    """The settings and data of a suite's tasks, for a fingerprint; ``suite`` is None for a folder of tasks."""
    if suite is None:
        return [content_of(path)]
    inputs: list[Any] = []
    for task in suite.tasks:
        inputs.append(task.identity(exclude={"data", "path", "file", "images"}))
        if task.paths:
            inputs.append(task.content())
    return inputs


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
        for path in task.paths:
            if not path.exists():
                yield Notice(
                    "suite-data-missing", f"{evaluation.suite}: the data of a task is missing: {path}", blocks=True
                )
        if task.needs_hub and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"):
            yield Notice(
                "suite-needs-hub",
                "the suite has tasks whose data comes from the hub, and HF_HUB_OFFLINE forbids to fetch it",
            )


def suite_prompts(job: Job, contract: PromptContract) -> list[Notice]:
    """Notices of tasks of the evaluation's suite whose prompts no source was trained with.

    ``contract`` is what the model is saved with. Raises :class:`BadInputError` where a task would get a prompt that the
    training does not allow.
    """
    evaluation = job.recipe.evaluation
    if evaluation is None:
        return []
    suite = job.run.checked.suite or evaluation.suite
    return _prompts_of(job, contract, suite, evaluation.prompts, str(evaluation.suite), "evaluation")


def training_suite_prompts(job: Job, contract: PromptContract) -> list[Notice]:
    """The same of the suite that the model is scored on while it is trained; what its tasks read is built where it is missing."""
    during = job.recipe.training.evaluation
    if during is None:
        return []
    suite, key = job.run.checked.training_suite or during.suite, "training.evaluation"
    return _prompts_of(job, contract, suite, during.prompts, f"{key}.suite", key)


def _prompts_of(
    job: Job, contract: PromptContract, suite: SuiteConfig | Path, mode: str, where: str, key: str
) -> list[Notice]:
    from nearfield.evaluation.contract import (
        SavedPrompts,
        TrainedPrompts,
        as_is_notice,
        check_prompts,
        untrained_types,
    )
    from nearfield.evaluation.tasks import parts_of

    parts = [part for task in open_suite(suite, open_store=job.open_store) for part in parts_of(task.task)]
    saved = SavedPrompts(contract.model_prompts, contract.default_prompt_name)
    allowed = TrainedPrompts.of(contract.to_json())
    found = [notice for notices in untrained_types(saved, allowed, parts).values() for notice in notices]
    if mode == "contract":
        hint = f"State the prompt under prompts.types, or set {key}.prompts=as-is."
        check_prompts(saved, allowed, parts, where=where, hint=hint)
    else:
        found.append(as_is_notice(saved, allowed, parts))
    return found


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
