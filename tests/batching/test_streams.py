"""The positives and negatives that an epoch uses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nearfield.arrays import Ragged
from nearfield.batching import SingleSourceConfig
from nearfield.batching.streams import SourceExamples, choose, draw, make_streams, margin_weights
from nearfield.errors import BadInputError


def test_choose_is_uniform_and_keeps_the_order() -> None:
    random = np.random.default_rng(0)
    lists = Ragged.from_lists([np.arange(6)] * 3000 + [[7]] + [[]])
    counts: Counter[int] = Counter()
    for _ in range(2):
        places = choose(lists, 2, random)
        assert (np.diff(places) > 0).all()
        owners = lists.owners()[places]
        assert np.bincount(owners, minlength=3002).tolist() == [2] * 3000 + [1, 0]
        counts.update(lists.values[places].tolist())
    assert all(counts[item] == pytest.approx(2000, rel=0.1) for item in range(6))
    assert choose(lists, 6, random).tolist() == list(range(len(lists.values)))


def test_balanced_margins_take_bins_and_not_pairs_uniformly() -> None:
    """TAS-B's test: margins 0.1 (90 pairs) and 5.0 (10 pairs), two bins: half of the draws are of the second."""
    count = 10_000
    margins = np.tile(np.repeat([0.1, 5.0], [90, 10]), count)
    lists = Ragged(np.arange(count + 1) * 100, np.tile(np.arange(100), count))
    weights = margin_weights(lists, margins, 2)
    drawn = lists.values[choose(lists, 1, np.random.default_rng(0), weights)]
    assert (drawn >= 90).mean() == pytest.approx(0.5, abs=0.02)
    uniform = lists.values[choose(lists, 1, np.random.default_rng(0))]
    assert (uniform >= 90).mean() == pytest.approx(0.1, abs=0.02)


def test_bins_of_margins_are_a_querys_own() -> None:
    """By hand: bins of the first list are [0, 1), [1, 2]; all margins of the second are one bin; the last is unknown."""
    lists = Ragged.from_lists([[1, 2, 3], [4, 5], [6, 7]])
    margins = np.array([0.0, 0.5, 2.0, 9.0, 9.0, np.nan, 1.0])
    assert margin_weights(lists, margins, 2).tolist() == [0.5, 0.5, 1.0, 0.5, 0.5, 1.0, 1.0]


def test_margins_are_those_to_the_chosen_positive() -> None:
    count = 4000
    source = SourceExamples(
        0,
        "mined",
        np.arange(count),
        np.arange(count),
        Ragged.single(np.arange(count) + count),
        Ragged(np.arange(count + 1) * 4, np.tile(np.arange(4), count) + 3 * count),
        positive_scores=np.full(count, 0.9),
        negative_scores=np.tile([0.8, 0.8, 0.8, 0.1], count),
    )
    config = SingleSourceConfig(negative_choice="balanced_margins", margin_bins=2)
    rows, _, _ = draw(make_streams([source], {})[0], config, np.random.default_rng(0))
    assert (rows.negatives.values == 3 * count + 3).mean() == pytest.approx(0.5, abs=0.04)


def test_margins_need_scores() -> None:
    source = SourceExamples(
        0, "a", np.arange(2), np.arange(2), Ragged.single(np.arange(2, 4)), Ragged.from_lists([[5, 6], [7]])
    )
    with pytest.raises(BadInputError, match="no teacher's scores"):
        SingleSourceConfig(negative_choice="balanced_margins").build().plan([source], 0, 0)


def test_labelled_examples_get_positives_of_their_label() -> None:
    labels = np.array([0, 1, 0, 2, 1, 0, 0])
    none = Ragged.empty(7)
    source = SourceExamples(0, "topics", np.arange(7), np.arange(7) + 50, none, none, labels=labels)
    stream = make_streams([source], {})[0]
    seen: dict[int, Counter[int]] = {row: Counter() for row in range(7)}
    for turn in range(2000):
        rows, usable, dropped = draw(stream, SingleSourceConfig(positives=2), np.random.default_rng(turn))
        assert usable.tolist() == [True, True, True, False, True, True, True]
        assert dropped == {"no other example has its label": 1}
        assert rows.positives.lengths.tolist() == [2, 1, 2, 0, 1, 2, 2]
        for row in range(7):
            mates = rows.positives[row] - 50
            assert row not in mates
            assert (labels[mates] == labels[row]).all()
            assert len(set(mates.tolist())) == len(mates)
            seen[row].update(mates.tolist())
    assert all(seen[0][mate] == pytest.approx(4000 / 3, rel=0.1) for mate in (2, 5, 6))
    assert rows.label.tolist() == labels.tolist()


def test_graded_pairs_keep_their_scores() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.3])
    source = SourceExamples(
        0, "sts", np.arange(4), np.arange(4), Ragged.single(np.arange(4) + 10), Ragged.empty(4), scores=scores
    )
    epoch = SingleSourceConfig(batch_size=2).build().plan([source], 0, 0)
    assert epoch.rows.score.tolist() == scores[epoch.rows.example].tolist()


def test_pools_join_sources() -> None:
    def make(number: int, name: str, labels: list[int] | None) -> SourceExamples:
        count = 3
        return SourceExamples(
            number, name, np.arange(count) + 10 * number, np.arange(count) + 100 * number, Ragged.single(np.arange(count) + 100 * number + 50), Ragged.empty(count),
            labels=None if labels is None else np.array(labels),
        )  # fmt: skip

    streams = make_streams([make(0, "a", None), make(1, "b", [4, 4, 5]), make(2, "c", None)], {"ac": ("a", "c")})
    assert [stream.name for stream in streams] == ["ac", "b"]
    assert streams[0].source.tolist() == [0, 0, 0, 2, 2, 2]
    assert streams[0].examples.tolist() == [0, 1, 2, 20, 21, 22]
    assert streams[0].labels is None
    both = make_streams([make(0, "a", None), make(1, "b", [4, 4, 5])], {"ab": ("b", "a")})
    assert both[0].labels is not None and both[0].labels.tolist() == [-1, -1, -1, 4, 4, 5]
    with pytest.raises(BadInputError, match="'x', which is not trained on"):
        make_streams([make(0, "a", None)], {"p": ("x",)})
    with pytest.raises(BadInputError, match="the name of a source"):
        make_streams([make(0, "a", None), make(1, "b", None)], {"a": ("b",)})
