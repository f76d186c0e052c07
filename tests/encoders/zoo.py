"""A zoo: tiny random models of many architectures, with tokenizers that have the quirks of real ones.

Each is saved as its makers save theirs: a plain transformers folder with a tokenizer beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a language model reads words and gives vectors",
    "Padding must not change what a text means, nor its place!",
    "naïve café, 東京 and numbers 0 1 2 3 4 5 6 7 8 9",
    "short texts, long texts, and texts of one word",
]
TEXTS = [
    "fox",
    "the quick brown fox jumps over the lazy dog",
    "a language model reads words",
    "Padding must not change what a text means , nor its place",
    "words words words words words words words words words words words words words words",
    "café 東京 12",
]
"""Texts of unlike lengths, one of one word."""


@dataclass(frozen=True)
class Style:
    """A kind of tokenizer."""

    kind: str
    """``wordpiece``, ``bytes`` (BPE of bytes) or ``unigram``."""
    special: tuple[str, ...]
    """The first words of the vocabulary, in the order of their numbers."""
    names: dict[str, str]
    """The role of each."""
    template: str = "$A"
    side: str = "right"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    added: tuple[str, ...] = ()
    """Words that were added behind the vocabulary."""


_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ROBERTA_NAMES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_QWEN_ADDED = ("<|im_start|>", "<|im_end|>")
STYLES = {
    "bert": Style(
        "wordpiece", _BERT, _BERT_NAMES, "[CLS] $A [SEP]", inputs=("input_ids", "token_type_ids", "attention_mask")
    ),
    "funnel": Style(
        "wordpiece",
        _BERT,
        _BERT_NAMES,
        "[CLS]:2 $A:0 [SEP]:0",
        inputs=("input_ids", "token_type_ids", "attention_mask"),
    ),
    "bert-no-mask": Style("wordpiece", _BERT, _BERT_NAMES, "[CLS] $A [SEP]", inputs=("input_ids", "token_type_ids")),
    "roberta": Style("bytes", _ROBERTA, _ROBERTA_NAMES, "<s> $A </s>"),
    "xlm-roberta": Style("unigram", _ROBERTA, _ROBERTA_NAMES, "<s> $A </s>"),
    "t5": Style(
        "unigram",
        ("<pad>", "</s>", "<unk>"),
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
    ),
    "llama": Style(
        "unigram",
        ("<unk>", "<s>", "</s>"),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "<s> $A",
        side="left",
    ),
    "gemma": Style(
        "unigram",
        ("<pad>", "<eos>", "<bos>", "<unk>"),
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        "<bos> $A",
        side="left",
    ),
    "gpt2": Style(
        "bytes",
        ("<|endoftext|>",),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ),
    "qwen": Style(
        "bytes",
        ("<|endoftext|>",),
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        side="left",
        added=_QWEN_ADDED,
    ),
    "xlnet": Style(
        "unigram",
        ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"),
        {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<cls>",
            "sep_token": "<sep>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        "$A:0 <sep>:0 <cls>:2",
        side="left",
        inputs=("input_ids", "token_type_ids", "attention_mask"),
    ),
    "opt": Style(
        "bytes",
        ("<s>", "<pad>", "</s>", "<unk>"),
        {k: _ROBERTA_NAMES[k] for k in ("pad_token", "eos_token", "unk_token")},
        "</s> $A",
    ),
    "siglip": Style(
        "unigram",
        ("<unk>", "</s>"),
        {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "$A </s>",
        inputs=("input_ids",),
    ),
    "clip": Style(
        "bytes",
        ("<|startoftext|>", "<|endoftext|>"),
        {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
        "<|startoftext|> $A <|endoftext|>",
    ),
    "neither": Style("unigram", ("<unk>",), {"unk_token": "<unk>"}),
}


@cache
def _trained(kind: str, special: tuple[str, ...]) -> str:
    """A tokenizer of the kind that was trained on the corpus, as JSON."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    size = 400
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=list(special), unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def save_tokenizer(folder: Path, style: Style, max_length: int | None = 64) -> int:
    """Save a tokenizer of a style; returns how many words it has. Without ``max_length`` it says none, as many do."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_trained(style.kind, style.special))
    used = [word.partition(":")[0] for word in style.template.split() if not word.startswith("$A")]
    if used:
        numbers = [(word, tokenizer.token_to_id(word)) for word in dict.fromkeys(used)]
        tokenizer.post_processor = TemplateProcessing(single=style.template, special_tokens=numbers)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in style.added])
    length = {} if max_length is None else {"model_max_length": max_length}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=style.side,
        model_input_names=list(style.inputs),
        **length,
        **style.names,
    )
    fast.save_pretrained(folder)
    return len(fast)


@dataclass(frozen=True)
class Animal:
    """One architecture: what its config says, and its tokenizer."""

    architecture: str
    style: str = "bert"
    settings: dict[str, Any] = field(default_factory=dict)
    dependent: bool = False
    """Whether its vectors depend on the texts beside, in sentence-transformers as here."""
    packing: str | None = None
    """How its texts are packed on a CPU; null pads them."""
    kind: str | None = None
    """The class, where it is not the architecture's own encoder."""


