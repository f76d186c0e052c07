"""Embeddings kept on disk: named by the content of the text and by all that a vector depends on, never by a model's name."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nearfield.checksums import DamagedError, Sealed, seal
from nearfield.data.vectors import VectorTable
from nearfield.evaluation.axes import Turn
from nearfield.files import atomic_path, fingerprint, remove_leftovers, write_json

if TYPE_CHECKING:
    pass

logger = logging.getLogger("nearfield.evaluation")

VERSION = 2
SHARD_ROWS = 16_384
"""New vectors are written at the latest when so many have come, or after :data:`KEEP_SECONDS`."""
KEEP_SECONDS = 20.0
"""An encoding that is killed loses the work of so many seconds, and of the chunk in hand."""
KEYS, VECTORS = "keys.npy", "vectors.npy"


def text_key(text: str) -> bytes:
    """16 bytes that name a text by its content."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class VectorCache:
    """Vectors of texts below a folder, one subfolder for each model, role and prompt.

    Several processes may write at once: each adds folders of its own, written aside and renamed, with their checksums. One
    that is damaged is removed and its texts are encoded again.
    """

    def __init__(self, folder: Path, model: str, about: dict[str, Any]) -> None:
        self.folder, self.model, self.about = folder, model, about
        self._open: dict[tuple[str | None, str | None], _Part] = {}
        remove_leftovers(folder, depth=2)

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
        self._shards: list[tuple[Path, VectorTable]] = []
        keys, places = [], []
        for shard in sorted(folder.glob(f"*/{KEYS}")):
            loaded = _load(shard.parent)
            if loaded is None:
                continue
            keys.append(loaded[0])
            places.append(np.stack([np.full(len(loaded[0]), len(self._shards)), np.arange(len(loaded[0]))], axis=1))
            self._shards.append((shard.parent, loaded[1]))
        self._keys = np.concatenate(keys) if keys else np.empty(0, dtype="S32")
        self._places = np.concatenate(places) if places else np.empty((0, 2), dtype=np.int64)
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._places = self._keys[order], self._places[order]
        self._new: dict[str, NDArray[np.float32]] = {}
        self._written = time.monotonic()

    def get(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors of those texts that are here."""
        if not len(self._keys):
            return {}
        wanted = np.array([text_key(text).hex() for text in texts], dtype="S32")
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        known = np.flatnonzero(self._keys[at] == wanted)
        found: dict[str, NDArray[np.float32]] = {}
        shards, rows = self._places[at[known]].T
        for shard in np.unique(shards).tolist():
            folder, table = self._shards[shard]
            mine = shards == shard
            try:
                table.check(rows[mine], rows[mine] + 1)
            except DamagedError as error:
                _drop(folder, error)
                continue
            found |= {texts[i]: np.array(table.vectors[row]) for i, row in zip(known[mine], rows[mine], strict=True)}
        return found

    def put(self, pairs: Iterable[tuple[str, NDArray[np.float32]]]) -> Iterable[tuple[str, NDArray[np.float32]]]:
        """Pass texts with their vectors on, and keep those that are finite; all are on disk when the iteration ends, also by
        an error, and all but those of the last :data:`KEEP_SECONDS` when the process is killed."""
        self._written = time.monotonic()
        try:
            for text, vector in pairs:
                if np.isfinite(vector).all():
                    self._new[text] = vector
                if len(self._new) >= SHARD_ROWS or time.monotonic() - self._written >= KEEP_SECONDS:
                    self.flush()
                yield text, vector
        finally:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        self._written = time.monotonic()
        if not self._new:
            return
        if not (self.folder / "about.json").is_file():
            write_json(self.folder / "about.json", self.about)
        with atomic_path(self.folder / uuid.uuid4().hex) as aside:
            aside.mkdir()
            np.save(aside / VECTORS, np.stack(list(self._new.values())))
            np.save(aside / KEYS, np.array([text_key(text).hex() for text in self._new], dtype="S32"))
            seal(aside)
        self._new.clear()


def _drop(shard: Path, error: Exception) -> None:
    logger.warning("%s is damaged, and its texts are encoded again (%s)", shard, str(error).splitlines()[0])
    shutil.rmtree(shard, ignore_errors=True)


def _load(shard: Path) -> tuple[NDArray[Any], VectorTable] | None:
    """The keys of a shard, checked, and its vectors, which are checked as they are read; None for one that is damaged."""
    try:
        sealed = Sealed(shard, "")
        file = sealed.file(VECTORS)
        sealed.file(KEYS, whole=True)
        file.check(0, 1)  # its header
        keys = np.load(shard / KEYS, allow_pickle=False)
        vectors = np.load(shard / VECTORS, mmap_mode="r", allow_pickle=False)
        if not sealed.known or keys.dtype != np.dtype("S32") or vectors.ndim != 2 or len(keys) != len(vectors):
            raise ValueError("its keys do not fit its vectors")
    except (DamagedError, OSError, ValueError, EOFError) as error:
        _drop(shard, error)
        return None
    return keys, VectorTable(np.arange(len(keys)), vectors, file)


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
