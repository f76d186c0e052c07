"""The recipe: one YAML file that describes a run, as a typed object."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from nearfield.batching.config import BatchConfig, SingleSourceConfig
from nearfield.config import Config, ConfigPath, KeyPath, Loaded, dotted, load_config, only_our_kinds
from nearfield.data.config import DataConfig, SourceConfig
from nearfield.data.decontaminate import DecontaminationStageConfig
from nearfield.encoders.config import EncoderConfig, PromptConfig
from nearfield.encoders.prompts import BasePrompts, PromptContract, base_prompts, make_contract
from nearfield.errors import BadInputError
from nearfield.evaluation.config import SuiteConfig
from nearfield.mining.config import (
    TEACHERS,
    DenseTeacher,
    MiningConfig,
    TeacherConfig,
)
from nearfield.objectives.config import CombinedConfig, InfoNCEConfig, ObjectiveConfig
from nearfield.training.config import TrainingConfig, TrainingEvaluationConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
GuideConfig = Annotated[
    DenseTeacher,
    TEACHERS.without("bm25", "cross_encoder", "ensemble", base="nearfield.mining.config:DenseTeacher"),
]


class EvaluationConfig(Config):
    """Scores of the model before and after training, and the models that it is compared with."""

    suite: ConfigPath
    """A suite file, or a folder of local tasks."""
    before: bool = True
    """Score the base model too."""
    baselines: tuple[Literal["bm25", "random"], ...] = ("bm25", "random")
    """Models beside which the scores stand: BM25, which finds words, and random vectors, which are chance; none is faster."""
    prompts: Literal["contract", "as-is"] = "contract"
    """``contract`` refuses a task whose prompt the model was not trained with; ``as-is`` lets it pass."""
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Score the trained model's first dimensions too, so many at a time; nothing is encoded again."""
    analysed_texts: Annotated[int, Field(ge=0)] = 1_000
    """The report looks at the vectors of so many of the suite's texts; 0 leaves that out."""


class StageConfig(Config):
    """One of several trainings in a row, which starts from the model of the one before.

    Settings that it does not name are the recipe's. A group of settings that it names is merged with the recipe's, key by key;
    one of another ``kind`` replaces it.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=40)]
    """The folder of its run is RUN/stages/NAME; letters, digits, '.', '_' and '-'."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Another one draws other batches and dropout than the recipe's seed does."""
    data: ConfigPath | None = None
    """A data recipe of its own."""
    sources: tuple[str, ...] | None = None
    """The sources that this stage trains on."""
    split: str = "train"
    """The split that this stage trains on."""
    prompts: PromptConfig = PromptConfig()
    """Prompts of this stage; the last stage's are saved with the model."""
    objective: ObjectiveConfig = InfoNCEConfig()
    """The loss of this stage."""
    batches: BatchConfig = SingleSourceConfig()
    """The planner of this stage's batches."""
    teacher: TeacherConfig | None = None
    """The teacher of this stage; null takes the model of the stage before, where one is needed."""
    guide: GuideConfig | None = None
    """The guide of this stage's objective."""
    mining: MiningConfig | None = None
    """Hard negatives for this stage, mined with the model of the stage before unless a teacher is named."""
    training: TrainingConfig = TrainingConfig()
    """Length, optimiser, precision and backend of this stage."""
    evaluation: EvaluationConfig | None = None
    """Settings here or in the recipe hold for the last stage; an earlier one is scored only where it says so itself."""


