"""Drawn and principal axes beside a model's own first dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate, open_model
from nearfield.evaluation.encoder import compress
from nearfield.methods.axes import FITTED_ON, held_out_texts, principal_rotation, random_rotation

VECTORS = (np.random.default_rng(0).normal(size=(300, 12)) * np.linspace(0.1, 3, 12) + 1).astype(np.float32)


def lengths(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=1, keepdims=True)


def test_drawn_dimensions_are_a_permutation_and_the_same_each_time() -> None:
    turn = random_rotation(12)
    order = [int(column.argmax()) for column in turn.columns.T]
    assert sorted(order) == list(range(12)) and order != list(range(12))
    made = compress(VECTORS, 5, "none", turn)
    chosen = VECTORS[:, order[:5]]
    np.testing.assert_allclose(made, chosen / lengths(chosen), rtol=1e-6)
    np.testing.assert_array_equal(random_rotation(12).columns, turn.columns)
    whole = compress(VECTORS, 12, "none", turn)
    unit = VECTORS / lengths(VECTORS)
    np.testing.assert_allclose(whole @ whole.T, unit @ unit.T, atol=1e-6)


def test_principal_axes_are_those_of_the_covariance() -> None:
    turn = principal_rotation(VECTORS)
    values, axes = np.linalg.eigh(np.cov(VECTORS.astype(np.float64), rowvar=False))
    for column, expected in zip(turn.columns.T, axes.T[::-1], strict=True):
        assert abs(float(column @ expected)) == pytest.approx(1, abs=1e-4)
    turned = turn(VECTORS)
    np.testing.assert_allclose(turned.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(turned.var(axis=0, ddof=1), values[::-1], rtol=1e-3)
    made = compress(VECTORS, 3, "none", turn)
    np.testing.assert_allclose(made, turned[:, :3] / lengths(turned[:, :3]), rtol=1e-5)
    assert principal_rotation(VECTORS[:7]).columns.shape == (12, 7)


def test_axes_are_fitted_on_texts_that_no_suite_scores() -> None:
    texts = held_out_texts()
    assert len(texts) == len(set(texts)) == FITTED_ON
    assert texts == held_out_texts()


def test_cut_models_are_filed_under_names_of_their_own(
    every_type: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nearfield.methods.axes.FITTED_ON", 200)
    scores = {}
    for axes in ("first", "random", "principal"):
        scored = open_model(str(model_folder), dimensions=8, axes=axes, cache=tmp_path / "vectors")
        result = evaluate(scored, every_type, tmp_path / "out", tasks=["TinySTS"])
        scores[result.model] = result.scores["TinySTS"]["default"]
    assert list(scores) == ["local/tiny-dim8", "local/tiny-random8", "local/tiny-pca8"]
    assert len(set(scores.values())) == 3
    settings: tuple[dict[str, Any], ...] = ({"axes": "first second", "dimensions": 8}, {"axes": "random"})
    for bad in settings:
        with pytest.raises(BadInputError, match="axes"):
            open_model(str(model_folder), **bad)
