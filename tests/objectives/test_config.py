"""The defaults that a recipe without settings gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import nearfield.objectives
from nearfield.objectives import InfoNCEConfig


def test_defaults() -> None:
    assert InfoNCEConfig().model_dump() == {
        "kind": "infonce",
        "temperature": 0.05,
        "learn_temperature": False,
        "temperature_bounds": (0.01, 1.0),
        "similarity": "cosine",
        "in_batch_negatives": True,
        "several_positives": "mean_log",
        "both_directions": False,
        "mask_known_positives": True,
    }
    assert InfoNCEConfig.example_kind == "retrieval"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"similarity": "euclid"},
        {"several_positives": "max"},
        {"kind": "x"},
        {"temperature_bounds": (0, 1)},
        {"temperature": 0.009, "learn_temperature": True},
        {"temperature": 1.1, "learn_temperature": True},
        {"temperature": 0.5, "learn_temperature": True, "temperature_bounds": (1.0, 0.1)},
    ],
    ids=str,
)
def test_out_of_bounds(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InfoNCEConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.01, "learn_temperature": True},
        {"temperature": 1.0, "learn_temperature": True},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_bounds_are_those_of_a_temperature_that_is_learnt(settings: dict[str, Any]) -> None:
    InfoNCEConfig.model_validate(settings)


def test_what_is_exported_is_there() -> None:
    assert nearfield.objectives.__all__ == ["InfoNCEConfig", "ObjectiveConfig"]
    assert all(hasattr(nearfield.objectives, name) for name in nearfield.objectives.__all__)
