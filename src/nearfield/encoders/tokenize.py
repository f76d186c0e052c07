"""Texts -> token ids, exactly as the model itself would take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.sentence_transformer.modules import Transformer

from nearfield.data.tokens import IMAGE
from nearfield.encoders.borders import counted_tokens, leaves_prompt_out, tokens_before
from nearfield.encoders.build import build_encoder
from nearfield.encoders.config import EncoderConfig
from nearfield.encoders.lengths import lost_tokens, shorten
from nearfield.encoders.limits import check_rows, longest_input, table_rows
from nearfield.encoders.one_tower import family_of, row_ids
from nearfield.encoders.static import is_static, static_token_ids
from nearfield.encoders.towers import image_tokens, takes_images
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.data.store import Store
    from nearfield.data.tokens import Rows

_BLOCK = 1024


def token_ids(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
    """The token ids of each text with the prompt before it, cut to the model's maximum length."""
    rows: list[npt.NDArray[np.int32]] = []
    table = table_rows(model)
    ragged, together, static = _ragged(model), family_of(model) is not None, is_static(model)
    for start in range(0, len(texts), _BLOCK):
        block = list(texts[start : start + _BLOCK])
        if together:
            found = row_ids(model, block, [None] * len(block), prompt)
        elif static:
            found = static_token_ids(model, block, prompt)
        elif ragged is not None:
            features = model.preprocess(block, prompt=prompt or None, processing_kwargs=ragged)
            found = [np.array(ids, dtype=np.int32) for ids in features["input_ids"]]
        else:
            features = model.preprocess(block, prompt=prompt or None)
            ids = features["input_ids"].numpy().astype(np.int32)
            mask = features["attention_mask"].numpy().astype(bool)
            found = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        check_rows(model, block, found, table)
        rows += found
    return rows


def item_token_ids(
    model: SentenceTransformer, store: Store, rows: Rows, prompt: str, where: str = "encoder"
) -> list[npt.NDArray[np.int32]]:
    """What each item of a store with pictures takes: a picture of a tower counts as so many tokens as it has patches.

    Where one transformer reads both, the tokens of a picture stand among those of its text. Raises
    :class:`BadInputError` where the encoder takes no pictures, or an item has a text beside its picture and it takes
    one or the other.
    """
    texts, sizes = store.texts(rows), store.image_sizes(rows)
    pictured = sizes[:, 0] > 0
    if family_of(model) is not None:
        shown = [(width, height) if width else None for width, height in sizes.tolist()]
        return row_ids(model, texts, shown, prompt)
    found: list[npt.NDArray[np.int32]] = [np.empty(0, dtype=np.int32)] * len(rows)
    plain = np.flatnonzero(~pictured)
    for place, ids in zip(plain.tolist(), token_ids(model, [texts[i] for i in plain], prompt), strict=True):
        found[place] = ids
    if pictured.any():
        if not takes_images(model):
            raise BadInputError(
                "the data has pictures, and this encoder takes none",
                where=where,
                hint="Name a model of both such as CLIP or Qwen2-VL; an encoder gets a tower by encoder.image_tower.",
            )
        both = next((i for i in np.flatnonzero(pictured).tolist() if texts[i]), None)
        if both is not None:
            raise BadInputError(
                f"item {int(rows[both])} has a text ({texts[both][:60]!r}) beside its picture, and two towers embed one or "
                "the other",
                where=str(store.path),
                hint="Use a model that reads both together, such as Qwen2-VL.",
            )
        ids = np.full(image_tokens(model), IMAGE, dtype=np.int32)
        for place in np.flatnonzero(pictured).tolist():
            found[place] = ids
    return found


def _ragged(model: SentenceTransformer) -> dict[str, dict[str, Any]] | None:
    """Settings of a call that leaves rows without padding, which takes half of the time; null where chat templates have a say."""
    first = model[0]
    plain = isinstance(first, Transformer) and not first.can_flatten_inputs and "message" not in first.modality_config
    return {"text": {"padding": False}, "common": {"return_tensors": None}} if plain else None


def prompt_tokens(model: SentenceTransformer, prompt: str) -> int:
    """Tokens of the prompt and of the special tokens before it.

    Where pooling leaves the prompt out it is what sentence-transformers counts, else those that hold nothing of the text.
    """
    if not prompt or family_of(model) is not None:
        return 0
    before = None if leaves_prompt_out(model) else tokens_before(model, prompt, "a")
    return counted_tokens(model, prompt) if before is None else before


class Tokenizer:
    """The callable that :func:`nearfield.data.tokens.build_tokens` wants."""

    def __init__(self, config: EncoderConfig, max_length: int | None = None, prompts: Iterable[str] = ()) -> None:
        plain = config.model_copy(update={"adapter": None})
        self.model: SentenceTransformer = build_encoder(plain, "cpu", prompts=prompts).model
        shorten(self.model, max_length)

    @property
    def max_length(self) -> int | None:
        """The most tokens that are read of a text; None where all are."""
        return longest_input(self.model)

    def __call__(self, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
        """The token ids of each text, by :func:`token_ids`."""
        return token_ids(self.model, texts, prompt)

    def of_items(self, store: Store, rows: Rows, prompt: str) -> list[npt.NDArray[np.int32]]:
        """What each item of a store with pictures takes, by :func:`item_token_ids`."""
        return item_token_ids(self.model, store, rows, prompt)

    @property
    def pools_prompt(self) -> bool:
        """Whether pooling takes the prompt's tokens, too."""
        return not leaves_prompt_out(self.model)

    def lost_tokens(self, store: Store, rows: Rows, prompt: str, kept: Sequence[npt.NDArray[np.int32]]) -> list[int]:
        """How many tokens each item of a store loses by the longest input; of a picture none is cut."""
        lengths = [0 if len(ids) and bool((ids < 0).any()) else len(ids) for ids in kept]
        if family_of(self.model) is not None and store.has_images:
            shown = [(width, height) if width else None for width, height in store.image_sizes(rows).tolist()]
            whole = row_ids(self.model, store.texts(rows), shown, prompt, cut=False)
            return [len(ids) - length for ids, length in zip(whole, lengths, strict=True)]
        return lost_tokens(self.model, store.texts(rows), prompt, lengths)

    def prompt_length(self, prompt: str) -> int:
        """By :func:`prompt_tokens`."""
        return prompt_tokens(self.model, prompt)
