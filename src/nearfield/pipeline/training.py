"""The stage ``train``: checks before it, the training itself, and the model that it saves."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import concatenate
from nearfield.encoders.load import LoadedEncoder, build_encoder, save_encoder
from nearfield.encoders.source import folder_revision, stored_dtype, trained_similarity
from nearfield.errors import BadInputError, Notice, refuse, stop_on_blocking
from nearfield.files import atomic_path, hash_folder, read_json, write_text
from nearfield.pipeline.mining import guide_teacher
from nearfield.pipeline.planning import PlanStage, arrow_lists, plan_notices
from nearfield.pipeline.run import Job, Stage, StageStatus
from nearfield.pipeline.suites import (
    contamination_entry,
    contamination_lines,
    evaluation_during_training,
    suite_content,
    suite_notices,
    training_suite_prompts,
)

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from nearfield.batching.plan import Plan
    from nearfield.data.tokens import TokenCache
    from nearfield.encoders.packing import TokenTask
    from nearfield.objectives.batch import Objective
    from nearfield.objectives.config import ObjectiveSettings
    from nearfield.training.changing_negatives import NegativeInputs
    from nearfield.training.chunks import TeacherScores, TrainingData
    from nearfield.training.trainer import TrainingResult

logger = logging.getLogger("nearfield.pipeline")

TRAIN_VERSION = 2

# Settings that decide how a training runs but not which model comes out.
_NOT_IN_TRAINING_FINGERPRINT = {
    "device",
    "backend",
    "collective_timeout",
    "micro_batch_tokens",
    "packing",
    "compile",
    "exchange",
    "gradient_checkpointing",
    "gradient_cache",
    "graph_tokens",
    "checkpoints",
    "log_every",
    "watch_every",
    "trackers",
    # It decides what the tokens are, of which the plan is made.
    "max_length",
    # The part that decides which model comes out is added by itself.
    "evaluation",
}

HALF = ("bfloat16", "float16")


class TrainStage(Stage):
    """Trains from the newest checkpoint on and saves the model; all ranks do."""

    name = "train"

    def __init__(self, job: Job, plan: PlanStage) -> None:
        super().__init__(job)
        self.plan = plan
        self.data, self.tokens, self.mine, self.vectors = plan.data, plan.tokens, plan.mine, plan.vectors
        self.is_scored = True
        """Whether the trained model is scored on the recipe's suite."""

    def inputs(self) -> Any:
        """The plan, the encoder, the prompts, the objective, and of the training what decides which model comes out."""
        recipe, contract = self.recipe, self.job.contract
        train = {
            "version": TRAIN_VERSION,
            "plan": self.plan.fingerprint,
            "encoder": self.job.encoder_inputs,
            "prompts": contract.model_prompts,
            "objective": recipe.objective.identity(),
            "training": recipe.training.identity(exclude=_NOT_IN_TRAINING_FINGERPRINT),
        }
        if contract.default_prompt_name is not None:
            train["default_prompt"] = contract.default_prompt_name
        if recipe.mining is not None and recipe.mining.during is not None:
            train["negatives"] = recipe.mining.during.identity()
        guide = guide_teacher(recipe)
        if guide is not None:
            train["guide"] = self.vectors.fingerprints[guide]
        during = recipe.training.evaluation
        if during is not None and during.decides:
            # Whether the untrained model is scored, and what is asked of prompts, decides nothing.
            settings = during.model_dump(mode="json", exclude={"suite", "at_start", "prompts"})
            train["evaluation"] = [settings, *suite_content(during.suite, self.job.run.checked.training_suite)]
        return train

    @property
    def folder(self) -> Path:
        """The model that is saved."""
        return self.job.run.folder / "model"

    def outputs(self) -> list[Path]:
        """The model."""
        return [self.folder]

    def checkpoints(self) -> list[Path]:
        """The checkpoints of this run that are there, oldest first."""
        from nearfield.training.checkpoint import checkpoint_paths

        return checkpoint_paths(self.job.run.folder / "checkpoints")

    def status(self) -> StageStatus:
        """Whether it is done; a training that can go on is ``partial``."""
        known, record = super().status(), self.job.run.record(self.name)
        checkpoints = self.checkpoints()
        if known.state == "done" or record.get("fingerprint") == self.fingerprint or not checkpoints:
            return known
        state = "stale" if record else "partial"
        return StageStatus(self.name, state, f"newest checkpoint: {checkpoints[-1].name}", str(self.output))

    def tell(self, told: Iterable[Notice]) -> None:
        """Log what users of this training must know, once, and keep it in the manifest with all that was said meanwhile.

        Where that blocks, or the run is strict, it is an error instead, which every rank must be told of.
        """
        where = str(self.job.run.loaded.path)
        told = list(told)
        stop_on_blocking(told, where)
        if self.job.launch.is_main:
            for notice in told:
                self.job.said.say(notice)
            heard = [notice for notices in self.job.said.all().values() for notice in notices]
            self.job.run.keep_notices([*self.job.run.notices, *heard])
            told = heard
        if self.job.strict:
            refuse(told, where)

    def _tell_at_start(self, encoder: LoadedEncoder, data: TrainingData, plans: list[Plan]) -> None:
        """Before the first step, what the encoder, the data and the plan show; rank 0 alone."""
        begins = not self.checkpoints()
        if begins:
            self.job.run.keep_notices([])
        suite = training_suite_prompts(self.job, self.tokens.prompts.trained_contract)
        if self.is_scored:
            suite += suite_notices(self.job.run)
        teaches = self.teaching_notices(encoder.model, data, plans) if begins else ()
        self.tell([*encoder.notices, *plan_notices(self.plan, plans), *suite, *teaches])

    def teaching_notices(self, model: SentenceTransformer, data: TrainingData, plans: list[Plan]) -> list[Notice]:
        """Notices of data and objectives from which no encoder could learn, and of scores that this one cannot get."""
        from nearfield.training.diagnostics import teaching_notices

        store = self.data.open()
        names = {number: source.name for number, source in enumerate(store.sources)}
        width, parts = model.get_embedding_dimension(), self.recipe.training.averaged_batches
        notices = [*self._views_alike(model, data), *self._too_narrow(width)]
        if width is not None:
            notices += teaching_notices(self.objective(model), data, plans, names, width, parts)
        return notices

    def _too_narrow(self, width: int | None) -> Iterator[Notice]:
        """A notice that the trained model is to be scored on more dimensions than it has, which would end the run behind it."""
        wanted = () if self.recipe.evaluation is None or not self.is_scored else self.recipe.evaluation.dimensions
        if width is not None and max(wanted, default=0) > width:
            yield Notice(
                "dimensions-missing",
                f"evaluation.dimensions asks for {max(wanted):,} dimensions, and the model has {width:,}",
                "Leave out what is more than the model has.",
                blocks=True,
            )

    def _views_alike(self, model: SentenceTransformer, data: TrainingData) -> Iterator[Notice]:
        """A notice that the two embeddings of each text are the same one, as the model has no dropout."""
        from nearfield.encoders.trials import draws_dropout

        twice = any(reading.views == 2 and not reading.deleted for reading in data.readings.values())
        if twice and not self.recipe.training.attention_dropout and not draws_dropout(model):
            yield Notice(
                "views-alike",
                f"{self.recipe.objective.kind} tells a text's two embeddings apart by dropout, and this model has none: a text "
                "is compared with itself",
                "Set training.attention_dropout, such as 0.3.",
            )

    def run(self) -> dict[str, Any]:
        """Train and save the model."""
        from nearfield.training.engine import pick_device
        from nearfield.training.trainer import TrainingInputs, train

        store, folder = self.data.open(), self.job.run.folder
        plans, hashes = self.plan.open()
        if self.job.launch.is_main:
            self._set_aside_stale_checkpoints()
        ids = store.items["id"]
        config = self.recipe.training
        device = pick_device(config, self.job.launch)
        encoder = self.encoder(device)
        data = self.training_data(encoder)
        if self.job.launch.is_main:
            self._tell_at_start(encoder, data, plans)
        inputs = TrainingInputs(
            plans=plans,
            plan_hashes=hashes,
            data=data,
            item_ids=lambda rows: [ids[int(row)].as_py().hex() for row in rows],
            evaluate=evaluation_during_training(self.job, encoder.model, self.tokens.prompts.trained_contract),
            negatives=self._negative_inputs(data.tokens),
            about=self.recipe.model_dump(mode="json"),
            tell=self.tell,
        )
        result = train(
            config,
            self.objective(encoder.model),
            encoder.model,
            inputs,
            folder,
            seed=self.recipe.seed,
            fingerprint=self.fingerprint,
            launch=self.job.launch,
        )
        if not self.job.launch.is_main:
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
            "contamination": contamination_entry(self.data),
            "lengths": self._lengths(encoder.model),
            "checkpoint": result.checkpoint.name,
            "model": folder_revision(self.folder),
            **({} if result.best is None else {"best": {"step": result.best[0], "score": result.best[1]}}),
        }

    def _lengths(self, model: SentenceTransformer) -> dict[str, Any]:
        """How much of a text the training and the model read, and what the training cut off."""
        from nearfield.encoders.packing import longest_input

        tokens = self.tokens.open()
        return {"training": tokens.max_length, "model": longest_input(model), **tokens.cut.to_json()}

    def training_data(self, encoder: LoadedEncoder) -> TrainingData:
        """The items and examples of the store, as this encoder and the recipe's objective read them."""
        from nearfield.training.chunks import TrainingData

        guide = self.vectors.guide()
        named = self.recipe.objective.readings(self._kinds())
        readings = {number: named[s.name] for number, s in enumerate(self.data.open().sources) if s.name in named}
        return TrainingData(
            self.tokens.open(),
            known_positives=self.data.open().known_positives().__getitem__,
            guide=None if guide is None else guide.of,
            weights=self.data.open().weights(),
            teacher_scores=self._teacher_scores(),
            readings=readings,
            token_task=self._token_task(encoder),
            images=self.data.images(),
        )

    def _negative_inputs(self, tokens: TokenCache) -> NegativeInputs | None:
        """The mined candidates for negatives that change during training, and how to mine again; None where the plan's
        negatives stay."""
        from nearfield.training.changing_negatives import MinedCandidates, NegativeInputs, Remine

        recipe, store = self.recipe, self.data.open()
        if recipe.mining is None or recipe.mining.during is None:
            return None
        by_source = self.plan.negatives(store) or {}
        examples = np.concatenate([store.select(name, recipe.split) for name in by_source])
        lists = concatenate([negatives.items for negatives in by_source.values()])
        order = np.argsort(examples, kind="stable")
        remine = None
        if recipe.mining.during.mines_anew:
            prompts = {}
            for name in by_source:
                texts = self.job.contract.sources[name]
                prompts[store.source_number(name)] = (tokens.number(texts["query"]), tokens.number(texts["document"]))
            remine = Remine(self.mine.pools(store), prompts, recipe.mining)
        batches = recipe.batches
        return NegativeInputs(
            recipe.mining.during,
            MinedCandidates(examples[order], lists.take(order)),
            wanted=batches.negatives,
            distinct=batches.duplicates == "forbid",
            avoid_positives=batches.known_positives == "forbid",
            remine=remine,
        )

    def _teacher_scores(self) -> TeacherScores | None:
        """The scores of the miner's teacher, where the objective learns from them."""
        from nearfield.training.chunks import TeacherScores

        if not self.recipe.objective.needs_teacher_scores:
            return None
        mined = self.mine.open()
        return TeacherScores(
            mined.examples,
            arrow_lists(self.data.open().examples.take(mined.examples)["positives"]),
            mined.positive_scores.astype(np.float64),
            mined.lists,
            mined.scores.astype(np.float64),
        )

    def _kinds(self) -> dict[str, str]:
        """Source -> the kind of its examples, of the sources that are trained on."""
        return {source.name: source.examples.form for source in self.job.run.checked.sources}

    def objective(self, model: SentenceTransformer) -> Objective:
        """The objective of the recipe, which may name sources, for this encoder."""
        from nearfield.encoders.packing import vocabulary_size
        from nearfield.objectives.config import Surroundings

        guide = self.vectors.guide()
        labels = self.plan.open()[0][0].metadata.get("labels", ())
        around = Surroundings(
            kinds=self._kinds(),
            width=model.get_embedding_dimension(),
            guide_width=None if guide is None else guide.dimension,
            labels=len(labels),
            label_names=[(source, label) for source, label in labels],
            vocabulary=vocabulary_size(model),
        )
        return self.recipe.objective.build([source.name for source in self.data.open().sources], around)

    def _token_task(self, encoder: LoadedEncoder) -> TokenTask | None:
        """The task that masks tokens and predicts them, where the recipe's objective has one."""
        make = self.recipe.objective.token_task
        return None if make is None else make(encoder.model, encoder.path, self.recipe.seed)

    def encoder(self, device: torch.device) -> LoadedEncoder:
        """The encoder of the recipe in the precision that weights have in training, the same on all ranks."""
        from nearfield.training.engine import pick_precision

        recipe = self.recipe
        pure = pick_precision(recipe.training, device) == "bf16-pure"
        quantized = recipe.encoder.adapter is not None and recipe.encoder.adapter.base_bits != "none"
        loaded = build_encoder(
            recipe.encoder,
            str(device) if quantized else "cpu",
            dtype="bfloat16" if pure else "float32",
            seed=recipe.seed,
            prompts=self.tokens.prompts.all(),
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

        encoder = self.encoder(device)
        module = EmbeddingModule(encoder.model, self.objective(encoder.model), self._token_task(encoder))
        moved = load_into(module, open_checkpoint(result.checkpoint))
        if moved < UNMOVED and result.steps:
            self.tell([_unmoved(moved)])
        self.tokens.prompts.trained_contract.apply(encoder.model)
        with atomic_path(self.folder) as aside:
            adapter = self.recipe.encoder.adapter
            dtype = self._stored_dtype(encoder, device)
            saved = adapter.save if adapter else "merged"
            save_encoder(encoder.model, aside, adapter=saved, dtype=dtype, place=self.folder)
            self.tokens.prompts.trained_contract.save(aside)
            write_text(aside / "README.md", self._card(encoder, result))

    def _card(self, encoder: LoadedEncoder, result: TrainingResult) -> str:
        from nearfield.encoders.card import model_card, origin_of
        from nearfield.encoders.load import shipped_files

        recipe = self.recipe
        step, during = int(result.checkpoint.name.removeprefix("step-")), recipe.training.evaluation
        best = f", the model of step {step} scored best ({during.metric})" if during and during.keep_best else ""
        facts = {
            "data": f"{self.job.run.checked.data.name} ({', '.join(self.job.contract.sources)}; split {recipe.split})",
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
            self.tokens.prompts.trained_contract,
            facts,
            contamination_lines(self.data),
            shipped_files(encoder.model),
            [notice.what for notice in self.job.run.notices],
        )

    def _say_lengths(self, model: SentenceTransformer) -> str:
        from nearfield.encoders.packing import longest_input

        tokens, limit = self.tokens.open(), longest_input(model)
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
            self.job.launch,
            adapter=self.recipe.encoder.adapter is not None,
            token_task=self.recipe.objective.token_task is not None,
        )

    def check_ring(self) -> None:
        """Refuse negatives that look at whole batches where parts of a batch are passed round."""
        mining = self.recipe.mining
        whole = mining is not None and mining.during is not None and mining.during.whole_batches
        if whole and self.job.launch.world_size > 1 and self.recipe.training.exchange == "ring":
            raise BadInputError(
                "dynamic negatives look at the embeddings of whole batches, which a ring never brings together",
                where="training.exchange",
                hint="Use training.exchange=gather.",
            )

    def check_resumable(self) -> None:
        """Refuse to go on from nothing."""
        if not self.is_done and not self.checkpoints():
            raise BadInputError(
                "there is no checkpoint to resume from",
                where=str(self.job.run.folder / "checkpoints"),
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
                f"nearfield train {self.job.run.loaded.path} --until plan --run-folder {self.job.run.folder}",
            )

    def _artifact_paths(self) -> dict[str, Path]:
        paths = {"data": self.data.output, "tokens": self.tokens.output, "batches": self.plan.folder}
        if self.recipe.mining is not None and self.recipe.mining.during is not None:
            paths["negatives"] = self.mine.output
        guide = guide_teacher(self.recipe)
        if guide is not None:
            paths["guide's vectors"] = self.vectors.path(guide)
        return paths

    def _set_aside_stale_checkpoints(self) -> None:
        """Checkpoints of another recipe are kept under another name, so that nothing is lost and nothing mixed."""
        folder, paths = self.job.run.folder / "checkpoints", self.checkpoints()
        if not paths or not (paths[-1] / "state.json").is_file():
            return
        try:
            state = read_json(paths[-1] / "state.json", "checkpoint state")
        except BadInputError:
            return
        old = state.get("fingerprint") if isinstance(state, dict) else None
        if isinstance(old, str) and old != self.fingerprint:
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


