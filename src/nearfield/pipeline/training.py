"""The stage that trains, what must hold before it, and the model that it leaves."""

from __future__ import annotations

import logging
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.encoders.build import LoadedEncoder, build_encoder, folder_revision, save_encoder
from nearfield.encoders.static import vocabulary_size
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_folder, write_text
from nearfield.notices import Notice, refuse, stop_on_blocking
from nearfield.pipeline.changing import ChangingStages
from nearfield.pipeline.decontamination import contamination_entry, contamination_lines
from nearfield.pipeline.during import evaluation_during_training
from nearfield.pipeline.holding import hold_similarity, kept_dtype, say_rounding
from nearfield.pipeline.teaching import guide_teacher

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from sentence_transformers import SentenceTransformer

    from nearfield.batching.plan import Plan
    from nearfield.encoders.token_task import TokenTask
    from nearfield.objectives.objective import Objective
    from nearfield.training.chunks import Feed
    from nearfield.training.trainer import TrainingResult

logger = logging.getLogger("nearfield.pipeline")


class TrainingStage(ChangingStages):
    """What all ranks do."""

    strict: bool = False
    """Whether a notice that is not minor ends the run."""
    scores: bool = True
    """Whether the trained model is scored on the recipe's suite."""

    def tell(self, found: Iterable[Notice]) -> None:
        """Log what users of this training must know, once, and keep it in the manifest with all that was said meanwhile.

        Where that blocks, or the run is strict, it is an error instead, which every rank must be told of.
        """
        where = str(self.run.loaded.path)
        found = list(found)
        stop_on_blocking(found, where)
        if self.launch.is_main:
            for notice in found:
                self.said.say(notice)
            heard = [notice for notices in self.said.all().values() for notice in notices]
            self.run.keep_notices([*self.run.notices, *heard])
            found = heard
        if self.strict:
            refuse(found, where)

    def _tell_at_start(self, encoder: LoadedEncoder, feed: Feed, plans: list[Plan]) -> None:
        """Before the first step, what the encoder, the data and the plan show; rank 0 alone."""
        from nearfield.pipeline.notices import plan_notices, suite_notices
        from nearfield.training.checkpoint import checkpoint_paths

        begins = not checkpoint_paths(self.run.folder / "checkpoints")
        if begins:
            self.run.keep_notices([])
        suite = suite_notices(self) if self.scores else ()
        teaches = self.teaching_notices(encoder.model, feed, plans) if begins else ()
        self.tell([*encoder.notices, *plan_notices(self, plans), *suite, *teaches])

    def teaching_notices(self, model: SentenceTransformer, feed: Feed, plans: list[Plan]) -> list[Notice]:
        """What the data and the objective could teach no encoder."""
        from nearfield.training.diagnostics import teaching_notices

        store = self._store()
        names = {number: source.name for number, source in enumerate(store.sources)}
        known, width = store.known_positives().of, model.get_embedding_dimension()
        return [] if width is None else [*teaching_notices(self._objective(model), feed, plans, known, names, width)]

    def train(self) -> dict[str, Any]:
        """Train from the newest checkpoint on and save the model."""
        from nearfield.training.engine import pick_device
        from nearfield.training.trainer import TrainingInputs, train

        store, folder = self._store(), self.run.folder
        plans, hashes = self._plans()
        if self.launch.is_main:
            self._set_aside_stale_checkpoints()
        known = store.known_positives()
        ids = store.items["id"]
        config = self.recipe.training
        device = pick_device(config, self.launch)
        encoder = self._encoder(device)
        feed = self._feed(encoder)
        if self.launch.is_main:
            self._tell_at_start(encoder, feed, plans)
        inputs = TrainingInputs(
            plans=plans,
            plan_hashes=hashes,
            feed=feed,
            known_positives=known.of,
            item_ids=lambda rows: [ids[int(row)].as_py().hex() for row in rows],
            evaluate=evaluation_during_training(self, encoder.model, self._open_store),
            negatives=self.negative_inputs(store, feed.tokens),
            about=self.recipe.model_dump(mode="json"),
            tell=self.tell,
        )
        result = train(
            config,
            self._objective(encoder.model),
            encoder.model,
            inputs,
            folder,
            seed=self.recipe.seed,
            fingerprint=self.fingerprints["train"],
            launch=self.launch,
        )
        if not self.launch.is_main:
            return {}
        self.tell(())
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
            "contamination": contamination_entry(self),
            "lengths": self._lengths(encoder.model),
            "checkpoint": result.checkpoint.name,
            "model": folder_revision(self.run.folder / "model"),
            **({} if result.best is None else {"best": {"step": result.best[0], "score": result.best[1]}}),
        }

    def _lengths(self, model: SentenceTransformer) -> dict[str, Any]:
        """How much of a text the training and the model read, and what the training cut off."""
        from nearfield.encoders.limits import longest_input

        tokens = self._tokens()
        return {"training": tokens.max_length, "model": longest_input(model), **tokens.cut.to_json()}

    def _feed(self, encoder: LoadedEncoder) -> Feed:
        """What the items and examples of the store are to this encoder and the recipe's objective."""
        from nearfield.training.chunks import Feed

        named = self.recipe.objective.readings(self._kinds())
        readings = {number: named[s.name] for number, s in enumerate(self._store().sources) if s.name in named}
        return Feed(
            self._tokens(),
            guide=self.guide_vectors(),
            weights=self._store().weights(),
            teacher_scores=self.teacher_scores(),
            readings=readings,
            token_task=self._token_task(encoder),
            pictures=self.pictures(),
        )

    def _kinds(self) -> dict[str, str]:
        """Source -> the kind of its examples, of the sources that are trained on."""
        return {source.name: source.examples.kind for source in self.run.checked.sources}

    def _objective(self, model: SentenceTransformer) -> Objective:
        """The objective of the recipe, which may name sources, for this encoder."""
        from nearfield.objectives.config import Surroundings

        labels = self._plans()[0][0].metadata.get("labels", ())
        around = Surroundings(
            kinds=self._kinds(),
            width=model.get_embedding_dimension(),
            guide_width=self.guide_width(),
            labels=len(labels),
            label_names=[(source, label) for source, label in labels],
            vocabulary=vocabulary_size(model),
        )
        return self.recipe.objective.build([source.name for source in self._store().sources], around)

    def _token_task(self, encoder: LoadedEncoder) -> TokenTask | None:
        """What hides tokens and tells them, where the objective of the recipe asks for it."""
        from nearfield.encoders.token_task import TokenTask

        config = self.recipe.objective.token_task
        return None if config is None else TokenTask(encoder.model, config, encoder.path, self.recipe.seed)

    def _encoder(self, device: torch.device) -> LoadedEncoder:
        """The encoder of the recipe in the precision that weights have in training, the same on all ranks."""
        from nearfield.training.engine import pick_precision

        recipe = self.recipe
        pure = pick_precision(recipe.training, device) == "bf16-pure"
        quantized = recipe.encoder.adapter is not None and recipe.encoder.adapter.quantize != "none"
        loaded = build_encoder(
            recipe.encoder,
            str(device) if quantized else "cpu",
            dtype="bfloat16" if pure else "float32",
            seed=recipe.seed,
            prompts=self.all_prompts(self._store()),
        )
        loaded = hold_similarity(loaded, recipe.objective)
        return replace(loaded, notices=(*loaded.notices, *say_rounding(self._stored_dtype(loaded, device))))

    def _stored_dtype(self, loaded: LoadedEncoder, device: torch.device) -> str | None:
        """The type that the saved weights get, where it is not that of the training: the base's."""
        from nearfield.training.engine import pick_precision

        encoder = self.recipe.encoder
        alone = encoder.adapter is not None and encoder.adapter.save == "adapter"
        if alone or encoder.fresh is not None or pick_precision(self.recipe.training, device) == "bf16-pure":
            return None
        return kept_dtype(loaded)

    def _export(self, result: TrainingResult, device: torch.device) -> None:
        """Save the model of the run's last checkpoint: complete and of one format, whatever it was trained on."""
        from nearfield.training.checkpoint import load_into, open_checkpoint
        from nearfield.training.engine import EmbeddingModule

        encoder = self._encoder(device)
        module = EmbeddingModule(encoder.model, self._objective(encoder.model), self._token_task(encoder))
        load_into(module, open_checkpoint(result.checkpoint))
        self.trained_contract.apply(encoder.model)
        with atomic_path(self.run.folder / "model") as aside:
            adapter = self.recipe.encoder.adapter
            dtype = self._stored_dtype(encoder, device)
            save_encoder(encoder.model, aside, adapter=adapter.save if adapter else "merged", dtype=dtype)
            self.trained_contract.save(aside)
            write_text(aside / "README.md", self._card(encoder, result))

    def _card(self, encoder: LoadedEncoder, result: TrainingResult) -> str:
        from nearfield.encoders.card import model_card, origin_of
        from nearfield.encoders.heads import shipped_files

        recipe = self.recipe
        kept, during = int(result.checkpoint.name.removeprefix("step-")), recipe.training.evaluation
        best = f", the model of step {kept} scored best ({during.metric})" if during and during.keep_best else ""
        facts = {
            "data": f"{self.run.checked.data.name} ({', '.join(self.contract.sources)}; split {recipe.split})",
            "objective": recipe.objective.summary,
            "batches": f"{recipe.batches.kind}, {recipe.batches.batch_size} examples",
            "steps": f"{result.steps}{best}",
            "learning rate": f"{recipe.training.learning_rate:g}, {recipe.training.schedule.kind}",
            "precision": result.precision,
            "seed": recipe.seed,
            "length": self._say_lengths(encoder.model),
        }
        return model_card(
            recipe.name,
            origin_of(recipe.encoder, (encoder.name, encoder.revision)),
            self.trained_contract,
            facts,
            contamination_lines(self),
            shipped_files(encoder.model),
            [notice.what for notice in self.run.notices],
        )

    def _say_lengths(self, model: SentenceTransformer) -> str:
        from nearfield.encoders.limits import longest_input

        tokens, limit = self._tokens(), longest_input(model)
        whole = "all tokens" if limit is None else f"at most {limit:,} tokens"
        if tokens.max_length is None or not tokens.cut.cut:
            read = "nothing was cut in training"
        else:
            read = f"in training {tokens.cut.say(tokens.max_length)}"
        return f"the model reads {whole} of a text; {read}"

    def check_can_train(self) -> None:
        """Refuse what this rank could never train with its launcher, devices and libraries."""
        from nearfield.training.engine import check_can_train

        check_can_train(
            self.recipe.training,
            self.launch,
            adapter=self.recipe.encoder.adapter is not None,
            token_task=self.recipe.objective.token_task is not None,
        )

    def check_suite(self) -> None:
        """Refuse, before the training is paid for, to score on data that is not there."""
        from nearfield.pipeline.notices import suite_notices

        if self.scores:
            stop_on_blocking(suite_notices(self))

    def check_ring(self) -> None:
        """Refuse negatives that look at whole batches where parts of a batch are passed round."""
        mining = self.recipe.mining
        dynamic = mining is not None and mining.during is not None and mining.during.kind == "dynamic"
        if dynamic and self.launch.world_size > 1 and self.recipe.training.exchange == "ring":
            raise BadInputError(
                "dynamic negatives look at the embeddings of whole batches, which a ring never brings together",
                where="training.exchange",
                hint="Use training.exchange=gather.",
            )

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
        paths = {"data": self.store_path, "tokens": self.tokens_path, "batches": self.run.folder / "plan"}
        if self.recipe.mining is not None and self.recipe.mining.during is not None:
            paths["negatives"] = self.negatives_path
        guide = guide_teacher(self.recipe)
        if guide is not None:
            paths["guide's vectors"] = self.vectors_path(guide)
        return paths

    def _set_aside_stale_checkpoints(self) -> None:
        """Checkpoints of another recipe are kept under another name, so that nothing is lost and nothing mixed."""
        from nearfield.files import read_json
        from nearfield.training.checkpoint import checkpoint_paths

        folder = self.run.folder / "checkpoints"
        paths = checkpoint_paths(folder)
        if not paths or not (paths[-1] / "state.json").is_file():
            return
        try:
            state = read_json(paths[-1] / "state.json", "checkpoint state")
        except BadInputError:
            return
        old = state.get("fingerprint") if isinstance(state, dict) else None
        if isinstance(old, str) and old != self.fingerprints["train"]:
            set_aside(folder, f"checkpoints-{old[:8]}")
            logger.warning(
                "The recipe changed: training starts anew; the old checkpoints are in checkpoints-%s", old[:8]
            )


def set_aside(path: Path, name: str) -> None:
    """Rename a folder to ``name`` beside it, replacing what an earlier call left there."""
    target = path.with_name(name)
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)
