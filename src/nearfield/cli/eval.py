"""``nearfield eval``, ``submit`` and ``card``: scores on a suite, and their way to a leaderboard and into a model's card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfield.cli.app import RESULTS, Base, ResultsFolder, Strict, TaskNames, names, quiet_libraries, table, tell
from nearfield.errors import EXIT_FAULT, BadInputError

if TYPE_CHECKING:
    from nearfield.encoders import LoadedEncoder
    from nearfield.encoders.encode import Encoder
    from nearfield.errors import Notice
    from nearfield.evaluation import EvaluationResult
    from nearfield.evaluation.config import Axes


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(evaluate_command)
    app.command("submit")(submit_command)
    app.command("card")(card_command)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, 'bm25' or 'random'.")],
    suite: Annotated[Path, typer.Option("--suite", help="A suite YAML, or a folder of local tasks.")],
    out: Annotated[
        Path, typer.Option("--out", help="Where results are filed: <out>/<org>__<model>/<revision>.")
    ] = RESULTS,
    tasks: TaskNames = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Write {task: {subset: main score}} here (by model with --dims, --quantize)."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="File the results under this organisation/model.")] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", help="'contract': stop at prompts the model was not trained with; or 'as-is'.")
    ] = "contract",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--resume", help="Score again what is present; or only what is missing or failed (the default)."
        ),
    ] = False,
    device: Annotated[str | None, typer.Option("--device", help="E.g. cpu or cuda:0.")] = None,
    batch_tokens: Annotated[int | None, typer.Option("--batch-tokens", help="Tokens in a chunk of texts.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Where vectors are kept, by the content of the texts."),
    ] = Path("runs/.cache/vectors"),
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither keep vectors nor take kept ones.")] = False,
    dims: Annotated[
        str | None,
        typer.Option("--dims", help="Score these first dimensions too, e.g. 32,64,128: nothing is encoded again."),
    ] = None,
    axes: Annotated[
        str,
        typer.Option("--axes", help="Which dimensions --dims keeps: first, random, principal; several with commas."),
    ] = "first",
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Score these roundings of the vectors too: int8, binary.")
    ] = None,
    strict: Strict = False,
    base: Base = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the suite file: key.path=value.")] = None,
) -> None:
    """Score a model on a suite; results are filed in mteb's format, with the score of every query beside them.

    Under `torchrun` or `accelerate launch` all processes encode, each on its GPU, and the first scores.
    """
    quiet_libraries()
    from nearfield.encoders.encode import Workers
    from nearfield.errors import listening
    from nearfield.evaluation import SuiteConfig, evaluate
    from nearfield.evaluation.runner import load_unless_baseline, open_model
    from nearfield.files import write_json
    from nearfield.training.launch import Launch

    config: SuiteConfig | Path = suite
    if overrides:
        if not suite.is_file():
            raise BadInputError("overrides change a suite file", where=str(suite), hint="Give a suite YAML.")
        config = SuiteConfig.load(suite, overrides)
    SuiteConfig.of(config)  # what is wrong with it is said before a model is loaded
    chosen = names(tasks)
    if chosen == []:
        raise BadInputError("--tasks names no task", where="--tasks", hint="Give names separated by commas.")
    variants, launch = _variants(dims, quantize, axes), Launch.from_environment()
    workers = Workers(launch, out) if launch.world_size > 1 else None
    device = device or (None if workers is None else launch.device)
    results: list[EvaluationResult] = []

    @functools.cache
    def loaded() -> str | LoadedEncoder:
        return load_unless_baseline(model, device, base)

    def score(say: Callable[[str], None]) -> str:
        for dimensions, kept, rounding in variants:
            say(f"scoring {model}")
            scored = open_model(
                loaded(),
                name=name,
                batch_tokens=batch_tokens,
                cache=None if no_cache else cache,
                dimensions=dimensions,
                quantize=rounding,
                axes=kept,
                workers=workers,
            )
            result = evaluate(scored, config, out, tasks=chosen, prompts=prompts, overwrite=overwrite, strict=strict)
            results.append(result)
            _show(result)
        return ""

    @functools.cache
    def helper() -> Encoder:
        encoder = open_model(loaded(), name=name, batch_tokens=batch_tokens).encoder
        assert encoder is not None
        return encoder.encoder

    def help(task: str) -> None:
        assert workers is not None
        workers.help(task, helper())

    try:
        # Of a model that is scored several times a notice is logged once.
        with listening():
            launch.prepare(score, lambda word: None, help)
    finally:
        if workers is not None and launch.is_main:
            workers.close()
    if not launch.is_main:
        return
    scores = {result.model: result.scores for result in results}
    if json_out is not None:
        write_json(json_out, next(iter(scores.values())) if len(scores) == 1 else scores)
    if any(result.failures for result in results):
        raise typer.Exit(EXIT_FAULT)


def _variants(dims: str | None, quantize: str | None, axes: str) -> list[tuple[int | None, Axes, str]]:
    """The whole vectors, then each number of dimensions of all kinds of axes, then each rounding (of all of these)."""
    from nearfield.evaluation.config import AXES

    asked = {part.strip() for part in axes.split(",")}
    kinds, unknown = [kind for kind in AXES if kind in asked], sorted(asked - set(AXES))
    if unknown:
        raise BadInputError(f"unknown axes {', '.join(unknown)!r}", where="--axes", hint=f"Known: {', '.join(AXES)}.")
    try:
        numbers = [int(part) for part in names(dims) or ()]
    except ValueError as error:
        raise BadInputError(f"{dims!r} are no numbers of dimensions", where="--dims", hint="E.g. 32,64,128.") from error
    cuts: list[tuple[int | None, Axes]] = [(None, "first"), *((number, kind) for kind in kinds for number in numbers)]
    return [(number, kind, rounding) for rounding in ("none", *(names(quantize) or ())) for number, kind in cuts]


def _show(result: EvaluationResult) -> None:
    from rich.text import Text

    from nearfield.evaluation.scores import MARK, tasks_in_words

    rows: list[tuple[object, ...]] = []
    for task, scores in result.scores.items():
        mark = MARK if result.notices.get(task) or result.notices.get("") else ""
        remark = "was there" if task in result.reused else f"{result.seconds.get(task, 0):.0f} s"
        for subset, score in scores.items():
            rows.append((task, subset, f"{score:.4f}{mark}", remark))
    for task, reason in result.not_applicable.items():
        rows.append((task, "", "n/a", reason))
    for task, reason in result.failures.items():
        rows.append((Text(task, "red"), "", Text("failed", "red"), Text(reason, "red")))
    tell(table(["task", "subset", "score", ""], rows, f"{result.model} at {result.revision[:12]}", words=2))
    for task, details in result.details.items():
        if "largest_cluster" in details:
            facts = ", ".join(f"{details[key]} {key.replace('_', ' ')}" for key in _FACTS if key in details)
            tell(f"{task}: {facts}")
    for note in result.notes:
        tell(note)
    said: dict[Notice, list[str]] = {}
    for task, notices in result.notices.items():
        for notice in notices:
            said.setdefault(notice, []).append(task)
    for notice, tasks in said.items():
        tell(f"* {'all tasks' if '' in tasks else tasks_in_words(tasks, False)}: {notice.what}")
    tell(f"results: {result.results_dir}")


_FACTS = ("queries", "pairs", "corpus", "distractors", "clusters", "largest_cluster")


def submit_command(
    model: Annotated[str, typer.Argument(help="A results folder, or a model found below --results.")],
    results: ResultsFolder = RESULTS,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", help="The benchmark whose tasks must be complete, e.g. 'MTEB(eng, v2)'."),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", help="YAML with fields of mteb's ModelMeta: license, training_datasets, ..."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--model", help="The model's folder, for its card.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The submission's folder; replaced if it is there.")] = Path(
        "submission"
    ),
    hub: Annotated[
        str | None,
        typer.Option("--hub", help="Push the folder of --model, with its card, to this ORGANISATION/NAME of the hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --hub makes is private.")] = False,
    strict: Strict = False,
    base: Base = None,
) -> None:
    """Check what the leaderboard asks for, lay out the submission, and say what is left to do.

    Leaves with 1 if something that is required is missing, with 2 under --strict if the scores have notices; the folder is
    written all the same.
    """
    quiet_libraries()
    from nearfield.errors import refuse
    from nearfield.evaluation.results import find_results
    from nearfield.evaluation.submission import submit

    folder_of_results = find_results(model, results)
    if hub is not None and folder is None:
        raise BadInputError("--hub pushes a model's folder", where="--hub", hint="Name the folder with --model.")
    # Results that cannot be read are named before anything is pushed.
    made = submit(folder_of_results, out, benchmark=benchmark, facts=facts, model=folder, base=base)
    if strict:
        refuse(made.notices, where=str(folder_of_results))
    if hub is not None and folder is not None:
        from nearfield.evaluation.hub import push

        pushed = push(folder, hub, folder_of_results, private=private)
        tell(f"pushed {len(pushed.files)} files to {pushed.repository}, commit {pushed.commit}")
        if folder_of_results.name != pushed.commit:
            tell("The leaderboard wants the results of that commit: score it once more, by name.")
    for check in made.checks:
        mark = "ok      " if check.ok else "missing " if check.required else "advised "
        tell(f"{mark}{check.name}: {check.detail}")
    if made.unstated:
        tell("A file for --facts states what is true of this model, in this form:")
        for line in made.unstated:
            tell(f"  {line}")
    tell(f"submission: {made.folder}")
    if not made.complete:
        tell("It is not complete yet: see 'missing' above. Then:")
    for number, step in enumerate(made.steps, start=1):
        tell(f"{number}. {step}")
    if not made.complete:
        raise typer.Exit(EXIT_FAULT)


def card_command(
    model: Annotated[Path, typer.Argument(help="The model's folder; its README.md is changed.")],
    scored: Annotated[
        str | None, typer.Option("--scores", help="A results folder or a model's name; by default the model's own.")
    ] = None,
    results: ResultsFolder = RESULTS,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the intervals' resamples.")] = 0,
    base: Base = None,
) -> None:
    """Write a model's scores with their intervals, prompts and versions into its card; the rest of it stays.

    --base says in the folder of an adapter that its base lies elsewhere now.
    """
    from nearfield.evaluation.hub import update_card
    from nearfield.evaluation.results import find_results

    if base is not None:
        from nearfield.encoders.adapters import relink

        relink(model, base)
    path = update_card(model, find_results(scored or str(model), results), seed=seed)
    tell(f"{path} has the scores")
