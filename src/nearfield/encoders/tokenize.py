"""Texts and items as token ids, exactly as the model itself would take them: their lengths, what is cut off, where the prompt ends.

Some poolings leave out as many tokens as the prompt alone has. That is right only where the prompt's end is a border between
tokens: a tokenizer that joins a space to the word behind it has one token more for ``Query: `` alone than ``Query: dog`` has
before ``dog``, and the text's first word would be left out. So the tokenizer itself is changed, and saved with the model:
white space at the end of a text is no token, and where that is not enough the end of a stated prompt always parts two tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nearfield.data.tokens import IMAGE
from nearfield.encoders.images import family_of, image_tokens, row_ids, takes_images
from nearfield.encoders.packing import (
    check_rows,
    is_static,
    longest_input,
    set_longest,
    static_token_ids,
    table_rows,
    uncut,
)
from nearfield.encoders.private import forget_prompt_lengths
from nearfield.errors import BadInputError, CutTexts, Notice
from nearfield.files import read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from nearfield.arrays import Rows
    from nearfield.data.store import Store


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
    lengths: list[int] = []
    for block in _blocks(texts):
        features = model.preprocess(list(block), prompt=prompt or None, processing_kwargs=settings)
        # Some tokenizers give no mask: without padding a row's own length is the text's.
        lengths += [sum(row) for row in features["attention_mask"]] if chats else map(len, features["input_ids"])
    return [int(length) for length in lengths]


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
    """The part of texts with a prompt before each that the model does not read."""
    limit = longest_input(model)
    whole = [] if limit is None else whole_lengths(model, texts, prompt)
    over = [length - limit for length in whole if limit is not None and length > limit]
    return CutTexts(len(texts), len(over), sum(whole), sum(over))


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _BLOCK):
        yield texts[start : start + _BLOCK]


BORDER = "prompt-border"
"""The code of the notice on a prompt that does not end between two tokens."""
_TRIALS = (
    "dog",
    "Dog",
    "s",
    "ing",
    "7",
    "(x)",
    ": x",
    "...",
    "-x",
    "'s",
    '"q"',
    "_x",
    "é",
    "ß",
    "犬",
    "🙂",
    "/x",
    "#x",
)
"""Beginnings of texts that tokenizers join to what stands before them."""
_END = r"\s+\z"


def leaves_prompt_out(model: nn.Module) -> bool:
    """Whether a pooling of the model leaves out the tokens of the prompt, so that texts encoded together must have one prompt."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())


def counted_tokens(model: SentenceTransformer, prompt: str) -> int:
    """The tokens that sentence-transformers counts as the prompt's, with the special tokens before it."""
    return int(model.preprocess(["a"], prompt=prompt).get("prompt_length") or 0) if prompt else 0


def tokens_before(model: SentenceTransformer, prompt: str, text: str) -> int | None:
    """The tokens of the joined text that hold nothing of the text, special ones before it counted; None where a tokenizer does
    not say where its tokens stand.

    White space between prompt and text belongs to neither.
    """
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    joined = prompt + text
    encoded = tokenizer(joined, return_offsets_mapping=True, truncation=False, verbose=False)
    ends = [end for _, end in encoded["offset_mapping"]]
    # Special tokens have no place: those at the front count as the prompt's.
    return next((i for i, end in enumerate(ends) if joined[len(prompt) : end].strip()), len(ends))


def keep_borders(model: SentenceTransformer, prompts: Iterable[str] = ()) -> list[Notice]:
    """Let the ends of prompts be borders of tokens, so that the count of the prompt alone is that in the joined text.

    Does nothing where the pooling takes the prompt too, or the count is right anyway. Returns the prompts that cannot be mended.
    """
    if not leaves_prompt_out(model) or "message" in getattr(model[0], "modality_config", {}):
        return []
    wanted = sorted({prompt for prompt in prompts if prompt})
    tokenizer: Any = model.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        spaced = [prompt for prompt in wanted if prompt != prompt.rstrip()]
        if not all(fits(model, prompt) for prompt in ("a: ", *spaced)):
            _drop_white_space_at_ends(model)
        crossed = [prompt for prompt in wanted if not fits(model, prompt)]
        if crossed:
            _part_at(model, crossed)
    lost = [prompt for prompt in wanted if not fits(model, prompt)]
    return [_notice(prompt) for prompt in lost]


def border_notices(model: SentenceTransformer) -> list[Notice]:
    """Notices about the prompts of a model that is read as it is, and not changed."""
    if not leaves_prompt_out(model) or "message" in getattr(model[0], "modality_config", {}):
        return []
    return [_notice(prompt) for prompt in sorted(set(filter(None, model.prompts.values()))) if not fits(model, prompt)]


