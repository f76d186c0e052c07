"""Splits: a group is on one side, the fractions are kept, and groups of shared texts are what a search by hand finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfield.data.config import hash_fraction, hash_split
from nearfield.errors import BadInputError
from tests.data.making import LABELLED, build_rows

FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}
HASH = {"kind": "hash", "fractions": FRACTIONS, "seed": 3}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.permutations(sorted(FRACTIONS)))
def test_fractions_are_kept_whatever_their_order(seed: int, order: list[str]) -> None:
    keys = [f"group {number}" for number in range(2000)]
    splits = [hash_split(key, {name: FRACTIONS[name] for name in order}, seed) for key in keys]
    assert splits == [hash_split(key, FRACTIONS, seed) for key in keys]
    for name, share in FRACTIONS.items():
        # Six standard deviations of a binomial count.
        assert abs(splits.count(name) / 2000 - share) < 6 * (share * (1 - share) / 2000) ** 0.5
    assert all(0 <= hash_fraction(key, seed) < 1 for key in keys[:50])


def test_another_seed_is_another_split() -> None:
    keys = [f"group {number}" for number in range(500)]
    assert [hash_split(key, FRACTIONS, 0) for key in keys] != [hash_split(key, FRACTIONS, 1) for key in keys]


def test_a_group_is_in_one_split(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": f"p{n}", "negatives": None, "topic": n % 40} for n in range(400)]
    store = build_rows(tmp_path, rows, group="topic", split=HASH)
    sides: dict[str, set[str]] = {}
    for example in store.examples.to_pylist():
        sides.setdefault(example["group"], set()).add(example["split"])
        assert example["cluster"] == example["group"]
    assert len(sides) == 40
    assert all(len(splits) == 1 for splits in sides.values())
    assert len(set.union(*sides.values())) == 3


def test_without_a_group_the_query_is_the_group(tmp_path: Path) -> None:
    rows = [{"query": f"q{n % 50}", "positives": f"p{n}", "negatives": None} for n in range(200)]
    store = build_rows(tmp_path, rows, split=HASH)
    sides: dict[int, set[str]] = {}
    for example in store.examples.to_pylist():
        sides.setdefault(example["query"], set()).add(example["split"])
    assert all(len(splits) == 1 for splits in sides.values())


def by_hand(rows: list[dict[str, object]], negatives: bool) -> list[set[int]]:
    """Groups of row numbers that share a text, merged until nothing changes."""
    groups = []
    for number, row in enumerate(rows):
        texts = {row["query"], row["positives"], *(row["negatives"] if negatives else ())}
        groups.append(({number}, texts))
    changed = True
    while changed:
        changed = False
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                if groups[i][1] & groups[j][1]:
                    groups[i] = (groups[i][0] | groups[j][0], groups[i][1] | groups[j][1])
                    del groups[j]
                    changed = True
                    break
            if changed:
                break
    return sorted((numbers for numbers, _ in groups), key=min)


words = st.sampled_from([f"w{n}" for n in range(25)])
tied = st.lists(
    st.fixed_dictionaries({"query": words, "positives": words, "negatives": st.lists(words, max_size=2, unique=True)}),
    min_size=1,
    max_size=12,
    unique_by=lambda row: (row["query"], row["positives"], tuple(sorted(row["negatives"]))),
)


@settings(max_examples=20, deadline=None)
@given(tied, st.booleans())
def test_groups_of_shared_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], bind: bool
) -> None:
    # A number in each row keeps rows apart that the removal of conflicting negatives would make equal.
    rows = [{**row, "cluster": f"c{number}"} for number, row in enumerate(rows)]
    group = {"kind": "duplicates", "negatives": bind}
    store = build_rows(tmp_path_factory.mktemp("groups"), rows, group=group, cluster="cluster")
    found: dict[str, set[int]] = {}
    for example in store.examples.to_pylist():
        found.setdefault(example["group"], set()).add(int(example["cluster"][1:]))
    kept = set().union(*found.values())
    expected = [numbers & kept for numbers in by_hand(rows, bind) if numbers & kept]
    assert sorted(found.values(), key=min) == sorted(expected, key=min)


def test_groups_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"query": f"q{n // 3}", "positives": f"p{n}", "negatives": None} for n in range(30)]
    keys = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        store = build_rows(tmp_path / name, ordered, group={"kind": "duplicates"}, split=HASH)
        keys.append(Counter((e["group"], e["split"]) for e in store.examples.to_pylist()))
    assert keys[0] == keys[1]
    assert len(keys[0]) == 10


def test_labelled_items_are_groups_of_their_own(tmp_path: Path) -> None:
    rows = [{"text": f"t{n % 4}", "label": f"l{n}"} for n in range(8)]
    store = build_rows(tmp_path, rows, examples=LABELLED, task_type="Classification", group={"kind": "duplicates"})
    groups = Counter(e["group"] for e in store.examples.to_pylist())
    assert sorted(groups.values()) == [2, 2, 2, 2]


def test_a_column_names_the_split(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": "p", "negatives": None, "part": "ab"[n % 2]} for n in range(6)]
    store = build_rows(tmp_path, rows, split={"kind": "column", "column": "part"})
    assert store.select("pairs", "a").tolist() == [0, 2, 4]
    assert store.select("pairs", "b").tolist() == [1, 3, 5]
    assert store.select("pairs", "c").tolist() == []


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{n}", "positives": "p", "negatives": None, "part": "ab"[n % 2], "topic": "x"} for n in range(6)
    ]
    with pytest.raises(BadInputError, match="the group 'x' would be in two splits, 'a' and 'b'"):
        build_rows(tmp_path, rows, group="topic", split={"kind": "column", "column": "part"})


def test_a_coarser_key_splits(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": "p", "negatives": None, "topic": n, "fold": n % 10} for n in range(300)]
    store = build_rows(tmp_path, rows, group="topic", split={**HASH, "by": "fold"})
    for example in store.examples.to_pylist():
        assert example["split"] == hash_split(str(int(example["group"]) % 10), FRACTIONS, 3)
