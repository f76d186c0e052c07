"""The defaults that a recipe without settings gets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import nearfield.training
from nearfield.training import CheckpointConfig, ScheduleConfig, TrainingConfig


def test_defaults() -> None:
    assert TrainingConfig().model_dump() == {
        "epochs": 1,
        "max_steps": None,
        "max_length": None,
        "learning_rate": 2e-5,
        "optimizer": {"kind": "adamw", "weight_decay": 0.01, "betas": (0.9, 0.999), "epsilon": 1e-8},
        "layer_decay": 1.0,
        "attention_dropout": None,
        "freeze": (),
        "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.0},
        "max_gradient_norm": 1.0,
        "precision": "auto",
        "device": "auto",
        "backend": "auto",
        "collective_timeout": 1800,
        "exchange": "gather",
        "micro_batch_tokens": "auto",
        "packing": "auto",
        "gradient_cache": "auto",
        "graph_tokens": "auto",
        "averaged_batches": 1,
        "gradient_checkpointing": False,
        "compile": False,
        "dropout": True,
        "checkpoints": {"every_steps": 500, "keep_last": 2, "background": True},
        "log_every": 1,
        "watch_every": 10,
        "trackers": ({"kind": "tensorboard"},),
        "evaluation": None,
    }
    assert TrainingConfig().schedule == ScheduleConfig()
    assert TrainingConfig().checkpoints == CheckpointConfig()


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0},
        {"learning_rate": -1.0},
        {"layer_decay": 0},
        {"layer_decay": 1.1},
        {"freeze": [""]},
        {"weight_decay": 0.1},
        {"max_gradient_norm": 0},
        {"schedule": {"final": 1.0}},
        {"schedule": {"final": -0.1}},
        {"schedule": {"warmup": -1}},
        {"epochs": 0},
        {"max_steps": 0},
        {"micro_batch_tokens": 15},
        {"micro_batch_tokens": "most"},
        {"graph_tokens": 15},
        {"averaged_batches": 0},
        {"collective_timeout": 0},
        {"backend": "fsdp"},
        {"packing": "always"},
        {"chunk_tokens": 512},
        {"log_every": 0},
        {"checkpoints": {"every_steps": 0}},
        {"checkpoints": {"keep_last": 0}},
        {"precision": "fp16"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_out_of_bounds(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.5, "layer_decay": 0.5, "max_gradient_norm": 0.5},
        {"optimizer": {"betas": (0.0, 0.999), "kind": "adamw"}, "schedule": {"final": 0.999, "warmup": 0}},
        {"max_steps": 1, "schedule": {"warmup": 0.5}},
        {"max_steps": 8, "schedule": {"warmup": 7}},
        {"micro_batch_tokens": 16, "graph_tokens": 16, "averaged_batches": 2},
        {"micro_batch_tokens": "auto", "graph_tokens": "auto", "backend": "zero3", "precision": "bf16-pure"},
    ],
    ids=str,
)
def test_within_bounds(settings: dict[str, Any]) -> None:
    TrainingConfig.model_validate(settings)


@pytest.mark.parametrize(("steps", "warmup"), [(8, 8), (1, 1), (8, 9)])
def test_a_warmup_needs_steps_after_it(steps: int, warmup: int) -> None:
    with pytest.raises(ValidationError, match=f"a warm-up of {warmup} steps leaves nothing of max_steps {steps}"):
        TrainingConfig.model_validate({"max_steps": steps, "schedule": {"warmup": warmup}})


def test_what_is_exported_is_there() -> None:
    assert nearfield.training.__all__ == ["CheckpointConfig", "ScheduleConfig", "TrainingConfig"]
    assert all(hasattr(nearfield.training, name) for name in nearfield.training.__all__)


def test_which_lines_say_more() -> None:
    """Every step a line, every tenth line more; every third step a line, every second of these more; the last always."""
    every = [step for step in range(1, 35) if TrainingConfig().logs(step, 34) == (True, True)]
    assert every == [1, 11, 21, 31, 34]
    some = TrainingConfig(log_every=3, watch_every=2)
    assert [step for step in range(1, 15) if some.logs(step, 14)[0]] == [3, 6, 9, 12, 14]
    assert [step for step in range(1, 15) if some.logs(step, 14)[1]] == [3, 9, 14]
    assert all(TrainingConfig(watch_every=1).logs(step, 9) == (True, True) for step in range(1, 10))