def hold_similarity(loaded: LoadedEncoder, objective: ObjectiveSettings) -> LoadedEncoder:
    """The encoder, which compares its vectors as the objective does: by what its base says where the objective knows it.

    Where that differs from what the base says, or several are trained, a notice tells.
    """
    model, comparisons = loaded.model, objective.comparisons
    stated = str(model.similarity_fn_name)
    model.similarity_fn_name = trained_similarity(comparisons, stated)
    notices = [*_differs(comparisons, stated, str(model.similarity_fn_name)), *_scale(model, objective)]
    return replace(loaded, notices=(*loaded.notices, *notices)) if notices else loaded


def _differs(comparisons: Collection[str], stated: str, saved: str) -> list[Notice]:
    if not comparisons or set(comparisons) == {stated}:
        return []
    trained = " and ".join(sorted(comparisons))
    return [
        Notice(
            "similarity",
            f"the base compares its vectors by {stated}, and the objective by {trained}: the trained model says {saved}",
            "Set objective.similarity (of triplets objective.distance), or name an objective that knows the base's.",
        )
    ]


def _scale(model: SentenceTransformer, objective: ObjectiveSettings) -> list[Notice]:
    from sentence_transformers.sentence_transformer.modules import Normalize

    temperature = getattr(objective, "temperature", None)
    unit = isinstance(model[-1], Normalize) and model.truncate_dim is None
    if "dot" not in objective.comparisons or unit or temperature is None or temperature >= 1:
        return []
    return [
        Notice(
            "dot-products",
            f"similarities are dot products of vectors of any length, divided by a temperature of {temperature:g}, which is made "
            "for cosines: a softmax of them may be all 0 and 1",
            "Set objective.temperature: 1, as is common for dot products.",
            minor=True,
        )
    ]


