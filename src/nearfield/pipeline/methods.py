"""Find the runs of a way to train: those of one recipe that differ in nothing but their seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nearfield import yaml12
from nearfield.errors import BadInputError
from nearfield.files import canonical_json
from nearfield.pipeline.run import MANIFEST, read_manifest

if TYPE_CHECKING:
    from nearfield.evaluation.comparison import Method


def is_method(argument: str) -> bool:
    """Whether a command-line argument names a recipe, or a folder that holds runs."""
    path = Path(argument)
    return path.suffix in (".yaml", ".yml") or (path.is_dir() and bool(_runs_in(path)))


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def find_method(argument: str, runs: Path, label: str | None = None) -> Method:
    """The finished runs of a method, by seed.

    A recipe's runs are those below ``runs`` whose recipe is the same but for ``seed`` and ``name``; a folder's are the
    runs in it, which must be of one recipe in this sense.
    """
    from nearfield.evaluation.comparison import Method

    path = Path(argument)
    if path.is_dir():
        found = {run: _recipe_of(run) for run in _runs_in(path)}
        if len({_method_of(recipe) for recipe in found.values()}) > 1:
            raise BadInputError(
                "the runs in this folder differ in more than their seed", where=argument, hint="One folder, one method."
            )
        chosen = list(found)
    else:
        from nearfield.recipe import load_recipe

        wanted = _method_of(load_recipe(path, ()).config.model_dump(mode="json"))
        chosen = [run for run in _runs_in(runs) if _method_of(_recipe_of(run)) == wanted]
    by_seed: dict[int, Path] = {}
    for run in chosen:
        results = _results_of(run)
        if results is None:
            continue
        seed = int(_recipe_of(run).get("seed", 0))
        if seed in by_seed:
            raise BadInputError(
                f"two runs of this method have the seed {seed}",
                where=argument,
                hint=f"They are {by_seed[seed]} and {results}; move one away.",
            )
        by_seed[seed] = results
    if not by_seed:
        raise BadInputError(
            "there is no finished, evaluated run of this method",
            where=argument,
            hint=f"Train it with several seeds below {runs}: nearfield train RECIPE seed=1 --run-folder {runs}/NAME-1.",
        )
    return Method(label or path.stem, by_seed)


def _recipe_of(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    try:
        value = yaml12.load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInputError("the recipe of this run cannot be read", where=str(file)) from error
    if not isinstance(value, dict):
        raise BadInputError("this is no recipe", where=str(file))
    return value


def _method_of(recipe: dict[str, Any]) -> str:
    kept = {key: value for key, value in recipe.items() if key not in ("seed", "name")}
    return canonical_json(kept)


def _results_of(run: Path) -> Path | None:
    """The results of the trained model; None where the run has not come so far."""
    results = read_manifest(run).get("stages", {}).get("evaluate", {}).get("results", {})
    folder = run / str(results["after"]) if isinstance(results, dict) and "after" in results else None
    return folder if folder is not None and folder.is_dir() else None
