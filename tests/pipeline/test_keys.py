"""The keys of artifacts in the shared cache, and of results that are taken up again: all that changes their bytes is in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.evaluation import evaluate
from nearfield.evaluation import runner as evaluation_runner
from nearfield.pipeline import open_run, suites
from nearfield.pipeline import run as run_module
from nearfield.pipeline.stages import Stages
from tests.pipeline.fingerprints import fingerprints
from tests.pipeline.pairs import write_pairs

Change = Callable[[dict[str, Any], Path], Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that mines with a teacher of its own, all its files beside it."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("base", "teacher"):
        save_tiny_bert(folder / name)
    write_pairs(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


RECIPE: dict[str, Any] = {
    "name": "keys",
    "data": "data.yaml",
    "encoder": {"model": "base"},
    "teacher": {"kind": "sentence_transformer", "model": "teacher"},
    "mining": {"negatives": 2, "depth": 4},
    "batches": {"kind": "single_source", "batch_size": 4},
    "training": {"max_steps": 1, "trackers": []},
}


def config(name: str, **values: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def setting(path: str, value: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        *above, last = path.split(".")
        for key in above:
            recipe = recipe.setdefault(key, {})
        recipe[last] = value

    return change


def row(recipe: dict[str, Any], folder: Path) -> None:
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"query": "word50", "positive": "word51"}) + "\n")


def prompt(recipe: dict[str, Any], folder: Path) -> None:
    data = yaml.safe_load((folder / "data.yaml").read_text())
    data["sources"][0]["prompts"] = {"query": "word7 "}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))


def vectors_file(value: float = 1.0, digit: str = "1", **more: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        np.save(folder / "made.npy", np.full((2, 2), value, np.float32))
        (folder / "made.ids.txt").write_text("\n".join(["0" * 32, digit * 32]))
        recipe["teacher"] = {"kind": "vectors", "documents": "made.npy", **more}

    return change


def cross(**more: Any) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        recipe["mining"]["teacher"] = {"kind": "cross_encoder", "model": "teacher", **more}

    return change


VECTORS: dict[str, Change] = {
    "data": row,
    "split": setting("split", "test"),
    "teacher's configuration": config("teacher/config.json", num_attention_heads=4),
    "teacher's tokenizer": config("teacher/tokenizer_config.json", padding_side="left"),
    "teacher": setting("teacher.model", "base"),
    "teacher's length": setting("teacher.max_length", 8),
    "teacher's prompts": setting("teacher.prompts", {"query": "word7 "}),
    "code of the teacher's folder": setting("teacher.trust_remote_code", True),
    "vectors of a file": vectors_file(),
    "content of that file": vectors_file(value=2.0),
    "ids of that file": vectors_file(digit="2"),
    "zeros in that file": vectors_file(zeros=True),
}
NEGATIVES: dict[str, Change] = {
    **VECTORS,
    "seed": setting("seed", 5),
    "how many": setting("mining.negatives", 3),
    "depth": setting("mining.depth", 5),
    "search": setting("mining.search", {"kind": "ivf"}),
    "rules": setting("mining.rules", [{"kind": "naive"}]),
    "words in common": setting("mining.teacher", {"kind": "bm25"}),
    "weights of words": setting("mining.teacher", {"kind": "bm25", "k1": 1.0}),
    "a cross-encoder": cross(),
    "its scale": cross(scale="none"),
    "its length": cross(max_length=8),
    "its code": cross(trust_remote_code=True),
    "who retrieves": cross(retrieve={"kind": "bm25"}),
}
TOKENS: dict[str, Change] = {
    "data": row,
    "split": setting("split", "test"),
    "tokenizer": config("base/tokenizer_config.json", model_max_length=32),
    "configuration": config("base/config.json", max_position_embeddings=32),
    "tokens read in training": setting("training.max_length", 8),
    "tokens that the model reads": setting("encoder.max_length", 10),
    "end of text": setting("encoder.append_eos", True),
    "prompts": prompt,
}


def places(folder: Path) -> dict[str, str]:
    found = Stages.of(open_run(folder / "recipe.yaml", folder=folder / "run"))
    mined = found.mine.is_wanted
    return {
        "vectors": " ".join(path.name for path in found.vectors.outputs()),
        "negatives": found.mine.output.name if mined else "",
        "tokens": found.tokens.output.name,
    }


@pytest.mark.parametrize(("kind", "changes"), [("vectors", VECTORS), ("negatives", NEGATIVES), ("tokens", TOKENS)])
def test_each_input_moves_an_artifact_of_the_shared_cache(
    project: Path, tmp_path: Path, kind: str, changes: dict[str, Change]
) -> None:
    seen = {"as it was": places(project)[kind]}
    for number, (what, change) in enumerate(changes.items()):
        folder = Path(shutil.copytree(project, tmp_path / str(number)))
        recipe = json.loads(json.dumps(RECIPE))
        change(recipe, folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        seen[what] = places(folder)[kind]
    assert len(set(seen.values())) == len(seen), seen


def test_versions_move_artifacts_but_no_run_that_has_begun(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(project / "recipe.yaml", folder=project / "begun")
    before, known = places(project), Stages.of(run)
    now, first = known.tokens.versions(), fingerprints(project / "recipe.yaml")
    for kind, stage in (("vectors", known.vectors), ("negatives", known.mine), ("tokens", known.tokens)):
        for package in stage.packages:

            def other(packages: Any, package: str = package) -> dict[str, str]:
                return {**dict.fromkeys(packages, "1"), package: "0.0.1"}

            monkeypatch.setattr(run_module, "versions_of", other)
            assert places(project)[kind] != before[kind]
    monkeypatch.undo()
    run.begin()
    run.finish("tokens", {"fingerprint": first["tokens"], "versions": now})
    made = known.tokens.output
    made.mkdir(parents=True)
    monkeypatch.setattr(run_module, "versions_of", lambda packages: dict.fromkeys(packages, "99"))
    assert Stages.of(run).tokens.output == made
    assert fingerprints(project / "recipe.yaml") == first  # and nothing that follows is stale
    other_run = open_run(project / "recipe.yaml", folder=project / "another")
    assert Stages.of(other_run).tokens.output != made
    shutil.rmtree(made)
    assert Stages.of(run).tokens.output != made


REPORT: dict[str, Callable[[pytest.MonkeyPatch, Path], Any]] = {
    "the way of comparing": lambda patch, model: patch.setattr(suites, "VERSION", 99),
    "mteb": lambda patch, model: patch.setattr(suites, "versions_of", lambda packages: {"mteb": "1"}),
    "versions of the embeddings": lambda patch, model: patch.setattr(
        suites, "computing_versions", lambda: {"torch": "1"}
    ),
    "the model of the embeddings": lambda patch, model: config("config.json", hidden_act="relu")({}, model),
}


@pytest.mark.parametrize("what", REPORT)
def test_a_contamination_report_counts_while_it_would_be_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nearfield.data import prepare_store

    model = Path(shutil.copytree(project / "teacher", tmp_path / "model"))
    task = tmp_path / "tasks" / "Made"
    task.mkdir(parents=True)
    (task / "meta.json").write_text(
        json.dumps({"task": "Made", "type": "STS", "split": "test", "subsets": ["default"]})
    )
    columns = {"sentence1": ["word1 word2", "word3"], "sentence2": ["word4", "word5"], "score": [1.0, 0.0]}
    pq.write_table(pa.table(columns), task / "default.test.parquet")
    store = prepare_store(project / "data.yaml", tmp_path / "cache")
    suite = tmp_path / "tasks"
    made = suites.decontaminate_store(store, suite, tmp_path / "cache", encoder=str(model))
    mark = suites.suite_fingerprint(suite, None)

    def found() -> Any:
        return suites.stored_report(tmp_path / "cache", store.fingerprint, mark, ["pairs"], "train")

    kept = found()
    assert kept is not None and kept.report.contaminated == made.report.contaminated
    assert suites.stored_report(tmp_path / "cache", store.fingerprint, mark, ["pairs"], "test") is None
    assert suites.stored_report(tmp_path / "cache", store.fingerprint, mark, ["others"], "train") is None
    content = bytearray(kept.path.read_bytes())
    content[len(content) // 2] ^= 1
    kept.path.write_bytes(bytes(content))
    assert found() is None  # and the warning names the command that makes it again
    content[len(content) // 2] ^= 1
    kept.path.write_bytes(bytes(content))
    assert found() is not None
    columns["score"] = [0.0, 1.0]
    REPORT[what](monkeypatch, model)
    assert found() is None
    monkeypatch.undo()
    pq.write_table(pa.table(columns), task / "default.test.parquet")
    assert suites.suite_fingerprint(suite, None) != mark


def older_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = folder.rglob("Made.json")
    file.write_text(file.read_text().replace(evaluation_runner.versions_of(["mteb"])["mteb"], "1.2.3"))


def patched_versions(package: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = evaluation_runner.versions_of(evaluation_runner.SCORING_PACKAGES)
        monkeypatch.setattr(evaluation_runner, "versions_of", lambda packages: {**now, package: "0.0.1"})

    return change


RESULTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "a result of an older mteb": older_result,
    **{package: patched_versions(package) for package in evaluation_runner.SCORING_PACKAGES},
    "the way of scoring": lambda folder, patch: patch.setattr(evaluation_runner, "VERSION", 99),
}


@pytest.mark.filterwarnings("ignore")
def test_results_are_taken_up_again_only_if_they_would_be_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nearfield.encoders import load_encoder

    task = tmp_path / "tasks" / "Made"
    task.mkdir(parents=True)
    (task / "meta.json").write_text(
        json.dumps({"task": "Made", "type": "STS", "split": "test", "subsets": ["default"]})
    )
    texts = [f"word{i} word{i * 3 % 40}" for i in range(20)]
    columns = {"sentence1": texts, "sentence2": texts[3:] + texts[:3], "score": np.linspace(0, 1, 20).tolist()}
    pq.write_table(pa.table(columns), task / "default.test.parquet")
    encoder = load_encoder(str(project / "base"), device="cpu")

    def reused() -> bool:
        return evaluate(encoder, tmp_path / "tasks", tmp_path / "out").reused == ("Made",)

    assert not reused() and reused()
    for what, change in RESULTS.items():
        change(tmp_path / "out", monkeypatch)
        assert not reused(), what
        monkeypatch.undo()
        if not reused():
            assert reused(), what
    # A model that is changed in memory keeps its name and revision.
    encoder.model[0].auto_model.config.num_attention_heads = 4
    assert not reused()
    assert reused()