def fits(model: SentenceTransformer, prompt: str) -> bool:
    """Whether the tokens that are counted as the prompt's are those before the text, whatever the text begins with."""
    counted = counted_tokens(model, prompt)
    for text in _TRIALS:
        before = tokens_before(model, prompt, text)
        if before is None:
            alone, joined = (list(model.tokenizer(words)["input_ids"]) for words in (prompt, prompt + text))
            if alone[:counted] != joined[:counted]:
                return False
        elif before != counted and not _only_white_space(model, prompt, text, before, counted):
            return False
    return True


def _only_white_space(model: SentenceTransformer, prompt: str, text: str, before: int, counted: int) -> bool:
    """Whether nothing but the white space at the prompt's end stands between the two counts: no word is left out or pooled."""
    if counted > before:
        return False
    offsets = model.tokenizer(prompt + text, return_offsets_mapping=True, truncation=False, verbose=False)[
        "offset_mapping"
    ]
    return not any((prompt + text)[start:end].strip() for start, end in offsets[counted:before])


def _notice(prompt: str) -> Notice:
    return Notice(
        BORDER,
        f"the prompt {prompt!r} does not end between two tokens: pooling, which leaves out as many tokens as it has alone, drops "
        "the beginning of texts, or takes a part of the prompt",
        "End the prompt with a line break or another character that the tokenizer keeps apart.",
    )


def _drop_white_space_at_ends(model: SentenceTransformer) -> None:
    """Let white space at the end of a text, or of a prompt alone, be no token."""
    from tokenizers import Regex, normalizers

    backend = model.tokenizer.backend_tokenizer
    trim = normalizers.Replace(Regex(_END), "")
    backend.normalizer = trim if backend.normalizer is None else normalizers.Sequence([trim, backend.normalizer])
    _keep_as_it_is(model)


def _part_at(model: SentenceTransformer, prompts: Sequence[str]) -> None:
    """Let the end of each prompt part two tokens where a text begins with it."""
    from tokenizers import Regex, pre_tokenizers

    backend = model.tokenizer.backend_tokenizer
    added = sorted((token.content for token in backend.get_added_tokens_decoder().values()), key=len, reverse=True)
    parts = []
    for prompt in prompts:
        # Tokens of its own are taken out of a text before anything else is done to it.
        tail = re.split("|".join(map(re.escape, added)), prompt)[-1] if added else prompt
        seen = tail.rstrip() if backend.normalizer is None else backend.normalizer.normalize_str(tail.rstrip())
        if seen:
            parts.append(re.escape(seen))
    if not parts:
        return
    # The longest first: one prompt may begin with another.
    pattern = Regex(rf"\A(?:{'|'.join(sorted(parts, key=len, reverse=True))})")
    split = pre_tokenizers.Split(pattern, "isolated")
    backend.pre_tokenizer = (
        split if backend.pre_tokenizer is None else pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    )
    _keep_as_it_is(model)


def _keep_as_it_is(model: SentenceTransformer) -> None:
    """Give the tokenizer a class that is saved and loaded with all of its parts.

    transformers builds most classes anew from their words, with normaliser and splitting as the class has them.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = model.tokenizer
    forget_prompt_lengths(model)
    if "__init__" not in type(tokenizer).__dict__ or type(tokenizer) is PreTrainedTokenizerFast:
        return
    settings = {
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "model_input_names": list(tokenizer.model_input_names),
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    }
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **settings)
    plain.chat_template = tokenizer.chat_template
    if model[0].processor is tokenizer:
        model[0].processor = plain
    else:
        model[0].processor.tokenizer = plain


def save_borders(model: SentenceTransformer, folder: Path) -> None:
    """Let the saved tokenizer be loaded as it is, by plain sentence-transformers too.

    Of some architectures (Qwen2) transformers takes the class of the architecture whatever the folder says, and builds it
    anew; a type of tokenizer that is named beside the model's settings overrules that.
    """
    if not leaves_prompt_out(model) or getattr(model.tokenizer, "backend_tokenizer", None) is None:
        return
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    wanted = _cutting(model.tokenizer)
    if _cutting(AutoTokenizer.from_pretrained(folder)) == wanted:
        return
    path = folder / "sentence_bert_config.json"
    settings = read_json(path, "settings of a transformer")
    plain = next(name for name, of in TOKENIZER_MAPPING_NAMES.items() if of == "TokenizersBackend")
    settings["processor_kwargs"] = {**settings.get("processor_kwargs", {}), "tokenizer_type": plain}
    write_json(path, settings)


def _cutting(tokenizer: Any) -> tuple[Any, Any]:
    """How a tokenizer normalises and splits texts before it looks words up."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return parts["normalizer"], parts["pre_tokenizer"]


