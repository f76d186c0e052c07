"""Whether the data and the objective can teach anything at all: looked for before the first step, without an encoder.

Embeddings stand in for what an encoder would give: drawn at random, with positives near their queries, and all near each
other. Texts of equal tokens have equal ones. Where the gradient of a batch's loss is 0 whatever they are, no encoder learns
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nearfield.batching.plan import Batch, Plan
from nearfield.batching.planner import Rows
from nearfield.notices import Notice
from nearfield.objectives.objective import Objective
from nearfield.randomness import derive_seed
from nearfield.training.chunks import Pool, cut_batch
from nearfield.training.exchange import contrastive_batch
from nearfield.training.feed import Feed

BATCHES = 64
"""Batches of a source that are looked at, at most; the first that teaches something ends it."""
EXAMPLES = 128
"""Examples of a batch that are looked at first; all of it only where these teach nothing."""
NOTHING = 1e-9
"""Gradients of float64 below this are what rounding leaves of 0."""

_WHY = (
    "Explicit-only objectives want negatives, graded ones scores that differ, labelled ones labels that several texts have; "
    "masks may leave out every negative, and weights may all be 0."
)


def teaching_notices(
    objective: Objective,
    feed: Feed,
    plans: Sequence[Plan],
    known_positives: Callable[[int], Rows],
    names: Mapping[int, str],
    width: int,
) -> Iterator[Notice]:
    """What no encoder of ``width`` could learn from; ``names`` are those of the sources by number."""
    yield from _same_texts(feed)
    if feed.token_task is not None:
        return  # losses on tokens are the encoder's own
    objective = objective.double()
    total = sum(map(len, plans))
    idle: list[str] = []
    found = batches_by_source(plans)
    for source, steps in found.items():
        some = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, BATCHES).round().astype(int)).tolist()]
        probe = _Probe(objective, feed, known_positives, width, total)
        if not any(probe.teaches(plans[epoch].batch(step), number) for epoch, step, number in some):
            idle.append(names.get(source, "batches of several sources"))
    if len(idle) == len(found):
        yield Notice(
            "nothing-to-learn",
            "the gradient of the loss is 0 whatever the encoder gives: nothing can be learnt from these batches",
            _WHY,
            blocks=True,
        )
        return
    for name in idle:
        yield Notice(
            "source-teaches-nothing", f"{name}: the gradient of the loss is 0 whatever the encoder gives", _WHY
        )


def batches_by_source(plans: Sequence[Plan]) -> dict[int, list[tuple[int, int, int]]]:
    """Source, or ``SEVERAL_SOURCES`` -> (epoch, step, number of the step in the run) of its batches."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    number = 0
    for epoch, plan in enumerate(plans):
        for step, source in enumerate(plan.sources().tolist()):
            found.setdefault(source, []).append((epoch, step, number))
            number += 1
    return found


def _same_texts(feed: Feed) -> Iterator[Notice]:
    """Prompts that leave no room for the text."""
    for table in feed.tokens.tables:
        if feed.pictures is not None or len(table.rows) < 2:
            continue
        first = table.tokens(int(table.rows[0]))
        if all(np.array_equal(table.tokens(int(row)), first) for row in table.rows):
            yield Notice(
                "texts-all-the-same",
                f"all {len(table.rows):,} texts with the prompt {table.prompt[:80]!r} are the same {len(first)} tokens: the "
                "prompt takes all that is read of a text",
                "Shorten the prompt, or raise training.max_length.",
                blocks=True,
            )


class _Probe:
    """Batches of the plan with embeddings that nobody encoded."""

    def __init__(
        self,
        objective: Objective,
        feed: Feed,
        known_positives: Callable[[int], Rows],
        width: int,
        steps: int,
    ) -> None:
        self.objective, self.feed, self.known_positives = objective, feed, known_positives
        self.width, self.steps = width, steps

    def teaches(self, batch: Batch, number: int) -> bool:
        """Whether some embeddings have a gradient."""
        sizes = sorted({min(EXAMPLES, len(batch.query)), len(batch.query)})
        return any(self._some(cut_batch(batch, 0, size), number) for size in sizes)

    def _some(self, batch: Batch, number: int) -> bool:
        pool = self.feed.pool(batch)
        if self.objective.wants_tokens:
            pool = self.feed.with_query_tokens(pool)
        known = [self.known_positives(int(query)) for query in batch.query]
        texts = self._texts(pool)
        for vectors in self._embeddings(pool, texts):
            leaf = vectors.requires_grad_()
            seen = contrastive_batch(pool, leaf[torch.from_numpy(texts)], known, draw=number, guide=self.feed.guide)
            loss = self.objective.forward(replace(seen, progress=number / self.steps))
            (gradient,) = loss.gradients([leaf])
            if not bool((gradient.abs() <= NOTHING).all()):
                return True
        return False

    def _texts(self, pool: Pool) -> Rows:
        """(n,) the number of what an encoder would see of each text of the pool."""
        places = np.arange(len(pool.items))
        rows = self.feed.tokens_of(pool, places)
        shares = np.zeros(len(rows)) if pool.deleted is None else pool.deleted
        numbers: dict[tuple[object, ...], int] = {}
        # A picture's tokens say nothing of it: there each item is another.
        items = pool.items if self.feed.pictures is not None else np.zeros(len(rows), dtype=np.int64)
        keys = zip((row.tobytes() for row in rows), items.tolist(), shares.tolist(), strict=True)
        return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)

    def _embeddings(self, pool: Pool, texts: Rows) -> Iterator[Tensor]:
        """Unrelated ones; positives near their queries; all near each other."""
        draw = torch.Generator().manual_seed(derive_seed(0, "teaching"))
        count = int(texts.max(initial=-1)) + 1
        apart = torch.randn(count, self.width, generator=draw, dtype=torch.float64)
        yield apart.clone()
        near = apart.clone()
        positives = np.flatnonzero(pool.is_positive)
        near[texts[pool.documents[positives]]] += 2 * apart[texts[pool.queries[pool.owner[positives]]]]
        yield near
        yield apart[:1] + 0.1 * apart
