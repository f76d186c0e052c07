"""What ``nearfield plan shares`` does: how like each training source is to each validation source, by a teacher's vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nearfield.batching.specialisation import specialised_shares, transport_similarity
from nearfield.data.vectors import unit
from nearfield.errors import BadInputError
from nearfield.mining.config import SentenceTransformerTeacher
from nearfield.pipeline.mining import planning_teacher
from nearfield.pipeline.run import Run
from nearfield.pipeline.stages import Stages, run_stages
from nearfield.randomness import generator


@dataclass(frozen=True)
class Shares:
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
) -> Shares:
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
    return Shares(scores, specialised_shares(scores, temperature), sizes)
