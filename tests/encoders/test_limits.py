"""Lengths beyond a model's positions and words without a row: as sentence-transformers where it runs, one message where not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.build import build_encoder, save_encoder
from nearfield.encoders.limits import longest_input, usable_positions
from nearfield.encoders.text_encoder import TextEncoder
from nearfield.errors import BadInputError
from nearfield.evaluation.crew import Wording
from nearfield.evaluation.encoder import TaskEncoder
from tests.encoders.zoo import ANIMALS, TEXTS, Animal, save_animal

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
    vectors = TextEncoder(model)([*TEXTS, LONG])
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
    assert np.isfinite(TextEncoder(loaded.model)([LONG])).all()


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
    found = dict(encoder.embed(texts, Wording(None, None, ""), "encoding"))
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


@pytest.mark.parametrize("name", ["qwen3", "bert", "longt5"])
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
    np.testing.assert_allclose(TextEncoder(loaded.model)(TEXTS), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    encoder = TaskEncoder(loaded.model, name="a/b", revision="1")
    for use in (
        lambda: TextEncoder(loaded.model)([*TEXTS, "a <|extra|> word"]),
        lambda: list(encoder.embed(["fox", "a <|extra|> word"], Wording(None, None, ""), "encoding")),
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
    vectors = TextEncoder(loaded.model)(TEXTS)
    save_encoder(loaded.model, tmp_path / "again")
    plain = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(plain, vectors, rtol=0, atol=2e-5 * np.abs(vectors).max())


def test_a_padding_number_outside_the_table_does_not_stop_packing(tmp_path: Path) -> None:
    """As LLaMA's config said for long: -1."""
    folder = save_animal(tmp_path, ANIMALS["llama"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    assert TextEncoder(load_encoder(str(folder), device="cpu").model).packing == "varlen"


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bloom", "bert"])
def test_texts_without_a_token(tmp_path: Path, name: str) -> None:
    """Where a tokenizer puts nothing around a text; sentence-transformers gives zeros beside others and fails alone."""
    model = load_encoder(str(save_animal(tmp_path, ANIMALS[name])), device="cpu").model
    encoder = TextEncoder(model)
    np.testing.assert_allclose(encoder(["", "fox"]), model.encode(["", "fox"]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder([""]), encoder(["", "fox"])[:1], rtol=0, atol=1e-5)
