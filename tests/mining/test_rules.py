"""Every rule against a double loop: negative positives, ties at the bar, positives that are not found, nesting."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nearfield.arrays import Ragged
from nearfield.errors import BadInputError
from nearfield.mining import config as kinds
from nearfield.mining.rules import MinedNegatives, draw, mine, select
from nearfield.mining.search import Neighbours
from tests.mining import reference


def bar_of(rule: kinds.RuleConfig, a: float) -> float:
    if isinstance(rule, kinds.AbsoluteRule):
        return rule.below
    if isinstance(rule, kinds.MarginToPositiveRule):
        return a - rule.margin
    if isinstance(rule, kinds.PercentOfPositiveRule):
        return rule.share * a if a >= 0 else a - abs(a) * (1 - rule.share)
    if isinstance(rule, kinds.AdaptiveMarginRule):
        return a - (rule.at_zero + (rule.at_one - rule.at_zero) * min(max(a, 0.0), 1.0))
    return np.inf


def by_loops(queries: Any, documents: Any, positives: list[set[int]], rule: kinds.RuleConfig, count: int, depth: int) -> Any:  # fmt: skip
    """The negatives of each query: [(row, score, rank)]."""
    scores = reference.all_scores(queries, documents)
    result = []
    for line, mine_ in zip(scores, positives, strict=True):
        a = min(float(line[row]) for row in mine_)
        order = sorted((row for row in range(len(line)) if row not in mine_), key=lambda row: (-line[row], row))[:depth]
        kept = []
        for rank, row in enumerate(order):
            if isinstance(rule, kinds.ShiftedRule) and rank < rule.skip:
                continue
            if float(line[row]) < bar_of(rule, a) or bar_of(rule, a) == np.inf:
                kept.append((row, line[row], rank))
        result.append(kept[:count])
    return result


RULES: list[kinds.RuleConfig] = [
    kinds.NaiveRule(),
    kinds.ShiftedRule(skip=3),
    kinds.AbsoluteRule(below=0.25),
    kinds.MarginToPositiveRule(margin=0.125),
    kinds.PercentOfPositiveRule(share=0.75),
    kinds.AdaptiveMarginRule(at_zero=0.5, at_one=0.25),
]


def triples(mined: MinedNegatives) -> list[list[tuple[int, float, int]]]:
    return [
        [
            (int(mined.lists.values[i]), mined.scores[i], int(mined.ranks[i]))
            for i in range(*mined.lists.offsets[q : q + 2])
        ]
        for q in range(len(mined.lists))
    ]


@st.composite
def problems(draw: st.DrawFn) -> Any:
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    n, m, d = draw(st.integers(1, 6)), draw(st.integers(3, 40)), draw(st.integers(1, 6))
    # Quarters: scores and bars are exact, so that ties at a bar happen.
    queries, documents = (random.integers(-2, 3, (rows, d)).astype(np.float32) / 2 for rows in (n, m))
    positives = [set(random.choice(m, random.integers(1, 3), replace=False).tolist()) for _ in range(n)]
    return queries, documents, positives, draw(st.integers(1, 5)), draw(st.integers(5, 40))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@settings(max_examples=40)
@given(problem=problems())
def test_rules_equal_a_double_loop(rule: Any, problem: Any) -> None:
    queries, documents, positives, count, depth = problem
    mined = mine(
        queries,
        documents,
        Ragged.from_lists(map(sorted, positives)),
        rules=[rule.build()],
        negatives=count,
        depth=depth,
    )
    assert triples(mined) == by_loops(queries, documents, positives, rule, count, depth)


def one(scores: list[float], positive: float, rule: kinds.RuleConfig, count: int = 10, seed: int = 0) -> list[int]:
    """The ranks that a rule leaves of one query's candidates."""
    found = Neighbours(np.arange(len(scores))[None], np.array([scores], np.float32))
    lists = Ragged.from_lists([[100]])
    mined = select(found, lists, np.array([positive], np.float32), rules=[rule.build()], negatives=count, seed=seed)
    return [int(rank) for rank in mined.ranks]


def test_a_percentage_of_a_negative_score_lies_below_it() -> None:
    """-0.5 less 25 % of its size is -0.625; 0.75 * -0.5 = -0.375 would let through what scores above the positive."""
    assert one([-0.4, -0.5, -0.625, -0.75], -0.5, kinds.PercentOfPositiveRule(share=0.75)) == [3]


def test_a_tie_at_the_bar_is_no_negative() -> None:
    assert one([0.75, 0.5, 0.25], 1.0, kinds.PercentOfPositiveRule(share=0.5)) == [2]
    assert one([0.75, 0.5, 0.25], 1.0, kinds.MarginToPositiveRule(margin=0.5)) == [2]
    assert one([0.75, 0.5, 0.25], 1.0, kinds.AbsoluteRule(below=0.5)) == [2]


