"""A whole run and its report, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reporting.runs import write_run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every part. Tests that change it take a copy."""
    return write_run(tmp_path_factory.mktemp("whole"))
