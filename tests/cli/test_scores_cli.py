"""leaderboard, submit, card, analyse: one small suite, two models, and what each command makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import pytest
import typer

from nearfield.cli import analyse as analyse_module
from nearfield.cli import compare as leaderboard_module
from nearfield.cli import eval as submit_module
from nearfield.encoders import load_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate, hub
from nearfield.evaluation.submission import as_python, read_meta, submit
from tests.evaluation.conftest import Tasks, build_model, sentences

pytestmark = pytest.mark.filterwarnings("ignore")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their results on two tasks, and the results of one of them as if on official data."""
    root = tmp_path_factory.mktemp("scores")
    tasks = Tasks(root / "tasks")
    tasks.sts(), tasks.retrieval()
    for name, seed in (("one", 0), ("two", 1)):
        evaluate(str(build_model(root / name, seed=seed)), tasks.root, root / "results")
    results = next((root / "results" / "local__one").iterdir())
    official = root / "results" / "org__one" / COMMIT
    official.mkdir(parents=True)
    for file in results.iterdir():
        text = file.read_bytes()
        if file.suffix == ".json":
            value = json.loads(text)
            if file.name == "model_meta.json":
                value |= {"name": "org/one", "revision": COMMIT}
            else:
                value |= {"dataset_revision": mteb.get_task("STS12").metadata.revision}
                if file.name == "TinySTS.json":
                    value["task_name"] = "STS12"
            text = json.dumps(value).encode()
        (official / file.name.replace("TinySTS", "STS12")).write_bytes(text)
    (official / "TinyRetrieval.json").unlink()
    for name in ("manifest.jsonl", "run_settings.jsonl"):
        (official / name).write_text((official / name).read_text().replace("TinySTS", "STS12"))
    for file in official.glob("*.units.parquet"):
        file.unlink()
    return root


