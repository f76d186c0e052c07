"""All stages of a run, and running those that are missing or stale."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nearfield.pipeline.during import prepare_training_suite
from nearfield.pipeline.freshness import Freshness
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
    """The state of each stage of a run."""
    stages = Freshness(run)
    return [stages.status(stage) for stage in stages.wanted(None)]


def run_stages(
    run: Run,
    until: str | None = None,
    *,
    restart: bool = False,
    resume: bool = False,
    on_stage: Callable[[str, str], None] | None = None,
    launch: Launch | None = None,
    engine: Engine = "local",
) -> RunResult:
    """Run the stages that are missing or stale, in order; once one ran, those after it are looked at anew.

    ``restart`` keeps old checkpoints aside and trains from the start; ``resume`` demands that there is one to go on from.
    ``on_stage`` is told each stage and ``done`` or ``running``.

    Under a launcher all ranks call this. Rank 0 runs the stages before training while the others wait, all train, and
    rank 0 does the rest. ``launch`` stands in for what the launcher's environment says. ``engine`` encodes and searches
    for the stages that mine.
    """
    launch = launch or Launch.from_environment()
    stages = Stages(run, launch)
    stages.engine = engine
    wanted = stages.wanted(until)
    before = wanted[: wanted.index("train")] if "train" in wanted else wanted
    ran: list[str] = []

    def work(names: list[str], tell: Callable[[str], None]) -> None:
        for name in names:
            fresh = stages.status(name).state == "done" and not (restart and name == "train")
            tell(name)
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
                **details,
            }
            run.finish(name, entry)
            if not fresh:
                ran.append(name)

    def prepare(tell: Callable[[str], None]) -> str:
        held.enter_context(run.lock())
        trains = "train" in wanted and (restart or stages.status("train").state != "done")
        if trains:
            stages.check_can_train()
        run.begin()
        if restart and (run.folder / "checkpoints").is_dir():
            set_aside(run.folder / "checkpoints", "checkpoints-before-restart")
        elif resume:
            stages.check_resumable()
        work(before, tell)
        if trains:
            tell("the suite that is scored during the training")
            prepare_training_suite(stages, stages._open_store)
        return json.dumps({"trains": trains, "artifacts": stages.artifacts() if trains else {}})

    trains = True

    def verify(word: str) -> None:
        nonlocal trains
        said = json.loads(word)
        trains = said["trains"]
        if trains:
            stages.check_can_train()
            stages.check_artifacts(said["artifacts"])

    with contextlib.ExitStack() as held:
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
