"""Two towers: built from parts, saved and loaded by sentence-transformers alone, trained whole, refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from transformers import AutoModel, CLIPModel, SiglipVisionConfig

from nearfield.conformance.cases import TINY_VISION
from nearfield.conformance.tiny_models import save_tiny_bert, save_tiny_clip
from nearfield.data.tokens import IMAGE
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.config import ImageTowerConfig
from nearfield.encoders.images import image_features, image_tokens, takes_images
from nearfield.encoders.load import build_encoder, build_tokenizer, save_encoder
from nearfield.errors import BadInputError

TEXTS = ["word1 word2", "word3", "word5 word6 word7"]


def pictures(count: int = 3, side: int = 20) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (side, side + n, 3), dtype=np.uint8)) for n in range(count)]


def tower(**changes: Any) -> ImageTowerConfig:
    return ImageTowerConfig.model_validate({"architecture": "vit", "settings": TINY_VISION, "size": 16, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("text") / "model", hidden=16)


@pytest.fixture(scope="module")
def model(text: Path) -> SentenceTransformer:
    return build_encoder(EncoderConfig(model=str(text), image_tower=tower(), normalize=True), "cpu").model


def test_the_towers_are_routes_and_load_in_plain_sentence_transformers(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    assert [type(module) for module in model] == [Router, Normalize]
    assert model.modalities == ["image", "text"]
    texts, images = model.encode(TEXTS), model.encode(pictures())
    assert texts.shape == images.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    save_encoder(model, tmp_path / "model")
    for loaded in (
        SentenceTransformer(str(tmp_path / "model"), device="cpu"),
        load_encoder(str(tmp_path / "model"), device="cpu").model,
    ):
        np.testing.assert_array_equal(loaded.encode(TEXTS), texts)
        np.testing.assert_array_equal(loaded.encode(pictures()), images)


def test_texts_are_embedded_as_without_the_tower(model: SentenceTransformer, text: Path) -> None:
    alone = build_encoder(EncoderConfig(model=str(text), normalize=True), "cpu").model
    np.testing.assert_array_equal(alone.encode(TEXTS), model.encode(TEXTS))


def test_new_weights_come_from_the_seed(text: Path) -> None:
    config = EncoderConfig(model=str(text), image_tower=tower(), normalize=True)
    same, other = (build_encoder(config, "cpu", seed=seed).model.encode(pictures()) for seed in (0, 1))
    np.testing.assert_array_equal(same, build_encoder(config, "cpu").model.encode(pictures()))
    assert np.abs(same - other).max() > 0.01


def test_a_projection_gives_both_towers_its_width(text: Path) -> None:
    config = EncoderConfig.model_validate(
        {"model": str(text), "image_tower": tower(), "projection": {"dimensions": 6, "bias": False}}
    )
    model = build_encoder(config, "cpu").model
    assert model.encode(TEXTS).shape == model.encode(pictures()).shape == (3, 6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "own"])
@pytest.mark.parametrize("architecture", ["vit", "siglip_vision_model", "convnext"])
def test_all_that_has_a_gradient_is_trained_and_nothing_else(text: Path, architecture: str, pooling: str) -> None:
    settings = TINY_VISION
    if architecture == "siglip_vision_model":
        settings = {key: value for key, value in TINY_VISION.items() if key != "hidden_dropout_prob"}
    elif architecture == "convnext":
        settings = {"hidden_sizes": (4, 8), "depths": (1, 1), "num_stages": 2}
    config = tower(architecture=architecture, settings=settings, pooling=pooling)
    model = build_encoder(EncoderConfig(model=str(text), image_tower=config), "cpu").model
    model.train()
    embeddings = model(image_features(model, pictures(), torch.device("cpu")))["sentence_embedding"]
    model(model.preprocess(TEXTS))["sentence_embedding"].sum().backward()
    embeddings.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_trained_vision_model_is_a_tower(text: Path, tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {key: value for key, value in TINY_VISION.items() if key != "hidden_dropout_prob"}
    vision = AutoModel.from_config(SiglipVisionConfig(**sizes, image_size=16))
    vision.save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    config = EncoderConfig(model=str(text), image_tower=ImageTowerConfig(model=str(tmp_path / "vision"), pooling="own"))
    model = build_encoder(config, "cpu").model
    pixels = image_features(model, pictures(), torch.device("cpu"))["pixel_values"]
    with torch.no_grad():
        pooled = vision.eval()(pixel_values=pixels).pooler_output
        expected = pooled @ model[0].sub_modules["image"][-1].linear.weight.T
    np.testing.assert_allclose(model.encode(pictures()), expected.numpy(), atol=1e-5)


def test_a_clip_folder_is_both(tmp_path: Path) -> None:
    model = build_encoder(EncoderConfig(model=str(save_tiny_clip(tmp_path / "clip"))), "cpu").model
    assert takes_images(model) and image_tokens(model) == 16
    plain = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    features = image_features(model, pictures(), torch.device("cpu"))
    with torch.no_grad():
        expected = plain.get_image_features(pixel_values=features["pixel_values"]).pooler_output
    np.testing.assert_allclose(model.encode(pictures()), expected.numpy(), atol=1e-5)
    with pytest.raises(BadInputError, match="takes images already"):
        build_encoder(EncoderConfig(model=str(tmp_path / "clip"), image_tower=tower()), "cpu")


def test_what_cannot_be_a_tower_is_refused(text: Path) -> None:
    def build(**changes: Any) -> None:
        build_encoder(EncoderConfig(model=str(text), image_tower=tower(**changes)), "cpu")

    with pytest.raises(BadInputError, match="batch normalisation"):
        build(architecture="resnet", settings={"hidden_sizes": (4, 8), "depths": (1, 1), "embedding_size": 4})
    with pytest.raises(BadInputError, match="no architecture 'vitt'") as caught:
        build(architecture="vitt")
    assert "vit" in str(caught.value.hint)
    with pytest.raises(BadInputError, match="of images alone"):
        build(architecture="bert", settings={})
    with pytest.raises(BadInputError, match="no setting 'hidden'"):
        build(settings={"hidden": 3})
    with pytest.raises(BadInputError, match="can be made of these settings"):
        build(settings={"hidden_sizes": (4, 8), "depths": (1,)}, architecture="convnext")


def test_configs_that_contradict_themselves_are_refused(text: Path) -> None:
    with pytest.raises(ValidationError, match="give either 'model'"):
        ImageTowerConfig()
    with pytest.raises(ValidationError, match="go with 'architecture'"):
        ImageTowerConfig(model="some/model", size=32)
    with pytest.raises(ValidationError, match="do not go together"):
        EncoderConfig.model_validate({"model": str(text), "image_tower": tower(), "adapter": {"kind": "lora"}})


def test_fresh_weights_keep_the_tokenizer(text: Path) -> None:
    def build(settings: dict[str, Any], seed: int = 0) -> SentenceTransformer:
        return build_encoder(EncoderConfig(model=str(text), fresh=settings, normalize=True), "cpu", seed=seed).model

    model = build({"hidden_size": 8, "num_hidden_layers": 1})
    assert model.encode(TEXTS).shape == (3, 8)
    assert len(model[0].auto_model.encoder.layer) == 1
    assert model.tokenizer("word1")["input_ids"] == [2, 6, 3]
    assert np.array_equal(model.encode(TEXTS), build({"hidden_size": 8, "num_hidden_layers": 1}).encode(TEXTS))
    assert not np.array_equal(build({}, 1).encode(TEXTS), build({}).encode(TEXTS))
    with pytest.raises(BadInputError, match="no setting 'layers'"):
        build({"layers": 3})
    with pytest.raises(BadInputError, match="can be made of these settings"):
        build({"hidden_size": 9})


class SmallStore:
    """As much of a store as is tokenised."""

    path = "store"

    def __init__(self, items: list[tuple[str, bool]]) -> None:
        self.items = items

    def texts(self, rows: Any) -> list[str]:
        return [self.items[row][0] for row in rows]

    def image_sizes(self, rows: Any) -> Any:
        return np.array([[9, 9] if self.items[row][1] else [0, 0] for row in rows])


def test_items_become_tokens_or_patches(text: Path) -> None:
    tokenizer = build_tokenizer(EncoderConfig(model=str(text), image_tower=tower()))
    store: Any = SmallStore([("word1", False), ("", True), ("word2 word3", False), ("word1", True)])
    found = tokenizer.of_items(store, np.array([1, 0, 2]), "")
    assert [row.tolist() for row in found] == [[IMAGE] * 16, [2, 6, 3], [2, 7, 8, 3]]
    with pytest.raises(BadInputError, match="beside its image"):
        tokenizer.of_items(store, np.array([0, 3]), "")
    with pytest.raises(BadInputError, match="this encoder takes none"):
        build_tokenizer(EncoderConfig(model=str(text))).of_items(store, np.array([1]), "")
