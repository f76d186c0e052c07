"""Losses on single tokens, given a text at a time, so that they go the way of embeddings: through chunks and over ranks.

A text's row is its embedding, and behind it, for each loss, the sum over its tokens and their number. Whoever sees the rows
of all texts can take the mean over all tokens, and its gradient with respect to the sums goes back as that of embeddings does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nearfield.encoders.language_head import language_head, transformer_is_trained
from nearfield.encoders.limits import longest_input
from nearfield.encoders.masking import NOTHING, Key, Targets, hide_all
from nearfield.encoders.packing import Features, Tokens, pool, token_states, truncated
from nearfield.encoders.token_config import DecoderConfig, TokenTaskConfig
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TARGETS = "token_targets_of_task"
"""Where features hold what is to be told."""


class Decoder(nn.Module):
    """One layer of attention from each place, which knows the text's embedding, to it and to the tokens that the place sees."""

    def __init__(self, dimension: int, heads: int, expansion: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Embedding(positions, dimension)
        self.vector_norm, self.token_norm = nn.LayerNorm(dimension), nn.LayerNorm(dimension)
        self.query, self.key = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.value, self.attended = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.attention_norm, self.output_norm = nn.LayerNorm(dimension), nn.LayerNorm(dimension)
        self.wide, self.narrow = (
            nn.Linear(dimension, expansion * dimension),
            nn.Linear(expansion * dimension, dimension),
        )

    def forward(self, vectors: Tensor, tokens: Tensor, places: Tensor, seen: Tensor) -> Tensor:
        """(n, d) embeddings, (n, t, d) of tokens, (n, t) their positions, (n, t, t) who sees whom -> (n, t, d) states."""
        place, vector = self.positions(places), self.vector_norm(vectors)[:, None]
        query = vector + place
        context = torch.cat([vector, self.token_norm(tokens) + place], dim=1)
        q, k, v = (self._split(part) for part in (self.query(query), self.key(context), self.value(context)))
        # The embedding stands before the tokens, for all to see.
        mask = functional.pad(seen, (1, 0), value=True)[:, None]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden = self.attention_norm(query + self.attended(attended.transpose(1, 2).flatten(2)))
        states: Tensor = self.output_norm(hidden + self.narrow(functional.gelu(self.wide(hidden))))
        return states

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)


class TokenTask(nn.Module):
    """Hides tokens of texts and says what it costs to tell them."""

    def __init__(self, model: SentenceTransformer, config: TokenTaskConfig, path: str, seed: int) -> None:
        """``path`` is where the base's weights are, which may hold the head of a language model."""
        super().__init__()
        if not hasattr(model[0], "auto_model"):
            raise BadInputError(
                f"tokens are told by a transformer, and the model's first module is a {type(model[0]).__name__}",
                where="objective",
            )
        transformer = model[0].auto_model
        self.config = config
        self.mask = mask_token(model.tokenizer, config.mask_token)
        self.vocabulary = int(transformer.get_input_embeddings().num_embeddings)
        self.special = np.asarray(sorted(set(model.tokenizer.all_special_ids)), dtype=np.int64)
        self.head, fresh = language_head(model, path, seed)
        trained = transformer_is_trained(transformer)
        for name, parameter in self.head.named_parameters():
            if parameter is not transformer.get_input_embeddings().weight:
                parameter.requires_grad_(trained or name in fresh)
        self.decoder: Decoder | None = None
        if config.decoder is not None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.decoder = _decoder(model, config.decoder).to(next(transformer.parameters()).dtype)

    @property
    def columns(self) -> int:
        """How many numbers stand behind a text's embedding: a sum and a count for each loss."""
        return 2 if self.decoder is None else 4

    def hide(
        self,
        rows: Sequence[Tokens],
        keys: Sequence[Key],
        chosen: Sequence[bool],
        prompt_length: int,
        side: str,
        device: torch.device,
    ) -> tuple[list[Tokens], Targets]:
        """What the encoder reads of the texts of a chunk, and what is to be told of the ``chosen`` ones."""
        return hide_all(
            rows,
            keys,
            self.config,
            mask=self.mask,
            vocabulary=self.vocabulary,
            special=self.special,
            prompt_length=prompt_length,
            chosen=chosen,
            side=side,
            device=device,
        )

    def forward(self, model: SentenceTransformer, features: Features) -> Tensor:
        """Features of n texts with their targets -> (n, d + columns)."""
        targets: Targets = features[TARGETS]
        states = token_states(model, {name: value for name, value in features.items() if name != TARGETS})
        hidden, real = states["token_embeddings"], states["attention_mask"]
        pooled = pool(model, states)
        found = [
            truncated(model, pooled["sentence_embedding"]),
            *self._told(hidden, targets.labels, self.config.predict == "next"),
        ]
        if self.decoder is not None:
            assert targets.ids is not None and targets.words is not None and targets.seen is not None
            places = (real.long().cumsum(1) - 1).clamp(min=0)
            tokens = model[0].auto_model.get_input_embeddings()(targets.ids)
            decoded = self.decoder(pooled["pooled"], tokens, places, targets.seen)
            labels = torch.where(targets.words, targets.ids, NOTHING)
            found += self._told(decoded, labels, False)
        return torch.cat([part.reshape(len(part), -1).to(_widest(found)) for part in found], dim=1)

    def _told(self, states: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
        """(n,) the summed loss of each text's labels, and how many it has."""
        if shifted:
            states, labels = states[:, :-1], labels[:, 1:]
        wanted = labels != NOTHING
        logits = self.head(states[wanted])
        losses = functional.cross_entropy(logits.to(_accumulated(logits.dtype)), labels[wanted], reduction="none")
        text = wanted.nonzero()[:, 0]
        sums = losses.new_zeros(len(labels)).index_add(0, text, losses)
        return sums, wanted.sum(1).to(sums.dtype)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widest(parts: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32


def _decoder(model: SentenceTransformer, config: DecoderConfig) -> Decoder:
    transformer: Any = model[0].auto_model
    dimension = int(transformer.config.hidden_size)
    poolings = [module for module in list(model)[1:] if hasattr(module, "include_prompt")]
    width = poolings[0].get_embedding_dimension() if poolings else dimension
    heads = config.heads or int(transformer.config.num_attention_heads)
    if dimension % heads:
        raise BadInputError(f"{heads} heads do not divide {dimension} dimensions", where="objective.decoder.heads")
    if width != dimension:
        raise BadInputError(
            f"a decoder takes a pooling of {dimension} dimensions, the model's has {width}", where="objective.decoder"
        )
    longest = longest_input(model)
    if longest is None:
        raise BadInputError(
            "a decoder has a row for each position, and this model reads texts of any length",
            where="objective.decoder",
            hint="Set encoder.max_length.",
        )
    return Decoder(dimension, heads, config.expansion, longest)


def mask_token(tokenizer: Any, name: str | None) -> int:
    """The number of the token that stands in a hidden one's place."""
    if name is None:
        number = getattr(tokenizer, "mask_token_id", None)
        if number is not None:
            return int(number)
        name = "_"
    number = tokenizer.get_vocab().get(name)
    if number is None:
        raise BadInputError(
            f"{name!r} is no token of {type(tokenizer).__name__}",
            where="objective.mask_token",
            hint="Name one that texts rarely have.",
        )
    return int(number)
