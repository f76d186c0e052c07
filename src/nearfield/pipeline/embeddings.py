"""Models over the texts of a suite: what ``nearfield analyse`` and a run's report show of their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from nearfield.analysis.geometry import Analysis, analyse
from nearfield.analysis.search import Questions, searched
from nearfield.config import load_yaml
from nearfield.errors import BadInputError
from nearfield.evaluation.statistics import holm
from nearfield.evaluation.tasks import SuiteTask
from nearfield.evaluation.texts import labelled_texts, questions_of
from nearfield.methods import rankability
from nearfield.methods.association import weat
from nearfield.methods.likeness import add_likeness, versions
from nearfield.provenance import generator

Encode = Callable[[Sequence[str]], NDArray[np.float32]]
MOST_QUESTIONS = 1_000
TEST_SHARE = 0.5
SHOTS = (2, 20)


@dataclass(frozen=True)
class Sample:
    """Distinct texts with a label each, and questions with their right documents (empty without a retrieval task)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    questions: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    right: tuple[tuple[int, ...], ...] = ()


def sample_of(tasks: Sequence[SuiteTask], limit: int, seed: int) -> Sample:
    """Draw texts of a suite's tasks, as many of each task as of another, and the questions of its first retrieval task."""
    label_of: dict[str, str] = {}
    share = -(-limit // max(len(tasks), 1))
    asked: tuple[list[str], list[str], list[tuple[int, ...]]] | None = None
    for task in tasks:
        pairs = [(text, label) for text, label in labelled_texts(task.task) if text.strip() and text not in label_of]
        distinct = list(dict(pairs).items())
        label_of |= dict(drawn(distinct, share, seed, task.name))
        if asked is None:
            asked = questions_of(task.task, MOST_QUESTIONS, limit, seed)
    chosen = drawn(list(label_of.items()), limit, seed, "texts")
    questions, documents, right = asked or ([], [], [])
    return Sample(
        tuple(text for text, _ in chosen),
        tuple(label for _, label in chosen),
        tuple(questions),
        tuple(documents),
        tuple(right),
    )


def drawn(members: Sequence[Any], limit: int, seed: int, name: str) -> list[Any]:
    """At most ``limit`` of them, by the seed, in their order."""
    if len(members) <= limit:
        return list(members)
    rows = generator(seed, "analyse", name).choice(len(members), size=limit, replace=False)
    return [members[row] for row in sorted(rows)]


def analyse_models(
    encoders: Mapping[str, Encode],
    sample: Sample,
    *,
    seed: int = 0,
    associations: Path | None = None,
    attribute: Path | None = None,
) -> Analysis:
    """Everything there is to say of these models on these texts; every distinct text is encoded once a model."""
    tests = read_associations(associations) if associations is not None else []
    valued = read_attribute(attribute) if attribute is not None else None
    wanted = dict.fromkeys([*sample.texts, *sample.questions, *sample.documents])
    wanted |= dict.fromkeys(text for test in tests for side in SIDES for text in test[side])
    wanted |= dict.fromkeys(valued[0] if valued else [])
    texts = list(wanted)
    row = {text: i for i, text in enumerate(texts)}
    whole = {name: np.asarray(encode(texts), dtype=np.float64) for name, encode in encoders.items()}

    def of(name: str, some: Sequence[str]) -> NDArray[np.float64]:
        return whole[name][[row[text] for text in some]]

    vectors = {name: of(name, sample.texts) for name in whole}
    made = add_likeness(analyse(vectors, seed=seed, texts=sample.texts, labels=sample.labels), vectors)
    extras: dict[str, Any] = {}
    if len(sample.questions) >= 20:
        asked = {n: Questions(of(n, sample.questions), of(n, sample.documents), sample.right) for n in whole}
        extras["search"] = {name: asdict(searched(one, seed=seed)) for name, one in asked.items()}
        if len(asked) > 1:
            extras["versions"] = asdict(versions(asked))
    if tests:
        extras["associations"] = {name: _associations(tests, partial(of, name)) for name in whole}
    if valued is not None:
        extras["rankability"] = {name: _rankability(of(name, valued[0]), valued[1], seed) for name in whole}
    return replace(made, extras=extras, sentences=(*made.sentences, *_sentences(extras)))


SIDES = ("first", "second", "a", "b")


def read_associations(path: Path) -> list[dict[str, Any]]:
    """Tests of a YAML file: a list of ``name``, ``first``, ``second``, ``a``, ``b`` and, for SEAT, ``templates`` with ``{}``."""
    try:
        value = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInputError(f"these associations cannot be read ({error})", where=str(path)) from error
    if not isinstance(value, list) or not value:
        raise BadInputError("associations are a list of tests", where=str(path))
    tests = []
    for number, test in enumerate(value, start=1):
        where = f"{path}, test {number}"
        if not isinstance(test, dict) or set(test) - {"name", "templates", *SIDES} or set(SIDES) - set(test):
            raise BadInputError("a test has name, first, second, a, b and templates", where=where)
        templates = test.get("templates", ["{}"])
        lists = [templates, *(test[side] for side in SIDES)]
        if not all(isinstance(one, list) and one and all(isinstance(word, str) for word in one) for one in lists):
            raise BadInputError("first, second, a, b and templates are lists of texts", where=where)
        if min(len(test["first"]), len(test["second"])) < 2:
            raise BadInputError("each side needs two targets or more", where=where)
        if not all("{}" in template for template in templates):
            raise BadInputError("a template holds {} where the word goes", where=where)
        filled = {side: [t.replace("{}", word) for word in test[side] for t in templates] for side in SIDES}
        tests.append({"name": str(test.get("name", f"test {number}")), **filled})
    return tests


def _associations(tests: Sequence[dict[str, Any]], of: Callable[[Sequence[str]], Any]) -> list[dict[str, Any]]:
    results = [weat(*(of(test[side]) for side in SIDES)) for test in tests]
    adjusted = holm([one.p for one in results])
    return [
        {"name": test["name"], **asdict(one), "p_adjusted": p}
        for test, one, p in zip(tests, results, adjusted, strict=True)
    ]


def read_attribute(path: Path) -> tuple[list[str], list[float]]:
    """Texts and their values: one text a line with its number behind a tab."""
    texts: dict[str, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"this file of values cannot be read ({error})", where=str(path)) from error
    for number, line in enumerate(lines, start=1):
        text, tab, value = line.rpartition("\t")
        try:
            texts[text] = float(value)
        except ValueError:
            tab = ""
        if not tab or not np.isfinite(texts[text]):
            raise BadInputError("a line holds a text, a tab and a number", where=f"{path}, line {number}")
    if len(texts) < 40:
        raise BadInputError(f"there are {len(texts)} texts with values; 40 are needed", where=str(path))
    return list(texts), list(texts.values())


def _rankability(vectors: NDArray[np.float64], values: Sequence[float], seed: int) -> dict[str, Any]:
    """Spearman on the other half of the items, for axes from a few, from extremes and from the whole half; and shuffled."""
    rng = generator(seed, "rankability")
    order, y = rng.permutation(len(vectors)), np.asarray(values, dtype=np.float64)
    fit, held = order[: len(order) // 2], order[len(order) // 2 :]
    axes = {f"ridge, {len(fit)}": rankability.ridge_axis(vectors[fit], y[fit])}
    axes |= {f"ridge, {n}": rankability.ridge_axis(vectors[fit[:n]], y[fit[:n]]) for n in SHOTS if 2 < n < len(fit)}
    axes["two extremes"] = rankability.extremes_axis(vectors[fit], y[fit])
    axes["shuffled"] = rankability.ridge_axis(vectors[fit], rng.permutation(y[fit]))
    correlations = {name: rankability.rankability(axis, vectors[held], y[held]) for name, axis in axes.items()}
    return {"items": len(held), "spearman": {k: v if np.isfinite(v) else 0.0 for k, v in correlations.items()}}


def _sentences(extras: Mapping[str, Any]) -> list[str]:
    said = []
    for name, one in extras.get("search", {}).items():
        top = one["accuracy"][0]
        cut = one["f1"]
        said.append(
            f"{name}: {100 * top['value']:.1f} % [{100 * top['low']:.1f}, {100 * top['high']:.1f}] of {one['questions']} "
            f"questions find a right document first among {one['documents']}. The best cut between right and random documents is "
            f"a cosine of {cut['cut']:.3f} [{cut['low']:.3f}, {cut['high']:.3f}]; {100 * one['overlaps']['right, random']:.0f} % of both "
            "distributions overlap. The cut holds for this model and texts of this kind, and was chosen on the pairs it is judged on."
        )
    versions = extras.get("versions")
    if versions:
        said.append(
            "The models' vectors are of different sizes: none reads another's index."
            if versions["kept"] is None
            else f"Of the older indexes, newer models read {100 * versions['kept']:.0f} % at least as well as the model that wrote them "
            f"(mean accuracy {versions['mean']:.3f}). Where that is not 100 %, encode the stored texts again."
        )
        for pair, points in versions["audits"].items():
            said.append(
                f"{pair}: with {points[-1][0]} known pairs a rotation finds {100 * points[-1][1]:.0f} % of the other texts again. "
                "Stored vectors are to be guarded like the texts; a low share is no proof of safety."
            )
    for name, tests in extras.get("associations", {}).items():
        said += [
            f"{name}, {one['name']}: effect {one['effect']:+.2f}, p = {one['p']:.4g} ({one['p_adjusted']:.4g} after Holm)"
            + (", degenerate: the attributes cannot be told apart" if one["degenerate"] else "")
            + ". It speaks of these words; no association found is not the absence of bias."
            for one in tests
        ]
    for name, one in extras.get("rankability", {}).items():
        told = ", ".join(f"{axis}: {value:.2f}" for axis, value in one["spearman"].items())
        said.append(f"{name}: a direction orders {one['items']} unseen items by their value to {told} (Spearman).")
    return said
