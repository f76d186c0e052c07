"""The training curves: ``metrics.jsonl`` as a few charts and one small table, ``evaluations.jsonl`` as some more.

Beside them a sentence for each figure of the training that ends in a bad range, with the bound and why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nearfield.files import parse_metrics
from nearfield.reporting import text
from nearfield.reporting.page import Charts, Element, Folded, Notes, WordTable
from nearfield.reporting.svg import Figure, LineChart, Series, line_figure
from nearfield.reporting.text import AbsentError, Json, listing, load_object, mapping, real, string

POINTS = 400
"""Points of a curve at most; longer runs are cut into so many stretches of steps, each drawn by its mean."""
STYLES = 4
"""Colours of curves."""

NAN = math.nan


@dataclass(frozen=True)
class Metrics:
    """The lines of ``metrics.jsonl`` by column, one value a step; a step without a value has not-a-number."""

    steps: list[float]
    columns: dict[str, list[float]]
    torn: int
    broken: int
    repeated: int

    def column(self, name: str) -> list[float]:
        """A column, of the length of ``steps``; all not-a-number where the run did not record it."""
        return self.columns.get(name, [NAN] * len(self.steps))

    def known(self, name: str) -> bool:
        """Whether the column has one finite value."""
        return any(math.isfinite(value) for value in self.column(name))


@dataclass(frozen=True)
class Curves:
    """The section: charts, a table of some steps, notes, and what the overview shows.

    ``steps`` is the last step's number; the totals are over the recorded steps, which are all if ``every_step``.
    """

    figures: list[Figure]
    table: WordTable
    notes: list[str]
    steps: int
    every_step: bool
    rows_seen: float
    tokens: float
    padded: float
    seconds: float
    first_loss: float
    """Mean of the first tenth of the steps."""
    last_loss: float
    """Mean of the last tenth."""

    @property
    def elements(self) -> list[Element]:
        """The section."""
        return [Charts(self.figures), Notes(self.notes), Folded("Some steps as a table", [self.table])]


def read_columns(path: Path) -> Metrics:
    """Read the file; the last line may be torn by a crash, and a resumed run may write a step twice (the last counts)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise AbsentError("No metrics.jsonl: the run has not trained a step.") from error
    lines, unread = parse_metrics(data)
    # A line is written with its end: what stands behind the last one was cut off.
    torn = min(unread, parse_metrics(data[data.rfind(b"\n") + 1 :])[1])
    records: dict[float, dict[str, float]] = {}
    for line in lines:
        numbers = {name: value for name, item in line.items() if (value := real(item)) is not None}
        if "loss" in line:
            numbers.setdefault("loss", NAN)
        records[float(line["step"])] = numbers
    steps = sorted(records)
    names = sorted({name for record in records.values() for name in record})
    columns = {name: [records[step].get(name, NAN) for step in steps] for name in names}
    return Metrics(steps, columns, torn, unread - torn, len(lines) - len(records))


