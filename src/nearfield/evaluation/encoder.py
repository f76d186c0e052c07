"""The encoder that mteb's tasks call: mteb's own wrapper, with each distinct text of a task encoded once.

Which prompt applies is decided by mteb's and sentence-transformers' own code; only the cutting into chunks is ours.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import get_prompt
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from numpy.typing import NDArray

from nearfield.console import track
from nearfield.data.finite import require_finite, shown, zeros
from nearfield.data.tokens import CutTexts
from nearfield.encoders.heads import shipped_files
from nearfield.encoders.lengths import count_cuts
from nearfield.encoders.limits import check_rows, longest_input, table_rows
from nearfield.encoders.text_encoder import TextEncoder, cut, reads_plainly
from nearfield.encoders.towers import reads_together
from nearfield.evaluation.axes import Turn
from nearfield.evaluation.contract import SavedPrompts
from nearfield.evaluation.crew import Crew, Pairs, Wording
from nearfield.evaluation.vectors import compress
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.evaluation.vectors import VectorCache

logger = logging.getLogger("nearfield.evaluation")

CPU_BATCH_TOKENS = 1_024
GPU_BATCH_TOKENS = 65_536
_MAX_KEPT_TEXTS = 500_000
_MAX_ROWS = 2_048
_BLOCK_TEXTS = 65_536
"""Texts that are tokenised before the first of them is encoded: a kill loses no more than that takes."""
_CHARACTERS_A_TOKEN = 3


def _rgb(picture: Any) -> Any:
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@dataclass
class Made:
    """The vectors that a task got, and how many of them are zero in every dimension."""

    rows: int = 0
    zeros: int = 0
    first: object = None
    """The text of the first that is zero; none for a picture."""

    def count(self, vectors: NDArray[np.float32], item: Callable[[int], object]) -> None:
        """Take in some vectors; ``item`` gives what a row is of."""
        rows = zeros(vectors)
        if len(rows) and not self.zeros:
            self.first = item(int(rows[0]))
        self.rows, self.zeros = self.rows + len(vectors), self.zeros + len(rows)

    def notices(self) -> list[Notice]:
        """What a reader of the task's score must know."""
        if not self.zeros:
            return []
        verb = "vector is" if self.zeros == 1 else "vectors are"
        return [
            Notice(
                "zero-vectors",
                f"{self.zeros:,} of {self.rows:,} {verb} zero, alike to nothing; the first is of {shown(self.first)}",
                "Look for texts without a token that is pooled, such as empty ones.",
            )
        ]


class TaskEncoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """A sentence-transformers model under the name and revision that its results are filed by.

    ``batch_tokens`` bounds rows times longest row of a chunk, in tokens; null takes 1,024 on a CPU (small chunks stay in its
    cache), 65,536 elsewhere. ``cache`` keeps whole vectors; where a ``crew`` is set, its processes share the texts; ``dimensions`` and ``quantize`` change what mteb gets of them.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        name: str,
        revision: str,
        batch_tokens: int | None = None,
        cache: VectorCache | None = None,
        dimensions: int | None = None,
        quantize: str = "none",
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(model)
        update: dict[str, Any] = {"name": name, "revision": revision}
        known = {"text", "image", "audio", "video"}
        update["modalities"] = [m for m in model.modalities if m in known] or ["text"]
        self.mteb_model_meta: Any
        if shipped_files(model):
            # Whoever loads the model by these data must run the files that its folder holds.
            update["loader_kwargs"] = {**self.mteb_model_meta.loader_kwargs, "trust_remote_code": True}
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update=update)
        on_cpu = model.device.type == "cpu"
        self.batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self.cache, self.dimensions, self.quantize = cache, dimensions, quantize
        self.turn: Turn | None = None
        self.crew: Crew | None = None
        self.encoded = 0
        self.reused = 0
        self.cut = CutTexts()
        """What the model does not read of the texts that it was asked for, each prompt's distinct ones."""
        self.made = Made()
        """What the present task got."""
        self._kept: dict[tuple[str | None, str | None], dict[str, NDArray[np.float32]]] = {}

    def forget(self) -> None:
        """Drop what was kept of a task: the embeddings of its texts, and how many of them are zero."""
        self._kept.clear()
        self.made = Made()

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) whole vectors of texts without prompt or role, of unit length or not as the model makes them."""
        wording = Wording(None, "", "")  # not none: a model's default prompt would be put before them
        found = self._known_or(texts, None, "", lambda some: self.embed(some, wording, f"encoding {len(some)} texts"))
        made = np.stack([found[text] for text in texts])
        require_finite(made, texts.__getitem__, self.mteb_model_meta.name)
        return made

    def _known_or(
        self, texts: Sequence[str], role: str | None, before: str, make: Callable[[Sequence[str]], Pairs]
    ) -> dict[str, NDArray[np.float32]]:
        """Whole vectors of distinct texts: those that are kept from earlier runs, and what ``make`` gives of the others."""
        part = None if self.cache is None else self.cache.part(role, before)
        found = {} if part is None else part.get(texts)
        self.reused += len(found)
        missing = [text for text in texts if text not in found]
        for start in range(0, len(missing), _BLOCK_TEXTS):
            made = make(missing[start : start + _BLOCK_TEXTS])
            found.update(made if part is None else part.put(made))
        self.encoded += len(missing)
        return found

    def prompt_for(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """The string that is put before a text of this role in this task; empty for none."""
        saved = SavedPrompts(self.model.prompts, self.model.default_prompt_name, self.model_prompts or {})
        return saved.prompt_for(task_metadata, prompt_type)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embeddings ``[texts, dimensions]`` (float32) of a data loader's texts, in its order.

        Raises :class:`BadInputError` where the model's vectors are not finite: no score can be made of them.
        """
        texts: list[str] | None = None
        if {"audio", "video"} & set(inputs.dataset.features):
            asked = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            found = super().encode(inputs, prompt_type=prompt_type, **asked, **kwargs)
            whole = np.asarray(found, dtype=np.float32)
        elif "image" in inputs.dataset.features:
            whole = self._embed_pictures(inputs, task_metadata, prompt_type)
        else:
            texts = [text for batch in inputs for text in batch["text"]]
            whole = self._embed_texts(texts, task_metadata, prompt_type)
        return self._checked(whole, texts, task_metadata.name)

    def _embed_texts(
        self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None
    ) -> NDArray[np.float32]:
        """Whole vectors of texts; each distinct text of a task is encoded once."""
        prompt = get_prompt(self.model_prompts, task_metadata, prompt_type)
        role = None if prompt_type is None else prompt_type.value
        kept = self._kept.setdefault((role, prompt), {})
        missing = [text for text in dict.fromkeys(texts) if text not in kept]
        if sum(map(len, self._kept.values())) + len(missing) > _MAX_KEPT_TEXTS:
            kept = {text: kept[text] for text in texts if text in kept}
        if missing:
            before = self.prompt_for(task_metadata, prompt_type)
            self.cut += count_cuts(self.model, missing, before)
            kept.update(
                self._known_or(missing, role, before, lambda some: self._embed(some, task_metadata, prompt_type))
            )
        return np.stack([kept[text] for text in texts])

    def _checked(self, whole: NDArray[np.float32], texts: Sequence[str] | None, task: str) -> NDArray[np.float32]:
        """Vectors as they are scored, cut and rounded; counted where they are zero, refused where they are not finite.

        What is cut off and what becomes a sign would hide both.
        """

        def item(row: int) -> str | None:
            return None if texts is None else texts[row]

        require_finite(whole, item, task, "items" if texts is None else "texts")
        cut = compress(whole, self.dimensions, "none", self.turn)
        self.made.count(cut, item)
        return compress(cut, None, self.quantize)

    def _embed(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> Pairs:
        """Each of some distinct texts with its embedding."""
        role = None if prompt_type is None else prompt_type.value
        prompt = get_prompt(self.model_prompts, task_metadata, prompt_type)
        wording = Wording(role, prompt, self.prompt_for(task_metadata, prompt_type))
        says = f"{task_metadata.name}: encoding {len(texts)} texts"
        if self.crew is None:
            return self.embed(texts, wording, says)
        return self.crew.embed(texts, wording, says, self.embed)

    def embed(self, texts: Sequence[str], wording: Wording, says: str) -> Pairs:
        """Each of some texts with its embedding, by this process: packed, or padded by sentence-transformers' own functions."""
        if self._packed is not None:
            for rows, vectors in self._packed.by_chunks(texts, wording.before, says=says):
                yield from zip((texts[i] for i in rows), vectors[:, : self.model.truncate_dim], strict=True)
            return
        functions = {None: self.model.encode, "query": self.model.encode_query, "document": self.model.encode_document}
        function = functions[wording.role]
        for rows in track(cut(self._lengths(texts), self.batch_tokens, padded=True, most=_MAX_ROWS), says):
            chunk = [texts[i] for i in rows]
            vectors = function(chunk, prompt=wording.prompt, batch_size=len(chunk), show_progress_bar=False)
            yield from zip(chunk, np.asarray(vectors, dtype=np.float32), strict=True)

    @functools.cached_property
    def _packed(self) -> TextEncoder | None:
        """Encodes without padding; null where texts are not plainly tokens of one kind that are encoded alike in all roles."""
        if not reads_plainly(self.model):
            return None
        made = TextEncoder(self.model, self.batch_tokens)
        return made if made.packing is not None else None

    def _embed_pictures(self, inputs: Any, task_metadata: Any, prompt_type: PromptType | None) -> NDArray[np.float32]:
        """The embeddings of a loader's items, batch by batch: pictures, or texts and pictures together.

        Where the model has an encoder of each, an item of both is the normalised sum of its two embeddings (MIEB,
        arXiv 2504.10471).
        """
        prompt = self.prompt_for(task_metadata, prompt_type)

        def embed(items: list[Any]) -> NDArray[np.float32]:
            vectors = self.model.encode(items, prompt=prompt, batch_size=len(items), show_progress_bar=False)
            return np.asarray(vectors, dtype=np.float32)

        parts: list[NDArray[np.float32]] = []
        for batch in track(inputs, f"{task_metadata.name}: encoding pictures"):
            pictures = [_rgb(picture) for picture in batch["image"]]
            texts = batch.get("text")
            if texts is None:
                parts.append(embed(pictures))
            elif reads_together(self.model):
                # In the order that training reads them.
                parts.append(embed([{"image": p, "text": t} for t, p in zip(texts, pictures, strict=True)]))
            else:
                added = embed(pictures) + embed(list(texts))
                lengths = np.linalg.norm(added, axis=1, keepdims=True)
                parts.append((added / np.maximum(lengths, 1e-12)).astype(np.float32))
            self.encoded += len(pictures)
        return np.concatenate(parts)

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        limit = longest_input(self.model)
        tokenizer = self.model.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return [len(text) // _CHARACTERS_A_TOKEN + 1 for text in texts]
        lengths: list[int] = []
        rows = table_rows(self.model)
        for start in range(0, len(texts), 10_000):
            block = tokenizer(
                list(texts[start : start + 10_000]),
                truncation=limit is not None,
                max_length=limit,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            check_rows(self.model, texts[start : start + 10_000], block["input_ids"], rows)
            lengths.extend(len(ids) for ids in block["input_ids"])
        return lengths
