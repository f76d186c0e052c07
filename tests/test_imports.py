"""Floors and weight: imports go down, and light commands import nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "nearfield"
FLOORS = [
    ["__main__"],
    ["cli"],
    ["__init__"],
    ["api"],
    ["pipeline"],
    ["recipe"],
    ["reporting"],
    ["conformance"],
    ["methods"],
    ["evaluation", "analysis"],
    ["training"],
    ["objectives"],
    ["batching"],
    ["mining"],
    ["encoders"],
    ["data"],
    ["config", "shipped"],
    ["kinds"],
    ["console", "provenance", "files"],
    ["errors", "arrays"],
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports anywhere, as the part below ``nearfield``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "nearfield" else [f"nearfield.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("nearfield.")}
    return {name for name in found if name in FLOOR_OF}


def test_every_part_has_a_floor() -> None:
    parts = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert parts - set(FLOOR_OF) == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        assert name == part or FLOOR_OF[name] > FLOOR_OF[part], f"{part} imports {name}"


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sorted(name.partition('.')[0] for name in sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


HEAVY = {"torch", "transformers", "mteb", "sentence_transformers", "datasets", "pyarrow", "accelerate"}


def test_import_is_light() -> None:
    loaded = loaded_by("import nearfield")
    assert "nearfield" in loaded
    assert not loaded & (HEAVY | {"numpy", "pydantic"})


def test_recipes_need_no_torch() -> None:
    assert not loaded_by("import nearfield.recipe, nearfield.pipeline") & (HEAVY - {"pyarrow"})


def test_watching_a_run_needs_no_torch() -> None:
    assert not loaded_by("import nearfield.pipeline.watch") & (HEAVY - {"pyarrow"})


def test_help_needs_no_pydantic() -> None:
    loaded = loaded_by("from nearfield.cli.app import app\nimport typer.main\ntyper.main.get_command(app)")
    assert not loaded & (HEAVY | {"pydantic", "numpy", "yaml"})
