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


class Tokenizer:
    """The callable that :func:`nearfield.data.tokens.build_tokens` wants."""

    def __init__(self, config: EncoderConfig) -> None:
        # Adapters change no token, and a quantised base would need a GPU here.
        plain = config.model_copy(update={"adapter": None})
        self.model: SentenceTransformer = build_encoder(plain, "cpu").model

    def __call__(self, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
        """The token ids of each text with the prompt before it, cut to the model's maximum length."""
        features = self.model.preprocess(list(texts), prompt=prompt or None)
        ids = features["input_ids"].numpy().astype(np.int32)
        mask = features["attention_mask"].numpy().astype(bool)
        return [row[keep] for row, keep in zip(ids, mask, strict=True)]

    def prompt_length(self, prompt: str) -> int:
        """Tokens of the prompt and of the special tokens before it, as poolings that leave the prompt out count them."""
        if not prompt:
            return 0
        return int(self.model.preprocess(["a"], prompt=prompt).get("prompt_length", 0))
