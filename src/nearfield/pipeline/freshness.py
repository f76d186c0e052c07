"""Which stages a run has, what each depends on, and whether it is done: fingerprints, never time stamps."""

from __future__ import annotations

import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from nearfield.batching.plan import VERSION as PLAN_VERSION
from nearfield.checksums import damage
from nearfield.data.tokens import VERSION as TOKENS_VERSION
from nearfield.encoders.base_prompts import base_prompts
from nearfield.encoders.borders import folder_pools_prompt
from nearfield.encoders.build import ModelSource, locate
from nearfield.encoders.identity import PACKAGES as COMPUTING_PACKAGES
from nearfield.encoders.prompts import PromptContract, make_contract
from nearfield.errors import BadInputError
from nearfield.evaluation.config import HeldOutTask, SuiteConfig
from nearfield.files import fingerprint, hash_file, hash_folder
from nearfield.mining.config import DenseTeacher
from nearfield.pipeline.run import Run, StageStatus
from nearfield.pipeline.teaching import (
    guide_teacher,
    negatives_fingerprint,
    planning_teacher,
    teachers_of_vectors,
    vectors_fingerprint,
)
from nearfield.provenance import versions_of

STAGES = ("data", "vectors", "mine", "tokens", "plan", "train", "evaluate", "compare", "report")
TRAIN_VERSION = 2
EVALUATE_VERSION = 3

logger = logging.getLogger("nearfield.pipeline")

_PACKAGES = {
    "vectors": COMPUTING_PACKAGES,
    "mine": (*COMPUTING_PACKAGES, "bm25s", "PyStemmer", "faiss-cpu"),
    "tokens": ("transformers", "sentence-transformers", "tokenizers", "sentencepiece", "tiktoken", "pillow", "numpy"),
}
"""The packages whose versions change what a stage puts into the shared cache."""

# What decides how a training runs but not what comes out of it.
_NOT_IN_TRAINING_FINGERPRINT = {
    "device",
    "backend",
    "collective_timeout",
    "micro_batch_tokens",
    "packing",
    "compile",
    "exchange",
    "gradient_checkpointing",
    "gradient_cache",
    "graph_tokens",
    "checkpoints",
    "log_every",
    "watch_every",
    "trackers",
    # It decides what the tokens are, of which the plan is made.
    "max_length",
    # What of it decides which model comes out is added by itself.
    "evaluation",
}


