"""Coverage at next to no cost: a pytest plugin (``PYTEST_PLUGINS=tests.lines``) that notes which lines of ``nearfield`` run.

A tracer, which is what coverage has below Python 3.12, is asked at each line of every library and nearly doubles the time of the
tests. Here the statements of ``nearfield`` note themselves: when a module is compiled, ``__ran__[LINE] = 1`` is put before each.
Coverage itself reads the settings in pyproject.toml, leaves out what they exclude, and writes the report.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NAME = "__ran__"
RAN: dict[str, bytearray] = {}
"""File -> a byte a line, 1 where it ran."""
REPORT = pytest.StashKey[str]()


class NoteLines(ast.NodeTransformer):
    """Puts a note before each statement; a docstring and imports from ``__future__`` must stay in front."""

    def noted(self, body: Sequence[ast.stmt], lines: Sequence[int] = (), *, documented: bool = False) -> list[ast.stmt]:
        """``lines``: what else has run once the body is entered."""
        found: list[ast.stmt] = []
        waiting = list(lines)
        for number, statement in enumerate(body):
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            waiting += [statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", ()))]
            in_front = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            if not in_front and not (documented and number == 0 and text):
                found += [self.note(line, statement) for line in waiting]
                waiting = []
            found.append(self.visit(statement))
        return found + [self.note(line, body[-1]) for line in waiting]

    @staticmethod
    def note(line: int, near: ast.stmt) -> ast.stmt:
        """``__ran__[line] = 1`` on the line of a statement."""
        (note,) = ast.parse(f"{NAME}[{line}] = 1").body
        for node in ast.walk(note):
            ast.copy_location(node, near)
        return note

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """All that holds statements."""
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(inner := getattr(node, name, None), list):
                setattr(node, name, self.noted(inner, documented=documented))
        for handler in getattr(node, "handlers", ()):
            handler.body = self.noted(handler.body, [handler.lineno])
        for case in getattr(node, "cases", ()):
            case.body = self.noted(case.body, [case.pattern.lineno])
        return node


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module with its notes; no bytecode is read or written."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the module."""
        tree = NoteLines().visit(ast.parse(self.get_data(self.path), filename=self.path))
        code: CodeType = compile(tree, self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        """Run it; a module that is loaded again notes in the same place."""
        lines = self.get_data(self.path).count(b"\n") + 2
        vars(module)[NAME] = RAN.setdefault(self.path, bytearray(lines))
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``nearfield`` where Python does."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Only the loader is another."""
        if fullname.partition(".")[0] != "nearfield":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def report() -> tuple[str, bool]:
    """Coverage's table, and whether the total is as high as pyproject.toml wants it."""
    from coverage import Coverage
    from coverage.exceptions import CoverageException

    found = Coverage(data_file=None, config_file=str(ROOT / "pyproject.toml"))
    data = found.get_data()
    data.add_lines({file: [line for line, ran in enumerate(lines) if ran] for file, lines in RAN.items()})
    data.touch_files([str(path) for path in (ROOT / "src" / "nearfield").rglob("*.py")])
    out = io.StringIO()
    try:
        total = found.report(file=out)
    except CoverageException as error:
        return f"{out.getvalue()}{error}\n", False
    wanted = float(found.get_option("report:fail_under") or 0)  # type: ignore[arg-type]
    return f"{out.getvalue()}Total coverage: {total:.2f}% (at least {wanted:g}%)\n", total >= wanted


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before anything of ours is imported; only where this is a plugin."""
    assert not any(name.partition(".")[0] == "nearfield" for name in sys.modules), "nearfield was imported before this"
    sys.meta_path.insert(0, Finder())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands over what ran in it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = {file: bytes(lines) for file, lines in RAN.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it."""
    for file, ran in getattr(node, "workeroutput", {}).get("ran", {}).items():
        lines = RAN.setdefault(file, bytearray(len(ran)))
        lines[:] = bytes(a | b for a, b in zip(lines, ran, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Coverage that is too low is a failure."""
    result = yield
    if not hasattr(session.config, "workeroutput"):
        session.config.stash[REPORT], enough = report()
        session.testsfailed += not enough
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show it."""
    if REPORT in config.stash:
        terminalreporter.section("coverage")
        terminalreporter.write(config.stash[REPORT])
