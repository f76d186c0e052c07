"""Evaluation during the training: what the loop is handed, and the data that it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.pipeline.artifacts import Artifacts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.data.store import Store
    from nearfield.training.evaluating import Evaluate


def evaluation_during_training(
    stages: Artifacts, model: SentenceTransformer, open_store: Callable[[Path], Store]
) -> Evaluate | None:
    """The function that scores ``model`` on the recipe's small suite; None where none is asked for.

    The model gets the prompts that it will be saved with: those are the ones it is trained and scored with.
    """
    during = stages.recipe.training.evaluation
    if during is None:
        return None
    from nearfield.evaluation.contract import TrainedPrompts
    from nearfield.evaluation.during import DuringTraining

    stages.trained_contract.apply(model)
    return DuringTraining(
        model,
        stages.run.checked.training_suite or during.suite,
        name=f"nearfield/{stages.recipe.name}",
        metric=during.metric,
        contract=TrainedPrompts.of(stages.trained_contract.to_json()) if during.prompts == "contract" else None,
        open_store=open_store,
    )


def prepare_suites(stages: Artifacts, open_store: Callable[[Path], Store], scores: bool) -> None:
    """Build what the suites' tasks read, so that one process does it before the others look; complain now, not later.

    Of the suite of the evaluation, if it is scored, the prompts are looked at: those that the model will be saved with.
    """
    from nearfield.evaluation.suite import open_suite
    from nearfield.pipeline.prompting import suite_prompts

    during = stages.recipe.training.evaluation
    if during is not None:
        open_suite(stages.run.checked.training_suite or during.suite, open_store=open_store)
    if scores:
        suite_prompts(stages, open_store)
