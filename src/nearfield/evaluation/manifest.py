"""What a results folder was made with, and which tasks failed: one line of JSON for each evaluation that scored something."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfield.encoders.limits import longest_input
from nearfield.errors import BadInputError
from nearfield.evaluation.models import ScoredModel
from nearfield.files import canonical_json, write_text
from nearfield.notices import Notice, in_file
from nearfield.provenance import device, now, versions

MANIFEST = "manifest.jsonl"
"""mteb reads every ``*.json`` of the folder as a result, and leaves this alone."""


def write_manifest(
    folder: Path,
    scored: ScoredModel,
    tasks: Mapping[str, Any],
    failures: Mapping[str, str],
    prompts: str,
    notices: Mapping[str, Sequence[Notice]],
) -> None:
    """Add a line on the tasks that were scored now, and on those that failed; ``notices`` is task (or ``""``) -> what was said."""
    if not tasks and not failures:
        return
    line: dict[str, Any] = {
        "time": now(),
        "command": " ".join(["nearfield", *sys.argv[1:]]),
        "model": scored.name,
        "revision": scored.revision,
        "versions": versions(),
        "machine": device(),
        "prompts": prompts,
        "tasks": dict(tasks),
        "failures": dict(failures),
        "notices": {
            task: in_file(said) for task, said in notices.items() if said and (not task or task in {*tasks, *failures})
        },
    }
    encoder = scored.encoder
    if encoder is not None:
        parameter = next(encoder.model.parameters(), None)
        line |= {
            "device": str(encoder.model.device),
            "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
            "batch_tokens": encoder.batch_tokens,
            "max_length": longest_input(encoder.model),
            "dimensions": encoder.dimensions,
            "quantize": encoder.quantize,
        }
    path = folder / MANIFEST
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_text(path, before + canonical_json(line) + "\n")


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The lines of a results folder's manifest, oldest first; empty where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInputError(f"this manifest cannot be read ({error})", where=str(path)) from error


def failed_tasks(folder: Path) -> dict[str, str]:
    """Tasks whose last attempt failed, with what went wrong."""
    failed: dict[str, str] = {}
    for line in read_manifest(folder):
        failed = {task: reason for task, reason in failed.items() if task not in line.get("tasks", {})}
        failed |= line.get("failures", {})
    return failed