class Recipe(Config):
    """A run: data, encoder, objective, batches, training, evaluation."""

    name: Annotated[str, Field(pattern=NAME, max_length=100)]
    """The run's folder is runs/NAME; letters, digits, '.', '_' and '-'."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """All that is drawn by chance follows from it: batches, dropout, samples. Runs of several seeds tell how much chance does."""
    data: ConfigPath
    """The data recipe."""
    sources: tuple[str, ...] | None = None
    """The sources to train on; null takes all that the objective can learn from."""
    split: str = "train"
    """The split to train on."""
    encoder: EncoderConfig = EncoderConfig()
    """The model that is trained, and what is changed of it before training."""
    prompts: PromptConfig = PromptConfig()
    """Strings put before texts, where the data recipe's are not to hold; the model is saved with them."""
    objective: ObjectiveConfig = InfoNCEConfig()
    """The loss: what the model learns from the examples of a batch."""
    batches: BatchConfig = SingleSourceConfig()
    """The planner of batches: the examples that meet in a step, and how many; the negatives of in-batch losses are chosen by it."""
    teacher: TeacherConfig | None = None
    """Who judges which texts are alike, for mining and for batches that are made of vectors; null takes the model that is
    trained, as it is before training, where one is needed."""
    guide: GuideConfig | None = None
    """The model whose vectors ``objective.guide_mask`` looks at; null takes the teacher's where one is needed."""
    mining: MiningConfig | None = None
    """Hard negatives by a teacher, beside or instead of the data's own; null mines none."""
    training: TrainingConfig = TrainingConfig()
    """Length, learning rate, optimiser, precision, backend, checkpoints and trackers."""
    evaluation: EvaluationConfig | None = None
    """The suite that the model is scored on before and after training; null scores nothing."""
    decontaminate: DecontaminationStageConfig | None = None
    """Training texts are compared with the texts of a suite before batches are planned; null compares nothing."""
    stages: tuple[StageConfig, ...] = ()
    """Several trainings in a row, such as pretraining, fine-tuning and distillation; none is one training."""

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same name")
        return self


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe with the files that it names, all valid and fitting together."""

    recipe: Recipe
    data: DataConfig
    sources: tuple[SourceConfig, ...]
    """The sources to train on."""
    suite: SuiteConfig | None
    """None where there is no evaluation, or where it is a folder of tasks."""
    training_suite: SuiteConfig | None
    """The same for the evaluation during the training."""
    compared_suite: SuiteConfig | None
    """The same for the suite that training texts are compared with."""
    contract: PromptContract
    """The prompts that are trained and saved, as far as they are known without a store and a connection."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Loaded[Recipe]:
    """Read a recipe with the place that each of its values came from."""
    return load_config(Recipe, path, overrides)


def stage_recipes(loaded: Loaded[Recipe]) -> list[Loaded[Recipe]]:
    """The recipe of each stage in order; of a recipe without stages itself. The models that they start from are not in it."""
    recipe, recipes = loaded.config, []
    for number, stage in enumerate(recipe.stages):
        settings = {name: getattr(recipe, name) for name in Recipe.model_fields if name != "stages"}
        settings["decontaminate"] = _compared_with(recipe)
        if number < len(recipe.stages) - 1:
            settings["evaluation"] = None
        try:
            for name in stage.model_fields_set - {"name"}:
                settings[name] = _merged(settings[name], getattr(stage, name))
            merged = Recipe.model_validate(settings)
        except ValidationError as error:
            # Each of them is right by itself: what does not fit is together with the recipe's.
            what = error.errors()[0]["msg"].removeprefix("Value error, ")
            where = loaded.where(("stages", number))
            raise BadInputError(f"stage {stage.name!r}: {what}", where=where) from error
        origins = {key: place for key, place in loaded.origins.items() if key[0] != "stages"}
        here = ("stages", number)
        origins |= {key[2:]: place for key, place in loaded.origins.items() if key[:2] == here and len(key) > 2}
        recipes.append(Loaded(merged, loaded.path, origins))
    return recipes or [loaded]


def _merged(below: Any, above: Any) -> Any:
    """Settings with those that are said above in their place."""
    if not isinstance(above, Config) or type(below) is not type(above):
        return above
    # A setting that neither states stays unset: the base may state it.
    values = {name: getattr(below, name) for name in below.model_fields_set}
    for name in above.model_fields_set:
        values[name] = _merged(getattr(below, name), getattr(above, name))
    return type(below).model_validate(values)


