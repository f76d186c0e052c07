"""The section and the page on embeddings: an analysis as tables, figures and sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfield.reporting import text
from nearfield.reporting.page import Charts, Element, Notes, Page, Prose, Section, WordTable, write_page
from nearfield.reporting.svg import (
    Figure,
    Histogram,
    LineChart,
    Series,
    Whisker,
    clustered,
    heat_map,
    histogram_figure,
    interval_figure,
    line_figure,
    scatter,
)
from nearfield.reporting.text import AbsentError, Json, listing, load_object, mapping, real, string

TITLE = "Shape of the embeddings"
MOST_MODELS = 4
"""Models that have a curve of their own; styles for more are not told apart."""
FIGURES = (
    ("dimensions", "dimensions", 0),
    ("IsoScore", "iso_score", 4),
    ("average cosine", "average_cosine", 3),
    ("partition ratio", "partition_ratio", 4),
    ("effective rank", "effective_rank", 1),
    ("TwoNN", "two_nn", 1),
    ("ABID", "abid", 1),
    ("uniformity", "uniformity", 3),
    ("hubs: skewness", "hub_skewness", 2),
    ("hubs: largest", "largest_hub", 0),
    ("share of texts near no other", "orphans", 3),
)


@dataclass(frozen=True)
class AnalysisSection:
    """The parts of the section, and the texts of ``maps``, which go to the page's script."""

    texts: str
    tables: list[WordTable]
    figures: list[Figure]
    sentences: list[str]
    maps: dict[str, object] = field(default_factory=dict)

    @property
    def elements(self) -> list[Element]:
        """The section."""
        lead = f"{self.texts} texts, encoded without prompts. What each figure means and what it does not stands below the figures."
        return [Prose([lead], "lead"), Charts(self.figures), *self.tables, Notes(self.sentences)]


def build_analysis(run: Path) -> AnalysisSection:
    """The section of a run folder, from its ``analysis.json``."""
    absent = "No analysis.json: the embeddings were not looked at. `nearfield analyse MODEL --suite SUITE --json RUN/analysis.json` writes it."
    return analysis_section(load_object(run / "analysis.json", absent))


def analysis_section(made: Json) -> AnalysisSection:
    """The section of what ``nearfield analyse --json`` wrote; parts that are not there are left out."""
    full = [string(name) or "?" for name in listing(made.get("models"))]
    models = short_names(full)
    made = {**made, "extras": _renamed(mapping(made.get("extras")), dict(zip(full, models, strict=True)))}
    shapes = [mapping(one) for one in listing(made.get("geometry"))]
    if not models or len(models) != len(shapes):
        raise AbsentError("analysis.json holds no model.")
    section = AnalysisSection(text.count(real(made.get("texts")) or 0), [], [], [])
    rows = [[name, *(_figure(shape.get(key), digits) for shape in shapes)] for name, key, digits in FIGURES]
    asked = mapping(mapping(made["extras"]).get("search"))
    if asked:
        alignments = [_figure(mapping(asked.get(model)).get("alignment"), 3) for model in models]
        rows.append(["alignment of questions with right documents", *alignments])
    section.tables.append(WordTable(TITLE, ["figure", *models], rows))
    _maps(section, models, mapping(made.get("drawing")))
    _curves(section, models, shapes)
    _scores(section, mapping(made.get("scores_by_type")))
    _likeness(section, models, made)
    extras = mapping(made.get("extras"))
    _search(section, mapping(extras.get("search")))
    _versions(section, mapping(extras.get("versions")))
    _associations(section, mapping(extras.get("associations")))
    _rankability(section, mapping(extras.get("rankability")))
    groups = [*shapes, *(mapping(one) for one in listing(made.get("checks"))), made]
    section.sentences.extend(line for one in groups for line in map(string, listing(one.get("sentences"))) if line)
    return section


def short_names(models: Sequence[str]) -> list[str]:
    """Models' names without their folders or organisations where these are not needed to tell them apart."""
    short = [Path(name).parent.name if Path(name).name == "model" else Path(name).name for name in models]
    return [brief if brief and short.count(brief) == 1 else name for brief, name in zip(short, models, strict=True)]


