"""Notices of a run that has not begun: its data, prompts, batches, settings, suite."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nearfield.batching.plan import total_steps
from nearfield.evaluation.config import FolderTasks, HeldOutTask, MmebTask, MtebTasks
from nearfield.files import read_json
from nearfield.kinds import outside_sources
from nearfield.notices import Notice

if TYPE_CHECKING:
    from pathlib import Path

    from nearfield.batching.plan import Plan
    from nearfield.evaluation.config import TaskEntry
    from nearfield.pipeline.freshness import Freshness


def plan_notices(stages: Freshness, plans: list[Plan]) -> list[Notice]:
    """All that is known of a run once its batches are planned."""
    steps = total_steps(plans, stages.recipe.training.max_steps)
    return [
        *data_notices(stages),
        *prompt_notices(stages),
        *token_notices(stages),
        *unpooled_notices(stages),
        *score_notices(stages),
        *batch_notices(stages, plans),
        *negative_notices(stages, plans),
        *setting_notices(stages, steps),
    ]


def data_notices(stages: Freshness) -> Iterator[Notice]:
    """What the build of the data met, of the sources that are trained on."""
    from nearfield.data.summary import read_summary

    summary = read_summary(stages.store_path)
    names = {source.name for source in stages.run.checked.sources}
    for source in summary.sources:
        if source.name not in names:
            continue
        bad = sum(source.quarantined.values())
        if bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.quarantined.items())
            yield Notice(
                "rows-unusable", f"{source.name}: {bad:,} of {source.rows:,} rows could not be used ({reasons})"
            )
        if source.duplicates:
            yield Notice(
                "rows-repeated",
                f"{source.name}: {source.duplicates:,} of {source.rows:,} rows repeat another row; left out",
                minor=True,
            )
    conflicts = summary.conflicts
    if conflicts.positive_and_negative:
        yield Notice(
            "positive-and-negative",
            f"{conflicts.positive_and_negative:,} texts were both positive and negative of a query; taken as positives",
        )
    for pair, count in summary.shared_between_splits.items():
        if stages.recipe.split in pair.split("+"):
            yield Notice(
                "texts-in-two-splits",
                f"{count:,} texts are in two splits ({pair}), so scores on one of them are flattered",
                "Split by group: set 'group' in the data recipe.",
            )


def prompt_notices(stages: Freshness) -> Iterator[Notice]:
    """What the prompts leave open."""
    contract = stages.contract
    yield from contract.notices()
    for name, prompts in contract.sources.items():
        for role, text in prompts.items():
            if text and text[-1:].isalnum():
                yield Notice(
                    "prompt-runs-into-text",
                    f"the {role} prompt of {name} runs into the text: {text!r} does not end in a space",
                )


def token_notices(stages: Freshness) -> Iterator[Notice]:
    """Texts that are cut in training."""
    from nearfield.data.tokens import TokenCache

    cache, asked = TokenCache(stages.tokens_path), stages.recipe.training.max_length
    if asked is not None and cache.max_length is not None and cache.max_length < asked:
        yield Notice(
            "training-length",
            f"training.max_length is {asked:,}, and the model reads {cache.max_length:,} tokens: so much of a text is trained on",
            "Raise encoder.max_length too, if the model allows it.",
        )
    if cache.cut.cut and cache.max_length is not None:
        key = "training.max_length" if asked is not None and asked <= cache.max_length else "encoder.max_length"
        yield Notice(
            "texts-cut", f"in training {cache.cut.say(cache.max_length)}", f"Raise {key} if the model allows it."
        )


def unpooled_notices(stages: Freshness) -> Iterator[Notice]:
    """Texts that are nothing but their prompt, where pooling leaves that out."""
    from nearfield.data.tokens import TokenCache

    cache = TokenCache(stages.tokens_path)
    for table in cache.tables:
        rows = cache.without_tokens(table)
        if len(rows):
            yield Notice(
                "no-token-pooled",
                f"{len(rows):,} of {len(table.rows):,} texts have no token behind the prompt {table.prompt!r} (such as item "
                f"{int(rows[0])}), which pooling leaves out: their vectors are zero and nothing is learnt from them",
                "Leave out empty texts, raise training.max_length where it ends in the prompt, or set encoder.pool_prompt: true.",
            )


def score_notices(stages: Freshness) -> Iterator[Notice]:
    """Scores of graded pairs that the objective cannot give, or that are all the same."""
    from nearfield.data.store import Store

    store, recipe = Store.open(stages.store_path), stages.recipe
    for source in stages.run.checked.sources:
        if source.examples.kind != "graded":
            continue
        scores = store.examples.take(store.select(source.name, recipe.split))["score"].drop_null().to_numpy()
        if not len(scores):
            continue
        low, high = float(scores.min()), float(scores.max())
        if low == high:
            yield Notice("scores-all-equal", f"{source.name}: all {len(scores):,} pairs have the score {low:g}")
        for objective in recipe.objective.of_source(source.name, source.examples.kind):
            bounds = objective.score_bounds
            if bounds is not None and not (bounds[0] <= low and high <= bounds[1]):
                outside = int(((scores < bounds[0]) | (scores > bounds[1])).sum())
                yield Notice(
                    "scores-out-of-range",
                    f"{source.name}: {outside:,} of {len(scores):,} scores (from {low:g} to {high:g}) are beyond what "
                    f"{getattr(objective, 'kind', 'the objective')} can give ({bounds[0]:g} to {bounds[1]:g})",
                    f"Set scale, such as [{min(low, 0.0):.0f}, {math.ceil(high)}], in the examples of the data recipe.",
                )


def negative_notices(stages: Freshness, plans: list[Plan]) -> Iterator[Notice]:
    """Explicit negatives that the recipe asks for by name and the data do not have."""
    batches = stages.recipe.batches
    if not plans or not batches.negatives or "negatives" not in batches.model_fields_set:
        return
    counts, source = plans[0].lists("negatives").lengths, plans[0].column("source")
    numbers = {name: int(number) for number, name in plans[0].metadata["sources"].items()}
    for one in stages.run.checked.sources:
        mine = counts[source == numbers[one.name]] if one.name in numbers else counts[:0]
        few = int((mine < batches.negatives).sum())
        if one.examples.kind == "retrieval" and few:
            has = "none has any" if not mine.any() else f"{few:,} have fewer"
            yield Notice(
                "negatives-missing",
                f"{one.name}: batches.negatives asks for {batches.negatives} a query, and of {len(mine):,} examples {has}",
                "Mine some (see 'mining'), name their column in the data recipe, or lower batches.negatives.",
            )


def batch_notices(stages: Freshness, plans: list[Plan]) -> Iterator[Notice]:
    """What the plan leaves out, and batches that are smaller than asked for."""
    recipe = stages.recipe
    summary = read_json(stages.run.folder / "plan" / "summary.json", "plan summary")
    dropped: dict[str, int] = {}
    for epoch in summary["epochs"]:
        for reason, count in epoch["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    kept = sum(epoch["rows"] for epoch in summary["epochs"])
    # Each source of each epoch has a last batch, which need not be full.
    ends = len(summary["epochs"]) * len(stages.run.checked.sources)
    for reason, count in dropped.items():
        share = count / max(1, kept + sum(dropped.values()))
        unfilled = reason.startswith("in a batch")
        yield Notice(
            "examples-left-out",
            f"{count:,} examples of all epochs ({share:.1%}) are left out: {reason}",
            "Lower batches.batch_size, or set batches.drop_last=false." if unfilled else None,
            minor=unfilled and count < recipe.batches.batch_size * ends,
        )
    names = {name for epoch in summary["epochs"] for name in epoch["rows_by_source"]}
    for source in stages.run.checked.sources:
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
            f"{wrong:,} explicit negatives of all epochs are known positives of their query, by another source or split",
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
            f"{repeated:,} of {len(queries):,} examples of the first epoch have a query that another has too",
            minor=True,
        )


def setting_notices(stages: Freshness, steps: int) -> Iterator[Notice]:
    """Settings that run code from outside, or do not go with the length of the run."""
    checked = stages.run.checked
    for source in outside_sources([stages.recipe, checked.data, checked.suite, checked.training_suite]):
        yield Notice("outside-code", str(source), minor=True)
    training = stages.recipe.training
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
    if training.checkpoints.every_steps >= steps > 1000:
        yield Notice(
            "first-checkpoint-late",
            f"the first checkpoint is the last step's: a run that is killed before step {steps:,} begins anew",
            "Lower training.checkpoints.every_steps.",
        )


def suite_notices(stages: Freshness) -> Iterator[Notice]:
    """Data of the evaluation that is not there."""
    evaluation = stages.recipe.evaluation
    if evaluation is None:
        return
    suite = stages.run.checked.suite
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
