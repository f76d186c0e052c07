"""The limits of what a model reads: positions of a text and words of its tokenizer. Beyond them it reads past its tables.

A static model has a table of its tokens' vectors and takes their mean: no transformer, no padding, no mask. Its tokenizer cuts texts,
or nothing does. sentence-transformers' ``StaticEmbedding`` takes a batch's tokens in one row and where each text begins;
:func:`bag` makes that of the rows with a mask that are used everywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.errors import BadInputError
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def is_static(model: SentenceTransformer) -> bool:
    """Whether the model begins with a table of its tokens' vectors."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    return isinstance(model[0], StaticEmbedding)


def bag(features: dict[str, Any]) -> dict[str, Any]:
    """The input of a static model for n texts, from padded token ids and a mask, (n, longest) each."""
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
    module: Any = model[0]
    return module.tokenizer


NO_LIMIT = 1_000_000_000
"""Tokenizers that cut nothing say a number above this."""
Tokens = npt.NDArray[np.int32]
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""The names of tables of positions in architectures."""


def longest_input(model: SentenceTransformer) -> int | None:
    """The most tokens that the model reads of a text; None where it reads all."""
    limit = longest_static(model) if is_static(model) else model.max_seq_length
    return None if limit is None or limit >= NO_LIMIT else int(limit)


def _text_part(model: SentenceTransformer) -> Any:
    """The transformer that reads texts; None where the model has none, or one of images and texts together."""
    from torch import nn

    transformer = getattr(model[0], "auto_model", None)
    if isinstance(transformer, nn.Module) and "image" in (getattr(model[0], "modality_config", None) or {}):
        return getattr(transformer, "text_model", None)
    return transformer if isinstance(transformer, nn.Module) else None


def counts_from_padding(embeddings: Any) -> bool:
    """Whether a module of embeddings numbers positions from behind the padding token's number, as RoBERTa and models like it do."""
    from torch import nn

    if not isinstance(getattr(embeddings, "padding_idx", None), int):
        return False
    table = getattr(embeddings, "position_embeddings", None)
    return isinstance(table, nn.Embedding) and table.padding_idx is not None


def usable_positions(model: SentenceTransformer) -> int | None:
    """The longest text that the model has a position for at each token; None where it has no table of positions.

    In RoBERTa and models like it they are fewer than the config says: positions are counted from behind the padding token's number.
    """
    from torch import nn

    transformer = _text_part(model)
    if transformer is None:
        return None
    lengths = []
    for name, module in transformer.named_modules():
        owner, _, last = name.rpartition(".")
        if last not in _POSITIONS or not isinstance(module, nn.Embedding):
            continue
        parent = transformer.get_submodule(owner)
        before = int(parent.padding_idx) + 1 if counts_from_padding(parent) else int(getattr(module, "offset", 0))
        lengths.append(module.num_embeddings - before)
    said = stated_positions(model)
    # Some tables have rows to spare, which no text reaches.
    if lengths and said is not None and lengths[0] > said:
        lengths.append(said)
    return min(lengths) if lengths else None


def stated_positions(model: SentenceTransformer) -> int | None:
    """The longest text by the config; None where it says nothing, or that there is no end."""
    config: Any = getattr(model[0], "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = getattr(text, "max_position_embeddings", None)
    return int(said) if isinstance(said, int) and said > 0 else None


def fit_positions(model: SentenceTransformer, name: str) -> tuple[Notice, ...]:
    """Let no text be longer than the positions that the model has: sentence-transformers would read past the table and fail."""
    usable, limit = usable_positions(model), longest_input(model)
    if usable is None or (limit is not None and limit <= usable):
        return ()
    model.max_seq_length = usable
    if limit is None:
        return ()
    return (
        Notice(
            "positions-exceeded",
            f"{name} says that it reads {limit} tokens and has positions for {usable}: longer texts are cut there, where "
            "sentence-transformers fails",
            f"Set its max_seq_length to {usable}.",
        ),
    )


def table_rows(model: SentenceTransformer) -> int | None:
    """How many words the model's table has; None where its words are no rows of a table."""
    transformer = _text_part(model)
    try:
        table = transformer.get_input_embeddings() if transformer is not None else None
    except (AttributeError, NotImplementedError):  # as CANINE, which hashes characters
        return None
    rows = getattr(table, "num_embeddings", None)
    return int(rows) if isinstance(rows, int) else None


def check_rows(
    model: SentenceTransformer, texts: Sequence[str], ids: Sequence[Sequence[int] | Tokens], rows: int | None
) -> None:
    """Refuse texts with a word that has no row in the model's table of so many ``rows``, naming the first of them."""
    for text, mine in zip(texts, ids, strict=True):
        if rows is not None and len(mine) and int(np.max(mine)) >= rows:
            number = int(np.max(mine))
            raise BadInputError(
                f"the word {model.tokenizer.convert_ids_to_tokens(number)!r} of the text {text[:60]!r} has number {number}, and "
                f"the model's table has {rows} rows",
                hint="Save the model after resize_token_embeddings(len(tokenizer)).",
            )


def check_words(model: SentenceTransformer, name: str) -> tuple[Notice, ...]:
    """Refuse a tokenizer without a padding token, or whose padding or enclosing tokens have no row in the model's table.

    sentence-transformers cannot run such a model. Words that only stand in some texts and have no row are a notice.
    """
    tokenizer: Any = model.tokenizer if hasattr(model[0], "tokenizer") else None
    if tokenizer is None or not hasattr(tokenizer, "pad_token_id") or _text_part(model) is None:
        return ()
    notices: tuple[Notice, ...] = ()
    if tokenizer.pad_token_id is None and getattr(tokenizer, "eos_token_id", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
        notices += (
            Notice(
                "padding-token",
                f"the tokenizer of {name} has no padding token, so sentence-transformers cannot batch texts: its end token "
                f"{tokenizer.eos_token!r} pads",
                "Set the tokenizer's pad_token and save it.",
            ),
        )
    if tokenizer.pad_token_id is None:
        raise BadInputError(
            "its tokenizer has neither a padding token nor an end token, so sentence-transformers cannot batch texts",
            where=name,
            hint="Set the tokenizer's pad_token to one of its words and save it.",
        )
    rows = table_rows(model)
    if rows is None:
        return notices
    words: dict[str, int] = tokenizer.get_vocab()
    beyond = {word: number for word, number in words.items() if number >= rows}
    if not beyond:
        return notices
    hint = (
        "Save the model after resize_token_embeddings(len(tokenizer)), or with the tokenizer that it was trained with."
    )
    always = [("padding token", tokenizer.pad_token_id)]
    always += [("enclosing token", number) for number in tokenizer("")["input_ids"]]
    for office, number in always:
        if number >= rows:
            word = tokenizer.convert_ids_to_tokens(number)
            raise BadInputError(
                f"its tokenizer's {office} {word!r} has number {number}, and the model's table has {rows} rows: "
                "sentence-transformers cannot run it",
                where=name,
                hint=hint,
            )
    first = min(beyond, key=lambda word: beyond[word])
    return (
        *notices,
        Notice(
            "words-without-rows",
            f"{len(beyond)} words of the tokenizer of {name}, such as {first!r}, have no row in the model's table of {rows}: "
            "a text with one of them stops the run",
            hint,
        ),
    )


def whole_dimension(model: SentenceTransformer) -> int:
    """The width of what the modules give, also of a model that says that it is truncated."""
    with model.truncate_embeddings(None):
        return int(model.get_embedding_dimension() or 0)
