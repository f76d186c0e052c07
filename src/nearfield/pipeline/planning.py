"""The stage ``plan``: from a store to plan files, one an epoch, with a summary of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nearfield.arrays import Floats, Ragged, Rows
from nearfield.batching.config import BatchConfig
from nearfield.batching.plan import VERSION as PLAN_VERSION
from nearfield.batching.plan import (
    Lengths,
    Plan,
    count_exceptions,
    measure_hardness,
    positives_as_negatives,
    total_steps,
    write_plan,
)
from nearfield.batching.planner import VectorsOf
from nearfield.batching.streams import PlannedRows, SourceExamples
from nearfield.config import outside_sources
from nearfield.data.store import Store
from nearfield.errors import BadInputError, Notice
from nearfield.files import atomic_path, hash_file, read_json, seal, write_json
from nearfield.mining.negatives import Negatives as MinedNegatives
from nearfield.pipeline.data import (
    DataStage,
    TokensStage,
    data_notices,
    prompt_notices,
    score_notices,
    token_notices,
    unpooled_notices,
)
from nearfield.pipeline.mining import MineStage, VectorsStage, planning_teacher
from nearfield.pipeline.run import Job, Stage


class PromptsOfEpoch(Protocol):
    """Gives rows their prompts."""

    def __call__(self, rows: PlannedRows, epoch: int) -> tuple[Rows, Rows]:
        """The (query, document) prompt numbers of each row in an epoch."""
        ...


@dataclass(frozen=True)
class SourceNegatives:
    """Negatives that stand in for a source's own: a list for each of its examples, with a teacher's scores if known."""

    items: Ragged
    scores: Floats | None = None
    positive_scores: Floats | None = None
    """A teacher's score of each positive of the store, example after example."""
    kept: npt.NDArray[np.bool_] | None = None
    """(n,) the examples that a filter keeps; the lists above have all n."""

    def of_kept(self, store: Store, examples: Rows) -> SourceNegatives:
        """The same for the kept examples alone; ``examples`` are the rows of all n."""
        if self.kept is None:
            return self
        kept = np.flatnonzero(self.kept)

        def values(lists: Ragged, scores: Floats | None) -> Floats | None:
            return None if scores is None else scores[lists.places(kept)]

        positives = arrow_lists(store.examples.take(examples)["positives"])
        return SourceNegatives(
            self.items.take(kept), values(self.items, self.scores), values(positives, self.positive_scores)
        )


@dataclass(frozen=True)
class PlanInputs:
    """Everything that the plans of a run are made from."""

    sources: Sequence[SourceExamples]
    labels: Sequence[tuple[str, str]]
    """(source, label) of each label number."""
    prompts: Mapping[int, tuple[int, int]] | PromptsOfEpoch
    """The (query, document) prompt numbers of each source; or (rows, epoch) -> those of each row."""
    lengths: Lengths
    store: Store
    vectors: VectorsOf | None = None
    generation: int = 0
    """The number of the pool of negatives."""


def read_examples(
    store: Store,
    names: Sequence[str],
    split: str,
    negatives: Mapping[str, SourceNegatives] | None = None,
    *,
    samples: bool = False,
) -> tuple[list[SourceExamples], list[tuple[str, str]]]:
    """The examples of sources as columns, and the (source, label) that each label number means.

    With ``samples`` they know which are of one sample, by the data recipe's ``cluster`` column.
    """
    sources: list[SourceExamples] = []
    labels: list[tuple[str, str]] = []
    numbers: dict[str, int] = {}
    for name in names:
        rows = store.select(name, split)
        mined = (negatives or {}).get(name)
        if mined is not None and mined.kept is not None:
            rows, mined = rows[mined.kept], mined.of_kept(store, rows)
        part = store.examples.take(rows)
        codes = None
        if part["label"].null_count < len(part):
            column = part["label"].combine_chunks()
            known = sorted(set(column.drop_null().to_pylist()))
            place = column.dictionary_encode()
            rank = {label: number + len(labels) for number, label in enumerate(known)}
            of_entry = np.asarray([rank[label] for label in place.dictionary.to_pylist()], dtype=np.int64)
            entries = place.indices.fill_null(0).to_numpy()
            codes = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, of_entry[entries])
            labels += [(name, label) for label in known]
        scores = part["score"]
        sources.append(
            SourceExamples(
                store.source_number(name),
                name,
                rows,
                part["query"].to_numpy(),
                arrow_lists(part["positives"]),
                arrow_lists(part["negatives"]) if mined is None else mined.items,
                scores=scores.to_numpy() if scores.null_count < len(scores) else None,
                labels=codes,
                positive_scores=None if mined is None else mined.positive_scores,
                negative_scores=None if mined is None else mined.scores,
                samples=np.array(
                    [numbers.setdefault(key, len(numbers)) for key in part["cluster"].to_pylist()], np.int64
                )
                if samples
                else None,
            )
        )
    return sources, labels


