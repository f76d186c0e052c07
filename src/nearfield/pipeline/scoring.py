"""The stages after training: results, comparison, report."""

from __future__ import annotations

import logging
from typing import Any

from nearfield.encoders.build import LoadedEncoder, build_encoder, load_encoder, save_encoder
from nearfield.errors import NearfieldError
from nearfield.files import atomic_path, write_json
from nearfield.pipeline.artifacts import Artifacts

logger = logging.getLogger("nearfield.pipeline")


class ScoringStages(Artifacts):
    """What rank 0 does with the model that was trained."""

    def evaluate(self) -> dict[str, Any]:
        """Score the trained model, the base model and the baselines."""
        from nearfield.evaluation import evaluate

        evaluation = self.recipe.evaluation
        assert evaluation is not None
        models: dict[str, tuple[str | LoadedEncoder, str | None]] = {
            name: (name, None) for name in evaluation.baselines
        }
        if evaluation.before:
            models["before"] = (self._untrained(), None)
        trained: str | LoadedEncoder = str(self.run.folder / "model")
        if self.recipe.encoder.adapter is not None and self.recipe.encoder.adapter.save == "adapter":
            # The folder names its base, but not where on this machine that lies.
            trained = load_encoder(str(trained), base=self.recipe.encoder.model)
        models["after"] = (trained, f"nearfield/{self.recipe.name}")
        folders, failures = {}, {}
        for label, (model, name) in models.items():
            logger.info("Evaluating %s (%s)", label, name or model)
            result = evaluate(
                model,
                self.run.checked.suite or evaluation.suite,
                self.run.folder / "results",
                name=name,
                open_store=self._open_store,
                prompts="as-is" if label == "before" else evaluation.prompts,
                # The base model is the same in many runs; a trained one is scored once.
                cache=self.run.cache / "vectors" if label == "before" else None,
            )
            folders[label] = str(result.results_dir.relative_to(self.run.folder))
            if result.failures:
                failures[label] = {task: str(reason) for task, reason in result.failures.items()}
        if failures:
            lines = [
                f"{label}: {task}: {reason}" for label, tasks in failures.items() for task, reason in tasks.items()
            ]
            raise NearfieldError("some tasks failed:\n" + "\n".join(lines), where=str(self.run.folder / "results"))
        return {"results": folders}

    def _untrained(self) -> str:
        """The base model as the recipe builds it: by name where the recipe changes nothing, else saved beside the run."""
        encoder = self.recipe.encoder
        if not encoder.changes_base:
            return encoder.model

        path = self.run.folder / "untrained"
        with atomic_path(path) as aside:
            plain = encoder.model_copy(update={"adapter": None})
            save_encoder(build_encoder(plain, "cpu", seed=self.recipe.seed).model, aside)
        return str(path)

    def compare(self) -> dict[str, Any]:
        """Intervals for each model and paired differences to the base model."""
        from nearfield.evaluation import compare

        folders = self.run.record("evaluate")["results"]
        baseline = "before" if "before" in folders else next(iter(folders))
        labels = sorted(folders, key=lambda label: (label != baseline, list(folders).index(label)))
        comparison = compare(
            [self.run.folder / folders[label] for label in labels], labels=labels, seed=self.recipe.seed
        )
        write_json(self.run.folder / "comparison.json", comparison.to_json())
        return {"baseline": baseline}

    def report(self) -> dict[str, Any]:
        """Write the HTML report."""
        from nearfield.reporting import build_report

        result = build_report(self.run.folder)
        return {"bytes": result.size}
