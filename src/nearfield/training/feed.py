"""What the rows of a plan are made into batches with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from nearfield.batching.plan import Batch
from nearfield.batching.planner import Rows, VectorsOf
from nearfield.batching.rows import Floats
from nearfield.data.tokens import Ids, TokenCache
from nearfield.encoders.token_task import TokenTask
from nearfield.objectives.config import Reading
from nearfield.training.chunks import Pool, pool_batch
from nearfield.training.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from PIL.Image import Image

Pictures = Callable[[Rows], "Sequence[Image | None]"]
"""Item rows -> their pictures, RGB."""


@dataclass(frozen=True)
class Feed:
    """What is known of the items and examples of the data that batches name by their rows."""

    tokens: TokenCache
    guide: VectorsOf | None = None
    """A guide's vectors of the items, where the objective asks for them."""
    weights: Floats | None = None
    """What each example counts, by its row; None where all count alike."""
    teacher_scores: TeacherScores | None = None
    """What the miner's teacher gave, where the objective learns from it."""
    readings: Mapping[int, Reading] = field(default_factory=dict)
    """The number of a source -> how the texts of its examples are read; those that are not named are read plainly."""
    token_task: TokenTask | None = None
    """What hides tokens and gives the losses on them, where the objective asks for that."""
    pictures: Pictures | None = None
    """The pictures of items, where the data has some."""

    def pool(self, batch: Batch) -> Pool:
        """The texts of a planned batch, with what its examples count."""
        sources = [batch.source] * len(batch.query) if batch.sources is None else batch.sources.tolist()
        pool = pool_batch(batch, [self.readings.get(source, Reading()) for source in sources])
        if self.token_task is not None:
            pool = replace(pool, token_columns=self.token_task.columns)
        if self.weights is not None:
            pool = replace(pool, weights=self.weights[batch.example])
        return pool if self.teacher_scores is None else replace(pool, teacher_scores=self.teacher_scores.of(batch))

    def tokens_of(self, pool: Pool, places: Rows) -> list[Ids]:
        """The tokens of some texts of a pool."""
        where = zip(pool.prompts[places].tolist(), pool.items[places].tolist(), strict=True)
        return [self.tokens.tables[prompt].tokens(item) for prompt, item in where]

    def with_query_tokens(self, pool: Pool) -> Pool:
        """The pool with the (Q, T) tokens of its queries' whole texts, padded with -1."""
        rows = self.tokens_of(pool, pool.queries)
        found = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int64)
        for line, row in enumerate(rows):
            found[line, : len(row)] = row
        return replace(pool, query_tokens=found)