def source_negatives(
    store: Store, examples: Rows, mined: MinedNegatives, explicit: Literal["keep", "replace"]
) -> SourceNegatives:
    """Mined negatives of some examples as the planner takes them; ``keep`` puts the data's own before them.

    The data's own have no teacher's score (not a number) unless they were mined too.
    """
    places = mined.positions(examples)
    items, scores = mined.lists.take(places), mined.scores[mined.lists.places(places)].astype(np.float64)
    if explicit == "keep":
        data_negatives = arrow_lists(store.examples.take(examples)["negatives"])
        owners = np.concatenate([data_negatives.owners(), items.owners()])
        rows = np.concatenate([data_negatives.values, items.values])
        both = np.concatenate([np.full(len(data_negatives.values), np.nan), scores])
        # Of an item that is both, the first place stays and the score of the mined one.
        order = np.lexsort((np.arange(len(rows)), rows, owners))
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (np.diff(owners[order]) != 0) | (np.diff(rows[order]) != 0)
        twice = np.flatnonzero(~first)
        both[order[twice - 1]] = both[order[twice]]
        stay = np.sort(order[first])
        stay = stay[np.argsort(owners[stay], kind="stable")]
        counts = np.bincount(owners[stay], minlength=len(examples))
        items, scores = Ragged.from_lengths(counts, rows[stay]), both[stay]
    positive_scores = mined.positive_score_lists.take(places).values.astype(np.float64)
    kept_by_rules = mined.kept(examples)
    return SourceNegatives(items, scores, positive_scores, None if kept_by_rules.all() else kept_by_rules)


def arrow_lists(column: pa.ChunkedArray) -> Ragged:
    """An Arrow column of integer lists."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return Ragged(offsets - offsets[0], array.flatten().to_numpy())


def write_plans(
    folder: Path,
    config: BatchConfig,
    inputs: PlanInputs,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a plan for each epoch that the training will reach, and ``summary.json``; return what that holds."""
    planner, known = config.build(), inputs.store.known_positives()
    names = {source.source: source.name for source in inputs.sources}
    steps, summaries = 0, []
    for epoch in range(epochs):
        if max_steps is not None and steps >= max_steps:
            break
        batches = planner.plan(
            inputs.sources, seed, epoch, generation=inputs.generation, known=known, vectors=inputs.vectors
        )
        exceptions = count_exceptions(batches, known, config.needs_samples)
        measured: dict[str, Any] = {
            "exceptions": {**exceptions, "positives_as_negatives": positives_as_negatives(batches, known)}
        }
        if inputs.vectors is not None:
            measured |= measure_hardness(batches, inputs.vectors, seed)
        about = {
            **metadata,
            "seed": seed,
            "epoch": epoch,
            "generation": inputs.generation,
            "batches": config.model_dump(mode="json"),
            "sources": {str(number): name for number, name in names.items()},
            **({"labels": list(inputs.labels)} if inputs.labels else {}),
        }
        path = folder / f"epoch-{epoch:03d}.parquet"
        prompts = inputs.prompts if isinstance(inputs.prompts, Mapping) else partial(inputs.prompts, epoch=epoch)
        summary = write_plan(path, batches, prompts, inputs.lengths, about, names=names, measured=measured)
        summaries.append(summary)
        steps += summary["batches"]
    whole = {"kind": config.kind, "batch_size": config.batch_size, "steps": steps, "epochs": summaries}
    write_json(folder / "summary.json", whole)
    return whole


