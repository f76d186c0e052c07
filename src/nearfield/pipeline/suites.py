"""The suites that a run is scored on: what their scores depend on, whether their data is there, the prompts of their tasks,
and whether their texts are in the training data (a stored report, for the manifest and the model card)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.data.decontaminate import VERSION, read_report
from nearfield.encoders.identity import computing_versions
from nearfield.encoders.source import locate
from nearfield.errors import BadInputError, Notice
from nearfield.evaluation.config import SuiteConfig, content_of, open_suite
from nearfield.files import fingerprint
from nearfield.provenance import versions_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.data.decontaminate import ContaminationReport, DecontaminationConfig
    from nearfield.data.store import Store
    from nearfield.encoders.prompts import PromptContract
    from nearfield.pipeline.data import DataStage
    from nearfield.pipeline.run import Job, Run
    from nearfield.training.evaluation import Evaluate

logger = logging.getLogger("nearfield.pipeline")


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
    from nearfield.evaluation.encoder import SavedPrompts, TrainedPrompts, prompt_notices
    from nearfield.evaluation.tasks import parts_of

    parts = [part for task in open_suite(suite, open_store=job.open_store) for part in parts_of(task.task)]
    saved = SavedPrompts(contract.model_prompts, contract.default_prompt_name)
    allowed = TrainedPrompts.of(contract.to_json())
    hint = f"State the prompt under prompts.types, or set {key}.prompts=as-is."
    by_task = prompt_notices(saved, allowed, parts, where=where, hint=hint, check=mode == "contract")
    return [notice for of_task in by_task.values() for notice in of_task]


def evaluation_during_training(job: Job, model: SentenceTransformer, contract: PromptContract) -> Evaluate | None:
    """The function that scores ``model`` on the recipe's small suite; None where none is asked for.

    The model gets the prompts of ``contract``, which it will be saved with: those are the ones it is trained and scored with.
    """
    during = job.recipe.training.evaluation
    if during is None:
        return None
    from nearfield.evaluation.encoder import TrainedPrompts
    from nearfield.evaluation.runner import DuringTraining

    contract.apply(model)
    return DuringTraining(
        model,
        job.run.checked.training_suite or during.suite,
        name=f"nearfield/{job.recipe.name}",
        metric=during.metric,
        contract=TrainedPrompts.of(contract.to_json()) if during.prompts == "contract" else None,
        open_store=job.open_store,
    )


@dataclass(frozen=True)
class StoredReport:
    """A report and the file that keeps it."""

    path: Path
    report: ContaminationReport


def suite_fingerprint(path: Path, suite: SuiteConfig | None) -> str:
    """32 hex digits over a suite's settings and the content of its local data."""
    return fingerprint(suite_content(path, suite))


def report_path(cache: Path, data: str, suite: str) -> Path:
    """Where the report of a store against a suite is kept, by their fingerprints."""
    return cache / "decontamination" / f"{data}-{suite}.json"


def decontaminate_store(
    store: Store,
    suite: Path,
    cache: Path,
    config: DecontaminationConfig | None = None,
    *,
    sources: Sequence[str] | None = None,
    split: str = "train",
    encoder: str | None = None,
) -> StoredReport:
    """Compare a store's training texts with a suite (a YAML file or a folder of tasks); the report is kept in ``cache``.

    ``encoder`` names a model whose embeddings find near-duplicates, too; it encodes all texts of both sides.
    """
    from nearfield.data.build import prepare_store
    from nearfield.data.decontaminate import decontaminate
    from nearfield.data.store import Store
    from nearfield.encoders.encode import text_encoder
    from nearfield.evaluation import SuiteConfig
    from nearfield.evaluation.config import open_suite
    from nearfield.evaluation.texts import benchmark_tasks

    loaded = None if suite.is_dir() else SuiteConfig.load(suite)

    def open_store(path: Path) -> Store:
        return Store.open(path) if path.is_dir() else prepare_store(path, cache, encoders=text_encoder)

    tasks = open_suite(loaded or suite, open_store=open_store)
    mark = suite_fingerprint(suite, loaded)
    report = decontaminate(
        store,
        benchmark_tasks(tasks),
        config,
        suite=suite.resolve().name if loaded is None else loaded.name,
        sources=sources,
        split=split,
        encode=None if encoder is None else text_encoder(encoder),
        encoder=encoder,
    )
    path = report_path(cache, store.fingerprint, mark)
    report = replace(report, suite_fingerprint=mark, made_with=_made_with(encoder))
    report.save(path)
    return StoredReport(path, report)


def _made_with(encoder: str | None) -> dict[str, Any]:
    """Everything else that a report depends on, beside the texts of both sides and its settings."""
    made: dict[str, Any] = {"version": VERSION, "versions": versions_of(["mteb"])}
    if encoder is not None:
        made["versions"] |= computing_versions()
        made["encoder"] = locate(encoder).content
    return made


def stored_report(cache: Path, data: str, suite: str, sources: Sequence[str], split: str) -> StoredReport | None:
    """The kept report of a store against a suite, if there is one, it looked at these sources and this split, and it would
    be the same today."""
    path = report_path(cache, data, suite)
    if not path.is_file():
        return None
    try:
        report = read_report(path)
    except BadInputError as error:
        logger.warning("%s", error)
        return None
    if report.split != split or not set(sources) <= set(report.sources):
        return None
    if report.made_with != _made_with(report.encoder):
        logger.warning(
            "%s was made with another version of mteb or nearfield, or another model, and is left out; compare again: "
            "nearfield data decontaminate",
            path,
        )
        return None
    return StoredReport(path, report)


def report_of(data: DataStage) -> StoredReport | None:
    """The report of a run's data against a suite: the run's own, or a kept one of the suite that it is scored on, if it fits both."""
    if data.recipe.decontaminate is not None:
        own = data.job.run.folder / "contamination.json"
        return StoredReport(own, read_report(own)) if own.is_file() else None
    evaluation = data.recipe.evaluation
    if evaluation is None:
        return None
    mark = suite_fingerprint(evaluation.suite, data.job.run.checked.suite)
    sources = [source.name for source in data.job.run.checked.sources]
    return stored_report(data.job.run.cache, data.fingerprint, mark, sources, data.recipe.split)


def contamination_entry(data: DataStage) -> dict[str, Any] | None:
    """The entry of the manifest: where the report is, and for each task the benchmark texts found in the training data."""
    stored = report_of(data)
    if stored is None:
        return None
    report = stored.report
    return {
        "report": str(stored.path),
        "suite": report.suite,
        "suite_fingerprint": report.suite_fingerprint,
        "data": report.data,
        "training_texts": report.texts,
        "contaminated": report.contaminated,
        **({"left_out": True} if report.left_out else {}),
        "unseen": report.unseen,
        "tasks": {
            task.task: {"problem": task.problem}
            if task.problem is not None
            else {"texts": task.texts, "matched": {role: dict(kinds) for role, kinds in task.matched.items()}}
            for task in report.tasks
        },
    }


def contamination_lines(data: DataStage) -> list[str]:
    """The lines of the model card."""
    stored = report_of(data)
    if stored is not None:
        return stored.report.lines()
    if data.recipe.evaluation is None:
        return []
    return ["The training texts were not compared with the texts of the suite (`nearfield data decontaminate`)."]
