"""The texts that a suite scores: every query and document, every pair and item of the evaluated splits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mteb.abstasks import AbsTaskRetrieval

from nearfield.data.decontaminate import BenchmarkTask, BenchmarkText
from nearfield.errors import BadInputError
from nearfield.evaluation.tasks import SuiteTask, parts_of, splits_of
from nearfield.provenance import generator

_NO_TEXT = {"id", "_id", "idx", "lang", "language", "cluster", "query-id", "corpus-id", "image", "modality"}


def benchmark_tasks(tasks: Sequence[SuiteTask]) -> Iterator[BenchmarkTask]:
    """The tasks of a suite with their texts, which are loaded when they are asked for and given back after it."""
    for suite_task in tasks:
        for task in parts_of(suite_task.task):
            yield BenchmarkTask(str(task.metadata.name), functools.partial(task_texts, task))


def task_texts(task: Any) -> Iterator[BenchmarkText]:
    """The texts of the splits and subsets that an mteb task scores.

    Raises :class:`BadInputError` where its data cannot be loaded, as of a hub task on a machine without a network.
    """
    with _loaded(task):
        if isinstance(task, AbsTaskRetrieval):
            for place, split in splits_of(task):
                yield from _retrieval_texts(place, split)
        else:
            label = getattr(task, "label_column_name", None)
            for place, split in splits_of(task):
                yield from _column_texts(place, split, {label, *_NO_TEXT})


@contextlib.contextmanager
def _loaded(task: Any) -> Iterator[None]:
    """The data of a task are loaded inside, and given back afterwards if they were not loaded before."""
    was_loaded = task.data_loaded
    try:
        task.load_data()
    except BadInputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInputError(
            f"the data of this task cannot be loaded ({reason[0][:200]})",
            where=str(task.metadata.name),
            hint="Fetch them on a machine with a network, or leave the task out of the suite.",
        ) from error
    try:
        if isinstance(task, AbsTaskRetrieval):
            task.convert_v1_dataset_format_to_v2(num_proc=None)
        yield
    finally:
        if not was_loaded and task.data_loaded:
            task.unload_data()


def _retrieval_texts(place: str, split: Mapping[str, Any]) -> Iterator[BenchmarkText]:
    relevant = {
        document for documents in split["relevant_docs"].values() for document, score in documents.items() if score > 0
    }
    for row in split["queries"]:
        for text in _forms(row):
            yield BenchmarkText(f"{place}/{row['id']}", "query", text)
    for row in split["corpus"]:
        role = "document" if row["id"] in relevant else "distractor"
        for text in _forms(row):
            yield BenchmarkText(f"{place}/{row['id']}", role, text)


def _forms(row: Mapping[str, Any]) -> list[str]:
    """A document with a title as mteb encodes it, title first, and its body alone."""
    bodies = list(_strings(row.get("text")))
    title = row.get("title")
    if isinstance(title, str) and title.strip():
        return list(dict.fromkeys([f"{title} {body}".strip() for body in bodies] + bodies))
    return bodies


def _column_texts(place: str, rows: Iterable[Mapping[str, Any]], left_out: set[str | None]) -> Iterator[BenchmarkText]:
    features = getattr(rows, "features", None)
    if features is not None:
        # Images and sound would be decoded row by row.
        texts = [name for name, feature in features.items() if "string" in repr(feature) and name not in left_out]
        rows = rows.select_columns(texts)  # type: ignore[attr-defined]
    for number, row in enumerate(rows):
        for column, value in row.items():
            if column in left_out:
                continue
            for part, text in enumerate(_strings(value)):
                yield BenchmarkText(f"{place}/{number}/{column}/{part}", "text", text)


def _strings(value: Any) -> Iterator[str]:
    """The strings in a cell, however deep in lists; labels and numbers are none."""
    if isinstance(value, str):
        if value and not value.isspace():
            yield value
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _strings(member)
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _strings(member)


def labelled_texts(task: Any) -> Iterator[tuple[str, str]]:
    """The texts of a task, each with its class where the task has classes, else with the task's name and its role."""
    for part in parts_of(task):
        name = str(part.metadata.name)
        label, column = getattr(part, "label_column_name", None), getattr(part, "input_column_name", None)
        if label is None or column is None or isinstance(part, AbsTaskRetrieval):
            for text in task_texts(part):
                yield text.text, f"{name}: {text.role}"
            continue
        with _loaded(part):
            for _, split in splits_of(part):
                for row in split:
                    value, of = row.get(column), row.get(label)
                    # A clustering's row may be a list of texts with a list of classes.
                    listed = isinstance(value, list) and isinstance(of, list)
                    for text, one in zip(value, of, strict=True) if listed else [(value, of)]:
                        if isinstance(text, str):
                            yield text, f"{name}: {one}"


def questions_of(
    task: Any, most: int, documents: int, seed: int
) -> tuple[list[str], list[str], list[tuple[int, ...]]] | None:
    """Questions of a retrieval task's first split, documents (the right ones first, others drawn), and the rows of the right
    ones of each question; None for a task of another kind."""
    task = parts_of(task)[0]
    if not isinstance(task, AbsTaskRetrieval):
        return None
    with _loaded(task):
        split = next((split for _, split in splits_of(task)), None)
        if split is None or split.get("top_ranked"):
            return None
        rng = generator(seed, "questions")
        corpus = {row["id"]: _forms(row)[:1] for row in split["corpus"]}
        asked = []
        for row in split["queries"]:
            scores = split["relevant_docs"].get(row["id"], {})
            right = [document for document, score in scores.items() if score > 0 and corpus.get(document)]
            texts = list(_strings(row.get("text")))
            if right and texts:
                asked.append((texts[0], right))
        drawn = [asked[i] for i in sorted(rng.permutation(len(asked))[:most].tolist())]
        chosen = list(dict.fromkeys(document for _, right in drawn for document in right))
        known = set(chosen)
        rest = [document for document, forms in corpus.items() if forms and document not in known]
        chosen += [rest[i] for i in rng.permutation(len(rest))[: max(documents - len(chosen), 0)].tolist()]
        row_of = {document: i for i, document in enumerate(chosen)}
        return (
            [text for text, _ in drawn],
            [corpus[document][0] for document in chosen],
            [tuple(row_of[document] for document in right) for _, right in drawn],
        )
