"""Data sets that are built on demand: the parsing of control files and of source code."""

from __future__ import annotations

import json
from importlib.metadata import distribution
from pathlib import Path

import pytest

from nearfield.errors import BadInputError
from nearfield.methods import debian, docstrings, on_demand
from nearfield.methods.debian import DebianReader, description_rows, parse_stanzas
from nearfield.methods.docstrings import DocstringsReader, functions

PACKAGES = """\
Package: libalpha1
Source: alpha (1.2)
Section: libs
Description: short alpha library

Package: alpha
Section: contrib/web
Description: not read

Package: beta-data
Source: beta
Section: games

Package: beta-bin
Source: beta
Section: games

Package: gamma
Section: net
"""
TRANSLATIONS = """\
Package: alpha
Description-en: browser of alphas
 Alpha shows many things at once. It is part of
 the Alpha project. Homepage text repeated here.
 .
 Features:
  * very fast
  * small

Package: libalpha1
Description-en: library of alphas
 Long words about a library.

Package: beta-bin
Description-en: game of betas
 A long game for three players. Homepage text repeated here.

Package: beta-data
Description-en: data of betas
 Images and sounds of betas. Homepage text repeated here.

Package: gamma
Description-en: too short
 Nothing here.
"""


def test_descriptions_of_source_packages() -> None:
    rows = description_rows(parse_stanzas(PACKAGES.splitlines()), parse_stanzas(TRANSLATIONS.splitlines()), 2)
    assert rows == [
        {
            "short": "browser of alphas",
            "long": "Alpha shows many things at once. It is part of the Alpha project.\nFeatures:\n* very fast\n* small",
            "source": "alpha",
            "package": "alpha",
            "section": "web",
        },
        {
            "short": "game of betas",
            "long": "A long game for three players.",
            "source": "beta",
            "package": "beta-bin",
            "section": "games",
        },
    ]


def test_sentences_that_repeat_less_stay() -> None:
    rows = description_rows(parse_stanzas(PACKAGES.splitlines()), parse_stanzas(TRANSLATIONS.splitlines()), 3)
    assert rows[1]["long"] == "A long game for three players. Homepage text repeated here."


def test_without_apt_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(BadInputError, match="there is no apt here") as error:
        DebianReader(cache=tmp_path).inputs()
    assert error.value.hint is not None
    assert "Debian" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_without_lists_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(debian, "_CAT", tmp_path)
    monkeypatch.setattr(debian, "run_apt", lambda command, check=True: "")
    with pytest.raises(BadInputError, match="could not fetch Debian's Packages"):
        DebianReader(cache=tmp_path / "cache").inputs()


def test_what_was_built_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def build() -> list[dict[str, object]]:
        calls.append(1)
        return [{"text": "caf\u00e9"}]

    first = on_demand.kept_file(tmp_path / "a" / "rows.jsonl.gz", build)
    data = first.read_bytes()
    assert on_demand.kept_file(first, build).read_bytes() == data
    assert len(calls) == 1
    first.unlink()
    assert on_demand.kept_file(first, build).read_bytes() == data


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert on_demand.cache_folder() == tmp_path / "nearfield" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert on_demand.cache_folder() == Path.home() / ".cache" / "nearfield" / "data"
    assert on_demand.cache_folder(tmp_path / "x") == tmp_path / "x"


CODE = '''
import os

@decorated
def add(a, b):
    """Add two numbers, and
    give their sum.

    More words that are not taken.
    """
    # A comment stays.
    total = a + b

    return total


def lonely():
    """Only a docstring and no code."""


def short():
    """Two words"""
    x = 1
    return x


def one_line(): "A docstring on one line"; return 1


class Thing:
    """A class is no function."""

    async def method(self, name):
        r"""Return the thing by its name."""
        def inner():
            """Inner functions are left out here."""
            a = 1
            return a
        return inner() or name


if os:
    def conditional(value):
        """Give back the value as it is."""
        result = value
        return result
'''


def test_functions_of_a_file() -> None:
    found = {name: (docstring, code) for name, docstring, code in functions(CODE, 100)}
    assert list(found) == ["add", "method", "conditional"]
    assert found["add"] == (
        "Add two numbers, and give their sum.",
        "def add(a, b):\n    # A comment stays.\n    total = a + b\n    return total",
    )
    assert found["method"][0] == "Return the thing by its name."
    assert found["method"][1].startswith("async def method(self, name):\n    def inner():")
    assert found["method"][0] not in found["method"][1]
    assert [name for name, _, _ in functions(CODE, 4)] == ["add", "conditional"]


@pytest.mark.parametrize("text", ["def f(:", "x = '\0'", "(" * 5000, "x = " + "-" * 100_000 + "1"])
def test_files_that_do_not_parse_have_no_functions(text: str) -> None:
    assert list(functions(text, 100)) == []


def test_packages_are_read_and_never_imported(tmp_path: Path) -> None:
    rows = [row.values for row in DocstringsReader(packages=("typer",), cache=tmp_path).rows(())]
    assert len(rows) > 20
    for row in rows:
        assert row is not None
        assert row["package"] == "typer"
        assert "site-packages" not in json.dumps(row)
        assert str(row["code"]).startswith(("def ", "async def "))
    codes = [row["code"] for row in rows if row is not None]
    assert len(codes) == len(set(map(str, codes)))


def test_copies_of_code_are_left_out() -> None:
    package = distribution("typer")
    once = list(docstrings.build_rows([("typer", package)], 100))
    assert list(docstrings.build_rows([("a", package), ("b", package)], 100)) == [
        {**row, "package": "a"} for row in once
    ]
