"""The stages that mine: a teacher's vectors of the items, and the negatives that it finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nearfield.data.store import Rows, Store
from nearfield.data.vectors import EncodeItems, ItemVectors, build_vectors, encode_share
from nearfield.errors import BadInputError
from nearfield.files import atomic_path
from nearfield.mining.config import (
    DenseTeacher,
    PairTeacher,
    RefreshedNegatives,
    SentenceTransformerTeacher,
    TeacherConfig,
    VectorsTeacher,
    reads_texts_alone,
)
from nearfield.mining.documents import ArrayDocuments, Documents, IndexedDocuments, Vectors
from nearfield.mining.pool import search_share
from nearfield.mining.search import Neighbours
from nearfield.mining.teachers import DenseScorer
from nearfield.pipeline.artifacts import Artifacts
from nearfield.pipeline.teaching import (
    guide_teacher,
    identity,
    mining_teacher,
    planning_teacher,
    teacher_prompts,
    teachers_of_vectors,
)

if TYPE_CHECKING:
    from nearfield.batching.planner import VectorsOf
    from nearfield.mining.pool import Pool
    from nearfield.mining.teachers import PairScorer, Scorer
    from nearfield.pipeline.planning import Negatives as PlannedNegatives
    from nearfield.training.chunks import TeacherScores


Engine = Literal["local", "ray"]


class MiningStages(Artifacts):
    """What rank 0 does where a recipe mines or its planner wants vectors."""

    engine: Engine = "local"
    """``ray`` encodes and searches on a Ray cluster; what comes out is the same."""

    def vectors(self) -> dict[str, Any]:
        """Encode the items of the training split with every teacher that makes vectors."""
        teachers = teachers_of_vectors(self.recipe)
        store = self._store()
        wanted = items_by_role(store, self.source_names, self.recipe.split)
        counts = {}
        for number, teacher in enumerate(teachers):
            path = self.vectors_path(teacher)
            if path.is_dir():
                continue
            encode, shared = self._encode_items(teacher, store), self._shares_vectors(teacher)
            divide = self._divider(f"vectors {number}")
            if self.engine == "ray" and isinstance(teacher, SentenceTransformerTeacher):
                divide = on_ray(wanted, encode, path, shared)
            about = {"teacher": identity(teacher, self.recipe)}
            zeros = _may_be_zero(teacher)
            made = build_vectors(wanted, encode, path, path.name, about, shared=shared, divide=divide, zeros=zeros)
            counts[teacher.kind] = {role: len(table.rows) for role, table in sorted(made.tables.items())}
        return {"vectors": counts}

    def _divider(self, task: str) -> Callable[[Callable[[int], None]], None] | None:
        """What has all ranks do their shares of a task; None where there is one."""
        ranks = self.launch.world_size
        return None if ranks == 1 else lambda own: self.launch.divide(task, lambda: own(ranks))

    def help(self, task: str) -> None:
        """Do this rank's part of a task that rank 0 divides."""
        kind, number = task.split()
        store, share = self._store(), (self.launch.rank, self.launch.world_size)
        if kind == "vectors":
            teacher = teachers_of_vectors(self.recipe)[int(number)]
            path = self.vectors_path(teacher)
            wanted = items_by_role(store, self.source_names, self.recipe.split)
            encode, shared = self._encode_items(teacher, store), self._shares_vectors(teacher)
            zeros = _may_be_zero(teacher)
            encode_share(wanted, encode, path, path.name, share=share, shared=shared, zeros=zeros)
            return
        mining = self.recipe.mining
        assert kind == "search" and mining is not None
        pool = self._pool(store, self._mined_sources(store)[int(number)])
        judge = mining_teacher(self.recipe)
        assert isinstance(judge, DenseTeacher)
        if self.vectors_path(judge).is_dir():
            self._keep_share(int(number), search_share(pool, self._dense_scorer(store, pool), mining, share))

    def _found(self, number: int, store: Store, pool: Pool) -> Neighbours | None:
        """What all ranks find for a pool, where the search can be divided: by exact search of vectors."""
        mining = self.recipe.mining
        assert mining is not None
        ranks, teacher = self.launch.world_size, mining_teacher(self.recipe)
        if ranks == 1 or mining.search.kind != "exact" or not isinstance(teacher, DenseTeacher):
            return None
        scorer = self._dense_scorer(store, pool)
        shutil.rmtree(self._shares, ignore_errors=True)
        own: list[Neighbours] = []
        self.launch.divide(f"search {number}", lambda: own.append(search_share(pool, scorer, mining, (0, ranks))))
        parts = own
        for rank in range(1, ranks):
            file = self._shares / f"{number}-{rank}.npz"
            if file.is_file():
                with np.load(file, allow_pickle=False) as arrays:
                    parts.append(Neighbours(arrays["rows"], arrays["scores"]))
            else:  # that rank does not share the file system
                parts.append(search_share(pool, scorer, mining, (rank, ranks)))
        shutil.rmtree(self._shares, ignore_errors=True)
        return Neighbours(np.concatenate([p.rows for p in parts]), np.concatenate([p.scores for p in parts]))

    def _keep_share(self, number: int, found: Neighbours) -> None:
        self._shares.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._shares / f"{number}-{self.launch.rank}.npz") as aside, aside.open("wb") as stream:
            np.savez(stream, rows=found.rows, scores=found.scores)

    @property
    def _shares(self) -> Path:
        return self.negatives_path.with_name(f"{self.negatives_path.name}.shares")

    def _shares_vectors(self, teacher: DenseTeacher) -> bool:
        if isinstance(teacher, SentenceTransformerTeacher):
            return len(set(teacher_prompts(teacher, self.recipe).values())) == 1
        return teacher.queries is None

    def _encode_items(self, teacher: DenseTeacher, store: Store) -> EncodeItems:
        if not isinstance(teacher, SentenceTransformerTeacher):
            from nearfield.mining.vector_files import read_vectors

            encode: EncodeItems = read_vectors(teacher, store)
            return encode
        from nearfield.mining.encode import ItemEncoder

        own, base = teacher.model is None, self.recipe.encoder
        return ItemEncoder(
            store.path,
            teacher.model or base.model,
            base.revision if own else teacher.revision,
            teacher_prompts(teacher, self.recipe),
            device=self.launch.device if self.engine == "local" else None,
            max_length=teacher.max_length or (base.max_length if own else None),
            trust_remote_code=base.trust_remote_code if own else teacher.trust_remote_code,
        )

    def mine(self) -> dict[str, Any]:
        """Find negatives for the examples of the training split."""
        from nearfield.mining.negatives import write_negatives
        from nearfield.mining.pool import mine_pool

        mining, store = self.recipe.mining, self._store()
        assert mining is not None
        self._check_reads(mining_teacher(self.recipe), store)
        mined, recalls = [], {}
        for number, pool in enumerate(self._pools(store)):
            scorer, found = self._scorer(store, pool), self._found(number, store, pool)
            mined.append((pool, mine_pool(pool, scorer, mining, seed=self.recipe.seed, found=found)))
            recall = getattr(scorer, "recall", None)
            if recall is not None:
                recalls[pool.name] = {"recall": recall.value, "queries": recall.queries, "depth": recall.depth}
        metadata = {
            "fingerprint": self.fingerprints["mine"],
            "generation": 0,
            "teacher": identity(mining_teacher(self.recipe), self.recipe),
            "rules": [rule.model_dump(mode="json") for rule in mining.rules],
            "recall": recalls,
        }
        summary = write_negatives(self.negatives_path, store, mined, metadata)
        return {key: summary[key] for key in ("examples", "short")} | {
            "negatives": sum(source["negatives"] for source in summary["sources"].values())
        }

    def _check_reads(self, teacher: TeacherConfig, store: Store) -> None:
        if reads_texts_alone(teacher) and store.has_images and store.pictures.num_rows:
            raise BadInputError(
                f"{teacher.kind} goes by words alone, and this data has pictures",
                where=self.run.loaded.where(("mining",)),
                hint="Name an embedding model that takes both.",
            )

    def _pools(self, store: Store) -> list[Pool]:
        return [self._pool(store, name) for name in self._mined_sources(store)]

    def _mined_sources(self, store: Store) -> list[str]:
        """The sources that negatives are mined for."""
        kinds = {source.name: source.kind for source in store.sources}
        return [name for name in self.source_names if kinds[name] == "retrieval"]

    def _pool(self, store: Store, name: str) -> Pool:
        from nearfield.mining.pool import make_pool

        assert self.recipe.mining is not None
        corpus = self._mined_sources(store) if self.recipe.mining.corpus == "sources" else [name]
        return make_pool(store, name, self.recipe.split, corpus)

    def _scorer(self, store: Store, pool: Pool) -> Scorer:
        from nearfield.mining.teachers import Searching, make_scorer

        mining = self.recipe.mining
        assert mining is not None
        searching = Searching(mining.search, mining.memory_mib << 20, self.launch.device, self.recipe.seed)
        return make_scorer(
            mining_teacher(self.recipe),
            (len(pool.queries), len(pool.documents)),
            lambda role, rows: store.texts(pool.items(role, rows)),
            lambda teacher: self._pool_vectors(teacher, pool),
            searching,
        )

    def _dense_scorer(self, store: Store, pool: Pool) -> DenseScorer:
        scorer = self._scorer(store, pool)
        assert isinstance(scorer, DenseScorer)
        return scorer

    def _pool_vectors(self, teacher: DenseTeacher, pool: Pool) -> tuple[Vectors, Documents]:
        vectors = ItemVectors.open(self.vectors_path(teacher))
        table = vectors.table("document")
        rows = table.positions(pool.documents)
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            documents: Documents = ArrayDocuments(table.take(rows))
        elif self.recipe.mining is not None and self.recipe.mining.search.kind != "exact":
            documents = ArrayDocuments(table.take(rows))
        else:
            table.check(rows, rows + 1)
            documents = IndexedDocuments(table.vectors, rows)
        return vectors.of("query", pool.queries), documents

    def judge(self, teacher: PairTeacher, store: Store, queries: Rows, documents: Rows) -> PairScorer:
        """Another teacher before some items; its vectors are made here and not kept."""
        from nearfield.data.vectors import unit
        from nearfield.mining.teachers import make_pair_scorer

        self._check_reads(teacher, store)
        items = {"query": queries, "document": documents}

        def vectors(dense: DenseTeacher) -> tuple[Vectors, Documents]:
            encode = self._encode_items(dense, store)
            made = {role: unit(np.asarray(encode(role, rows)), rows) for role, rows in items.items()}
            return made["query"], ArrayDocuments(made["document"])

        counts = (len(queries), len(documents))
        return make_pair_scorer(teacher, counts, lambda role, rows: store.texts(items[role][rows]), vectors)

    def mined_items(self, store: Store) -> dict[str, Rows]:
        """Source -> the items that are its mined negatives, to be tokenised with its document prompt."""
        from nearfield.mining.negatives import Negatives

        if self.recipe.mining is None:
            return {}
        if self.recipe.mining.corpus == "sources" and isinstance(self.recipe.mining.during, RefreshedNegatives):
            return {pool.name: pool.documents for pool in self._pools(store)}
        negatives = Negatives(self.negatives_path)
        names = {number: source.name for number, source in enumerate(store.sources)}
        sources = np.repeat(negatives.table["source"].to_numpy(), np.diff(negatives.offsets))
        return {names[n]: np.unique(negatives.rows[sources == n]) for n in np.unique(sources).tolist()}

    def planned_negatives(self, store: Store) -> dict[str, PlannedNegatives] | None:
        """What the planner takes instead of the data's negatives, by source; None where the recipe does not mine."""
        from nearfield.mining.negatives import Negatives
        from nearfield.pipeline.planning import planned_negatives

        mining = self.recipe.mining
        if mining is None:
            return None
        mined = Negatives(self.negatives_path)
        return {
            name: planned_negatives(store, store.select(name, self.recipe.split), mined, mining.explicit)
            for name in self._mined_sources(store)
        }

    def planner_vectors(self) -> VectorsOf | None:
        """The vectors that the planner gets, where there are any."""
        teacher = planning_teacher(self.recipe)
        return None if teacher is None else ItemVectors.open(self.vectors_path(teacher)).of

    def guide_width(self) -> int | None:
        """How wide the guide's vectors are, where the objective asks for them."""
        teacher = guide_teacher(self.recipe)
        return None if teacher is None else ItemVectors.open(self.vectors_path(teacher)).dimension

    def teacher_scores(self) -> TeacherScores | None:
        """What the miner's teacher gave, where the objective learns from it."""
        from nearfield.batching.rows import Lists
        from nearfield.mining.negatives import Negatives
        from nearfield.pipeline.planning import arrow_lists
        from nearfield.training.chunks import TeacherScores

        if not self.recipe.objective.needs_teacher_scores:
            return None
        mined = Negatives(self.negatives_path)
        return TeacherScores(
            mined.examples,
            arrow_lists(self._store().examples.take(mined.examples)["positives"]),
            mined.positive_scores.astype(np.float64),
            Lists(mined.offsets, mined.rows),
            mined.scores.astype(np.float64),
        )

    def guide_vectors(self) -> VectorsOf | None:
        """The vectors that the objective gets of its guide, where it asks for one."""
        teacher = guide_teacher(self.recipe)
        return None if teacher is None else ItemVectors.open(self.vectors_path(teacher)).of


