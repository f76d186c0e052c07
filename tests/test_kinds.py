"""Kinds from outside: names that packages register, import paths, what is refused and what enters fingerprints."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest

import nearfield.recipe  # noqa: F401 (brings the tables of all parts)
from nearfield import config as config_module
from nearfield.config import PARTS, Config, Kinds, KindSettings, allow_local_code, load_config, outside_sources
from nearfield.errors import BadInputError


class Shape(KindSettings):
    """The base of this test's kinds."""


class Circle(Shape):
    """One of ours."""

    kind: Literal["circle"] = "circle"
    radius: float = 1.0


SHAPES = Kinds("shapes", f"{__name__}:Shape", {"circle": (f"{__name__}:Circle", "round")})
MODULE = (
    f"from {__name__} import Shape\n\n\nclass Square(Shape):\n    side: int = 2\n    corners: tuple[int, ...] = (4,)\n"
)


class Drawing(Config):
    """Settings that pick kinds at several depths."""

    shape: Annotated[Shape, SHAPES] = Circle()
    more: tuple[Annotated[Shape, SHAPES], ...] = ()
    named: dict[str, Annotated[Shape, SHAPES] | None] = {}


@pytest.fixture()
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with code of its own, and no trace of it afterwards."""
    # This test's classes count as the library's own, so that only those of the working folder are from outside.
    ours = config_module._is_ours
    monkeypatch.setattr(config_module, "_is_ours", lambda found: found.__module__ == __name__ or ours(found))
    monkeypatch.setattr(config_module, "_told", set())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    (tmp_path / "my_shapes.py").write_text(MODULE)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]
    config_module._source.cache_clear()


def drawing(folder: Path, text: str) -> Drawing:
    path = folder / "drawing.yaml"
    path.write_text(text)
    return load_config(Drawing, path).config


PATH = "shape: {kind: 'my_shapes:Square', side: 3, corners: [1, 2]}\n"


def test_ours_go_by_their_name(working: Path) -> None:
    found = drawing(working, "shape: {kind: circle, radius: 2.0}\nmore: [{kind: circle}]\nnamed: {a: null}\n")
    assert found.shape == Circle(radius=2.0)
    assert (found.more, found.named) == ((Circle(),), {"a": None})
    assert found.identity() == found.model_dump(mode="json")


def test_an_import_path_of_the_working_folder_is_allowed_by_name(
    working: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadInputError, match=r"is code of the working folder: .*my_shapes.py") as error:
        drawing(working, PATH)
    assert (error.value.where, "--allow-local-code" in str(error.value)) == (f"{working / 'drawing.yaml'}:1", True)
    assert "my_shapes" not in sys.modules
    with allow_local_code(), caplog.at_level(logging.INFO, "nearfield"):
        found = drawing(working, PATH)
    assert (type(found.shape).__name__, found.shape.kind) == ("Square", "my_shapes:Square")
    assert found.shape.model_dump(mode="json") == {"kind": "my_shapes:Square", "side": 3, "corners": [1, 2]}
    assert f"the kind 'my_shapes:Square' runs code of {working / 'my_shapes.py'}" in caplog.text
    # It is written down and read again as it was, and counts in fingerprints by its code.
    with allow_local_code():
        again = drawing(working, found.model_dump_json())
    assert again == found
    (source,) = outside_sources(found)
    assert (source.path, source.file, source.version) == ("my_shapes:Square", str(working / "my_shapes.py"), "")
    assert found.identity()["code"] == [["my_shapes:Square", "", source.content]]
    assert "code" not in found.identity(exclude={"shape"})


def test_every_module_of_its_package_counts(working: Path) -> None:
    package = working / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "square.py").write_text(MODULE)
    text = "more: [{kind: 'my_package.square:Square'}]\n"
    seen = set()
    for other in ("", "A = 1\n", "A = 2\n"):
        (package / "helpers.py").write_text(other)
        config_module._source.cache_clear()
        with allow_local_code():
            seen.add(str(drawing(working, text).identity()["code"]))
    assert len(seen) == 3


def test_misspelt_keys_and_kinds_are_told_apart(working: Path) -> None:
    with allow_local_code():
        for text, wanted in {
            "shape: {kind: 'my_shapes:Square', sied: 3}": "unknown key 'shape.sied'.*Did you mean 'side'",
            "more: [{kind: circle}, {kind: circle, radios: 1.0}]": "unknown key 'more.1.radios'.*Did you mean 'radius'",
            "named: {a: {kind: circle, raduis: 1.0}}": "unknown key 'named.a.raduis'.*Did you mean 'radius'",
            "shape: {kind: circel}": "unknown kind 'circel'.*Did you mean 'circle'",
            "shape: {radius: 1.0}": "'shape.kind' is missing",
            "shape: 3": "shape: should be an object",
            "shape: {kind: 'my_shapes:Square', side: '3'}": "shape.side: .*valid integer",
        }.items():
            with pytest.raises(BadInputError) as error:
                drawing(working, text)
            assert re.search(wanted, str(error.value), re.DOTALL), (text, str(error.value))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("my_shapes:Nothing", "my_shapes has no 'Nothing'"),
        ("my_shapes.x:Square", "names no module that is installed"),
        ("my_nowhere:Square", "names no module that is installed"),
        ("my_broken:Square", "cannot be imported: RuntimeError: no"),
        ("my_others:Other", "'Other' is no subclass of Shape"),
        ("my_others:called", "'called' is no subclass of Shape"),
        ("json:loads", "is in no installed package: its code is .*json"),
        ("not a path:", "is no import path"),
        ("my_model.code:Square", "is code in a folder of a model or of data: .*my_model"),
    ],
)
def test_what_is_no_kind_is_refused_before_it_is_called(working: Path, kind: str, wanted: str) -> None:
    (working / "my_broken.py").write_text("raise RuntimeError('no')\n")
    (working / "my_others.py").write_text("class Other:\n    pass\n\n\ndef called(**_):\n    raise AssertionError\n")
    (working / "my_model").mkdir()
    (working / "my_model" / "modules.json").write_text("[]")
    (working / "my_model" / "code.py").write_text("raise AssertionError\n")
    with allow_local_code(), pytest.raises(BadInputError, match=wanted):
        drawing(working, f"shape: {{kind: '{kind}'}}\n")
    assert "my_model.code" not in sys.modules


def test_packages_register_names(working: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("square", "my_shapes:Square", "nearfield.shapes")
    none = importlib.metadata.EntryPoint("circle", "my_shapes:Square", "nearfield.shapes")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry, none] * (group == "nearfield.shapes"))
    with allow_local_code():
        found = drawing(working, "shape: {kind: square, side: 5}\nmore: [{kind: circle}]\n")
        schema = Drawing.model_json_schema()
        with config_module.only_our_kinds():
            ours = Drawing.model_json_schema()
    assert found.shape.model_dump() == {"kind": "square", "side": 5, "corners": (4,)}
    assert type(found.more[0]) is Circle  # a name of ours stays ours
    assert SHAPES.names() == ["circle", "square"]
    assert schema["$defs"]["Square"]["properties"]["side"]["default"] == 2
    assert list(schema["properties"]["shape"]["discriminator"]["mapping"]) == ["circle", "square"]
    assert "Square" not in ours["$defs"]
    with pytest.raises(BadInputError, match=r"unknown kind 'squere'.*\n.*Did you mean 'square'"):
        drawing(working, "shape: {kind: squere}\n")


def test_settings_made_in_python_go_by_their_import_path(working: Path) -> None:
    with allow_local_code():
        settings = drawing(working, PATH).shape
        made = Drawing(shape=type(settings)(side=9))
        assert made.shape.kind == "my_shapes:Square"
        assert drawing(working, made.model_dump_json()) == made
    with pytest.raises(ValueError, match="none of these kinds"):
        Drawing.model_validate({"shape": Config()})


def test_kinds_can_be_left_out(working: Path) -> None:
    class Round(Config):
        shape: Annotated[Shape, SHAPES.without("circle")]

    with pytest.raises(ValueError, match="tag"):
        Round.model_validate({"shape": {"kind": "circle"}})
    with pytest.raises(ValueError, match="none of these kinds"):
        Round(shape=Circle())


def test_all_kinds_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from nearfield.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["recipe", "kinds", "objectives"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["objectives", "infonce"]
    assert {line.split()[0] for line in lines[1:]} == {"objectives"}
    with pytest.raises(SystemExit) as ended:
        main(["recipe", "kinds", "loses"])
    assert (ended.value.code, "Parts: " in capsys.readouterr().err) == (2, True)


def test_the_guide_names_every_part() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rows = [
        line.strip("| ").split(" | ") for line in guide.splitlines() if "`nearfield." in line and line.startswith("|")
    ]
    assert {row[0]: (row[2].strip("`"), row[3].strip("`")) for row in rows} == {
        name: (found.base.replace(":", "."), f"nearfield.{name}")
        for name, found in PARTS.items()
        if found.base.startswith("nearfield.")
    }


@pytest.mark.parametrize("part", sorted(PARTS))
def test_the_table_of_a_part_says_what_its_classes_are(part: str) -> None:
    """Each name of ours is the ``kind`` of a subclass of the base, and has a line of help."""
    found = PARTS[part]
    base = config_module._settings_class(found.base)
    for name, (_, text) in found.table.items():
        settings = found.find(name)
        assert issubclass(settings, base)
        assert settings.model_fields["kind"].default == name
        assert text and not text.endswith(".")
