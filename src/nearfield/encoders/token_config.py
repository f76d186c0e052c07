"""Settings of losses on single tokens, which are trained before embeddings are: light, without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nearfield.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class DecoderConfig(Config):
    """A decoder of one layer that must tell the whole text from its embedding and a few of its tokens (RetroMAE, arXiv
    2205.12035, with enhanced decoding)."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of a text's other tokens, how many each position does not see; drawn anew for each position."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Null takes as many as the encoder has."""
    expansion: Annotated[int, Field(ge=1)] = 4
    """How many times wider the feed-forward part is."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """What its mean loss is multiplied by."""


class TokenTaskConfig(Config):
    """Tokens are hidden and must be told from the rest."""

    predict: Literal["masked", "next"] = "masked"
    """``masked`` tells a hidden token at its own place (BERT); ``next`` at the place before it, as decoders learnt to (MNTP,
    LLM2Vec, arXiv 2404.05961)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of a text's tokens, how many are hidden; never special tokens, nor those of a prompt."""
    mask_token: str | None = None
    """What stands in a hidden token's place; null takes the tokenizer's own mask token, or ``_`` where it has none."""
    random: Share = 0.1
    """Of the hidden tokens, how many become a random word instead."""
    kept: Share = 0.1
    """Of the hidden tokens, how many stay as they are, to be told all the same."""
    decoder: DecoderConfig | None = None

    @model_validator(mode="after")
    def _something_is_hidden(self) -> TokenTaskConfig:
        if self.random + self.kept > 1:
            raise ValueError(f"random {self.random:g} and kept {self.kept:g} are more than all hidden tokens")
        return self
