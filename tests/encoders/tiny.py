"""Tiny random models of several architectures as sentence-transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from nearfield.arrays import Tokens
from nearfield.conformance.tiny_models import save_tiny_bert
from nearfield.encoders.packing import Features, embed

VOCABULARY = 205
WINDOW = 6
CAUSAL = ("llama", "qwen2", "qwen3", "mistral")
DECODERS = (*CAUSAL, "gemma2", "gemma3_text", "phi", "phi3", "smollm3", "gpt_neox", "bloom", "gpt2", "olmo2", "granite")
"""Those of which it is tested that they can be made bidirectional."""


CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
    "phi3": {},
    "smollm3": {},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "olmo2": {},
    "granite": {},
    # Of these, transformers 5.23 makes none bidirectional in its default kernel.
    "stablelm": {},
    "nemotron": {},
    "mamba": {"state_size": 4},
}


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The config of a two- or three-layer model; ``-both`` behind a decoder's name makes it bidirectional."""
    import transformers

    name, _, both = architecture.partition("-")
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    shared |= {"intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 96}
    if name in CAUSAL:
        shared |= {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    if name == "bert":
        config = transformers.BertConfig(**shared)
    elif name == "roberta":
        config = transformers.RobertaConfig(**{**shared, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3})
    elif name == "mpnet":
        config = transformers.MPNetConfig(**shared)
    elif name == "modernbert":
        special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        config = transformers.ModernBertConfig(
            **{**shared, "num_hidden_layers": 3}, **special, local_attention=2 * WINDOW, global_attn_every_n_layers=2
        )
    elif name == "llama":
        config = transformers.LlamaConfig(**shared)
    elif name == "mistral":
        config = transformers.MistralConfig(**shared, sliding_window=WINDOW, head_dim=8)
    elif name == "qwen2":
        config = transformers.Qwen2Config(**shared, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    elif name == "qwen3":
        config = transformers.Qwen3Config(**shared, head_dim=8)
    elif name in CHANGES:
        heads = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}
        config = transformers.CONFIG_MAPPING[name](**{**shared, **heads, **CHANGES[name]})
    else:
        raise ValueError(architecture)
    if both:
        config.is_causal = False
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def save_tiny(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """A plain transformers model with random weights, larger than usual so that attention matters, and a tokenizer."""
    from transformers import AutoModel

    save_tiny_bert(folder)  # for its tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(architecture, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(folder)
    return folder


def tiny_encoder(
    folder: Path,
    architecture: str,
    pooling: str | tuple[str, ...] = "mean",
    *,
    include_prompt: bool = True,
    dense: bool = False,
    seed: int = 0,
    **changes: Any,
) -> SentenceTransformer:
    """A sentence-transformers model on :func:`save_tiny`."""
    save_tiny(folder, architecture, seed, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Transformer(str(folder), max_seq_length=64)
        modules = [transformer, Pooling(32, pooling, include_prompt=include_prompt)]
        if dense:
            modules.append(Dense(modules[-1].get_embedding_dimension(), 8))
        return SentenceTransformer(modules=[*modules, Normalize()], device="cpu")


def draw_rows(lengths: list[int], seed: int = 0) -> list[Tokens]:
    """Texts of random words."""
    random = np.random.default_rng(seed)
    return [random.integers(5, VOCABULARY, length).astype(np.int32) for length in lengths]


def embeddings_and_gradients(
    model: SentenceTransformer, features: Features
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The embeddings, and the gradient of a fixed scalar of them with respect to each parameter."""
    model.zero_grad()
    embeddings = embed(model, features)
    weights = torch.linspace(-1, 2, embeddings.numel()).view_as(embeddings).sin()
    (embeddings * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return embeddings.detach(), gradients