def _renamed(extras: Json, names: Mapping[str, str]) -> dict[str, object]:
    """The extras, with the models' short names."""
    extras_by_name: dict[str, object] = {}
    for part, value in extras.items():
        inner = mapping(value)
        if part == "versions":
            inner["models"] = [names.get(str(name), str(name)) for name in listing(inner.get("models"))]
            audits = mapping(inner.get("audits"))
            inner["audits"] = {" → ".join(names.get(n, n) for n in k.split(" -> ")): v for k, v in audits.items()}
            extras_by_name[part] = inner
        else:
            extras_by_name[part] = {names.get(model, model): of for model, of in inner.items()}
    return extras_by_name


def _figure(value: object, digits: int) -> str:
    number = real(value)
    return "–" if number is None else text.count(number) if not digits else f"{number:.{digits}f}".replace("-", "−")


def _numbers(value: object) -> list[float]:
    return [float("nan") if number is None else number for number in map(real, listing(value))]


def _maps(section: AnalysisSection, models: Sequence[str], drawing: Json) -> None:
    labels = [string(one) or "" for one in listing(drawing.get("labels"))]
    texts = [string(one) or "" for one in listing(drawing.get("texts"))]
    for number, (model, points, shares) in enumerate(
        zip(models, listing(drawing.get("points")), listing(drawing.get("shares")), strict=False)
    ):
        places = [pair for pair in (_numbers(point) for point in listing(points)) if len(pair) == 2]
        if len(places) != len(labels) or len(texts) != len(labels) or any(x != x or y != y for x, y in places):
            continue
        key = f"map-{number}"
        held = sum(_numbers(shares))
        svg = scatter(key, f"Texts of {model} in the plane", [(x, y) for x, y in places], labels)
        caption = f"{model}: texts on the two principal axes, which hold {100 * held:.0f} % of the variance; far texts may fall together"
        section.figures.append(Figure(caption, svg, key, live=True))
        section.maps[key] = {"labels": labels, "texts": texts}


def _curves(section: AnalysisSection, models: Sequence[str], shapes: Sequence[Json]) -> None:
    charts: dict[tuple[int, ...], list[Series]] = {}
    for number, (model, shape) in enumerate(zip(models, shapes, strict=True)):
        curves = {
            name: [_numbers(point) for point in listing(of)] for name, of in mapping(shape.get("truncation")).items()
        }
        for name, points in curves.items():
            xs = tuple(int(point[0]) for point in points)
            style = {"first": 1, "principal": 2, "random": 4}.get(name, 3) if len(models) == 1 else number % 4 + 1
            if len(models) == 1 or (name == "first" and number < MOST_MODELS):
                label = f"{name} dimensions" if len(models) == 1 else model
                charts.setdefault(xs, []).append(Series(label, [point[1] for point in points], f"s{style}"))
        if len(models) > 1 and number < MOST_MODELS and curves:
            xs = tuple(int(point[0]) for point in next(iter(curves.values())))
            styles = {"first": "s1", "principal": "s2", "random": "s4"}
            series = [Series(n, [p[1] for p in pts], styles.get(n, "s3")) for n, pts in curves.items()]
            _line(section, f"truncation-{number}", f"{model}: ten nearest texts kept by fewer dimensions", xs, series)
    for number, (xs, series) in enumerate(charts.items()):
        _line(section, f"truncations-{number}", "Ten nearest texts kept by the first dimensions", xs, series)
    series = []
    for number, (model, shape) in enumerate(zip(models, shapes, strict=True)):
        shares, total, sums = _numbers(shape.get("spectrum")), 0.0, []
        for share in shares:
            total += share
            sums.append(total)
        if number < MOST_MODELS and sums:
            series.append(Series(model, sums, f"s{number + 1}"))
    longest = max((len(one.y) for one in series), default=0)
    series = [Series(one.label, [*one.y, *[float("nan")] * (longest - len(one.y))], one.style) for one in series]
    _line(section, "spectrum", "Variance held by the first principal axes", range(1, longest + 1), series, "axes")


