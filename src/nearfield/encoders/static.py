"""Models that look their tokens up in a table and take the mean: no transformer, no padding, no mask.

sentence-transformers' ``StaticEmbedding`` takes a batch's tokens in one row and where each text begins. Everywhere else
in nearfield texts are rows of tokens with a mask; :func:`bag` makes the one of the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def is_static(model: SentenceTransformer) -> bool:
    """Whether the model begins with a table of its tokens' vectors."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(model[0], StaticEmbedding)


def bag(features: dict[str, Any]) -> dict[str, Any]:
    """What a static model takes for n texts, from padded token ids and a mask, (n, longest) each."""
    if "attention_mask" not in features:
        return features
    mask = features["attention_mask"].bool()
    lengths = mask.sum(1)
    rest = {name: value for name, value in features.items() if name not in ("input_ids", "attention_mask")}
    return {**rest, "input_ids": features["input_ids"][mask], "offsets": lengths.cumsum(0) - lengths}


def static_token_ids(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
    """The token ids of each text with the prompt before it, as the model itself makes them."""
    if not texts:
        return []
    features = model.preprocess(list(texts), prompt=prompt or None)
    ids = features["input_ids"].numpy().astype(np.int32)
    return np.split(ids, features["offsets"].numpy()[1:])


def longest_static(model: SentenceTransformer) -> int | None:
    """The most tokens that a static model reads of a text: its tokenizer cuts, or nothing does."""
    cuts = _tokenizer(model).truncation
    return None if cuts is None else int(cuts["max_length"])


def set_longest(model: SentenceTransformer, length: int) -> None:
    """Let any model read at most so many tokens of a text; of a static one that is saved with its tokenizer."""
    if is_static(model):
        _tokenizer(model).enable_truncation(length)
    else:
        model.max_seq_length = length


@contextlib.contextmanager
def uncut(model: SentenceTransformer) -> Iterator[None]:
    """Let a static model read texts whole for the time of a block."""
    tokenizer = _tokenizer(model)
    before = tokenizer.truncation
    tokenizer.no_truncation()
    try:
        yield
    finally:
        if before is not None:
            tokenizer.enable_truncation(**before)


def vocabulary_size(model: SentenceTransformer) -> int:
    """The tokens that a model's tokenizer knows."""
    tokenizer: Any = model.tokenizer
    if hasattr(tokenizer, "get_vocab_size"):
        return int(tokenizer.get_vocab_size())
    # Of words that are split at white space sentence-transformers has a tokenizer of its own.
    return len(tokenizer) if hasattr(tokenizer, "__len__") else len(tokenizer.get_vocab())


def _tokenizer(model: SentenceTransformer) -> Any:
    found: Any = model[0]
    return found.tokenizer
