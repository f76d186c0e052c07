"""All stages of a run, and running those that are missing or stale."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nearfield.notices import listening, refuse
from nearfield.pipeline.during import prepare_suites
from nearfield.pipeline.freshness import STAGES, Freshness
from nearfield.pipeline.mining import Engine
from nearfield.pipeline.preparing import PreparingStages
from nearfield.pipeline.run import Run, StageStatus
from nearfield.pipeline.scoring import ScoringStages
from nearfield.pipeline.training import TrainingStage, set_aside
from nearfield.training.launch import Launch


@dataclass(frozen=True)
class RunResult:
    """What a call of :func:`run_stages` left behind."""

    folder: Path
    ran: tuple[str, ...]
    """Stages that were missing or stale and ran."""
    model: Path | None
    report: Path | None


class Stages(PreparingStages, TrainingStage, ScoringStages):
    """The work of each stage of a run: each reads artifacts and writes artifacts."""


def status(run: Run) -> list[StageStatus]:
    """The state of each stage of a run; of trainings before it, of the parts of each that are wanted, as ``training/part``."""
    found: list[StageStatus] = []
    for earlier in run.before:
        stages = Freshness(earlier.preview())
        wanted = stages.wanted(_end(earlier))
        found += [replace(stages.status(stage), name=f"{earlier.stage}/{stage}") for stage in wanted]
    stages = Freshness(run.preview())
    return found + [stages.status(stage) for stage in stages.wanted(None)]


def _end(earlier: Run) -> str | None:
    """Where a training before the last one ends: it is scored only where it asks for it."""
    return "train" if earlier.recipe.evaluation is None else None


def run_stages(
    run: Run,
    until: str | None = None,
    *,
    restart: bool = False,
    resume: bool = False,
    on_stage: Callable[[str, str], None] | None = None,
    launch: Launch | None = None,
    engine: Engine = "local",
    strict: bool = False,
) -> RunResult:
    """Run what is missing or stale of a run, after that of the trainings before it, each from the model of the one before.

    ``until`` a part before ``train``, that part of each training is made, and nothing trained: a model that does not exist
    yet is stood in for by the one that it begins from.

    ``restart`` keeps old checkpoints aside and trains from the start; ``resume`` demands that there is one to go on from.
    ``on_stage`` is told each stage (``training/part`` of those before) and ``done`` or ``running``.

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
        if end is not None and end not in Freshness(one).wanted(None):
            continue  # such as mining, where only another training mines
        part = launch.within(f"stage/{earlier.stage}")
        found = _run_one(
            one, end, on_stage=told, launch=part, restart=restart, resume=resume, engine=engine, strict=strict
        )
        # What was trained now began after what there was to go on from.
        resume = resume and "train" not in found.ran
        ran += [f"{earlier.stage}/{name}" for name in found.ran]
    one = run.preview() if prepares else run
    found = _run_one(
        one, until, on_stage=on_stage, launch=launch, restart=restart, resume=resume, engine=engine, strict=strict
    )
    return replace(found, ran=(*ran, *found.ran))


def tell_training(on_stage: Callable[[str, str], None], training: str, name: str, state: str) -> None:
    """Tell a stage of one of several trainings."""
    on_stage(f"{training}/{name}", state)


def _run_one(
    run: Run,
    until: str | None,
    *,
    restart: bool,
    resume: bool,
    on_stage: Callable[[str, str], None] | None,
    launch: Launch,
    engine: Engine,
    strict: bool,
) -> RunResult:
    """Run the stages that are missing or stale, in order; once one ran, those after it are looked at anew.

    Rank 0 runs the stages before training while the others wait, all train, and rank 0 does the rest.
    """
    stages = Stages(run, launch)
    wanted = stages.wanted(until)
    stages.engine, stages.strict, stages.scores = engine, strict, "evaluate" in wanted
    before = wanted[: wanted.index("train")] if "train" in wanted else wanted
    ran: list[str] = []

    def work(names: list[str], tell: Callable[[str], None]) -> None:
        for name in names:
            fresh = stages.status(name).state == "done" and not (restart and name == "train")
            tell(name)
            if fresh and looks:
                fresh = not stages.drop_damaged(name)
            if launch.is_main:
                run.tell_stage(None if fresh else name)
                if on_stage is not None:
                    on_stage(name, "done" if fresh else "running")
            # An artifact that another run left in the shared cache is done, but this run's manifest must name it.
            if fresh and run.record(name).get("fingerprint") == stages.fingerprints[name]:
                continue
            began = time.monotonic()
            details = {} if fresh else getattr(stages, name)()
            if not launch.is_main:
                continue
            seconds = round(time.monotonic() - began, 1)
            entry = {
                "fingerprint": stages.fingerprints[name],
                "path": str(stages.output(name)),
                "seconds": seconds,
                **({"versions": versions} if (versions := stages.versions(name)) else {}),
                **details,
            }
            run.finish(name, entry)
            if not fresh:
                ran.append(name)

    looks = False

    def prepare(tell: Callable[[str], None]) -> str:
        nonlocal looks
        held.enter_context(run.lock())
        trains = "train" in wanted and (restart or stages.status("train").state != "done")
        if trains:
            stages.check_can_train()
            stages.check_suite()
        run.begin()
        if strict and not trains and "train" in wanted:
            refuse(run.notices, str(run.loaded.path))
        # Who asks for a finished run once more has nothing read by it.
        looks = "train" not in wanted or any(stages.status(name).state != "done" for name in wanted)
        if restart and (run.folder / "checkpoints").is_dir():
            set_aside(run.folder / "checkpoints", "checkpoints-before-restart")
        elif resume:
            stages.check_resumable()
        work(before, tell)
        if trains:
            tell("the suites that are scored")
            prepare_suites(stages, stages._open_store, "evaluate" in wanted)
        return json.dumps(
            {"trains": trains, "artifacts": stages.artifacts() if trains and launch.world_size > 1 else {}}
        )

    trains = True

    def verify(word: str) -> None:
        nonlocal trains
        said = json.loads(word)
        trains = said["trains"]
        if trains:
            stages.check_can_train()
            stages.check_artifacts(said["artifacts"])

    with listening(stages.said), contextlib.ExitStack() as held:
        launch.prepare(prepare, verify, stages.help)
        if "train" in wanted:
            rest = wanted[wanted.index("train") :]
            with launch.together() if trains else contextlib.nullcontext():
                if launch.is_main:
                    work(rest, lambda text: None)
                elif trains:
                    stages.train()
    model, report = run.folder / "model", run.folder / "report.html"
    return RunResult(run.folder, tuple(ran), model if model.is_dir() else None, report if report.is_file() else None)
