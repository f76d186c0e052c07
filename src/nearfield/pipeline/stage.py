"""A stage of a run: the inputs that its output depends on, where that is, and the work that makes it.

Whether a stage is done is decided by fingerprints, never by time stamps. A stage is given the stages whose output it reads,
so its fingerprint is made of theirs, of its own settings and of its version.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nearfield.checksums import damage
from nearfield.encoders.prompts import PromptContract, base_prompts, make_contract
from nearfield.encoders.source import ModelSource, locate
from nearfield.files import fingerprint
from nearfield.notices import Said
from nearfield.pipeline.run import Run
from nearfield.provenance import versions_of
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    from nearfield.data.store import Store

logger = logging.getLogger("nearfield.pipeline")

Engine = Literal["local", "ray"]
"""``ray`` encodes and searches on a Ray cluster; what comes out is the same."""


@dataclass(frozen=True)
class StageStatus:
    """Whether a stage is done, and where its output is."""

    name: str
    state: str
    """``done``, ``stale`` (its inputs or settings changed), ``missing`` or ``partial`` (can be continued)."""
    detail: str
    path: str | None = None
    seconds: float | None = None


class Job:
    """The part that all stages of a run share: its recipe, the ranks that work on it, the base model, prompts and notices."""

    def __init__(
        self, run: Run, launch: Launch | None = None, *, engine: Engine = "local", strict: bool = False
    ) -> None:
        self.run = run
        self.recipe = run.recipe
        self.launch = launch or Launch()
        self.engine = engine
        self.strict = strict
        """Whether a notice that is not minor ends the run."""
        self.said = Said()
        """The notices of the training so far."""

    @cached_property
    def base(self) -> ModelSource:
        """The base model's place, found without loading it."""
        return locate(self.recipe.encoder.model, self.recipe.encoder.revision)

    @cached_property
    def contract(self) -> PromptContract:
        """The prompts that this run trains with."""
        base = self.run.inherits or base_prompts(self.base.path, self.recipe.encoder.revision)
        return make_contract(self.run.checked.sources, self.recipe.prompts, base)

    @cached_property
    def encoder_inputs(self) -> dict[str, Any]:
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

    def open_store(self, path: Path) -> Store:
        """A built store, or that of a data recipe, built in the shared cache if it is missing."""
        from nearfield.data import prepare_store
        from nearfield.data.store import Store
        from nearfield.encoders.encode import text_encoder

        return Store.open(path) if path.is_dir() else prepare_store(path, self.run.cache, encoders=text_encoder)


class Stage:
    """A step of a run that reads the output of earlier stages and writes its own."""

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    """Whether its output is in the cache that runs share, where its presence says that the stage is done."""
    packages: ClassVar[Sequence[str]] = ()
    """The packages whose versions change what the stage puts into the shared cache."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.recipe = job.recipe

    @property
    def is_wanted(self) -> bool:
        """Whether the recipe asks for it."""
        return True

    def inputs(self) -> Any:
        """Everything its output depends on: settings, contents of files, fingerprints of earlier stages; a JSON-able value."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that the stage should have with the recipe as it is now."""
        return fingerprint(self.inputs())

    def outputs(self) -> list[Path]:
        """The files or folders whose presence a finished stage promises."""
        raise NotImplementedError

    @property
    def output(self) -> Path:
        """The one that the manifest names."""
        return self.outputs()[-1]

    def sealed(self) -> list[Path]:
        """The folders with checksums that it leaves behind."""
        return self.outputs() if self.shared else []

    def run(self) -> dict[str, Any]:
        """Do the work, and return what the manifest says of it."""
        raise NotImplementedError

    def help(self, number: int) -> None:
        """Do this rank's part of the task ``number`` that rank 0 divides."""
        raise NotImplementedError

    def divider(self, number: int) -> Callable[[Callable[[int], None]], None] | None:
        """A function that has all ranks do their shares of a task; None where there is one rank."""
        launch = self.job.launch
        ranks = launch.world_size
        return None if ranks == 1 else lambda own: launch.divide(f"{self.name} {number}", lambda: own(ranks))

    def versions(self) -> dict[str, str]:
        """The versions of the packages that change what the stage would put into the shared cache now."""
        return versions_of(self.packages)

    def in_cache(self, folder: str, mark: str) -> Path:
        """Where its output is in the shared cache, by what it is made of and by the versions that change its numbers.

        A run goes on with what it began with, whatever was installed since; no other run gets what other versions made.
        """
        run, now = self.job.run, self.versions()
        record = run.record(self.name)
        begun = record.get("versions") if record.get("fingerprint") == self.fingerprint else None
        places = [run.cache / folder / fingerprint([mark, versions]) for versions in (begun, now) if versions]
        return next((place for place in places if place.is_dir()), places[-1])

    def status(self) -> StageStatus:
        """Whether it is done with the recipe as it is now."""
        record, path = self.job.run.record(self.name), self.output
        if self.shared:
            if all(folder.is_dir() for folder in self.outputs()):
                return StageStatus(self.name, "done", "in the shared cache", str(path), record.get("seconds"))
            return StageStatus(self.name, "missing", "", str(path), record.get("seconds"))
        if record.get("fingerprint") == self.fingerprint and path.exists():
            return StageStatus(self.name, "done", "", str(path), record.get("seconds"))
        if record and path.exists():
            return StageStatus(self.name, "stale", "its settings or inputs changed", str(path))
        return StageStatus(self.name, "missing", "", str(path))

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is missing or stale."""
        return self.status().state == "done"

    def remove_damaged(self) -> bool:
        """Remove those of its folders that are not what was written, so that it makes them again; whether there were any."""
        found = [(folder, damage(folder)) for folder in self.sealed() if folder.is_dir()]
        for folder, wrong in found:
            if wrong is not None:
                logger.warning("The stage %s runs again: %s (%s)", self.name, wrong, folder)
                shutil.rmtree(folder)
        return any(wrong is not None for _, wrong in found)
