"""A domain's benchmark beside its general twin: the gap, whether models keep their order, and what complexity explains.

FinMTEB's control (2502.10990) and KorFinMTEB's twin of a translated benchmark (2502.07131): the same models on both sides.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nearfield.errors import BadInputError
from nearfield.evaluation.comparison import check_settings, label_results
from nearfield.evaluation.results import read_scores
from nearfield.evaluation.scores import Key, TaskScores, joint_replicates
from nearfield.evaluation.statistics import Floats, is_too_large, midranks

VERSION = 1
MOST_EXACT = 8
"""Models up to which all orders are counted for the p of a rank correlation."""


@dataclass(frozen=True)
class Gap:
    """The mean domain score minus the mean general score, of a model and task type (``all``: the mean over types).

    ``low`` and ``high`` are null where a task has no interval: the interval is over queries and items, not over tasks.
    """

    model: str
    type: str
    general: float
    domain: float
    gap: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Twins:
    """Gaps by model and type; the rank correlation of models between both sides (null with fewer than three models).

    ``thirds`` is measure -> low, medium, high: how many tasks of each side, their mean scores, the gap (null where a side
    has none).
    """

    models: tuple[str, ...]
    gaps: tuple[Gap, ...]
    spearman: float | None
    p: float | None
    thirds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The value that ``--json`` writes."""
        return {"version": VERSION, **asdict(self)}


