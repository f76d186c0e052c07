"""The one way texts and images become vectors: a loaded model, length-sorted chunks, vectors kept on disk, several processes.

The vector of a text depends on the texts encoded in the same call: chunks are cut by length, and sums in another order
differ in float32's last digits. The same calls give the same vectors on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Mask, Rows, Vectors
from nearfield.console import track
from nearfield.data.store import Store
from nearfield.data.tokens import IMAGE
from nearfield.data.vectors import VectorStore, VectorTable, require_finite, shown, write_shard, zeros
from nearfield.encoders.load import LoadedEncoder, load_encoder
from nearfield.errors import CutTexts, Notice
from nearfield.files import Sealed, fingerprint, read_json, remove_leftovers, scratch_folder, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.packing import Features, PackingKind, Padding

logger = logging.getLogger("nearfield.encoders")

Pairs = Iterable[tuple[str, npt.NDArray[np.float32]]]
"""Each of some texts with its vector, in any order."""

CHUNK_TOKENS = {"cpu": 1_024, "cuda": 65_536}
"""Tokens of a chunk, padding included: small ones stay in a CPU's cache."""
_CHUNK_TEXTS = 2_048
_BLOCK_TEXTS = 65_536
"""Texts that are tokenised before the first of them is encoded: a process that is killed loses no more than that takes."""
_CHARACTERS_A_TOKEN = 3
_PLAIN = {"input_ids", "attention_mask", "token_type_ids", "modality"}
"""The keys of a tokenizer's output where a text is nothing but its tokens."""


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


def _to_do(chunks: Sequence[Sequence[int] | Rows], done: Mask | None, says: str | None) -> Iterable[Rows]:
    """The chunks that are not wholly done."""
    left = [np.asarray(chunk, dtype=np.int64) for chunk in chunks]
    if done is not None:
        left = [chunk for chunk in left if not done[chunk].all()]
    return track(left, says) if says else left


_ROUNDING = 1e-6


@dataclass
class ZeroCount:
    """How many of some vectors have no direction, and whether all have the same."""

    rows: int = 0
    zeros: int = 0
    first: object = None
    """The text of the first without a direction; none for an image."""
    exact: bool = True
    """Whether all of those are zero in every dimension."""
    one: npt.NDArray[np.float32] | None = None
    """The first vector."""
    differ: bool = False
    """Whether another one is not the same but for rounding."""

    def count(self, vectors: Vectors, item: Callable[[int], object]) -> None:
        """Take in some vectors; ``item`` gives what a row is of."""
        rows = zeros(vectors)
        if len(rows) and not self.zeros:
            self.first = item(int(rows[0]))
        self.exact = self.exact and not vectors[rows].any()
        self.rows, self.zeros = self.rows + len(vectors), self.zeros + len(rows)
        for start in range(0, len(vectors), _CHUNK_TEXTS):
            if self.differ:
                return
            self.one = vectors[0].copy() if self.one is None else self.one
            apart = np.abs(vectors[start : start + _CHUNK_TEXTS] - self.one).max()
            self.differ = bool(apart > _ROUNDING * np.abs(self.one).max())

    def notices(self) -> list[Notice]:
        """Notices for readers of scores of these vectors."""
        notices = []
        if self.zeros:
            verb = "vector is" if self.zeros == 1 else "vectors are"
            what = "zero" if self.exact else "zero, or of a length that float32 cannot hold"
            notices = [
                Notice(
                    "zero-vectors",
                    f"{self.zeros:,} of {self.rows:,} {verb} {what}, alike to nothing; the first is of {shown(self.first)}",
                    "Look for texts without a token that is pooled, such as empty ones.",
                )
            ]
        if self.rows > 1 and not self.differ and self.zeros < self.rows:
            what = f"all {self.rows:,} vectors are the same: the score says nothing of the texts"
            notices.append(Notice("vectors-all-the-same", what, "The model has collapsed, or reads nothing of a text."))
        return notices