def check_recipe(loaded: Loaded[Recipe], base: BasePrompts | None = None) -> CheckedRecipe:
    """Read the files that a recipe names and check that all fits together; of several stages, the last one is given.

    ``base`` are the prompts of the model that it starts from; null reads them where that is a folder or in the hub's cache.
    """
    recipe = loaded.config
    if recipe.stages:
        for stage in stage_recipes(loaded):
            checked = check_recipe(stage, base)
            base = checked.contract.as_base()
        return checked
    data = DataConfig.load(recipe.data)
    sources = _chosen_sources(loaded, data)
    suite = _suite(recipe.evaluation)
    training_suite = _suite(recipe.training.evaluation)
    compared = _compared_with(recipe)
    if compared is not None and compared.suite is None:
        raise BadInputError(
            "training texts can be compared with the texts of a suite, and there is none",
            where=loaded.where(("decontaminate",)),
            hint="Name one under decontaminate.suite, or add 'evaluation'.",
        )
    base = base_prompts(recipe.encoder.model, recipe.encoder.revision) if base is None else base
    contract = make_contract(sources, recipe.prompts, base)
    _check_teacher(loaded)
    _check_samples(loaded, sources)
    _check_scores(loaded, sources)
    return CheckedRecipe(recipe, data, sources, suite, training_suite, _suite(compared), contract)


def _compared_with(recipe: Recipe) -> DecontaminationStageConfig | None:
    """The comparison with the suite in it, which is the evaluation's where it names none."""
    compared = recipe.decontaminate
    if compared is None or compared.suite is not None or recipe.evaluation is None:
        return compared
    return compared.model_copy(update={"suite": recipe.evaluation.suite})


def _check_teacher(loaded: Loaded[Recipe]) -> None:
    recipe = loaded.config
    if recipe.guide is not None and not recipe.objective.needs_guide:
        raise BadInputError(
            "there is a guide, and the objective has no use for one",
            where=loaded.where(("guide",)),
            hint="Set objective.guide_mask or distil, or remove 'guide'.",
        )
    needs_guide = recipe.objective.needs_guide and recipe.guide is None
    if needs_guide and recipe.teacher is not None and not recipe.teacher.dense_teachers():
        raise BadInputError(
            f"the objective wants a guide's vectors, and the teacher {recipe.teacher.kind!r} has none",
            where=loaded.where(("objective",)),
            hint="Name one of kind sentence_transformer or vectors under 'guide'.",
        )
    if recipe.mining is None and recipe.objective.needs_teacher_scores:
        raise BadInputError(
            "the objective learns from the scores of the miner's teacher, and the recipe does not mine",
            where=loaded.where(("objective",)),
            hint="Add 'mining', or learn from vectors (teacher: vectors).",
        )
    if recipe.mining is not None and "retrieval" not in recipe.objective.learns_from:
        raise BadInputError(
            f"negatives are mined for queries with positives; the objective {recipe.objective.kind!r} learns from "
            f"{' and '.join(recipe.objective.learns_from)} examples",
            where=loaded.where(("mining",)),
            hint="Remove 'mining'.",
        )
    if recipe.mining is not None and recipe.mining.during is not None:
        least = recipe.mining.during.least(recipe.batches.negatives)
        if recipe.batches.negatives == 0 or recipe.mining.negatives < least:
            raise BadInputError(
                f"negatives that change ({recipe.mining.during.kind}) need at least {max(1, least)} mined candidates an example, "
                f"of which batches take at least 1; mining.negatives is {recipe.mining.negatives}, batches.negatives is "
                f"{recipe.batches.negatives}",
                where=loaded.where(("mining", "during")),
                hint="Raise mining.negatives: it is how long each example's list of candidates is.",
            )
    if recipe.teacher is not None and recipe.batches.needs_vectors and not recipe.teacher.dense_teachers():
        raise BadInputError(
            f"batches of kind {recipe.batches.kind!r} are made of vectors, and the teacher {recipe.teacher.kind!r} has none",
            where=loaded.where(("teacher",)),
            hint="Name one of kind sentence_transformer or vectors here; mining may have its own under mining.teacher.",
        )


def _check_samples(loaded: Loaded[Recipe], sources: Sequence[SourceConfig]) -> None:
    batches, objective = loaded.config.batches, loaded.config.objective
    if not batches.needs_samples:
        return
    parts = objective.parts if isinstance(objective, CombinedConfig) else ()
    if not parts or not all(part.each_source or len(part.sources or ()) == 1 for part in parts):
        raise BadInputError(
            f"in batches of kind {batches.kind!r} a sample's own examples would be negatives of each other",
            where=loaded.where(("objective",)),
            hint="Contrast each source by itself: {kind: combined, parts: [{each_source: true, objective: {...}}]}.",
        )
    for source in sources:
        if source.cluster is None:
            raise BadInputError(
                f"batches of kind {batches.kind!r} must know which examples of {source.name!r} are of one sample",
                where=loaded.where(("batches", "kind")),
                hint="Name the column that says so under 'cluster' in the data recipe.",
            )


