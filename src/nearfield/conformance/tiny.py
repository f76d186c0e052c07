"""Small models with random weights for tests: real architectures, no downloads."""

from __future__ import annotations

from pathlib import Path

WORDS = [f"word{i}" for i in range(200)]


def save_tiny_bert(folder: Path, *, dropout: float = 0.1, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A plain transformers BERT with a tokenizer of whole words, saved to ``folder``."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """A plain transformers CLIP, which has a scalar parameter, saved with tokenizer and processor to ``folder``."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    save_tiny_bert(folder)
    sides = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 205, "eos_token_id": 3, "max_position_embeddings": 32},
        vision_config={**sides, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    config.architectures = ["CLIPModel"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    # Of several ranks transformers lets only the first save.
    config.to_json_file(f"{folder}/config.json", use_diff=False)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    shape = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**shape), AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder
