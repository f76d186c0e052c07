"""All stages of a run in their order: what is done, running what is missing or stale, and checking what they left behind."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from nearfield.encoders.source import folder_revision
from nearfield.errors import BadInputError, listening, refuse, stop_on_blocking
from nearfield.files import damage
from nearfield.pipeline.data import DataStage, DecontaminateStage, TokensStage
from nearfield.pipeline.mining import MineStage, VectorsStage
from nearfield.pipeline.planning import PlanStage
from nearfield.pipeline.run import Engine, Job, Run, Stage, StageStatus
from nearfield.pipeline.scoring import CompareStage, EvaluateStage, ReportStage
from nearfield.pipeline.suites import suite_notices, suite_prompts, training_suite_prompts
from nearfield.pipeline.training import TrainStage, set_aside
from nearfield.training.launch import Launch

STAGES = ("data", "decontaminate", "vectors", "mine", "tokens", "plan", "train", "evaluate", "compare", "report")
OnStage = Callable[[str, str], None]
"""Is told each stage (``training/part`` of trainings before the last one) and ``done`` or ``running``."""


@dataclass(frozen=True)
class RunResult:
    """The outcome of :func:`run_stages`."""

    folder: Path
    ran: tuple[str, ...]
    """Stages that were missing or stale and ran."""
    model: Path | None
    report: Path | None


class Stages:
    """The stages of a run, each with those whose output it reads; one is made when it is asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @classmethod
    def of(cls, run: Run) -> Stages:
        """The stages of a run in this process alone."""
        return cls(Job(run))

    @cached_property
    def data(self) -> DataStage:
        """The store."""
        return DataStage(self.job)

    @cached_property
    def decontaminate(self) -> DecontaminateStage:
        """The comparison with the suite, and the store without what matches."""
        return DecontaminateStage(self.job, self.data)

    @property
    def training_data(self) -> DataStage:
        """The store that is trained on."""
        return self.decontaminate if self.decontaminate.leaves_out else self.data

    @cached_property
    def vectors(self) -> VectorsStage:
        """The teachers' vectors."""
        return VectorsStage(self.job, self.training_data)

    @cached_property
    def mine(self) -> MineStage:
        """The negatives."""
        return MineStage(self.job, self.training_data, self.vectors)

    @cached_property
    def tokens(self) -> TokensStage:
        """The token cache."""
        return TokensStage(self.job, self.training_data, self.mine)

    @cached_property
    def plan(self) -> PlanStage:
        """The batches."""
        return PlanStage(self.job, self.training_data, self.vectors, self.mine, self.tokens)

    @cached_property
    def train(self) -> TrainStage:
        """The model."""
        return TrainStage(self.job, self.plan)

    @cached_property
    def evaluate(self) -> EvaluateStage:
        """The results."""
        return EvaluateStage(self.job, self.train)

    @cached_property
    def compare(self) -> CompareStage:
        """The comparison."""
        return CompareStage(self.job, self.evaluate)

    @cached_property
    def report(self) -> ReportStage:
        """The page."""
        return ReportStage(self.job, self.evaluate, self.compare)

    def wanted(self, until: str | None = None) -> list[Stage]:
        """The stages that the recipe asks for, in order, up to ``until``."""
        end = len(STAGES) if until not in STAGES else STAGES.index(until) + 1
        stages: list[Stage] = [stage for name in STAGES[:end] if (stage := getattr(self, name)).is_wanted]
        if until is not None and until not in [stage.name for stage in stages]:
            names = ", ".join(stage.name for stage in self.wanted())
            raise BadInputError(f"this recipe has no stage {until!r}", hint=f"Stages: {names}.")
        return stages


def status(run: Run) -> list[StageStatus]:
    """The state of each stage of a run; of trainings before it, of the parts of each that are wanted, as ``training/part``."""
    states: list[StageStatus] = []
    for earlier in run.before:
        wanted = Stages.of(earlier.preview()).wanted(_end(earlier))
        states += [replace(stage.status(), name=f"{earlier.stage}/{stage.name}") for stage in wanted]
    return states + [stage.status() for stage in Stages.of(run.preview()).wanted()]


def _end(earlier: Run) -> str | None:
    """Where a training before the last one ends: it is scored only where it asks for it."""
    return "train" if earlier.recipe.evaluation is None else None


def run_stages(
    run: Run,
    until: str | None = None,
    *,
    restart: bool = False,
    resume: bool = False,
    on_stage: OnStage | None = None,
    launch: Launch | None = None,
    engine: Engine = "local",
    strict: bool = False,
) -> RunResult:
    """Run what is missing or stale of a run, after that of the trainings before it, each from the model of the one before.

    ``until`` a part before ``train``, that part of each training is made, and nothing trained: a model that does not exist
    yet is stood in for by the one that it begins from.

    ``restart`` keeps old checkpoints aside and trains from the start; ``resume`` demands that there is one to go on from.

    Under a launcher all ranks call this. ``launch`` stands in for what the launcher's environment says. ``engine`` encodes
    and searches for the stages that mine. ``strict`` makes errors of notices of the training, before it begins where they
    can be found then.
    """
    launch = launch or Launch.from_environment()
    prepares = until in STAGES and STAGES.index(until) < STAGES.index("train")
    ran: list[str] = []
    for earlier in run.before:
        told = None if on_stage is None else partial(tell_training, on_stage, str(earlier.stage))
        one, end = (earlier.preview(), until) if prepares else (earlier, _end(earlier))
        stages = Stages(Job(one, launch.within(f"stage/{earlier.stage}"), engine=engine, strict=strict))
        if end is not None and end not in (stage.name for stage in stages.wanted()):
            continue  # such as mining, where only another training mines
        made = _StageRunner(stages, end, restart, resume, told).run()
        # A stage that was just trained leaves nothing to resume in the ones after it.
        resume = resume and "train" not in made
        ran += [f"{earlier.stage}/{name}" for name in made]
    one = run.preview() if prepares else run
    ran += _StageRunner(Stages(Job(one, launch, engine=engine, strict=strict)), until, restart, resume, on_stage).run()
    model, report = one.folder / "model", one.folder / "report.html"
    return RunResult(one.folder, tuple(ran), model if model.is_dir() else None, report if report.is_file() else None)


def tell_training(on_stage: OnStage, training: str, name: str, state: str) -> None:
    """Tell a stage of one of several trainings."""
    on_stage(f"{training}/{name}", state)


class _StageRunner:
    """Running the stages of one training.

    Rank 0 runs the stages before training while the others wait, all train, and rank 0 does the rest.
    """

    def __init__(
        self, stages: Stages, until: str | None, restart: bool, resume: bool, on_stage: OnStage | None
    ) -> None:
        self.stages, self.job = stages, stages.job
        self.restart, self.resume, self.on_stage = restart, resume, on_stage
        wanted = stages.wanted(until)
        names = [stage.name for stage in wanted]
        cut = names.index("train") if "train" in names else len(names)
        self.before, self.rest = wanted[:cut], wanted[cut:]
        self.is_scored = "evaluate" in names
        self.trains = bool(self.rest)
        self.looks_for_damage = False
        self.ran: list[str] = []
        self.held = contextlib.ExitStack()

    def run(self) -> list[str]:
        """The names of the stages that were missing or stale, and ran."""
        launch = self.job.launch
        with listening(self.job.said), self.held:
            launch.prepare(self._prepare, self._verify, self._help)
            if self.rest:
                with launch.together() if self.trains else contextlib.nullcontext():
                    if launch.is_main:
                        self._run(self.rest)
                    elif self.trains:
                        self.stages.train.run()
        return self.ran

    def _prepare(self, tell: Callable[[str], None]) -> str:
        """On rank 0: all that comes before the training; what the others have to know of it."""
        job, run, wanted = self.job, self.job.run, [*self.before, *self.rest]
        self.held.enter_context(run.lock())
        self.trains = bool(self.rest) and (self.restart or not self.stages.train.is_done)
        if self.trains:
            self.stages.train.is_scored = self.is_scored
            self.stages.train.check_can_train()
            if self.is_scored:  # before the training is paid for
                stop_on_blocking(suite_notices(run))
        run.begin()
        if job.strict and self.rest and not self.trains:
            refuse(run.notices, str(run.loaded.path))
        # Who asks for a finished run once more has nothing read by it.
        self.looks_for_damage = not self.rest or not all(stage.is_done for stage in wanted)
        if self.restart and (run.folder / "checkpoints").is_dir():
            set_aside(run.folder / "checkpoints", "checkpoints-before-restart")
        elif self.resume:
            self.stages.train.check_resumable()
        self._run(self.before, tell)
        if self.trains:
            tell("the suites that are scored")
            contract = self.stages.tokens.prompts.trained_contract
            training_suite_prompts(job, contract)
            if self.is_scored:
                suite_prompts(job, contract)
        artifacts = self.stages.train.artifacts() if self.trains and job.launch.world_size > 1 else {}
        return json.dumps({"trains": self.trains, "artifacts": artifacts})

    def _verify(self, word: str) -> None:
        """On the other ranks: refuse what this one could never train with."""
        said = json.loads(word)
        self.trains = said["trains"]
        if self.trains:
            self.stages.train.check_can_train()
            self.stages.train.check_artifacts(said["artifacts"])

    def _help(self, task: str) -> None:
        """On the other ranks: their part of a task that rank 0 divides."""
        name, number = task.split()
        next(stage for stage in self.before if stage.name == name).help(int(number))

    def _run(self, stages: Sequence[Stage], tell: Callable[[str], None] = lambda text: None) -> None:
        """Run what is not done; once one ran, those after it are looked at anew."""
        run = self.job.run
        for stage in stages:
            fresh = stage.is_done and not (self.restart and stage.name == "train")
            tell(stage.name)
            if fresh and self.looks_for_damage:
                fresh = not stage.remove_damaged()
            run.tell_stage(None if fresh else stage.name)
            if self.on_stage is not None:
                self.on_stage(stage.name, "done" if fresh else "running")
            # An artifact that another run left in the shared cache is done, but this run's manifest must name it.
            if fresh and run.record(stage.name).get("fingerprint") == stage.fingerprint:
                continue
            began = time.monotonic()
            details = {} if fresh else stage.run()
            versions = stage.versions()
            entry = {
                "fingerprint": stage.fingerprint,
                "path": str(stage.output),
                "seconds": round(time.monotonic() - began, 1),
                **({"versions": versions} if versions else {}),
                **details,
            }
            run.finish(stage.name, entry)
            if not fresh:
                self.ran.append(stage.name)


AGAIN = "nearfield train {run}"


@dataclass(frozen=True)
class Verified:
    """A folder that was read whole."""

    name: str
    bytes: int
    damage: str | None
    """The fault; None where there is none."""
    mend: str
    """The command that mends it, with ``{run}`` for the run."""


def verify(run: Run) -> list[Verified]:
    """All artifacts of a run (and of the trainings before it) that are there, in the order of the stages."""
    verified: list[Verified] = []
    for each in (*run.before, run):
        prefix = "" if each is run else f"{each.stage}/"
        verified += [replace(one, name=f"{prefix}{one.name}") for one in _of(each)]
    return verified


def _of(run: Run) -> Iterator[Verified]:
    for stage in Stages.of(run.preview()).wanted():
        for folder in stage.sealed():
            if folder.is_dir():
                yield Verified(f"{stage.name} ({folder.name})", _size(folder), damage(folder), AGAIN)
    yield from _checkpoints(run.folder / "checkpoints")
    model, wanted = run.folder / "model", run.record("train").get("model")
    if model.is_dir() and wanted is not None:
        changed = None if folder_revision(model) == wanted else "its files are not those that training wrote"
        yield Verified("model", _size(model), changed, f"rm -r {model} && {AGAIN}")


def _checkpoints(folder: Path) -> Iterator[Verified]:
    from nearfield.training.checkpoint import checkpoint_paths, open_checkpoint

    for path in checkpoint_paths(folder):
        try:
            open_checkpoint(path)
            wrong = None
        except BadInputError as error:
            wrong = str(error).splitlines()[0]
        # A run passes over a damaged checkpoint by itself, and goes on from the one before it.
        yield Verified(f"checkpoint {path.name}", _size(path), wrong, AGAIN)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