def _may_be_zero(teacher: DenseTeacher) -> bool:
    """Whether a vector of zeros says that an item has none, rather than that something is wrong."""
    return isinstance(teacher, VectorsTeacher) and teacher.zeros


def on_ray(
    wanted: dict[str, Rows], encode: EncodeItems, path: Path, shared: bool
) -> Callable[[Callable[[int], None]], None]:
    """What has a Ray cluster make all shards of vectors."""
    from nearfield.mining.ray_engine import spread_encoding

    return lambda own: spread_encoding(wanted, encode, path, path.name, shared=shared)


def items_by_role(store: Store, sources: list[str], split: str) -> dict[str, Rows]:
    """Role -> the items of all examples of some sources in a split."""
    found: dict[str, list[Rows]] = {"query": [np.empty(0, np.int64)], "document": [np.empty(0, np.int64)]}
    for source in sources:
        part = store.examples.take(store.select(source, split))
        found["query"].append(part["query"].to_numpy())
        for column in ("positives", "negatives"):
            found["document"].append(part[column].combine_chunks().flatten().to_numpy())
        if part["label"].null_count < len(part):
            # The planner takes other items of a label as positives.
            found["document"].append(part["query"].to_numpy())
    return {role: np.unique(np.concatenate(rows)).astype(np.int64) for role, rows in found.items()}
