"""Probes: balanced, disjoint, and readable only by what carries the label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from nearfield.evaluation import SuiteConfig, evaluate
from nearfield.methods.probing import EATERS, EVENTS, LENGTHS, PROBES, ProbingTasks, make_probe
from tests.evaluation.conftest import build_model


def _accuracy(train: np.ndarray, labels: list[int], test: np.ndarray, truth: list[int]) -> float:
    return float(LogisticRegression(max_iter=300).fit(train, labels).score(test, truth))


def _bags(texts: list[str], words: list[str]) -> np.ndarray:
    place = {word: i for i, word in enumerate(words)}
    found = np.zeros((len(texts), len(words)))
    for row, text in enumerate(texts):
        for word in text.split():
            if word in place:
                found[row, place[word]] += 1
    return found


@pytest.mark.parametrize("probe", PROBES)
def test_classes_are_balanced_and_parts_share_no_sentence(probe: str) -> None:
    parts = [make_probe(probe, 600, part) for part in (0, 1)]
    for texts, labels in parts:
        assert len(set(texts)) == len(texts) >= 500
        counts = Counter(labels)
        assert set(counts) == set(range(PROBES[probe][0])) and max(counts.values()) - min(counts.values()) <= 1
    assert not set(parts[0][0]) & set(parts[1][0])
    assert parts[0] == make_probe(probe, 600, 0) != make_probe(probe, 600, 0, seed=1)


@pytest.mark.parametrize("probe", PROBES)
def test_random_features_are_at_chance(probe: str) -> None:
    rng = np.random.default_rng(0)
    (train, labels), (test, truth) = (make_probe(probe, 600, part) for part in (0, 1))
    got = _accuracy(rng.normal(size=(len(train), 16)), labels, rng.normal(size=(len(test), 16)), truth)
    chance = 1 / PROBES[probe][0]
    assert abs(got - chance) < 3 * np.sqrt(chance * (1 - chance) / len(test)) + 0.01


def test_a_length_bin_tells_length_and_nothing_of_tense_and_words_tell_no_order() -> None:
    def bins(texts: list[str]) -> np.ndarray:
        sizes = np.array([len(text.split()) for text in texts])
        return np.array([(sizes >= low) & (sizes <= high) for low, high in LENGTHS], dtype=float).T

    for probe, low, high in (("Length", 1.0, 1.0), ("Tense", 0.4, 0.6)):
        (train, labels), (test, truth) = (make_probe(probe, 600, part) for part in (0, 1))
        assert low <= _accuracy(bins(train), labels, bins(test), truth) <= high
    (train, labels), (test, truth) = (make_probe("BigramShift", 1200, part) for part in (0, 1))
    words = sorted({word for text in train for word in text.split()})
    assert abs(_accuracy(_bags(train, words), labels, _bags(test, words), truth) - 0.5) < 0.06


def test_what_carries_a_label_is_there() -> None:
    texts, labels = make_probe("WordContent", 200, 1)
    assert all(
        set(text.split()) & {EATERS[label], f"{EATERS[label]}s", "children"}
        for text, label in zip(texts, labels, strict=True)
    )
    texts, labels = make_probe("Depth", 200, 0)
    assert all(text.split().count("of") == label + 1 for text, label in zip(texts, labels, strict=True))
    assert len({len(text.split()) for text in texts}) <= 4
    texts, labels = make_probe("CoordinationInversion", 200, 0)
    for text, label in zip(texts, labels, strict=True):
        first, second = next(pair for pair in EVENTS if pair[0] in text and pair[1] in text)
        assert (text.index(first) > text.index(second)) == bool(label)


@pytest.mark.filterwarnings("ignore")
def test_probes_run_as_tasks_of_a_suite(tmp_path: Path) -> None:
    model = build_model(tmp_path / "tiny")
    suite = SuiteConfig(name="p", tasks=[ProbingTasks(only=["Length", "Tense"], sentences=120, samples=10)])
    result = evaluate(str(model), suite, tmp_path / "results")
    assert result.failures == {} and set(result.scores) == {"ProbeLength", "ProbeTense"}
    assert result.scores["ProbeLength"]["default"] > 0.3
