"""``nearfield analyse``: what embeddings look like, and how alike models are. ``nearfield twins``: a domain's suite beside its
general twin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nearfield.cli.app import RESULTS, ResultsFolder, quiet_libraries, table, tell
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from nearfield.analysis.geometry import Analysis
    from nearfield.methods.matched_suites import Twins
    from nearfield.pipeline.embeddings import Sample


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("analyse")(analyse_command)
    app.command("twins")(twins_command)


def analyse_command(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub names.")],
    suite: Annotated[Path | None, typer.Option("--suite", help="Take the texts of a suite.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Take the lines of this file.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Draw at most so many of them.")] = 5_000,
    associations: Annotated[
        Path | None, typer.Option("--associations", help="YAML with tests of association (WEAT, SEAT).")
    ] = None,
    attribute: Annotated[
        Path | None,
        typer.Option("--attribute", help="Lines of a text, a tab and a number: is it ordered by a direction?"),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            help="RESULTS/MODEL/REVISION of `nearfield eval --dims ... --axes first,random,principal`: a chart a type.",
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with charts here; it needs no network.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="E.g. cpu or cuda:0.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing.")] = 0,
) -> None:
    """Isotropy, spectrum, intrinsic dimension, truncation, hubs, near-duplicates and length of each model; CKA and shared
    neighbours of each pair; with a suite's questions thresholds and whether one model reads another's index."""
    quiet_libraries()
    from nearfield.analysis.geometry import NEIGHBOURS
    from nearfield.encoders.encode import text_encoder
    from nearfield.files import write_json
    from nearfield.pipeline.embeddings import analyse_models, sample_of

    if (suite is None) == (texts is None):
        raise BadInputError(
            "the texts come from --suite or from --texts", where="command line", hint="Give one of them."
        )
    if suite is not None:
        from nearfield.evaluation.config import open_suite

        sample = sample_of(open_suite(suite), limit, seed)
    else:
        assert texts is not None
        sample = _lines(texts, limit, seed)
    if len(sample.texts) < 4 * NEIGHBOURS:
        raise BadInputError(
            f"there are {len(sample.texts)} distinct texts; {4 * NEIGHBOURS} are needed", where=str(suite or texts)
        )
    encoders = {model: text_encoder(model, device=device) for model in dict.fromkeys(models)}
    analysis = analyse_models(encoders, sample, seed=seed, associations=associations, attribute=attribute)
    made = {**analysis.to_json(), **({} if scores is None else {"scores_by_type": _scores(scores)})}
    if json_out is not None:
        write_json(json_out, made)
    if html is not None:
        from nearfield.reporting.analysis import write_analysis_page

        write_analysis_page(made, html)
    tell(_table(analysis))
    for sentence in sentences_of(analysis):
        tell(sentence)


def sentences_of(analysis: Analysis) -> list[str]:
    """Sentences that say what the figures mean and what they do not: of each model, then of models together."""
    shapes = [line for one in analysis.geometry for line in one.sentences]
    return [*shapes, *(line for one in analysis.checks for line in one.sentences), *analysis.sentences]


def _scores(folder: Path) -> dict[str, object]:
    """Dimensions kept -> how many, and the mean score of each task type."""
    from nearfield.reporting.comparison import scores_by_type

    if not folder.is_dir():
        raise BadInputError("there is no such folder of results", where=str(folder))
    scores = scores_by_type(folder.resolve().parents[1], folder.resolve())
    if not scores:
        raise BadInputError(
            "there are no scores of cut vectors beside these",
            where=str(folder),
            hint="`nearfield eval MODEL --suite SUITE --dims 32,64,128 --axes first,random,principal` makes them.",
        )
    return {
        axes: {"dimensions": numbers, "types": {kind: means for kind, (_, means) in types.items()}}
        for axes, (numbers, types) in scores.items()
    }


def _lines(path: Path, limit: int, seed: int) -> Sample:
    from nearfield.pipeline.embeddings import Sample, drawn

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"this file of texts cannot be read ({error})", where=str(path)) from error
    chosen = drawn(list(dict.fromkeys(line for line in lines if line.strip())), limit, seed, "texts")
    return Sample(tuple(chosen), (path.stem,) * len(chosen))


ROWS = (
    ("dimensions", "dimensions", "d"),
    ("IsoScore", "iso_score", ".4f"),
    ("average cosine", "average_cosine", ".4f"),
    ("partition ratio", "partition_ratio", ".4f"),
    ("effective rank", "effective_rank", ".1f"),
    ("TwoNN", "two_nn", ".2f"),
    ("ABID", "abid", ".2f"),
    ("uniformity", "uniformity", ".3f"),
    ("hubs: skewness", "hub_skewness", ".2f"),
    ("hubs: largest", "largest_hub", "d"),
    ("texts near no other", "orphans", ".1%"),
)


def _table(analysis: Analysis) -> object:
    rows = [[title, *(format(getattr(one, field), form) for one in analysis.geometry)] for title, field, form in ROWS]
    return table(["", *analysis.models], rows, f"{analysis.texts} texts", words=1)


def twins_command(
    models: Annotated[list[str], typer.Argument(help="Results folders, or models found below --results.")],
    general: Annotated[Path, typer.Option("--general", help="The general suite, or a folder of local tasks.")],
    domain: Annotated[Path, typer.Option("--domain", help="The domain's suite: tasks of the same types.")],
    results: ResultsFolder = RESULTS,
    measures: Annotated[
        Path | None,
        typer.Option("--measures", help="JSON {measure: {task: value}}: an LLM's errors, dependency distances, ..."),
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", help="Measure the complexity of so many texts a task; 0 leaves that out.")
    ] = 1_000,
    samples: Annotated[int, typer.Option("--samples", help="Draws of the intervals.")] = 2_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Is a domain harder for these models than its general twin, do they keep their order, and is it the texts' complexity?"""
    quiet_libraries()
    from nearfield.evaluation.config import open_suite
    from nearfield.evaluation.results import find_results
    from nearfield.files import write_json
    from nearfield.methods.matched_suites import twins

    sides = [open_suite(general), open_suite(domain)]
    complexity = _given(measures)
    if texts:
        for measure, values in _measured([task for side in sides for task in side], texts, seed).items():
            complexity.setdefault(measure, values)
    made = twins(
        [find_results(model, results) for model in models],
        [task.name for task in sides[0]],
        [task.name for task in sides[1]],
        complexity=complexity,
        samples=samples,
        seed=seed,
    )
    if json_out is not None:
        write_json(json_out, made.to_json())
    _show(made)


