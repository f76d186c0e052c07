"""The files of a project for one's own data: a data recipe, a suite of its held-out split, a training recipe."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nearfield import yaml12
from nearfield.data.guess import FRACTIONS, Guess
from nearfield.files import write_text
from nearfield.shipped import refuse, target_in

_HEAD = "# Written by `nearfield init --data`. Check the columns and the split before you train.\n"


@dataclass(frozen=True)
class Project:
    """The files of a project, relative to its folder."""

    name: str
    data: str
    suite: str
    recipe: str


def write_project(guess: Guess, folder: Path, force: bool = False) -> Project:
    """Write the files for a guess; nothing is written if one would replace a file that differs, unless ``force``."""
    name = guess.source.name
    files = {f"data_recipes/{name}.yaml": data_recipe(guess, folder / "data_recipes")}
    files[f"eval/suites/{name}.yaml"] = suite(name)
    recipe = f"training/recipes/{name}.yaml"
    files[recipe] = training_recipe(guess)
    texts = {file: _HEAD + yaml12.dump(value, width=110) for file, value in files.items()}
    differ = [
        file
        for file, text in texts.items()
        if target_in(folder, file).exists() and target_in(folder, file).read_bytes() != text.encode()
    ]
    if differ and not force:
        refuse(folder, differ)
    for file, text in texts.items():
        write_text(target_in(folder, file), text)
    return Project(name, f"data_recipes/{name}.yaml", f"eval/suites/{name}.yaml", recipe)


def data_recipe(guess: Guess, folder: Path) -> dict[str, object]:
    """The data recipe as YAML values; the path of the data is relative where it lies in the project."""
    source = guess.source.model_dump(mode="json", exclude_none=True)
    if not source["steps"]:
        del source["steps"]
    project = folder.parent.resolve()
    if guess.path.is_relative_to(project):
        source["reader"]["path"] = Path(os.path.relpath(guess.path, folder.resolve())).as_posix()
    if not source["prompts"]:
        source["prompts"] = {"query": None, "document": None}
    return {"name": guess.source.name, "max_bad_rows": 0.01, "sources": [source]}


def suite(name: str) -> dict[str, object]:
    """The suite: the held-out split of the source."""
    task = {
        "kind": "heldout",
        "name": task_name(name),
        "data": f"../../data_recipes/{name}.yaml",
        "source": name,
        "split": "test",
    }
    return {"name": name, "tasks": [task]}


def task_name(name: str) -> str:
    """``my-data`` as ``MyData``, the form that names of tasks have."""
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", name) if part]
    return "".join(part[:1].upper() + part[1:] for part in parts) or "Data"


OBJECTIVES: dict[str, dict[str, object]] = {
    "retrieval": {"kind": "infonce", "temperature": 0.05},
    "graded": {"kind": "cosent", "temperature": 0.05},
    "labelled": {"kind": "supcon", "temperature": 0.1},
}
"""What learns from each kind of examples."""


def training_recipe(guess: Guess) -> dict[str, object]:
    """A recipe that fits the rows: at least four steps an epoch, at most 64 examples a step.

    An item stands in a batch once. Where a negative is in so many rows that few batches could be filled, the recipe leaves
    the explicit negatives out; where a query or a positive is, it lets items repeat in a batch.
    """
    size = 64
    while size > 2 and size * 4 > guess.rows * FRACTIONS["train"]:
        size //= 2
    batches: dict[str, object] = {"kind": "single_source", "batch_size": size}
    batches["negatives"] = int(0 < guess.common_negative * size <= guess.rows * FRACTIONS["train"])
    if guess.common_text * size > guess.rows * FRACTIONS["train"]:
        batches["duplicates"] = "allow"
    return {
        "name": guess.source.name,
        "seed": 0,
        "data": f"../../data_recipes/{guess.source.name}.yaml",
        "encoder": {"model": "sentence-transformers/all-MiniLM-L6-v2"},
        "objective": OBJECTIVES[guess.source.examples.kind],
        "batches": batches,
        "training": {"epochs": 1, "max_length": 128, "learning_rate": 2.0e-5},
        "evaluation": {"suite": f"../../eval/suites/{guess.source.name}.yaml"},
    }
