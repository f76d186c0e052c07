"""Texts inside longer ones: against a plain double loop, at each length, and told apart from chance."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.arrays import Ragged
from nearfield.data import containment
from nearfield.data.containment import ContainmentIndex
from nearfield.data.decontaminate import DecontaminationConfig
from nearfield.data.near_duplicates import WordHashes, hash_words, words

KNOWN = WordHashes()
Found = set[tuple[int, int]]


def index_of(texts: Sequence[str], **changes: float) -> ContainmentIndex:
    return ContainmentIndex(hash_words(texts, KNOWN), DecontaminationConfig.model_validate(changes))


def pairs(index: ContainmentIndex, benchmark: Sequence[str]) -> Found:
    return {(i, j) for i, j in index.matches(hash_words(benchmark, KNOWN))[0].tolist()}


# The reference: loops over lists of words, for whole texts.


def stands_in(short: list[str], long: list[str]) -> bool:
    return any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))


def surprise(text: list[str], training: list[list[str]], copies: int) -> float:
    """Minus the logarithm of the probability of a text by its words, pairs and triples, of each of which ``copies`` are left out."""
    counts = Counter(tuple(t[i : i + n]) for t in training for n in (1, 2, 3) for i in range(len(t) - n + 1))
    total, different = sum(map(len, training)), len({word for t in training for word in t}) + 1

    def left(gram: list[str]) -> int:
        return max(counts[tuple(gram)] - copies, 0)

    prior, result = 20.0, 0.0
    for i in range(len(text)):
        p = (left(text[i : i + 1]) + 0.5) / (total + 0.5 * different)
        if i >= 1:
            p = (left(text[i - 1 : i + 1]) + prior * p) / (left(text[i - 1 : i]) + prior)
        if i >= 2:
            p = (left(text[i - 2 : i + 1]) + prior * p) / (left(text[i - 2 : i]) + prior)
        result -= math.log(min(p, 1.0))
    return result


def brute_force(training: Sequence[str], benchmark: Sequence[str], chance: float) -> Found:
    """Whole texts inside longer ones that are no chance. Those of which a word repeats are the caller's to leave out."""
    mine, theirs = [words(t) for t in training], [words(t) for t in benchmark]
    total = sum(map(len, mine))
    least = math.log(max(total, 1)) - math.log(chance)
    found: Found = set()
    for j, text in enumerate(theirs):
        hosts = [i for i, host in enumerate(mine) if 4 <= len(text) <= len(host) and stands_in(text, host)]
        if hosts and surprise(text, mine, len(hosts)) >= least:
            found |= {(i, j) for i in hosts}
    for i, text in enumerate(mine):
        hosts = [j for j, host in enumerate(theirs) if 4 <= len(text) < len(host) and stands_in(text, host)]
        if hosts and surprise(text, mine, 1) >= least:
            found |= {(i, j) for j in hosts}
    return found


TEXTS = st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=9, unique=True).map(" ".join), max_size=12)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([1e6, 1.0, 1e-3, 1e-9]))
def test_whole_texts_are_found_as_a_double_loop_finds_them(
    training: list[str], benchmark: list[str], chance: float
) -> None:
    index = index_of(training, inside=1.0)
    index.config = index.config.model_copy(update={"chance": chance})
    assert pairs(index, benchmark) == brute_force(training, benchmark, chance)


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS)
def test_all_that_is_found_agrees_as_far_as_it_says(training: list[str], benchmark: list[str]) -> None:
    """The words that agree in their order carry the share; whoever looks for a longest common sequence finds no fewer."""
    index = index_of(training, inside=0.5, chance=1.0)
    found, shares = index.matches(hash_words(benchmark, KNOWN))
    assert len({tuple(pair) for pair in found.tolist()}) == len(found)
    counts = Counter(word for text in training for word in words(text))
    rarity = {word: math.log((sum(counts.values()) + 1) / (counts[word] + 0.5)) for word in "abcdefghijklmnop"}
    for (i, j), share in zip(found.tolist(), shares.tolist(), strict=True):
        short, long = sorted((words(training[i]), words(benchmark[j])), key=len)
        best = [0.0] * (len(long) + 1)
        for word in short:
            before = best.copy()
            for k, other in enumerate(long):
                best[k + 1] = max(best[k], before[k + 1], before[k] + rarity[word] if word == other else 0.0)
        assert 0.5 <= share <= best[-1] / sum(rarity[word] for word in short) + 1e-9


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS)
def test_pieces_do_not_change_what_is_found(training: list[str], benchmark: list[str]) -> None:
    whole = index_of(training, chance=1.0).matches(hash_words(benchmark, KNOWN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearfield.data.near_duplicates._PIECE", 3)
        patch.setattr(containment, "_PIECE", 5)
        parts = index_of(training, chance=1.0).matches(hash_words(benchmark, KNOWN))
    assert np.array_equal(whole[0], parts[0])
    assert np.allclose(whole[1], parts[1])


# Plants at each length, in text whose words are as frequent as those of real text.


def text_of(pick: random.Random, length: int) -> str:
    """Words drawn by a Zipf law, 1 over the rank, of 20,000."""
    return " ".join(f"w{int(math.exp(pick.random() * math.log(20_000)))}" for _ in range(length))


@pytest.fixture(scope="module")
def training() -> list[str]:
    pick = random.Random(0)
    return [text_of(pick, pick.randint(5, 40)) for _ in range(4000)]


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10, 11, 12, 20])
def test_texts_of_each_length_are_found_inside_longer_ones(training: list[str], length: int) -> None:
    pick = random.Random(length)
    benchmark = [text_of(pick, length) for _ in range(200)]
    hosts = [f"Question: {text} Answer: {pick.choice(training)}" for text in benchmark]
    found = pairs(index_of([*training, *hosts]), benchmark)
    assert sum((len(training) + j, j) in found for j in range(200)) >= 190
    # And the other way round: a short training text in a long benchmark text.
    found = pairs(index_of([*training, *benchmark]), hosts)
    assert sum((len(training) + j, j) in found for j in range(200)) >= 190


