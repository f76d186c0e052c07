"""Plan before you pay: the cost of a run, and everything that is wrong with it, without training."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError, Notice
from nearfield.files import write_json
from nearfield.pipeline.planning import plan_notices
from nearfield.pipeline.run import Job, Run
from nearfield.pipeline.stages import Stages, run_stages, tell_training
from nearfield.pipeline.suites import suite_notices, suite_prompts, training_suite_prompts
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.evaluation.tasks import SuiteTask
    from nearfield.training.forecast import Forecast, Machine
    from nearfield.training.trainer import TrainingInputs


logger = logging.getLogger("nearfield.pipeline")

TRIAL_SECONDS = 120.0


@dataclass(frozen=True)
class DryRun:
    """A forecast of a run, as far as it could be made, and everything that is wrong with it."""

    folder: Path
    built: tuple[str, ...]
    """Stages that were missing or stale and were run: data, tokens, plan."""
    forecast: Forecast | None
    """None where the run would not start."""
    trial_steps: int
    devices: tuple[str, ...]
    machine: Machine | None
    notices: tuple[Notice, ...]
    """Those that block the run come first."""
    stage: str | None = None
    """The name of this training, where the recipe has several in a row."""
    before: tuple[DryRun, ...] = ()
    """The trainings before it."""

    @property
    def would_start(self) -> bool:
        """Whether nothing blocks the run."""
        unblocked = not any(notice.blocks for notice in self.notices)
        return unblocked and all(earlier.would_start for earlier in self.before)


def dry_run(
    run: Run,
    *,
    on_stage: Callable[[str, str], None] | None = None,
    trial_seconds: float = TRIAL_SECONDS,
    strict: bool = False,
) -> DryRun | None:
    """Build data, tokens and plan if they are missing, measure a few steps on them, and look for all that is wrong.

    Nothing is trained: weights that steps were measured on are thrown away. The forecast is kept in the run's folder,
    where the run compares it with what it really takes. Under a launcher all ranks call this, and rank 0 alone gets the
    result. With ``strict`` the notices that would end a strict run block it.

    Of several trainings in a row each is looked at; where the model that one starts from does not exist yet, the one that
    the first starts from stands in for it, so what depends on its weights (mining) is made anew when it is trained.
    """
    launch = Launch.from_environment()
    results: list[DryRun] = []
    for one in (*run.before, run):
        told = on_stage
        if one.stage is not None and on_stage is not None:
            told = partial(tell_training, on_stage, one.stage)
        alone = replace(one.preview(), before=())
        result = _dry_run(alone, told, trial_seconds, launch.within(f"dry/{one.stage}"), strict)
        if result is not None:
            results.append(replace(result, stage=one.stage))
    return replace(results[-1], before=tuple(results[:-1])) if results else None


def _dry_run(
    run: Run, on_stage: Callable[[str, str], None] | None, trial_seconds: float, launch: Launch, strict: bool
) -> DryRun | None:
    blocked: list[Notice] = []
    built: list[str] = []
    stages, reached, planned = Stages(Job(run, launch)), True, False

    def check_suite() -> None:
        training_suite_prompts(stages.job, stages.tokens.prompts.trained_contract)

    def prepare(tell: Callable[[str], None]) -> str:
        nonlocal planned
        tell("the plan")
        try:
            built.extend(run_stages(run, "plan", on_stage=on_stage, launch=Launch()).ran)
            planned = True
        except BadInputError as error:
            blocked.append(Notice.of(error))
        # The checks of a run before it trains.
        for check in (stages.train.check_can_train, check_suite):
            try:
                check()
            except BadInputError as error:
                blocked.append(Notice.of(error))
        return json.dumps(not blocked)

    def verify(word: str) -> None:
        nonlocal reached
        reached = json.loads(word)

    launch.prepare(prepare, verify)
    reached = reached and not blocked
    measured = None
    if reached:
        try:
            measured = _measure(stages, trial_seconds)
        except BadInputError as error:
            if not launch.is_main:
                return None
            blocked.append(Notice.of(error))
    if not launch.is_main:
        return None
    return _result(stages, built, measured, blocked, planned=planned, strict=strict)


@dataclass(frozen=True)
class _Measured:
    """Measurements of the model on its devices, and of a few steps."""

    forecast: Forecast
    steps: int
    """Steps that were tried."""
    lasting: tuple[Notice, ...]
    """Notices of the encoder, the data and the objective, which the training will repeat."""
    trial: tuple[Notice, ...]


def _measure(stages: Stages, trial_seconds: float) -> _Measured:
    """Put the model on its devices and try a few steps; *collective*."""
    import torch

    from nearfield.training.engine import pick_device
    from nearfield.training.trainer import TrainingInputs

    recipe, launch, train = stages.job.recipe, stages.job.launch, stages.train
    device = pick_device(recipe.training, launch)
    encoder = train.encoder(device)
    plans, hashes = stages.plan.open()
    train.check_ring()
    inputs = TrainingInputs(
        plans,
        hashes,
        train.training_data(encoder),
        lambda rows: [str(row) for row in rows],
    )
    lasting = [*encoder.notices]
    if launch.is_main:
        lasting += train.teaching_notices(encoder.model, inputs.data, plans)
    with torch.random.fork_rng(), launch.process_group(device, recipe.training.collective_timeout):
        forecast, steps, notices = _try_out(stages, encoder.model, inputs, device, trial_seconds)
    if any(notice.code == "source-teaches-nothing" for notice in lasting):
        # The steps that were tried may all be of that source; the run itself waits for one of each.
        notices = [notice for notice in notices if notice.code != "gradient-zero"]
    return _Measured(forecast, steps, tuple(lasting), tuple(notices))


def _try_out(
    stages: Stages, model: SentenceTransformer, inputs: TrainingInputs, device: Any, trial_seconds: float
) -> tuple[Forecast, int, list[Notice]]:
    from nearfield.training.engine import build_engine
    from nearfield.training.forecast import FILE, foresee, load_trackers, run_trial
    from nearfield.training.memory import held_bytes
    from nearfield.training.optimizers import optimizer_of

    recipe, launch = stages.job.recipe, stages.job.launch
    config, plans = recipe.training, inputs.plans
    objective, optimizer = stages.train.objective(model), optimizer_of(config, device)
    engine = build_engine(config, model, objective, optimizer, inputs.data, device, launch)
    if launch.is_main:
        load_trackers(config)
    held = held_bytes(device)
    outlook = foresee(engine, plans, fingerprint=stages.train.fingerprint, held=held)
    forecast = outlook.forecast
    growth = forecast.memory.peak - held
    notices: list[Notice] = _long_model(stages, model, outlook.profile.forward_seconds) if launch.is_main else []
    if forecast.available and growth > forecast.available:
        return forecast, 0, notices  # trying it would end this process, perhaps others too
    trial = run_trial(engine, outlook, held=held, seed=recipe.seed, limit_seconds=trial_seconds)
    if trial.out_of_memory:
        notices.append(
            Notice("trial-out-of-memory", "a step ran out of memory; the run would go on with fewer tokens at a time")
        )
    if not trial.finite:
        notices.append(
            Notice("trial-not-finite", "a loss or gradient of a trial step is not a finite number", blocks=True)
        )
    if trial.still and trial.steps:
        notices.append(Notice("gradient-zero", "the gradient of all trial steps is exactly 0", blocks=True))
    if trial.forecast.measured != "steps":
        notices.append(
            Notice(
                "time-of-chunks",
                f"the time is that of single chunks: whole steps would take over {trial_seconds:.0f} s",
            )
        )
    if launch.is_main:
        write_json(stages.job.run.folder / FILE, trial.forecast.to_json())
    return trial.forecast, trial.steps, notices


def _long_model(stages: Stages, model: SentenceTransformer, token_seconds: float) -> list[Notice]:
    """A notice of the cost of scoring, where the model reads long texts."""
    from nearfield.evaluation.config import open_suite

    job, cut = stages.job, stages.tokens.open().cut
    evaluation = job.recipe.evaluation
    try:
        suite = None if evaluation is None else job.run.checked.suite or evaluation.suite
        tasks = [] if suite is None else open_suite(suite, open_store=job.open_store)
    except BadInputError:
        tasks = []  # what is wrong with the suite is said by itself
    models = 1 + (evaluation is not None and evaluation.before)
    typical = (cut.tokens - cut.lost) / max(1, cut.texts)
    said = say_long_model(model, tasks, models, token_seconds, typical)
    return (
        [] if said is None else [Notice("long-model", said, "Lower encoder.max_length where shorter texts are enough.")]
    )


def _result(
    stages: Stages,
    built: list[str],
    measured: _Measured | None,
    blocked: list[Notice],
    *,
    planned: bool,
    strict: bool,
) -> DryRun:
    import torch

    from nearfield.training.checkpoint import checkpoint_paths
    from nearfield.training.forecast import Machine, forecast_notices

    job = stages.job
    training, folder = job.recipe.training, job.run.folder
    lasting: list[Notice] = []
    """Notices that the training itself will repeat."""
    passing = list(blocked)
    machine = None
    if planned:
        plans, _ = stages.plan.open()
        lasting += plan_notices(stages.plan, plans)
        with contextlib.suppress(BadInputError):  # which the preparation has met
            lasting += training_suite_prompts(job, stages.tokens.prompts.trained_contract)
    if measured is not None:
        machine = Machine.of(measured.forecast, training, folder)
        lasting += [*measured.lasting, *forecast_notices(measured.forecast, machine)]
        passing += measured.trial
        there = checkpoint_paths(folder / "checkpoints")
        if there:
            sentence = f"a training is under way here: it would go on from {there[-1].name}"
            passing.append(Notice("training-under-way", sentence))
    suite = list(suite_notices(job.run))
    lasting += suite
    if planned and not any(notice.blocks for notice in suite):
        try:
            passing += suite_prompts(job, stages.tokens.prompts.trained_contract)
        except BadInputError as error:
            passing.append(Notice.of(error))
    if strict:
        lasting = [replace(notice, blocks=notice.blocks or not notice.minor) for notice in lasting]
    notices = sorted(dict.fromkeys([*passing, *lasting]), key=lambda notice: not notice.blocks)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return DryRun(
        folder,
        tuple(built),
        None if measured is None else measured.forecast,
        0 if measured is None else measured.steps,
        (f"CPU, {torch.get_num_threads()} threads a process", *names),
        machine,
        tuple(notices),
    )


LONG = 2048
"""Tokens that a model may read without a word about it."""


def say_long_model(
    model: SentenceTransformer, tasks: list[SuiteTask], models: int, token_seconds: float, typical: float
) -> str | None:
    """A sentence on a model that reads more than :data:`LONG` tokens; None for others.

    ``tasks`` are those that ``models`` models are scored on; ``token_seconds`` is what a token takes in a text of
    ``typical`` tokens, on this device.
    """
    from nearfield.encoders.packing import longest_input
    from nearfield.training.forecast import say_seconds

    limit = longest_input(model)
    if limit is not None and limit <= LONG:
        return None
    reads = "texts of any length" if limit is None else f"{limit:,} tokens of a text"
    said = f"the model reads {reads}, in its evaluation too"
    if limit is not None:
        one = _seconds(model, limit, token_seconds, typical)
        said += f"; a text of that length takes about {say_seconds(one)} on this device"
    counted, lengths = _suite_lengths(model, tasks)
    if lengths:
        seconds = sum(_seconds(model, length, token_seconds, typical) for length in lengths) * models
        said += (
            f"; the {len(lengths):,} texts of {', '.join(counted)} have {sum(lengths):,} tokens, the longest {max(lengths):,}: "
            f"about {say_seconds(seconds)} for {models} model{'s' if models > 1 else ''}"
        )
    missing = [task.name for task in tasks if task.name not in counted]
    if missing:
        said += f"; not counted, since their data are not here: {', '.join(missing)}"
    return said


def _suite_lengths(model: SentenceTransformer, tasks: list[SuiteTask]) -> tuple[list[str], list[int]]:
    """The tasks whose data are on this machine, and the tokens of each of their texts as the model reads it, without prompts."""
    from nearfield.encoders.packing import longest_input
    from nearfield.encoders.tokenize import whole_lengths
    from nearfield.evaluation.texts import benchmark_tasks

    limit = longest_input(model)
    counted: list[str] = []
    lengths: list[int] = []
    for task in tasks:
        if not task.is_local:
            continue
        try:
            texts = {text.text for part in benchmark_tasks([task]) for text in part.texts()}
        except BadInputError:
            continue
        counted.append(task.name)
        lengths += [length if limit is None else min(length, limit) for length in whole_lengths(model, list(texts), "")]
    return counted, lengths


def _seconds(model: SentenceTransformer, length: int, token_seconds: float, typical: float) -> float:
    """Of a text of ``length`` tokens: the work in its layers grows with the length, that in attention with its square."""
    return length * token_seconds * _work(model, length) / _work(model, typical)


def _work(model: SentenceTransformer, length: float) -> float:
    """Operations for one token of a text of ``length`` tokens, up to a factor."""
    transformer: Any = getattr(model[0], "auto_model", None)
    if transformer is None:
        return 1.0
    config = transformer.config.get_text_config()
    weights: int = sum(p.numel() for p in transformer.parameters()) - transformer.get_input_embeddings().weight.numel()
    attention = 2 * int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0)) * length
    return max(1.0, float(weights + attention))
