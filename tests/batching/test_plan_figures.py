"""How hard batches are, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from nearfield.arrays import Ragged, Rows
from nearfield.batching import SingleSourceConfig
from nearfield.batching.config import SharesSampling
from nearfield.batching.plan import measure_hardness, positives_as_negatives
from nearfield.batching.planner import EpochBatches
from nearfield.batching.streams import PlannedRows
from tests.batching.making import known_of, make_apart, make_source, make_vectors

VECTORS = make_vectors()


def by_loops(epoch: EpochBatches) -> tuple[float, float, int]:
    """Mean similarity, share above the own positive, pairs: all batches, all rows, one pair at a time in float64."""
    scores, above = [], []
    for number in range(len(epoch)):
        rows = epoch.batch(number)
        for i in range(len(rows)):
            query = VECTORS("query", rows.query[i : i + 1])[0].astype(np.float64)
            own = query @ VECTORS("document", rows.positives[i][:1])[0].astype(np.float64)
            for j in range(len(rows)):
                document = rows.positives[j][:1]
                if document[0] in (rows.positives[i][0], rows.query[i]):
                    continue
                score = float(query @ VECTORS("document", document)[0].astype(np.float64))
                scores.append(score)
                above.append(score > own)
    return float(np.mean(scores)), float(np.mean(above)), len(scores)


def test_hardness_is_that_of_loops() -> None:
    epoch = SingleSourceConfig(batch_size=5).build().plan([make_apart(0, 25), make_apart(1, 12)], 0, 0)
    found = measure_hardness(epoch, VECTORS, 0)["hardness"]
    similarity, share, pairs = by_loops(epoch)
    assert found["batches"] == len(epoch) == 7
    assert found["pairs"] == pairs == 7 * 20
    assert found["planned_similarity"] == pytest.approx(similarity, abs=2e-6)
    assert found["planned_false_negatives"] == pytest.approx(share, abs=2e-6)
    assert found == measure_hardness(epoch, VECTORS, 0)["hardness"]


def test_a_document_that_is_ones_own_is_no_negative() -> None:
    """Where duplicates are allowed, a row's own document, or its query, in another row counts for nothing."""
    rows = PlannedRows.of(
        [0] * 3, np.arange(3), np.array([1, 2, 3]), Ragged.single(np.array([8, 8, 1])), Ragged.empty(3)
    )
    epoch = EpochBatches(rows, np.array([0, 3]))
    found = measure_hardness(epoch, VECTORS, 0)["hardness"]
    assert found["pairs"] == by_loops(epoch)[2] == 3
    assert found["planned_similarity"] == pytest.approx(by_loops(epoch)[0], abs=2e-6)
    assert found["planned_similarity_margin"] is None


def test_batches_that_are_alike_are_harder_than_random_ones() -> None:
    """Rows of one remainder are alike to this teacher: batches of one remainder beside random ones of the same source."""
    source = make_apart(0, 200)
    rows = PlannedRows.of([0] * 200, source.examples, source.queries, source.positives, source.negatives)
    order = np.argsort(source.queries % 5, kind="stable")
    hard = measure_hardness(EpochBatches(rows.take(order), np.arange(26) * 8), VECTORS, 0, batches=20)["hardness"]
    assert hard["batches"] == 20
    assert hard["planned_similarity"] - hard["planned_similarity_margin"] > hard["random_similarity"] + 0.2
    plain = measure_hardness(EpochBatches(rows, np.arange(26) * 8), VECTORS, 0)["hardness"]
    spread = plain["planned_similarity_margin"] + plain["random_similarity_margin"]
    assert abs(plain["planned_similarity"] - plain["random_similarity"]) < 2 * spread


def test_only_a_sample_is_asked_for() -> None:
    asked: list[int] = []

    def counting(role: str, items: Rows) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        asked.append(len(items))
        return VECTORS(role, items)

    epoch = SingleSourceConfig(batch_size=20).build().plan([make_apart(0, 200)], 0, 0)
    found = measure_hardness(epoch, counting, 0, batches=3, rows=6)["hardness"]
    assert (found["batches"], found["pairs"]) == (3, 3 * 6 * 5)
    assert set(asked) == {6} and len(asked) == 12


def test_nothing_to_measure() -> None:
    assert measure_hardness(EpochBatches.of([]), VECTORS, 0) == {}
    alone = PlannedRows.of([0], [0], [1], Ragged.single(np.array([2])), Ragged.empty(1))
    assert measure_hardness(EpochBatches.of([alone]), VECTORS, 0) == {}


def test_explicit_negatives_that_are_known_positives_are_counted() -> None:
    sources = [make_source(0, 30, 12, 1), make_source(1, 30, 12, 2)]
    known = known_of(sources)
    one = sources[0]
    count = len(one)
    rows = PlannedRows.of([0] * count, one.examples, one.queries, one.positives, one.negatives)
    made = EpochBatches(rows, np.arange(0, count + 1, 5))
    positives = known
    expected = sum(
        int(negative) in set(positives[int(query)].tolist())
        for query, negatives in zip(
            made.rows.query, [made.rows.negatives[row] for row in range(len(made.rows))], strict=True
        )
        for negative in negatives
    )
    assert positives_as_negatives(made, known) == expected > 0


def test_an_example_that_an_epoch_begun_anew_has_placed_is_not_dropped() -> None:
    """Of a small source that is repeated, what found no full batch at first finds one later."""
    sources = [make_apart(0, 18), make_apart(1, 64)]
    sampling = SharesSampling(shares={"source0": 0.5, "source1": 0.5}, exhausted="repeat")
    made = SingleSourceConfig(batch_size=8, sampling=sampling).build().plan(sources, 0, 0)
    small = made.rows.example[made.rows.source == 0]
    large = made.rows.example[made.rows.source == 1]
    assert len(small) > len(np.unique(small)), "it is repeated"
    unplaced = 18 - len(np.unique(small)) + 64 - len(np.unique(large))
    assert sum(made.dropped.values()) == unplaced
