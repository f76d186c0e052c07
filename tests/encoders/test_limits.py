"""Lengths beyond a model's positions and words without a row: as sentence-transformers where it runs, one message where not.

Models that look words up in a table: the vectors and gradients of sentence-transformers, in trainings with all that plugs in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from tokenizers import Tokenizer

from nearfield.conformance.tiny_models import WORDS
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder, save_encoder
from nearfield.encoders.packing import embed, longest_input, padded_features, usable_positions, vocabulary_size
from nearfield.encoders.tokenize import count_cuts, shorten, token_ids
from nearfield.encoders.trials import packing_kind
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from tests.conftest import write_toy_recipe
from tests.encoders.zoo import ANIMALS, TEXTS, Animal, save_animal
from tests.evaluation.conftest import Tasks
from tests.training.launching import TORCHRUN, launch

LONG = " ".join(["fox"] * 400)
POSITIONS = {
    "bert": 80,
    "roberta": 80 - 2,
    "xlm-roberta": 80 - 2,
    "camembert": 80 - 2,
    "xmod": 80 - 2,
    "mpnet": 80 - 2,
    "esm": 80 - 2,
    "longformer": 80 - 2,
    "ibert": 80 - 1,
    "bart": 80,
    "gpt2": 80,
    "opt": 80,
    "nystromformer": 80,
    "t5": None,
    "llama": None,
    "xlnet": None,
    "deberta-v2": 80,
}


def codes(folder: Path) -> list[str]:
    return [notice.code for notice in load_encoder(str(folder), device="cpu").notices]


@pytest.mark.parametrize(("name", "positions"), POSITIONS.items())
def test_no_text_is_longer_than_the_positions(tmp_path: Path, name: str, positions: int | None) -> None:
    """The tokenizer says no length; sentence-transformers then takes the config's, which is too long for some."""
    folder = save_animal(tmp_path, ANIMALS[name], max_length=None)
    model = load_encoder(str(folder), device="cpu").model
    assert usable_positions(model) == positions
    vectors = Encoder(model)([*TEXTS, LONG])
    assert np.isfinite(vectors).all()
    if positions is not None:
        assert longest_input(model) == positions
        plain = SentenceTransformer(str(folder), device="cpu")
        plain.max_seq_length = positions
        if plain.tokenizer.pad_token is None:
            plain.tokenizer.pad_token = plain.tokenizer.eos_token
        wanted = np.concatenate([plain.encode([text]) for text in [*TEXTS, LONG]])
        if not ANIMALS[name].dependent:
            np.testing.assert_allclose(vectors, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["roberta", "bert", "mpnet"])
def test_a_saved_length_beyond_the_positions_is_lowered_and_said(tmp_path: Path, name: str) -> None:
    model = SentenceTransformer(str(save_animal(tmp_path / "base", ANIMALS[name])), device="cpu")
    model.max_seq_length = 300
    model.save_pretrained(str(tmp_path / "saved"))
    # As earlier versions of sentence-transformers wrote it, which holds whatever the config says.
    settings = tmp_path / "saved" / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 300}))
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu")
    assert [notice.code for notice in loaded.notices] == ["positions-exceeded"]
    assert longest_input(loaded.model) == POSITIONS[name]
    with pytest.raises((IndexError, RuntimeError)):
        model.encode([LONG])
    assert np.isfinite(Encoder(loaded.model)([LONG])).all()


@pytest.mark.parametrize("name", ["roberta", "xlnet", "t5", "llama"])
def test_a_recipes_length_is_held_against_the_usable_positions(tmp_path: Path, name: str) -> None:
    folder = str(save_animal(tmp_path, ANIMALS[name]))
    if name in ("t5", "xlnet"):  # without an end
        assert longest_input(build_encoder(EncoderConfig(model=folder, max_length=500), "cpu").model) == 500
        return
    limit = 78 if name == "roberta" else 80
    assert longest_input(build_encoder(EncoderConfig(model=folder, max_length=limit), "cpu").model) == limit
    with pytest.raises(BadInputError, match=f"more than the model's {limit} positions"):
        build_encoder(EncoderConfig(model=folder, max_length=limit + 1), "cpu")