def thin(xs: Sequence[float], ys: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """At most ``points`` pairs: the mean of x and of the finite y of each stretch of steps."""
    if len(xs) <= points:
        return list(xs), list(ys)
    edges = [round(index * len(xs) / points) for index in range(points + 1)]
    thin_x, thin_y = [], []
    for start, end in itertools.pairwise(edges):
        values = [value for value in ys[start:end] if math.isfinite(value)]
        thin_x.append(xs[start] if points >= len(xs) else math.fsum(xs[start:end]) / (end - start))
        thin_y.append(math.fsum(values) / len(values) if values else NAN)
    return thin_x, thin_y


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of the finite values at most ``reach`` places away on either side, so that nothing lags; gaps stay gaps.

    Near the ends the window shrinks on both sides alike, which keeps the first and the last value where they are.
    """
    result = []
    for place, value in enumerate(values):
        near = min(reach, place, len(values) - 1 - place)
        window = [one for one in values[place - near : place + near + 1] if math.isfinite(one)]
        result.append(math.fsum(window) / len(window) if math.isfinite(value) else NAN)
    return result


def _draw(metrics: Metrics, curve: _Curve) -> Figure:
    series: list[Series] = []
    shown: list[Series] = []
    known = [(column, label) for column, label in curve.columns.items() if metrics.known(column)]
    # Some figures are told now and then only: steps that have none of them are no gaps.
    told = [i for i in range(len(metrics.steps)) if any(math.isfinite(metrics.column(name)[i]) for name, _ in known)]
    sparse = len(told) <= len(metrics.steps) // 2
    places = told if sparse else range(len(metrics.steps))
    steps = [metrics.steps[place] for place in places]
    xs, _ = thin(steps, steps, POINTS)
    for number, (column, label) in enumerate(known, start=1):
        values = metrics.column(column)
        _, ys = thin(steps, [values[place] for place in places], POINTS)
        style = f"s{min(number, STYLES)}"
        if curve.smoothed and len(ys) >= 20:
            series.append(Series("each step" if len(steps) <= POINTS else "mean of some steps", ys, style, faint=True))
            ys = smooth(ys, max(2, len(ys) // 40))
            label = f"{label}, smoothed"
        shown.append(Series(label, ys, style))
        series.append(shown[-1])
    return line_figure(LineChart(curve.key, curve.title, xs, series, from_zero=curve.zero), shown)


def _with_shares(metrics: Metrics) -> Metrics:
    """The metrics with ``padding_share``, the share of padding in what was computed, and ``tokens_per_second``."""
    shares, speeds = [], []
    places = (metrics.column(name) for name in ("tokens", "padded_tokens", "seconds"))
    for tokens, padded, seconds in zip(*places, strict=True):
        # Comparisons with not-a-number are false.
        shares.append(1 - tokens / padded if math.inf > padded >= tokens > 0 else NAN)
        speeds.append(tokens / seconds if math.isfinite(tokens) and math.inf > seconds > 0 else NAN)
    return replace(metrics, columns={**metrics.columns, "padding_share": shares, "tokens_per_second": speeds})


@dataclass(frozen=True)
class _Curve:
    """A chart of columns; it is drawn if one of them has a value."""

    key: str
    title: str
    columns: dict[str, str]
    """Column of the metrics -> its name in the legend."""
    smoothed: bool = False
    zero: bool = True
    """Whether the axis begins at zero."""


CURVES = (
    _Curve("loss", "Loss", {"loss": "loss"}, smoothed=True, zero=False),
    _Curve("learning-rate", "Learning rate", {"learning_rate": "learning rate"}),
    _Curve("gradient-norm", "Gradient norm, before clipping", {"gradient_norm": "gradient norm"}, smoothed=True),
    _Curve(
        "similarity",
        "Cosine of the positive and of the hardest negative",
        {"positive_similarity": "positive", "hardest_negative_similarity": "hardest negative"},
        zero=False,
    ),
    _Curve(
        "masked",
        "Share of candidates that masks leave out",
        {
            "masked_share": "all",
            "masked_score": "by score",
            "masked_guide": "by guide",
            "masked_known_positive": "known positive",
            "masked_same_label": "same label",
        },
    ),
    _Curve(
        "negatives",
        "Negatives a query, and their effective number",
        {"effective_negatives": "effective", "negatives": "all"},
    ),
    _Curve(
        "gradient-shares",
        "Who makes the gradient",
        {
            "hardest_gradient_share": "hardest 1 % of negatives",
            "effective_examples": "effective share of examples",
        },
    ),
    _Curve("temperature", "Temperature", {"temperature": "temperature"}, zero=False),
    _Curve(
        "alignment",
        "Alignment and uniformity",
        {"alignment": "alignment", "uniformity": "uniformity"},
        zero=False,
    ),
    _Curve(
        "rank",
        "Effective rank of the embeddings",
        {"effective_rank": "effective rank", "rank_limit": "most possible"},
    ),
    _Curve(
        "labels",
        "What a linear map finds, and the spread within labels",
        {
            "label_probe": "labels found",
            "subclass_probe": "subclasses found",
            "source_probe": "sources found",
            "class_scatter": "spread within labels",
        },
    ),
    _Curve("speed", "Tokens a second", {"tokens_per_second": "tokens a second"}, smoothed=True),
    _Curve("padding", "Share of padding in what was computed", {"padding_share": "padding"}),
)

TABLE = (
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("gradient_norm", "gradient norm"),
    ("rows", "examples"),
    ("tokens", "tokens"),
    ("seconds", "seconds"),
)


def _notes(metrics: Metrics) -> list[str]:
    notes = []
    if metrics.torn:
        notes.append("The last line of metrics.jsonl is torn (the run was cut off while it wrote); it is left out.")
    if metrics.broken:
        notes.append(f"{text.count(metrics.broken)} lines of metrics.jsonl cannot be read and are left out.")
    if metrics.repeated:
        notes.append(
            f"{text.count(metrics.repeated)} steps stand twice (the run was resumed); the later record counts."
        )
    bad = sum(not math.isfinite(value) for value in metrics.column("loss"))
    if bad:
        steps = [
            text.count(step)
            for step, value in zip(metrics.steps, metrics.column("loss"), strict=True)
            if not math.isfinite(value)
        ]
        notes.append(
            f"The loss is not a finite number at {text.count(bad)} steps: {', '.join(steps[:8])}{'…' if bad > 8 else ''}."
        )
    if len(metrics.steps) < round(metrics.steps[-1]):
        notes.append(f"{text.count(len(metrics.steps))} of {text.count(metrics.steps[-1])} steps were recorded.")
    if len(metrics.steps) > POINTS:
        notes.append(
            f"Each curve has {POINTS} points; a point is the mean of about {text.number(len(metrics.steps) / POINTS, 2)} steps."
        )
    return notes


SCORE_CHARTS = 6
"""Scores of evaluations that are drawn at most."""


def build_scores(run: Path) -> tuple[list[Figure], list[str]]:
    """A chart a score of the evaluations during the training, and notes; nothing where there were none."""
    try:
        lines, unreadable = parse_metrics((run / "evaluations.jsonl").read_bytes())
    except FileNotFoundError:
        return [], []
    by_step: dict[float, dict[str, float]] = {}
    for line in lines:
        scores = {name: real(value) for name, value in mapping(line.get("scores")).items()}
        by_step[float(line["step"])] = {name: NAN if value is None else value for name, value in scores.items()}
    steps = sorted(by_step)
    names = list(dict.fromkeys(name for step in steps for name in by_step[step]))
    if len(names) == 2 and names[0] == "mean":
        names = names[1:]  # the mean of one task
    charts = []
    for number, name in enumerate(names[:SCORE_CHARTS]):
        xs, ys = thin(steps, [by_step[step].get(name, NAN) for step in steps], POINTS)
        key, title = f"evaluation-{number}", f"Evaluation: {text.clip(name, 60)}"
        figure = line_figure(LineChart(key, title, xs, [Series("score", ys)]))
        charts += [figure] if figure.svg else []
    notes = _outcome(run)
    if unreadable:
        notes.append(f"{text.count(unreadable)} lines of evaluations.jsonl cannot be read and are left out.")
    if len(names) > SCORE_CHARTS:
        notes.append(f"{SCORE_CHARTS} of {text.count(len(names))} scores are drawn; all are in evaluations.jsonl.")
    return charts, notes


def _outcome(run: Path) -> list[str]:
    """Notes on early stopping and the best checkpoint, from the manifest."""
    try:
        manifest = load_object(run / "manifest.json", "")
    except AbsentError:
        return []
    trained = mapping(mapping(manifest.get("stages")).get("train"))
    best, notes = mapping(trained.get("best")), []
    step, score = real(best.get("step")), real(best.get("score"))
    if trained.get("stopped_early") is True:
        notes.append("The training ended early: as many evaluations in a row as its patience brought no gain.")
    if step is not None and score is not None:
        is_best = string(trained.get("checkpoint")) == f"step-{round(step):08d}"
        model = "; the model is made of it" if is_best else ""
        notes.append(f"The best evaluation was that after step {text.count(step)}: {text.score(score)}{model}.")
    return notes


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def build_curves(run: Path, recipe: Json | None = None) -> Curves:
    """The section of a run folder with this parsed recipe; :class:`AbsentError` where nothing was recorded."""
    metrics = read_columns(run / "metrics.jsonl")
    if not metrics.steps:
        raise AbsentError("metrics.jsonl holds no step.")
    full = _with_shares(metrics)
    charts = [_draw(full, curve) for curve in CURVES if any(full.known(column) for column in curve.columns)]
    scores, score_notes = build_scores(run)
    known = [(name, label) for name, label in TABLE if metrics.known(name)]
    last = len(metrics.steps) - 1
    picked = sorted({round(index * last / 11) for index in range(12)})
    rows = [[text.count(metrics.steps[i]), *(_cell(metrics.column(name)[i]) for name, _ in known)] for i in picked]
    # A single step says little: a batch is easy or hard. The first and last tenths are compared.
    first_loss, last_loss = ends(metrics.column("loss"))
    return Curves(
        figures=[*charts[:1], *scores, *charts[1:]],
        table=WordTable("Values at some steps", ["step", *(label for _, label in known)], rows),
        notes=[*_notes(metrics), *score_notes, *judge(metrics.column, recipe or {})],
        steps=round(metrics.steps[-1]),
        every_step=len(metrics.steps) >= round(metrics.steps[-1]),
        rows_seen=math.fsum(_finite(metrics.column("rows"))),
        tokens=math.fsum(_finite(metrics.column("tokens"))),
        padded=math.fsum(_finite(metrics.column("padded_tokens"))),
        seconds=math.fsum(_finite(metrics.column("seconds"))),
        first_loss=first_loss,
        last_loss=last_loss,
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else text.number(value)


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
    known = _finite(values)
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


Ends = Mapping[str, float]


def _similarity(start: Ends, end: Ends, objective: Json) -> list[str]:
    positive, hardest = end["positive_similarity"], end["hardest_negative_similarity"]
    if not hardest > positive:
        return []
    return [
        f"At the end the hardest negative is nearer to a query (cosine {text.number(hardest, 2)}) than its positive "
        f"({text.number(positive, 2)}): the batches are harder than the model can tell apart, or some negatives are positives "
        "that the data does not name. A score_mask or a guide_mask leaves such texts out."
    ]


def _masked(start: Ends, end: Ends, objective: Json) -> list[str]:
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


def _negatives(start: Ends, end: Ends, objective: Json) -> list[str]:
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


def _hardest(start: Ends, end: Ends, objective: Json) -> list[str]:
    share = end["hardest_gradient_share"]
    # Of so few negatives the hardest 1 % are not a small share.
    if not share > HARDEST or end["negatives"] < 20:
        return []
    return [
        f"The hardest 1 % of negatives make {share:.0%} of the gradient (over {HARDEST:.0%}): if some of them are wrongly "
        "negatives, they are what is learnt. Look at them, raise the temperature, or mask."
    ]


def _examples(start: Ends, end: Ends, objective: Json) -> list[str]:
    share = end["effective_examples"]
    if not share < FEW_EXAMPLES:
        return []
    return [
        f"Weights leave {share:.0%} of a batch's examples in effect (under {FEW_EXAMPLES:.0%}): the gradient is as noisy as that of "
        "so small a batch. Lower focal.gamma, or level the weights."
    ]


def _temperature(start: Ends, end: Ends, objective: Json) -> list[str]:
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


def _uniformity(start: Ends, end: Ends, objective: Json) -> list[str]:
    value = end["uniformity"]
    if not value > CROWDED:
        return []
    return [
        f"The embeddings crowd together (uniformity {text.number(value, 3)}, over {CROWDED:g}; 0 is one point, −4 all directions): "
        "cosines of unrelated texts are high. A lower temperature or the spread regulariser pushes them apart."
    ]


def _rank(start: Ends, end: Ends, objective: Json) -> list[str]:
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
    *(column for curve in CURVES for column in curve.columns),
)
