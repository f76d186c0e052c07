"""What the watched figures of a training say: a sentence for each that ends in a bad range, with the bound and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nearfield.reporting import text
from nearfield.reporting.run import Json, listing, mapping, real

CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...], bool, bool], ...] = (
    (
        "masked",
        "Share of candidates that masks leave out",
        (
            ("masked_share", "all"),
            ("masked_score", "by score"),
            ("masked_guide", "by guide"),
            ("masked_known_positive", "known positive"),
            ("masked_same_label", "same label"),
        ),
        False,
        True,
    ),
    (
        "negatives",
        "Negatives a query, and their effective number",
        (("effective_negatives", "effective"), ("negatives", "all")),
        False,
        True,
    ),
    (
        "gradient-shares",
        "Who makes the gradient",
        (
            ("hardest_gradient_share", "hardest 1 % of negatives"),
            ("effective_examples", "effective share of examples"),
        ),
        False,
        True,
    ),
    ("temperature", "Temperature", (("temperature", "temperature"),), False, False),
    (
        "alignment",
        "Alignment and uniformity",
        (("alignment", "alignment"), ("uniformity", "uniformity")),
        False,
        False,
    ),
    (
        "rank",
        "Effective rank of the embeddings",
        (("effective_rank", "effective rank"), ("rank_limit", "most possible")),
        False,
        True,
    ),
    (
        "labels",
        "What a linear map finds, and the spread within labels",
        (
            ("label_probe", "labels found"),
            ("subclass_probe", "subclasses found"),
            ("source_probe", "sources found"),
            ("class_scatter", "spread within labels"),
        ),
        False,
        True,
    ),
)
"""As in :mod:`nearfield.reporting.curves`."""

MASKED = 0.5
"""Above it, masks take more than they leave."""
FEW_NEGATIVES = 2.0
"""Below it, each query learns from one negative, and a text that is wrongly one has it all."""
ALL_NEGATIVES = 0.9
"""Above this share, hard negatives count no more than easy ones. Of normal logits exp(-variance) are effective: 0.9 is a
standard deviation of a third."""
HARDEST = 0.9
"""Above it, 1 % of the negatives have nearly all of the gradient. Of normal logits with deviation 2 they have 37 %, with 4
95 %."""
FEW_EXAMPLES = 0.1
"""Below it, weights make a batch of a tenth."""
CROWDED = -1.0
"""Above it, two drawn texts have a mean cosine of about 0.75 or more; spread over all directions it is -4."""
LOW_RANK = 0.1
"""Below this share of what is possible, most dimensions say nothing."""
LOST_RANK = 0.5
"""Below this share of its start, the training took away dimensions that the model had."""


def ends(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth of the finite values, at least of one; not numbers where none is."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    tenth = max(1, len(known) // 10)
    return math.fsum(known[:tenth]) / tenth, math.fsum(known[-tenth:]) / tenth


def judge(column: Callable[[str], Sequence[float]], recipe: Json) -> list[str]:
    """The sentences; ``column`` gives a figure over the steps, ``recipe`` the parsed recipe, empty if unknown."""
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    for name in _FIGURES:
        start[name], end[name] = ends(column(name))
    return [sentence for rule in _RULES for sentence in rule(start, end, mapping(recipe.get("objective")))]


Figures = Mapping[str, float]


def _similarity(start: Figures, end: Figures, objective: Json) -> list[str]:
    positive, hardest = end["positive_similarity"], end["hardest_negative_similarity"]
    if not hardest > positive:
        return []
    return [
        f"At the end the hardest negative is nearer to a query (cosine {text.number(hardest, 2)}) than its positive "
        f"({text.number(positive, 2)}): the batches are harder than the model can tell apart, or some negatives are positives "
        "that the data does not name. A score_mask or a guide_mask leaves such texts out."
    ]


def _masked(start: Figures, end: Figures, objective: Json) -> list[str]:
    share = end["masked_share"]
    if not share > MASKED:
        return []
    whys = {
        "score_mask": end["masked_score"],
        "guide_mask": end["masked_guide"],
        "mask_known_positives": end["masked_known_positive"],
        "mask_same_label": end["masked_same_label"],
    }
    most = max((name for name, value in whys.items() if math.isfinite(value)), key=lambda n: whys[n], default=None)
    by = f", most of them {most} ({whys[most]:.0%} alone)" if most else ""
    return [
        f"Masks leave out {share:.0%} of the candidates{by}: more than half, so queries see few negatives. Widen the margin, or "
        "make batches of less similar texts."
    ]


def _negatives(start: Figures, end: Figures, objective: Json) -> list[str]:
    effective, every = end["effective_negatives"], end["negatives"]
    if every > FEW_NEGATIVES and effective < FEW_NEGATIVES:
        return [
            f"Of {text.number(every, 3)} negatives a query only {text.number(effective, 2)} count (fewer than "
            f"{FEW_NEGATIVES:g}): each step learns from the single hardest text, right or wrong. Raise the temperature, or mask."
        ]
    if every > FEW_NEGATIVES and effective > ALL_NEGATIVES * every:
        return [
            f"Nearly all negatives count alike ({text.number(effective, 3)} of {text.number(every, 3)}, over {ALL_NEGATIVES:.0%}): "
            "hard ones teach no more than easy ones. Lower the temperature, or weigh by hardness."
        ]
    return []


def _hardest(start: Figures, end: Figures, objective: Json) -> list[str]:
    share = end["hardest_gradient_share"]
    # Of so few negatives the hardest 1 % are not a small share.
    if not share > HARDEST or end["negatives"] < 20:
        return []
    return [
        f"The hardest 1 % of negatives make {share:.0%} of the gradient (over {HARDEST:.0%}): if some of them are wrongly "
        "negatives, they are what is learnt. Look at them, raise the temperature, or mask."
    ]


def _examples(start: Figures, end: Figures, objective: Json) -> list[str]:
    share = end["effective_examples"]
    if not share < FEW_EXAMPLES:
        return []
    return [
        f"Weights leave {share:.0%} of a batch's examples in effect (under {FEW_EXAMPLES:.0%}): the gradient is as noisy as that of "
        "so small a batch. Lower focal.gamma, or level the weights."
    ]


def _temperature(start: Figures, end: Figures, objective: Json) -> list[str]:
    value, bounds = end["temperature"], [real(bound) for bound in listing(objective.get("temperature_bounds"))]
    if objective.get("learn_temperature") is not True or len(bounds) != 2 or not math.isfinite(value):
        return []
    for bound in bounds:
        if bound is not None and bound > 0 and abs(math.log(value / bound)) < 0.01:
            return [
                f"The learnt temperature lies at its bound of {bound:g}: it would go on. Widen temperature_bounds only if the "
                "evaluation gains by it; a temperature that falls without end sharpens the loss, not the model."
            ]
    return []


def _uniformity(start: Figures, end: Figures, objective: Json) -> list[str]:
    value = end["uniformity"]
    if not value > CROWDED:
        return []
    return [
        f"The embeddings crowd together (uniformity {text.number(value, 3)}, over {CROWDED:g}; 0 is one point, −4 all directions): "
        "cosines of unrelated texts are high. A lower temperature or the spread regulariser pushes them apart."
    ]


def _rank(start: Figures, end: Figures, objective: Json) -> list[str]:
    rank, limit, before = end["effective_rank"], end["rank_limit"], start["effective_rank"]
    if rank < LOST_RANK * before:
        return [
            f"The effective rank fell from {text.number(before, 3)} to {text.number(rank, 3)}, to less than half: the training "
            "collapses dimensions (classes merge, or one easy feature crowds out the others). Harder or more varied batches, a "
            "lower learning rate or less weight on labels counter it."
        ]
    if rank < LOW_RANK * limit:
        return [
            f"The effective rank is {text.number(rank, 3)} of {text.number(limit, 3)} possible (under {LOW_RANK:.0%}): most dimensions "
            "say nothing."
        ]
    return []


_RULES = (_similarity, _masked, _negatives, _hardest, _examples, _temperature, _uniformity, _rank)
_FIGURES = (
    "positive_similarity",
    "hardest_negative_similarity",
    *(column for _, _, columns, _, _ in CHARTS for column, _ in columns),
)
