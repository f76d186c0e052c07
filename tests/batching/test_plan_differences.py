"""The common part of two plans, against plain loops over sets."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nearfield.batching import SingleSourceConfig
from nearfield.batching.plan import Plan, compare_plans, write_plan
from tests.batching.making import make_apart, make_source


def write(path: Path, count: int, size: int, seed: int) -> Plan:
    config = SingleSourceConfig(batch_size=size, drop_last=False)
    epoch = config.build().plan([make_apart(0, count)], seed, 0)
    metadata = {"seed": seed, "batches": config.model_dump(mode="json")}
    write_plan(path, epoch, {0: (0, 0)}, lambda prompt, items: items % 5 + 1, metadata)
    return Plan(path)


def pairs_of(plan: Plan) -> set[frozenset[int]]:
    return {
        frozenset(pair)
        for step in range(len(plan))
        for pair in itertools.combinations(plan.batch(step).example.tolist(), 2)
    }


@pytest.mark.parametrize(("count", "size", "seed"), [(40, 4, 1), (30, 8, 0), (40, 4, 0), (12, 6, 3)])
def test_counts_are_those_of_sets(tmp_path: Path, count: int, size: int, seed: int) -> None:
    one, other = write(tmp_path / "one", 40, 4, 0), write(tmp_path / "other", count, size, seed)
    found = compare_plans(one, other)
    first, second = pairs_of(one), pairs_of(other)
    assert found.pairs == (len(first), len(second))
    assert found.shared_pairs == len(first & second)
    assert found.overlap == pytest.approx(len(first & second) / len(first | second))
    batches = [[frozenset(plan.batch(step).example.tolist()) for step in range(len(plan))] for plan in (one, other)]
    assert found.shared_batches == len(set(batches[0]) & set(batches[1]))
    assert found.same_step == sum(a == b for a, b in zip(*batches, strict=False))
    place = [{row: step for step, batch in enumerate(of) for row in batch} for of in batches]
    both = place[0].keys() & place[1].keys()
    assert found.in_both == len(both)
    assert found.moved == sum(place[0][row] != place[1][row] for row in both)
    assert found.identical == ((count, size, seed) == (40, 4, 0))
    names = [name for name, _, _ in found.settings]
    assert ("seed" in names) == (seed != 0)
    assert ("batches.batch_size" in names) == (size != 4)
    assert ("batches", len(one), len(other)) in found.figures


def test_other_negatives_are_another_plan(tmp_path: Path) -> None:
    """The same examples in the same slots, with other items chosen, are not identical."""
    source = make_source(0, 40, 10**6, 1)
    epoch = SingleSourceConfig(batch_size=4, negatives=1).build().plan([source], 0, 0)
    for name in ("one", "other"):
        write_plan(tmp_path / name, epoch, {0: (0, 0)}, lambda prompt, items: items % 5, {})
        epoch.rows.negatives.values[0] += 1
    found = compare_plans(Plan(tmp_path / "one"), Plan(tmp_path / "other"))
    assert not found.identical
    assert found.same_step == len(epoch) and found.moved == 0 and found.overlap == 1


def test_plans_of_other_data(tmp_path: Path) -> None:
    one = write(tmp_path / "one", 8, 4, 0)
    epoch = SingleSourceConfig(batch_size=4).build().plan([make_apart(1, 8)], 0, 0)
    write_plan(tmp_path / "other", epoch, {1: (0, 0)}, lambda prompt, items: items % 5, {})
    found = compare_plans(one, Plan(tmp_path / "other"))
    assert (found.in_both, found.shared_pairs, found.overlap) == (0, 0, 0)