def test_a_positive_that_is_not_among_the_candidates_still_sets_the_bar() -> None:
    random = np.random.default_rng(0)
    documents = random.standard_normal((200, 8)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    scores = reference.all_scores(documents[:1], documents)[0]
    last = int(np.argmin(scores))
    mined = mine(documents[:1], documents, Ragged.from_lists([[last]]), rules=[kinds.PercentOfPositiveRule().build()],
                 negatives=3, depth=20, excluded=Ragged.from_lists([[0]]))  # fmt: skip
    assert mined.positive[0] == scores[last] and not len(mined.lists.values)
    assert mined.short.tolist() == [0]


def test_the_strictest_of_several_positives_is_the_anchor() -> None:
    documents = np.array([[1.0], [0.5], [0.75], [0.25]], np.float32)
    rule = kinds.MarginToPositiveRule(margin=0.0)
    mined = mine(np.ones((1, 1), np.float32), documents, Ragged.from_lists([[0, 1]]), rules=[rule.build()], negatives=5, depth=4)  # fmt: skip
    assert mined.lists.values.tolist() == [3]
    assert (mined.positive[0], mined.best_positive[0]) == (0.5, 1.0)


def test_kept_sets_are_nested_as_the_share_falls() -> None:
    random = np.random.default_rng(1)
    documents = random.standard_normal((400, 12)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries, positives = documents[:60], Ragged.from_lists([[i, i + 100] for i in range(60)])
    sets = []
    for share in (0.98, 0.95, 0.90):
        mined = mine(queries, documents, positives, rules=[kinds.PercentOfPositiveRule(share=share).build()], negatives=400, depth=400)  # fmt: skip
        sets.append([set(mined.lists[i].tolist()) for i in range(60)])
    for wide, narrow in itertools.pairwise(sets):
        assert all(few <= many for few, many in zip(narrow, wide, strict=True))
    assert sum(map(len, sets[2])) < sum(map(len, sets[0]))


def test_the_adaptive_margin_moves_with_the_positive() -> None:
    rule = kinds.AdaptiveMarginRule(at_zero=0.5, at_one=0.25)
    assert one([0.8, 0.75, 0.7], 1.0, rule) == [2]
    assert one([0.2, 0.125, 0.1], 0.5, rule) == [2]
    assert one([-0.4, -0.5, -0.6], 0.0, rule) == [2]
    assert one([-1.4, -1.5, -1.6], -1.0, rule) == [2]


def test_the_window_of_ranks_counts_from_nought_and_draws_evenly() -> None:
    scores = np.linspace(1, 0, 120).tolist()
    window = kinds.RankWindowRule()
    assert one(scores, 1.0, window, count=100) == list(range(50, 100))
    drawn = np.bincount(np.concatenate([one(scores, 1.0, window, 7, seed) for seed in range(600)]), minlength=120)
    assert drawn.sum() == 4200 and not drawn[:50].any() and not drawn[100:].any()
    expected = 4200 / 50
    chi = ((drawn[50:100] - expected) ** 2 / expected).sum()
    assert chi < 86  # 0.1 % of a chi-squared of 49


def test_sampled_top_k_draws_by_a_softmax_over_the_first_kept() -> None:
    scores = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    rule = kinds.SampledTopKRule(k=4, temperature=0.2)
    n = 4000
    drawn = np.bincount([one(scores, 1.0, rule, 1, seed)[0] for seed in range(n)], minlength=6)
    share = np.exp(np.array(scores[:4]) / 0.2)
    expected = n * share / share.sum()
    assert not drawn[4:].any()
    assert ((drawn[:4] - expected) ** 2 / expected).sum() < 16.3  # 0.1 % of a chi-squared of 3
    first = kinds.SampledTopKRule(k=4, keep_first=True)
    ranks = [one(scores, 1.0, first, 2, seed) for seed in range(50)]
    assert all(0 in pair and len(pair) == 2 for pair in ranks) and len({tuple(pair) for pair in ranks}) == 3


def test_sampling_follows_other_rules_and_the_seed() -> None:
    found = Neighbours(np.arange(20)[None].repeat(30, 0), np.linspace(1, 0, 20, dtype=np.float32)[None].repeat(30, 0))
    lists, scores = Ragged.from_lists([[99]] * 30), np.full(30, 0.8, np.float32)
    rules = [kinds.PercentOfPositiveRule(share=0.9).build(), kinds.SampledTopKRule(k=5, temperature=9).build()]

    def run(seed: int, *names: str) -> MinedNegatives:
        return select(found, lists, scores, rules=rules, negatives=2, seed=seed, names=names)

    mined = run(0, "a")
    first = int((found.scores[0] >= 0.72).sum())
    assert set(mined.ranks.tolist()) == set(range(first, first + 5))
    np.testing.assert_array_equal(mined.lists.values, run(0, "a").lists.values)
    assert (
        mined.lists.values.tolist() != run(1, "a").lists.values.tolist()
        and mined.lists.values.tolist() != run(0, "b").lists.values.tolist()
    )


def test_a_draw_of_one_query_does_not_depend_on_what_others_have() -> None:
    kept = np.ones((3, 8), dtype=bool)
    fewer = kept.copy()
    fewer[0, 2:] = False
    weights = np.zeros((3, 8))
    np.testing.assert_array_equal(draw(kept, weights, 3, 5, ())[1:], draw(fewer, weights, 3, 5, ())[1:])
    assert draw(fewer, weights, 3, 5, ())[0].sum() == 2


def test_the_consistency_filter_is_a_rank_count_and_finds_shuffled_pairs() -> None:
    """E5: of 30 % shuffled pairs at least 95 % go and at least 80 % of the true ones stay, with an oracle embedder."""
    random = np.random.default_rng(2)
    n = 400
    documents = random.standard_normal((n, 64)).astype(np.float32)
    queries = documents + random.standard_normal((n, 64)).astype(np.float32) * 0.5
    queries, documents = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, documents))
    pair = np.arange(n)
    shuffled = random.choice(n, int(0.3 * n), replace=False)
    pair[shuffled] = pair[np.roll(shuffled, 1)]
    lists = Ragged.from_lists([[row] for row in pair])
    for top in (1, 2, 51):
        mined = mine(queries, documents, lists, rules=[kinds.ConsistencyRule(top=top).build()], negatives=4, depth=60)
        scores = reference.all_scores(queries, documents)
        ranks = (scores > scores[np.arange(n), pair][:, None]).sum(axis=1)
        np.testing.assert_array_equal(mined.kept, ranks < top)
        assert not mined.lists.lengths[~mined.kept].any()
        assert mined.counts[0].dropped == int((ranks >= top).sum())
    two = mine(queries, documents, lists, rules=[kinds.ConsistencyRule(top=2).build()], negatives=4, depth=60)
    true = np.ones(n, dtype=bool)
    true[shuffled] = False
    assert two.kept[~true].mean() <= 0.05 and two.kept[true].mean() >= 0.8


