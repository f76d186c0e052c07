"""Prompts that pooling leaves out end between two tokens, whatever the tokenizer joins, in plain sentence-transformers too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfield.data.tokens import TokenCache
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder, save_encoder
from nearfield.encoders.source import folder_pools_prompt
from nearfield.encoders.tokenize import BORDER, fits, prompt_tokens, tokens_before
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.data import unpooled_notices
from nearfield.pipeline.stages import Stages

WORDS = [
    "Instruct: given a word, find its definition Query: dog cat house query: passage: the quick brown fox (x) : ... 7",
    "querydog querycat :( Querying Query:dog don't",
]
PROMPTS = ("Instruct: find\nQuery: ", "query: ", "query:", "query", "Query:\n", 'Find "', "query:  ")
TEXTS = ("dog", "(x)", ": the fox", "the quick brown fox", "7", "é", "")
SMALL: dict[str, int] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def trained(model: Any, trainer: Any, splitting: Any) -> dict[str, Any]:
    """The vocabulary and merges of a tokenizer that was trained on a few words."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitting
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return found


def byte_words() -> dict[str, Any]:
    from tokenizers import models, pre_tokenizers, trainers

    splitting = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    found = trained(models.BPE(), trainer, splitting)
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def spaced_words() -> dict[str, Any]:
    from tokenizers import models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=550, special_tokens=special)
    found = trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Metaspace())
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def pieces() -> dict[str, Any]:
    from tokenizers import models, pre_tokenizers, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=special)
    found = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    return {"vocab": [tuple(piece) for piece in found["vocab"]]}


def word_pieces() -> dict[str, Any]:
    from tokenizers import models, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    return {"vocab": trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())["vocab"]}


def save_model(folder: Path, family: str) -> Path:
    """A tiny random model with a tokenizer of the class of its family."""
    import transformers as t

    makers: dict[str, tuple[Any, Callable[[], dict[str, Any]], dict[str, str], Any]] = {
        "bert": (t.BertTokenizer, word_pieces, {}, t.BertConfig(vocab_size=300, **SMALL)),
        "gpt2": (
            t.GPT2Tokenizer,
            byte_words,
            {"pad_token": "<|endoftext|>"},
            t.GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, bos_token_id=5, eos_token_id=5),
        ),
        "qwen2": (t.Qwen2Tokenizer, byte_words, {}, t.Qwen2Config(vocab_size=500, num_key_value_heads=2, **SMALL)),
        "llama": (
            t.LlamaTokenizer,
            spaced_words,
            {"pad_token": "</s>"},
            t.LlamaConfig(vocab_size=600, num_key_value_heads=2, **SMALL),
        ),
        "roberta": (t.RobertaTokenizer, byte_words, {}, t.RobertaConfig(vocab_size=500, **SMALL)),
        "xlm-roberta": (t.XLMRobertaTokenizer, pieces, {}, t.XLMRobertaConfig(vocab_size=300, pad_token_id=1, **SMALL)),
    }
    kind, words, special, config = makers[family]
    torch.manual_seed(0)
    t.AutoModel.from_config(config).save_pretrained(folder)
    kind(**words(), **special, model_max_length=64).save_pretrained(folder)
    return folder


FAMILIES = ("bert", "gpt2", "qwen2", "llama", "roberta", "xlm-roberta")
JOIN = ("gpt2", "qwen2", "llama", "roberta")
"""Their tokenizers join a space to the word behind it."""


def reference(model: Any, prompt: str, text: str, *, space: bool = True) -> np.ndarray[Any, Any]:
    """The mean of the last states of the tokens that end behind the prompt's last word, by the offsets of the joined text;
    without ``space`` of those that end in a word of the text."""
    tokenizer = model.tokenizer
    found = tokenizer(prompt + text, return_offsets_mapping=True, return_tensors="pt")
    offsets = found.pop("offset_mapping")[0].tolist()
    core = len(prompt.rstrip())
    first = next(i for i, (_, end) in enumerate(offsets) if end > core and (space or (prompt + text)[core:end].strip()))
    with torch.no_grad():
        states = model[0].auto_model(**found).last_hidden_state[0]
    pooled: np.ndarray[Any, Any] = states[first:].mean(0).numpy()
    return pooled


@pytest.mark.parametrize("family", FAMILIES)
def test_no_word_is_left_out_of_pooling(family: str, tmp_path: Path) -> None:
    """Ours, plain sentence-transformers from the saved folder, and a mean by offsets give the same vectors."""
    from sentence_transformers import SentenceTransformer

    base = save_model(tmp_path / "base", family)
    kept = load_encoder(str(base), device="cpu").model
    built = build_encoder(EncoderConfig(model=str(base), pooling="mean", pool_prompt=False), "cpu", prompts=PROMPTS)
    assert not built.notices
    save_encoder(built.model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = [text for text in TEXTS if text]
    for prompt in PROMPTS:
        ours = Encoder(built.model)(texts, prompt)
        theirs = plain.encode(texts, prompt=prompt)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-5)
        # White space between them, where it is a token, goes with the prompt or with the text.
        ways = [np.stack([reference(built.model, prompt, text, space=way) for text in texts]) for way in (True, False)]
        assert min(np.abs(ours - wanted).max() for wanted in ways) < 2e-5, prompt
        assert np.abs(theirs).max(1).min() > 0
    # Texts without a prompt have the tokens that they had.
    for text in texts:
        assert plain.tokenizer(text)["input_ids"] == kept.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("family", JOIN)
