"""How long texts are to a model, and what is cut off them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nearfield.data.tokens import CutTexts
from nearfield.encoders.limits import longest_input
from nearfield.encoders.one_tower import family_of, row_ids
from nearfield.encoders.static import is_static, set_longest, static_token_ids, uncut

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BLOCK = 1024


def shorten(model: SentenceTransformer, length: int | None) -> None:
    """Let the model read at most so many tokens; one that reads fewer stays as it is."""
    limit = longest_input(model)
    if length is not None and (limit is None or length < limit):
        set_longest(model, length)


def whole_lengths(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[int]:
    """The tokens of each text with the prompt before it, uncut, special tokens included."""
    if family_of(model) is not None:
        return [len(ids) for ids in row_ids(model, texts, [None] * len(texts), prompt, cut=False)]
    if is_static(model):
        with uncut(model):
            return [len(ids) for block in _blocks(texts) for ids in static_token_ids(model, block, prompt)]
    first: Any = model[0]
    chats = "message" in getattr(first, "modality_config", {}) or getattr(first, "can_flatten_inputs", False)
    text: dict[str, Any] = {"truncation": False} if chats else {"truncation": False, "padding": False}
    settings = {"text": text, "common": {} if chats else {"return_tensors": None}}
    found: list[int] = []
    for block in _blocks(texts):
        features = model.preprocess(list(block), prompt=prompt or None, processing_kwargs=settings)
        # Some tokenizers give no mask: without padding a row's own length is the text's.
        found += [sum(row) for row in features["attention_mask"]] if chats else map(len, features["input_ids"])
    return [int(length) for length in found]


def lost_tokens(model: SentenceTransformer, texts: Sequence[str], prompt: str, kept: Sequence[int]) -> list[int]:
    """How many tokens each text loses by the model's longest input; ``kept`` are those that are left of it."""
    limit = longest_input(model)
    lost = [0] * len(texts)
    # Of texts below the limit nothing was cut.
    full = [i for i, length in enumerate(kept) if limit is not None and length >= limit]
    for i, whole in zip(full, whole_lengths(model, [texts[i] for i in full], prompt), strict=True):
        lost[i] = max(0, whole - kept[i])
    return lost


def count_cuts(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> CutTexts:
    """What the model does not read of texts with a prompt before each."""
    limit = longest_input(model)
    whole = [] if limit is None else whole_lengths(model, texts, prompt)
    over = [length - limit for length in whole if limit is not None and length > limit]
    return CutTexts(len(texts), len(over), sum(whole), sum(over))


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _BLOCK):
        yield texts[start : start + _BLOCK]
