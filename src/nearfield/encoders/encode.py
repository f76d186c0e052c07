"""Texts -> vectors by a sentence-transformers model: the callable that the floors below and above ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.encoders.build import LoadedEncoder, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def text_encoder(
    model: str | LoadedEncoder, revision: str | None = None, device: str | None = None, batch_size: int = 64
) -> Callable[[Sequence[str]], npt.NDArray[np.float32]]:
    """A function from n texts to their unit vectors [n, d], without a prompt; the model is loaded when it is first used.

    ``model`` is a folder, a hub id or a loaded model. Texts longer than the model's limit are cut by it.
    """
    loaded: list[SentenceTransformer] = []

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if not loaded:
            loaded.append((load_encoder(model, revision, device) if isinstance(model, str) else model).model)
        vectors = loaded[0].encode(
            list(texts),
            prompt="",
            batch_size=batch_size,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    return encode
