"""Docstring and code of the functions in the installed packages. Files are parsed, never imported."""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

from pydantic import Field

from nearfield.console import track
from nearfield.errors import BadInputError
from nearfield.files import fingerprint
from nearfield.methods.on_demand import OnDemandReader, cache_folder, kept_file

VERSION = 1
"""Raised when the same packages give other rows."""
MIN_WORDS = 4
MIN_LINES = 3
MAX_FILE_BYTES = 1 << 20
MAX_DOCSTRING_CHARACTERS = 2000

logger = logging.getLogger("nearfield.data")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class DocstringsReader(OnDemandReader):
    """Docstring and code of the functions in the installed Python packages; parsed, never imported.

    Columns: docstring, code, name (of the function), package (the distribution).
    """

    kind: Literal["docstrings"] = "docstrings"
    packages: tuple[str, ...] | None = None
    """Names of the distributions to read; null means all that are installed."""
    max_lines: int = Field(default=100, ge=1)
    """Functions with more lines of code are left out."""

    def find(self) -> Path:
        chosen = installed(self.packages)
        versions = [(name, package.version) for name, package in chosen]
        mark = fingerprint({"version": VERSION, "packages": versions, "max_lines": self.max_lines})
        path = cache_folder(self.cache) / f"docstrings-{mark}.jsonl.gz"
        return kept_file(path, lambda: build_rows(chosen, self.max_lines))


def installed(names: Sequence[str] | None) -> list[tuple[str, Distribution]]:
    """The installed distributions of these names (all, if none are given), sorted by name."""
    packages: dict[str, Distribution] = {}
    for package in distributions():
        name = package.metadata["Name"]
        if name and name.lower() not in packages:
            packages[name.lower()] = package
    if names is None:
        return sorted(packages.items())
    for name in names:
        if name.lower() not in packages:
            raise BadInputError(
                f"the package {name!r} is not installed", hint="Install it, or leave it out of 'packages'."
            )
    return sorted({name.lower(): packages[name.lower()] for name in names}.items())


def build_rows(packages: Sequence[tuple[str, Distribution]], max_lines: int) -> Iterator[dict[str, object]]:
    """The rows of all packages. Code that was seen before (packages carry copies of others) is left out."""
    seen: set[bytes] = set()
    unread = 0
    for name, package in track(packages, "Parsing packages"):
        for file in package.files or ():
            if file.suffix != ".py" or any(part in ("test", "tests", "testing", "conftest.py") for part in file.parts):
                continue
            text = _source(Path(str(package.locate_file(file))))
            if text is None:
                unread += 1
                continue
            for function, docstring, code in functions(text, max_lines):
                digest = hashlib.blake2b(code.encode(errors="replace"), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield {"docstring": docstring, "code": code, "name": function, "package": name}
    if unread:
        logger.info("%d files were too large, missing or not UTF-8 and were left out", unread)


def _source(path: Path) -> str | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def functions(text: str, max_lines: int) -> Iterator[tuple[str, str, str]]:
    """(name, first paragraph of the docstring, code without the docstring) of a file's functions and methods.

    Left out are functions inside functions, those whose docstring is all they have, docstrings under four words, and
    code under three or over ``max_lines`` lines. A file that does not parse has none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    # The parser counts lines by these ends alone, unlike str.splitlines.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for node in _functions(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None or len(node.body) < 2:
            continue
        first = node.body[0]
        if first.lineno == node.lineno or node.body[1].lineno == first.end_lineno:
            continue
        body = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        code = textwrap.dedent("\n".join(line for line in body if line.strip()))
        query = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        long_enough = len(query.split()) >= MIN_WORDS and MIN_LINES <= code.count("\n") + 1 <= max_lines
        if long_enough and len(query) <= MAX_DOCSTRING_CHARACTERS and "\0" not in code + query:
            yield node.name, query, code


def _functions(node: ast.AST) -> Iterator[_Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        elif isinstance(child, ast.ClassDef | ast.If | ast.Try):
            yield from _functions(child)
