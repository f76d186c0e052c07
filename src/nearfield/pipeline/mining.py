"""The stages ``vectors`` and ``mine``: a teacher's vectors of the items, and the negatives that it finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.arrays import Rows, Vectors
from nearfield.data.store import Store
from nearfield.data.vectors import VERSION as VECTORS_VERSION
from nearfield.data.vectors import EncodeItems, ItemVectors, VectorJob
from nearfield.encoders.identity import PACKAGES as COMPUTING_PACKAGES
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, fingerprint
from nearfield.mining.config import (
    DenseTeacher,
    SentenceTransformerTeacher,
    TeacherSettings,
)
from nearfield.mining.negatives import VERSION as NEGATIVES_VERSION
from nearfield.mining.negatives import search_share
from nearfield.mining.search import ArrayDocuments, Documents, IndexedDocuments, Neighbours
from nearfield.mining.teachers import DenseScorer
from nearfield.pipeline.run import Job, Stage

if TYPE_CHECKING:
    from nearfield.batching.planner import VectorsOf
    from nearfield.mining.config import MiningConfig
    from nearfield.mining.negatives import Negatives, Pool
    from nearfield.mining.teachers import PairScorer, Scorer
    from nearfield.pipeline.data import DataStage
    from nearfield.recipe import Recipe


class VectorsStage(Stage):
    """Encodes the items of the training split with every teacher that makes vectors."""

    name = "vectors"
    shared = True
    packages = COMPUTING_PACKAGES

    def __init__(self, job: Job, data: DataStage) -> None:
        super().__init__(job)
        self.data = data

    @cached_property
    def teachers(self) -> list[DenseTeacher]:
        """All teachers whose vectors the run needs, each once."""
        teachers = mining_teacher(self.recipe).dense_teachers() if self.recipe.mining else []
        for teacher in (planning_teacher(self.recipe), guide_teacher(self.recipe)):
            if teacher is not None and teacher not in teachers:
                teachers.append(teacher)
        return teachers

    @property
    def is_wanted(self) -> bool:
        """Where the recipe mines by vectors, its planner wants some, or its objective has a guide."""
        return bool(self.teachers)

    @cached_property
    def fingerprints(self) -> dict[DenseTeacher, str]:
        """The fingerprint of the vectors of each teacher."""
        fingerprints = {}
        for teacher in self.teachers:
            made_of = {
                "version": VECTORS_VERSION,
                "data": self.data.fingerprint,
                "teacher": teacher.made_of(self.recipe.encoder),
                "sources": self.job.source_names,
                "split": self.recipe.split,
            }
            fingerprints[teacher] = fingerprint(made_of)
        return fingerprints

    def inputs(self) -> Any:
        """The fingerprints of all vectors."""
        return list(self.fingerprints.values())

    def path(self, teacher: DenseTeacher) -> Path:
        """A teacher's vectors."""
        return self.in_cache("vectors", self.fingerprints[teacher])

    def outputs(self) -> list[Path]:
        """The vectors of all teachers."""
        return [self.path(teacher) for teacher in self.teachers]

    def open(self, teacher: DenseTeacher) -> ItemVectors:
        """A teacher's vectors, which were made."""
        return ItemVectors.open(self.path(teacher))

    def planned(self) -> VectorsOf | None:
        """The vectors that the planner gets, where there are any."""
        teacher = planning_teacher(self.recipe)
        return None if teacher is None else self.open(teacher).of

    def guide(self) -> ItemVectors | None:
        """The vectors that the objective gets of its guide, where it asks for one."""
        teacher = guide_teacher(self.recipe)
        return None if teacher is None else self.open(teacher)

    def run(self) -> dict[str, Any]:
        """Encode what is not there yet."""
        store, counts = self.data.open(), {}
        for number, teacher in enumerate(self.teachers):
            path = self.path(teacher)
            if path.is_dir():
                continue
            work, divide = self._work(teacher, store), self.divider(number)
            if self.job.engine == "ray" and teacher.spreads:
                divide = on_ray(work)
            made = work.run({"teacher": teacher.made_of(self.recipe.encoder)}, divide)
            counts[teacher.kind] = {role: len(table.keys) for role, table in sorted(made.tables.items())}
        return {"vectors": counts}

    def help(self, number: int) -> None:
        """Encode this rank's share of the items with a teacher."""
        share = (self.job.launch.rank, self.job.launch.world_size)
        self._work(self.teachers[number], self.data.open()).do_share(share)

    def _work(self, teacher: DenseTeacher, store: Store) -> VectorJob:
        path = self.path(teacher)
        return VectorJob(
            items_by_role(store, self.job.source_names, self.recipe.split),
            self.encode_items(teacher, store),
            path,
            path.name,
            shared=teacher.is_shared(self.recipe.encoder),
            zeros=teacher.may_be_zero,
        )

    def encode_items(self, teacher: DenseTeacher, store: Store) -> EncodeItems:
        """A function from items to a teacher's vectors."""
        device = self.job.launch.device if self.job.engine == "local" else None
        return teacher.encode_items(store, self.recipe.encoder, device)


