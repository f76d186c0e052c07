"""A domain and its general twin: gaps, order of models, thirds of complexity."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nearfield.errors import BadInputError
from nearfield.methods.matched_suites import rank_correlation, text_measures, twins
from tests.evaluation.made import write_result


def _scored(root: Path, name: str, means: dict[str, float], seed: int) -> Path:
    rng = np.random.default_rng(seed)
    folder = root / f"local__{name}" / "r"
    for task, mean in means.items():
        values = np.clip(rng.normal(mean, 0.1, 60), 0, 1)
        write_result(folder, values.tolist(), task=task)
    return folder


def test_gap_has_an_interval_and_models_an_order(tmp_path: Path) -> None:
    folders = [
        _scored(tmp_path, f"m{i}", {"G1": 0.5 + i / 20, "G2": 0.6 + i / 20, "D1": 0.3 + i / 20, "D2": 0.4 + i / 20}, i)
        for i in range(4)
    ]
    made = twins(folders, ["G1", "G2"], ["D1", "D2"], complexity={"fog": {"G1": 1, "D1": 1.1, "G2": 5, "D2": 5.1}})
    whole = [gap for gap in made.gaps if gap.type == "all"]
    assert len(whole) == 4 and all(gap.low is not None and gap.low < gap.gap < (gap.high or 0) < 0 for gap in whole)
    assert all(gap.gap == pytest.approx(-0.2, abs=0.05) for gap in whole)
    assert made.spearman == 1.0 and made.p == pytest.approx(2 / 24)
    assert [one["name"] for one in made.thirds["fog"]] == ["low", "medium", "high"]
    json.dumps(made.to_json(), allow_nan=False)


def test_what_stands_on_one_side_or_both_is_refused(tmp_path: Path) -> None:
    folders = [_scored(tmp_path, f"m{i}", {"G": 0.5, "D": 0.4}, i) for i in range(2)]
    assert twins(folders, ["G"], ["D"]).spearman is None
    with pytest.raises(BadInputError, match="both sides"):
        twins(folders, ["G"], ["G", "D"])
    with pytest.raises(BadInputError, match="no result of X"):
        twins(folders, ["G"], ["D", "X"])


def test_rank_correlation_is_scipys_with_an_exact_p() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=6), rng.normal(size=6)
    rho, p = rank_correlation(x.tolist(), y.tolist())
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)

    def statistic(order: np.ndarray) -> float:
        return float(stats.spearmanr(order, y).statistic)

    exact = stats.permutation_test((x,), statistic, permutation_type="pairings", n_resamples=np.inf)
    assert p == pytest.approx(exact.pvalue)
    x, y = rng.normal(size=12), rng.normal(size=12)
    assert rank_correlation(x.tolist(), y.tolist()) == pytest.approx(tuple(stats.spearmanr(x, y)))
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == (0.0, 1.0)


def test_measures_of_texts() -> None:
    found = text_measures(["The cat sat."], english=True)
    assert found["fog"] == pytest.approx(1.2) and found["entropy"] == pytest.approx(np.log2(3))
    assert set(text_measures(["le chat"], english=False)) == {"entropy"}
    assert text_measures(["a b c d"] * 9, english=False, most_words=8)["entropy"] == 2.0
