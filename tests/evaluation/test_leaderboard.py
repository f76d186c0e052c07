"""Leaderboards, comparisons of methods and published results, from made-up result files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nearfield.errors import BadInputError
from nearfield.evaluation.comparison import CAVEAT, Method, compare_methods, compare_published, published_folder
from nearfield.evaluation.leaderboard import leaderboard
from nearfield.evaluation.statistics import detectable, paired_interval
from tests.evaluation.made import write_result


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three models on three tasks of two types: A is best everywhere, B and C differ by nothing that matters."""
    rng = np.random.default_rng(0)
    found = []
    tasks = {name: rng.uniform(0.2, 0.6, 150) for name in ("One", "Two", "Three")}
    for model, gain in (("A", 0.15), ("B", 0.0), ("C", 0.001)):
        for task, base in tasks.items():
            values = base + gain + rng.normal(0, 0.05, 150)
            kind = "STS" if task == "Three" else "Retrieval"
            found.append(write_result(tmp_path / f"local__{model}" / "1", values.tolist(), task=task, task_type=kind))
    return list(dict.fromkeys(found))


def scores(folder: Path) -> dict[str, float]:
    import pyarrow.parquet as pq

    return {
        file.name.split(".")[0]: float(np.mean(pq.read_table(file)["value"].to_numpy()))
        for file in folder.glob("*.units.parquet")
    }


def test_a_leaderboard_has_means_points_and_ranks(folders: list[Path]) -> None:
    board = leaderboard(folders, ["A", "B", "C"], samples=500)
    rows = {row.label: row for row in board.rows}
    assert board.rows[0].label == "A" and rows["A"].place == 1
    own = scores(folders[0])
    assert rows["A"].mean_task.value == pytest.approx(np.mean(list(own.values())))
    assert rows["A"].mean_type.value == pytest.approx((np.mean([own["One"], own["Two"]]) + own["Three"]) / 2)
    assert rows["A"].borda.value == 6 and rows["A"].mean_rank.value == 1
    assert rows["A"].mean_task.low < rows["A"].mean_task.value < rows["A"].mean_task.high
    assert (rows["A"].rank_low, rows["A"].rank_high) == (1, 1) and set(rows["A"].above) == {"B", "C"}
    assert (rows["B"].rank_low, rows["B"].rank_high) == (rows["C"].rank_low, rows["C"].rank_high) == (2, 3)
    assert leaderboard(folders, ["A", "B", "C"], samples=500).to_json() == board.to_json()
    json.dumps(board.to_json(), allow_nan=False)


def test_a_missing_task_makes_the_means_null_and_other_data_are_left_out(folders: list[Path]) -> None:
    (folders[2] / "Two.units.parquet").unlink()
    board = leaderboard(folders, ["A", "B", "C"], samples=200)
    row = next(row for row in board.rows if row.label == "C")
    assert row.mean_task.value is None and row.mean_type.value is None and row.rank_low is None
    assert row.borda.value is not None and any("C lacks Two" in note for note in board.notes)
    write_result(folders[2], [0.5] * 150, task="Two", revision="local-2")
    board = leaderboard(folders, ["A", "B", "C"], samples=200)
    assert [task.name for task in board.tasks] == ["One", "Three"]
    assert any("Two is left out" in note for note in board.notes)


def test_one_task_alone_equals_its_comparison(folders: list[Path]) -> None:
    board = leaderboard(folders[:2], ["A", "B"], tasks=["One"], samples=300)
    assert [task.name for task in board.tasks] == ["One"]
    assert board.rows[0].mean_task.value == pytest.approx(scores(folders[0])["One"])
    with pytest.raises(BadInputError, match="no model has results on 'Four'"):
        leaderboard(folders[:2], ["A", "B"], tasks=["Four"])


def seeds(root: Path, gains: dict[int, float], task: str = "One") -> dict[int, Path]:
    found = {}
    for seed, gain in gains.items():
        base = np.random.default_rng(seed).uniform(0.2, 0.6, 50)
        found[seed] = write_result(root / str(seed), (base + gain).tolist(), task=task)
    return found


