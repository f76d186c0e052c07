"""Recipes: read, checked, explained; what is wrong is said with file, line, key and the nearest spelling."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nearfield.config import PARTS, Config, read_yaml
from nearfield.errors import BadInputError
from nearfield.recipe import Recipe, check_recipe, load_recipe, recipe_schema, resolve
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def test_there_are_shipped_recipes() -> None:
    assert {path.name for path in SHIPPED} >= {"wordnet.yaml", "debian.yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    check_recipe(load_recipe(path))
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_shipped_schema_is_the_schema() -> None:
    shipped = json.loads((ROOT / "training" / "recipes" / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(registered=False), (
        "write it anew: nearfield recipe schema --out training/recipes/recipe.schema.json"
    )


def test_every_value_knows_where_it_came_from(toy_recipe: Path) -> None:
    loaded = load_recipe(toy_recipe, ["training.learning_rate=0.5", "seed=3"])
    origins = {value.key: value.origin for value in resolve(loaded)}
    values = {value.key: value.value for value in resolve(loaded)}
    assert origins["name"] == f"{toy_recipe}:1"
    assert origins["objective.temperature"] == f"{toy_recipe}:4"
    assert origins["training.max_steps"] == f"{toy_recipe}:8"
    assert origins["training.learning_rate"] == "override training.learning_rate=0.5"
    assert origins["training.optimizer.weight_decay"] == "default"
    assert (values["training.learning_rate"], values["seed"]) == (0.5, 3)


def test_numbers_are_written_as_people_write_them(tmp_path: Path, toy_data: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\ndata: {toy_data}\ntraining:\n  learning_rate: 2e-5\n")
    assert load_recipe(path).config.training.learning_rate == 2e-5
    assert load_recipe(path, ["training.learning_rate=1e-4"]).config.training.learning_rate == 1e-4


def test_whole_numbers_are_written_as_people_write_them(tmp_path: Path, toy_data: Path) -> None:
    """Where a whole number is wanted, in any place of a setting, and nowhere else."""
    path = tmp_path / "r.yaml"
    objective = "objective: {kind: infonce, matryoshka: {dimensions: [8, 1.6e1]}}"
    path.write_text(f"name: r\ndata: {toy_data}\nseed: 1e2\n{objective}\ntraining:\n  max_steps: 1e3\n")
    settings = ["training.micro_batch_tokens=1.6384e4", "batches={kind: single_source, batch_size: 1E2}"]
    recipe = load_recipe(path, settings).config
    found = (recipe.seed, recipe.training.max_steps, recipe.training.micro_batch_tokens, recipe.batches.batch_size)
    assert found == (100, 1000, 16384, 100) and all(type(number) is int for number in found)
    assert recipe.objective.matryoshka.dimensions == (8, 16)  # type: ignore[attr-defined]
    for wrong in ("1e-1", "1.5e0", "1e400", "1e30", ".nan", "'1e3'"):
        with pytest.raises(BadInputError, match=r"training\.max_steps"):
            load_recipe(path, [f"training.max_steps={wrong}"])
    fresh = load_recipe(path, ["encoder.fresh={rope_theta: 1e4}"]).config.encoder.fresh
    assert fresh is not None and type(fresh["rope_theta"]) is float


def test_a_number_where_a_text_is_wanted_says_what_to_do(tmp_path: Path, toy_data: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\ndata: {toy_data}\nencoder: {{revision: 1234567e8}}\n")
    with pytest.raises(BadInputError, match="quotes") as error:
        load_recipe(path)
    assert "encoder.revision" in error.value.what
    path.write_text(path.read_text().replace("1234567e8", "2026-01-01"))
    assert load_recipe(path).config.encoder.revision == "2026-01-01"


def test_paths_are_relative_to_the_recipe(tmp_path: Path, toy_data: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "data.yaml").write_text(toy_data.read_text())
    (tmp_path / "sub" / "r.yaml").write_text("name: r\ndata: ../data.yaml\n")
    assert load_recipe(tmp_path / "sub" / "r.yaml").config.data == tmp_path / "data.yaml"
    assert Recipe.load(tmp_path / "sub" / "r.yaml", ["seed=7"]).seed == 7


def test_a_resolved_recipe_is_the_same_recipe(toy_recipe: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(toy_recipe)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert Recipe.load(copy) == recipe


def test_configs_are_frozen(toy_recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load(toy_recipe).seed = 2  # type: ignore[misc]


# (what is changed in the toy recipe, words that the message must have, besides the file)
WRONG = {
    "unknown key": ("training:", "trainig:", ["line 6", "'trainig'", "Did you mean 'training'?"]),
    "unknown nested key": (
        "learning_rate",
        "learning_rat",
        ["line 9", "'training.learning_rat'", "Did you mean 'learning_rate'?"],
    ),
    "wrong type": ("epochs: 2", "epochs: two", ["training.epochs", "integer", '"two"']),
    "float for int": ("epochs: 2", "epochs: 2.5", ["training.epochs", "2.5"]),
    "number in quotes": ("epochs: 2", 'epochs: "2"', ["training.epochs", "integer"]),
    "out of range": ("temperature: 0.1", "temperature: -1", ["objective.temperature", "greater than 0"]),
    "infinite": ("temperature: 0.1", "temperature: .inf", ["objective.temperature", "finite"]),
    "unknown kind": (
        "kind: infonce",
        "kind: infonse",
        ["objective: unknown kind 'infonse'", "Did you mean 'infonce'?"],
    ),
    "duplicate key": ("name: toy", "name: toy\nname: toy2", ["line 2", "'name' stands twice"]),
    "merged with no mapping": ("name: toy", "<<: toy\nname: toy", ["only keys and values can be merged"]),
    "merged with an unknown key": ("name: toy", "<<: {nome: toy}\nname: toy", ["'nome'"]),
    "bad YAML": ("name: toy", "name: [toy", ["not valid YAML"]),
    "a list": ("name: toy", "- name: toy\n", ["not valid YAML"]),
    "missing key": ("name: toy\n", "", ["'name' is missing"]),
    "name leaves the folder": ("name: toy", "name: ../../etc", ["name", "pattern"]),
    "no such data recipe": ("toy.yaml", "none.yaml", ["does not exist"]),
    "no such model folder": ("{model: ", "{model: ./nowhere", ["encoder.model", "there is no folder"]),
    "YAML tag": ("name: toy", "name: !!python/object/apply:os.system [true]", ["not valid YAML"]),
    "null where a value is needed": ("epochs: 2", "epochs:", ["training.epochs", "integer"]),
    "impossible combination": (
        "max_steps: 12",
        "max_steps: 12\n  schedule: {warmup: 20}",
        ["leaves nothing of max_steps"],
    ),
    "tab": ("  epochs", "\tepochs", ["not valid YAML"]),
    "control character": ("name: toy", "name: to\x00y", ["not allowed in YAML"]),
    "number as key": ("name: toy", "name: toy\n1: 2", ["the key 1 is not a string"]),
}


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nearfield", *arguments], capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(toy_recipe: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from nearfield.cli import main

    old, new, words = WRONG[kind]
    text = toy_recipe.read_text()
    assert old in text
    toy_recipe.write_text(text.replace(old, new, 1))
    with pytest.raises(SystemExit) as stopped:
        main(["recipe", "check", str(toy_recipe)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("nearfield: ")
    assert "Traceback" not in message
    if kind != "no such data recipe":
        assert str(toy_recipe) in message
    for word in words:
        line = word.replace("line ", f"{toy_recipe}:")
        assert line in message, message


def test_several_complaints_come_together(toy_recipe: Path) -> None:
    text = toy_recipe.read_text().replace("epochs: 2", "epochs: no").replace("temperature: 0.1", "temperature: 0")
    toy_recipe.write_text(text)
    with pytest.raises(BadInputError) as error:
        load_recipe(toy_recipe)
    assert "2 things are wrong" in str(error.value)
    assert "training.epochs" in str(error.value)
    assert "objective.temperature" in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00name")
    for path, words in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder"), (binary, "not UTF-8")):
        with pytest.raises(BadInputError, match=words):
            load_recipe(path)
    empty = tmp_path / "empty.yaml"
    empty.touch()
    with pytest.raises(BadInputError, match="'name' is missing"):
        load_recipe(empty)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(BadInputError, match="keys and values"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "form key.path=value"),
        ("=3", "form key.path=value"),
        ("name.first=3", "single value"),
        ("sources.5=x", "list of 1"),
        ("seed=[1", "not valid YAML"),
        ("sed=3", "Did you mean 'seed'"),
        ("training.learning_rte=3", "Did you mean 'learning_rate'"),
    ],
)
def test_bad_overrides(toy_recipe: Path, override: str, words: str) -> None:
    toy_recipe.write_text(toy_recipe.read_text() + "sources: [pairs]\n")
    with pytest.raises(BadInputError, match=words):
        load_recipe(toy_recipe, [override])


def test_a_guide_must_make_vectors_and_be_asked_for(toy_recipe: Path) -> None:
    mask = "objective.guide_mask={margin: 0.0}"
    with pytest.raises(BadInputError, match="the teacher 'bm25' has none"):
        check_recipe(load_recipe(toy_recipe, [mask, "teacher={kind: bm25}"]))
    with pytest.raises(BadInputError, match="no use for one"):
        check_recipe(load_recipe(toy_recipe, ["guide={kind: sentence_transformer}"]))
    check_recipe(load_recipe(toy_recipe, [mask]))
    check_recipe(load_recipe(toy_recipe, [mask, "teacher={kind: bm25}", "guide={kind: sentence_transformer}"]))


def test_overrides_reach_into_lists_and_defaults(toy_recipe: Path) -> None:
    toy_recipe.write_text(toy_recipe.read_text() + "sources: [pairs]\n")
    recipe = Recipe.load(
        toy_recipe,
        ["sources.0=other", "prompts.fallback.query=q", "training.optimizer={kind: adamw, betas: [0.8, 0.9]}"],
    )
    assert recipe.sources == ("other",)
    assert recipe.prompts.fallback.query == "q"
    assert recipe.training.optimizer.betas == (0.8, 0.9)


def test_mappings_are_merged_as_yaml_says(tmp_path: Path) -> None:
    file = tmp_path / "merged.yaml"
    file.write_text(
        "a: &a {x: 1, deep: {y: 2}}\nb: &b\n  x: 3\n  z: 4\nc: {w: 5, <<: *a, x: 6}\nd:\n  <<: [*a, *b]\n  w: 7\n"
    )
    value, origins = read_yaml(file)
    assert value["c"] == {"x": 6, "deep": {"y": 2}, "w": 5}
    assert value["d"] == {"x": 1, "z": 4, "deep": {"y": 2}, "w": 7}, "of several the first counts"
    assert (
        origins["c", "x"] == f"{file}:5"
        and origins["c", "deep", "y"] == f"{file}:1"
        and origins["d", "z"] == f"{file}:4"
    )
    assert value["c"] == yaml.safe_load(file.read_text())["c"] and value["d"] == yaml.safe_load(file.read_text())["d"]


def test_what_a_recipe_names_must_fit(toy_recipe: Path, tmp_path: Path, toy_data: Path) -> None:
    with pytest.raises(BadInputError, match="no source 'nope'"):
        check_recipe(load_recipe(toy_recipe, ["sources=[nope]"]))
    with pytest.raises(BadInputError, match="stands twice"):
        check_recipe(load_recipe(toy_recipe, ["sources=[pairs, pairs]"]))
    graded = tmp_path / "graded.yaml"
    graded.write_text(
        toy_data.read_text().replace(
            "{kind: retrieval, query: query, positives: positive, negatives: negative}",
            "{kind: graded, first: query, second: positive, score: s}",
        )
    )
    with pytest.raises(BadInputError, match="learns from retrieval examples"):
        check_recipe(load_recipe(toy_recipe, [f"data={graded}"]))
    with pytest.raises(BadInputError, match="'pairs' has graded examples"):
        check_recipe(load_recipe(toy_recipe, [f"data={graded}", "sources=[pairs]"]))
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: s\ntasks: [{{kind: heldout, name: T, data: {toy_data}, source: other}}]\n")
    with pytest.raises(BadInputError, match="no source 'other'"):
        check_recipe(load_recipe(toy_recipe, [f"evaluation={{suite: {suite}}}"]))


def test_commands(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nearfield.cli import main

    for arguments in (
        ["recipe", "check", str(toy_recipe)],
        ["recipe", "show", str(toy_recipe), "seed=9"],
        ["recipe", "schema", "--out", str(tmp_path / "s.json")],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "valid. Trains on pairs." in printed
    assert "override seed=9" in printed
    assert json.loads((tmp_path / "s.json").read_text()) == recipe_schema()


@pytest.mark.parametrize("objective", ["{kind: simcse}", "{kind: combined, parts: [{objective: {kind: simcse}}]}"])
def test_two_views_want_dropout(toy_recipe: Path, objective: str) -> None:
    check_recipe(load_recipe(toy_recipe, [f"objective={objective}"]))
    with pytest.raises(BadInputError, match="tells a text's two embeddings apart by dropout, and it is off"):
        check_recipe(load_recipe(toy_recipe, [f"objective={objective}", "training.dropout=false"]))


def settings_classes() -> Iterator[type[Config]]:
    """All classes of settings of the library, those of methods too."""
    import nearfield.data.config
    import nearfield.evaluation.config  # noqa: F401

    for part in PARTS.values():
        if part.base.startswith("nearfield."):
            for name in part.table:
                part.find(name)
    waiting: list[type[Config]] = [Config]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        yield from (each for each in below if each.__module__.startswith("nearfield."))


def test_every_setting_says_its_effect() -> None:
    """Each has a description, which reaches the schema, of more than its own name; a ``kind`` has its line in the table."""
    for settings in settings_classes():
        for name, field in settings.model_fields.items():
            if name == "kind":
                continue
            said = set(re.findall(r"[a-z]+", (field.description or "").lower())) - {"the", "a", "an", "of", "its"}
            assert said - set(name.lower().split("_")), f"{settings.__module__}.{settings.__name__}.{name}"


def hand_written() -> tuple[str, str]:
    """The pages of the project, and the YAML files that it ships."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]
    folders = [ROOT / name for name in ("training", "eval", "data_recipes")]
    pages += [path for folder in folders for path in folder.rglob("*.md")]
    files = [path for folder in folders for path in folder.rglob("*.yaml")]
    return "\n".join(path.read_text() for path in pages), "\n".join(path.read_text() for path in files)


def test_every_setting_is_shown_or_explained() -> None:
    """Each setting and each kind stands in a shipped file or in a page that was written by hand, as code."""
    pages, files = hand_written()
    # An indented block of a page shows settings as a file does.
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", pages, re.DOTALL))
    missing = []
    for settings in settings_classes():
        for name, field in settings.model_fields.items():
            if name == "kind":
                word = re.escape(str(field.default))
                shown = re.search(rf":\s*{word}\b", files)
            else:
                word = re.escape(field.alias or name)
                shown = re.search(rf"\b{word}\s*:", files)
            if not shown and not re.search(rf"\b{word}\b", code):
                missing.append(f"{settings.__module__}.{settings.__name__}.{word if name == 'kind' else name}")
    assert missing == []