def _scores(section: AnalysisSection, values: Json) -> None:
    """A chart a task type: the mean score by the dimensions kept, first, drawn and principal ones."""
    styles, charts = {"first": "s1", "principal": "s2", "random": "s4"}, defaultdict(list)
    for axes, read in values.items():
        parts = mapping(read)
        xs = tuple(int(value) for value in _numbers(parts.get("dimensions")))
        for kind, scores in mapping(parts.get("types")).items():
            charts[kind, xs].append(Series(f"{axes} dimensions", _numbers(scores), styles.get(axes, "s3")))
    for number, ((kind, xs), series) in enumerate(charts.items()):
        _line(section, f"scores-{number}", f"{kind}: mean score by the dimensions kept", xs, series)


def _line(
    section: AnalysisSection,
    key: str,
    title: str,
    xs: Sequence[float],
    series: Sequence[Series],
    label: str = "dimensions",
) -> None:
    """Curves over a scale of factors; over that of axes, of differences."""
    x = [float(value) for value in xs]
    if len(x) < 2 or not series or min(x) <= 0:
        return
    chart = LineChart(key, title, x, series, label, from_zero=True, log=label != "axes")
    section.figures.append(line_figure(chart))


def _likeness(section: AnalysisSection, models: Sequence[str], made: Json) -> None:
    if len(models) < 2:
        return
    titles = {"cka": "CKA", "jaccard": "Jaccard@10 of nearest texts", "rank_similarity": "Likeness of ranks@10"}
    numbered = ""
    for key, title in titles.items():
        table = [_numbers(row) for row in listing(made.get(key))]
        if len(table) != len(models) or any(len(row) != len(models) for row in table):
            continue
        order = clustered(table)
        numbered = ", ".join(f"{i + 1} {models[row]}" for i, row in enumerate(order))
        caption = f"{title}, like models side by side ({numbered})"
        section.figures.append(Figure(caption, heat_map(f"heat-{key.replace('_', '-')}", title, models, table, order)))
    sweep = {int(k): [_numbers(row) for row in listing(table)] for k, table in mapping(made.get("sweep")).items()}
    pairs = [(i, j) for i in range(len(models)) for j in range(i)][:MOST_MODELS]
    series = [
        Series(f"{models[j]}, {models[i]}" if len(models) > 2 else "both", [sweep[k][i][j] for k in sweep], f"s{n + 1}")
        for n, (i, j) in enumerate(pairs)
    ]
    _line(section, "sweep", "Jaccard of the k nearest texts", list(sweep), series, "k")


def _search(section: AnalysisSection, results: Json) -> None:
    if not results:
        return
    rows, whiskers, cuts = [], [], []
    for number, (model, value) in enumerate(results.items()):
        one = mapping(value)
        accuracy = [mapping(of) for of in listing(one.get("accuracy"))]
        for of in accuracy:
            share = real(of.get("value"))
            if share is not None:
                words = f"{model}, {of.get('k')}"
                whiskers.append(Whisker(words, share, real(of.get("low")), real(of.get("high")), f"s{number % 4 + 1}"))
        for rule, name in (("recall", "95 % recall"), ("precision", "95 % precision"), ("f1", "best F1")):
            cut = mapping(one.get(rule))
            value_of = real(cut.get("cut"))
            if value_of is None:
                rows.append([model, name, "none reaches it", "–", "–", "–"])
                continue
            low, high = real(cut.get("low")), real(cut.get("high"))
            cuts.append(Whisker(f"{name}, {model}", value_of, low, high, f"s{number % 4 + 1}"))
            between = "–" if low is None or high is None else f"{text.score(low)} to {text.score(high)}"
            rates = [_figure(cut.get(side), 3) for side in ("precision", "recall")]
            rows.append([model, name, text.score(value_of), between, *rates])
        samples = [
            Series(name, _numbers(values), style)
            for (name, values), style in zip(mapping(one.get("counts")).items(), ("s1", "s2", "s4"), strict=False)
        ]
        told = ", ".join(f"{name} {real(share) or 0:.2f}" for name, share in mapping(one.get("overlaps")).items())
        caption = f"{model}: cosines of questions with right, first ten and random documents (overlaps: {told})"
        chart = Histogram(
            f"samples-{number}", caption, _numbers(one.get("edges")), samples, "cosine", f"Overlaps: {told}."
        )
        section.figures.append(histogram_figure(chart))
    heads = ["model", "rule", "cut", "95 % interval", "precision", "recall"]
    section.tables.append(WordTable("Cuts between right and random documents", heads, rows))
    section.figures.append(interval_figure("accuracy", "Questions with a right document among the first k", whiskers))
    section.figures.append(interval_figure("cuts", "Cuts and their bootstrap intervals over questions", cuts))


