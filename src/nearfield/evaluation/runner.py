"""Score one model on a suite, and file the results as mteb does, with the scores of single units beside them.

A model in training is scored by the same tasks over a function that encodes (:class:`DuringTraining`); nothing is written.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.results import TaskResult
from numpy.typing import NDArray

from nearfield.arrays import Mask
from nearfield.encoders import LoadedEncoder, load_encoder
from nearfield.encoders.encode import Encoder, KeptVectors, Workers
from nearfield.encoders.identity import model_fingerprint
from nearfield.encoders.packing import longest_input
from nearfield.errors import BadInputError, CutTexts, NearfieldError, Notice, Said, from_file, listening, refuse, say
from nearfield.evaluation.config import AXES, Axes, OpenStore, SuiteConfig, open_suite
from nearfield.evaluation.encoder import (
    QUANTIZATIONS,
    TaskEncoder,
    TrainedPrompts,
    folder_notices,
    prompt_notices,
    roles_of,
)
from nearfield.evaluation.results import BASELINES, ResultFolder
from nearfield.evaluation.scoring import Recorder, mean_over_splits, score_task, scores_by_split
from nearfield.evaluation.tasks import SuiteTask, parts_of
from nearfield.files import fingerprint
from nearfield.provenance import versions_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.arrays import Rows


logger = logging.getLogger("nearfield.evaluation")

VERSION = 5
"""Raised when the same model and data would give other results or other files."""
SCORING_PACKAGES = ("mteb", "scikit-learn", "scipy", "numpy", "pytrec-eval-terrier", "bm25s", "PyStemmer")
"""Packages whose versions change what is made of vectors, beside those that change the vectors."""
PROMPT_MODES = ("contract", "as-is")

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvaluationResult:
    """The results of an evaluation.

    ``results_dir`` is the folder ``<org>__<model>/<revision>``; ``scores`` is task -> subset -> main score (mean over
    the task's splits); ``failures`` is task -> what went wrong; ``not_applicable`` is task -> why the model cannot run
    it; ``details`` is task -> what is known of a local task (sizes, clusters); ``seconds`` is task -> time it took now;
    ``notices`` is task -> what a reader of its score must know, and ``""`` -> what holds for all of them.
    """

    results_dir: Path
    model: str
    revision: str
    scores: Scores
    failures: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    notices: dict[str, tuple[Notice, ...]] = field(default_factory=dict)


def evaluate(
    model: str | LoadedEncoder | ScoredModel,
    suite: SuiteConfig | Path,
    out: Path,
    *,
    tasks: Sequence[str] | None = None,
    prompts: str = "contract",
    overwrite: bool = False,
    strict: bool = False,
    open_store: OpenStore | None = None,
) -> EvaluationResult:
    """Score a model on a suite and write the results under ``out``.

    ``model`` is a folder, a hub name, a loaded encoder, ``bm25`` or ``random``, or what :func:`open_model` made of one (with
    another name, kept or cut vectors); ``suite`` a config, a suite YAML or a folder of tasks; ``tasks`` keeps the named
    ones. ``prompts`` is ``contract`` (stop where the model was not trained with the prompts it would get) or ``as-is``.
    Notices are logged and filed with the scores; ``strict`` makes them errors: those of the model before any task runs,
    those of tasks when all are filed. ``open_store`` turns the path of a data recipe (or store) into an open store.

    A task that fails is recorded in ``failures`` and does not stop the others. Raises :class:`BadInputError` for a
    model or suite that cannot be used, before any task runs.
    """
    if prompts not in PROMPT_MODES:
        raise BadInputError(
            f"unknown prompt mode {prompts!r}", where="prompts", hint=f"Modes: {', '.join(PROMPT_MODES)}."
        )
    with listening() as said:
        suite_tasks = open_suite(suite, only=tasks, open_store=open_store)
        scored = model if isinstance(model, ScoredModel) else open_model(model)
        for notice in scored.notices:
            said.say(notice)
        if strict:
            refuse(said.of(), where=scored.name)
        result = _score_tasks(scored, suite_tasks, out, prompts, overwrite, said)
    if strict:
        refuse([notice for notices in result.notices.values() for notice in notices], where=str(result.results_dir))
    return result


def _score_tasks(
    scored: ScoredModel, suite_tasks: Sequence[SuiteTask], out: Path, prompts: str, overwrite: bool, said: Said
) -> EvaluationResult:
    """Score an open model on open tasks, one after the other, and write the manifest."""
    applicable, not_applicable = [], {}
    for suite_task in suite_tasks:
        reason = _not_applicable(scored, suite_task.task)
        if reason is None:
            applicable.append(suite_task)
        else:
            not_applicable[suite_task.name] = reason
            logger.warning("%s is not applicable: %s", suite_task.name, reason)
    notes = [scored.note] if scored.note else []
    if scored.encoder is not None and scored.folder is not None:
        parts = [part for t in applicable for part in parts_of(t.task)]
        by_task = folder_notices(scored.encoder, scored.folder, parts, check=prompts == "contract")
        for name, notices in by_task.items():
            for notice in notices:
                said.say(notice, name)

    folder = ResultFolder(out, scored.wrapper.mteb_model_meta)
    run = _Run(scored, folder, overwrite, said)
    started = time.monotonic()
    for number, suite_task in enumerate(applicable, start=1):
        logger.info("task %d of %d: %s%s", number, len(applicable), suite_task.name, _left(run, started, applicable))
        with said.about(suite_task.name):
            run.task(suite_task)
    folder.add_to_manifest(run.facts, run.failures, said.all(), {"prompts": prompts, **_about(scored)})
    return EvaluationResult(
        results_dir=folder.path,
        model=scored.name,
        revision=scored.revision,
        scores=run.scores,
        failures=run.failures,
        not_applicable=not_applicable,
        notes=tuple(notes),
        details=run.details,
        reused=tuple(run.reused),
        seconds=run.seconds,
        notices=said.all(),
    )


def _about(scored: ScoredModel) -> dict[str, Any]:
    """The manifest's entry on how an embedding model encoded."""
    encoder = scored.encoder
    if encoder is None:
        return {}
    parameter = next(encoder.model.parameters(), None)
    return {
        "device": str(encoder.model.device),
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "batch_tokens": encoder.encoder.chunk_tokens,
        "max_length": longest_input(encoder.model),
        "dimensions": encoder.dimensions,
        "quantize": encoder.quantize,
    }


def _left(run: _Run, started: float, tasks: Sequence[SuiteTask]) -> str:
    """How long the rest will take if its tasks are like those that were scored now."""
    if not run.seconds:
        return ""
    rest = sum(task.name not in run.scores and task.name not in run.failures for task in tasks)
    return f" (about {(time.monotonic() - started) / len(run.seconds) * rest:.0f} s left for the suite)"


class _Run:
    """The tasks of one evaluation, one after the other."""

    def __init__(self, scored: ScoredModel, folder: ResultFolder, overwrite: bool, said: Said) -> None:
        self.scored, self.folder, self.overwrite, self.said = scored, folder, overwrite, said
        self.scores: Scores = {}
        self.failures: dict[str, str] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.reused: list[str] = []
        self.seconds: dict[str, float] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        """The manifest's entry of each task that was scored now."""
        self._versions = versions_of(SCORING_PACKAGES)

    def task(self, suite_task: SuiteTask) -> None:
        """Score a task, or take its scores from the results folder."""
        if isinstance(suite_task.task, AbsTaskAggregate):
            self._aggregate(suite_task)
            return
        started = time.monotonic()
        mark = self._fingerprint(suite_task)
        known = None if self.overwrite else self.folder.reusable(suite_task.name, mark, self._versions)
        if known is not None:
            self.scores[suite_task.name] = mean_over_splits(known["main_scores"])
            self.details[suite_task.name] = known["details"]
            self._keep_notices(suite_task.name, known)
            self.reused.append(suite_task.name)
            logger.info("%s: present, not scored again", suite_task.name)
            return
        try:
            self._score(suite_task, mark)
        except NearfieldError as error:
            self.failures[suite_task.name] = str(error)
        except Exception as error:  # a broken task must not take the others with it
            logger.debug("the task %s failed", suite_task.name, exc_info=True)
            self.failures[suite_task.name] = _explain(suite_task, error)
        finally:
            self.seconds[suite_task.name] = time.monotonic() - started
            if self.scored.encoder is not None:
                self.scored.encoder.forget()
                if self.scored.encoder.encoder.kept is not None:
                    self.scored.encoder.encoder.kept.close()
            if suite_task.task.data_loaded:
                suite_task.task.unload_data()
        if suite_task.name in self.failures:
            logger.error("%s failed: %s", suite_task.name, self.failures[suite_task.name])

    def _aggregate(self, suite_task: SuiteTask) -> None:
        task = suite_task.task
        names = [str(part.metadata.name) for part in task.metadata.tasks]
        for part in task.metadata.tasks:
            with self.said.about(str(part.metadata.name)):
                self.task(SuiteTask(part))
        broken = [name for name in names if name not in self.scores]
        if broken:
            self.failures[suite_task.name] = f"its parts failed: {', '.join(broken)}"
            return
        result = task.combine_task_results([self.folder.result(name) for name in names])
        for notice in dict.fromkeys(notice for name in names for notice in self.said.of(name)):
            self.said.say(notice, suite_task.name)
        self.folder.file(result, self._notices(suite_task.name), None, {})
        self.scores[suite_task.name] = mean_over_splits(scores_by_split(result))

    def _fingerprint(self, suite_task: SuiteTask) -> str:
        """The inputs that a result must have been made of to be reused; taken before the data are loaded."""
        task = suite_task.task
        parts = [VERSION, task.metadata.name, task.metadata.type, task.metadata.main_score, task.metadata.revision]
        clusters = [[*key, sorted(of.items())] for key, of in sorted(suite_task.clusters.items())]
        parts += [task.metadata.dataset.get("path"), list(task.eval_splits), list(task.hf_subsets), _settings_of(task)]
        return fingerprint(
            [*parts, self._prompts(task), clusters, suite_task.details, self.scored.computes, self._versions]
        )

    def _notices(self, task: str) -> list[Notice]:
        """Notices for readers of this task's score: of the model, and of the task."""
        return list(dict.fromkeys([*self.said.of(), *self.said.of(task)]))

    def _keep_notices(self, task: str, metadata: Mapping[str, Any]) -> None:
        """Say again what was filed with a present score, and file with it what is said of the model for the first time."""
        filed = from_file(metadata.get("notices"))
        for notice in filed:
            if notice not in self.said.of():
                self.said.say(notice, task)
        if set(self._notices(task)) - set(filed):
            self.folder.add_notices(task, metadata, self._notices(task))

    def _say_of_texts(self, encoder: TaskEncoder, task: str) -> None:
        """Notices about the texts of the task that was scored now: those that were cut, those without a direction."""
        limit = longest_input(encoder.model)
        cut = encoder.encoder.cut
        if limit is not None and cut.cut:
            self.said.say(Notice("texts-cut", cut.say(limit)), task)
        for notice in encoder.zeros.notices():
            self.said.say(notice, task)

    def _score(self, suite_task: SuiteTask, mark: str) -> None:
        task, encoder, name = suite_task.task, self.scored.encoder, suite_task.name
        made = None if encoder is None else encoder.encoder
        before = (0, 0) if made is None else (made.encoded, made.reused)
        if encoder is not None:
            encoder.encoder.cut = CutTexts()
        recorder = Recorder(suite_task)
        # bm25s draws progress bars that cannot be turned off through mteb.
        quiet = contextlib.redirect_stderr(io.StringIO()) if self.scored.searches_only else contextlib.nullcontext()
        with quiet, recorder.listening():
            result = score_task(self.scored.wrapper, task, self.folder.path)
        recorder.finish(result.scores)
        if encoder is not None:
            self._say_of_texts(encoder, name)
            if encoder.same_tokens:
                logger.info(
                    "%s: %d texts have the tokens, and so the vector, of another text", name, encoder.same_tokens
                )
        main_scores = scores_by_split(result)
        metadata = {
            "version": VERSION,
            "fingerprint": mark,
            "task": name,
            "task_type": task.metadata.type,
            "main_score": task.metadata.main_score,
            "main_scores": main_scores,
            "dataset_revision": task.metadata.revision,
            "model": self.scored.name,
            "revision": self.scored.revision,
            "mteb_version": result.mteb_version,
            "versions": self._versions,
            "details": suite_task.details,
        }
        self.folder.file(result, self._notices(name), recorder.record, metadata)
        self.scores[name], self.details[name] = mean_over_splits(main_scores), suite_task.details
        self.facts[name] = {
            "data_revision": task.metadata.revision,
            "mteb": result.mteb_version,
            "prompts": self._prompts(task),
            "texts_encoded": None if made is None else made.encoded - before[0],
            "texts_from_cache": None if made is None else made.reused - before[1],
            "texts_cut": None if made is None else made.cut.to_json(),
            "texts_of_same_tokens": None if encoder is None else encoder.same_tokens,
            "tied_predictions": recorder.tied,
            "seconds": round(result.evaluation_time or 0.0, 3),
        }

    def _prompts(self, task: Any) -> dict[str, str]:
        """The prompts that the task puts before texts, by role."""
        encoder = self.scored.encoder
        return {} if encoder is None else {str(r): encoder.prompt_for(task.metadata, r) for r in roles_of(task)}


def _settings_of(task: Any) -> dict[str, Any]:
    """The plain settings of a task, of its class or its own: how many documents it takes, how often it draws, its seed."""
    held: dict[str, Any] = {}
    for each in [*map(vars, reversed(type(task).__mro__)), vars(task)]:
        held |= {key: value for key, value in each.items() if not key.startswith("_")}
    plain = (bool, int, float, str, tuple)
    return {key: value for key, value in sorted(held.items()) if isinstance(value, plain) and key != "data_loaded"}


def _not_applicable(scored: ScoredModel, task: Any) -> str | None:
    reasons = [_part_not_applicable(scored, part) for part in parts_of(task)]
    return next((reason for reason in reasons if reason is not None), None)


def _part_not_applicable(scored: ScoredModel, task: Any) -> str | None:
    if scored.searches_only and not isinstance(task, AbsTaskRetrieval):
        return f"{scored.name} ranks documents for queries and gives no embeddings; this is a {task.metadata.type} task"
    modalities = scored.wrapper.mteb_model_meta.modalities
    missing = sorted(set(task.metadata.modalities) - set(modalities))
    if missing:
        return f"the task needs {' and '.join(missing)}; the model takes {' and '.join(modalities)} only"
    return None


_OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError", "ConnectTimeout")


def _explain(suite_task: SuiteTask, error: BaseException) -> str:
    names: set[str] = set()
    chain: BaseException | None = error
    while chain is not None and len(names) < 20:
        names.add(type(chain).__name__)
        chain = chain.__cause__ or chain.__context__
    dataset = suite_task.task.metadata.dataset
    if not suite_task.is_local and (names & set(_OFFLINE) or "offline" in str(error).lower()):
        return (
            f"its data ({dataset['path']} at {str(dataset['revision'])[:8]}) cannot be fetched: the hub is not reachable. "
            "Run it once with a connection, or use a local copy (a folder task)."
        )
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


# Models


@dataclass(frozen=True)
class ScoredModel:
    """A model as mteb calls it, and where its files are (None for a baseline)."""

    wrapper: Any
    name: str
    revision: str
    folder: Path | None
    note: str | None = None
    notices: tuple[Notice, ...] = ()
    """Notices for readers of its scores."""
    computes: str = ""
    """Names all that its vectors depend on: what loading read, the model in memory, versions; empty for a baseline."""

    @property
    def encoder(self) -> TaskEncoder | None:
        """The wrapper, where it is an embedding model with prompts."""
        return self.wrapper if isinstance(self.wrapper, TaskEncoder) else None

    @property
    def searches_only(self) -> bool:
        """Whether the model ranks documents without embedding them (BM25)."""
        return not hasattr(self.wrapper, "encode")


def load_unless_baseline(model: str, device: str | None = None, base: str | None = None) -> str | LoadedEncoder:
    """Load a model by name or folder; the name of a baseline stays.

    ``base`` is where the base of an adapter lies that was saved alone, if not where it says.
    """
    if model not in BASELINES:
        return load_encoder(model, device=device, base=base)
    if base is not None:
        raise BadInputError("only an adapter that was saved alone has a base", where="base", hint="Leave it out.")
    return model


def open_model(
    model: str | LoadedEncoder,
    *,
    name: str | None = None,
    batch_tokens: int | None = None,
    cache: Path | None = None,
    dimensions: int | None = None,
    quantize: str = "none",
    axes: Axes = "first",
    workers: Workers | None = None,
) -> ScoredModel:
    """A model as it is scored, from a name, a folder, a loaded encoder or the name of a baseline.

    ``name`` replaces the one that results are filed under. Vectors are kept below ``cache`` and taken from there;
    ``dimensions`` (the first so many, or so many ``random`` or ``principal`` ``axes``) and ``quantize`` (``int8``,
    ``binary``) score what is left of them, under a name that says so. ``workers`` share the encoding of texts.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise BadInputError(f"batch_tokens must be positive; it is {batch_tokens}", where="batch_tokens")
    _check_variant(model, dimensions, quantize, axes)
    if name is not None and (name.count("/") > 1 or not all(part.strip() for part in name.split("/"))):
        raise BadInputError(f"the name {name!r} is not of the form organisation/model", where="name")
    loaded = load_unless_baseline(model) if isinstance(model, str) else model
    if isinstance(loaded, str):
        if name is not None:
            raise BadInputError(f"the baseline {loaded} keeps its own name, {BASELINES[loaded]}", where="name")
        return _baseline(loaded)
    filed = name or loaded.name
    filed = filed if "/" in filed else f"local/{filed}"
    if dimensions is not None:
        full = loaded.model.get_embedding_dimension()
        if full is not None and dimensions > full:
            raise BadInputError(f"the model has {full} dimensions; {dimensions} were asked for", where="dimensions")
        filed = f"{filed}-{AXES[axes]}{dimensions}"
    if quantize != "none":
        filed = f"{filed}-{quantize}"
    store, computes = None, fingerprint([loaded.content, model_fingerprint(loaded.model)])
    if cache is not None:
        store = KeptVectors(cache, computes, {"name": loaded.name, "revision": loaded.revision})
    encoder = Encoder(loaded.model, batch_tokens, kept=store)
    encoder.workers = workers
    wrapper = TaskEncoder(
        loaded.model,
        name=filed,
        revision=loaded.revision,
        encoder=encoder,
        dimensions=dimensions,
        quantize=quantize,
    )
    if dimensions is not None and axes != "first":
        # Reached by name: what an ordinary run does not need lies beside the library, not below it.
        other_axes = importlib.import_module("nearfield.methods.axes")
        wrapper.turn = other_axes.rotation_of(axes, int(loaded.model.get_embedding_dimension() or 0), wrapper.vectors)
    folder = Path(loaded.path) if Path(loaded.path).is_dir() else None
    return ScoredModel(wrapper, filed, loaded.revision, folder, loaded.note, loaded.notices, computes)


def _check_variant(model: str | LoadedEncoder, dimensions: int | None, quantize: str, axes: str) -> None:
    if quantize not in QUANTIZATIONS:
        raise BadInputError(
            f"unknown quantisation {quantize!r}", where="quantize", hint=f"Known: {', '.join(QUANTIZATIONS)}."
        )
    if axes not in AXES:
        raise BadInputError(f"unknown axes {axes!r}", where="axes", hint=f"Known: {', '.join(AXES)}.")
    if axes != "first" and dimensions is None:
        raise BadInputError(
            f"the axes {axes!r} are for vectors that are cut", where="axes", hint="Give dimensions, too."
        )
    if dimensions is not None and dimensions < 1:
        raise BadInputError(f"the dimensions must be positive; they are {dimensions}", where="dimensions")
    if isinstance(model, str) and model in BASELINES and (dimensions is not None or quantize != "none"):
        raise BadInputError(f"the baseline {model} has no vectors to cut or quantise", where="dimensions")


def _baseline(model: str) -> ScoredModel:
    import mteb

    meta = mteb.get_model_meta(BASELINES[model])
    try:
        wrapper = meta.load_model()
    except ImportError as error:
        raise BadInputError(
            f"the baseline {model} lacks a package: {str(error).splitlines()[0]}", hint="pip install bm25s PyStemmer"
        ) from error
    return ScoredModel(wrapper, meta.name, meta.revision, None)


# During a training

MEAN = "mean"
EncodePrompted = Callable[[Sequence[str], str], NDArray[np.float32]]
"""(texts, prompt) -> (n, d) embeddings of the texts with the prompt before each."""


class HandedEncoder(Encoder):
    """Encodes by a function: the model's own weights may lie anywhere."""

    encode_texts: EncodePrompted | None = None

    def by_chunks(
        self,
        texts: Sequence[str],
        prompt: str = "",
        role: str | None = None,
        *,
        says: str | None = None,
        done: Mask | None = None,
    ) -> Iterator[tuple[Rows, NDArray[np.float32]]]:
        """All texts in one chunk; the function cuts them as it needs."""
        assert self.encode_texts is not None
        if texts:
            yield np.arange(len(texts)), self.encode_texts(texts, prompt)


class DuringTraining:
    """A suite, opened and checked once, that scores a model as often as wanted.

    A call returns the mean of the tasks' main scores under ``mean``, each task's main score under its name, and the
    ``metric`` if that is another one, as ``<task>.<metric>``. Where a task has several subsets or splits, their mean.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        suite: SuiteConfig | Path,
        *,
        name: str,
        metric: str,
        contract: TrainedPrompts | None,
        open_store: OpenStore | None = None,
    ) -> None:
        """``model`` has the prompts that it will be saved with; ``contract`` says which are trained (None: all pass).

        Raises :class:`BadInputError` for a suite that cannot be run on it, and for a metric that no task has.
        """
        self.tasks = open_suite(suite, open_store=open_store)
        self.handed = HandedEncoder(model)
        self.encoder = TaskEncoder(model, name=name, revision="in-training", encoder=self.handed)
        parts = [part for task in self.tasks for part in parts_of(task.task)]
        for part in parts:
            if "text" not in part.metadata.modalities or len(part.metadata.modalities) > 1:
                raise BadInputError(
                    f"the task {part.metadata.name} is not one of text alone",
                    where="training.evaluation.suite",
                    hint="Score it after the training, under 'evaluation'.",
                )
        hint = "State the prompt under prompts.types, or set training.evaluation.prompts=as-is."
        prompt_notices(self.encoder, contract, parts, where="training.evaluation.suite", hint=hint)
        self.extra = self._find(metric)
        self.said = Said()
        """The notices of the scores so far: logged once, however often the model is scored."""

    def _find(self, metric: str) -> tuple[str, str] | None:
        """The task and its metric, if it is not the main score that decides."""
        names = [task.name for task in self.tasks]
        if metric == MEAN or metric in names:
            return None
        for name in names:
            if metric.startswith(f"{name}."):
                return name, metric.removeprefix(f"{name}.")
        raise BadInputError(
            f"no task of the suite gives the metric {metric!r}",
            where="training.evaluation.metric",
            hint=f"Use 'mean', or one of {', '.join(names)}, or <task>.<metric>.",
        )

    def __call__(self, encode: EncodePrompted) -> dict[str, float]:
        self.handed.encode_texts = encode
        scores, extras = {}, {}
        try:
            for task in self.tasks:
                with listening(self.said), self.said.about(task.name):
                    result = self._score(task.task)
                main = _means(result, "main_score")
                assert main is not None
                scores[task.name] = main
                if self.extra is not None and self.extra[0] == task.name:
                    extras[".".join(self.extra)] = self._extra(result, self.extra[1])
        finally:
            self.handed.encode_texts = None
        return {MEAN: sum(scores.values()) / len(scores), **scores, **extras}

    def _score(self, task: Any) -> TaskResult:
        if isinstance(task, AbsTaskAggregate):
            return task.combine_task_results([self._score(part) for part in task.metadata.tasks])
        try:
            result = score_task(self.encoder, task)
            for notice in self.encoder.zeros.notices():
                say(notice)
        finally:
            self.encoder.forget()
            if task.data_loaded:
                task.unload_data()
        return result

    def _extra(self, result: TaskResult, metric: str) -> float:
        value = _means(result, metric)
        if value is None:
            entries = [entry for of_split in result.scores.values() for entry in of_split]
            known = sorted({k for entry in entries for k, v in entry.items() if isinstance(v, int | float)})
            raise BadInputError(
                f"the task {result.task_name} has no metric {metric!r}",
                where="training.evaluation.metric",
                hint=f"Metrics: {', '.join(known)}.",
            )
        return value


def _means(result: TaskResult, metric: str) -> float | None:
    """A metric's mean over splits, then over subsets; None where one of them has no number."""
    by_split = scores_by_split(result, metric)
    if any(len(scores) < len(result.scores[split]) for split, scores in by_split.items()):
        return None
    by_subset = mean_over_splits(by_split)
    return sum(by_subset.values()) / len(by_subset)
