"""Where one component holds over a tenth of the units, what they share is counted; where that tells no error there is no
interval, no test and no verdict, and the reason is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.evaluation import ModelComparison, compare, evaluate
from nearfield.evaluation.comparison import compare_published
from nearfield.evaluation.hub import scores_section
from nearfield.evaluation.leaderboard import leaderboard
from nearfield.evaluation.results import read_scores
from nearfield.evaluation.statistics import LARGEST_COMPONENT, is_too_large, too_large
from nearfield.reporting.comparison import build_comparison
from tests.evaluation.made import write_result

Written = Callable[..., list[Path]]


def components(large: int, total: int = 200) -> list[str]:
    return ["large"] * large + [f"c{i}" for i in range(total - large)]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Two models, B far better than A, whose units are in these components."""

    def write(clusters: list[Any], task: str = "Made") -> list[Path]:
        base = np.random.default_rng(0).uniform(0.2, 0.6, len(clusters))
        values = {"A": base, "B": base + np.random.default_rng(1).uniform(0.1, 0.3, len(base))}
        return [
            write_result(tmp_path / f"local__{name}" / "1", of.tolist(), task=task, clusters=clusters)
            for name, of in values.items()
        ]

    return write


def test_the_bound_is_a_tenth_of_the_units() -> None:
    assert LARGEST_COMPONENT == 0.1
    assert too_large([20, *[1] * 180]) is None and too_large([]) is None
    assert too_large([2, 1, 1]) is None, "two of a few units are no large component"
    reason = too_large([21, *[1] * 179])
    assert reason is not None and "21 of 200" in reason and "10 %" in reason
    assert is_too_large(reason) and not is_too_large(None) and not is_too_large("the score is not a number")


def test_no_verdict_above_it_and_one_below(written: Written) -> None:
    small = compare(written(components(20)), samples=200, permutations=200).differences[0]
    assert small.verdict == "better" and small.low is not None and small.clusters == 181
    table = compare(written(components(21)), samples=200, permutations=200)
    (row,) = table.differences
    assert row.verdict == "not tested" and row.p is None and row.low is None
    assert row.difference == pytest.approx(0.2, abs=0.02)
    assert "one component" in row.sentence and "21 of 200" in row.sentence
    assert all(score.low is None and score.reason == row.reason for score in table.scores)


def test_leaderboard_card_and_published_say_the_reason(written: Written, tmp_path: Path) -> None:
    written(components(60))
    results = written(components(1), "Other")
    board = leaderboard(results, ["A", "B"], samples=200)
    assert [row.rank_low for row in board.rows] == [None, None] and all(row.above == () for row in board.rows)
    assert all(row.mean_task.low is None and row.borda.low is None for row in board.rows)
    assert any("60 of 200" in note and note.startswith("Made") for note in board.notes)
    assert not any("exact" in note for note in board.notes)
    card = scores_section(results[0], samples=200)
    assert "60 of 200" in next(line for line in card.splitlines() if line.startswith("| Made"))
    other = leaderboard(results, ["A", "B"], tasks=["Other"], samples=200)
    assert other.rows[0].rank_high == 1 and other.rows[0].above == ("A",)


def test_the_report_says_the_reason(written: Written, tmp_path: Path) -> None:
    from nearfield.files import write_json

    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "comparison.json", compare(written(components(60)), samples=200, permutations=200).to_json())
    (task,) = build_comparison(run).tasks
    assert any("60 of 200" in note for note in task.notes)
    assert [tone for table in task.tables for tone in table.tones] == ["untested"]


