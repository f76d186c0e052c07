"""The recipes and suites that come with nearfield, and their copy in a project folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nearfield.errors import BadInputError
from nearfield.files import atomic_path, inside

FOLDERS = ("training", "eval", "data_recipes")
_SUFFIXES = (".yaml", ".yml", ".json", ".md")


@dataclass(frozen=True)
class Copied:
    """The outcome of a copy: paths relative to the project folder."""

    folder: Path
    written: tuple[str, ...]
    unchanged: tuple[str, ...]


def shipped_root() -> Path:
    """The folder that holds ``training/``, ``eval/`` and ``data_recipes/``: in the wheel, or the root of a checkout."""
    package = Path(__file__).parent
    for root in (package / "_shipped", package.parent.parent):
        if all((root / folder).is_dir() for folder in FOLDERS):
            return root
    raise BadInputError(
        "the shipped recipes are missing", where=str(package / "_shipped"), hint="Install nearfield again."
    )


def shipped_files() -> list[str]:
    """The paths of the shipped files below :func:`shipped_root`, sorted."""
    root = shipped_root()
    return sorted(
        file.relative_to(root).as_posix()
        for folder in FOLDERS
        for file in (root / folder).rglob("*")
        if file.is_file() and file.suffix in _SUFFIXES
    )


def copy_shipped(folder: Path, force: bool = False) -> Copied:
    """Copy the shipped files into ``folder``; nothing is written if one would replace a file that differs.

    ``force`` replaces them.
    """
    root = shipped_root()
    written: list[str] = []
    unchanged: list[str] = []
    differ: list[str] = []
    for name in shipped_files():
        target = target_in(folder, name)
        if not target.exists():
            written.append(name)
        elif target.is_file() and target.read_bytes() == (root / name).read_bytes():
            unchanged.append(name)
        else:
            differ.append(name)
    if differ and not force:
        refuse(folder, differ)
    for name in [*written, *differ]:
        with atomic_path(target_in(folder, name)) as aside:
            shutil.copyfile(root / name, aside)
    return Copied(folder, tuple(sorted([*written, *differ])), tuple(unchanged))


def target_in(folder: Path, name: str) -> Path:
    """The path of a file of the project; one that a link would lead out of the folder is refused."""
    if folder.exists() and not folder.is_dir():
        raise BadInputError("this is a file; a folder is wanted", where=str(folder))
    return inside(folder, name)


def refuse(folder: Path, names: list[str]) -> None:
    """Raise because files stand in the way."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    hint = "Nothing was written. --force replaces them."
    raise BadInputError(f"these files are there already and differ: {shown}", where=str(folder), hint=hint)