def test_methods_are_compared_by_a_t_interval_over_seeds(tmp_path: Path) -> None:
    gains = dict(enumerate([0.02, 0.03, 0.025, 0.01, 0.022, 0.018]))
    a = Method("a", seeds(tmp_path / "a", dict.fromkeys(gains, 0.0)))
    b = Method("b", seeds(tmp_path / "b", gains))
    (row,) = compare_methods([a, b]).rows
    expected = stats.ttest_1samp(list(gains.values()), 0)
    interval = expected.confidence_interval(0.95)
    assert row.difference == pytest.approx(np.mean(list(gains.values())))
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
    assert row.p == pytest.approx(expected.pvalue) and row.verdict == "better"
    assert row.sentence.startswith("The method b is better than a on One, over 6 trainings each: +0.0208")
    assert paired_interval([0.1, 0.1], 0.95) == (0.1, 0.1, 0.0)


def test_fewer_than_five_seeds_show_points_and_no_verdict(tmp_path: Path) -> None:
    a = Method("a", seeds(tmp_path / "a", {0: 0.0, 1: 0.0, 2: 0.0, 7: 0.0}))
    b = Method("b", seeds(tmp_path / "b", {0: 0.1, 1: 0.2, 2: 0.1, 8: 0.1}))
    found = compare_methods([a, b])
    (row,) = found.rows
    assert row.verdict == "too few seeds" and row.low is None and row.p is None and row.seeds == (0, 1, 2)
    assert "No verdict: 3 seeds, and 5 are needed" in row.sentence and "+0.2000 (seed 1)" in row.sentence
    assert found.notes == ("seeds without a partner are left out: 7, 8 (b, a)",)


def test_two_tasks_give_their_mean_too(tmp_path: Path) -> None:
    gains = dict.fromkeys(range(5), 0.01)
    methods = []
    for name, more in (("a", 0.0), ("b", 1.0)):
        runs = seeds(tmp_path / name, {seed: more * gain for seed, gain in gains.items()})
        seeds(tmp_path / name, {seed: 3 * more * gain for seed, gain in gains.items()}, task="Two")
        methods.append(Method(name, runs))
    rows = compare_methods(methods).rows
    assert [row.task for row in rows] == ["One", "Two", "mean over tasks"]
    assert rows[2].difference == pytest.approx(0.02)


def publish(root: Path, model: str, score: float, revision: str = "local-1", task: str = "One") -> None:
    folder = root / model / "main"
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"hf_subset": "default", "main_score": score, "languages": ["eng-Latn"]}
    value = {"task_name": task, "dataset_revision": revision, "mteb_version": "2", "scores": {"test": [entry]}}
    (folder / f"{task}.json").write_text(json.dumps(value))


def test_published_results_stand_beside_ours(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(0.3, 0.7, 100)
    ours = write_result(tmp_path / "ours" / "1", values.tolist(), task="One")
    for model, score in (("org__high", 0.9), ("org__near", float(values.mean()) + 0.005), ("org__low", 0.1)):
        publish(tmp_path / "theirs", model, score)
    publish(tmp_path / "theirs", "org__other", 0.9, task="Another")
    standing = compare_published(ours, tmp_path / "theirs", label="ours", samples=500)
    assert [(row.published_model, row.position) for row in standing.rows] == [
        ("org/high@main", "below"),
        ("org/near@main", "inside"),
        ("org/low@main", "above"),
    ]
    assert standing.places == {"One": (3, 4)} and standing.notes == (CAVEAT,)
    assert standing.rows[0].sentence.startswith(
        f"ours on One: {values.mean():.4f}; org/high@main published 0.9000, above"
    )


def test_published_results_of_other_data_are_said_and_missing_ones_refused(tmp_path: Path) -> None:
    ours = write_result(tmp_path / "ours" / "1", [0.1, 0.2, 0.4], task="One")
    publish(tmp_path / "theirs", "org__m", 0.3, revision="abc")
    assert "another revision" in compare_published(ours, tmp_path / "theirs", samples=200).notes[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="no results of these tasks"):
        compare_published(ours, tmp_path / "empty", samples=200)
    with pytest.raises(BadInputError, match="does not exist"):
        published_folder(str(tmp_path / "nowhere"))


def test_what_a_comparison_detects_is_found_in_four_of_five() -> None:
    random = np.random.default_rng(0)
    differences = random.normal(0.0, 2.0, 5)
    shift = detectable(differences.tolist()) / differences.std(ddof=1)
    drawn = random.normal(shift, 1.0, (20_000, 5))
    t = drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / np.sqrt(5))
    found = float(np.mean(np.abs(t) > stats.t.ppf(0.975, 4)))
    assert found == pytest.approx(0.8, abs=0.012)
    assert detectable([0.1, 0.1]) == 0.0