@pytest.mark.parametrize("name", ["longt5", "t5", "bloom", "xlnet", "fnet"])
def test_a_model_that_reads_any_length_is_scored(tmp_path: Path, name: str) -> None:
    """Its tokenizer says 1e30; the chunks of padded texts are cut by tokens all the same."""
    loaded = load_encoder(str(save_animal(tmp_path, ANIMALS[name], max_length=None)), device="cpu")
    assert longest_input(loaded.model) in (None, 80)
    encoder = TaskEncoder(loaded.model, name="a/b", revision="1")
    texts = [*TEXTS, " ".join(["fox"] * 60)]
    found = dict(encoder.encoder.pairs(texts))
    assert set(found) == set(texts)
    if not ANIMALS[name].dependent:
        wanted = np.concatenate([loaded.model.encode([text]) for text in texts])
        mine = np.stack([found[text] for text in texts])
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_a_padding_token_without_a_row_is_one_message(tmp_path: Path) -> None:
    """It was added to the tokenizer, and the model's table was not resized."""
    folder = save_animal(tmp_path, ANIMALS["llama"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(IndexError):
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    with pytest.raises(BadInputError, match=rf"padding token '\[PAD\]' has number {rows}, .* {rows} rows"):
        load_encoder(str(folder), device="cpu")


def test_an_enclosing_token_without_a_row_is_one_message(tmp_path: Path) -> None:
    folder = save_animal(tmp_path, ANIMALS["bert"])
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    number = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TASK]"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[TASK] $A", special_tokens=[("[TASK]", number)]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(BadInputError, match=r"enclosing token '\[TASK\]'"):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["qwen3", "bert", "longt5", "ibert"])
def test_an_added_word_without_a_row_stops_only_texts_that_have_it(tmp_path: Path, name: str) -> None:
    folder = save_animal(tmp_path, ANIMALS[name])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(folder)
    loaded = load_encoder(str(folder), device="cpu")
    assert [notice.code for notice in loaded.notices] == ["words-without-rows"]
    assert "'<|extra|>'" in loaded.notices[0].what
    wanted = np.concatenate([SentenceTransformer(str(folder), device="cpu").encode([text]) for text in TEXTS])
    np.testing.assert_allclose(Encoder(loaded.model)(TEXTS), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    encoder = TaskEncoder(loaded.model, name="a/b", revision="1")
    for use in (
        lambda: Encoder(loaded.model)([*TEXTS, "a <|extra|> word"]),
        lambda: list(encoder.encoder.pairs(["fox", "a <|extra|> word"])),
    ):
        with pytest.raises(BadInputError, match=r"the word '<\|extra\|>' of the text 'a <\|extra\|> word'"):
            use()


def test_more_rows_than_words_are_fine(tmp_path: Path) -> None:
    assert not codes(save_animal(tmp_path, ANIMALS["qwen2"], rows=50))


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_neither_padding_nor_end_is_one_message(tmp_path: Path, architecture: str) -> None:
    folder = save_animal(tmp_path, Animal(architecture, "neither"))
    with pytest.raises(ValueError, match="padding token"):
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    with pytest.raises(BadInputError, match="neither a padding token nor an end token"):
        load_encoder(str(folder), device="cpu")


def test_an_end_token_pads_where_nothing_else_does(tmp_path: Path) -> None:
    """Of a plain decoder as ever; of a folder that sentence-transformers saved, and cannot run, with a word."""
    folder = save_animal(tmp_path / "base", ANIMALS["gpt2"])
    assert not codes(folder)
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="padding token"):
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu")
    assert [notice.code for notice in loaded.notices] == ["padding-token"]
    vectors = Encoder(loaded.model)(TEXTS)
    save_encoder(loaded.model, tmp_path / "again")
    plain = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(plain, vectors, rtol=0, atol=2e-5 * np.abs(vectors).max())


