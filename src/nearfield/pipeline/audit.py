"""A teacher's look at a run: mining alone, an audit of what was mined, and how alike its sources are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfield.arrays import Rows, Vectors
from nearfield.data.vectors import unit
from nearfield.errors import BadInputError
from nearfield.methods.sail import specialised_shares, transport_similarity
from nearfield.mining.config import (
    BM25Teacher,
    CrossEncoderTeacher,
    SentenceTransformerTeacher,
    TeacherConfig,
)
from nearfield.mining.negatives import Audit, Negatives, audit, document_items
from nearfield.mining.ray_engine import require_ray
from nearfield.pipeline.mining import mining_teacher, planning_teacher
from nearfield.pipeline.run import Engine, Run
from nearfield.pipeline.stages import Stages, run_stages
from nearfield.provenance import generator
from nearfield.recipe import Recipe


def mine_run(run: Run, *, on_stage: Callable[[str, str], None] | None = None, engine: Engine = "local") -> Negatives:
    """Run the stages up to mining that are missing or stale, and open what was mined."""
    _check_mines(run)
    if engine == "ray":
        require_ray()
    run_stages(run, "mine", on_stage=on_stage, engine=engine)
    return Stages.of(run).mine.open()


def _check_mines(run: Run) -> None:
    if run.recipe.mining is None:
        raise BadInputError(
            "this recipe mines no negatives",
            where=str(run.loaded.path),
            hint="Add the key 'mining', e.g. mining: {negatives: 4}.",
        )


def choose_judge(recipe: Recipe, judge: str | None, cross_encoder: str | None) -> TeacherConfig:
    """The second teacher: as named, else BM25, or the recipe's own model where BM25 mined."""
    if judge is not None and cross_encoder is not None:
        raise BadInputError("one second teacher is wanted, not two", hint="Give --judge or --cross-encoder.")
    for name in (judge, cross_encoder):
        if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise BadInputError("there is no such folder", where=name)
    if cross_encoder is not None:
        return CrossEncoderTeacher(model=cross_encoder, retrieve=BM25Teacher())
    if judge is None:
        judge = "model" if mining_teacher(recipe).counts_words else "bm25"
    if judge == "bm25":
        return BM25Teacher()
    return SentenceTransformerTeacher(model=None if judge == "model" else judge)


def audit_run(run: Run, judge: TeacherConfig, *, shown: int = 10, judged: int = 500) -> Audit:
    """Look at what a run mined, with a second teacher beside; see :func:`nearfield.mining.negatives.audit`."""
    _check_mines(run)
    stages = Stages.of(run)
    if not stages.mine.output.is_dir():
        raise BadInputError(
            "the negatives of this run are not mined yet, or its recipe changed since",
            where=str(run.folder),
            hint=f"nearfield mine {run.loaded.path}",
        )
    store = stages.training_data.open()

    def scores(source: int, queries: Rows, items: Rows) -> Vectors:
        # BM25 weighs words by how rare they are in the whole corpus; others need the documents in question only.
        corpus = document_items(store, stages.job.source_names, run.recipe.split) if judge.counts_words else items
        asked, where = np.unique(queries, return_inverse=True)
        documents, place = np.unique(np.concatenate([corpus, items]), return_inverse=True)
        scorer = stages.mine.judge(judge, store, asked.astype(np.int64), documents.astype(np.int64))
        return scorer.score(where.astype(np.int64), place[len(corpus) :].astype(np.int64))

    return audit(store, stages.mine.open(), scores, judge.in_words, shown=shown, judged=judged)


@dataclass(frozen=True)
class SourceShares:
    """How often to draw each source, and why."""

    scores: dict[str, dict[str, float]]
    """Training source -> validation source -> similarity."""
    shares: dict[str, float]
    sizes: dict[str, int]
    """Examples of each training source."""


def find_shares(
    run: Run,
    towards: Sequence[str] = (),
    *,
    split: str = "validation",
    samples: int = 10_000,
    clusters: int = 32,
    regularisation: float = 0.05,
    temperature: float = 0.05,
) -> SourceShares:
    """Compare the queries of each source's training split with those of ``split`` of the sources ``towards`` (all, where none is named)."""
    run_stages(run, "data")
    stages = Stages.of(run)
    store, recipe, names = stages.data.open(), run.recipe, stages.job.source_names
    known = [source.name for source in store.sources]
    for name in towards:
        if name not in known:
            raise BadInputError(f"there is no source {name!r}", where="--towards", hint=f"Sources: {', '.join(known)}.")
    encode = stages.vectors.encode_items(planning_teacher(recipe) or SentenceTransformerTeacher(), store)

    def vectors(name: str, part: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        items = np.unique(store.examples.take(store.select(name, part))["query"].to_numpy())
        if not len(items):
            raise BadInputError(
                f"the source {name!r} has no examples in the split {part!r}", where=str(run.loaded.path)
            )
        random = generator(recipe.seed, "shares", name, part)
        items = np.sort(random.permutation(items)[:samples])
        return unit(np.asarray(encode("query", items)), items)

    others = {name: vectors(name, split) for name in towards or names}
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        mine = vectors(name, recipe.split)
        scores[name] = {
            other: transport_similarity(
                mine, theirs, clusters=clusters, regularisation=regularisation, seed=recipe.seed
            )
            for other, theirs in others.items()
        }
    sizes = {name: len(store.select(name, recipe.split)) for name in names}
    return SourceShares(scores, specialised_shares(scores, temperature), sizes)
