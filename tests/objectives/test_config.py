"""The defaults that a recipe without settings gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import nearfield.objectives
from nearfield.objectives import InfoNCEConfig
from nearfield.objectives.config import FocalConfig, HardnessConfig, MixingConfig, ScoreMaskConfig


def test_defaults() -> None:
    assert InfoNCEConfig().model_dump() == {
        "kind": "infonce",
        "temperature": 0.05,
        "learn_temperature": False,
        "temperature_bounds": (0.01, 1.0),
        "tasks": {},
        "similarity": "cosine",
        "in_batch_negatives": True,
        "shared_negatives": True,
        "several_positives": "mean_log",
        "both_directions": False,
        "directions": ("query_document",),
        "softmax": "joint",
        "mask_known_positives": True,
        "mask_same_label": False,
        "score_mask": None,
        "guide_mask": None,
        "hardness": None,
        "focal": None,
        "label_smoothing": 0.0,
        "source_weights": {},
        "mixing": None,
        "queue": 0,
        "matryoshka": None,
        "spread": None,
        "implementation": "auto",
        "tiles": "auto",
    }
    assert InfoNCEConfig(focal=FocalConfig()).model_dump()["focal"] == {"gamma": 0.5, "detach": True}
    assert MixingConfig().model_dump() == {"pairs": 1, "lists": True, "list_temperature": 0.05}
    assert HardnessConfig(alpha=9.0).model_dump() == {"alpha": 9.0, "on": "all", "detach": True}
    assert ScoreMaskConfig().model_dump() == {"rule": "absolute", "margin": 0.0}
    assert InfoNCEConfig().learns_from == ("retrieval",)


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
        {"tasks": {"a": "one"}},
        {"both_directions": True, "directions": ("query_document", "query_query")},
        {"both_directions": True, "softmax": "per_direction"},
        {"directions": ()},
        {"directions": ("query_document", "query_document")},
        {"directions": ("query_document", "query_query"), "softmax": "per_direction"},
        {"directions": ("document_query",), "hardness": {"alpha": 1.0}},
        {"directions": ("document_query",), "mixing": {}},
        {"directions": ("document_query",), "queue": 1},
        {"in_batch_negatives": False, "queue": 1},
        {"queue": -1},
        {"mixing": {"pairs": 0, "lists": False}},
        {"matryoshka": {"dimensions": ()}},
        {"matryoshka": {"dimensions": (8, 4), "weights": (1.0,)}},
        {"matryoshka": {"dimensions": (8, 4), "weights": (0.0, 0.0)}},
        {"hardness": {"alpha": -1.0}},
        {"focal": {"gamma": -1.0}},
        {"label_smoothing": 1.0},
        {"score_mask": {"rule": "percent"}},
        {"implementation": "triton"},
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
    assert nearfield.objectives.__all__ == [
        "CachedInfoNCELoss",
        "CombinedConfig",
        "ContrastiveBatch",
        "InfoNCEConfig",
        "InfoNCELoss",
        "LossSum",
        "Objective",
        "ObjectiveConfig",
        "ObjectiveSettings",
    ]
    assert all(hasattr(nearfield.objectives, name) for name in nearfield.objectives.__all__)
