"""Poolings with weights, for sentence-transformers. This file travels with the models that use it.

It needs torch and sentence-transformers only. ``SentenceTransformer(folder, trust_remote_code=True)`` runs it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


class _Pooling(Module):  # type: ignore[misc]
    """Token embeddings (n, tokens, d) -> sentence embeddings (n, d)."""

    embedding_dimension: int
    include_prompt: bool

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(n, d) from (n, tokens, d) and which tokens count, (n, tokens) bool."""
        raise NotImplementedError

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (n, d) to the features."""
        tokens, mask = _rectangle(features)
        if not self.include_prompt and features.get("prompt_length") is not None:
            length = features["prompt_length"]
            prompt = int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)
            # The number of a token among the text's own: padding may be on either side.
            mask = mask & (mask.long().cumsum(1) > prompt)
        features["sentence_embedding"] = self.pool(tokens, mask).to(tokens.dtype)
        return features

    def get_embedding_dimension(self) -> int:
        """d."""
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Settings and weights."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From a folder or the hub."""
        place = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls(**cls.load_config(model_name_or_path=model_name_or_path, **place))
        return cls.load_torch_weights(model_name_or_path, model=module, **place)


def _rectangle(features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    tokens: Tensor = features["token_embeddings"]
    if "cu_seq_lens_q" in features:  # texts end to end in one row, as flash attention takes them
        bounds = features["cu_seq_lens_q"]
        texts = torch.split(tokens[0], (bounds[1:] - bounds[:-1]).tolist())
        mask = pad_sequence([text.new_ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
        return pad_sequence(list(texts), batch_first=True), mask
    real: Tensor | None = features.get("attention_mask")
    if real is None or real.shape[1] != tokens.shape[1]:
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    return tokens, real.bool()


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(torch.promote_types(tokens.dtype, torch.float32))[..., None]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class AttentionPooling(_Pooling):
    """A weighted mean, the weight of a token being a softmax of its product with a learnt vector, one a head.

    Each head weighs its own part of the dimensions. The vectors start at zero, which is the mean.
    """

    config_keys = ["embedding_dimension", "heads", "include_prompt"]

    def __init__(self, embedding_dimension: int, heads: int = 1, include_prompt: bool = True) -> None:
        super().__init__()
        if embedding_dimension % heads:
            raise ValueError(f"{heads} heads do not divide {embedding_dimension} dimensions")
        self.embedding_dimension = embedding_dimension
        self.heads = heads
        self.include_prompt = include_prompt
        self.queries = nn.Parameter(torch.zeros(heads, embedding_dimension))

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(n, d)."""
        scores = (tokens @ self.queries.T).to(torch.promote_types(tokens.dtype, torch.float32))
        scores = (scores / math.sqrt(self.embedding_dimension)).masked_fill(~mask[..., None], float("-inf"))
        # A text without a token that counts has the zero vector, as with the mean.
        weights = scores.softmax(1).nan_to_num(0.0)
        parts = tokens.reshape(*tokens.shape[:2], self.heads, -1)
        pooled: Tensor = (weights[..., None] * parts).sum(1)
        return pooled.flatten(1)


class LatentAttentionPooling(_Pooling):
    """The mean of tokens that have looked up a learnt dictionary (NV-Embed, arXiv 2405.17428, section 3.1).

    Tokens are the queries, ``latents`` learnt vectors the keys and values; a feed-forward block follows, both with a
    norm before and a residual around, then the mean. Both blocks' last maps start at zero, which is the plain mean.
    """

    config_keys = [
        "embedding_dimension",
        "latents",
        "heads",
        "head_dimension",
        "expansion",
        "gated",
        "include_prompt",
    ]

    def __init__(
        self,
        embedding_dimension: int,
        latents: int = 512,
        heads: int = 8,
        head_dimension: int | None = None,
        expansion: int = 4,
        gated: bool = True,
        include_prompt: bool = True,
    ) -> None:
        super().__init__()
        d = embedding_dimension
        self.embedding_dimension = d
        self.latents = latents
        self.heads = heads
        self.head_dimension = head_dimension or max(1, d // heads)
        self.expansion = expansion
        self.gated = gated
        self.include_prompt = include_prompt
        inner = heads * self.head_dimension
        self.dictionary = nn.Parameter(torch.randn(latents, d))
        self.token_norm = nn.LayerNorm(d)
        self.latent_norm = nn.LayerNorm(d)
        self.query = nn.Linear(d, inner, bias=False)
        self.key_value = nn.Linear(d, 2 * inner, bias=False)
        self.attention_output = nn.Linear(inner, d, bias=False)
        self.forward_norm = nn.LayerNorm(d)
        self.forward_input = nn.Linear(d, (2 if gated else 1) * expansion * d)
        self.forward_output = nn.Linear(expansion * d, d)
        for last in (self.attention_output.weight, self.forward_output.weight, self.forward_output.bias):
            nn.init.zeros_(last)

    def pool(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(n, d)."""
        n, length, _ = tokens.shape
        query = self.query(self.token_norm(tokens)).view(n, length, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(self.latent_norm(self.dictionary)).chunk(2, dim=-1)
        key, value = (part.view(1, self.latents, self.heads, -1).transpose(1, 2) for part in (key, value))
        # One row of all tokens: the dictionary is the same for every text.
        query = query.transpose(0, 1).flatten(1, 2)[None]
        attended = functional.scaled_dot_product_attention(query, key, value)
        attended = attended.view(self.heads, n, length, -1).permute(1, 2, 0, 3).flatten(2)
        hidden = tokens + self.attention_output(attended)
        inside = self.forward_input(self.forward_norm(hidden))
        if self.gated:
            inside, gate = inside.chunk(2, dim=-1)
            inside = inside * functional.gelu(gate)
        else:
            inside = functional.gelu(inside)
        return _mean(hidden + self.forward_output(inside), mask)