@pytest.mark.parametrize("length", [8, 10, 12])
def test_one_word_more_less_or_other_is_no_hiding_place(training: list[str], length: int) -> None:
    pick = random.Random(length)
    benchmark = [text_of(pick, length) for _ in range(200)]
    for change in ("other", "less", "more"):
        hosts = []
        for text in benchmark:
            split, place = text.split(), pick.randrange(1, length - 1)
            split[place : place + (change != "more")] = [] if change == "less" else [text_of(pick, 1)]
            hosts.append(f"Question: {' '.join(split)} Answer: {pick.choice(training)}")
        found = pairs(index_of([*training, *hosts]), benchmark)
        assert sum((len(training) + j, j) in found for j in range(200)) >= 120, change


def test_disjoint_text_is_not_found(training: list[str]) -> None:
    pick = random.Random(7)
    benchmark = [text_of(pick, pick.randint(4, 60)) for _ in range(4000)]
    assert len(pairs(index_of(training), benchmark)) <= 2


def test_frequent_words_are_chance_and_rare_ones_are_not() -> None:
    pick = random.Random(0)
    common = [
        " ".join(pick.choices(["it", "is", "as", "a", "so", "he", "was", "in", "the", "no"], k=6)) for _ in range(4000)
    ]
    training = [*common, "and it was as a so there", "then quoll ferret stoat weasel stood there"]
    found = pairs(index_of(training), ["it was as a so", "quoll ferret stoat weasel"])
    assert found == {(len(training) - 1, 1)}


def test_a_frame_with_another_word_of_weight_is_no_match() -> None:
    rest = [f"this{i} is{i} of{i} no{i} use{i}" for i in range(500)]
    training = [*rest, "the capital and largest city of zanzibar"]
    assert pairs(index_of(training), ["the capital and largest city of madagascar"]) == set()
    frames = [*rest, *(f"the capital and the largest city of all of land{i}" for i in range(20))]
    assert pairs(index_of(frames), ["the capital and the largest city of all of there"]) == set()


def test_scripts_without_spaces_are_compared_by_characters(training: list[str]) -> None:
    short = "東京都庁舎展望室"
    found = pairs(index_of([*training, f"質問：{short}はどこですか。答え：新宿です。"]), [short, "京都市役所"])
    assert found == {(len(training), 0)}


def test_nothing_at_all_matches_nothing() -> None:
    for mine, theirs in (
        ([], ["a b c d e"]),
        (["a b c d e"], []),
        (["", "!!"], ["", "?"]),
        (["a", "b c"], ["a", "b c"]),
    ):
        assert pairs(index_of(mine, chance=1.0), theirs) == set()


def test_more_words_than_numbers_still_match_exactly(training: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containment, "_MOST_WORDS", 3000)
    monkeypatch.setattr(containment, "_SHARED_IDS", 1000)
    pick = random.Random(3)
    benchmark = [text_of(pick, 9) for _ in range(100)]
    found = pairs(index_of([*training, *(f"in front {text} behind" for text in benchmark)]), benchmark)
    assert sum((len(training) + j, j) in found for j in range(100)) >= 95
    assert len(found) <= 101


def test_memory_is_bounded() -> None:
    """At most 24 bytes a word stay, and no more than 90 are taken to make them; a look-up takes no more than the words of its pieces."""
    rng = np.random.default_rng(0)
    count, length = 40_000, 25
    values = (rng.zipf(1.2, count * length) % 50_000).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    texts = Ragged.from_lengths(np.full(count, length), values)
    tracemalloc.start()
    try:
        index = ContainmentIndex(texts, DecontaminationConfig())
        stays, peak = tracemalloc.get_traced_memory()
        assert stays <= 24 * count * length
        assert peak <= 90 * count * length
        tracemalloc.reset_peak()
        index.matches(texts.slice(0, 4000))
        assert tracemalloc.get_traced_memory()[1] - stays <= 1500 * 4000 * length
    finally:
        tracemalloc.stop()
