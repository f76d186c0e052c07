"""LIMIT: the data's promises, its graph, and what BM25 makes of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nearfield.evaluation import SuiteConfig, evaluate
from nearfield.methods.capacity import (
    PUBLISHED,
    TEMPERATURE,
    _loss_and_gradient,
    _start,
    best_accuracies,
    published_fit,
    solvable,
)
from nearfield.methods.limit import LimitTask, graph_density, items, make_limit, pairs_of, query_strength


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
    assert all(abs(published_fit(d) - documents) < 5 for d, documents in PUBLISHED.items() if d <= 20)
    assert solvable(7, 4, seeds=3)
    assert max(best_accuracies(14, 4, seeds=[0], longest=3000)) < 1.0


@pytest.mark.filterwarnings("ignore")
def test_bm25_finds_what_vectors_may_not(tmp_path: Path) -> None:
    suite = SuiteConfig(name="limit", tasks=[LimitTask(name="LIMITMade")])
    result = evaluate("bm25", suite, tmp_path)
    assert result.failures == {} and result.scores["LIMITMade"]["default"] > 0.95


def test_the_written_gradient_is_that_of_autograd() -> None:
    pairs = torch.tensor(list(itertools.combinations(range(7), 2)))
    vectors = torch.stack([_start(len(pairs), 7, 3, seed) for seed in (0, 1)]).double().requires_grad_()
    queries, corpus = vectors[:, : len(pairs)], vectors[:, len(pairs) :]
    logs = torch.log_softmax(queries @ corpus.mT / TEMPERATURE, dim=2)
    expected = -logs.gather(2, pairs.expand(2, -1, -1)).mean(dim=(1, 2))
    expected.sum().backward()
    loss, gradient = _loss_and_gradient(vectors.detach(), pairs.expand(2, -1, -1), len(pairs))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, vectors.grad)


def test_starts_side_by_side_are_each_what_a_plain_loop_makes_of_it() -> None:
    documents, steps = 9, 200
    pairs = torch.tensor(list(itertools.combinations(range(documents), 2)))
    expected = []
    for seed in range(3):
        vectors = _start(len(pairs), documents, 3, seed)
        queries, corpus = (part.clone().requires_grad_() for part in vectors.split([len(pairs), documents]))
        optimizer = torch.optim.Adam([queries, corpus], lr=0.01)
        best = 0.0
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            (-torch.log_softmax(queries @ corpus.T / TEMPERATURE, dim=1).gather(1, pairs).mean()).backward()
            optimizer.step()
            with torch.no_grad():
                for part in (queries, corpus):
                    part.div_(part.norm(dim=1, keepdim=True))
                if step % 50 == 0:
                    top = (queries @ corpus.T).topk(2, dim=1).indices
                    best = max(best, float((top[:, :, None] == pairs[:, None]).any(dim=1).double().mean()))
        expected.append(best)
    found = best_accuracies(documents, 3, seeds=range(3), longest=steps)
    assert found == pytest.approx(expected, abs=0.02) and max(expected) < 1.0
    # One that ends early leaves the others as they were.
    assert best_accuracies(documents, 3, seeds=[1], longest=steps) == pytest.approx(found[1:2], abs=0.02)
