"""The stages after training: ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.encoders.load import LoadedEncoder, build_encoder, load_encoder, save_encoder
from nearfield.encoders.source import folder_revision
from nearfield.errors import BadInputError, NearfieldError, from_file, in_file, refuse
from nearfield.files import atomic_path, hash_file, write_json
from nearfield.pipeline.run import Job, Stage, StageStatus
from nearfield.pipeline.suites import suite_content

if TYPE_CHECKING:
    from nearfield.pipeline.training import TrainStage

logger = logging.getLogger("nearfield.pipeline")

EVALUATE_VERSION = 3


class EvaluateStage(Stage):
    """Scores the trained model, the base model and the baselines."""

    name = "evaluate"
    packages = ("mteb",)

    def __init__(self, job: Job, train: TrainStage) -> None:
        super().__init__(job)
        self.train = train

    @property
    def models(self) -> int:
        """How many models are scored."""
        evaluation = self.recipe.evaluation
        return 0 if evaluation is None else 1 + evaluation.before + len(evaluation.baselines)

    @property
    def is_wanted(self) -> bool:
        """Where the recipe has an evaluation."""
        return self.models > 0

    def inputs(self) -> Any:
        """The trained model, the settings of the evaluation, and the suite with its data."""
        evaluation, suite = self.recipe.evaluation, None
        if evaluation is not None:
            # Texts for the report are not scored; without cut dimensions the fingerprint is that of versions that had none.
            left_out = {"suite", "analysed_texts"} | (set() if evaluation.dimensions else {"dimensions"})
            settings = evaluation.model_dump(mode="json", exclude=left_out)
            suite = [settings, *suite_content(evaluation.suite, self.job.run.checked.suite)]
        moved = {"moved_data": self.moved_data} if self.moved_data else {}
        return {"version": EVALUATE_VERSION, "train": self.train.fingerprint, "suite": suite, **moved}

    @cached_property
    def moved_data(self) -> dict[str, str]:
        """Official task -> the data that mteb has scored it on since this run was first scored on other data."""
        return {**self._recorded("moved_data"), **{task: now for task, (_, now) in self._newly_moved.items()}}

    def _recorded(self, key: str) -> dict[str, Any]:
        value = self.job.run.record(self.name).get(key)
        return value if isinstance(value, dict) else {}

    @cached_property
    def _newly_moved(self) -> dict[str, tuple[str, str]]:
        """Task -> the revision of its data that was scored, and another one that the mteb of today would score."""
        if self._recorded("versions").get("mteb") in (None, self.versions()["mteb"]):
            return {}
        from nearfield.evaluation.results import moved_data

        return moved_data([self.job.run.folder / folder for folder in self._recorded("results").values()])

    def status(self) -> StageStatus:
        """Also stale where an mteb that was installed since scores other data."""
        state = super().status()
        if state.state != "stale" or not self._newly_moved:
            return state
        return replace(state, detail=self._moved_in_words())

    def _moved_in_words(self) -> str:
        now = self.versions()["mteb"]
        moved = [f"{task} ({new[:8]}, was {old[:8]})" for task, (old, new) in self._newly_moved.items()]
        return f"mteb {now} scores other data than mteb {self._recorded('versions')['mteb']}: {', '.join(moved)}"

    def outputs(self) -> list[Path]:
        """The results."""
        return [self.job.run.folder / "results"]

    def run(self) -> dict[str, Any]:
        """Score all models."""
        from nearfield.evaluation import evaluate, open_model

        evaluation = self.recipe.evaluation
        assert evaluation is not None
        if self._newly_moved:
            logger.warning("The stage evaluate runs again: %s", self._moved_in_words())
        self.check_model()
        models: dict[str, tuple[str | LoadedEncoder, str | None]] = {
            name: (name, None) for name in evaluation.baselines
        }
        if evaluation.before:
            models["before"] = (self.untrained(), None)
        models["after"] = (self.trained(), f"nearfield/{self.recipe.name}")
        folders, failures = {}, {}
        notices: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for label, (model, name) in models.items():
            logger.info("Evaluating %s (%s)", label, name or model)
            # The base model is the same in many runs; a trained one is scored once, but for its cut vectors.
            cache = self.job.run.cache / "vectors" if label == "before" or evaluation.dimensions else None
            result = evaluate(
                open_model(model, name=name, cache=cache),
                self.job.run.checked.suite or evaluation.suite,
                self.job.run.folder / "results",
                open_store=self.job.open_store,
                prompts="as-is" if label == "before" else evaluation.prompts,
            )
            if result.notices:
                notices[label] = {task: in_file(said) for task, said in result.notices.items()}
            folders[label] = str(result.results_dir.relative_to(self.job.run.folder))
            if result.failures:
                failures[label] = {task: str(reason) for task, reason in result.failures.items()}
        for dimensions in evaluation.dimensions:
            model, name = models["after"]
            cut = evaluate(
                open_model(model, name=name, cache=self.job.run.cache / "vectors", dimensions=dimensions),
                self.job.run.checked.suite or evaluation.suite,
                self.job.run.folder / "results",
                open_store=self.job.open_store,
                prompts=evaluation.prompts,
            )
            if cut.failures:
                failures[cut.model] = {task: str(reason) for task, reason in cut.failures.items()}
        if failures:
            lines = [
                f"{label}: {task}: {reason}" for label, tasks in failures.items() for task, reason in tasks.items()
            ]
            raise NearfieldError("some tasks failed:\n" + "\n".join(lines), where=str(self.job.run.folder / "results"))
        if self.job.strict:
            serious = [notice for said in notices.get("after", {}).values() for notice in from_file(said)]
            refuse(serious, where=str(self.job.run.folder / folders["after"]))
        more = {"notices": notices, "moved_data": self.moved_data}
        return {"results": folders, **{key: value for key, value in more.items() if value}}

    def check_model(self) -> None:
        """Refuse to score a saved model that is not the one that the training wrote."""
        folder, wanted = self.job.run.folder / "model", self.job.run.record("train").get("model")
        if wanted is not None and folder_revision(folder) != wanted:
            raise BadInputError(
                "this model is not the one that this training wrote: a file was changed or is damaged",
                where=str(folder),
                hint=f"rm -r {folder}, then run the same command: the last checkpoint is saved as a model again. "
                "A model that was changed on purpose is scored by `nearfield eval`.",
            )

    def trained(self) -> str | LoadedEncoder:
        """The trained model: its folder, or the model where that is an adapter alone."""
        folder = str(self.job.run.folder / "model")
        if self.recipe.encoder.adapter is not None and self.recipe.encoder.adapter.save == "adapter":
            # The folder names its base, but not where on this machine that lies.
            return load_encoder(folder, base=self.recipe.encoder.model)
        return folder

    def untrained(self) -> str:
        """The base model, of its own length: by name where the recipe changes nothing, else saved beside the run as the recipe
        builds it."""
        encoder = self.recipe.encoder
        if not encoder.changes_base:
            return encoder.model

        path = self.job.run.folder / "untrained"
        with atomic_path(path) as aside:
            plain = encoder.model_copy(update={"adapter": None, "max_length": None})
            save_encoder(build_encoder(plain, "cpu", seed=self.recipe.seed).model, aside)
        return str(path)


class CompareStage(Stage):
    """Intervals for each model, and paired differences to the base model."""

    name = "compare"

    def __init__(self, job: Job, evaluate: EvaluateStage) -> None:
        super().__init__(job)
        self.evaluate = evaluate

    @property
    def is_wanted(self) -> bool:
        """Where there are two models or more."""
        return self.evaluate.models > 1

    def inputs(self) -> Any:
        """The results."""
        return {"evaluate": self.evaluate.fingerprint}

    def outputs(self) -> list[Path]:
        """The comparison."""
        return [self.job.run.folder / "comparison.json"]

    def run(self) -> dict[str, Any]:
        """Compare all models with the base model."""
        from nearfield.evaluation import compare, label_results

        folders = self.job.run.record("evaluate").get("results")
        if not isinstance(folders, dict) or not folders:
            raise BadInputError(
                "this manifest does not say where the results are",
                where=str(self.job.run.folder / "manifest.json"),
                hint="Delete it to run all stages again.",
            )
        baseline = "before" if "before" in folders else next(iter(folders))
        labels = sorted(folders, key=lambda label: (label != baseline, list(folders).index(label)))
        comparison = compare(
            label_results([self.job.run.folder / folders[label] for label in labels], labels), seed=self.recipe.seed
        )
        write_json(self.output, comparison.to_json())
        return {"baseline": baseline, "content": hash_file(self.output)}


class ReportStage(Stage):
    """Looks at the embeddings, and writes the HTML report."""

    name = "report"

    def __init__(self, job: Job, evaluate: EvaluateStage, compare: CompareStage) -> None:
        super().__init__(job)
        self.evaluate = evaluate
        self.compare = compare

    def inputs(self) -> Any:
        """The comparison, and how many texts are looked at."""
        evaluation = self.recipe.evaluation
        looked_at = evaluation.analysed_texts if evaluation is not None else 0
        return {"compare": self.compare.fingerprint, "analysed_texts": looked_at}

    def outputs(self) -> list[Path]:
        """The page."""
        return [self.job.run.folder / "report.html"]

    def run(self) -> dict[str, Any]:
        """Write ``analysis.json`` where texts can be looked at, and the page."""
        from nearfield.reporting import build_report

        try:
            self._look()
        except (NearfieldError, ValueError) as error:
            # Scores and curves are told all the same.
            logger.warning("The embeddings cannot be looked at: %s", error)
        result = build_report(self.job.run.folder)
        return {"bytes": result.size}

    def _look(self) -> None:
        """Write ``analysis.json``: the shape of the suite's texts before and after, and how alike both are."""
        from nearfield.analysis.geometry import NEIGHBOURS
        from nearfield.encoders.encode import text_encoder
        from nearfield.evaluation.config import open_suite
        from nearfield.pipeline.embeddings import Encode, analyse_models, sample_of

        evaluation = self.recipe.evaluation
        if evaluation is None or not evaluation.analysed_texts:
            return
        tasks = open_suite(self.job.run.checked.suite or evaluation.suite, open_store=self.job.open_store)
        sample = sample_of(tasks, evaluation.analysed_texts, self.recipe.seed)
        if len(sample.texts) < 4 * NEIGHBOURS:
            raise NearfieldError(f"the suite has {len(sample.texts)} texts; {4 * NEIGHBOURS} are needed")
        encoders: dict[str, Encode] = {"before": text_encoder(self.evaluate.untrained())} if evaluation.before else {}
        encoders["after"] = text_encoder(self.evaluate.trained())
        analysis = analyse_models(encoders, sample, seed=self.recipe.seed)
        write_json(self.job.run.folder / "analysis.json", analysis.to_json())
