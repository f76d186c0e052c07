"""The JSON of ``nearfield analyse --json``, of made vectors, with any texts put in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from nearfield.analysis.geometry import Analysis, analyse
from nearfield.analysis.search import Questions, searched
from nearfield.methods.likeness import add_likeness, versions


@functools.cache
def _figures(texts: int) -> tuple[Analysis, dict[str, Any]]:
    """Two models with every part, computed once; the texts are numbers."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(texts, 12)) + 3 * np.eye(12)[np.arange(texts) % 4]
    models = {"before": base, "after": base + 0.5 * rng.normal(size=base.shape)}
    right = tuple((i,) for i in range(texts // 2))
    asked = {
        name: Questions(v[: texts // 2] + 0.5 * rng.normal(size=(texts // 2, 12)), v, right)
        for name, v in models.items()
    }
    extras = {
        "search": {name: asdict(searched(one, samples=50)) for name, one in asked.items()},
        "versions": asdict(versions(asked)),
    }
    made = analyse(models, texts=[str(i) for i in range(texts)], labels=[str(i % 4) for i in range(texts)])
    made = add_likeness(made, models)
    return made, extras


def made_analysis(say: Callable[[str], str] = str, texts: int = 120) -> dict[str, Any]:
    """Two models with every part; what is text in it goes through ``say``."""
    figures, found = _figures(texts)
    assert figures.drawing is not None
    drawing = replace(
        figures.drawing,
        labels=tuple(say(f"label {one}") for one in figures.drawing.labels),
        texts=tuple(say(f"text number {one}") for one in figures.drawing.texts),
    )
    names = {name: say(name) for name in figures.models}
    test = {"effect": 1.2, "p": 0.01, "p_adjusted": 0.02, "exact": True, "degenerate": False, "dropped": 0}
    extras = {
        "search": {names[name]: one for name, one in found["search"].items()},
        "versions": found["versions"] | {"models": list(names.values())},
        "associations": {name: [{"name": say("flowers"), **test}] for name in names.values()},
        "rankability": {
            name: {"items": 20, "spearman": {"ridge, 20": 0.8, "shuffled": 0.05}} for name in names.values()
        },
    }
    said = tuple(say(line) for line in figures.sentences)
    return replace(figures, models=tuple(names.values()), drawing=drawing, sentences=said, extras=extras).to_json()