def _versions(section: AnalysisSection, values: Json) -> None:
    models = [string(name) or "?" for name in listing(values.get("models"))]
    table = [[real(value) for value in listing(row)] for row in listing(values.get("matrix"))]
    if len(models) > 1 and len(table) == len(models) and all(len(row) == len(models) for row in table):
        order = list(range(len(models)))
        title = "Questions by the row's model on the index of the column's: a right document first"
        section.figures.append(Figure(title, heat_map("versions", title, models, table, order)))
    for number, (pair, points) in enumerate(list(mapping(values.get("audits")).items())[:MOST_MODELS]):
        places = [_numbers(point) for point in listing(points)]
        series = [Series("found again", [place[1] for place in places], "s3")]
        _line(
            section,
            f"audit-{number}",
            f"{pair}: texts found again by a rotation",
            [p[0] for p in places],
            series,
            "known pairs",
        )


def _associations(section: AnalysisSection, values: Json) -> None:
    rows, points = [], []
    for number, (model, tests) in enumerate(values.items()):
        for test in map(mapping, listing(tests)):
            name, effect = string(test.get("name")) or "?", real(test.get("effect")) or 0.0
            points.append(Whisker(f"{name}, {model}", effect, None, None, f"s{number % 4 + 1}"))
            kind = "degenerate" if test.get("degenerate") else "exact" if test.get("exact") else "sampled"
            dropped = text.count(real(test.get("dropped")) or 0)
            rows.append(
                [
                    model,
                    name,
                    f"{effect:+.2f}",
                    _figure(test.get("p"), 4),
                    _figure(test.get("p_adjusted"), 4),
                    kind,
                    dropped,
                ]
            )
    if not rows:
        return
    heads = ["model", "test", "effect", "p", "p, Holm", "test is", "targets left out"]
    section.tables.append(WordTable("Associations (WEAT, SEAT)", heads, rows))
    title = "Effects of associations, from −2 to 2"
    section.figures.append(interval_figure("associations", title, points, "+.2f", zero=True))


def _rankability(section: AnalysisSection, values: Json) -> None:
    points = []
    for number, (model, value) in enumerate(values.items()):
        for axis, rho in mapping(mapping(value).get("spearman")).items():
            points.append(Whisker(f"{axis}, {model}", real(rho) or 0.0, None, None, f"s{number % 4 + 1}"))
    if points:
        title = "Order of unseen items along a direction (Spearman)"
        section.figures.append(interval_figure("rankability", title, points, ".2f", zero=True))


def write_analysis_page(made: Mapping[str, object], out: Path) -> Path:
    """Write a page of its own on an analysis."""
    section = analysis_section(made)
    name = ", ".join(string(model) or "?" for model in listing(made.get("models")))
    charts = {figure.key: figure.values for figure in section.figures if figure.values is not None}
    page = Page(name, "nearfield analysis", [Section("geometry", "Embeddings", TITLE, section.elements)])
    write_page(out, page, {"format": 1, "charts": charts, "maps": section.maps})
    return out
