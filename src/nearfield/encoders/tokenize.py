"""Texts -> token ids, exactly as the model itself would take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.encoders.build import build_encoder
from nearfield.encoders.config import EncoderConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


_BLOCK = 1024


def token_ids(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
    """The token ids of each text with the prompt before it, cut to the model's maximum length."""
    rows: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(texts), _BLOCK):
        features = model.preprocess(list(texts[start : start + _BLOCK]), prompt=prompt or None)
        ids = features["input_ids"].numpy().astype(np.int32)
        mask = features["attention_mask"].numpy().astype(bool)
        rows += [row[keep] for row, keep in zip(ids, mask, strict=True)]
    return rows


def prompt_tokens(model: SentenceTransformer, prompt: str) -> int:
    """Tokens of the prompt and of the special tokens before it, as poolings that leave the prompt out count them."""
    if not prompt:
        return 0
    return int(model.preprocess(["a"], prompt=prompt).get("prompt_length", 0))


class Tokenizer:
    """The callable that :func:`nearfield.data.tokens.build_tokens` wants."""

    def __init__(self, config: EncoderConfig) -> None:
        self.model: SentenceTransformer = build_encoder(config.model_copy(update={"adapter": None}), "cpu").model

    def __call__(self, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
        """The token ids of each text, by :func:`token_ids`."""
        return token_ids(self.model, texts, prompt)

    def prompt_length(self, prompt: str) -> int:
        """By :func:`prompt_tokens`."""
        return prompt_tokens(self.model, prompt)
