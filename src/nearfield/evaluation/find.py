"""Find the results of a model that the command line names."""

from __future__ import annotations

from pathlib import Path

from nearfield.errors import BadInputError
from nearfield.evaluation.config import BASELINES, UNITS_SUFFIX


def find_results(name: str, results: Path) -> Path:
    """The results folder of a command-line argument.

    It is a folder ``<org>__<model>/<revision>``, a folder ``<org>__<model>`` with one revision, or a model (a name or a
    folder) whose results lie below ``results``.
    """
    path = Path(name).expanduser()
    if path.is_dir() and any(path.glob(f"*{UNITS_SUFFIX}")):
        return path
    candidates = [path] if path.is_dir() else []
    filed = BASELINES.get(name, name)
    candidates.append(results / filed.replace("/", "__").replace(" ", "_"))
    if "/" not in filed:
        candidates += [results / f"local__{filed}", results / f"sentence-transformers__{filed}"]
    if path.is_dir():
        resolved = path.resolve()
        local = resolved.parent.name if resolved.name == "model" else resolved.name
        candidates.append(results / f"local__{local}")
    for candidate in candidates:
        revisions = [child for child in _folders(candidate) if any(child.glob(f"*{UNITS_SUFFIX}"))]
        if len(revisions) == 1:
            return revisions[0]
        if revisions:
            raise BadInputError(
                f"there are results of {len(revisions)} revisions of {name}",
                where=str(candidate),
                hint=f"Give one of the folders: {', '.join(str(child) for child in revisions)}.",
            )
    known = ", ".join(child.name.replace("__", "/", 1) for child in _folders(results)) or "none"
    raise BadInputError(
        f"there are no results of {name!r}",
        where=str(results),
        hint=f"Models there: {known}. Score one with nearfield eval.",
    )


def all_results(results: Path) -> list[Path]:
    """Every results folder ``<org>__<model>/<revision>`` below a folder."""
    return [
        revision
        for model in _folders(results)
        for revision in _folders(model)
        if any(revision.glob(f"*{UNITS_SUFFIX}"))
    ]


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