def _check_scores(loaded: Loaded[Recipe], sources: Sequence[SourceConfig]) -> None:
    objective = loaded.config.objective
    try:
        readings = objective.readings({source.name: source.examples.form for source in sources})
    except BadInputError as error:
        raise BadInputError(error.what, where=loaded.where(("objective", "parts")), hint=error.hint) from error
    if any(reading.views == 2 for reading in readings.values()) and not loaded.config.training.dropout:
        raise BadInputError(
            f"{objective.kind} tells a text's two embeddings apart by dropout, and it is off",
            where=loaded.where(("training", "dropout")),
            hint="Set training.dropout=true.",
        )
    mining = loaded.config.mining
    if mining is None or mining.explicit == "replace" or not loaded.config.objective.needs_teacher_scores:
        return
    for source in sources:
        if source.examples.brings_negatives:
            raise BadInputError(
                f"the miner's teacher has no scores of the data's own negatives, and {source.name!r} has some",
                where=loaded.where(("mining",)),
                hint="Set mining.explicit=replace, so that all negatives are mined and scored.",
            )


def _chosen_sources(loaded: Loaded[Recipe], data: DataConfig) -> tuple[SourceConfig, ...]:
    recipe = loaded.config
    kinds = recipe.objective.learns_from
    words = " and ".join(kinds)
    by_name = {source.name: source for source in data.sources}
    if recipe.sources is None:
        sources = tuple(source for source in data.sources if source.examples.form in kinds)
        if not sources:
            raise BadInputError(
                f"the objective {recipe.objective.kind!r} learns from {words} examples, and no source has any",
                where=loaded.where(("objective",)),
                hint=f"Sources of {recipe.data}: "
                + ", ".join(f"{s.name} ({s.examples.form})" for s in data.sources)
                + ".",
            )
        return sources
    for position, name in enumerate(recipe.sources):
        where = loaded.where(("sources", position))
        if name not in by_name:
            raise BadInputError(f"there is no source {name!r}", where=where, hint=f"Sources: {', '.join(by_name)}.")
        if by_name[name].examples.form not in kinds:
            raise BadInputError(
                f"the source {name!r} has {by_name[name].examples.form} examples; the objective {recipe.objective.kind!r} learns from {words} examples",
                where=where,
            )
    if len(set(recipe.sources)) < len(recipe.sources):
        raise BadInputError("a source stands twice", where=loaded.where(("sources",)))
    return tuple(by_name[name] for name in recipe.sources)


def _suite(
    evaluation: EvaluationConfig | TrainingEvaluationConfig | DecontaminationStageConfig | None,
) -> SuiteConfig | None:
    if evaluation is None or evaluation.suite is None or evaluation.suite.is_dir():
        return None
    suite = SuiteConfig.load(evaluation.suite)
    for position, task in enumerate(suite.tasks):
        task.check(str(evaluation.suite), f"tasks.{position}")
    return suite


@dataclass(frozen=True)
class ResolvedValue:
    """One setting of a resolved recipe."""

    key: str
    value: Any
    origin: str
    """``file:line``, ``override key=value`` or ``default``."""


def resolve(loaded: Loaded[Recipe]) -> list[ResolvedValue]:
    """All settings of a recipe, defaults included, with the place that each came from."""
    values: list[ResolvedValue] = []

    def walk(value: Any, key: KeyPath) -> None:
        if isinstance(value, BaseModel):
            for name in type(value).model_fields:
                walk(getattr(value, name), (*key, name))
        else:
            values.append(ResolvedValue(dotted(key), value, loaded.origin(key)))

    walk(loaded.config, ())
    return values


def recipe_schema(registered: bool = True) -> dict[str, Any]:
    """The JSON schema of recipes, for editors; with the kinds that installed packages register."""
    with contextlib.nullcontext() if registered else only_our_kinds():
        schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
