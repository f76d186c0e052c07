"""Models of other families are no dense embedding models, whatever sentence-transformers makes of their folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder
from nearfield.errors import BadInputError
from nearfield.evaluation import open_model

FAMILIES = {
    "splade": "sparse",
    "inference-free": "sparse",
    "colbert": "multi-vector",
    "pylate": "multi-vector",
    "pylate-untyped": "multi-vector",
    "stanford": "multi-vector",
    "cross": "cross-encoder",
    "reranker": "cross-encoder",
    "ranking": "cross-encoder",
    "pairs-by-key": "cross-encoder",
    "pairs-of-old": "cross-encoder",
    "pairs-adapter": "cross-encoder",
    "adapter-on-pairs": "cross-encoder",
    "colqwen": "multi-vector",
    "stanford-untyped": "multi-vector",
}


def edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def zoo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of each kind, as the libraries save them."""
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
    from transformers import AutoConfig, BertForMaskedLM, BertForSequenceClassification

    root = tmp_path_factory.mktemp("families")
    for name, kind, settings in (
        ("mlm", BertForMaskedLM, {}),
        ("reranker", BertForSequenceClassification, {"num_labels": 1}),
    ):
        shutil.copytree(tiny_model, root / name)
        kind(AutoConfig.from_pretrained(tiny_model, **settings)).save_pretrained(root / name)
    sparse = SparseEncoder(str(root / "mlm"), device="cpu")
    sparse.save_pretrained(str(root / "splade"))
    router = Router.for_query_document([SparseStaticEmbedding(sparse.tokenizer, frozen=False)], list(sparse))
    SparseEncoder(modules=[router], device="cpu").save_pretrained(str(root / "inference-free"))
    MultiVectorEncoder(str(tiny_model), device="cpu").save_pretrained(str(root / "colbert"))
    CrossEncoder(str(root / "reranker"), device="cpu").save_pretrained(str(root / "cross"))
    SentenceTransformer(str(tiny_model), device="cpu").save_pretrained(str(root / "dense"))
    for name in ("pylate", "pylate-untyped"):
        shutil.copytree(root / "dense", root / name)
        types = ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
        modules = [{"idx": i, "name": str(i), "path": ["", "1_Dense"][i], "type": t} for i, t in enumerate(types)]
        (root / name / "modules.json").write_text(json.dumps(modules))
        own = {"model_type": "ColBERT"} if name == "pylate" else {"similarity_fn_name": "MaxSim"}
        edit(root / name / "config_sentence_transformers.json", lambda data, own=own: data.update(own))  # type: ignore[misc]
    says: dict[str, dict[str, object]] = {
        "stanford": {"architectures": ["HF_ColBERT"]},
        "colqwen": {"architectures": ["ColQwen2"]},
        "ranking": {"architectures": ["JinaForRanking"]},
        "pairs-by-key": {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
        "pairs-of-old": {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        "stanford-untyped": {},
    }
    for name, settings in says.items():
        shutil.copytree(tiny_model, root / name)
        edit(root / name / "config.json", lambda data, settings=settings: data.update(settings))  # type: ignore[misc]
    (root / "stanford-untyped" / "artifact.metadata").write_text(json.dumps({"dim": 128, "similarity": "cosine"}))
    write_adapter(root / "pairs-adapter", root / "reranker", tiny_model, "SEQ_CLS")
    write_adapter(root / "adapter-on-pairs", tiny_model, root / "reranker", "FEATURE_EXTRACTION")
    return root


def test_an_adapter_as_peft_saves_it_is_read_as_sentence_transformers_does(tmp_path: Path, tiny_model: Path) -> None:
    """Without a config or a list of modules of its own."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    write_adapter(tmp_path / "adapter", tiny_model, tiny_model, "FEATURE_EXTRACTION")
    texts, folder = ["word1 word2", "word3"], str(tmp_path / "adapter")
    wanted = SentenceTransformer(folder, device="cpu").encode(texts)
    assert np.abs(wanted - Encoder.load(str(tiny_model), device="cpu")(texts)).max() > 1e-4
    np.testing.assert_allclose(Encoder.load(folder, device="cpu")(texts), wanted, rtol=0, atol=1e-6)
    begun = build_encoder(EncoderConfig(model=folder), "cpu").model
    np.testing.assert_allclose(begun.encode(texts), wanted, rtol=0, atol=1e-6)


def write_adapter(folder: Path, trained_on: Path, base: Path, task: str) -> None:
    """An adapter as peft saves it, which names ``base``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModel
    settings = LoraConfig(task_type=task, r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(kind.from_pretrained(trained_on), settings).save_pretrained(folder)
    edit(folder / "adapter_config.json", lambda data: data.update(base_model_name_or_path=str(base)))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_another_family_is_refused(zoo: Path, name: str, family: str) -> None:
    folder = str(zoo / name)
    for use in (
        lambda: load_encoder(folder, device="cpu"),
        lambda: open_model(folder),
        lambda: Encoder.load(folder, device="cpu"),
        lambda: build_encoder(EncoderConfig(model=folder), "cpu"),
    ):
        with pytest.raises(BadInputError, match=f"{family}.*not a dense embedding model") as error:
            use()
        assert error.value.where == folder
        assert "encoder.pooling" in str(error.value.hint) or family == "cross-encoder"


@pytest.mark.parametrize("name", ["splade", "inference-free", "colbert", "cross"])
def test_it_is_told_from_its_modules_too(zoo: Path, tmp_path: Path, name: str) -> None:
    """Earlier versions wrote no type of the whole model."""
    folder = Path(shutil.copytree(zoo / name, tmp_path / name))
    edit(folder / "config_sentence_transformers.json", lambda data: data.pop("model_type"))
    with pytest.raises(BadInputError, match="not a dense embedding model"):
        load_encoder(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["splade", "colbert", "pylate", "stanford", "cross", "reranker"])
def test_a_training_may_begin_from_it_where_the_recipe_says_how(zoo: Path, name: str) -> None:
    loaded = build_encoder(EncoderConfig(model=str(zoo / name), pooling="cls"), "cpu")
    assert loaded.model[1].pooling_mode == "cls"
    assert [notice.code for notice in loaded.notices] == ["other-family"]


def test_a_masked_language_model_is_a_base_and_says_so(zoo: Path) -> None:
    assumed = build_encoder(EncoderConfig(model=str(zoo / "mlm")), "cpu")
    assert [notice.code for notice in assumed.notices] == ["pooling-assumed"]
    assert "BertForMaskedLM" in assumed.notices[0].what
    scored = open_model(str(zoo / "mlm"))
    assert [notice.code for notice in scored.notices] == ["pooling-assumed"]
    assert not build_encoder(EncoderConfig(model=str(zoo / "mlm"), pooling="mean"), "cpu").notices


def test_dense_models_load_without_a_word(zoo: Path, tiny_model: Path) -> None:
    for folder in (zoo / "dense", tiny_model):
        assert not load_encoder(str(folder), device="cpu").notices
