"""Small models with random weights for tests, of texts and of images: real architectures, no downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


VISION_LANGUAGE = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "idefics3",
    "llava",
    "llava_next",
    "llava_onevision",
)
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS = ("<fake_token_around_image>", "<image>", "<video>", "<global-img>", "<end_of_utterance>", *_TILES)
_SPECIAL = ("<pad>", "<eos>", "<unk>", *_QWEN, *_IDEFICS)
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_GRIDS = [[16, 32], [32, 16], [32, 32]]
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tiny_vlm(folder: Path, architecture: str = "qwen2_vl", *, seed: int = 0, side: str = "right") -> Path:
    """A plain transformers model of an architecture, saved with tokenizer and image processor to ``folder``.

    Weights are larger than usual, so that attention and images matter; texts are padded on ``side``.
    """
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModel

    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *WORDS])}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(_config(architecture, vocabulary))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    # Of several ranks transformers lets only the first save.
    model.config.to_json_file(f"{folder}/config.json", use_diff=False)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(folder, vocabulary, side)
    _save_processor(folder, architecture)
    return folder


def _save_tokenizer(folder: Path, vocabulary: dict[str, int], side: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        padding_side=side,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(_SPECIAL[3:]),
    ).save_pretrained(folder)


def _config(architecture: str, vocabulary: dict[str, int]) -> Any:
    from transformers import CONFIG_MAPPING

    text: dict[str, Any] = {**_TEXT, "vocab_size": len(vocabulary)}
    settings: dict[str, Any] = {"image_token_id": vocabulary["<image>"]}
    vision: dict[str, Any] = dict(_VISION)
    if architecture.startswith("qwen"):
        settings = {
            "image_token_id": vocabulary["<|image_pad|>"],
            "video_token_id": vocabulary["<|video_pad|>"],
            "vision_start_token_id": vocabulary["<|vision_start|>"],
            "vision_end_token_id": vocabulary["<|vision_end|>"],
        }
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        vision = {"depth": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
        if architecture == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        elif architecture == "qwen2_5_vl":
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [1]}
            vision["window_size"] = 16
        else:
            vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    elif architecture in ("smolvlm", "idefics3"):
        vision |= {"image_size": 16, "patch_size": 4}
        settings |= {"scale_factor": 2, "pad_token_id": 0}
        text["model_type"] = "llama"
    elif architecture == "llava_onevision":
        vision |= {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
        text["model_type"] = "llama"
        settings |= {"video_token_id": vocabulary["<video>"], "image_grid_pinpoints": _GRIDS}
    else:
        vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 16}
        text["model_type"] = "llama"
        settings |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        if architecture == "llava_next":
            settings["image_grid_pinpoints"] = _GRIDS
    return CONFIG_MAPPING[architecture](text_config=text, vision_config=vision, **settings)


def _save_processor(folder: Path, architecture: str) -> None:
    """The files of a processor, written as transformers writes them: its class may need packages that are not here."""
    import transformers
    from transformers import AutoTokenizer

    from nearfield.encoders.images import FAMILIES

    square = {"height": 16, "width": 16}
    settings: dict[str, Any]
    if architecture.startswith("qwen"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Qwen

        pixels = {"shortest_edge": 64, "longest_edge": 1024}
        images: Any = Qwen(patch_size=4, merge_size=2, temporal_patch_size=2, size=pixels)
        settings = {}
    elif architecture in ("smolvlm", "idefics3"):
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        kind = SmolVLMImageProcessorPil if architecture == "smolvlm" else Idefics3ImageProcessorPil
        images = kind(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        settings = {"image_seq_len": 4}
    elif architecture == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=_GRIDS)
        settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        shape = {"size": {"shortest_edge": 16}, "crop_size": square}
        if architecture == "llava_next":
            images = LlavaNextImageProcessorPil(image_grid_pinpoints=_GRIDS, **shape)
        else:
            images = CLIPImageProcessorPil(**shape)
    kind_of = FAMILIES[architecture].processor(transformers)
    kind_of(images, AutoTokenizer.from_pretrained(folder), **settings).save_pretrained(folder)