def test_the_space_of_a_prompt_was_counted(family: str, tmp_path: Path) -> None:
    """sentence-transformers counts it by itself; a loaded model says so, and keeps its numbers."""
    from sentence_transformers import SentenceTransformer

    model = build_encoder(EncoderConfig(model=str(save_model(tmp_path / "base", family)), pooling="mean"), "cpu").model
    model.prompts = {"query": "query: ", "document": ""}
    model[1].include_prompt = False
    assert not fits(model, "query: ")
    model.save_pretrained(str(tmp_path / "published"), create_model_card=False)
    assert not folder_pools_prompt(str(tmp_path / "published"))
    loaded = load_encoder(str(tmp_path / "published"), device="cpu")
    assert [(one.code, "'query: '" in one.what) for one in loaded.notices] == [(BORDER, True)]
    plain = SentenceTransformer(str(tmp_path / "published"), device="cpu")
    np.testing.assert_allclose(
        Encoder(loaded.model)(["the fox", "dog"], "query: "),
        plain.encode(["the fox", "dog"], prompt_name="query"),
        rtol=0,
        atol=1e-5,
    )
    # A training from it mends the model's own prompts.
    mended = build_encoder(EncoderConfig(model=str(tmp_path / "published")), "cpu")
    assert fits(mended.model, "query: ")
    assert not mended.notices


def test_a_prompt_that_is_pooled_changes_no_tokenizer(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    model = build_encoder(EncoderConfig(model=str(base), pooling="mean"), "cpu", prompts=PROMPTS).model
    kept = load_encoder(str(base), device="cpu").model
    assert model.tokenizer.backend_tokenizer.to_str() == kept.tokenizer.backend_tokenizer.to_str()
    # Losses on tokens spare the prompt and nothing of the text.
    assert [prompt_tokens(model, "query: "), tokens_before(model, "query: ", "dog")] == [2, 2]


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny decoder with an instruction that ends in a space."""
    folder = tmp_path_factory.mktemp("instructed")
    save_model(folder / "base", "gpt2")
    rows = [
        ("dog", "the quick"),
        ("cat", "brown fox"),
        ("fox", "house"),
        ("the quick brown", "quick cat"),
        ("7", "cat 7"),
    ]
    lines = [json.dumps({"query": query, "positive": positive}) for query, positive in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(
        "name: d\nsources:\n  - name: pairs\n    task_type: Retrieval\n"
        "    reader: {kind: jsonl, path: pairs.jsonl}\n"
        "    examples: {kind: retrieval, query: query, positives: positive}\n    split: {kind: all}\n"
    )
    (folder / "recipe.yaml").write_text(
        "name: r\ndata: data.yaml\n"
        f"encoder: {{model: {folder / 'base'}, pooling: mean, pool_prompt: false}}\n"
        'prompts: {fallback: {query: "Instruct: find\\nQuery: ", document: ""}}\n'
        "batches: {kind: single_source, batch_size: 5, negatives: 0}\n"
        "training: {max_steps: 2, trackers: []}\n"
    )
    run_stages(open_run(folder / "recipe.yaml", (), folder / "run"), "train")
    return folder


def test_a_trained_instruction_pools_as_plain_sentence_transformers_does(instructed: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(instructed / "run" / "model"), device="cpu")
    cache = TokenCache(Stages.of(open_run(instructed / "recipe.yaml", (), instructed / "run")).tokens.output)
    prompt = "Instruct: find\nQuery: "
    table = cache.tables[cache.number(prompt)]
    model.preprocess(["dog"], prompt=prompt)
    assert table.prompt_length == model[0]._get_prompt_length(prompt) == tokens_before(model, prompt, "dog")
    wanted = np.stack([reference(model, prompt, text) for text in ("dog", "the")])
    np.testing.assert_allclose(model.encode(["dog", "the"], prompt_name="query"), wanted, rtol=0, atol=1e-5)


def test_a_text_without_a_pooled_token_is_said(instructed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that ends with its prompt, for want of room or of words, the vector is zero."""
    stages = Stages.of(open_run(instructed / "recipe.yaml", (), instructed / "run"))
    assert list(unpooled_notices(stages.tokens)) == []
    cache = TokenCache(stages.tokens.output)
    table = cache.tables[cache.number("Instruct: find\nQuery: ")]
    lengths = table.lists.lengths
    shortest = int((lengths == lengths.min()).sum())
    assert shortest < len(lengths)
    monkeypatch.setattr(TokenCache, "_open", _with_longer_prompts(int(lengths.min())))
    [notice] = unpooled_notices(stages.tokens)
    assert notice.what.startswith(f"{shortest} of {len(lengths)} texts have no token behind the prompt 'Instruct: find")
    assert notice.code == "no-token-pooled"


def _with_longer_prompts(length: int) -> Any:
    """Token tables whose prompts take so many tokens."""
    plain = TokenCache._open

    def opened(cache: TokenCache, number: int, entry: dict[str, Any]) -> Any:
        return plain(cache, number, {**entry, "prompt_length": length if entry["prompt"] else 0})

    return opened
