"""Evaluation during the training: what the loop is handed, and the data that it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.pipeline.artifacts import Artifacts
from nearfield.pipeline.freshness import Freshness

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
    from nearfield.evaluation.during import DuringTraining

    model.prompts = dict(stages.trained_contract.model_prompts)
    return DuringTraining(
        model,
        stages.run.checked.training_suite or during.suite,
        name=f"nearfield/{stages.recipe.name}",
        metric=during.metric,
        contract=stages.trained_contract.to_json()["prompts"] if during.prompts == "contract" else None,
        open_store=open_store,
    )


def prepare_training_suite(stages: Freshness, open_store: Callable[[Path], Store]) -> None:
    """Build what the suite's tasks read, so that one process does it before the others look; complain now, not later."""
    during = stages.recipe.training.evaluation
    if during is not None:
        from nearfield.evaluation.suite import open_suite

        open_suite(stages.run.checked.training_suite or during.suite, open_store=open_store)
