"""Stages of a run: what is missing or stale, in which order; fingerprints, the manifest."""

from __future__ import annotations

from nearfield.pipeline.run import Run, StageStatus, open_run
from nearfield.pipeline.stages import STAGES, RunResult, run_stages, status

__all__ = ["STAGES", "Run", "RunResult", "StageStatus", "open_run", "run_stages", "status"]
