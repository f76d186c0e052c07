"""What is wrong with a run that has not begun: data, prompts, batches, settings, machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.errors import BadInputError
from nearfield.evaluation.config import FolderTasks, HeldOutTask
from nearfield.files import read_json

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan
    from nearfield.pipeline.freshness import Freshness
    from nearfield.training.forecast import Forecast


@dataclass(frozen=True)
class Complaint:
    """Something that a user should know before a run begins."""

    what: str
    hint: str | None = None
    blocks: bool = False
    """Whether the run would not start, or would surely fail."""

    @classmethod
    def of(cls, error: BadInputError) -> Complaint:
        """An error that the run would end with."""
        return cls(f"{error.where}: {error.what}" if error.where else error.what, error.hint, blocks=True)


def data_complaints(stages: Freshness) -> Iterator[Complaint]:
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
            yield Complaint(f"{source.name}: {bad:,} of {source.rows:,} rows could not be used ({reasons})")
        if source.duplicates:
            yield Complaint(
                f"{source.name}: {source.duplicates:,} of {source.rows:,} rows repeat another row; left out"
            )
    conflicts = summary.conflicts
    if conflicts.positive_and_negative:
        yield Complaint(
            f"{conflicts.positive_and_negative:,} texts were both positive and negative of a query; taken as positives"
        )
    for pair, count in summary.shared_between_splits.items():
        if stages.recipe.split in pair.split("+"):
            yield Complaint(
                f"{count:,} texts are in two splits ({pair}), so scores on one of them are flattered",
                "Split by group: set 'group' in the data recipe.",
            )


def prompt_complaints(stages: Freshness) -> Iterator[Complaint]:
    """What the prompts leave open."""
    contract = stages.contract
    for role in ("query", "document"):
        texts = sorted({prompts[role] for prompts in contract.sources.values()})
        if len(texts) > 1 and contract.fallback[role] not in texts:
            yield Complaint(
                f"the {role} prompt for unseen tasks ({contract.fallback[role]!r}) is none that is trained",
                f"Set prompts.fallback.{role} to one of {texts}.",
            )
    for name, prompts in contract.sources.items():
        for role, text in prompts.items():
            if text and text[-1:].isalnum():
                yield Complaint(f"the {role} prompt of {name} runs into the text: {text!r} does not end in a space")


def token_complaints(stages: Freshness) -> Iterator[Complaint]:
    """Texts that are cut in training."""
    from nearfield.data.tokens import TokenCache

    cache, asked = TokenCache(stages.tokens_path), stages.recipe.training.max_length
    if asked is not None and cache.max_length is not None and cache.max_length < asked:
        yield Complaint(
            f"training.max_length is {asked:,}, and the model reads {cache.max_length:,} tokens: so much of a text is trained on",
            "Raise encoder.max_length too, if the model allows it.",
        )
    if cache.cut.cut and cache.max_length is not None:
        key = "training.max_length" if asked is not None and asked <= cache.max_length else "encoder.max_length"
        yield Complaint(f"in training {cache.cut.say(cache.max_length)}", f"Raise {key} if the model allows it.")


def batch_complaints(stages: Freshness, plans: list[Plan]) -> Iterator[Complaint]:
    """What the plan leaves out, and batches that are smaller than asked for."""
    recipe = stages.recipe
    summary = read_json(stages.run.folder / "plan" / "summary.json", "plan summary")
    dropped: dict[str, int] = {}
    for epoch in summary["epochs"]:
        for reason, count in epoch["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    kept = sum(epoch["rows"] for epoch in summary["epochs"])
    for reason, count in dropped.items():
        share = count / max(1, kept + sum(dropped.values()))
        hint = "Lower batches.batch_size, or set batches.drop_last=false." if reason.startswith("in a batch") else None
        yield Complaint(f"{count:,} examples of all epochs ({share:.1%}) are left out: {reason}", hint)
    names = {name for epoch in summary["epochs"] for name in epoch["rows_by_source"]}
    for source in stages.run.checked.sources:
        if source.name not in names:
            yield Complaint(f"{source.name}: not one batch is made of it", "Is batch_size larger than the source?")
    size = recipe.batches.batch_size
    small = examples = repeated = 0
    for plan in plans:
        _, counts = np.unique(plan.table["step"].to_numpy(), return_counts=True)
        small, examples = small + int((counts < size).sum()), examples + int(counts.sum())
    if small:
        yield Complaint(f"{small:,} of {summary['steps']:,} batches have fewer than {size} examples")
    if plans:
        queries = plans[0].table["query"].to_numpy()
        repeated = len(queries) - len(np.unique(queries))
    if repeated:
        yield Complaint(
            f"{repeated:,} of {len(queries):,} examples of the first epoch have a query that another has too"
        )


def setting_complaints(stages: Freshness, steps: int) -> Iterator[Complaint]:
    """Settings that do not go with the length of the run."""
    training = stages.recipe.training
    warmup = training.schedule.warmup
    if warmup >= 1 and warmup >= steps:
        yield Complaint(
            f"the warm-up of {warmup:g} steps is as long as the run or longer ({steps:,} steps): the learning rate "
            "never reaches its peak",
            "Lower training.schedule.warmup; below 1 it is a share of the run.",
        )
    if training.max_steps is not None and training.max_steps > steps:
        yield Complaint(f"max_steps is {training.max_steps:,}, and {training.epochs} epochs have {steps:,} steps")
    if training.checkpoints.every_steps >= steps > 1000:
        yield Complaint(
            f"the first checkpoint is the last step's: a run that is killed before step {steps:,} begins anew",
            "Lower training.checkpoints.every_steps.",
        )


def suite_complaints(stages: Freshness) -> Iterator[Complaint]:
    """Data of the evaluation that is not there."""
    evaluation = stages.recipe.evaluation
    if evaluation is None:
        return
    suite = stages.run.checked.suite
    if suite is None:
        if not evaluation.suite.is_dir():
            yield Complaint(f"the suite {evaluation.suite} does not exist", blocks=True)
        return
    for task in suite.tasks:
        path = task.data if isinstance(task, HeldOutTask) else task.path if isinstance(task, FolderTasks) else None
        if path is not None and not path.exists():
            yield Complaint(f"{evaluation.suite}: the data of a task is missing: {path}", blocks=True)
        if path is None and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes"):
            yield Complaint("the suite has tasks whose data comes from the hub, and HF_HUB_OFFLINE forbids to fetch it")


def forecast_complaints(forecast: Forecast, facts: dict[str, Any]) -> Iterator[Complaint]:
    """What a forecast says of this machine: memory, disk, devices, what is sent."""
    from nearfield.training.forecast import say_bytes

    growth = forecast.memory.peak - forecast.memory.base - forecast.memory.weights
    if forecast.available and growth > forecast.available:
        yield Complaint(
            f"the run needs {say_bytes(growth)} more memory on each device than it holds now, and "
            f"{say_bytes(forecast.available)} are available",
            "Lower training.max_length or training.micro_batch_tokens, use gradient_cache: always, gradient "
            "checkpointing, an adapter, or more devices with fsdp2 or zero3.",
            blocks=True,
        )
    if facts["disk_needed"] > facts["disk_free"]:
        yield Complaint(
            f"checkpoints and the model need {say_bytes(facts['disk_needed'])} on the disk, and "
            f"{say_bytes(facts['disk_free'])} are free",
            "Make room, or lower training.checkpoints.keep_last.",
            blocks=True,
        )
    if forecast.reductions > 1:
        yield Complaint(
            f"{forecast.backend} reduces the gradient once a chunk, up to {forecast.reductions} times a step: "
            f"{say_bytes(forecast.reduced_a_step)} a step and rank",
            "zero1, fsdp2 and ddp reduce once a step. Larger training.micro_batch_tokens make fewer chunks.",
        )
    if facts["gpus"] > facts["local_processes"] and forecast.device.startswith("cuda"):
        yield Complaint(
            f"{facts['gpus']} GPUs are here, and {facts['local_processes']} are used",
            f"torchrun --nproc-per-node {facts['gpus']} -m nearfield train RECIPE",
        )
    if facts["gpus"] and forecast.device == "cpu":
        yield Complaint("a GPU is here, and the run trains on the CPU", "Set training.device=auto.")