class PlanStage(Stage):
    """Writes which examples meet in which step, for all epochs."""

    name = "plan"

    def __init__(self, job: Job, data: DataStage, vectors: VectorsStage, mine: MineStage, tokens: TokensStage) -> None:
        super().__init__(job)
        self.data = data
        self.vectors = vectors
        self.mine = mine
        self.tokens = tokens

    def inputs(self) -> Any:
        """The tokens, the planner's settings and vectors, the negatives, the length of the training."""
        recipe = self.recipe
        plan = {
            "version": PLAN_VERSION,
            "tokens": self.tokens.fingerprint,
            "batches": recipe.batches.identity(),
            "seed": recipe.seed,
            "length": [recipe.training.epochs, recipe.training.max_steps],
        }
        if recipe.mining is not None:
            plan["mined"] = [self.mine.fingerprint, recipe.mining.explicit]
        teacher = planning_teacher(recipe)
        if teacher is not None:
            plan["vectors"] = self.vectors.fingerprints[teacher]
        return plan

    @property
    def folder(self) -> Path:
        """The folder with the plans of all epochs."""
        return self.job.run.folder / "plan"

    def outputs(self) -> list[Path]:
        """The summary, which is written last."""
        return [self.folder / "summary.json"]

    def sealed(self) -> list[Path]:
        """The folder."""
        return [self.folder]

    def open(self) -> tuple[list[Plan], list[str]]:
        """The plans of all epochs, and the hash of each file."""
        paths = sorted(self.folder.glob("epoch-*.parquet"))
        return [Plan(path) for path in paths], [hash_file(path) for path in paths]

    def negatives(self, store: Store) -> dict[str, SourceNegatives] | None:
        """Source -> mined negatives, which the planner takes instead of the data's own; None where the recipe does not mine."""
        mining = self.recipe.mining
        if mining is None:
            return None
        mined = self.mine.open()
        return {
            name: source_negatives(store, store.select(name, self.recipe.split), mined, mining.explicit)
            for name in self.mine.sources(store)
        }

    def run(self) -> dict[str, Any]:
        """Write the plans."""
        store, tokens, recipe = self.data.open(), self.tokens.open(), self.recipe
        samples = recipe.batches.needs_samples
        sources, labels = read_examples(
            store, self.job.source_names, recipe.split, self.negatives(store), samples=samples
        )
        prompts = self.tokens.prompts.of_rows(tokens.number)
        lengths: Lengths = lambda prompt, items: tokens.tables[prompt].lengths(items)  # noqa: E731
        inputs = PlanInputs(sources, labels, prompts, lengths, store, self.vectors.planned())
        made_of = (self.data, self.vectors, self.mine, self.tokens)
        with atomic_path(self.folder) as aside:
            aside.mkdir()
            summary = write_plans(
                aside,
                recipe.batches,
                inputs,
                seed=recipe.seed,
                epochs=recipe.training.epochs,
                max_steps=recipe.training.max_steps,
                metadata={stage.name: stage.fingerprint for stage in made_of if stage.is_wanted},
            )
            if summary["steps"] == 0:
                raise BadInputError(
                    f"not one batch of {recipe.batches.batch_size} can be made: {summary['epochs'][0]['dropped']}",
                    where=self.job.run.loaded.where(("batches", "batch_size")),
                    hint="Lower batches.batch_size, or set batches.drop_last=false.",
                )
            seal(aside)
        return {"steps": summary["steps"]}


def plan_notices(stage: PlanStage, plans: list[Plan]) -> list[Notice]:
    """All that is known of a run once its batches are planned."""
    return [
        *data_notices(stage.data),
        *prompt_notices(stage.job.contract),
        *token_notices(stage.tokens),
        *unpooled_notices(stage.tokens),
        *score_notices(stage.data),
        *batch_notices(stage, plans),
        *negative_notices(stage, plans),
        *setting_notices(stage, total_steps(plans, stage.recipe.training.max_steps)),
    ]


def negative_notices(stage: PlanStage, plans: list[Plan]) -> Iterator[Notice]:
    """Explicit negatives that the recipe asks for by name and the data do not have."""
    batches = stage.recipe.batches
    if not plans or not batches.negatives or "negatives" not in batches.model_fields_set:
        return
    counts, source = plans[0].lists("negatives").lengths, plans[0].column("source")
    numbers = {name: int(number) for number, name in plans[0].metadata["sources"].items()}
    for one in stage.job.run.checked.sources:
        mine = counts[source == numbers[one.name]] if one.name in numbers else counts[:0]
        few = int((mine < batches.negatives).sum())
        if one.examples.form == "retrieval" and few:
            has = "none has any" if not mine.any() else f"{few:,} have fewer"
            yield Notice(
                "negatives-missing",
                f"{one.name}: batches.negatives asks for {batches.negatives} a query, and of {len(mine):,} examples {has}",
                "Mine some (see 'mining'), name their column in the data recipe, or lower batches.negatives.",
            )


