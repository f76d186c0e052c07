"""No weight of a model is drawn at random because its file lacks it.

An item's vector does not depend on its batch; where it does, that is said; where a processor pads so that it does not, so do we.

Decoders made bidirectional: each architecture tried out, and refused where the setting is not heeded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.models.llama import modeling_llama

from nearfield.arrays import Tokens
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder, save_encoder
from nearfield.encoders.packing import Features, Padding, embed, packed_features, padded_features
from nearfield.encoders.tokenize import token_ids
from nearfield.encoders.trials import packing_kind
from nearfield.errors import BadInputError
from nearfield.evaluation import open_model
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.mining.config import BM25Teacher, CrossEncoderTeacher
from nearfield.mining.teachers import CrossEncoderScorer
from tests.encoders.tiny import DECODERS, draw_rows, save_tiny
from tests.encoders.zoo import ANIMALS, STYLES, TEXTS, save_animal, save_tokenizer


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "encoder.", "transformer.", "0.auto_model.", "base_model.model.", "x.y."],
)
def test_weights_under_another_prefix_are_refused(folder: Path, prefix: str) -> None:
    rewrite(folder, {prefix + name: t for name, t in load_file(folder / "model.safetensors").items()})
    with pytest.raises(BadInputError, match="random numbers would stand in their place") as error:
        load_encoder(str(folder), device="cpu")
    assert repr(prefix) in str(error.value.hint)


def test_one_missing_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.layer.1.attention.self.key.bias", "embeddings.LayerNorm.weight"):
        rewrite(folder, {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(BadInputError, match=f"1 tensors .* '{name}'"):
            load_encoder(str(folder), device="cpu")


def test_weights_under_another_prefix_in_a_pickle_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load_encoder(str(folder), device="cpu")
    torch.save({"module." + name: t for name, t in tensors.items()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="random numbers"):
        load_encoder(str(folder), device="cpu")


def test_layouts_that_transformers_loads_are_loaded(folder: Path) -> None:
    """The prefix of a model with a head, an old name of norms, a head too many, no pooler; in several files."""
    tensors = load_file(folder / "model.safetensors")
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
        if "pooler" not in name
    }
    layouts: list[dict[str, Tensor]] = [old, {**old, "cls.predictions.bias": torch.zeros(205)}]
    for layout in layouts:
        rewrite(folder, layout)
        state = load_encoder(str(folder), device="cpu").model[0].auto_model.state_dict()
        for name, tensor in tensors.items():
            assert "pooler" in name or torch.equal(state[name], tensor)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
    index = {name: file for file, mine in parts.items() for name in mine}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    state = load_encoder(str(folder), device="cpu").model[0].auto_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInputError):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_tied_weights_are_read_under_either_name(tmp_path: Path, kept: str) -> None:
    from transformers import T5Config, T5Model

    save_tiny_bert(tmp_path)
    config = T5Config(vocab_size=205, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("shared.weight")
    rewrite(tmp_path, {name: t for name, t in tensors.items() if "embed_tokens" not in name} | {kept: table})
    model = load_encoder(str(tmp_path), device="cpu").model[0].auto_model
    assert torch.equal(model.get_input_embeddings().weight, table)
    rewrite(tmp_path, {name: t for name, t in tensors.items() if "embed_tokens" not in name})
    with pytest.raises(BadInputError, match="random numbers"):
        load_encoder(str(tmp_path), device="cpu")


def test_a_pooler_that_embeddings_pass_through_is_wanted(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import BertConfig, BertModel

    save_tiny_bert(tmp_path / "plain")
    BertModel(BertConfig.from_pretrained(tmp_path / "plain")).save_pretrained(tmp_path / "plain")
    own = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    module = Transformer(
        str(tmp_path / "plain"), modality_config=own, module_output_name="sentence_embedding", max_seq_length=32
    )
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(tmp_path / "saved"))
    load_encoder(str(tmp_path / "saved"), device="cpu")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    rewrite(tmp_path / "saved", {name: t for name, t in tensors.items() if "pooler" not in name})
    with pytest.raises(BadInputError, match=r"2 tensors .* 'pooler\.dense\.bias'"):
        load_encoder(str(tmp_path / "saved"), device="cpu")


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    """One text does not reach all experts, and each is wanted."""
    from transformers import MixtralConfig, MixtralModel

    save_tiny_bert(tmp_path)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 205}
    experts = {"intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    MixtralModel(MixtralConfig(**sizes, **experts)).save_pretrained(tmp_path)
    load_encoder(str(tmp_path), device="cpu")
    tensors = load_file(tmp_path / "model.safetensors")
    gone = {name for name in tensors if "layers.1." in name and "experts.3." in name}
    assert len(gone) == 3
    rewrite(tmp_path, {name: t for name, t in tensors.items() if name not in gone})
    with pytest.raises(BadInputError):
        load_encoder(str(tmp_path), device="cpu")


def test_fresh_weights_need_no_old_ones(folder: Path) -> None:
    rewrite(folder, {"module." + name: t for name, t in load_file(folder / "model.safetensors").items()})
    config = EncoderConfig(model=str(folder), fresh={"num_hidden_layers": 1}, pooling="mean")
    assert len(build_encoder(config, "cpu").model[0].auto_model.encoder.layer) == 1


def test_a_teacher_of_pairs_has_a_head_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """sentence-transformers gives any folder a head for pairs, of random weights."""
    from sentence_transformers import CrossEncoder

    def scorer(folder: Path) -> CrossEncoderScorer:
        config = CrossEncoderTeacher(model=str(folder), retrieve=BM25Teacher(language=None))
        return CrossEncoderScorer(config, None, lambda role, rows: [], "cpu")  # type: ignore[arg-type]

    with pytest.raises(BadInputError, match="random numbers"):
        scorer(tiny_model)
    CrossEncoder(str(tiny_model), device="cpu").save_pretrained(str(tmp_path / "cross"))
    scorer(tmp_path / "cross")


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
    scored = dict(task.encoder.pairs(TEXTS))
    trained = embed(model, Padding.of(model).features(token_ids(model, TEXTS, ""), torch.device("cpu"), 0))
    ways = {
        "the model's own": model.encode(TEXTS),
        "alone": np.concatenate([model.encode([text]) for text in TEXTS]),
        "our encoder": Encoder(model)(TEXTS),
        "evaluation": np.stack([scored[text] for text in TEXTS]),
        "training": trained.detach().numpy(),
    }
    save_encoder(model, tmp_path / "saved")
    ways["saved"] = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
    ways["saved and loaded"] = Encoder(load_encoder(str(tmp_path / "saved"), device="cpu").model)(TEXTS)
    for way, vectors in ways.items():
        np.testing.assert_allclose(vectors, wanted, rtol=0, atol=2e-6 * scale, err_msg=way)


def test_a_processor_that_says_how_to_pad_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of SigLIP 2 does, on its class; one that says nothing is left alone."""
    from transformers import SiglipProcessor

    folder = save_siglip(tmp_path)
    monkeypatch.setattr("nearfield.encoders.trials.FIXED_WIDTH", ())
    assert [n.code for n in load_encoder(str(folder), device="cpu").notices] == ["batch-dependent"]
    monkeypatch.setattr(SiglipProcessor, "text_kwargs", {"padding": "max_length", "max_length": 12}, raising=False)
    loaded = load_encoder(str(folder), device="cpu")
    assert not loaded.notices
    assert Padding.of(loaded.model).width == 12
    assert loaded.model.preprocess(["fox"])["input_ids"].shape == (1, 12)