def test_published_results_are_set_beside_without_an_interval(written: Written, tmp_path: Path) -> None:
    import json

    results = written(components(60))[1]
    other = tmp_path / "published" / "org__model" / "1"
    other.mkdir(parents=True)
    entry = {"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.5, "ndcg_at_10": 0.5}
    result = {"task_name": "Made", "mteb_version": "2.26.0", "dataset_revision": "local-1", "evaluation_time": 1.0}
    (other / "Made.json").write_text(json.dumps({**result, "kg_co2_emissions": None, "scores": {"test": [entry]}}))
    (row,) = compare_published(results, tmp_path / "published", samples=200).rows
    assert row.position == "no interval" and "60 of 200" in row.sentence


def test_queries_that_share_documents_make_a_component(tasks: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tasks.retrieval()
    shared = {f"q{i}": ["d0", f"d{i}"] for i in range(6)}
    pairs = [(f"q{i}", d) for i in range(20) for d in shared.get(f"q{i}", [f"d{i}"])]
    columns = {"query-id": [q for q, _ in pairs], "corpus-id": [d for _, d in pairs], "score": [1] * len(pairs)}
    tasks.table(folder / "default.test.qrels.parquet", **columns)
    result = evaluate(str(model_folder), folder, tmp_path / "out")
    (of,) = read_scores(result.results_dir).values()
    assert is_too_large(of.reason) and "6 of 20" in str(of.reason)


def test_results_of_an_earlier_version_say_that_components_are_not_known(written: Written) -> None:
    from nearfield.evaluation.results import read_units, write_metadata

    folder = written([None] * 200)[0]
    _, metadata = read_units(folder, "Made")
    for version, codes in ((3, ["components-unknown"]), (4, [])):
        write_metadata(folder, "Made", {**metadata, "version": version})
        (of,) = read_scores(folder).values()
        assert [notice.code for notice in of.notices] == codes


def sharing_pairs(tmp_path: Path, gain: float = 0.02) -> list[Path]:
    """Two models on 1,000 queries of two of 46 documents, as in LIMIT small, whose effects are most of the scores."""
    rng = np.random.default_rng(3)
    pairs = [(i, j) for i in range(46) for j in range(i)]
    contents = [pairs[k] for k in rng.choice(len(pairs), 1000, replace=False)]
    columns = np.array(contents)
    results = []
    for name, more in (("A", 0.0), ("B", gain)):
        effects = rng.uniform(0.1, 0.4, 46)
        values = (effects[columns].sum(axis=1) + more).tolist()
        folder = tmp_path / f"local__{name}" / "1"
        results.append(write_result(folder, values, clusters=["one"] * 1000, contents=contents))
    return results


def test_queries_that_share_documents_have_intervals_and_tests_of_what_they_share(tmp_path: Path) -> None:
    results = sharing_pairs(tmp_path)
    table = compare(results, samples=500, permutations=500, margin=0.2)
    (row,) = table.differences
    assert row.reason is None and row.p is not None and row.low is not None and row.high is not None
    assert row.verdict == "not separable", "resampled queries would call it better beyond doubt"
    assert row.equivalent is True
    assert row.resampled == (
        "1,000 queries that share 46 documents; errors of all pairs of queries that share one, as of 45 independent documents"
    )
    single = compare([unshared(folder, tmp_path) for folder in results], samples=500, permutations=500).differences[0]
    assert single.low is not None and single.high is not None and single.verdict == "better"
    assert row.high - row.low > 2 * (single.high - single.low)
    assert single.resampled == "1,000 queries are resampled"
    assert ModelComparison.from_json(written_json(table, tmp_path)).differences == table.differences


def unshared(folder: Path, tmp_path: Path) -> Path:
    (of,) = read_scores(folder).values()
    return write_result(tmp_path / "single" / folder.parent.name / "1", of.values.tolist())


def written_json(table: ModelComparison, tmp_path: Path) -> Path:
    from nearfield.files import write_json

    write_json(tmp_path / "comparison.json", table.to_json())
    return tmp_path / "comparison.json"


def test_a_leaderboard_ranks_them_by_joint_draws(tmp_path: Path) -> None:
    board = leaderboard(sharing_pairs(tmp_path), ["A", "B"], samples=2000)
    assert all((row.rank_low, row.rank_high) == (1, 2) for row in board.rows)
    assert all(row.mean_task.low is not None for row in board.rows)
    assert any(note.startswith("Made: 1,000 queries that share 46 documents") for note in board.notes)
    far = leaderboard(sharing_pairs(tmp_path / "far", 0.3), ["A", "B"], samples=2000)
    assert [row.label for row in far.rows] == ["B", "A"] and far.rows[0].rank_high == 1


def test_a_score_that_is_not_a_number_is_null_with_the_reason(tmp_path: Path) -> None:
    good = write_result(tmp_path / "local__A" / "1", [0.1, 0.3, 0.2])
    bad = write_result(tmp_path / "local__B" / "1", [0.1, 0.3, 0.2], main=float("nan"))
    table = compare([good, bad], samples=100, permutations=100)
    made = written_json(table, tmp_path).read_text()
    assert "NaN" not in made and '"score": null' in made
    (row,) = table.differences
    assert "no difference, not tested (the score is not a number" in row.sentence
    again = ModelComparison.from_json(tmp_path / "comparison.json")
    assert np.isnan(again.scores[1].score) and np.isnan(again.differences[0].difference)
    board = leaderboard([good, bad], ["A", "B"], samples=100)
    assert any(note.startswith("B has no score on Made (the score is not a number") for note in board.notes)
    assert not any("lacks" in note for note in board.notes) and "NaN" not in str(board.to_json())
