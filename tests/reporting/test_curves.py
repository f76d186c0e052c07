"""The sentences on watched figures: one for each bad range, none inside it; and their charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearfield.reporting.curves import build_curves, judge

GOOD = {
    "positive_similarity": 0.7,
    "hardest_negative_similarity": 0.4,
    "masked_share": 0.2,
    "masked_score": 0.2,
    "masked_known_positive": 0.01,
    "negatives": 100.0,
    "effective_negatives": 20.0,
    "hardest_gradient_share": 0.4,
    "effective_examples": 0.8,
    "temperature": 0.05,
    "uniformity": -2.5,
    "effective_rank": 40.0,
    "rank_limit": 64.0,
}
LEARNT = {"objective": {"learn_temperature": True, "temperature_bounds": [0.01, 1.0]}}


def say(last: dict[str, float], first: dict[str, float] | None = None, recipe: Any = None) -> list[str]:
    """Twenty watched steps that begin and end with these figures."""
    begin, end = {**GOOD, **(first or {})}, {**GOOD, **last}

    def column(name: str) -> list[float]:
        return [begin.get(name, float("nan"))] * 10 + [end.get(name, float("nan"))] * 10

    return judge(column, recipe or {})


def test_good_figures_need_no_words() -> None:
    assert say({}) == []
    assert judge(lambda name: [], {}) == []
    assert say({}, recipe=LEARNT) == []


@pytest.mark.parametrize(
    ("last", "inside", "words"),
    [
        ({"hardest_negative_similarity": 0.71}, {"hardest_negative_similarity": 0.69}, "nearer to a query (cosine 0.71)"),
        ({"masked_share": 0.51, "masked_score": 0.45}, {"masked_share": 0.5}, "51% of the candidates, most of them score_mask (45%"),
        ({"effective_negatives": 1.9}, {"effective_negatives": 2.1}, "Of 100 negatives a query only 1.9 count"),
        ({"effective_negatives": 91.0}, {"effective_negatives": 89.0}, "Nearly all negatives count alike (91 of 100"),
        ({"hardest_gradient_share": 0.91}, {"hardest_gradient_share": 0.89}, "make 91% of the gradient"),
        ({"effective_examples": 0.09}, {"effective_examples": 0.11}, "Weights leave 9% of a batch's examples"),
        ({"uniformity": -0.9}, {"uniformity": -1.1}, "crowd together (uniformity −0.9"),
        ({"effective_rank": 19.0}, {"effective_rank": 21.0}, "fell from 40 to 19"),
    ],
)  # fmt: skip
def test_a_sentence_beyond_the_bound_and_none_within(
    last: dict[str, float], inside: dict[str, float], words: str
) -> None:
    (sentence,) = say(last)
    assert words in sentence
    assert say(inside) == []


def test_a_rank_that_was_always_low() -> None:
    (sentence,) = say({"effective_rank": 6.0}, {"effective_rank": 6.0})
    assert sentence.startswith("The effective rank is 6 of 64 possible")


def test_a_temperature_at_its_bound() -> None:
    (sentence,) = say({"temperature": 0.01002}, recipe=LEARNT)
    assert "lies at its bound of 0.01" in sentence
    assert say({"temperature": 0.01002}, recipe={"objective": {"temperature": 0.01}}) == []
    assert say({"temperature": 0.01002}, recipe={"objective": {"learn_temperature": True}}) == []


def test_the_hardest_of_few_negatives_are_no_sign() -> None:
    assert say({"negatives": 7.0, "effective_negatives": 4.0, "hardest_gradient_share": 0.95}) == []


def test_charts_of_figures_that_are_told_now_and_then(tmp_path: Path) -> None:
    """Every tenth step has them: the chart has these steps alone, and the others keep all."""
    lines = []
    for step in range(1, 101):
        line: dict[str, Any] = {"step": step, "loss": 1.0 / step}
        if step % 10 == 1:
            line |= {**GOOD, "effective_rank": 40.0 - step / 4}
        lines.append(json.dumps(line))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = build_curves(tmp_path)
    charts: dict[str, Any] = {figure.key: figure.values for figure in found.figures}
    assert {"masked", "negatives", "gradient-shares", "temperature", "alignment", "rank"} <= charts.keys()
    rank, masked = ({one["label"]: one["y"] for one in charts[key]["series"]} for key in ("rank", "masked"))
    assert charts["rank"]["x"] == list(range(1, 100, 10))
    assert rank["effective rank"] == [40.0 - step / 4 for step in range(1, 100, 10)]
    assert list(masked) == ["all", "by score", "known positive"]
    assert len(charts["loss"]["x"]) == 100
    assert any("fell from 39.8 to 17.2" in note for note in found.notes)
