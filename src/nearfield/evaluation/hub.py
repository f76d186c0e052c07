"""Push a model's folder to the hub: with its scores in the card, and beside them the results and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nearfield.errors import BadInputError
from nearfield.evaluation.card import update_card
from nearfield.evaluation.results import MANIFEST

RESULTS = "nearfield"
"""The folder of the repository that holds the results and the manifest."""
NEVER = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Endings of files that run code when they are loaded."""
LEFT_OUT = {".git", ".cache", "__pycache__", "checkpoints"}


class Api(Protocol):
    """What is used of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository."""

    def create_commit(self, repo_id: str, *, operations: Any, commit_message: str) -> Any:
        """Put files into it, all in one commit."""


@dataclass(frozen=True)
class Pushed:
    """A commit on the hub, and the paths of its files."""

    repository: str
    commit: str
    files: tuple[str, ...]


def push(
    model: Path, repository: str, results: Path | None, *, private: bool = False, api: Api | None = None, seed: int = 0
) -> Pushed:
    """Write the scores into the card, and push the folder ``model`` as one commit of ``ORGANISATION/NAME``.

    ``results`` is the folder that ``nearfield eval`` filed. Files that run code when they are loaded stop the push.
    """
    if repository.count("/") != 1 or not all(part.strip() for part in repository.split("/")):
        raise BadInputError(f"the repository {repository!r} is not of the form organisation/name", where="--hub")
    if not (model / "modules.json").is_file() and not (model / "config.json").is_file():
        raise BadInputError(
            "this folder holds no model in sentence-transformers format",
            where=str(model),
            hint="Name the folder with --model.",
        )
    files = sorted(
        path for path in model.rglob("*") if path.is_file() and not LEFT_OUT & set(path.relative_to(model).parts)
    )
    unsafe = [str(path.relative_to(model)) for path in files if path.suffix in NEVER]
    if unsafe:
        raise BadInputError(
            f"these files run code when they are loaded: {', '.join(unsafe)}",
            where=str(model),
            hint="Save the model with safetensors, and delete them.",
        )
    if results is not None:
        card = update_card(model, results, seed=seed)
        files = sorted({*files, card})
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    placed = {path.relative_to(model).as_posix(): path for path in files}
    if results is not None:
        kept = [*results.glob("*.json"), results / MANIFEST]
        placed |= {f"{RESULTS}/{path.name}": path for path in sorted(kept) if path.is_file()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in placed.items()]
    hub: Api = api or HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        made = hub.create_commit(
            repository, operations=operations, commit_message="Model, card, results and manifest, by nearfield"
        )
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadInputError(
            f"the hub did not take it ({str(error).strip().splitlines()[0]})",
            where=repository,
            hint="Log in with `hf auth login`, and see that the token may write there.",
        ) from error
    return Pushed(repository, str(made.oid), tuple(placed))