def twins(
    results: Sequence[Path],
    general: Sequence[str],
    domain: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    complexity: Mapping[str, Mapping[str, float]] | None = None,
    samples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> Twins:
    """Compare models' scores on ``general`` and ``domain`` tasks; ``complexity`` is measure -> task -> value.

    Types that only one side has do not count. Raises :class:`BadInputError` for a model that lacks a task: means over other
    tasks than the twin's say nothing.
    """
    check_settings(samples, samples, level)
    if set(general) & set(domain):
        raise BadInputError(f"a task is on both sides: {', '.join(sorted(set(general) & set(domain)))}")
    models = label_results(results, labels)
    read = {model.label: read_scores(Path(model.path)) for model in models}
    tables = {name: _by_task(model_scores, [*general, *domain], name) for name, model_scores in read.items()}
    first = next(iter(tables.values()))
    types = {task: next(iter(first[task].values())).task_type or "Tasks" for task in first}
    shared = [t for t in dict.fromkeys(types[x] for x in general) if t in {types[x] for x in domain}]
    if not shared:
        raise BadInputError("no task type is on both sides", hint="A twin has tasks of the same types.")
    notes = [f"{task}: its type {types[task]} is on one side only" for task in types if types[task] not in shared]
    dependent = {
        f"{task} has no interval: {of.reason}"
        for table in tables.values()
        for task, model_scores in table.items()
        for of in model_scores.values()
        if is_too_large(of.reason)
    }
    notes += sorted(dependent)
    gaps: list[Gap] = []
    sides: dict[str, list[float]] = defaultdict(list)
    for name, table in tables.items():
        drawn = {task: _drawn(table[task], samples, seed) for task in table}
        points = {task: float(np.mean([of.score for of in table[task].values()])) for task in table}
        rows = [_gap(name, kind, types, general, domain, points, drawn, level) for kind in shared]
        whole = _whole(name, [gap for gap, _ in rows], [replicates for _, replicates in rows], level)
        gaps += [*(gap for gap, _ in rows), whole]
        sides["general"].append(whole.general)
        sides["domain"].append(whole.domain)
    rho, p = (None, None) if len(models) < 3 else rank_correlation(sides["general"], sides["domain"])
    scores = {
        task: float(np.mean([np.mean([of.score for of in table[task].values()]) for table in tables.values()]))
        for task in first
    }
    thirds: dict[str, list[dict[str, Any]]] = {}
    for measure, values in (complexity or {}).items():
        lacking = sorted(set(scores) - set(values))
        if lacking:
            notes.append(f"{measure}: not known of {', '.join(lacking)}, which are left out of its thirds")
        if len(set(scores) & set(values)) >= 3:
            known = {task: values[task] for task in scores if task in values}
            thirds[measure] = [asdict(one) | {"gap": one.gap} for one in by_thirds(known, scores, domain)]
    return Twins(tuple(tables), tuple(gaps), rho, p, thirds, tuple(notes))


def _by_task(scores_of: Mapping[Key, TaskScores], tasks: Sequence[str], name: str) -> dict[str, dict[Key, TaskScores]]:
    table: dict[str, dict[Key, TaskScores]] = {task: {} for task in tasks}
    for key, of in scores_of.items():
        if key[0] in table:
            table[key[0]][key] = of
    lacking = [task for task, scores in table.items() if not scores]
    if lacking:
        raise BadInputError(f"{name} has no result of {', '.join(lacking)}", hint="Score it with nearfield eval.")
    return table


def _drawn(scores: Mapping[Key, TaskScores], samples: int, seed: int) -> Floats | None:
    """Draws of a task's score (the mean over its subsets), None where one of them has no interval."""
    parts = []
    for key, of in scores.items():
        replicates = [of.own(drawn) for _, drawn in joint_replicates(key, {"": of}, samples, seed)]
        if not replicates:
            return None
        parts.append(replicates[0])
    return np.asarray(np.mean(parts, axis=0), dtype=np.float64)


def _gap(
    name: str,
    kind: str,
    types: Mapping[str, str],
    general: Sequence[str],
    domain: Sequence[str],
    points: Mapping[str, float],
    drawn: Mapping[str, Floats | None],
    level: float,
) -> tuple[Gap, Floats | None]:
    sides = [[task for task in side if types[task] == kind] for side in (general, domain)]
    means = [float(np.mean([points[task] for task in side])) for side in sides]
    known = [[replicates for task in side if (replicates := drawn[task]) is not None] for side in sides]
    replicates = None
    if all(len(scores) == len(side) for scores, side in zip(known, sides, strict=True)):
        replicates = np.mean(known[1], axis=0) - np.mean(known[0], axis=0)
    return Gap(name, kind, means[0], means[1], means[1] - means[0], *_ends(replicates, level)), replicates


def _whole(name: str, gaps: Sequence[Gap], replicates: Sequence[Floats | None], level: float) -> Gap:
    known = [one for one in replicates if one is not None]
    mean = np.mean(known, axis=0) if len(known) == len(replicates) else None
    general, domain = (float(np.mean([getattr(gap, side) for gap in gaps])) for side in ("general", "domain"))
    return Gap(name, "all", general, domain, domain - general, *_ends(mean, level))


def _ends(replicates: Floats | None, level: float) -> tuple[float | None, float | None]:
    if replicates is None:
        return None, None
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its two-sided p: over all orders of up to eight models, else by Student's t."""
    x, y = (midranks(np.asarray(side, dtype=np.float64)) for side in (first, second))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    if scale < 1e-12:
        return 0.0, 1.0
    rho = float(x @ y) / scale
    if len(x) <= MOST_EXACT:
        orders = np.array(list(itertools.permutations(range(len(x)))))
        correlations = np.abs(y[orders] @ x / scale)
        return rho, float((correlations >= abs(rho) - 1e-12).mean())
    from scipy import stats

    t = rho * math.sqrt((len(x) - 2) / max(1 - rho * rho, 1e-300))
    return rho, float(2 * stats.t.sf(abs(t), len(x) - 2))


def text_measures(texts: Sequence[str], english: bool, *, most_words: int = 20_000) -> dict[str, float]:
    """Entropy of words, in bits, of the first ``most_words`` (longer streams have more), and, of English, the mean fog index.

    The other two of FinMTEB's measures, an LLM's errors and the distance of words to their heads, need a model or a parser:
    they are handed in.
    """
    words = [word for text in texts for word in text.lower().split()][:most_words]
    measures = {"entropy": entropy(words)}
    return measures | ({"fog": float(np.mean([fog(text) for text in texts]))} if english and texts else {})


_VOWELS = re.compile(r"[aeiouy]+")


def syllables(word: str) -> int:
    """Syllables of an English word, by its groups of vowels; a silent last e does not count."""
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee", "ye")) and count > 1:
        count -= 1
    return max(count, 1)


def fog(text: str) -> float:
    """Gunning's fog index of an English text: 0.4 (words / sentences + 100 words of three or more syllables / words)."""
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(len([part for part in re.split(r"[.!?]+", text) if re.search(r"[A-Za-z]", part)]), 1)
    long = sum(syllables(word) >= 3 for word in words)
    return 0.4 * (len(words) / sentences + 100 * long / len(words))


def entropy(symbols: Sequence[str]) -> float:
    """Shannon entropy of a stream of symbols (words of a text), in bits. Longer streams have more: cap their length."""
    counts = Counter(symbols)
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def dependency_distance(heads: Sequence[int | None]) -> float:
    """Mean distance of words to their heads; ``heads`` are positions from 0, None for the root. Parsing is the caller's."""
    distances = [abs(i - head) for i, head in enumerate(heads) if head is not None]
    return sum(distances) / len(distances) if distances else 0.0


@dataclass(frozen=True)
class Third:
    """Data sets of like complexity: how many of each benchmark, and their mean scores (None where there is none)."""

    name: str
    general: int
    domain: int
    general_score: float | None
    domain_score: float | None

    @property
    def gap(self) -> float | None:
        """Domain minus general; None where one side is empty."""
        if self.general_score is None or self.domain_score is None:
            return None
        return self.domain_score - self.general_score


def by_thirds(
    complexity: Mapping[str, float], scores: Mapping[str, float], domain: Sequence[str]
) -> tuple[Third, Third, Third]:
    """Compare general and domain data sets within thirds of complexity, cut on all data sets together.

    ``complexity`` and ``scores`` are of each data set; ``domain`` names those of the domain's benchmark. A gap in all thirds
    alike is the domain's; one that is gone within thirds was that of the texts.
    """
    names = sorted(complexity, key=lambda name: (complexity[name], name))
    parts = np.array_split(np.array(names, dtype=object), 3)
    special = set(domain)

    def mean(tasks: list[str]) -> float | None:
        return float(np.mean([scores[name] for name in tasks])) if tasks else None

    thirds = []
    for title, part in zip(("low", "medium", "high"), parts, strict=True):
        of_domain = [str(name) for name in part if name in special]
        general = [str(name) for name in part if name not in special]
        thirds.append(Third(title, len(general), len(of_domain), mean(general), mean(of_domain)))
    return thirds[0], thirds[1], thirds[2]
