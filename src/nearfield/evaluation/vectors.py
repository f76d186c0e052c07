"""Embeddings kept on disk: named by the content of the text and by all that a vector depends on, never by a model's name."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nearfield.evaluation.axes import Turn
from nearfield.files import atomic_path, canonical_json, fingerprint, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.evaluation")

VERSION = 1
SHARD_ROWS = 16_384
"""New vectors are written at the latest when so many have come: an encoding that is stopped loses no more."""


def text_key(text: str) -> bytes:
    """16 bytes that name a text by its content."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def model_fingerprint(model: SentenceTransformer) -> str:
    """32 hex digits of what turns a text into a vector: weights with their types, modules, tokenizer, longest input.

    It is taken from the model in memory, so that a model that was changed after loading is another one.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        words = _without_padding(backend.to_str())
    else:
        words = canonical_json(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
    settings = [repr(model), model.max_seq_length, getattr(model, "truncate_dim", None), words, _own_code(model)]
    template = getattr(getattr(model[0], "processor", None), "chat_template", None)
    if template is not None:
        settings.append(template)
    digest.update(canonical_json([VERSION, settings]).encode())
    return digest.hexdigest()


_LIBRARIES = ("torch.", "transformers.", "sentence_transformers.", "peft.")


def _own_code(model: SentenceTransformer) -> list[str]:
    """The source of modules that no library holds: a model may bring code of its own, which its weights do not show."""
    kinds = {type(module) for module in model.modules()}
    own = sorted(
        (kind for kind in kinds if not kind.__module__.startswith(_LIBRARIES)), key=lambda kind: kind.__qualname__
    )
    found = []
    for kind in own:
        try:
            found.append(inspect.getsource(kind))
        except (OSError, TypeError):
            found.append(f"{kind.__module__}.{kind.__qualname__}")
    return found


def _without_padding(tokenizer: str) -> str:
    """A tokenizer's own description without what a batch sets on it for the time being."""
    value = json.loads(tokenizer)
    return canonical_json({key: part for key, part in value.items() if key not in ("padding", "truncation")})


class VectorCache:
    """Vectors of texts below a folder, one subfolder for each model, role and prompt.

    Several processes may write at once: each adds files of its own. A file is written aside and renamed; one that
    cannot be read is left out and its texts are encoded again.
    """

    def __init__(self, folder: Path, model: str, about: dict[str, Any]) -> None:
        self.folder, self.model, self.about = folder, model, about
        self._open: dict[tuple[str | None, str | None], _Part] = {}

    def part(self, role: str | None, prompt: str | None) -> _Part:
        """The vectors of texts with this role and prompt before them."""
        key = (role, prompt)
        if key not in self._open:
            name = fingerprint([VERSION, self.model, role, prompt])
            about = {**self.about, "model": self.model, "role": role, "prompt": prompt}
            self._open[key] = _Part(self.folder / name[:2] / name, about)
        return self._open[key]

    def close(self) -> None:
        """Write what is not written yet, and let go of what was read."""
        for part in self._open.values():
            part.flush()
        self._open.clear()


class _Part:
    """The shards of one folder: keys in memory, sorted; vectors mapped from disk."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self._shards: list[NDArray[np.float32]] = []
        keys, places = [], []
        for file in sorted(folder.glob("*.keys.npy")):
            loaded = _load(file)
            if loaded is None:
                continue
            keys.append(loaded[0])
            places.append(np.stack([np.full(len(loaded[0]), len(self._shards)), np.arange(len(loaded[0]))], axis=1))
            self._shards.append(loaded[1])
        self._keys = np.concatenate(keys) if keys else np.empty(0, dtype="S32")
        self._places = np.concatenate(places) if places else np.empty((0, 2), dtype=np.int64)
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._places = self._keys[order], self._places[order]
        self._new: dict[str, NDArray[np.float32]] = {}

    def get(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors of those texts that are here."""
        if not len(self._keys):
            return {}
        wanted = np.array([text_key(text).hex() for text in texts], dtype="S32")
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        found = {}
        for i in np.flatnonzero(self._keys[at] == wanted).tolist():
            shard, row = self._places[at[i]]
            found[texts[i]] = np.array(self._shards[shard][row])
        return found

    def put(self, pairs: Iterable[tuple[str, NDArray[np.float32]]]) -> Iterable[tuple[str, NDArray[np.float32]]]:
        """Pass texts with their vectors on, and keep those that are finite; all are on disk when the iteration ends, also by
        an error."""
        try:
            for text, vector in pairs:
                if np.isfinite(vector).all():
                    self._new[text] = vector
                if len(self._new) >= SHARD_ROWS:
                    self.flush()
                yield text, vector
        finally:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._new:
            return
        if not (self.folder / "about.json").is_file():
            write_json(self.folder / "about.json", self.about)
        name = uuid.uuid4().hex
        with atomic_path(self.folder / f"{name}.vectors.npy") as aside, aside.open("wb") as file:
            np.save(file, np.stack(list(self._new.values())))
        keys = np.array([text_key(text).hex() for text in self._new], dtype="S32")
        with atomic_path(self.folder / f"{name}.keys.npy") as aside, aside.open("wb") as file:
            np.save(file, keys)
        self._new.clear()


def _load(file: Path) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
    try:
        keys = np.load(file, allow_pickle=False)
        vectors = np.load(file.with_name(file.name.replace(".keys.", ".vectors.")), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read and its texts are encoded again (%s)", file, error)
        return None
    if keys.dtype != np.dtype("S32") or vectors.ndim != 2 or len(keys) != len(vectors):
        logger.warning("%s does not fit its vectors; its texts are encoded again", file)
        return None
    return keys, vectors


QUANTIZATIONS = ("none", "int8", "binary")


def compress(
    vectors: NDArray[np.float32], dimensions: int | None, quantize: str, turn: Turn | None = None
) -> NDArray[np.float32]:
    """The first ``dimensions`` of vectors ``[n, d]``, of unit length again, then rounded as storage would round them.

    With a ``turn``, the first of its axes instead of the vectors' own.

    ``int8``: each vector times 127 over its largest coordinate, rounded; ``binary``: the signs. Both come back as
    float32, with the geometry that the small numbers have.
    """
    made = vectors if turn is None else turn(vectors)
    if dimensions is not None and (dimensions < made.shape[1] or turn is not None):
        made = made[:, :dimensions]
        lengths = np.linalg.norm(made, axis=1, keepdims=True)
        made = made / np.maximum(lengths, 1e-12)
    if quantize == "int8":
        largest = np.maximum(np.abs(made).max(axis=1, keepdims=True), 1e-12)
        made = np.round(made * (127 / largest)) * (largest / 127)
    elif quantize == "binary":
        made = np.where(made > 0, 1.0, -1.0) / np.sqrt(made.shape[1])
    return np.ascontiguousarray(made, dtype=np.float32)
