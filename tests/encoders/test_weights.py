"""No weight of a model is drawn at random because its file lacks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.build import build_encoder
from nearfield.errors import BadInputError
from nearfield.mining.config import BM25Teacher, CrossEncoderTeacher
from nearfield.mining.teachers import CrossEncoderScorer


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