_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 80,
    "type_vocab_size": 2,
    "embedding_size": 16,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 80,
    "dim": 16,
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "d_inner": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "num_decoder_layers": 1,
    "emb_dim": 16,
    "entity_vocab_size": 8,
    "entity_emb_size": 8,
}
"""Small sizes under the names that architectures give them."""

ANIMALS: dict[str, Animal] = {}
"""By name."""
RANDOM = ("m2m_100", "pegasus", "marian")
"""Architectures of which sentence-transformers reads the encoder alone, and finds none of its weights."""


def _add(
    names: str,
    style: str,
    packing: str | None = None,
    *,
    dependent: bool = False,
    kind: str | None = None,
    **settings: Any,
) -> None:
    for name in names.split():
        ANIMALS[name] = Animal(name, style, settings, dependent, packing, kind)


_add(
    "bert distilbert electra albert ernie nomic_bert jina_embeddings_v3 modernbert modernbert-decoder", "bert", "varlen"
)
_add("megatron-bert rembert roformer layoutlm squeezebert splinter mpnet deberta deberta-v2 big_bird mra ibert", "bert")
_add("funnel", "funnel", dependent=True, kind="FunnelModel", block_sizes=[1, 1], num_decoder_layers=1)
_add("nystromformer convbert mobilebert yoso", "bert", dependent=True)
_add("fnet", "bert-no-mask", dependent=True)
_add("roberta roberta-prelayernorm data2vec-text", "roberta", "varlen")
_add("esm luke", "roberta")
_add("longformer", "roberta", attention_window=[8, 8])
_add("xlm-roberta xlm-roberta-xl camembert", "xlm-roberta", "varlen")
_add("xmod", "xlm-roberta", "varlen", languages=["en_XX"], default_language="en_XX")
_add("xlm flaubert", "xlm-roberta")
_add("t5 mt5 umt5", "t5", "block")
_add("longt5 switch_transformers", "t5")
_add("bart mbart", "roberta")
_add("led", "roberta", attention_window=[8, 8])
_add("xlnet", "xlnet")
_add("eurobert", "llama", "varlen", pad_token_id=2)
_add("llama mistral phi olmo2 granite cohere mixtral", "llama", "varlen")
_add("phi3 smollm3", "llama", "varlen", pad_token_id=None)
_add("stablelm falcon", "llama", "block")
_add("qwen2 qwen3 qwen3_moe", "qwen", "varlen")
_add("gemma gemma3_text", "gemma", "varlen")
_add("gemma2", "gemma")
_add("gpt2 gpt_neox gpt_bigcode", "gpt2", "varlen")
_add("bloom mamba mpt rwkv", "gpt2")
_add("gptj", "gpt2", rotary_dim=8)
_add("codegen", "gpt2", rotary_dim=4, n_head=4)
_add("gpt_neo", "gpt2", attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"])
_add("opt biogpt", "opt", "varlen")
_add("xglm", "opt")
_add(" ".join(RANDOM), "roberta")


def config_of(animal: Animal, vocabulary: int, tokenizer: Any) -> Any:
    """The config of a tiny model of an architecture."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[animal.architecture]
    plain = kind()
    known = {**plain.to_dict(), **dict.fromkeys(plain.attribute_map)}
    mapped = set(plain.attribute_map)
    sizes = {key: value for key, value in _SIZES.items() if key in known and key not in mapped}
    words = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("pad", "bos", "eos")
        if f"{name}_token_id" in known
    }
    words = {key: value for key, value in words.items() if value is not None}
    return kind(**{**sizes, "vocab_size": vocabulary, **words, **animal.settings})


def save_animal(
    folder: Path, animal: Animal, seed: int = 0, *, max_length: int | None = 64, rows: int = 0, **changes: Any
) -> Path:
    """A plain transformers folder; ``rows`` more (or fewer) in the table than the tokenizer has words."""
    import transformers
    from transformers import AutoModel, AutoTokenizer

    size = save_tokenizer(folder, STYLES[animal.style], max_length)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = config_of(animal, size + rows, tokenizer)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config) if animal.kind is None else getattr(transformers, animal.kind)(config)
        with torch.no_grad():
            # Larger than usual, so that attention and positions matter.
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.requires_grad:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(folder)
    return folder
