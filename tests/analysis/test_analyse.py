"""The whole analysis of vectors, and its command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from nearfield.analysis.geometry import analyse, truncation_curves
from nearfield.methods.likeness import add_likeness


def test_models_that_differ_by_a_rotation_are_alike() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 16)) * np.linspace(3, 0.1, 16)
    turned = base @ np.asarray(stats.ortho_group.rvs(16, random_state=0))
    models = {"a": base, "b": turned, "c": rng.normal(size=(200, 12))}
    made = add_likeness(analyse(models), models)
    assert made.cka[0][1] == pytest.approx(1) and made.jaccard[0][1] == pytest.approx(1) and made.cka[0][2] < 0.3
    assert made.geometry[0].two_nn == pytest.approx(made.geometry[1].two_nn)
    assert made.geometry[2].dimensions == 12 and len(made.sentences) == 3
    assert sum(made.geometry[0].spectrum) == pytest.approx(1)
    json.dumps(made.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="the same texts"):
        analyse({"a": base, "b": turned[:100]})


def test_truncation_keeps_all_with_all_dimensions_and_most_where_the_variance_is() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 32)) * np.concatenate([np.full(8, 5.0), np.full(24, 0.05)])
    curves = truncation_curves(vectors)
    assert all(points[-1] == (32, pytest.approx(1.0)) for points in curves.values())
    at = {name: dict(points)[8] for name, points in curves.items()}
    assert at["first"] > 0.9 and at["principal"] > 0.9 and at["random"] < 0.6