def test_a_padding_number_outside_the_table_does_not_stop_packing(tmp_path: Path) -> None:
    """As LLaMA's config said for long: -1."""
    folder = save_animal(tmp_path, ANIMALS["llama"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    assert Encoder(load_encoder(str(folder), device="cpu").model).packing == "varlen"


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bloom", "bert"])
def test_texts_without_a_token(tmp_path: Path, name: str) -> None:
    """Where a tokenizer puts nothing around a text; sentence-transformers gives zeros beside others and fails alone."""
    model = load_encoder(str(save_animal(tmp_path, ANIMALS[name])), device="cpu").model
    encoder = Encoder(model)
    np.testing.assert_allclose(encoder(["", "fox"]), model.encode(["", "fox"]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder([""]), encoder(["", "fox"])[:1], rtol=0, atol=1e-5)


STATIC_TEXTS = ["word1 word2 word3", "", "word4", "word5 word6 word7 word8 word9 word10"]
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Make:
    """The folder of a static model of a kind, saved by sentence-transformers."""
    root = tmp_path_factory.mktemp("static")

    def table() -> StaticEmbedding:
        return StaticEmbedding(Tokenizer.from_file(str(tiny_model / "tokenizer.json")), embedding_dim=16)

    def modules(kind: str) -> list[Any]:
        if kind == "words":
            vocabulary = [*WORDS, *(f"word{number}" for number in range(200))]
            weights = torch.randn(len(vocabulary), 16).numpy()
            return [WordEmbeddings(WhitespaceTokenizer(vocabulary), weights, update_embeddings=True), Pooling(16)]
        return [table(), *{"dense": [Dense(16, 8)], "plain": []}.get(kind, [Normalize()])]

    def made(kind: str) -> Path:
        folder = root / kind
        if not folder.is_dir():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = SentenceTransformer(modules=modules(kind), device="cpu", prompts={"query": "word9 "})
            model.save_pretrained(str(folder), create_model_card=False)
            if kind == "model2vec":
                weights = load_file(folder / "model.safetensors")["embedding.weight"]
                rows = {"embeddings": weights[:50].contiguous(), "mapping": torch.arange(len(weights)) % 50}
                save_file(rows, folder / "model.safetensors")
        return folder

    return made


KINDS = ("normalised", "plain", "dense", "model2vec", "words")


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_gradients_are_those_of_sentence_transformers(make: Make, kind: str) -> None:
    """Whole, and in chunks of unlike padding; with a prompt; an empty text among them."""
    plain = SentenceTransformer(str(make(kind)), device="cpu")
    loaded = load_encoder(str(make(kind)), device="cpu").model
    texts = [text for text in STATIC_TEXTS if text or kind != "words"]
    for prompt in ("", "word9 "):
        wanted = plain.encode(texts, prompt=prompt or None)
        np.testing.assert_array_equal(Encoder(loaded)(texts, prompt), wanted)
        plain.zero_grad(), loaded.zero_grad()
        plain(plain.preprocess(texts, prompt=prompt or None))["sentence_embedding"].pow(3).sum().backward()
        rows = token_ids(loaded, texts, prompt)
        found = []
        for side, chunk in (("right", [0, len(texts) - 1]), ("left", list(range(1, len(texts) - 1)))):
            features = padded_features(
                [rows[i] for i in chunk], pad_token=0, side=side if kind != "words" else "right",
                device=torch.device("cpu"), prompt_length=0,
            )  # fmt: skip
            vectors = embed(loaded, features)
            found += list(zip(chunk, vectors.detach().numpy(), strict=True))
            vectors.pow(3).sum().backward()
        np.testing.assert_allclose(
            np.stack([vector for _, vector in sorted(found, key=lambda f: f[0])]), wanted, atol=1e-6
        )
        for (name, ours), (_, theirs) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None, name
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert packing_kind(loaded, torch.device("cpu")) is None and vocabulary_size(loaded) > 100


def test_a_longest_input_is_kept_by_the_saved_model(make: Make, tmp_path: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(make("normalised")), max_length=4), "cpu").model
    assert longest_input(model) == 4
    cuts = count_cuts(model, STATIC_TEXTS, "")
    assert (cuts.texts, cuts.cut) == (4, 1) and cuts.lost == cuts.tokens - sum(
        map(len, token_ids(model, STATIC_TEXTS, ""))
    )
    shorten(model, 9), shorten(model, None)
    assert longest_input(model) == 4, "it reads no more than it did"
    save_encoder(model, tmp_path / "saved")
    for again in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        load_encoder(str(tmp_path / "saved")).model,
    ):
        assert longest_input(again) == 4
        np.testing.assert_array_equal(again.encode(STATIC_TEXTS), model.encode(STATIC_TEXTS))
    assert longest_input(load_encoder(str(make("normalised")), device="cpu").model) is None
    assert math.isinf(SentenceTransformer(str(make("normalised")), device="cpu").max_seq_length)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 1}, "needs a transformer"),
        ({"adapter": {"kind": "lora"}}, "need a transformer"),
        ({"adapter": {"kind": "prefix"}}, "plain transformer"),
        ({"attention": "causal"}, "no transformer"),
        ({"fresh": {}}, "for a transformer"),
        ({"layer_mix": {"from_layer": 1}}, "no pooling|needs a transformer"),
        ({"append_eos": True}, "no end-of-text token"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["normalised", "words"])