class MineStage(Stage):
    """Finds negatives for the examples of the training split."""

    name = "mine"
    shared = True
    packages = (*COMPUTING_PACKAGES, "bm25s", "PyStemmer", "faiss-cpu")

    def __init__(self, job: Job, data: DataStage, vectors: VectorsStage) -> None:
        super().__init__(job)
        self.data = data
        self.vectors = vectors

    @property
    def is_wanted(self) -> bool:
        """Where the recipe mines."""
        return self.recipe.mining is not None

    @property
    def mining(self) -> MiningConfig:
        """The settings of a recipe that mines."""
        assert self.recipe.mining is not None
        return self.recipe.mining

    def inputs(self) -> Any:
        """The data, the teacher and the settings of mining before the training."""
        # Whether the data's own negatives stay is decided when batches are planned, how negatives change in training.
        settings = self.mining.identity(exclude={"teacher", "memory_mib", "explicit", "during"})
        return {
            "version": NEGATIVES_VERSION,
            "data": self.data.fingerprint,
            "teacher": mining_teacher(self.recipe).made_of(self.recipe.encoder),
            "mining": settings,
            "sources": self.job.source_names,
            "split": self.recipe.split,
            "seed": self.recipe.seed,
            "generation": 0,
        }

    def outputs(self) -> list[Path]:
        """The mined negatives."""
        return [self.in_cache("negatives", self.fingerprint)]

    def open(self) -> Negatives:
        """The negatives that were mined."""
        from nearfield.mining.negatives import Negatives

        return Negatives(self.output)

    def run(self) -> dict[str, Any]:
        """Search, apply the rules, write what is left."""
        from nearfield.mining.negatives import mine_pool, write_negatives

        store = self.data.open()
        self._check_reads(mining_teacher(self.recipe), store)
        mined, recalls = [], {}
        for number, pool in enumerate(self.pools(store)):
            scorer, nearest = self._scorer(store, pool), self._found(number, store, pool)
            mined.append((pool, mine_pool(pool, scorer, self.mining, seed=self.recipe.seed, found=nearest)))
            recall = getattr(scorer, "recall", None)
            if recall is not None:
                recalls[pool.name] = {"recall": recall.value, "queries": recall.queries, "depth": recall.depth}
        metadata = {
            "fingerprint": self.fingerprint,
            "generation": 0,
            "teacher": mining_teacher(self.recipe).made_of(self.recipe.encoder),
            "rules": [rule.model_dump(mode="json") for rule in self.mining.rules],
            "recall": recalls,
        }
        summary = write_negatives(self.output, store, mined, metadata)
        return {key: summary[key] for key in ("examples", "short")} | {
            "negatives": sum(source["negatives"] for source in summary["sources"].values())
        }

    def help(self, number: int) -> None:
        """Search this rank's share of the queries of a pool."""
        store, share = self.data.open(), (self.job.launch.rank, self.job.launch.world_size)
        pool = self._pool(store, self.sources(store)[number])
        (teacher,) = mining_teacher(self.recipe).dense_teachers()
        if self.vectors.path(teacher).is_dir():
            nearest = search_share(pool, self._dense_scorer(store, pool), self.mining, share)
            self._shares.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._share(number, share[0])) as aside, aside.open("wb") as stream:
                np.savez(stream, rows=nearest.rows, scores=nearest.scores)

    def _found(self, number: int, store: Store, pool: Pool) -> Neighbours | None:
        """The neighbours that all ranks find for a pool, where the search can be divided: exact search of vectors."""
        divide = self.divider(number)
        if divide is None or not self.mining.search.exact:
            return None
        if mining_teacher(self.recipe) not in self.vectors.teachers:
            return None
        ranks, scorer = self.job.launch.world_size, self._dense_scorer(store, pool)
        shutil.rmtree(self._shares, ignore_errors=True)
        parts: list[Neighbours] = []
        divide(lambda ranks: parts.append(search_share(pool, scorer, self.mining, (0, ranks))))
        for rank in range(1, ranks):
            file = self._share(number, rank)
            if file.is_file():
                with np.load(file, allow_pickle=False) as arrays:
                    parts.append(Neighbours(arrays["rows"], arrays["scores"]))
            else:  # that rank does not share the file system
                parts.append(search_share(pool, scorer, self.mining, (rank, ranks)))
        shutil.rmtree(self._shares, ignore_errors=True)
        return Neighbours(np.concatenate([p.rows for p in parts]), np.concatenate([p.scores for p in parts]))

    @property
    def _shares(self) -> Path:
        return self.output.with_name(f"{self.output.name}.shares")

    def _share(self, number: int, rank: int) -> Path:
        return self._shares / f"{number}-{rank}.npz"

    def _check_reads(self, teacher: TeacherSettings, store: Store) -> None:
        if teacher.reads_texts_alone and store.has_images and store.image_table.num_rows:
            raise BadInputError(
                f"{teacher.kind} goes by words alone, and this data has images",
                where=self.job.run.loaded.where(("mining",)),
                hint="Name an embedding model that takes both.",
            )

    def sources(self, store: Store) -> list[str]:
        """The sources that negatives are mined for."""
        kinds = {source.name: source.kind for source in store.sources}
        return [name for name in self.job.source_names if kinds[name] == "retrieval"]

    def pools(self, store: Store) -> list[Pool]:
        """The pool of each of them."""
        return [self._pool(store, name) for name in self.sources(store)]

    def _pool(self, store: Store, name: str) -> Pool:
        from nearfield.mining.negatives import make_pool

        corpus = self.sources(store) if self.mining.corpus == "sources" else [name]
        return make_pool(store, name, self.recipe.split, corpus)

    def _scorer(self, store: Store, pool: Pool) -> Scorer:
        from nearfield.mining.teachers import Searching, TeacherPool

        mining = self.mining
        searching = Searching(
            mining.search,
            mining.memory_mib << 20,
            self.job.launch.device,
            self.recipe.seed,
            spread=self.job.engine == "ray",
        )
        before = TeacherPool(
            (len(pool.queries), len(pool.documents)),
            lambda role, rows: store.texts(pool.items(role, rows)),
            lambda teacher: self._pool_vectors(teacher, pool),
            searching,
        )
        return mining_teacher(self.recipe).build(before)

    def _dense_scorer(self, store: Store, pool: Pool) -> DenseScorer:
        scorer = self._scorer(store, pool)
        assert isinstance(scorer, DenseScorer)
        return scorer

    def _pool_vectors(self, teacher: DenseTeacher, pool: Pool) -> tuple[Vectors, Documents]:
        vectors = self.vectors.open(teacher)
        table = vectors.table("document")
        rows = table.positions(pool.documents)
        is_range = bool(len(rows)) and rows[-1] - rows[0] + 1 == len(rows)
        if is_range or not self.mining.search.exact:
            documents: Documents = ArrayDocuments(table.take(rows))
        else:
            table.check(rows, rows + 1)
            documents = IndexedDocuments(table.vectors, rows)
        return vectors.of("query", pool.queries), documents

    def judge(self, teacher: TeacherSettings, store: Store, queries: Rows, documents: Rows) -> PairScorer:
        """Another teacher before some items; its vectors are made here and not kept."""
        from nearfield.data.vectors import unit
        from nearfield.mining.teachers import TeacherPool, as_pair_scorer

        self._check_reads(teacher, store)
        items = {"query": queries, "document": documents}

        def vectors(dense: DenseTeacher) -> tuple[Vectors, Documents]:
            encode = self.vectors.encode_items(dense, store)
            made = {role: unit(np.asarray(encode(role, rows)), rows) for role, rows in items.items()}
            return made["query"], ArrayDocuments(made["document"])

        counts = (len(queries), len(documents))
        before = TeacherPool(counts, lambda role, rows: store.texts(items[role][rows]), vectors)
        return as_pair_scorer(teacher.build(before))

    def documents_by_source(self, store: Store) -> dict[str, Rows]:
        """Source -> the items that are its mined negatives, to be tokenised with its document prompt; empty without mining."""
        if self.recipe.mining is None:
            return {}
        if self.mining.corpus == "sources" and self.mining.during is not None and self.mining.during.mines_anew:
            return {pool.name: pool.documents for pool in self.pools(store)}
        negatives = self.open()
        names = {number: source.name for number, source in enumerate(store.sources)}
        sources = negatives.table["source"].to_numpy()[negatives.lists.owners()]
        return {names[n]: np.unique(negatives.lists.values[sources == n]) for n in np.unique(sources).tolist()}