def test_the_consistency_filter_takes_the_best_positive_and_forgives_ties() -> None:
    documents = np.array([[0.2], [0.9], [0.9], [0.5]], np.float32)
    rule = kinds.ConsistencyRule(top=1).build()
    query = np.ones((1, 1), np.float32)
    assert mine(query, documents, Ragged.from_lists([[0, 1]]), rules=[rule], negatives=1, depth=4).kept.tolist() == [
        True
    ]
    assert mine(query, documents, Ragged.from_lists([[3]]), rules=[rule], negatives=1, depth=4).kept.tolist() == [False]


def test_what_each_rule_took_is_counted_and_short_queries_are_not_padded() -> None:
    rules = [kinds.ShiftedRule(skip=2).build(), kinds.AbsoluteRule(below=0.5).build()]
    found = Neighbours(np.array([[0, 1, 2, 3], [0, 1, -1, -1]]), np.array([[0.9, 0.8, 0.7, 0.1], [0.4, 0.3, -np.inf, -np.inf]], np.float32))  # fmt: skip
    mined = select(found, Ragged.from_lists([[7], [7]]), np.ones(2, np.float32), rules=rules, negatives=1)
    assert [(c.kind, c.removed, c.left, c.short) for c in mined.counts] == [("shifted", 4, 2, 1), ("absolute", 1, 1, 1)]
    assert mined.candidates == 6 and mined.short.tolist() == [1] and mined.lists.values.tolist() == [3]


def test_every_kind_says_its_own_name() -> None:
    found = Neighbours(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    for rule in (*RULES, kinds.RankWindowRule(), kinds.SampledTopKRule(), kinds.ConsistencyRule()):
        mined = select(found, Ragged.from_lists([[1]]), np.ones(1, np.float32), rules=[rule.build()], negatives=1)
        assert mined.counts[0].kind == rule.kind  # type: ignore[attr-defined]


def test_a_query_without_a_positive_is_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(BadInputError, match="query 1 has no positive"):
        mine(vectors[:2], vectors, Ragged.from_lists([[0], []]), rules=[], negatives=1, depth=2)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"rules": [{"kind": "rank_window", "start": 9, "stop": 9}]}, "is empty"),
        ({"rules": [{"kind": "sampled_top_k"}, {"kind": "naive"}]}, "must be the last"),
        ({"rules": [{"kind": "rank_window"}, {"kind": "sampled_top_k"}]}, "only one rule can draw"),
        ({"rules": [{"kind": "rank_window"}], "depth": 99}, "less than the 100 candidates"),
        ({"rules": [{"kind": "percent_of_positive", "share": 1.5}]}, "less than or equal to 1"),
        ({"teacher": {"kind": "ensemble", "members": [{"kind": "bm25"}] * 2, "weights": [1.0]}}, "1 weights for 2"),
    ],
)
def test_settings_that_cannot_be(settings_: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        kinds.MiningConfig.model_validate(settings_)


def test_a_search_is_as_deep_as_the_rules_need() -> None:
    assert kinds.MiningConfig().searched == 100
    assert kinds.MiningConfig(rules=(kinds.ConsistencyRule(top=300),)).searched == 300
