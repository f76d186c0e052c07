"""The encoder that mteb's tasks call: mteb's own wrapper, with each distinct text of a task encoded once.

The prompt of a text is decided by mteb's and sentence-transformers' own code; vectors are made by
:class:`nearfield.encoders.encode.Encoder`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import get_prompt
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from numpy.typing import NDArray

from nearfield.console import track
from nearfield.data.vectors import require_finite
from nearfield.encoders.encode import Encoder, ZeroCount
from nearfield.encoders.load import shipped_files
from nearfield.evaluation.contract import SavedPrompts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MAX_KEPT_TEXTS = 500_000


class TaskEncoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]
    """A sentence-transformers model under the name and revision that its results are filed by.

    ``encoder`` makes the whole vectors; ``dimensions`` and ``quantize`` change what mteb gets of them.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        name: str,
        revision: str,
        encoder: Encoder | None = None,
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
        self.encoder = encoder or Encoder(model)
        self.dimensions, self.quantize = dimensions, quantize
        self.turn: Rotate | None = None
        self.zeros = ZeroCount()
        """Of the vectors that the present task got."""
        self._kept: dict[tuple[str | None, str | None], dict[str, NDArray[np.float32]]] = {}

    def forget(self) -> None:
        """Drop what was kept of a task: the embeddings of its texts, and how many of them are zero."""
        self._kept.clear()
        self.zeros = ZeroCount()

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d) whole vectors of texts without prompt or role, of unit length or not as the model makes them."""
        vector_of = self.encoder.each(texts, says=f"encoding {len(texts)} texts")
        made = np.stack([vector_of[text] for text in texts])
        require_finite(made, texts.__getitem__, self.mteb_model_meta.name)
        return made

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
            vectors = super().encode(inputs, prompt_type=prompt_type, **asked, **kwargs)
            whole = np.asarray(vectors, dtype=np.float32)
        elif "image" in inputs.dataset.features:
            prompt = self.prompt_for(task_metadata, prompt_type)
            batches = track(inputs, f"{task_metadata.name}: encoding images")
            whole = np.concatenate([self.encoder.of_images(b["image"], b.get("text"), prompt) for b in batches])
        else:
            texts = [text for batch in inputs for text in batch["text"]]
            whole = self._embed_texts(texts, task_metadata, prompt_type)
        return self._checked(whole, texts, task_metadata.name)

    def _embed_texts(
        self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None
    ) -> NDArray[np.float32]:
        """Whole vectors of texts; each distinct text of a task is encoded once."""
        role = None if prompt_type is None else prompt_type.value
        vectors = self._kept.setdefault((role, get_prompt(self.model_prompts, task_metadata, prompt_type)), {})
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        if sum(map(len, self._kept.values())) + len(missing) > _MAX_KEPT_TEXTS:
            vectors = {text: vectors[text] for text in texts if text in vectors}
        if missing:
            prompt = self.prompt_for(task_metadata, prompt_type)
            says = f"{task_metadata.name}: encoding {len(missing)} texts"
            vectors.update(self.encoder.each(missing, prompt, role, says=says))
        return np.stack([vectors[text] for text in texts])

    def _checked(self, whole: NDArray[np.float32], texts: Sequence[str] | None, task: str) -> NDArray[np.float32]:
        """Vectors as they are scored, cut and rounded; counted where they are zero, refused where they are not finite.

        Cutting would hide a part that is not finite, and signs would hide both.
        """

        def item(row: int) -> str | None:
            return None if texts is None else texts[row]

        require_finite(whole, item, task, "items" if texts is None else "texts")
        cut = compress(whole, self.dimensions, "none", self.turn)
        self.zeros.count(cut, item)
        return compress(cut, None, self.quantize)


Rotate = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(n, d) vectors on other axes, the most important one first: (n, k)."""
QUANTIZATIONS = ("none", "int8", "binary")


def compress(
    vectors: NDArray[np.float32], dimensions: int | None, quantize: str, turn: Rotate | None = None
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
