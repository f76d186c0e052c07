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
    ["methods", "statistics"],
    ["evaluation", "analysis"],
    ["training"],
    ["objectives"],
    ["batching"],
    ["mining"],
    ["encoders"],
    ["data"],
    ["config", "shipped"],
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


def module_imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports when it runs: at its top, inside functions, and by name with ``import_module``."""
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names.extend(each if each in modules else node.module for each in inner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.extend(each.value for each in node.args if isinstance(each, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {each for each in names if each in modules} - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one module (Tarjan)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    parts: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            part = stack[stack.index(name) :]
            del stack[-len(part) :]
            if len(part) > 1:
                parts.append(sorted(part))

    for name in graph:
        if name not in order:
            visit(name)
    return parts


def test_no_module_imports_itself_through_others() -> None:
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    assert circles({name: module_imports(name, path, modules) for name, path in modules.items()}) == []


def test_a_circle_of_lazy_imports_is_found(tmp_path: Path) -> None:
    texts = {
        "a": "def f():\n    from b import g\n",
        "b": "import importlib\ndef g():\n    return importlib.import_module('c')\n",
        "c": "import a\n",
        "d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e\nelse:\n    import a\n",
        "e": "import d\n",
    }
    modules = {name: tmp_path / f"{name}.py" for name in texts}
    for name, text in texts.items():
        modules[name].write_text(text)
    assert circles({name: module_imports(name, path, modules) for name, path in modules.items()}) == [["a", "b", "c"]]