def batch_notices(stage: PlanStage, plans: list[Plan]) -> Iterator[Notice]:
    """Notices of examples that the plan leaves out, and of batches that are smaller than asked for."""
    recipe = stage.recipe
    summary = read_json(stage.output, "plan summary")
    dropped: dict[str, int] = {}
    for epoch in summary["epochs"]:
        for reason, count in epoch["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    planned = sum(epoch["rows"] for epoch in summary["epochs"])
    # Each source of each epoch has a last batch, which need not be full.
    ends = len(summary["epochs"]) * len(stage.job.run.checked.sources)
    for reason, count in dropped.items():
        share = count / max(1, planned + sum(dropped.values()))
        unfilled = reason.startswith("in a batch")
        yield Notice(
            "examples-left-out",
            f"over all epochs {count:,} examples ({share:.1%}) are left out: {reason}",
            "Lower batches.batch_size, or set batches.drop_last=false." if unfilled else None,
            minor=unfilled and count < recipe.batches.batch_size * ends,
        )
    names = {name for epoch in summary["epochs"] for name in epoch["rows_by_source"]}
    for source in stage.job.run.checked.sources:
        if source.name not in names:
            yield Notice(
                "source-without-batch",
                f"{source.name}: not one batch is made of it",
                "Is batch_size larger than the source?",
            )
    wrong = sum(epoch.get("exceptions", {}).get("positives_as_negatives", 0) for epoch in summary["epochs"])
    if wrong:
        yield Notice(
            "positives-as-negatives",
            f"over all epochs {wrong:,} explicit negatives are known positives of their query in another source or split",
            "infonce leaves them out by mask_known_positives; other objectives take them as negatives.",
        )
    size = recipe.batches.batch_size
    small = examples = repeated = 0
    for plan in plans:
        _, counts = np.unique(plan.table["step"].to_numpy(), return_counts=True)
        small, examples = small + int((counts < size).sum()), examples + int(counts.sum())
    if small:
        yield Notice(
            "small-batches",
            f"{small:,} of {summary['steps']:,} batches have fewer than {size} examples",
            minor=small <= ends,
        )
    if plans:
        queries = plans[0].table["query"].to_numpy()
        repeated = len(queries) - len(np.unique(queries))
    if repeated:
        yield Notice(
            "queries-repeated",
            f"{repeated:,} of {len(queries):,} examples of the first epoch repeat the query of another example",
            minor=True,
        )


SHARPEST = 1e-3
"""At this temperature and below it a similarity that is lower by 0.1 counts less than the least number of float32 (e^-88)."""


def _temperatures(settings: object, key: str) -> Iterator[tuple[str, float]]:
    """The temperatures among the settings of an objective and its parts, with the keys of the recipe that set them."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if isinstance(value, float) and name.endswith("temperature"):
                yield f"{key}.{name}", value
            else:
                yield from _temperatures(value, f"{key}.{name}")
    elif isinstance(settings, list | tuple):
        for number, value in enumerate(settings):
            yield from _temperatures(value, f"{key}.{number}")


def setting_notices(stage: PlanStage, steps: int) -> Iterator[Notice]:
    """Settings that run code from outside, or do not go with the length of the run."""
    checked, training = stage.job.run.checked, stage.recipe.training
    for source in outside_sources([stage.recipe, checked.data, checked.suite, checked.training_suite]):
        yield Notice("outside-code", str(source), minor=True)
    warmup = training.schedule.warmup
    if warmup >= 1 and warmup >= steps:
        yield Notice(
            "warmup-too-long",
            f"the warm-up of {warmup:g} steps is as long as the run or longer ({steps:,} steps): the learning rate "
            "never reaches its peak",
            "Lower training.schedule.warmup; below 1 it is a share of the run.",
        )
    if training.max_steps is not None and training.max_steps > steps:
        yield Notice(
            "max-steps-not-reached",
            f"max_steps is {training.max_steps:,}, and {training.epochs} epochs have {steps:,} steps",
        )
    for key, value in _temperatures(stage.recipe.objective.model_dump(), "objective"):
        if value <= SHARPEST:
            yield Notice(
                "temperature-too-low",
                f"{key} is {value:g}: similarities that differ by 0.1 become logits that differ by {0.1 / value:,.3g}, and a "
                "softmax of them is 0 or 1 in float32",
                f"0.01 to 0.1 is common; set {key}.",
            )
    if training.checkpoints.every_steps >= steps > 1000:
        yield Notice(
            "first-checkpoint-late",
            f"the first checkpoint is the last step's: a run that is killed before step {steps:,} begins anew",
            "Lower training.checkpoints.every_steps.",
        )
