"""Texts and pictures -> vectors by a sentence-transformers model: length-sorted chunks without padding where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.console import track
from nearfield.data.finite import require_finite
from nearfield.data.store import Rows, Store
from nearfield.data.tokens import IMAGE
from nearfield.encoders.build import load_encoder
from nearfield.encoders.packing import Padding, embed, evaluating, packed_features, packing_kind
from nearfield.encoders.static import set_longest
from nearfield.encoders.tokenize import item_token_ids, prompt_tokens, token_ids
from nearfield.encoders.towers import pictured_features, takes_images

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.packing import Features

Vectors = npt.NDArray[np.float32]
CHUNK_TOKENS = {"cpu": 512, "cuda": 16_384}
_CHUNK_TEXTS = 64
_PLAIN = {"input_ids", "attention_mask", "token_type_ids", "modality"}
"""What a tokenizer gives where a text is nothing but its tokens."""


def reads_plainly(model: SentenceTransformer) -> bool:
    """Whether to a model texts are tokens of one kind, encoded alike in all roles: others are encoded by the model's own method."""
    first: Any = model[0]
    by_role = any(getattr(first, name, None) is not None for name in ("query_length", "document_length"))
    if model.get_model_kwargs() or by_role or getattr(first, "query_expansion", None) is not None:
        return False
    features = model.preprocess(["a"])
    if not set(features) <= _PLAIN or "attention_mask" not in features:
        return False
    return "token_type_ids" not in features or not bool(features["token_type_ids"].any())


def cut(lengths: Sequence[int], budget: int, *, padded: bool, most: int | None = None) -> list[list[int]]:
    """Texts of so many tokens, longest first, cut where a chunk would pass the budget of tokens, or ``most`` texts.

    ``padded``: each text costs as much as the longest of its chunk.
    """
    chunks: list[list[int]] = []
    used = longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        cost = longest if padded else lengths[i]
        if not chunks or used + cost > budget or len(chunks[-1]) == most:
            chunks.append([])
            used, longest = 0, max(lengths[i], 1)
            cost = longest
        chunks[-1].append(i)
        used += cost
    return chunks


class TextEncoder:
    """Encodes texts with a model; what a text becomes depends on the texts that are encoded in the same call.

    (Chunks are cut by length, and sums in another order differ in float32's last digits: the same calls give the same
    vectors on one machine.)
    """

    def __init__(self, model: SentenceTransformer, chunk_tokens: int | None = None, name: str = "the model") -> None:
        """``name`` is what messages call the model."""
        self.model, self.name = model, name
        device = model.device
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"])
        self.by_tokens = takes_images(model) or reads_plainly(model)
        self.packing = packing_kind(model, device) if self.by_tokens else None
        self.padding = Padding.of(model)

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> TextEncoder:
        """Of a folder or a hub id."""
        loaded = load_encoder(model, revision, device, trust_remote_code).model
        if max_length is not None:
            set_longest(loaded, max_length)
        return cls(loaded, name=model)

    def __call__(self, texts: Sequence[str], prompt: str = "", role: str = "") -> Vectors:
        """The model's vectors [n, d] of texts with a prompt before each; float32.

        ``role``, ``query`` or ``document``, counts for models that encode these differently. Raises :class:`BadInputError`
        where vectors are not finite.
        """
        result: Vectors | None = None
        for chunk, vectors in self.by_chunks(texts, prompt, role):
            if result is None:
                result = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
            result[chunk] = vectors
        if result is None:
            return np.empty((0, int(self.model.get_embedding_dimension() or 0)), dtype=np.float32)
        require_finite(result, texts.__getitem__, self.name)
        return result

    def by_chunks(
        self, texts: Sequence[str], prompt: str = "", role: str = "", *, says: str | None = None
    ) -> Iterator[tuple[list[int], Vectors]]:
        """Chunk by chunk the numbers of some texts, longest first, and their vectors; ``says`` is said of the progress."""
        if not self.by_tokens:
            methods = {"query": self.model.encode_query, "document": self.model.encode_document}
            chunks = cut([len(text) for text in texts], sum(map(len, texts)) + 1, padded=False, most=_CHUNK_TEXTS)
            for chunk in track(chunks, says) if says is not None else chunks:
                mine = [texts[i] for i in chunk]
                made = methods.get(role, self.model.encode)(
                    mine, prompt=prompt, batch_size=len(mine), show_progress_bar=False
                )
                yield chunk, np.asarray(made, dtype=np.float32)
            return
        rows = token_ids(self.model, texts, prompt)
        length = prompt_tokens(self.model, prompt)
        width = self.padding.width or 0
        chunks = cut([max(len(row), width) for row in rows], self.chunk_tokens, padded=self.packing is None)
        for chunk in track(chunks, says) if says is not None else chunks:
            yield chunk, self._vectors([rows[i] for i in chunk], length)

    def of_items(self, store: Store, items: Rows, prompt: str = "", role: str = "", where: str = "encoder") -> Vectors:
        """The model's vectors [n, d] of items of a store, which may be pictures; the model is named ``where`` it takes none.

        Raises :class:`BadInputError` where vectors are not finite.
        """
        if not store.has_images or not (store.picture_rows(items) >= 0).any():
            return self(store.texts(items), prompt, role)
        rows = item_token_ids(self.model, store, items, prompt, where)
        length, device = prompt_tokens(self.model, prompt), self.model.device
        width = self.padding.width or 0
        lengths = np.array([max(len(row), width) for row in rows])
        towers = np.array([bool(len(row)) and row[0] == IMAGE for row in rows])
        result: Vectors | None = None
        for part in (np.flatnonzero(~towers), np.flatnonzero(towers)):
            chunks = cut(lengths[part].tolist(), self.chunk_tokens, padded=self.packing is None)
            for chunk in (part[numbers] for numbers in chunks):
                mine = [rows[i] for i in chunk]
                features = pictured_features(self.model, mine, partial(store.images, items[chunk]), device)
                vectors = self._embed(self._features(mine, length) if features is None else features)
                if result is None:
                    result = np.empty((len(items), vectors.shape[1]), dtype=np.float32)
                result[chunk] = vectors
        assert result is not None
        require_finite(result, lambda row: store.shown(items[row : row + 1])[0], where, "items")
        return result

    def _vectors(self, rows: list[npt.NDArray[np.int32]], prompt_length: int) -> Vectors:
        return self._embed(self._features(rows, prompt_length))

    def _embed(self, features: Features) -> Vectors:
        import torch

        with torch.inference_mode(), evaluating(self.model):
            vectors: Vectors = embed(self.model, features).float().cpu().numpy()
        return vectors

    def _features(self, rows: list[npt.NDArray[np.int32]], prompt_length: int) -> Features:
        device = self.model.device
        if self.packing is None or not any(map(len, rows)):
            return self.padding.features(rows, device, prompt_length)
        return packed_features(rows, kind=self.packing, device=device, prompt_length=prompt_length)
