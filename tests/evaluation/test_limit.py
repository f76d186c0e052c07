"""LIMIT: the data's promises, its graph, and what BM25 makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nearfield.analysis.capacity import PUBLISHED, best_accuracy, solvable
from nearfield.evaluation import SuiteConfig, evaluate
from nearfield.evaluation.config import LimitTask
from nearfield.evaluation.limit import graph_density, items, make_limit, pairs_of, query_strength


def test_each_query_has_two_documents_and_no_other_names_its_thing() -> None:
    data = make_limit(LimitTask(distractors=20))
    assert len(data.queries) == 1000 and len(data.corpus) == 66
    words = {person: set(re.findall(r"[a-z]+", text)) for person, text in data.corpus.items()}
    for query, text in data.queries.items():
        thing = text.removeprefix("Who likes ").removesuffix("?")
        assert {person for person, own in words.items() if thing in own} == set(data.relevant[query])
    counts = {len(re.findall(r", | and ", text)) + 1 for text in data.corpus.values()}
    assert counts == {45} and make_limit(LimitTask(distractors=20)) == data != make_limit(LimitTask(seed=1))


def test_the_graph_of_queries_has_the_published_density_and_strength() -> None:
    relevant = make_limit(LimitTask()).relevant
    assert graph_density(relevant) == pytest.approx(0.0855, abs=1e-3)
    assert query_strength(relevant) == pytest.approx(28.47, abs=0.05)


def test_patterns_and_items() -> None:
    rng = np.random.default_rng(0)
    assert pairs_of("cycle", 5, 9, rng) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
    assert pairs_of("disjoint", 5, 9, rng) == [(0, 1), (2, 3)]
    assert len(set(pairs_of("random", 10, 30, rng))) == 30
    found = items()
    assert len(found) > 1850 and len({item[:5] for item in found}) == len(found)


def test_few_dimensions_cannot_serve_all_pairs() -> None:
    assert PUBLISHED[4] == 10
    assert solvable(7, 4, seeds=3)
    assert best_accuracy(14, 4, seed=0, longest=3000) < 1.0


@pytest.mark.filterwarnings("ignore")
def test_bm25_finds_what_vectors_may_not(tmp_path: Path) -> None:
    suite = SuiteConfig(name="limit", tasks=[LimitTask(name="LIMITMade")])
    result = evaluate("bm25", suite, tmp_path)
    assert result.failures == {} and result.scores["LIMITMade"]["default"] > 0.95
