"""Normal forms, word sets, MinHash and vectors against plain loops."""

from __future__ import annotations

import random
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfield.arrays import Ragged, concatenate, starts
from nearfield.data.cleaning import NearDuplicateConfig
from nearfield.data.near_duplicates import (
    BANDS,
    ROWS,
    BandIndex,
    NearIndex,
    TextSets,
    WordHashes,
    first_near_text,
    first_near_vector,
    hash64,
    hash_words,
    near_vectors,
    normal_form,
    representatives,
    sequences,
    shared,
    sketch,
    unit,
    words,
)

RULE = NearDuplicateConfig()


def ragged(lists: list[list[int]]) -> Ragged:
    flat = np.array([value for part in lists for value in part], dtype=np.uint64)
    return Ragged(starts([len(part) for part in lists]), flat)


def plain(values: Ragged) -> list[list[int]]:
    return [values.values[a:b].tolist() for a, b in zip(values.offsets[:-1], values.offsets[1:], strict=True)]


LISTS = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=12)


@given(LISTS)
def test_flat_lists_are_lists(lists: list[list[int]]) -> None:
    values = ragged(lists)
    assert plain(values) == lists
    assert plain(values.distinct()) == [sorted(set(part)) for part in lists]
    order = np.arange(len(lists), dtype=np.int64)[::-1]
    assert plain(values.take(order)) == lists[::-1]
    assert plain(concatenate([values, values])) == lists * 2


@given(LISTS, st.integers(1, 4))
def test_sequences_are_equal_where_words_are(lists: list[list[int]], length: int) -> None:
    found = sequences(ragged(lists), length)
    runs = [[tuple(part[i : i + length]) for i in range(len(part) - length + 1)] for part in lists]
    assert found.lengths.tolist() == [len(part) for part in runs]
    flat = [run for part in runs for run in part]
    by_run = dict(zip(flat, found.values.tolist(), strict=True))
    assert [by_run[run] for run in flat] == found.values.tolist()
    assert len(set(by_run.values())) == len(by_run)


@given(LISTS, LISTS, st.data())
def test_shared_counts_common_members(first: list[list[int]], second: list[list[int]], data: st.DataObject) -> None:
    pair = st.tuples(st.integers(0, len(first) - 1), st.integers(0, len(second) - 1))
    pairs = np.array(data.draw(st.lists(pair, max_size=20)), dtype=np.int64).reshape(-1, 2)
    found = shared(ragged(first).distinct(), ragged(second).distinct(), pairs)
    assert found.tolist() == [len(set(first[i]) & set(second[j])) for i, j in pairs.tolist()]


@given(st.text())
def test_case_spaces_and_punctuation_do_not_count(text: str) -> None:
    form = normal_form(text)
    assert form == normal_form(f"  {text}\t!?") == "".join(words(text))
    assert not any(unicodedata.category(c)[0] in "PSZ" for c in form)
    if text.isascii():
        assert form == normal_form(text.upper()) == normal_form(" ".join(text))


def test_normal_form_of_scripts() -> None:
    assert normal_form("Ｆｕｌｌ　Ｗｉｄｔｈ, ﬁne") == "fullwidthfine"
    assert normal_form("Straße") == normal_form("STRASSE") == "strasse"
    assert words("深層学習、です") == ["深", "層", "学", "習", "で", "す"]
    assert words("don't e.g. well-known") == ["dont", "e", "g", "well", "known"]
    assert words("don't e.g. well-known", joined=True) == ["dont", "eg", "wellknown"]
    assert normal_form("हिन्दी") == "हिन्दी"  # marks stay
    assert normal_form("!!! \u200d \U0001f600") == ""
    assert words("lone \ud800 surrogate") == ["lone", "\ud800", "surrogate"]


def test_hashes_are_the_same_in_every_process() -> None:
    assert hash64("word") == 10776770685243991114
    known = WordHashes()
    assert known.of(["word", "other", "word"]) == [hash64("word"), hash64("other"), hash64("word")]


