"""Models that look words up in a table: the vectors and gradients of sentence-transformers, in trainings with all that plugs in."""

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
from nearfield.encoders.build import build_encoder, save_encoder
from nearfield.encoders.lengths import count_cuts, shorten
from nearfield.encoders.limits import longest_input
from nearfield.encoders.packing import embed, packing_kind, padded_features
from nearfield.encoders.static import vocabulary_size
from nearfield.encoders.text_encoder import TextEncoder
from nearfield.encoders.tokenize import token_ids
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.dry_run import dry_run
from tests.conftest import write_toy_recipe
from tests.evaluation.conftest import Tasks
from tests.training.launching import TORCHRUN, launch

TEXTS = ["word1 word2 word3", "", "word4", "word5 word6 word7 word8 word9 word10"]
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
    texts = [text for text in TEXTS if text or kind != "words"]
    for prompt in ("", "word9 "):
        wanted = plain.encode(texts, prompt=prompt or None)
        np.testing.assert_array_equal(TextEncoder(loaded)(texts, prompt), wanted)
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
    cuts = count_cuts(model, TEXTS, "")
    assert (cuts.texts, cuts.cut) == (4, 1) and cuts.lost == cuts.tokens - sum(map(len, token_ids(model, TEXTS, "")))
    shorten(model, 9), shorten(model, None)
    assert longest_input(model) == 4, "it reads no more than it did"
    save_encoder(model, tmp_path / "saved")
    for again in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        load_encoder(str(tmp_path / "saved")).model,
    ):
        assert longest_input(again) == 4
        np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
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
        vectors = SentenceTransformer(str(other), device="cpu").encode(TEXTS[:1])
        assert np.abs(vectors - SentenceTransformer(str(make(kind)), device="cpu").encode(TEXTS[:1])).max() > 1e-4
        np.testing.assert_array_equal(load_encoder(str(other), device="cpu").model.encode(TEXTS[:1]), vectors)
    seen = dry_run(open_run(recipe, (), tmp_path / "runs" / "looked-at"))
    assert seen is not None and not any(notice.blocks for notice in seen.notices)
    tasks = Tasks(tmp_path / "tasks")
    tasks.retrieval()
    monkeypatch.chdir(tmp_path)
    result = evaluate(str(whole), tasks.root, tmp_path / "results", device="cpu")
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