def test_what_needs_a_transformer_says_so(make: Make, kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        build_encoder(EncoderConfig(model=str(make(kind)), **settings), "cpu")


@pytest.fixture()
def recipe(make: Make, toy_data: Path, tmp_path: Path) -> Path:
    return write_toy_recipe(tmp_path, make("normalised"), toy_data)


SGD = ("training.optimizer.kind=sgd", "training.learning_rate=0.5", "training.max_steps=4")


def table_of(model: Path | None) -> torch.Tensor:
    assert model is not None
    return load_file(model / "model.safetensors")["embedding.weight"]


def test_a_training_is_the_same_in_chunks_and_its_model_is_scored(
    recipe: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stages(open_run(recipe, SGD, tmp_path / "runs" / "whole"), "train").model
    moved = float((table_of(whole) - table_of(make("normalised"))).abs().max())
    assert moved > 1e-2
    chunked = [*SGD, "training.micro_batch_tokens=24", "training.gradient_cache=always"]
    parts = run_stages(open_run(recipe, chunked, tmp_path / "runs" / "parts"), "train").model
    torch.testing.assert_close(table_of(parts), table_of(whole), atol=1e-6, rtol=1e-5)
    for name, kind in (("dense", "dense"), ("words", "words")):
        other = run_stages(
            open_run(recipe, [*SGD, f"encoder.model={make(kind)}"], tmp_path / "runs" / name), "train"
        ).model
        assert other is not None
        vectors = SentenceTransformer(str(other), device="cpu").encode(STATIC_TEXTS[:1])
        assert (
            np.abs(vectors - SentenceTransformer(str(make(kind)), device="cpu").encode(STATIC_TEXTS[:1])).max() > 1e-4
        )
        np.testing.assert_array_equal(load_encoder(str(other), device="cpu").model.encode(STATIC_TEXTS[:1]), vectors)
    seen = dry_run(open_run(recipe, (), tmp_path / "runs" / "looked-at"))
    assert seen is not None and not any(notice.blocks for notice in seen.notices)
    tasks = Tasks(tmp_path / "tasks")
    tasks.retrieval()
    monkeypatch.chdir(tmp_path)
    result = evaluate(str(whole), tasks.root, tmp_path / "results")
    assert result.failures == {}
    line = (result.results_dir / "manifest.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda word: pytest.fail(word))["max_length"] is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_two_ranks_train_what_one_does(recipe: Path, tmp_path: Path, backend: str) -> None:
    command = [
        *TORCHRUN,
        "-m",
        "nearfield",
        "train",
        str(recipe),
        *SGD,
        f"training.backend={backend}",
        "--until",
        "train",
    ]
    done = launch([*command, "--run-folder", str(tmp_path / "runs" / "two")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = run_stages(open_run(recipe, SGD, tmp_path / "runs" / "one"), "train").model
    torch.testing.assert_close(table_of(tmp_path / "runs" / "two" / "model"), table_of(alone), atol=1e-6, rtol=1e-5)