def test_minhash_estimates_jaccard_similarity() -> None:
    """The share of equal minima is the Jaccard similarity, within five standard errors of it."""
    random_ = np.random.default_rng(0)
    for common, rest in ((10, 40), (30, 20), (45, 5)):
        lists = []
        for _ in range(300):
            values = random_.choice(2**60, common + rest, replace=False).tolist()
            lists += [values[: common + rest // 2], values[:common] + values[common + rest // 2 :]]
        sketches = sketch(ragged(lists).distinct())
        equal = (sketches.bytes[0::2] == sketches.bytes[1::2]).mean()
        expected = common / (common + rest)
        expected += (1 - expected) / 256
        assert abs(equal - expected) < 5 * np.sqrt(expected * (1 - expected) / (300 * BANDS * ROWS))
    with_order = sketch(ragged([[3, 1, 2], [1, 2, 3]]))
    assert np.array_equal(with_order.keys[:, 0], with_order.keys[:, 1])


def test_bands_find_what_shares_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[random.Random(i // 3).randrange(50) + j * (i % 3 == j) for j in range(12)] for i in range(60)]
    sketches = sketch(ragged(lists).distinct())
    wanted = {
        (i, j)
        for i in range(60)
        for j in range(60)
        if (sketches.keys[:, i] == sketches.keys[:, j]).any()
        and ((sketches.bytes[i] == sketches.bytes[j]).mean() - 1 / 256) / (1 - 1 / 256) >= 0.4
    }
    index = BandIndex(sketches)
    assert {tuple(pair) for part in index.candidates(sketches, 0.4) for pair in part.tolist()} == wanted
    monkeypatch.setattr("nearfield.data.near_duplicates._PIECE", 100)
    pieces = list(index.candidates(sketches, 0.4))
    assert len(pieces) > 5
    assert {tuple(pair) for part in pieces for pair in part.tolist()} == wanted


def brute_near(first: str, second: str, rule: NearDuplicateConfig = RULE) -> float:
    """The rule in a few lines of Python."""
    best = 0.0
    if min(len(first), len(second)) < rule.min_characters:
        return 0.0
    if min(len(set(words(first))), len(set(words(second)))) < rule.min_words:
        return 0.0
    for joined in (False, True):
        a, b = set(words(first, joined=joined)), set(words(second, joined=joined))
        similarity = len(a & b) / max(len(a | b), 1)
        contained = (a <= b or b <= a) and similarity >= rule.contained
        if min(len(a), len(b)) >= rule.min_words and (contained or similarity >= rule.jaccard):
            best = max(best, similarity)
    return best


def similar_texts(count: int, longest: int, seed: int) -> list[str]:
    """Texts with families: the same words with a few left out, exchanged or added."""
    pick = random.Random(seed)
    vocabulary = ["".join(pick.choices(string.ascii_lowercase, k=pick.randint(2, 8))) for _ in range(400)]
    texts: list[str] = []
    while len(texts) < count:
        base = pick.choices(vocabulary, k=pick.randint(2, longest))
        for _ in range(pick.randint(1, 5)):
            mine = [word for word in base if pick.random() > 0.1]
            if pick.random() < 0.3 and mine:
                mine[pick.randrange(len(mine))] = pick.choice(vocabulary)
            if pick.random() < 0.3:
                mine.append(pick.choice(vocabulary) + "-" + pick.choice(vocabulary))
            texts.append(" ".join(mine))
    return texts[:count]


@pytest.mark.parametrize("longest", [12, 30])
def test_near_duplicates_are_those_of_a_double_loop(longest: int) -> None:
    first, second = similar_texts(250, longest, 1), [*similar_texts(250, longest, 1)[::-1], "", "!", "one"]
    known = WordHashes()
    pairs, similarity = NearIndex(TextSets.of(first, known), RULE).matches(TextSets.of(second, known))
    wanted = {(i, j): s for i, a in enumerate(first) for j, b in enumerate(second) if (s := brute_near(a, b))}
    found = {tuple(pair): s for pair, s in zip(pairs.tolist(), similarity.tolist(), strict=True)}
    assert len(wanted) > 300
    assert found == pytest.approx(wanted)


def test_long_texts_are_found_by_pairs_of_words() -> None:
    """Whatever is found obeys the rule; of texts with a tenth of the words left out nearly all are found."""
    pick = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    first = [" ".join(pick.choices(vocabulary, k=pick.randint(40, 400))) for _ in range(200)]
    second = [" ".join(word for word in text.split() if pick.random() > 0.1) for text in first]
    known = WordHashes()
    pairs, _ = NearIndex(TextSets.of(first, known), RULE).matches(TextSets.of(second, known))
    assert all(brute_near(first[i], second[j]) for i, j in pairs.tolist())
    assert np.count_nonzero(pairs[:, 0] == pairs[:, 1]) >= 190


def brute_first(texts: list[str]) -> list[int]:
    kept: list[int] = []
    found = []
    for place, text in enumerate(texts):
        first = next((other for other in kept if brute_near(texts[other], text)), place)
        found.append(first)
        if first == place:
            kept.append(place)
    return found


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_the_first_of_near_duplicates_stays(block: int) -> None:
    texts = similar_texts(200, 14, 3)
    sets = TextSets.of(texts, WordHashes())
    assert first_near_text(sets, RULE, block).tolist() == brute_first(texts)


def test_representatives_join_normal_forms_and_near_duplicates() -> None:
    texts = [
        "The quick brown fox jumps over the lazy dog today",
        "a lemma",
        "A  LEMMA!",
        "the quick, brown fox jumps over the lazy dog TODAY.",
        "quick brown fox jumps over the lazy dog today",
        "!!!",
        "!!!",
        "lemma",
    ]
    assert representatives(iter([texts[:3], texts[3:]]), RULE).tolist() == [0, 1, 1, 0, 0, 5, 6, 7]


def test_vectors_are_those_of_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(size=(40, 8))
    vectors = unit(base[draw.integers(0, 40, 300)] + 0.15 * draw.normal(size=(300, 8)))
    cosines = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    monkeypatch.setattr("nearfield.data.near_duplicates._MULTIPLY", 300 * 17)
    found = {tuple(p) for pairs, _ in near_vectors(vectors, vectors, 0.95) for p in pairs.tolist()}
    assert found == {tuple(pair) for pair in np.argwhere(cosines >= 0.95).tolist()}
    kept: list[int] = []
    wanted = []
    for place in range(300):
        first = next((other for other in kept if cosines[other, place] >= 0.95), place)
        wanted.append(first)
        kept += [place] * (first == place)
    for block in (1, 50, 2048):
        assert first_near_vector(vectors, 0.95, block).tolist() == wanted
    assert not unit(np.zeros((1, 3))).any()


def test_empty_sides_and_huge_texts() -> None:
    known = WordHashes()
    nothing = TextSets.of([], known)
    some = TextSets.of(["a b c d e f", "", "x" * 1_000_000, "word " * 200_000, "one two three four five"], known)
    for first, second in ((nothing, some), (some, nothing), (nothing, nothing)):
        assert len(NearIndex(first, RULE).matches(second)[0]) == 0
    pairs, _ = NearIndex(some, RULE).matches(some)
    assert pairs.tolist() == [[0, 0], [4, 4]] or pairs.tolist() == [[4, 4]]
    assert hash_words(["", "a"], known).lengths.tolist() == [0, 1]
