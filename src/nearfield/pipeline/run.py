"""A run and its stages: the folder with its recipe and manifest, and a stage's inputs, output and work.

Whether a stage is done is decided by fingerprints, never by time stamps. A stage is given the stages whose output it reads,
so its fingerprint is made of theirs, of its own settings and of its version.

Also the runs of one way to train: those of a recipe that differ in nothing but their seed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml

from nearfield.config import Loaded, dump_yaml, load_yaml
from nearfield.encoders.prompts import BasePrompts, PromptContract, base_prompts, make_contract
from nearfield.encoders.source import ModelSource, locate, stated_similarity, trained_similarity
from nearfield.errors import BadInputError, Notice, Said, from_file, in_file
from nearfield.files import (
    canonical_json,
    damage,
    fingerprint,
    hash_file,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from nearfield.provenance import device, now, versions, versions_of
from nearfield.recipe import CheckedRecipe, Recipe, check_recipe, load_recipe, stage_recipes
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    from nearfield.data.store import Store
    from nearfield.evaluation.comparison import Method


logger = logging.getLogger("nearfield.pipeline")

MANIFEST = "manifest.json"
LOCK = ".lock"
Engine = Literal["local", "ray"]
"""``ray`` encodes and searches on a Ray cluster; what comes out is the same."""


@dataclass(frozen=True)
class Run:
    """A recipe with the folder that its run lives in."""

    loaded: Loaded[Recipe]
    checked: CheckedRecipe
    folder: Path
    overrides: tuple[str, ...] = ()
    stage: str | None = None
    """Its name, where the recipe has several trainings in a row; the last of them lives in the folder of the whole."""
    before: tuple[Run, ...] = ()
    """Those before it, each from the model of the one before."""
    shared: Path | None = None
    """Where artifacts that several runs share are kept, if not beside the folder."""
    inherits: BasePrompts | None = None
    """The prompts of the model that it starts from, where another stands in for that; null reads them from its folder."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.loaded.config

    @property
    def cache(self) -> Path:
        """Where artifacts that several runs share are kept, named by their fingerprints."""
        return self.shared or self.folder.parent / ".cache"

    def preview(self) -> Run:
        """This run, for a look at what it will take: where the model that it starts from does not exist yet, that of the
        stage before stands in for it."""
        if not self.before or (self.folder_of_base / "model").is_dir():
            return self
        earlier = self.before[-1].preview().recipe.encoder
        encoder = self.recipe.encoder.model_copy(
            update={key: getattr(earlier, key) for key in ("model", "revision", "fresh", "image_tower")}
        )
        recipe = self.recipe.model_copy(update={"encoder": encoder})
        return replace(
            self,
            loaded=replace(self.loaded, config=recipe),
            checked=replace(self.checked, recipe=recipe),
            before=(),
            inherits=self.before[-1].checked.contract.as_base(),
        )

    @property
    def folder_of_base(self) -> Path:
        """The folder of the run whose model this one starts from; there must be one."""
        return self.before[-1].folder

    def manifest(self) -> dict[str, Any]:
        """The manifest, empty for a new run."""
        return read_manifest(self.folder)

    def begin(self) -> None:
        """Write the resolved recipe and the head of the manifest."""
        manifest = self.manifest()
        recipe = self.recipe.model_dump(mode="json")
        write_text(self.folder / "recipe.yaml", dump_yaml(recipe))
        head = {
            "name": self.recipe.name,
            "created": manifest.get("created", now()),
            "command": " ".join(["nearfield", *sys.argv[1:]]),
            "recipe": {
                "path": str(self.loaded.path.resolve()),
                "overrides": list(self.overrides),
                **({} if self.stage is None else {"stage": self.stage}),
            },
            "seed": self.recipe.seed,
            "versions": versions(),
            "device": device(),
            "stages": manifest.get("stages", {}),
            "notices": manifest.get("notices", []),
        }
        write_json(self.folder / MANIFEST, head)

    def record(self, stage: str) -> dict[str, Any]:
        """The manifest's entry of a stage, empty if it never finished."""
        entry: dict[str, Any] = self.manifest().get("stages", {}).get(stage, {})
        return entry

    def finish(self, stage: str, entry: dict[str, Any]) -> None:
        """Write in the manifest that a stage is done."""
        manifest = self.manifest()
        manifest.setdefault("stages", {})[stage] = {**entry, "finished": now()}
        write_json(self.folder / MANIFEST, manifest)

    @property
    def notices(self) -> list[Notice]:
        """The notices of the training that the manifest keeps."""
        return list(from_file(self.manifest().get("notices")))

    def keep_notices(self, notices: Sequence[Notice]) -> None:
        """Replace the manifest's notices of the training."""
        write_json(self.folder / MANIFEST, {**self.manifest(), "notices": in_file(notices)})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process at a time works on a run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInputError("another process is working on this run", where=str(self.folder)) from error
            self.tell_stage(None)
            self._remove_leftovers()
            try:
                yield
            finally:
                file.truncate(0)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes were writing in the run and in the shared cache."""
        places = [
            self.folder,
            *(self.cache / name for name in ("data", "tokens", "negatives", "decontamination", "vectors")),
        ]
        removed = sum(remove_leftovers(place, depth=3) for place in places)
        if removed:
            logger.info("Removed what %d writes left half done when their processes were killed", removed)

    def tell_stage(self, stage: str | None) -> None:
        """Say in the lock, which this process must hold, who works on the run and at what: for those who watch."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage}
        # In place: another file of this name would not be locked.
        (self.folder / LOCK).write_text(json.dumps(owner), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run's folder, empty where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = read_json(path, "manifest")
    except BadInputError as error:
        raise BadInputError(error.what, where=error.where, hint="Delete it to run all stages again.") from error
    parts = [manifest.get(key, {}) for key in ("stages", "recipe")] if isinstance(manifest, dict) else [None]
    stages, recipe = parts[0], parts[-1]
    whole = isinstance(stages, dict) and all(isinstance(entry, dict) for entry in stages.values())
    named = isinstance(recipe, dict) and isinstance(recipe.get("path", ""), str)
    overrides = recipe.get("overrides", []) if isinstance(recipe, dict) else None
    if not (whole and named and isinstance(overrides, list) and all(isinstance(one, str) for one in overrides)):
        raise BadInputError(
            "this manifest is not one of a run", where=str(path), hint="Delete it to run all stages again."
        )
    return dict(manifest)


def open_run(recipe: str | Path | Recipe, overrides: Sequence[str] = (), folder: str | Path | None = None) -> Run:
    """The run of a recipe file; its folder is ``runs/NAME`` under the current directory unless another is given.

    ``recipe`` may also be a run's folder: then the recipe that the run was made with is read again, from where it was
    or, if that file is gone, from the copy in the run. A :class:`Recipe` that was made in Python takes no overrides.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise BadInputError("overrides go with a recipe file, not with a Recipe", hint="Make the Recipe as wanted.")
        return _run(Loaded(recipe, Path("Recipe made in Python")), folder, ())
    recipe = Path(recipe)
    if recipe.is_dir():
        if not (recipe / "recipe.yaml").is_file():
            raise BadInputError("this folder is no run (it has no recipe.yaml)", where=str(recipe))
        folder = recipe if folder is None else folder
        source = read_manifest(recipe).get("recipe", {})
        original, stage = Path(source.get("path", "")), source.get("stage")
        if original.is_file():
            overrides = [*source.get("overrides", []), *overrides]
            whole = load_recipe(original, overrides)
            if stage is not None and whole.config.stages and whole.config.stages[-1].name != stage:
                top = Path(folder).resolve().parent.parent
                last = _run(whole, top, tuple(overrides))
                for run in last.before:
                    if run.stage == stage:
                        return run
                raise BadInputError(f"its recipe has no stage {stage!r} any more", where=str(folder))
            return _run(whole, folder, tuple(overrides))
        recipe = recipe / "recipe.yaml"
    return _run(load_recipe(recipe, overrides), folder, tuple(overrides))


def _run(loaded: Loaded[Recipe], folder: str | Path | None, overrides: tuple[str, ...]) -> Run:
    folder = (Path(folder) if folder is not None else Path("runs") / loaded.config.name).resolve()
    if folder.is_file():
        raise BadInputError("the run's folder is a file", where=str(folder))
    stages = loaded.config.stages
    before: list[Run] = []
    for number, recipe in enumerate(stage_recipes(loaded)):
        last = number >= len(stages) - 1
        if before:
            # Where an earlier stage drew new weights or added a tower, its model has them.
            made = {"revision": None, "fresh": None, "image_tower": None}
            started = recipe.config.encoder.model_copy(update={"model": str(before[-1].folder / "model"), **made})
            recipe = replace(recipe, config=recipe.config.model_copy(update={"encoder": started}))
        recipe = replace(recipe, config=_compared(recipe.config, before))
        place = folder if last else folder / "stages" / stages[number].name
        name = stages[number].name if stages else None
        shared = folder.parent / ".cache" if stages else None
        checked = check_recipe(recipe, before[-1].checked.contract.as_base() if before else None)
        before.append(Run(recipe, checked, place, overrides, name, tuple(before), shared))
    return before[-1]


def _compared(recipe: Recipe, before: Sequence[Run]) -> Recipe:
    """A recipe whose objective compares vectors as its base does, where it does not say how."""
    model = before[0].recipe.encoder if before else recipe.encoder
    similarity = stated_similarity(model.model, model.revision)
    for run in before:
        similarity = trained_similarity(run.recipe.objective.comparisons, similarity)
    return recipe.model_copy(update={"objective": recipe.objective.for_model(similarity)})


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
        settings = encoder.identity(exclude={"model", "revision"})
        if encoder.image_tower is not None and encoder.image_tower.model is not None:
            source = locate(encoder.image_tower.model, encoder.image_tower.revision)
            settings["image_tower"] |= {"model": source.name, "revision": source.content}
        # Settings that a recipe does not use are left out, so that runs from before they existed stay fresh.
        return {
            key: value for key, value in settings.items() if value is not None or key not in ("fresh", "image_tower")
        }

    @property
    def source_names(self) -> list[str]:
        """The sources that are trained on."""
        return [source.name for source in self.run.checked.sources]

    def open_store(self, path: Path) -> Store:
        """A built store, or that of a data recipe, built in the shared cache if it is missing."""
        from nearfield.data.build import prepare_store
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
        return (
            None if ranks == 1 else lambda local_part: launch.divide(f"{self.name} {number}", lambda: local_part(ranks))
        )

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
            # Of a file that is small enough to be read each time.
            content = record.get("content")
            if content is not None and path.is_file() and hash_file(path) != content:
                return StageStatus(self.name, "stale", "its file was changed or is damaged", str(path))
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
        damages = [(folder, damage(folder)) for folder in self.sealed() if folder.is_dir()]
        for folder, wrong in damages:
            if wrong is not None:
                logger.warning("The stage %s runs again: %s (%s)", self.name, wrong, folder)
                shutil.rmtree(folder)
        return any(wrong is not None for _, wrong in damages)


def is_method(argument: str) -> bool:
    """Whether a command-line argument names a recipe, or a folder that holds runs."""
    path = Path(argument)
    return path.suffix in (".yaml", ".yml") or (path.is_dir() and bool(_runs_in(path)))


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def find_method(argument: str, runs: Path, label: str | None = None) -> Method:
    """The finished runs of a method, by seed.

    A recipe's runs are those below ``runs`` whose recipe is the same but for ``seed`` and ``name``; a folder's are the
    runs in it, which must be of one recipe in this sense.
    """
    from nearfield.evaluation.comparison import Method

    path = Path(argument)
    if path.is_dir():
        recipes = {run: _recipe_of(run) for run in _runs_in(path)}
        if len({_method_of(recipe) for recipe in recipes.values()}) > 1:
            raise BadInputError(
                "the runs in this folder differ in more than their seed", where=argument, hint="One folder, one method."
            )
        chosen = list(recipes)
    else:
        from nearfield.recipe import load_recipe

        wanted = _method_of(load_recipe(path, ()).config.model_dump(mode="json"))
        chosen = [run for run in _runs_in(runs) if _method_of(_recipe_of(run)) == wanted]
    by_seed: dict[int, Path] = {}
    for run in chosen:
        results = _results_of(run)
        if results is None:
            continue
        seed = int(_recipe_of(run).get("seed", 0))
        if seed in by_seed:
            raise BadInputError(
                f"two runs of this method have the seed {seed}",
                where=argument,
                hint=f"They are {by_seed[seed]} and {results}; move one away.",
            )
        by_seed[seed] = results
    if not by_seed:
        raise BadInputError(
            "there is no finished, evaluated run of this method",
            where=argument,
            hint=f"Train it with several seeds below {runs}: nearfield train RECIPE seed=1 --run-folder {runs}/NAME-1.",
        )
    return Method(label or path.stem, by_seed)


def _recipe_of(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    try:
        value = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInputError("the recipe of this run cannot be read", where=str(file)) from error
    if not isinstance(value, dict):
        raise BadInputError("this is no recipe", where=str(file))
    return value


def _method_of(recipe: dict[str, Any]) -> str:
    # Settings that are not used are left out, so that recipes from before they existed are the same method.
    settings = {key: value for key, value in recipe.items() if key not in ("seed", "name") and value is not None}
    return canonical_json(settings)


def _results_of(run: Path) -> Path | None:
    """The results of the trained model; None where the run has not come so far."""
    results = read_manifest(run).get("stages", {}).get("evaluate", {}).get("results", {})
    folder = run / str(results["after"]) if isinstance(results, dict) and "after" in results else None
    return folder if folder is not None and folder.is_dir() else None