def kept_dtype(loaded: LoadedEncoder) -> str | None:
    """The half-precision type that the base's weights are stored in, which the trained model's are stored in too; None for
    others."""
    transformer: Any = getattr(loaded.model[0], "auto_model", None)
    if transformer is None or loaded.path.endswith(".gguf"):
        return None
    folder = Path(getattr(transformer, "name_or_path", "") or loaded.path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        config_file = cached_file(str(folder), "config.json", revision=loaded.revision, local_files_only=True)
        folder = Path(str(config_file)).parent
    stored = stored_dtype(folder)
    return stored if stored in HALF else None


UNMOVED = 1e-7
"""A training that moves no weight by more than this share of the largest is lost in the rounding of float32."""


def _unmoved(moved: float) -> Notice:
    return Notice(
        "weights-unchanged",
        f"no weight moved by more than {moved:.1g} of the largest: nothing was learnt",
        "Raise the learning rate, or train with training.precision: bf16-mixed or fp32: in bf16-pure small steps are rounded "
        "away.",
    )


def say_rounding(dtype: str | None) -> list[Notice]:
    """That weights are trained in another type than they are stored in."""
    if dtype is None:
        return []
    return [
        Notice(
            "stored-dtype",
            f"the base is stored in {dtype}, and so is the trained model: the weights that training holds in float32 are rounded "
            "when they are saved",
            minor=True,
        )
    ]