def token_ids(model: SentenceTransformer, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
    """The token ids of each text with the prompt before it, cut to the model's maximum length."""
    rows: list[npt.NDArray[np.int32]] = []
    table = table_rows(model)
    ragged, together, static = _ragged(model), family_of(model) is not None, is_static(model)
    for start in range(0, len(texts), _BLOCK):
        block = list(texts[start : start + _BLOCK])
        if together:
            block_ids = row_ids(model, block, [None] * len(block), prompt)
        elif static:
            block_ids = static_token_ids(model, block, prompt)
        elif ragged is not None:
            features = model.preprocess(block, prompt=prompt or None, processing_kwargs=ragged)
            block_ids = [np.array(ids, dtype=np.int32) for ids in features["input_ids"]]
        else:
            features = model.preprocess(block, prompt=prompt or None)
            ids = features["input_ids"].numpy().astype(np.int32)
            mask = features["attention_mask"].numpy().astype(bool)
            block_ids = [row[keep] for row, keep in zip(ids, mask, strict=True)]
        check_rows(model, block, block_ids, table)
        rows += block_ids
    return rows


def item_token_ids(
    model: SentenceTransformer, store: Store, rows: Rows, prompt: str, where: str = "encoder"
) -> list[npt.NDArray[np.int32]]:
    """The tokens of each item of a store with images: an image of a tower counts as so many tokens as it has patches.

    Where one transformer reads both, the tokens of an image stand among those of its text. Raises
    :class:`BadInputError` where the encoder takes no images, or an item has a text beside its image and it takes
    one or the other.
    """
    texts, sizes = store.texts(rows), store.image_sizes(rows)
    with_image = sizes[:, 0] > 0
    if family_of(model) is not None:
        shown = [(width, height) if width else None for width, height in sizes.tolist()]
        return row_ids(model, texts, shown, prompt)
    ids_of_items: list[npt.NDArray[np.int32]] = [np.empty(0, dtype=np.int32)] * len(rows)
    plain = np.flatnonzero(~with_image)
    for place, ids in zip(plain.tolist(), token_ids(model, [texts[i] for i in plain], prompt), strict=True):
        ids_of_items[place] = ids
    if with_image.any():
        if not takes_images(model):
            raise BadInputError(
                "the data has images, and this encoder takes none",
                where=where,
                hint="Name a model of both such as CLIP or Qwen2-VL; an encoder gets a tower by encoder.image_tower.",
            )
        both = next((i for i in np.flatnonzero(with_image).tolist() if texts[i]), None)
        if both is not None:
            raise BadInputError(
                f"item {int(rows[both])} has a text ({texts[both][:60]!r}) beside its image, and two towers embed one or "
                "the other",
                where=str(store.path),
                hint="Use a model that reads both together, such as Qwen2-VL.",
            )
        ids = np.full(image_tokens(model), IMAGE, dtype=np.int32)
        for place in np.flatnonzero(with_image).tolist():
            ids_of_items[place] = ids
    return ids_of_items


def _ragged(model: SentenceTransformer) -> dict[str, dict[str, Any]] | None:
    """Settings of a call that leaves rows without padding, which takes half of the time; null where chat templates have a say."""
    from sentence_transformers.sentence_transformer.modules import Transformer

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

    def __init__(self, model: SentenceTransformer, max_length: int | None = None) -> None:
        self.model = model
        shorten(model, max_length)

    @property
    def max_length(self) -> int | None:
        """The most tokens that are read of a text; None where all are."""
        return longest_input(self.model)

    def __call__(self, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
        """The token ids of each text, by :func:`token_ids`."""
        return token_ids(self.model, texts, prompt)

    def of_items(self, store: Store, rows: Rows, prompt: str) -> list[npt.NDArray[np.int32]]:
        """The tokens of each item of a store with images, by :func:`item_token_ids`."""
        return item_token_ids(self.model, store, rows, prompt)

    @property
    def pools_prompt(self) -> bool:
        """Whether pooling takes the prompt's tokens, too."""
        return not leaves_prompt_out(self.model)

    def lost_tokens(self, store: Store, rows: Rows, prompt: str, kept: Sequence[npt.NDArray[np.int32]]) -> list[int]:
        """How many tokens each item of a store loses by the longest input; of an image none is cut."""
        lengths = [0 if len(ids) and bool((ids < 0).any()) else len(ids) for ids in kept]
        if family_of(self.model) is not None and store.has_images:
            shown = [(width, height) if width else None for width, height in store.image_sizes(rows).tolist()]
            whole = row_ids(self.model, store.texts(rows), shown, prompt, cut=False)
            return [len(ids) - length for ids, length in zip(whole, lengths, strict=True)]
        return lost_tokens(self.model, store.texts(rows), prompt, lengths)

    def prompt_length(self, prompt: str) -> int:
        """By :func:`prompt_tokens`."""
        return prompt_tokens(self.model, prompt)
