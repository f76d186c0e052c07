"""The length that training reads of a text and the length that the model reads are two settings, and every cut is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import nearfield
from nearfield.data.tokens import TokenCache
from nearfield.encoders.packing import longest_input
from nearfield.encoders.tokenize import count_cuts, lost_tokens, shorten, whole_lengths
from nearfield.evaluation.results import read_manifest
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import say_long_model
from nearfield.pipeline.stages import Stages
from nearfield.recipe import load_recipe
from tests.pipeline.fingerprints import fingerprints

ROOT = Path(__file__).parents[2]
SHORT = 8


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_data: Path) -> Path:
    """A run whose training reads 8 tokens of texts of a model of 64, scored on its held-out split."""
    from tests.conftest import write_toy_recipe

    folder = tmp_path_factory.mktemp("lengths")
    recipe = write_toy_recipe(folder, tiny_model, toy_data)
    suite = folder / "suite.yaml"
    suite.write_text(
        f"name: s\ntasks:\n  - {{kind: heldout, name: Toy, data: {toy_data}, source: pairs, split: test}}\n"
    )
    text = recipe.read_text().replace("max_steps: 12", f"max_steps: 3\n  max_length: {SHORT}")
    recipe.write_text(text + f"evaluation: {{suite: {suite}, baselines: [], analysed_texts: 0}}\n")
    run_stages(open_run(recipe, (), folder / "run"))
    return folder


def results(run: Path) -> dict[str, Path]:
    found = json.loads((run / "manifest.json").read_text())["stages"]["evaluate"]["results"]
    return {label: run / place for label, place in found.items()}


def test_the_model_keeps_the_length_of_its_base(short_run: Path, tiny_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = SentenceTransformer(str(tiny_model), device="cpu")
    model = SentenceTransformer(str(short_run / "run" / "model"), device="cpu")
    assert model.max_seq_length == base.max_seq_length == 64
    long = " ".join(f"word{i}" for i in range(40))
    assert np.abs(model.encode(long) - model.encode(long[: len(long) // 4])).max() > 1e-3


def test_training_reads_no_more_than_its_length(short_run: Path) -> None:
    stages = Stages.of(open_run(short_run / "toy.yaml", (), short_run / "run"))
    cache = TokenCache(stages.tokens.output)
    lengths = np.concatenate([table.lists.lengths for table in cache.tables])
    assert lengths.max() == SHORT == cache.max_length


def test_before_is_the_base_as_published(short_run: Path, tiny_model: Path) -> None:
    """Also where the recipe gives the trained model another length."""
    from sentence_transformers import SentenceTransformer

    [line] = read_manifest(results(short_run / "run")["before"])
    assert line["max_length"] == SentenceTransformer(str(tiny_model), device="cpu").max_seq_length
    assert results(short_run / "run")["before"].parent.name == f"local__{tiny_model.name}"
    assert not load_recipe(short_run / "toy.yaml", ["encoder.max_length=16"]).config.encoder.changes_base
    assert load_recipe(short_run / "toy.yaml", ["encoder.pooling=cls"]).config.encoder.changes_base


def test_a_length_beside_a_change_of_the_base_is_not_of_before(toy_recipe: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    settings = ["encoder.max_length=16", "encoder.pooling=cls"]
    stages = Stages.of(open_run(toy_recipe, settings, tmp_path / "run"))
    stages.job.run.folder.mkdir()
    assert SentenceTransformer(stages.evaluate.untrained(), device="cpu").max_seq_length == 64


def test_cuts_are_counted_as_the_tokenizer_counts(short_run: Path, tiny_model: Path) -> None:
    """Texts of just the length are not cut; the manifest, the card and the log say what is."""
    from transformers import AutoTokenizer

    stages = Stages.of(open_run(short_run / "toy.yaml", (), short_run / "run"))
    from nearfield.data import Store

    store, cache = Store.open(stages.data.output), TokenCache(stages.tokens.output)
    texts = [text for table in cache.tables for text in store.texts(table.rows)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = [len(tokenizer(text)["input_ids"]) for text in texts]
    over = [length - SHORT for length in whole if length > SHORT]
    assert SHORT in whole
    assert cache.cut.to_json() == {"texts": len(texts), "cut": len(over), "tokens": sum(whole), "lost": sum(over)}
    lengths = json.loads((short_run / "run" / "manifest.json").read_text())["stages"]["train"]["lengths"]
    assert lengths == {"training": SHORT, "model": 64, **cache.cut.to_json()}
    card = (short_run / "run" / "model" / "README.md").read_text()
    assert "the model reads at most 64 tokens of a text" in card
    assert cache.cut.say(SHORT) in card
    assert f"{len(over):,} of {len(texts):,} texts" in cache.cut.say(SHORT)
    assert str(len(over)) in (short_run / "run" / "report.html").read_text()


def test_the_log_and_the_dry_run_say_what_is_cut(
    toy_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [f"training.max_length={SHORT}"]
    with caplog.at_level(logging.WARNING, "nearfield"):
        found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
    assert found is not None
    said = [one.what for one in found.notices if "are cut at 8 tokens and lose" in one.what]
    assert len(said) == 1
    assert "are cut at 8 tokens and lose" in caplog.text


def test_a_training_length_above_the_models_is_said(toy_recipe: Path, tmp_path: Path) -> None:
    settings = ["training.max_length=100", "encoder.max_length=10"]
    found = nearfield.dry_run(toy_recipe, settings, tmp_path / "run")
    assert found is not None
    assert found.would_start
    said = "\n".join(one.what for one in found.notices)
    assert "training.max_length is 100, and the model reads 10 tokens" in said
    assert "are cut at 10 tokens" in said


def test_fingerprints_follow_what_is_read(toy_recipe: Path, tmp_path: Path) -> None:
    def prints(*settings: str) -> dict[str, str]:
        return fingerprints(toy_recipe, settings, tmp_path / "run")

    plain, short = prints(), prints("training.max_length=8")
    assert {name for name in plain if plain[name] != short[name]} >= {"tokens", "plan", "train"}
    assert plain["data"] == short["data"]
    both = prints("training.max_length=8", "encoder.max_length=16")
    # The same tokens; another model comes out.
    assert (both["tokens"], both["plan"]) == (short["tokens"], short["plan"])
    assert both["train"] != short["train"]
    assert (
        prints("training.max_length=16", "encoder.max_length=8")["tokens"] == prints("encoder.max_length=8")["tokens"]
    )


def test_an_evaluation_counts_what_the_model_does_not_read(tiny_model: Path, toy_data: Path, tmp_path: Path) -> None:
    """The same with all vectors from the cache."""
    from nearfield.encoders import load_encoder
    from nearfield.evaluation import SuiteConfig, evaluate, open_model

    tasks = [{"kind": "heldout", "name": "Toy", "data": str(toy_data), "source": "pairs", "split": "test"}]
    suite = SuiteConfig.model_validate({"name": "s", "tasks": tasks})
    counts = []
    for out in ("a", "b"):
        loaded = load_encoder(str(tiny_model), device="cpu")
        shorten(loaded.model, SHORT)
        found = evaluate(open_model(loaded, cache=tmp_path / "vectors"), suite, tmp_path / out)
        counts.append(read_manifest(found.results_dir)[0]["tasks"]["Toy"]["texts_cut"])
        [notice] = found.notices["Toy"]
        assert notice.code == "texts-cut"
        assert f"{counts[-1]['cut']} of {counts[-1]['texts']} texts" in notice.what
    assert counts[0] == counts[1]
    assert 0 < counts[0]["cut"] < counts[0]["texts"]
    assert 0 < counts[0]["lost"] < counts[0]["tokens"]


@pytest.mark.parametrize("prompt", ["", "word1 word2 "])
def test_lengths_equal_a_loop(tiny_model: Path, prompt: str) -> None:
    from nearfield.encoders import load_encoder
    from nearfield.encoders.tokenize import token_ids

    model = load_encoder(str(tiny_model), device="cpu").model
    texts = [" ".join(f"word{i}" for i in range(n)) for n in (0, 1, 5, 6, 7, 30, 100)]
    wanted = [len(model.tokenizer(prompt + text)["input_ids"]) for text in texts]
    shorten(model, 9)
    assert whole_lengths(model, texts, prompt) == wanted
    kept = [len(row) for row in token_ids(model, texts, prompt)]
    lost = [max(0, length - 9) for length in wanted]
    assert lost_tokens(model, texts, prompt, kept) == lost
    cut = count_cuts(model, texts, prompt)
    assert (cut.cut, cut.tokens, cut.lost) == (sum(n > 0 for n in lost), sum(wanted), sum(lost))
    shorten(model, 30)
    assert longest_input(model) == 9


def test_a_long_base_is_said_with_what_its_evaluation_takes(tiny_model: Path, toy_data: Path) -> None:
    from nearfield.encoders import load_encoder
    from nearfield.evaluation import SuiteConfig
    from nearfield.evaluation.config import open_suite

    tasks = [{"kind": "heldout", "name": "Toy", "data": str(toy_data), "source": "pairs", "split": "test"}]
    suite = open_suite(SuiteConfig.model_validate({"name": "s", "tasks": tasks}))
    model = load_encoder(str(tiny_model), device="cpu").model
    assert say_long_model(model, suite, 2, 1e-4, 10.0) is None
    model.max_seq_length = 2048
    assert say_long_model(model, suite, 2, 1e-4, 10.0) is None
    model.max_seq_length = 8192
    said = say_long_model(model, suite, 2, 1e-4, 10.0)
    assert said is not None
    assert "8,192 tokens of a text" in said
    assert "texts of Toy have" in said
    assert "for 2 models" in said
    from nearfield.evaluation.texts import benchmark_tasks

    texts = {text.text for part in benchmark_tasks(suite) for text in part.texts()}
    assert f"the {len(texts):,} texts" in said
    assert f"have {sum(whole_lengths(model, list(texts), '')):,} tokens" in said
    model.max_seq_length = None
    assert "texts of any length" in str(say_long_model(model, [], 1, 1e-4, 10.0))


def test_shipped_recipes_cut_no_model() -> None:
    recipes = [*(ROOT / "training" / "recipes").glob("*.yaml"), *(ROOT / "training" / "recipes").glob("methods/*.yaml")]
    loaded = {path.stem: load_recipe(path).config for path in recipes}
    assert all(one.encoder.max_length is None for one in loaded.values())
    assert sum(one.training.max_length is not None for one in loaded.values()) == 18
