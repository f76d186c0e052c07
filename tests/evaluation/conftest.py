"""Tiny models and tasks: a random two-layer BERT over single letters, and folders of a few rows for each task type."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WORDS = [
    "harbour", "lantern", "meadow", "copper", "violin", "glacier", "orchard", "pepper", "saddle", "thunder",
    "walnut", "needle", "castle", "ribbon", "falcon", "marble", "garden", "silver", "bridge", "candle",
]  # fmt: skip


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Distinct texts of 2 to ``longest`` words."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, size=rng.integers(2, longest + 1)))] = None
    return list(found)


def build_model(folder: Path, prompts: dict[str, str] | None = None, seed: int = 0, default: str | None = None) -> Path:
    """Save a random sentence-transformers model with a letter vocabulary."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = list(string.ascii_lowercase + string.digits + ":;,.-_[]")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    base = folder.parent / f"{folder.name}-base"
    base.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(base)
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
    assert fast.unk_token_id not in fast("query: walnut")["input_ids"]
    fast.save_pretrained(base)
    transformer = Transformer(str(base))
    model = SentenceTransformer(
        modules=[transformer, Pooling(32)], prompts=prompts, default_prompt_name=default, device="cpu"
    )
    model.save_pretrained(str(folder))
    return folder


class Tasks:
    """Writes small local tasks below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def meta(self, name: str, task_type: str, **more: Any) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"task": name, "type": task_type, "split": "test", "subsets": ["default"], **more}
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    @staticmethod
    def table(path: Path, **columns: Any) -> None:
        pq.write_table(pa.table(columns), path)

    def sts(self, name: str = "TinySTS", count: int = 40, **more: Any) -> Path:
        folder = self.meta(name, "STS", **more)
        texts = sentences(2 * count, seed=1)
        score = np.random.default_rng(1).integers(0, 6, count).astype(float)
        self.table(folder / "default.test.parquet", sentence1=texts[:count], sentence2=texts[count:], score=score)
        return folder

    def classification(self, name: str = "TinyClassification") -> Path:
        folder = self.meta(name, "Classification", extra_splits=["train"])
        texts = sentences(90, seed=2)
        labels = [int(text.count("a") > 4) for text in texts]
        self.table(folder / "default.train.parquet", text=texts[:50], label=labels[:50])
        self.table(folder / "default.test.parquet", text=texts[50:], label=labels[50:])
        return folder

    def pairs(self, name: str = "TinyPairs") -> Path:
        folder = self.meta(name, "PairClassification")
        texts = sentences(60, seed=3)
        labels = [i % 2 for i in range(30)]
        second = [texts[i] + " walnut" if label else texts[30 + i] for i, label in enumerate(labels)]
        self.table(folder / "default.test.parquet", sentence1=texts[:30], sentence2=second, labels=labels)
        return folder

    def clustering(self, name: str = "TinyClustering") -> Path:
        folder = self.meta(name, "Clustering", subsets=["one", "two"])
        for subset, seed in (("one", 4), ("two", 5)):
            texts = sentences(60, seed=seed)
            self.table(folder / f"{subset}.test.parquet", sentences=texts, labels=[len(text) % 3 for text in texts])
        return folder

    def bitext(self, name: str = "TinyBitext") -> Path:
        folder = self.meta(name, "BitextMining", subsets=["eng-xxx"], languages={"eng-xxx": ["eng-Latn", "deu-Latn"]})
        texts = sentences(25, seed=6)
        self.table(folder / "eng-xxx.test.parquet", sentence1=texts, sentence2=[text + " walnut" for text in texts])
        return folder

    def retrieval(self, name: str = "TinyRetrieval", task_type: str = "Retrieval", clusters: bool = False) -> Path:
        folder = self.meta(name, task_type)
        documents = sentences(40, seed=7)
        queries = [" ".join(text.split()[:3]) for text in documents[:20]]
        self.table(
            folder / "default.test.corpus.parquet",
            id=[f"d{i}" for i in range(40)],
            title=["a title" if i % 3 == 0 else "" for i in range(40)],
            text=documents,
        )
        columns: dict[str, Any] = {"id": [f"q{i}" for i in range(20)], "text": queries}
        if clusters:
            columns["cluster"] = [f"c{i // 4}" for i in range(20)]
        self.table(folder / "default.test.queries.parquet", **columns)
        pairs = [(f"q{i}", f"d{i}") for i in range(20)] + [(f"q{i}", f"d{i + 20}") for i in range(5)]
        self.table(
            folder / "default.test.qrels.parquet",
            **{"query-id": [q for q, _ in pairs], "corpus-id": [d for _, d in pairs], "score": [1] * len(pairs)},
        )
        if task_type == "Reranking":
            ranked = [[f"d{i}", f"d{i + 20}", f"d{(i + 7) % 40}", f"d{(i + 11) % 40}"] for i in range(20)]
            self.table(
                folder / "default.test.top_ranked.parquet",
                **{"query-id": [f"q{i}" for i in range(20)], "corpus-ids": ranked},
            )
        return folder

    def every_type(self) -> Path:
        """One task of each type; the folder that holds them."""
        self.sts(), self.classification(), self.pairs(), self.clustering(), self.bitext(), self.retrieval()
        self.retrieval("TinyReranking", "Reranking")
        return self.root


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")


FEWER = {"AbsTaskClustering": ("max_documents_per_cluster", 512), "AbsTaskClassification": ("n_experiments", 3)}
"""The draws of mteb's classes, and how many are enough to compare a score with another: 10 times 16,384 take seconds."""


@pytest.fixture(scope="session", autouse=True)
def fewer_draws() -> Iterator[list[tuple[type, str, int]]]:
    """Tasks draw less; given is what mteb's own classes say, for tests that want its published scores."""
    import mteb.abstasks

    own = []
    with pytest.MonkeyPatch.context() as patch:
        for name, (attribute, value) in FEWER.items():
            base = getattr(mteb.abstasks, name)
            own.append((base, attribute, getattr(base, attribute)))
            patch.setattr(base, attribute, value)
        yield own


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    return build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without prompts."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with other weights."""
    return build_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path / "tasks")


@pytest.fixture(scope="session")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of each type."""
    return Tasks(tmp_path_factory.mktemp("every_type")).every_type()


@pytest.fixture(scope="session")
def some_sentences() -> Callable[..., list[str]]:
    return sentences


@pytest.fixture(scope="session")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A loaded model with a tower of texts (whole words) and one of pictures."""
    from nearfield.conformance.cases import TINY_VISION
    from nearfield.conformance.tiny_models import save_tiny_bert
    from nearfield.encoders import EncoderConfig
    from nearfield.encoders.config import ImageTowerConfig
    from nearfield.encoders.load import build_encoder

    text = save_tiny_bert(tmp_path_factory.mktemp("text") / "model", hidden=16)
    tower = ImageTowerConfig(architecture="vit", settings=TINY_VISION, size=16)
    return build_encoder(EncoderConfig(model=str(text), image_tower=tower, normalize=True), "cpu")