def test_what_depends_on_its_company_is_said_with_the_scores(tmp_path: Path) -> None:
    folder = str(save_animal(tmp_path, ANIMALS["convbert"]))
    for loaded in (load_encoder(folder, device="cpu"), open_model(folder)):
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


def test_images_that_are_padded_to_the_largest_are_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one size they would be alike alone and in company."""
    folder = save_siglip(tmp_path)
    assert not load_encoder(str(folder), device="cpu").notices
    preprocess = SentenceTransformer.preprocess

    def padding(self: Any, items: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(items[0], str):
            width, height = (max(item.size[i] for item in items) for i in (0, 1))
            items = [item.crop((0, 0, width, height)) for item in items]
        return preprocess(self, items, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "preprocess", padding)
    (notice,) = load_encoder(str(folder), device="cpu").notices
    assert notice.code == "batch-dependent" and "gives images of unlike sizes other vectors" in notice.what


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


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_way_that_lacks_a_weight_is_refused(tmp_path: Path, side: str) -> None:
    """Whichever of the two it is: a text without a task goes one way alone."""
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    ways = [Transformer(str(save_animal(tmp_path / name, ANIMALS[name]))) for name in ("bert", "mpnet")]
    router = Router.for_query_document(*([way, Pooling(16, "mean")] for way in ways))
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "router"))
    load_encoder(str(tmp_path / "router"), device="cpu")
    (file,) = tmp_path.glob(f"router/{side}_0_*/model.safetensors")
    tensors = load_file(file)
    for name, left_out in (("pooler.dense.weight", False), ("embeddings.word_embeddings.weight", True)):
        rewrite(file.parent, {key: tensor for key, tensor in tensors.items() if key != name})
        if left_out:
            with pytest.raises(BadInputError, match=f"1 tensors .* {name!r}"):
                load_encoder(str(tmp_path / "router"), device="cpu")
        else:
            load_encoder(str(tmp_path / "router"), device="cpu")


TOKENS = draw_rows([5, 1, 20])
CPU = torch.device("cpu")


def built(folder: Path, attention: Any = "bidirectional", **settings: Any) -> Any:
    return build_encoder(EncoderConfig(model=str(folder), attention=attention, **settings), "cpu").model


def features(model: Any, rows: list[Tokens]) -> Features:
    return padded_features(rows, pad_token=0, side=model.tokenizer.padding_side, device=CPU, prompt_length=0)


def vectors(model: Any, rows: list[Tokens]) -> torch.Tensor:
    with torch.no_grad():
        return embed(model.eval(), features(model, rows))


def states(model: Any, row: Tokens) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model[0](features(model, [row]))["token_embeddings"][0]
    return found


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_is_made_bidirectional(tmp_path: Path, architecture: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = save_tiny(tmp_path / "base", architecture)
    model, causal = built(folder), built(folder, "causal")
    row, other = TOKENS[0], np.array([*TOKENS[0][:-1], TOKENS[1][0]], dtype=np.int32)
    assert float((states(model, row)[0] - states(model, other)[0]).abs().max()) > 1e-4
    assert torch.equal(states(causal, row)[:-1], states(causal, other)[:-1])

    found = vectors(model, TOKENS)
    scale = float(found.abs().max())
    assert float((found - vectors(causal, TOKENS)).abs().max()) > 1e-3
    for text, vector in zip(TOKENS, found, strict=True):
        torch.testing.assert_close(vectors(model, [text])[0], vector, atol=1e-5 * scale, rtol=0)

    save_encoder(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["is_causal"] is False
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(vectors(plain, TOKENS), found)
    assert torch.equal(vectors(load_encoder(str(tmp_path / "saved"), device="cpu").model, TOKENS), found)
    plain[0].auto_model.set_attn_implementation("eager")
    torch.testing.assert_close(vectors(plain, TOKENS), found, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("architecture", DECODERS)
def test_packed_is_padded_where_it_is_packed(tmp_path: Path, architecture: str) -> None:
    model = built(save_tiny(tmp_path, architecture), normalize=True).eval()
    rows = draw_rows([9, 3, 17, 1, 9, 30])
    padded = padded_features(rows, pad_token=0, side="right", device=CPU, prompt_length=0)
    with torch.no_grad():
        wanted = embed(model, padded)
        kind = packing_kind(model, CPU)
        assert (kind is None) == (architecture in ("bloom", "gemma2")), kind
        if kind is not None:
            found = embed(model, packed_features(rows, kind=kind, device=CPU, prompt_length=0))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_on_either_side_is_nothing(tmp_path: Path, side: str, attention: str) -> None:
    model = built(save_tiny(tmp_path, "llama"), attention, pooling="last")
    model.tokenizer.padding_side = side
    for text, vector in zip(TOKENS, vectors(model, TOKENS), strict=True):
        torch.testing.assert_close(states(model, text)[-1], vector, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "complaint"),
    [
        ("stablelm", "alone does not see the last one"),
        ("nemotron", "alone does not see the last one"),
        ("mamba", "does not see the last one|cannot be tried"),
    ],
)
def test_an_architecture_that_does_not_heed_the_setting_is_refused(
    tmp_path: Path, architecture: str, complaint: str
) -> None:
    folder = save_tiny(tmp_path, architecture)
    load_encoder(str(folder), device="cpu")
    with pytest.raises(BadInputError, match=f"is not bidirectional .*({complaint})"):
        built(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(BadInputError, match="is not bidirectional"):
        load_encoder(str(folder), device="cpu")


def test_absolute_positions_are_refused_with_padding_on_the_left(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    with pytest.raises(BadInputError, match="padded on the left has other hidden states"):
        built(folder)


def test_kernels_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = modeling_llama.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output, weights = eager(*args, **kwargs)
        return output * 1.1, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    with pytest.raises(BadInputError, match="attention by eager gives other hidden states than by sdpa"):
        built(save_tiny(tmp_path, "llama"))


def test_one_layer_that_looks_back_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = modeling_llama.LlamaAttention.forward

    def stubborn(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            length = hidden_states.shape[1]
            kwargs = {**kwargs, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).tril()}
        return attend(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", stubborn)
    with pytest.raises(BadInputError, match="in layer 1 the first token does not see the last one"):
        built(save_tiny(tmp_path, "llama"))


def test_an_encoder_is_not_causal(tiny_model: Path) -> None:
    with pytest.raises(BadInputError, match=r"is not causal .*beside a longer one sees the last one"):
        built(tiny_model, "causal")
    model = built(tiny_model)
    assert torch.equal(vectors(model, TOKENS), vectors(load_encoder(str(tiny_model), device="cpu").model, TOKENS))


def test_an_adapter_alone_would_lose_the_setting(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="loads on its base as it is, without attention, layers"):
        EncoderConfig.model_validate(
            {
                "model": str(tiny_model),
                "attention": "bidirectional",
                "layers": 1,
                "adapter": {"kind": "lora", "save": "adapter"},
            }
        )


def test_checkpointed_layers_look_both_ways_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    gradients = []
    for checkpointed in (False, True):
        model = built(folder).train()
        if checkpointed:
            model[0].auto_model.gradient_checkpointing_enable()
        embed(model, features(model, TOKENS)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
