"""Texts -> unit vectors by a sentence-transformers model: the callable that the floors below and above ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.encoders.build import LoadedEncoder, load_encoder

if TYPE_CHECKING:
    from nearfield.encoders.text_encoder import TextEncoder


def text_encoder(
    model: str | LoadedEncoder, revision: str | None = None, device: str | None = None
) -> Callable[[Sequence[str]], npt.NDArray[np.float32]]:
    """A function from n texts to their unit vectors [n, d], without a prompt; the model is loaded when it is first used.

    ``model`` is a folder, a hub id or a loaded model. Texts longer than the model's limit are cut by it.
    """
    opened: list[TextEncoder] = []

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if not opened:
            from nearfield.encoders.text_encoder import TextEncoder

            loaded = load_encoder(model, revision, device) if isinstance(model, str) else model
            opened.append(TextEncoder(loaded.model, name=loaded.name))
        vectors = opened[0](list(texts))
        # As torch's normalize: a vector of zeros stays one.
        normalised: npt.NDArray[np.float32] = vectors / np.maximum(
            np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12
        )
        return normalised

    return encode
