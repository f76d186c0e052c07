"""An item's vector does not depend on its batch; where it does, that is said; where a processor pads so that it does not, so do we."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nearfield.encoders import load_encoder
from nearfield.encoders.build import save_encoder
from nearfield.encoders.packing import Padding, embed
from nearfield.encoders.text_encoder import TextEncoder
from nearfield.encoders.tokenize import token_ids
from nearfield.errors import BadInputError
from nearfield.evaluation.crew import Wording
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.evaluation.runner import open_model
from tests.encoders.zoo import ANIMALS, STYLES, TEXTS, save_animal, save_tokenizer

WIDTH = 16
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_siglip(folder: Path, *, kind: str = "Siglip") -> Path:
    """As its makers save it: texts of one width, no mask from the tokenizer, the last position is pooled."""
    import transformers
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = save_tokenizer(folder, STYLES["siglip"], WIDTH)
    words = {"vocab_size": size, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1}
    text = {**SMALL, **words, "max_position_embeddings": WIDTH, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SiglipModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.SiglipProcessor(images, transformers.AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def as_mteb_loads_it(folder: Path, texts: list[str]) -> Any:
    from transformers import AutoModel, AutoProcessor

    inputs = AutoProcessor.from_pretrained(folder)(
        text=texts, return_tensors="pt", padding="max_length", truncation=True
    )
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).get_text_features(**inputs).pooler_output.numpy()


def test_siglips_texts_are_padded_to_the_width_that_it_was_made_for(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path / "base")
    wanted = as_mteb_loads_it(folder, TEXTS)
    scale = np.abs(wanted).max()
    plain = SentenceTransformer(str(folder), device="cpu")
    alone = np.concatenate([plain.encode([text]) for text in TEXTS])
    assert np.abs(alone - plain.encode(TEXTS)).max() > 0.5 * scale

    loaded = load_encoder(str(folder), device="cpu")
    assert not loaded.notices
    model = loaded.model
    task = TaskEncoder(model, name="a/b", revision="1")
    scored = dict(task.embed(TEXTS, Wording(None, None, ""), "encoding"))
    trained = embed(model, Padding.of(model).features(token_ids(model, TEXTS, ""), torch.device("cpu"), 0))
    ways = {
        "the model's own": model.encode(TEXTS),
        "alone": np.concatenate([model.encode([text]) for text in TEXTS]),
        "our encoder": TextEncoder(model)(TEXTS),
        "evaluation": np.stack([scored[text] for text in TEXTS]),
        "training": trained.detach().numpy(),
    }
    save_encoder(model, tmp_path / "saved")
    ways["saved"] = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
    ways["saved and loaded"] = TextEncoder(load_encoder(str(tmp_path / "saved"), device="cpu").model)(TEXTS)
    for way, vectors in ways.items():
        np.testing.assert_allclose(vectors, wanted, rtol=0, atol=2e-6 * scale, err_msg=way)


def test_a_processor_that_says_how_to_pad_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of SigLIP 2 does, on its class; one that says nothing is left alone."""
    from transformers import SiglipProcessor

    from nearfield.encoders import company

    folder = save_siglip(tmp_path)
    monkeypatch.setattr(company, "FIXED_WIDTH", ())
    assert [n.code for n in load_encoder(str(folder), device="cpu").notices] == ["batch-dependent"]
    monkeypatch.setattr(SiglipProcessor, "text_kwargs", {"padding": "max_length", "max_length": 12}, raising=False)
    loaded = load_encoder(str(folder), device="cpu")
    assert not loaded.notices
    assert Padding.of(loaded.model).width == 12
    assert loaded.model.preprocess(["fox"])["input_ids"].shape == (1, 12)


def test_what_depends_on_its_company_is_said_with_the_scores(tmp_path: Path) -> None:
    folder = str(save_animal(tmp_path, ANIMALS["convbert"]))
    for loaded in (load_encoder(folder, device="cpu"), open_model(folder, name=None, device="cpu", batch_tokens=None)):
        assert [notice.code for notice in loaded.notices] == ["batch-dependent"]
        assert "convbert" in loaded.notices[0].what or str(tmp_path) in loaded.notices[0].what


def test_pictures_are_tried_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import SiglipVisionModel
    from transformers.models.siglip import modeling_siglip

    folder = save_siglip(tmp_path)
    assert SiglipVisionModel is modeling_siglip.SiglipVisionModel
    forward = modeling_siglip.SiglipVisionEmbeddings.forward

    def leaking(self: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, pixel_values + pixel_values.mean(dim=0, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(modeling_siglip.SiglipVisionEmbeddings, "forward", leaking)
    notices = load_encoder(str(folder), device="cpu").notices
    assert [notice.code for notice in notices] == ["batch-dependent"]
    assert "pictures" in notices[0].what


def test_what_sentence_transformers_cannot_embed_is_one_message(tmp_path: Path) -> None:
    """XMOD without its language; a transformer without a pooling."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    folder = save_animal(tmp_path / "xmod", ANIMALS["xmod"], default_language=None)
    with pytest.raises(BadInputError, match="cannot embed texts with this model: Input language unknown"):
        load_encoder(str(folder), device="cpu")
    plain = save_animal(tmp_path / "bert", ANIMALS["bert"])
    SentenceTransformer(modules=[Transformer(str(plain))], device="cpu").save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(BadInputError, match="it has no pooling"):
        load_encoder(str(tmp_path / "bare"), device="cpu")


def test_models_with_a_way_for_each_side_load(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer

    folder = str(save_animal(tmp_path / "bert", ANIMALS["bert"]))
    transformer = Transformer(folder)
    static = StaticEmbedding(transformer.tokenizer, embedding_dim=16)
    router = Router.for_query_document([static], [transformer, Pooling(16, "mean")])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "router"))
    assert not load_encoder(str(tmp_path / "router"), device="cpu").notices
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path / "static"))
    assert not load_encoder(str(tmp_path / "static"), device="cpu").notices