class Encoder:
    """Turns texts, images, or both into vectors with a loaded model.

    Where texts are plainly tokens it tokenises them itself and packs them, or pads them as the model does; other models encode by
    their own methods. Vectors that ``kept`` holds are not made again; ``workers`` share what must be made.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        chunk_tokens: int | None = None,
        name: str = "the model",
        *,
        kept: KeptVectors | None = None,
    ) -> None:
        """``chunk_tokens`` bounds a chunk, padding included; ``name`` is what messages call the model."""
        self.model, self.name, self.kept = model, name, kept
        self.chunk_tokens = chunk_tokens or CHUNK_TOKENS.get(model.device.type, CHUNK_TOKENS["cuda"])
        self.workers: Workers | None = None
        self.encoded = self.reused = 0
        """Items that were encoded, and that were taken from the kept vectors."""
        self.cut = CutTexts()
        """The part of the texts of :meth:`each` that the model did not read."""

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> Encoder:
        """Of a folder or a hub id."""
        loaded = load_encoder(model, revision, device, trust_remote_code).model
        if max_length is not None:
            from nearfield.encoders.packing import set_longest

            set_longest(loaded, max_length)
        return cls(loaded, name=model)

    @cached_property
    def by_tokens(self) -> bool:
        """Whether texts are tokenised here, rather than encoded by the model's own methods."""
        from nearfield.encoders.images import takes_images

        return takes_images(self.model) or reads_plainly(self.model)

    @cached_property
    def packing(self) -> PackingKind | None:
        """How texts are encoded without padding; null where they are padded."""
        from nearfield.encoders.trials import packing_kind

        return packing_kind(self.model, self.model.device) if self.by_tokens else None

    @cached_property
    def padding(self) -> Padding:
        """How the model pads texts."""
        from nearfield.encoders.packing import Padding

        return Padding.of(self.model)

    def __call__(self, texts: Sequence[str], prompt: str = "", role: str | None = None) -> Vectors:
        """The model's vectors [n, d] of texts with a prompt before each; float32.

        ``role``, ``query`` or ``document``, counts for models that encode these differently. Raises :class:`BadInputError`
        where vectors are not finite.
        """
        result = self._joined(self.by_chunks(texts, prompt, role), len(texts))
        require_finite(result, texts.__getitem__, self.name)
        return result

    def _joined(self, chunks: Iterable[tuple[Rows, Vectors]], count: int) -> Vectors:
        """The vectors of all chunks, in the order of what they are of."""
        result: Vectors | None = None
        for chunk, vectors in chunks:
            if result is None:
                result = np.empty((count, vectors.shape[1]), dtype=np.float32)
            result[chunk] = vectors
        if result is None:
            return np.empty((0, int(self.model.get_embedding_dimension() or 0)), dtype=np.float32)
        return result

    def each(
        self, texts: Sequence[str], prompt: str = "", role: str | None = None, *, says: str
    ) -> dict[str, npt.NDArray[np.float32]]:
        """The vectors of distinct texts: those that are kept, and what this process and its workers make of the others.

        Vectors that are not finite are among them: whoever scores them says of what they are. ``says`` is said of the progress.
        """
        from nearfield.encoders.tokenize import count_cuts

        self.cut += count_cuts(self.model, texts, prompt)
        vectors = {} if self.kept is None else self.kept.get(texts, prompt, role)
        self.reused += len(vectors)
        missing = [text for text in texts if text not in vectors]
        for start in range(0, len(missing), _BLOCK_TEXTS):
            block = missing[start : start + _BLOCK_TEXTS]
            if self.workers is None:
                made = self.pairs(block, prompt, role, says=says)
            else:
                made = self.workers.encode(self, block, prompt, role, says)
            vectors.update(made if self.kept is None else self.kept.put(made, prompt, role))
        self.encoded += len(missing)
        return vectors

    def pairs(
        self, texts: Sequence[str], prompt: str = "", role: str | None = None, *, says: str | None = None
    ) -> Pairs:
        """Each of some texts with its vector, by this process, as they are made."""
        for chunk, vectors in self.by_chunks(texts, prompt, role, says=says):
            yield from zip((texts[i] for i in chunk), vectors, strict=True)

    def by_chunks(
        self,
        texts: Sequence[str],
        prompt: str = "",
        role: str | None = None,
        *,
        says: str | None = None,
        done: Mask | None = None,
    ) -> Iterator[tuple[Rows, Vectors]]:
        """Chunk by chunk the numbers of some texts, longest first, and their vectors.

        ``says`` is said of the progress. Chunks whose texts are all ``done`` are left out; the others are the same without them.
        """
        if not self.by_tokens:
            methods = {"query": self.model.encode_query, "document": self.model.encode_document}
            method = methods.get(role or "", self.model.encode)
            chunks = cut(self._lengths(texts), self.chunk_tokens, padded=True, most=_CHUNK_TEXTS)
            for chunk in _to_do(chunks, done, says):
                mine = [texts[i] for i in chunk]
                made = method(mine, prompt=prompt, batch_size=len(mine), show_progress_bar=False)
                yield chunk, np.asarray(made, dtype=np.float32)
            return
        from nearfield.encoders.tokenize import prompt_tokens, token_ids

        rows = token_ids(self.model, texts, prompt)
        length, width = prompt_tokens(self.model, prompt), self.padding.width or 0
        chunks = cut([max(len(row), width) for row in rows], self.chunk_tokens, padded=self.packing is None)
        for chunk in _to_do(chunks, done, says):
            yield chunk, self._embed(self._features([rows[i] for i in chunk], length))

    def of_items(
        self, store: Store, items: Rows, prompt: str = "", role: str | None = None, where: str = "encoder"
    ) -> Vectors:
        """The model's vectors [n, d] of items of a store, which may be images; ``where`` names a model that takes none.

        Raises :class:`BadInputError` where vectors are not finite.
        """
        return self._joined(self.items_by_chunks(store, items, prompt, role, where), len(items))

    def items_by_chunks(
        self,
        store: Store,
        items: Rows,
        prompt: str = "",
        role: str | None = None,
        where: str = "encoder",
        done: Mask | None = None,
    ) -> Iterator[tuple[Rows, Vectors]]:
        """The same chunk by chunk, with the places of its items; chunks whose items are all ``done`` are left out."""
        if store.has_images and (store.image_rows(items) >= 0).any():
            chunks = self._images_by_chunks(store, items, prompt, where, done)
        else:
            chunks = self.by_chunks(store.texts(items), prompt, role, done=done)
        for chunk, vectors in chunks:
            mine = items[chunk]
            require_finite(vectors, lambda row: store.shown(mine[row : row + 1])[0], where, "items")  # noqa: B023
            yield chunk, vectors

    def _images_by_chunks(
        self, store: Store, items: Rows, prompt: str, where: str, done: Mask | None
    ) -> Iterator[tuple[Rows, Vectors]]:
        from nearfield.encoders.images import item_features
        from nearfield.encoders.tokenize import item_token_ids, prompt_tokens

        rows = item_token_ids(self.model, store, items, prompt, where)
        length, device = prompt_tokens(self.model, prompt), self.model.device
        width = self.padding.width or 0
        lengths = np.array([max(len(row), width) for row in rows])
        towers = np.array([bool(len(row)) and row[0] == IMAGE for row in rows])
        for part in (np.flatnonzero(~towers), np.flatnonzero(towers)):
            chunks = cut(lengths[part].tolist(), self.chunk_tokens, padded=self.packing is None)
            for chunk in _to_do([part[numbers] for numbers in chunks], done, None):
                mine = [rows[i] for i in chunk]
                features = item_features(self.model, mine, partial(store.images, items[chunk]), device)
                yield chunk, self._embed(self._features(mine, length) if features is None else features)

    def of_images(self, images: Sequence[Any], texts: Sequence[str] | None = None, prompt: str = "") -> Vectors:
        """The model's vectors [n, d] of opened images, or of images and texts together.

        Where the model has a tower for each, an item of both is the normalised sum of its two vectors (MIEB, arXiv 2504.10471).
        """
        from nearfield.encoders.images import reads_together

        def vectors(items: list[Any]) -> Vectors:
            made = self.model.encode(items, prompt=prompt, batch_size=len(items), show_progress_bar=False)
            return np.asarray(made, dtype=np.float32)

        self.encoded += len(images)
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
        if texts is None:
            return vectors(rgb)
        if reads_together(self.model):
            # In the order that training reads them.
            return vectors([{"image": image, "text": text} for text, image in zip(texts, rgb, strict=True)])
        return normalised(vectors(rgb) + vectors(list(texts)))

    def _embed(self, features: Features) -> Vectors:
        import torch

        from nearfield.encoders.packing import embed, evaluating

        with torch.inference_mode(), evaluating(self.model):
            vectors: Vectors = embed(self.model, features).float().cpu().numpy()
        return vectors

    def _features(self, rows: list[npt.NDArray[np.int32]], prompt_length: int) -> Features:
        from nearfield.encoders.packing import packed_features

        device = self.model.device
        if self.packing is None or not any(map(len, rows)):
            return self.padding.features(rows, device, prompt_length)
        return packed_features(rows, kind=self.packing, device=device, prompt_length=prompt_length)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """About how many tokens each text has, of a model that tokenises them itself."""
        from nearfield.encoders.packing import check_rows, longest_input, table_rows

        tokenizer = self.model.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return [len(text) // _CHARACTERS_A_TOKEN + 1 for text in texts]
        limit, rows = longest_input(self.model), table_rows(self.model)
        settings = {"return_attention_mask": False, "return_token_type_ids": False}
        lengths: list[int] = []
        for start in range(0, len(texts), 10_000):
            block = list(texts[start : start + 10_000])
            ids = tokenizer(block, truncation=limit is not None, max_length=limit, **settings)["input_ids"]
            check_rows(self.model, block, ids, rows)
            lengths.extend(map(len, ids))
        return lengths


def normalised(vectors: Vectors) -> Vectors:
    """Vectors of length 1; as torch's normalize leaves it, a vector of zeros stays one."""
    made: Vectors = (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return made


def text_encoder(
    model: str | LoadedEncoder, revision: str | None = None, device: str | None = None
) -> Callable[[Sequence[str]], Vectors]:
    """A function from n texts to their unit vectors [n, d], without a prompt; the model is loaded when it is first used.

    ``model`` is a folder, a hub id or a loaded model. Texts longer than the model's limit are cut by it.
    """
    opened: list[Encoder] = []

    def encode(texts: Sequence[str]) -> Vectors:
        if not opened:
            loaded = load_encoder(model, revision, device) if isinstance(model, str) else model
            opened.append(Encoder(loaded.model, name=loaded.name))
        return normalised(opened[0](list(texts)))

    return encode


@dataclass
class ItemEncoder:
    """Encodes items of a store; can be sent to another process, where store and model are opened when first used."""

    store: Path
    model: str
    revision: str | None
    prompts: Mapping[str, str]
    """Role -> the text put before an item."""
    device: str | None = None
    max_length: int | None = None
    trust_remote_code: bool = False
    _opened: tuple[Store, Encoder] | None = field(default=None, init=False, repr=False)

    def __call__(self, role: str, rows: Rows) -> Vectors:
        """The model's vectors of items in a role."""
        store, encoder = self._open()
        return encoder.of_items(store, rows, self.prompts[role], role, self._name)

    def by_chunks(self, role: str, rows: Rows, done: Mask) -> Iterator[tuple[Rows, Vectors]]:
        """The same in chunks: the places of some of the items, and their vectors; what is ``done`` is not encoded again."""
        store, encoder = self._open()
        return encoder.items_by_chunks(store, rows, self.prompts[role], role, self._name, done)

    @property
    def _name(self) -> str:
        return f"the teacher {self.model}"

    def _open(self) -> tuple[Store, Encoder]:
        if self._opened is None:
            settings = {"max_length": self.max_length, "trust_remote_code": self.trust_remote_code}
            encoder = Encoder.load(self.model, self.revision, device=self.device, **settings)  # type: ignore[arg-type]
            self._opened = (Store.open(self.store), encoder)
        return self._opened


KEPT_VERSION = 3
SHARD_TEXTS = 16_384
"""New vectors are written at the latest when there are so many, or after :data:`KEEP_SECONDS`."""
KEEP_SECONDS = 20.0
"""An encoding that is killed loses the work of so many seconds, and of the chunk in hand."""


def text_key(text: str) -> bytes:
    """32 hex digits that name a text by its content."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest().encode()


class KeptVectors:
    """Vectors of texts on disk: named by the text's content and all that a vector depends on, never by a model's name.

    Below the folder there is a store for each model, role and prompt. Several processes may write at once.
    """

    def __init__(self, folder: Path, model: str, about: Mapping[str, Any]) -> None:
        """``model`` names what the model computes (:mod:`nearfield.encoders.identity`); ``about`` is for human readers."""
        self.folder, self.model, self.about = folder, model, dict(about)
        self._stores: dict[tuple[str | None, str], VectorStore] = {}
        self._version = folder / "version.json"
        remove_leftovers(folder, depth=2)
        if folder.is_dir() and any(folder.iterdir()) and not self._version.is_file():
            logger.info("The vectors that an earlier version kept in %s are not used; delete the folder", folder)

    def store(self, prompt: str, role: str | None) -> VectorStore:
        """The store of texts with this role and prompt before them."""
        key = (role, prompt)
        if key not in self._stores:
            name = fingerprint([KEPT_VERSION, self.model, role, prompt])
            about = {**self.about, "model": self.model, "role": role, "prompt": prompt}
            self._stores[key] = VectorStore(self.folder / name[:2] / name, about)
        return self._stores[key]

    def close(self) -> None:
        """Let go of what was read: what was written since is read when next asked for."""
        self._stores.clear()

    def get(self, texts: Sequence[str], prompt: str, role: str | None) -> dict[str, npt.NDArray[np.float32]]:
        """The vectors of those texts that are here."""
        keys = np.array([text_key(text) for text in texts], dtype="S32")
        vectors_of: dict[str, npt.NDArray[np.float32]] = {}
        for known, vectors in self.store(prompt, role).find(keys):
            vectors_of |= {texts[i]: np.array(vector) for i, vector in zip(known.tolist(), vectors, strict=True)}
        return vectors_of

    def put(self, pairs: Pairs, prompt: str, role: str | None) -> Pairs:
        """Pass texts with their vectors on, and keep those that are finite; all are on disk when the iteration ends, also by
        an error, and all but those of the last :data:`KEEP_SECONDS` when the process is killed."""
        new: dict[str, npt.NDArray[np.float32]] = {}
        store, written = self.store(prompt, role), time.monotonic()

        def write() -> None:
            if new:
                if not self._version.is_file():
                    write_json(self._version, KEPT_VERSION)
                store.append(np.array([text_key(text) for text in new], dtype="S32"), np.stack(list(new.values())))
            new.clear()

        try:
            for text, vector in pairs:
                if np.isfinite(vector).all():
                    new[text] = vector
                if len(new) >= SHARD_TEXTS or time.monotonic() - written >= KEEP_SECONDS:
                    write()
                    written = time.monotonic()
                yield text, vector
        finally:
            write()


FIRST_BLOCK, BLOCK = 32, 16_384
"""Texts of a process that are encoded before vectors are gathered: few at first, then as many as take about
:data:`BLOCK_SECONDS`, so that little is lost when a run ends, and at most so many."""
BLOCK_SECONDS = 10.0
LEAST = 64
"""Texts a process below which it is not worth it."""


def next_block(size: int, seconds: float) -> int:
    """Texts of a process in the next block, when the last one of ``size`` took so long: at most twice as many."""
    wanted = int(size * min(2.0, BLOCK_SECONDS / max(seconds, 1e-3)))
    return min(BLOCK, max(1, wanted))


class Ranks(Protocol):
    """The processes of a launch, one of which has the others help."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    def divide(self, task: str, local_part: Callable[[], None]) -> None:
        """Do the own part of a task while the others do theirs."""


class Workers:
    """The processes of a launch, which encode their shares of texts while the first of them does what follows.

    Texts and vectors are exchanged as files in a folder. A process that does not see it, as on a machine without the shared file
    system, leaves its share to the first.
    """

    def __init__(self, ranks: Ranks, shared: Path) -> None:
        """Texts and vectors lie in a folder of this launch's own below ``shared``, where other launches may have theirs."""
        self.ranks, self.shared = ranks, shared
        self._number = 0
        self._held = contextlib.ExitStack()
        self.folder: Path | None = None
        if ranks.is_main:
            self.folder = self._held.enter_context(scratch_folder(shared, "encoding"))

    def close(self) -> None:
        """Remove the folder."""
        self._held.close()

    def encode(self, encoder: Encoder, texts: Sequence[str], prompt: str, role: str | None, says: str) -> Pairs:
        """As :meth:`Encoder.pairs`, by all processes; long and short texts are dealt evenly."""
        world = self.ranks.world_size
        if len(texts) < LEAST * world:
            yield from encoder.pairs(texts, prompt, role, says=says)
            return
        assert self.folder is not None
        start, size = 0, FIRST_BLOCK
        while start < len(texts):
            block, began = sorted(texts[start : start + size * world], key=len), time.monotonic()
            start += size * world
            self._number += 1
            task = self.folder / f"{self._number}.json"
            write_json(task, {"texts": block, "prompt": prompt, "role": role})
            mine: list[tuple[str, npt.NDArray[np.float32]]] = []
            self.ranks.divide(
                f"encode {self._number} {self.folder.name}",
                lambda: mine.extend(encoder.pairs(block[::world], prompt, role, says=says)),  # noqa: B023
            )
            yield from mine
            for rank in range(1, world):
                folder, share = self.folder / f"{self._number}-{rank}", block[rank::world]
                if folder.is_dir():
                    yield from zip(share, VectorTable.open(Sealed(folder, "")).take(np.arange(len(share))), strict=True)
                    shutil.rmtree(folder)
                else:
                    logger.warning("Rank %d does not share %s: its texts are encoded here", rank, self.folder)
                    yield from encoder.pairs(share, prompt, role, says=says)
            task.unlink()
            size = next_block(size, time.monotonic() - began)

    def help(self, task: str, encoder: Encoder) -> None:
        """Do this process's share of a task of :meth:`encode`."""
        _, number, name = task.split()
        folder, rank = self.shared / name, self.ranks.rank
        file = folder / f"{number}.json"
        if not file.is_file():
            return
        told = read_json(file)
        share = told["texts"][rank :: self.ranks.world_size]
        vectors = dict(encoder.pairs(share, told["prompt"], told["role"]))
        write_shard(folder / f"{number}-{rank}", np.arange(len(share)), np.stack([vectors[text] for text in share]))