class Freshness:
    """What the stages of one run depend on and leave behind, found once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe

    # Fingerprints: each is made of settings, file contents and the fingerprints of earlier stages.

    @cached_property
    def base(self) -> ModelSource:
        """The base model's place, found without loading it."""
        return locate(self.recipe.encoder.model, self.recipe.encoder.revision)

    @cached_property
    def contract(self) -> PromptContract:
        """Which prompts this run trains with."""
        base = self.run.inherits or base_prompts(self.base.path, self.recipe.encoder.revision)
        return make_contract(self.run.checked.sources, self.recipe.prompts, base)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint that each stage of this recipe should have."""
        recipe = self.recipe
        found = {"data": self._data_print}
        encoder = self._encoder_print
        teachers = self._teacher_prints
        if teachers:
            found["vectors"] = fingerprint(list(teachers.values()))
        if recipe.mining is not None:
            found["mine"] = negatives_fingerprint(recipe, found["data"], self.source_names)
        tokens = {
            "version": TOKENS_VERSION,
            "data": found["data"],
            "tokenizer": [
                self.base.name,
                self.base.content,
                # The base's own is in its content.
                min(filter(None, [recipe.training.max_length, recipe.encoder.max_length]), default=None),
                *(["append_eos"] if recipe.encoder.append_eos else []),
                *([encoder["image_tower"]] if recipe.encoder.image_tower is not None else []),
            ],
            "prompts": self.contract.inputs(),
            "split": recipe.split,
        }
        pooled = recipe.encoder.pool_prompt
        if not (folder_pools_prompt(self.base.path) if pooled is None else pooled):
            # The ends of all prompts are borders of tokens then.
            tokens["pooled_without"] = sorted({*self.contract.model_prompts.values()})
        if recipe.prompts.in_context is not None:
            tokens["in_context"] = [recipe.prompts.in_context.model_dump(mode="json"), recipe.seed]
        if recipe.mining is not None and recipe.mining.corpus == "sources":
            # A mined document of another source is tokenised with a prompt that it had not.
            refreshes = recipe.mining.during is not None and recipe.mining.during.kind == "refresh"
            tokens["mined"] = "all" if refreshes else found["mine"]
        found["tokens"] = fingerprint(tokens)
        plan = {
            "version": PLAN_VERSION,
            "tokens": found["tokens"],
            "batches": recipe.batches.identity(),
            "seed": recipe.seed,
            "length": [recipe.training.epochs, recipe.training.max_steps],
        }
        if recipe.mining is not None:
            plan["mined"] = [found["mine"], recipe.mining.explicit]
        planning = planning_teacher(recipe)
        if planning is not None:
            plan["vectors"] = teachers[planning]
        found["plan"] = fingerprint(plan)
        train = {
            "version": TRAIN_VERSION,
            "plan": found["plan"],
            "encoder": encoder,
            "prompts": self.contract.model_prompts,
            "objective": recipe.objective.identity(),
            "training": recipe.training.identity(exclude=_NOT_IN_TRAINING_FINGERPRINT),
        }
        if self.contract.default_prompt_name is not None:
            train["default_prompt"] = self.contract.default_prompt_name
        if recipe.mining is not None and recipe.mining.during is not None:
            train["negatives"] = recipe.mining.during.identity()
        guide = guide_teacher(recipe)
        if guide is not None:
            train["guide"] = teachers[guide]
        during = recipe.training.evaluation
        if during is not None and during.decides:
            # Whether the untrained model is scored, and what is asked of prompts, decides nothing.
            settings = during.model_dump(mode="json", exclude={"suite", "at_start", "prompts"})
            train["evaluation"] = [settings, *suite_content(during.suite, self.run.checked.training_suite)]
        found["train"] = fingerprint(train)
        found["evaluate"] = fingerprint(
            {"version": EVALUATE_VERSION, "train": found["train"], "suite": self._suite_inputs()}
        )
        found["compare"] = fingerprint({"evaluate": found["evaluate"]})
        looked_at = recipe.evaluation.analysed_texts if recipe.evaluation is not None else 0
        found["report"] = fingerprint({"compare": found["compare"], "analysed_texts": looked_at})
        return found

    @cached_property
    def _encoder_print(self) -> dict[str, Any]:
        """The settings of the encoder, with an image tower by what it holds instead of where it lies."""
        encoder = self.recipe.encoder
        found = encoder.identity(exclude={"model", "revision"})
        if encoder.image_tower is not None and encoder.image_tower.model is not None:
            source = locate(encoder.image_tower.model, encoder.image_tower.revision)
            found["image_tower"] |= {"model": source.name, "revision": source.content}
        # What a recipe did not say before there were such settings leaves its runs as fresh as they were.
        return {key: value for key, value in found.items() if value is not None or key not in ("fresh", "image_tower")}

    @property
    def source_names(self) -> list[str]:
        """The sources that are trained on."""
        return [source.name for source in self.run.checked.sources]

    @cached_property
    def _data_print(self) -> str:
        from nearfield.data.build import data_fingerprint

        return data_fingerprint(self.run.checked.data)

    @cached_property
    def _teacher_prints(self) -> dict[DenseTeacher, str]:
        """The fingerprint of the vectors of each teacher that makes some."""
        return {
            teacher: vectors_fingerprint(teacher, self.recipe, self._data_print, self.source_names)
            for teacher in teachers_of_vectors(self.recipe)
        }

    def _suite_inputs(self) -> Any:
        evaluation = self.recipe.evaluation
        if evaluation is None:
            return None
        # What the report looks at scores nothing; without cut dimensions a run is what it was before there were any.
        left_out = {"suite", "analysed_texts"} | (set() if evaluation.dimensions else {"dimensions"})
        settings = evaluation.model_dump(mode="json", exclude=left_out)
        return [settings, *suite_content(evaluation.suite, self.run.checked.suite)]

    # Where the outputs are.

    @property
    def store_path(self) -> Path:
        """The store of items and examples."""
        return self.run.cache / "data" / self.fingerprints["data"]

    def vectors_path(self, teacher: DenseTeacher) -> Path:
        """A teacher's vectors."""
        return self._kept("vectors", "vectors", self._teacher_prints[teacher])

    @property
    def negatives_path(self) -> Path:
        """The mined negatives."""
        return self._kept("mine", "negatives", self.fingerprints["mine"])

    @property
    def tokens_path(self) -> Path:
        """The token cache."""
        return self._kept("tokens", "tokens", self.fingerprints["tokens"])

    def versions(self, stage: str) -> dict[str, str]:
        """The versions of the packages that change what a stage would put into the shared cache now."""
        return versions_of(_PACKAGES.get(stage, ()))

    def _kept(self, stage: str, folder: str, mark: str) -> Path:
        """Where a stage's output is in the shared cache, by what it is made of and by the versions that change its numbers.

        A run goes on with what it began with, whatever was installed since; no other run gets what other versions made.
        """
        record, now = self.run.record(stage), self.versions(stage)
        begun = record.get("versions") if record.get("fingerprint") == self.fingerprints[stage] else None
        places = [self.run.cache / folder / fingerprint([mark, versions]) for versions in (begun, now) if versions]
        return next((place for place in places if place.is_dir()), places[-1])

    def output(self, stage: str) -> Path:
        """The file or folder whose presence a finished stage promises."""
        folder = self.run.folder
        if stage == "vectors":
            return self.vectors_path(teachers_of_vectors(self.recipe)[-1])
        if stage == "mine":
            return self.negatives_path
        return {
            "data": self.store_path,
            "tokens": self.tokens_path,
            "plan": folder / "plan" / "summary.json",
            "train": folder / "model",
            "evaluate": folder / "results",
            "compare": folder / "comparison.json",
            "report": folder / "report.html",
        }[stage]

    def sealed(self, stage: str) -> list[Path]:
        """The folders with checksums that a stage leaves behind."""
        if stage == "vectors":
            return [self.vectors_path(teacher) for teacher in teachers_of_vectors(self.recipe)]
        if stage == "plan":
            return [self.run.folder / "plan"]
        return [self.output(stage)] if stage in ("data", "mine", "tokens") else []

    def drop_damaged(self, stage: str) -> bool:
        """Remove those of a stage's folders that are not what was written, so that the stage makes them again; whether there
        were any."""
        found = [(folder, damage(folder)) for folder in self.sealed(stage) if folder.is_dir()]
        for folder, wrong in found:
            if wrong is not None:
                logger.warning("The stage %s runs again: %s (%s)", stage, wrong, folder)
                shutil.rmtree(folder)
        return any(wrong is not None for _, wrong in found)

    def status(self, stage: str) -> StageStatus:
        """Whether a stage is done with the recipe as it is now."""
        from nearfield.training.checkpoint import checkpoint_paths

        record = self.run.record(stage)
        path = self.output(stage)
        fresh = record.get("fingerprint") == self.fingerprints[stage]
        if stage in ("data", "vectors", "mine", "tokens"):
            paths = (
                [self.vectors_path(one) for one in teachers_of_vectors(self.recipe)] if stage == "vectors" else [path]
            )
            state = "done" if all(one.is_dir() for one in paths) else "missing"
            return StageStatus(
                stage, state, "in the shared cache" if state == "done" else "", str(path), record.get("seconds")
            )
        if fresh and path.exists():
            return StageStatus(stage, "done", "", str(path), record.get("seconds"))
        if stage == "train" and not fresh and checkpoint_paths(self.run.folder / "checkpoints"):
            last = checkpoint_paths(self.run.folder / "checkpoints")[-1]
            state = "stale" if record else "partial"
            return StageStatus(stage, state, f"newest checkpoint: {last.name}", str(path))
        if record and path.exists():
            return StageStatus(stage, "stale", "its settings or inputs changed", str(path))
        return StageStatus(stage, "missing", "", str(path))

    def wanted(self, until: str | None) -> list[str]:
        """The stages of this recipe up to ``until``, in order."""
        evaluation = self.recipe.evaluation
        models = 0 if evaluation is None else 1 + evaluation.before + len(evaluation.baselines)
        left_out = {"evaluate"} if models == 0 else set()
        left_out |= {"compare"} if models < 2 else set()
        left_out |= {"mine"} if self.recipe.mining is None else set()
        left_out |= set() if teachers_of_vectors(self.recipe) else {"vectors"}
        stages = [stage for stage in STAGES if stage not in left_out]
        if until is None:
            return stages
        if until not in stages:
            raise BadInputError(f"this recipe has no stage {until!r}", hint=f"Stages: {', '.join(stages)}.")
        return stages[: stages.index(until) + 1]


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
