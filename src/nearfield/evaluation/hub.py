"""A model's page on the hub: its scores in the card, and beside its files the results and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from nearfield.errors import BadInputError
from nearfield.evaluation.results import MANIFEST, read_manifest, read_scores
from nearfield.evaluation.scores import MARK, Key, TaskScores, score_interval, score_notices, tasks_in_words, title_of
from nearfield.evaluation.tasks import LOCAL, official_class
from nearfield.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

START, END = "<!-- nearfield: scores -->", "<!-- nearfield: end of scores -->"


def update_card(model: Path, results: Path, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Path:
    """Put the scores of a results folder into the ``README.md`` of a model's folder, in place of those that are there."""
    card = model / "README.md"
    if not model.is_dir():
        raise BadInputError("this model folder does not exist", where=str(model))
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {model.resolve().name}\n"
    if (START in text) != (END in text):
        raise BadInputError(
            "the marks around the scores of this card are damaged", where=str(card), hint="Delete both."
        )
    section = scores_section(results, samples=samples, level=level, seed=seed)
    if START in text:
        before, _, rest = text.partition(START)
        text = before + section + rest.partition(END)[2].lstrip("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + section
    try:
        text = with_index(text, model.resolve().name, read_scores(results))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInputError(
            f"the front matter of this card is no YAML ({reason})",
            where=str(card),
            hint="It stands between two lines '---'.",
        ) from error
    write_text(card, text)
    return card


def with_index(text: str, name: str, scores: Mapping[Key, TaskScores]) -> str:
    """The card with its front matter's ``model-index`` (what the hub shows as evaluation results) made anew.

    Only scores on official data stand there: those on local data, and of tasks that mteb does not have, are in the table
    alone.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries = [
        entry
        for key, of in sorted(scores.items())
        if not of.data_revision.startswith(LOCAL) and (entry := _entry(key, of)) is not None
    ]
    head: Any = {}
    rest = text
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        front, _, rest = text[4:].partition("\n---\n")
        head = yaml.safe_load(front) or {}
    if not isinstance(head, dict) or not (entries or "model-index" in head):
        return text
    head.pop("model-index", None)
    if entries:
        head["model-index"] = eval_results_to_model_index(name, entries)
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{rest}"


def _entry(key: Key, of: TaskScores) -> EvalResult | None:
    """A score as the hub keeps it, with the task's own data set, as mteb writes it; None for a task that mteb does not have."""
    from huggingface_hub import EvalResult

    name, subset, split = key
    task = official_class(name)
    if task is None:
        return None
    return EvalResult(
        task_type=task.metadata._hf_task_type()[0],
        task_name=task.metadata.type,
        dataset_type=task.metadata.dataset["path"],
        dataset_name=f"{name} ({subset})",
        dataset_config=subset,
        dataset_split=split,
        dataset_revision=of.data_revision,
        metric_type=of.metric,
        metric_name=of.metric,
        metric_value=round(100 * of.score, 4),
    )


def scores_section(results: Path, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> str:
    """Markdown with a row a task: score, interval, units, what the interval speaks of, data revision, prompts."""
    scores = read_scores(results)
    if not scores:
        raise BadInputError("there are no scores", where=str(results), hint="Score the model with nearfield eval.")
    facts: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    for line in read_manifest(results):
        facts |= line.get("tasks", {})
        versions = line.get("versions", versions)
    lines = [START, "## Scores", "", f"| task | score | {100 * level:g} % interval | units | of | prompts | data |"]
    lines += ["| --- | ---: | ---: | ---: | --- | --- | --- |"]
    for key, of in sorted(scores.items()):
        interval = score_interval(key, of, samples, level, seed)
        ends = "none" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"
        units, clusters = of.sizes
        counted = "" if units is None else str(units) + (f" in {clusters} clusters" if clusters != units else "")
        if of.sharing is not None:
            counted = of.resampled or counted
        scope = of.reason or of.estimator.scope + (f"; {of.caution}" if of.caution else "")
        prompts = facts.get(key[0], {}).get("prompts", {})
        texts = "; ".join(f"{role}: `{text}`" for role, text in prompts.items() if text) or "none"
        mark = MARK if of.notices else ""
        cells = [
            f"{title_of(key)} ({of.metric})",
            f"{of.score:.4f}{mark}",
            ends,
            counted,
            scope,
            texts,
            of.data_revision,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    said = score_notices({"scores": scores}, sorted(scores))
    if said:
        lines += ["", "What to know of scores with an asterisk:", ""]
        lines += [f"- {tasks_in_words(notice.tasks, notice.everywhere)}: {notice.what}" for notice in said]
    made = ", ".join(
        f"{name} {versions[name]}" for name in ("mteb", "sentence-transformers", "torch") if name in versions
    )
    lines += [
        "",
        f"Scored with nearfield{' (' + made + ')' if made else ''}. A score says nothing of other domains.",
        END,
    ]
    return "\n".join(lines) + "\n"


RESULTS = "nearfield"
"""The folder of the repository that holds the results and the manifest."""
NEVER = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Endings of files that run code when they are loaded."""
LEFT_OUT = {".git", ".cache", "__pycache__", "checkpoints"}


class Api(Protocol):
    """The part of ``huggingface_hub.HfApi`` that is used here."""

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
        result_files = [*results.glob("*.json"), results / MANIFEST]
        placed |= {f"{RESULTS}/{path.name}": path for path in sorted(result_files) if path.is_file()}
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