def _given(path: Path | None) -> dict[str, dict[str, float]]:
    from nearfield.files import read_json

    if path is None:
        return {}
    value = read_json(path, "file of measures")
    try:
        return {str(name): {str(task): float(of) for task, of in tasks.items()} for name, tasks in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInputError("measures are an object of objects of numbers", where=str(path)) from error


def _measured(tasks: list[Any], most: int, seed: int) -> dict[str, dict[str, float]]:
    """Measure -> task -> value. English is measured by fog too; other languages are left out there, not guessed."""
    from nearfield.evaluation.texts import labelled_texts
    from nearfield.methods.matched_suites import text_measures
    from nearfield.pipeline.embeddings import drawn

    measures: dict[str, dict[str, float]] = {}
    for task in tasks:
        distinct = list(dict.fromkeys(text for text, _ in labelled_texts(task.task) if text.strip()))
        english = {str(one).split("-")[0] for one in task.task.metadata.languages} <= {"eng"}
        for measure, value in text_measures(drawn(distinct, most, seed, task.name), english).items():
            measures.setdefault(measure, {})[task.name] = value
    return measures


def _show(made: Twins) -> None:
    rows = []
    for gap in made.gaps:
        ends = "none" if gap.low is None or gap.high is None else f"{gap.low:+.4f} to {gap.high:+.4f}"
        cells = [gap.model, gap.type, f"{gap.general:.4f}", f"{gap.domain:.4f}", f"{gap.gap:+.4f}", ends]
        rows.append(cells)
    tell(table(["model", "type", "general", "domain", "gap", "95 % interval"], rows, "domain minus general", words=2))
    for measure, thirds in made.thirds.items():
        parts = [
            f"{one['name']} {one['gap']:+.4f} ({one['general']} general, {one['domain']} domain)"
            if one["gap"] is not None
            else f"{one['name']} has one side only"
            for one in thirds
        ]
        tell(f"Gap within thirds of {measure}: {'; '.join(parts)}.")
    tell("A gap in all thirds alike is the domain's; one that is gone within thirds was that of the texts.")
    if made.spearman is None:
        tell("Whether models keep their order takes three models or more.")
    else:
        tell(
            f"Order of the models on both sides: Spearman {made.spearman:+.2f}, p = {made.p:.3g} ({len(made.models)} models). "
            "With few models a lack of evidence is no evidence of another order."
        )
    tell("Intervals are over queries and items of these tasks; other tasks of the domain may differ more.")
    for note in made.notes:
        tell(note)