def on_ray(job: VectorJob) -> Callable[[Callable[[int], None]], None]:
    """The function that has a Ray cluster make all shards of vectors."""
    from nearfield.mining.ray_engine import spread_encoding

    return lambda local_part: spread_encoding(job)


def items_by_role(store: Store, sources: list[str], split: str) -> dict[str, Rows]:
    """Role -> the items of all examples of some sources in a split."""
    items: dict[str, list[Rows]] = {"query": [np.empty(0, np.int64)], "document": [np.empty(0, np.int64)]}
    for source in sources:
        part = store.examples.take(store.select(source, split))
        items["query"].append(part["query"].to_numpy())
        for column in ("positives", "negatives"):
            items["document"].append(part[column].combine_chunks().flatten().to_numpy())
        if part["label"].null_count < len(part):
            # The planner takes other items of a label as positives.
            items["document"].append(part["query"].to_numpy())
    return {role: np.unique(np.concatenate(rows)).astype(np.int64) for role, rows in items.items()}


def mining_teacher(recipe: Recipe) -> TeacherSettings:
    """The teacher that scores candidates: that of ``mining``, else the recipe's, else the base model."""
    stated = recipe.mining.teacher if recipe.mining else None
    return stated or recipe.teacher or SentenceTransformerTeacher()


def planning_teacher(recipe: Recipe) -> DenseTeacher | None:
    """The teacher whose vectors the planner gets: the first of the recipe's teacher that makes any; None where there is none."""
    if recipe.teacher is None:
        return SentenceTransformerTeacher() if recipe.batches.needs_vectors else None
    # That there is one where the planner cannot do without is checked with the recipe.
    return next(iter(recipe.teacher.dense_teachers()), None)


def guide_teacher(recipe: Recipe) -> DenseTeacher | None:
    """The teacher whose vectors the objective gets; None where it asks for none."""
    if not recipe.objective.needs_guide:
        return None
    if recipe.guide is not None:
        return recipe.guide
    # That the recipe's teacher makes vectors is checked with the recipe.
    return SentenceTransformerTeacher() if recipe.teacher is None else next(iter(recipe.teacher.dense_teachers()), None)
