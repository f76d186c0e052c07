"""The tasks and the tiny model of the evaluation's tests."""

from __future__ import annotations

from tests.evaluation.conftest import _offline, every_type, model_folder

__all__ = ["_offline", "every_type", "model_folder"]