@pytest.fixture
def call(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(work)
    app = typer.Typer(pretty_exceptions_enable=False)
    for module in (analyse_module, leaderboard_module, submit_module):
        module.register(app)

    def run(*arguments: Any) -> tuple[int, str]:
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as stop:
            captured = capsys.readouterr()
            return int(stop.code or 0), captured.out + captured.err
        except BadInputError as error:
            return error.exit_code, str(error)
        raise AssertionError("a command ends by SystemExit")

    return run


def test_a_leaderboard_of_all_results(call: Callable[..., tuple[int, str]], work: Path) -> None:
    code, text = call("leaderboard", "--samples", "200", "--json", "board.json", "--markdown", "board.md")
    assert code == 0 and "local/one" in text and "local/two" in text and "not transitive" in text
    board = json.loads((work / "board.json").read_text())
    assert {row["label"] for row in board["rows"]} == {"local/one", "local/two"}
    assert (work / "board.md").read_text().startswith("| place | model | mean of tasks | ranks |")
    assert call("leaderboard", "--results", "nowhere")[0] == 2


def test_the_card_gets_its_scores_and_keeps_the_rest(call: Callable[..., tuple[int, str]], work: Path) -> None:
    card = work / "one" / "README.md"
    card.write_text("# One\n\nMine.\n")
    for _ in range(2):
        code, _ = call("card", "one")
        assert code == 0
        text = card.read_text()
        assert text.startswith("# One\n\nMine.\n") and text.count("## Scores") == 1
        assert "| TinySTS (cosine_spearman) |" in text and " to " in text and "other pairs of the same kind" in text
    card.write_text(card.read_text() + "\nAfter.\n")
    assert call("card", "one")[0] == 0 and card.read_text().endswith("After.\n")


def test_local_results_are_no_submission_and_it_says_why(call: Callable[..., tuple[int, str]], work: Path) -> None:
    code, text = call("submit", "local/two", "--out", "away", "--benchmark", "MTEB(eng, v2)")
    assert code == 1
    assert "missing name and revision" in text and "left out, scored on local data: TinyRetrieval, TinySTS" in text
    assert "0 of 41 tasks" in text and "advised contamination report" in text
    assert "  license: apache-2.0\n" in text and "not complete yet" in text


@pytest.fixture
def official(work: Path, tmp_path: Path) -> Path:
    """The results as if on official data, where the command line finds them: by the name of their file of units."""
    folder = Path(shutil.copytree(work / "results" / "org__one" / COMMIT, tmp_path / "org__one" / COMMIT))
    (folder / "STS12.units.parquet").touch()
    return folder


def test_what_a_submission_lacks_is_said_as_a_file_to_fill(
    call: Callable[..., tuple[int, str]], work: Path, official: Path
) -> None:
    """The examples are accepted as they stand; the parameters are counted in the model's folder."""
    code, text = call("submit", official, "--out", "away", "--model", "one")
    counted = sum(part.numel() for part in load_encoder("one", device="cpu").model.parameters())
    assert code == 1 and f"ok      n_parameters: {counted}" in text
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert "  release_date: 2026-01-31" in lines and not any("n_parameters" in line for line in lines)
    (work / "facts.yaml").write_text("\n".join(line.strip() for line in lines))
    code, text = call("submit", official, "--out", "away", "--model", "one", "--facts", "facts.yaml")
    assert code == 0 and "missing" not in text and "\n  license" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nowhere"], "no such folder"),
        (["--facts", "nowhere.yaml"], "these facts cannot be read"),
        (["--facts", "broken.yaml"], "mteb does not accept this description"),
        (["--benchmark", "MTEB(nowhere)"], "mteb: "),
        (["--hub", "org/one"], "--hub pushes a model's folder"),
        (["--hub", "org/one", "--model", "one", "--facts", "nowhere.yaml"], "these facts cannot be read"),
    ],
)
def test_what_cannot_be_read_stops_before_anything_is_pushed(
    call: Callable[..., tuple[int, str]],
    work: Path,
    official: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pushed")

    monkeypatch.setattr(hub, "push", never)
    (work / "broken.yaml").write_text("n_parameters: many\n")
    code, text = call("submit", official, "--out", "away", *options)
    assert code == 2 and words in text, text


def test_a_submission_is_read_back_by_mteb(work: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text(
        "release_date: 2026-01-02\nlanguages: [eng-Latn]\nn_parameters: 100000\nlicense: apache-2.0\nopen_weights: true\n"
        "use_instructions: false\ntraining_datasets: [STS12]\nmax_tokens: 128\nembed_dim: 32\n"
    )
    made = submit(work / "results" / "org__one" / COMMIT, tmp_path / "out", facts=facts)
    assert {check.name for check in made.checks if not check.ok} <= {
        "contamination report",
        "public_training_code",
        "public_training_data",
    }
    assert made.complete and (tmp_path / "out" / "results" / "org__one" / COMMIT / "STS12.json").is_file()
    loaded = mteb.ResultCache(tmp_path / "out").load_results(models=["org/one"], include_remote=False)
    assert [result.task_name for result in loaded.model_results[0].task_results] == ["STS12"]
    meta = read_meta(work / "results" / "org__one" / COMMIT / "model_meta.json", facts)
    names: dict[str, Any] = {}
    exec(as_python(meta), names)
    assert names["one"].name == "org/one" and names["one"].training_datasets == {"STS12"}
    facts.write_text("licence: apache-2.0\n")
    with pytest.raises(BadInputError, match="licence"):
        submit(work / "results" / "org__one" / COMMIT, tmp_path / "out", facts=facts)


def test_models_are_analysed_on_lines_of_a_file_and_on_a_suite(
    call: Callable[..., tuple[int, str]], work: Path
) -> None:
    (work / "texts.txt").write_text("\n".join(sentences(60)))
    code, text = call(
        "analyse", "one", "two", "--texts", "texts.txt", "--json", "a.json", "--html", "a.html", "--device", "cpu"
    )
    assert code == 0 and "IsoScore" in text and "CKA" in text
    figures = json.loads((work / "a.json").read_text())
    assert figures["texts"] == 60 and len(figures["geometry"]) == 2 and figures["cka"][0][1] < 1
    page = (work / "a.html").read_text()
    assert "like models side by side" in page and "https://cdn" not in page.partition("<script")[0]
    code, text = call("analyse", "one", "--suite", "tasks", "--limit", "50", "--device", "cpu")
    assert code == 0 and "50 texts" in text
    assert call("analyse", "one")[0] == 2


def test_questions_associations_and_values_are_analysed(call: Callable[..., tuple[int, str]], work: Path) -> None:
    example = Path(__file__).parents[2] / "eval" / "associations" / "example.yaml"
    texts = sentences(80, seed=9)
    (work / "values.tsv").write_text("\n".join(f"{text}\t{len(text)}" for text in texts))
    code, text = call(
        "analyse", "one", "two", "--suite", "tasks", "--associations", example, "--attribute", "values.tsv",
        "--json", "b.json", "--html", "b.html", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "questions find a right document first" in text and "after Holm" in text
    extras = json.loads((work / "b.json").read_text())["extras"]
    assert extras["search"]["one"]["questions"] == 20 and extras["search"]["one"]["documents"] == 40
    assert extras["versions"]["matrix"][0][1] is not None and len(extras["associations"]["two"]) == 2
    rho = extras["rankability"]["one"]["spearman"]
    assert rho["ridge, 40"] > 0.5 > abs(rho["shuffled"]) and {"two extremes", "ridge, 20"} <= set(rho)
    page = (work / "b.html").read_text()
    assert "Associations (WEAT, SEAT)" in page and 'data-map="map-1"' in page and "TinyRetrieval: query" in page
    (work / "values.tsv").write_text("no number here\n")
    assert call("analyse", "one", "--suite", "tasks", "--attribute", "values.tsv")[0] == 2
    (work / "bad.yaml").write_text("- {first: [a], second: [b], a: [c], b: [d]}\n")
    code, text = call("analyse", "one", "--suite", "tasks", "--associations", "bad.yaml")
    assert code == 2 and "two targets" in text


def test_an_adapter_alone_is_evaluated_with_its_base_moved_and_submitted(work: Path, tmp_path: Path) -> None:
    """Its folder names the base on the way from there; --base says where it lies now, in eval, card and submit."""
    from nearfield.encoders import EncoderConfig, LoRAConfig
    from nearfield.encoders.load import build_encoder, save_encoder
    from nearfield.evaluation import evaluate
    from tests.cli.command import run

    adapter = LoRAConfig(r=2, save="adapter")
    shutil.copytree(work / "one", tmp_path / "base")
    model = build_encoder(EncoderConfig(model=str(tmp_path / "base"), adapter=adapter), "cpu").model
    folder = tmp_path / "runs" / "mine" / "model"
    save_encoder(model, folder, adapter="adapter")
    suite, out = str(work / "tasks"), tmp_path / "results"
    first = evaluate(str(folder), Path(suite), out, tasks=["TinySTS"])
    shutil.move(tmp_path / "base", tmp_path / "moved")
    command = [
        "eval",
        str(folder),
        "--suite",
        suite,
        "--tasks",
        "TinySTS",
        "--no-cache",
        "--overwrite",
        "--device",
        "cpu",
    ]
    assert run(*command, "--out", str(out)) == 2
    assert run(*command, "--out", str(tmp_path / "other"), "--base", str(tmp_path / "moved")) == 0
    assert run(*command, "--out", str(out), "--base", str(work / "two")) == 2
    (again,) = (tmp_path / "other" / "local__mine").iterdir()
    assert again.name == first.revision
    scores = [json.loads((of / "TinySTS.json").read_text())["scores"]["test"] for of in (first.results_dir, again)]
    assert scores[0] == scores[1]

    base, own = (
        sum(p.numel() for p in m.parameters()) for m in (load_encoder(str(work / "one"), device="cpu").model, model)
    )
    checks = {c.name: c for c in submit(again, tmp_path / "out", model=folder).checks}
    assert not checks["n_parameters"].ok and "is not here (see --base)" in checks["base of the adapter"].detail
    checks = {c.name: c for c in submit(again, tmp_path / "out", model=folder, base=str(tmp_path / "moved")).checks}
    assert checks["n_parameters"].ok and base < int(checks["n_parameters"].detail) == own
    assert not checks["base of the adapter"].ok and "save it merged" in checks["base of the adapter"].detail

    card = ["card", str(folder), "--results", str(tmp_path / "other")]
    assert run(*card, "--base", str(tmp_path / "moved")) == 0
    assert "TinySTS" in (folder / "README.md").read_text()
    assert run(*command, "--out", str(out)) == 0
    assert run("card", str(work / "one"), "--base", str(tmp_path / "moved")) == 2
