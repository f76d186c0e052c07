"""The stages of a run: each reads artifacts and writes artifacts."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.encoders.build import LoadedEncoder, build_encoder, load_encoder, save_encoder
from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import atomic_path, hash_file, hash_folder, write_json, write_text
from nearfield.pipeline.during import evaluation_during_training, prepare_training_suite
from nearfield.pipeline.freshness import Freshness
from nearfield.pipeline.run import Run, StageStatus
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    import torch

    from nearfield.batching.plan import Plan
    from nearfield.data.store import Store
    from nearfield.data.tokens import Rows, TokenCache
    from nearfield.training.loop import TrainingResult

logger = logging.getLogger("nearfield.pipeline")


@dataclass(frozen=True)
class RunResult:
    """What a call of :func:`run_stages` left behind."""

    folder: Path
    ran: tuple[str, ...]
    """Stages that were missing or stale and ran."""
    model: Path | None
    report: Path | None


class Stages(Freshness):
    """The work of each stage of a run."""

    def __init__(self, run: Run, launch: Launch) -> None:
        super().__init__(run)
        self.launch = launch

    def data(self) -> dict[str, Any]:
        """Read the sources into a store of items and examples."""
        from nearfield.data import prepare_store

        store = prepare_store(self.recipe.data, self.run.cache)
        return {"items": store.items.num_rows, "examples": store.examples.num_rows}

    def tokens(self) -> dict[str, Any]:
        """Tokenise the items of the training split with their prompts."""
        from nearfield.data.tokens import build_tokens
        from nearfield.encoders.tokenize import Tokenizer

        store = self._store()
        wanted: dict[str, list[Rows]] = {}
        for source in self.run.checked.sources:
            rows = store.select(source.name, self.recipe.split)
            if not len(rows):
                splits = sorted({str(s) for s in store.examples["split"].unique().to_pylist()})
                raise BadInputError(
                    f"the source {source.name!r} has no examples in the split {self.recipe.split!r}",
                    where=self.run.loaded.where(("split",)),
                    hint=f"Splits: {', '.join(splits)}.",
                )
            prompts = self.contract.sources[source.name]
            part = store.examples.take(rows)
            wanted.setdefault(prompts["query"], []).append(part["query"].to_numpy())
            for column in ("positives", "negatives"):
                wanted.setdefault(prompts["document"], []).append(part[column].combine_chunks().flatten().to_numpy())
        tokenizer = Tokenizer(self.recipe.encoder)
        cache = build_tokens(
            store,
            {prompt: np.concatenate(rows) for prompt, rows in wanted.items()},
            tokenizer,
            tokenizer.prompt_length,
            self.tokens_path,
            self.fingerprints["tokens"],
        )
        return {"tokens": sum(int(table.offsets[-1]) for table in cache.tables)}

    def plan(self) -> dict[str, Any]:
        """Write the batches of all epochs."""
        from nearfield.batching.plan import Lengths, write_plan
        from nearfield.batching.planner import SourceExamples

        store, tokens, recipe = self._store(), self._tokens(), self.recipe
        sources, prompts = [], {}
        for source in self.run.checked.sources:
            rows = store.select(source.name, recipe.split)
            part, number = store.examples.take(rows), store.source_number(source.name)
            sources.append(
                SourceExamples(
                    number,
                    source.name,
                    rows,
                    part["query"].to_numpy(),
                    _lists(part["positives"]),
                    _lists(part["negatives"]),
                )
            )
            texts = self.contract.sources[source.name]
            prompts[number] = (tokens.number(texts["query"]), tokens.number(texts["document"]))
        lengths: Lengths = lambda prompt, items: tokens.tables[prompt].lengths(items)  # noqa: E731
        planner, steps, summaries = recipe.batches.build(), 0, []
        names = {str(source.source): source.name for source in sources}
        with atomic_path(self.run.folder / "plan") as aside:
            aside.mkdir()
            for epoch in range(recipe.training.epochs):
                if recipe.training.max_steps is not None and steps >= recipe.training.max_steps:
                    break
                batches = planner.plan(sources, recipe.seed, epoch)
                metadata = {
                    "seed": recipe.seed,
                    "epoch": epoch,
                    "data": self.fingerprints["data"],
                    "tokens": self.fingerprints["tokens"],
                    "batches": recipe.batches.model_dump(mode="json"),
                    "sources": names,
                }
                summary = write_plan(aside / f"epoch-{epoch:03d}.parquet", batches, prompts, lengths, metadata)
                summary["batches_by_source"] = {names[k]: n for k, n in summary["batches_by_source"].items()}
                summaries.append(summary)
                steps += summary["batches"]
            if steps == 0:
                raise BadInputError(
                    f"not one batch of {recipe.batches.batch_size} can be made: {summaries[0]['dropped']}",
                    where=self.run.loaded.where(("batches", "batch_size")),
                    hint="Lower batches.batch_size, or set batches.drop_last=false.",
                )
            whole = {
                "kind": recipe.batches.kind,
                "batch_size": recipe.batches.batch_size,
                "steps": steps,
                "epochs": summaries,
            }
            write_json(aside / "summary.json", whole)
        return {"steps": steps}

    def train(self) -> dict[str, Any]:
        """Train from the newest checkpoint on and save the model."""
        from nearfield.training.engine import pick_device
        from nearfield.training.loop import TrainingInputs, train

        store, folder = self._store(), self.run.folder
        plans, hashes = self._plans()
        if self.launch.is_main:
            self._set_aside_stale_checkpoints()
        known = store.known_positives()
        ids = store.items["id"]
        config = self.recipe.training
        device = pick_device(config, self.launch)
        encoder = self._encoder(device)
        inputs = TrainingInputs(
            plans=plans,
            plan_hashes=hashes,
            tokens=self._tokens(),
            known_positives=known.of,
            item_ids=lambda rows: [ids[int(row)].as_py().hex() for row in rows],
            evaluate=evaluation_during_training(self, encoder.model, self._open_store),
            about=self.recipe.model_dump(mode="json"),
        )
        result = train(
            config,
            self.recipe.objective.build(),
            encoder.model,
            inputs,
            folder,
            seed=self.recipe.seed,
            fingerprint=self.fingerprints["train"],
            launch=self.launch,
        )
        if not self.launch.is_main:
            return {}
        self._export(result, device)
        return {
            "steps": result.steps,
            "examples": result.examples,
            "resumed_from": result.resumed_from,
            "last_loss": result.last_loss,
            "training_seconds": round(result.seconds, 1),
            "device": result.device,
            "precision": result.precision,
            "backend": result.backend,
            "world_size": result.world_size,
            "base_model": [encoder.name, encoder.revision],
            "stopped_early": result.stopped_early,
            "checkpoint": result.checkpoint.name,
            **({} if result.best is None else {"best": {"step": result.best[0], "score": result.best[1]}}),
        }

    def _encoder(self, device: torch.device) -> LoadedEncoder:
        """The encoder of the recipe in the precision that weights have in training, the same on all ranks."""
        from nearfield.training.engine import pick_precision

        recipe = self.recipe
        pure = pick_precision(recipe.training, device) == "bf16-pure"
        quantized = recipe.encoder.adapter is not None and recipe.encoder.adapter.quantize != "none"
        return build_encoder(
            recipe.encoder,
            str(device) if quantized else "cpu",
            dtype="bfloat16" if pure else "float32",
            seed=recipe.seed,
        )

    def _export(self, result: TrainingResult, device: torch.device) -> None:
        """Save the model of the run's last checkpoint: complete and of one format, whatever it was trained on."""
        from nearfield.training.checkpoint import load_into, open_checkpoint
        from nearfield.training.engine import EmbeddingModule

        encoder = self._encoder(device)
        load_into(EmbeddingModule(encoder.model, self.recipe.objective.build()), open_checkpoint(result.checkpoint))
        encoder.model.prompts = dict(self.contract.model_prompts)
        with atomic_path(self.run.folder / "model") as aside:
            adapter = self.recipe.encoder.adapter
            save_encoder(encoder.model, aside, adapter=adapter.save if adapter else "merged")
            self.contract.save(aside)
            write_text(aside / "README.md", self._card(encoder, result))

    def check_can_train(self) -> None:
        """Refuse what this rank could never train with its launcher, devices and libraries."""
        from nearfield.training.engine import check_can_train

        check_can_train(self.recipe.training, self.launch, adapter=self.recipe.encoder.adapter is not None)

    def check_resumable(self) -> None:
        """Refuse to go on from nothing."""
        from nearfield.training.checkpoint import checkpoint_paths

        if self.status("train").state != "done" and not checkpoint_paths(self.run.folder / "checkpoints"):
            raise BadInputError(
                "there is no checkpoint to resume from",
                where=str(self.run.folder / "checkpoints"),
                hint="Leave out --resume to train from the start.",
            )

    def artifacts(self) -> dict[str, str]:
        """A hash of each thing that training reads: all nodes must hold the same."""
        return {name: hash_folder(path) for name, path in self._artifact_paths().items()}

    def check_artifacts(self, wanted: dict[str, str]) -> None:
        """Refuse to train on files that differ from rank 0's, as on a node without the shared file system."""
        for name, path in self._artifact_paths().items():
            if path.is_dir() and hash_folder(path) == wanted[name]:
                continue
            raise BadInputError(
                f"the {name} of this node differ from rank 0's"
                if path.is_dir()
                else f"this node does not hold the {name} that rank 0 prepared",
                where=f"{path} (on {socket.gethostname()})",
                hint="Put the run's folder on a file system that all nodes share, or make it on this node first: "
                f"nearfield train {self.run.loaded.path} --until plan --run-folder {self.run.folder}",
            )

    def _artifact_paths(self) -> dict[str, Path]:
        return {"data": self.store_path, "tokens": self.tokens_path, "batches": self.run.folder / "plan"}

    def _card(self, encoder: LoadedEncoder, result: TrainingResult) -> str:
        from nearfield.encoders.card import model_card

        recipe = self.recipe
        kept, during = int(result.checkpoint.name.removeprefix("step-")), recipe.training.evaluation
        best = f", the model of step {kept} scored best ({during.metric})" if during and during.keep_best else ""
        facts = {
            "data": f"{self.run.checked.data.name} ({', '.join(self.contract.sources)}; split {recipe.split})",
            "objective": f"{recipe.objective.kind}, temperature {recipe.objective.temperature:g}",
            "batches": f"{recipe.batches.kind}, {recipe.batches.batch_size} examples",
            "steps": f"{result.steps}{best}",
            "learning rate": f"{recipe.training.learning_rate:g}, {recipe.training.schedule.kind}",
            "precision": result.precision,
            "seed": recipe.seed,
        }
        return model_card(recipe.name, (encoder.name, encoder.revision), self.contract.sources, facts)

    def _set_aside_stale_checkpoints(self) -> None:
        """Checkpoints of another recipe are kept under another name, so that nothing is lost and nothing mixed."""
        from nearfield.files import read_json
        from nearfield.training.checkpoint import checkpoint_paths

        folder = self.run.folder / "checkpoints"
        paths = checkpoint_paths(folder)
        if not paths or not (paths[-1] / "state.json").is_file():
            return
        try:
            old = read_json(paths[-1] / "state.json", "checkpoint state").get("fingerprint")
        except BadInputError:
            return
        if isinstance(old, str) and old != self.fingerprints["train"]:
            set_aside(folder, f"checkpoints-{old[:8]}")
            logger.warning(
                "The recipe changed: training starts anew; the old checkpoints are in checkpoints-%s", old[:8]
            )

    def evaluate(self) -> dict[str, Any]:
        """Score the trained model, the base model and the baselines."""
        from nearfield.evaluation import evaluate

        evaluation = self.recipe.evaluation
        assert evaluation is not None
        models: dict[str, tuple[str | LoadedEncoder, str | None]] = {
            name: (name, None) for name in evaluation.baselines
        }
        if evaluation.before:
            models["before"] = (self._untrained(), None)
        trained: str | LoadedEncoder = str(self.run.folder / "model")
        if self.recipe.encoder.adapter is not None and self.recipe.encoder.adapter.save == "adapter":
            # The folder names its base, but not where on this machine that lies.
            trained = load_encoder(str(trained), base=self.recipe.encoder.model)
        models["after"] = (trained, f"nearfield/{self.recipe.name}")
        folders, failures = {}, {}
        for label, (model, name) in models.items():
            logger.info("Evaluating %s (%s)", label, name or model)
            result = evaluate(
                model,
                self.run.checked.suite or evaluation.suite,
                self.run.folder / "results",
                name=name,
                open_store=self._open_store,
                prompts="as-is" if label == "before" else evaluation.prompts,
            )
            folders[label] = str(result.results_dir.relative_to(self.run.folder))
            if result.failures:
                failures[label] = {task: str(reason) for task, reason in result.failures.items()}
        if failures:
            lines = [
                f"{label}: {task}: {reason}" for label, tasks in failures.items() for task, reason in tasks.items()
            ]
            raise NearfieldError("some tasks failed:\n" + "\n".join(lines), where=str(self.run.folder / "results"))
        return {"results": folders}

    def _untrained(self) -> str:
        """The base model as the recipe builds it: by name where the recipe changes nothing, else saved beside the run."""
        encoder = self.recipe.encoder
        if encoder.pooling is None and encoder.normalize is None and encoder.max_length is None:
            return encoder.model

        path = self.run.folder / "untrained"
        with atomic_path(path) as aside:
            plain = encoder.model_copy(update={"adapter": None})
            save_encoder(build_encoder(plain, "cpu").model, aside)
        return str(path)

    def compare(self) -> dict[str, Any]:
        """Intervals for each model and paired differences to the base model."""
        from nearfield.evaluation import compare

        folders = self.run.record("evaluate")["results"]
        baseline = "before" if "before" in folders else next(iter(folders))
        labels = sorted(folders, key=lambda label: (label != baseline, list(folders).index(label)))
        comparison = compare(
            [self.run.folder / folders[label] for label in labels], labels=labels, seed=self.recipe.seed
        )
        write_json(self.run.folder / "comparison.json", comparison.to_json())
        return {"baseline": baseline}

    def report(self) -> dict[str, Any]:
        """Write the HTML report."""
        from nearfield.reporting import build_report

        result = build_report(self.run.folder)
        return {"bytes": result.size}

    # Opened artifacts.

    def _store(self) -> Store:
        from nearfield.data.store import Store

        return Store.open(self.store_path)

    def _open_store(self, path: Path) -> Store:
        from nearfield.data import prepare_store
        from nearfield.data.store import Store

        return Store.open(path) if path.is_dir() else prepare_store(path, self.run.cache)

    def _tokens(self) -> TokenCache:
        from nearfield.data.tokens import TokenCache

        return TokenCache(self.tokens_path)

    def _plans(self) -> tuple[list[Plan], list[str]]:
        from nearfield.batching.plan import Plan

        paths = sorted((self.run.folder / "plan").glob("epoch-*.parquet"))
        return [Plan(path) for path in paths], [hash_file(path) for path in paths]


def _lists(column: Any) -> list[Rows]:
    """An Arrow column of integer lists as arrays, views of one."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]


def set_aside(path: Path, name: str) -> None:
    """Rename a folder to ``name`` beside it, replacing what an earlier call left there."""
    target = path.with_name(name)
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)


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
) -> RunResult:
    """Run the stages that are missing or stale, in order; once one ran, those after it are looked at anew.

    ``restart`` keeps old checkpoints aside and trains from the start; ``resume`` demands that there is one to go on from.
    ``on_stage`` is told each stage and ``done`` or ``running``.

    Under a launcher all ranks call this. Rank 0 runs the stages before training while the others wait, all train, and
    rank 0 does the rest. ``launch`` stands in for what the launcher's environment says.
    """
    launch = launch or Launch.from_environment()
    stages = Stages(run, launch)
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
        launch.prepare(prepare, verify)
        if "train" in wanted:
            rest = wanted[wanted.index("train") :]
            with launch.together() if trains else contextlib.nullcontext():
                if launch.is_main:
                    work(rest, lambda text: None)
                elif trains:
                    stages.train()
    model, report = run.folder / "model", run.folder / "report.html"
    return RunResult(run.folder, tuple(ran), model if model.is_dir() else None, report if report.is_file() else None)
