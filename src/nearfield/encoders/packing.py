"""Texts as tokens -> what an encoder takes -> one vector a text, padded or without padding; and how much a model can read.

Two ways without padding: ``varlen`` lays a chunk's texts end to end in one row and lets each attend to itself alone;
``block`` lays them into rows of about one width and masks the attention across texts. A trial
(:func:`nearfield.encoders.trials.packing_kind`) tells which of them a model supports; a model that gives other numbers than with
padding is padded.

A model has limits: positions of a text and words of its tokenizer. Beyond them it reads past its tables. A static model
has a table of its tokens' vectors and takes their mean: no transformer, no padding, no mask. Its tokenizer cuts texts, or nothing
does. sentence-transformers' ``StaticEmbedding`` takes a batch's tokens in one row and where each text begins; :func:`bag` makes that
of the rows with a mask that are used everywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nearfield.arrays import Tokens
from nearfield.encoders.kernels import Segments, unmasked
from nearfield.errors import BadInputError

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
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""The names of tables of positions in architectures."""


def longest_input(model: SentenceTransformer) -> int | None:
    """The most tokens that the model reads of a text; None where it reads all."""
    limit = longest_static(model) if is_static(model) else model.max_seq_length
    return None if limit is None or limit >= NO_LIMIT else int(limit)


def text_part(model: SentenceTransformer) -> Any:
    """The transformer that reads texts; None where the model has none, or one of images and texts together."""
    from torch import nn

    transformer = getattr(model[0], "auto_model", None)
    if isinstance(transformer, nn.Module) and "image" in (getattr(model[0], "modality_config", None) or {}):
        return getattr(transformer, "text_model", None)
    return transformer if isinstance(transformer, nn.Module) else None


def _rows_of(table: Any) -> int | None:
    """How many rows a table has; None for what is none. I-BERT has a kind of its own, which does not say it."""
    rows: Any = getattr(table, "num_embeddings", None)
    weight: Any = getattr(table, "weight", None)
    if rows is None and "Embedding" in type(table).__name__ and getattr(weight, "ndim", 0) == 2:
        rows = weight.shape[0]
    return rows if isinstance(rows, int) else None


def counts_from_padding(embeddings: Any) -> bool:
    """Whether a module of embeddings numbers positions from behind the padding token's number, as RoBERTa and models like it do."""
    if not isinstance(getattr(embeddings, "padding_idx", None), int):
        return False
    table = getattr(embeddings, "position_embeddings", None)
    return _rows_of(table) is not None and getattr(table, "padding_idx", None) is not None


def usable_positions(model: SentenceTransformer) -> int | None:
    """The longest text that the model has a position for at each token; None where it has no table of positions.

    In RoBERTa and models like it they are fewer than the config says: positions are counted from behind the padding token's number.
    """
    transformer = text_part(model)
    if transformer is None:
        return None
    lengths = []
    for name, module in transformer.named_modules():
        owner, _, last = name.rpartition(".")
        rows = _rows_of(module) if last in _POSITIONS else None
        if rows is None:
            continue
        parent = transformer.get_submodule(owner)
        before = int(parent.padding_idx) + 1 if counts_from_padding(parent) else int(getattr(module, "offset", 0))
        lengths.append(rows - before)
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


def table_rows(model: SentenceTransformer) -> int | None:
    """How many words the model's table has; None where its words are no rows of a table."""
    transformer = text_part(model)
    try:
        table = transformer.get_input_embeddings() if transformer is not None else None
    except (AttributeError, NotImplementedError):  # as CANINE, which hashes characters
        return None
    return _rows_of(table)


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


def whole_dimension(model: SentenceTransformer) -> int:
    """The width of what the modules give, also of a model that says that it is truncated."""
    with model.truncate_embeddings(None):
        return int(model.get_embedding_dimension() or 0)


Features = dict[str, Any]
"""The input of :func:`embed` for n texts."""
PackingKind = Literal["block", "varlen"]

ROW_TOKENS = {"cpu": 128, "cuda": 512}
"""Width of packed rows: on a CPU attention across texts, which the mask throws away, soon costs more than padding."""


@dataclass(frozen=True)
class TokenTypes:
    """The kinds that a tokenizer gives to a text's tokens and to those that it puts around it: XLNet's ``<cls>`` is of kind 2."""

    before: tuple[int, ...]
    inside: int
    behind: tuple[int, ...]
    padding: int

    @classmethod
    def of(cls, tokenizer: Any) -> TokenTypes | None:
        """Of a tokenizer that says kinds other than 0, by trial."""
        if "token_type_ids" not in getattr(tokenizer, "model_input_names", ()):
            return None
        trial = tokenizer("a text of some words", return_special_tokens_mask=True)
        kinds, special = trial.get("token_type_ids"), trial.get("special_tokens_mask")
        if not kinds or not any(kinds) or not special or all(special):
            return None
        first, last = special.index(0), len(special) - special[::-1].index(0)
        return cls(tuple(kinds[:first]), kinds[first], tuple(kinds[last:]), int(tokenizer.pad_token_type_id))

    def row(self, length: int) -> Tokens:
        """Those of a text of so many tokens, the ones around it included."""
        inside = max(0, length - len(self.before) - len(self.behind))
        return np.array([*self.before, *[self.inside] * inside, *self.behind], dtype=np.int32)[:length]


@dataclass(frozen=True)
class Padding:
    """How a model's texts are padded."""

    pad_token: int
    side: str = "right"
    width: int | None = None
    """Every text becomes as long, where the model was made so; null pads to a chunk's longest."""
    masked: bool = True
    """Whether the model is told which tokens are padding. One whose texts are all as long may read it as words."""
    types: TokenTypes | None = None
    """The tokenizer's kinds of tokens, where they are not all of kind 0."""

    @classmethod
    def of(cls, model: SentenceTransformer) -> Padding:
        """That of a model's own preprocessing."""
        tokenizer: Any = model.tokenizer
        pad, side = getattr(tokenizer, "pad_token_id", None) or 0, getattr(tokenizer, "padding_side", "right")
        types = TokenTypes.of(tokenizer)
        text = (getattr(model[0], "processing_kwargs", None) or {}).get("text", {})
        if text.get("padding") != "max_length":
            return cls(pad, side, types=types)
        width = text.get("max_length") or tokenizer.model_max_length
        return cls(pad, side, int(width), "attention_mask" in tokenizer.model_input_names, types)

    def features(self, rows: Sequence[Tokens], device: torch.device, prompt_length: int) -> Features:
        """The input of :func:`embed` for n texts."""
        features = padded_features(
            rows, pad_token=self.pad_token, side=self.side, device=device, prompt_length=prompt_length, width=self.width
        )
        if self.types is not None:
            kinds, _ = rectangle([self.types.row(len(row)) for row in rows], self.types.padding, self.side, self.width)
            features["token_type_ids"] = torch.from_numpy(kinds).to(device)
        return features if self.masked else {**features, "unmasked": True}


def padded_features(
    rows: Sequence[Tokens],
    *,
    pad_token: int,
    side: str,
    device: torch.device,
    prompt_length: int,
    width: int | None = None,
) -> Features:
    """The padded token ids and the attention mask of n texts, (n, longest) int64 each, and their prompt's length.

    The length is of use to poolings that leave the prompt out; these need texts of one prompt.
    """
    ids, mask = rectangle(rows, pad_token, side, width)
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
        "prompt_length": prompt_length,
    }


def rectangle(
    rows: Sequence[npt.NDArray[Any]], fill: int, side: str = "right", width: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of unlike length as one array, (n, longest) int64, and a mask of which of its places are a row's own.

    It is ``width`` wide at least, and 1: a model has no answer for no tokens at all.
    """
    width = max(width or 0, 1, *(len(row) for row in rows))
    values = np.full((len(rows), width), fill, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for line, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        values[line, span] = row
        mask[line, span] = 1
    return values, mask


def pack_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Bin texts into rows of at most ``width`` tokens (or the longest text's): first fit, longest first.

    Returns the texts of each row. The same lengths always give the same rows.
    """
    width = max(width, *lengths)
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((number for number, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            bins.append([index])
            room.append(width - lengths[index])
        else:
            bins[place].append(index)
            room[place] -= lengths[index]
    return bins


def packed_features(
    rows: Sequence[Tokens],
    *,
    kind: PackingKind,
    device: torch.device,
    prompt_length: int,
    width: int | None = None,
    pad_token: int = 0,
) -> Features:
    """The input of :func:`embed` for n texts without padding.

    ``width`` is that of ``block`` rows, by default the device's. ``attention_mask`` (n, longest) says where the tokens
    of each text belong; ``token_targets`` (tokens,) where in that rectangle each token goes, ``token_sources`` where in
    the packed rows it comes from.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    features: Features = {"prompt_length": prompt_length}
    if kind == "varlen":
        packed = [list(range(len(rows)))]
        features["segments"] = Segments(tuple(lengths), device)
    else:
        packed = pack_rows(lengths, ROW_TOKENS.get(device.type, 512) if width is None else width)
    ids, real = rectangle([np.concatenate([rows[i] for i in texts]) for texts in packed], pad_token)
    positions, _ = rectangle([np.concatenate([np.arange(lengths[i]) for i in texts]) for texts in packed], 0)
    order = [i for texts in packed for i in texts]
    targets = np.concatenate([i * longest + np.arange(lengths[i]) for i in order])
    mask = np.arange(longest)[None, :] < np.asarray(lengths)[:, None]
    arrays = {"input_ids": ids, "position_ids": positions, "attention_mask": mask.astype(np.int64)}
    if kind == "block":
        # Padding at a row's end has a segment of its own, so that no query is without a key.
        arrays["text_ids"], _ = rectangle([np.repeat(texts, [lengths[i] for i in texts]) for texts in packed], -1)
        arrays["token_sources"] = np.flatnonzero(real)
    arrays["token_targets"] = targets
    features |= {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return features


def packed_tokens(features: Features) -> tuple[int, int]:
    """The real tokens of a chunk, and those that are computed, padding included."""
    return int(features["attention_mask"].sum()), features["input_ids"].numel()


def embed(model: SentenceTransformer, features: Features) -> Tensor:
    """(n, d) embeddings of n texts, in their order, from padded or packed features; of as many dimensions as the model says."""
    if "token_targets" not in features:
        given = bag(features) if is_static(model) else _given(features)
        return truncated(model, model(given)["sentence_embedding"])
    return truncated(model, pool(model, token_states(model, features))["sentence_embedding"])


def truncated(model: SentenceTransformer, embeddings: Tensor) -> Tensor:
    """The dimensions of (n, d) embeddings that the model keeps: all, but for a model that says that it is truncated."""
    return embeddings[:, : model.truncate_dim]


def _given(features: Features) -> Features:
    """The part of padded features that the model is told."""
    hidden = ("unmasked", "attention_mask") if features.get("unmasked") else ()
    return {name: value for name, value in features.items() if name not in hidden}


def token_states(model: SentenceTransformer, features: Features) -> Features:
    """The input of poolings for n texts: ``token_embeddings`` (n, longest, d) and which of them are a text's own."""
    if "token_targets" not in features:
        states_of: Features = model[0](_given(features))
        return states_of
    transformer = model[0].auto_model
    mask = unmasked(features["input_ids"].device) if "segments" in features else _block_masks(transformer, features)
    extra = {"segments": features["segments"]} if "segments" in features else {}
    output = transformer(
        input_ids=features["input_ids"],
        position_ids=_positions(transformer, features),
        attention_mask=mask,
        return_dict=True,
        **extra,
    )
    states: Features = {
        "token_embeddings": _unpacked(output.last_hidden_state, features),
        "attention_mask": features["attention_mask"],
        "prompt_length": features["prompt_length"],
    }
    if getattr(transformer.config, "output_hidden_states", False):
        states["all_layer_embeddings"] = tuple(_unpacked(hidden, features) for hidden in output.hidden_states)
    return states


def pool(model: SentenceTransformer, states: Features) -> Features:
    """The modules behind the transformer: ``sentence_embedding`` (n, d), and ``pooled``, what it was before heads and norms."""
    states = dict(states)
    for module in list(model)[1:]:
        states = module(states)
        if "sentence_embedding" in states:
            states.setdefault("pooled", states["sentence_embedding"])
    return states


def _unpacked(hidden: Tensor, features: Features) -> Tensor:
    """(n, longest, d) from packed hidden states."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if "token_sources" in features:
        flat = flat.index_select(0, features["token_sources"])
    count, longest = features["attention_mask"].shape
    spread = flat.new_zeros((count * longest, flat.shape[1])).index_copy(0, features["token_targets"], flat)
    return spread.view(count, longest, -1)


def _positions(transformer: nn.Module, features: Features) -> Tensor:
    """The position of each packed token, as the architecture numbers those of its text alone.

    RoBERTa and models like it count from behind the padding token's number, and leave out that token wherever it stands.
    """
    positions: Tensor = features["position_ids"]
    embeddings: Any = getattr(transformer, "embeddings", None)
    if not counts_from_padding(embeddings):
        return positions
    counted = (features["input_ids"] != embeddings.padding_idx).long()
    sums = counted.cumsum(dim=1)
    before = (sums - counted).masked_fill(positions != 0, 0).cummax(dim=1).values
    numbered: Tensor = (sums - before) * counted + int(embeddings.padding_idx)
    return numbered


def _block_masks(transformer: nn.Module, features: Features) -> Tensor | dict[str, Tensor]:
    """(rows, 1, width, width) bool: which keys each query sees; one mask a kind of layer where the model has several."""
    config: Any = transformer.config
    texts, positions = features["text_ids"], features["position_ids"]
    full: Tensor = texts[:, :, None] == texts[:, None, :]
    made_causal = _made_causal(transformer)
    causal = getattr(config, "is_causal", made_causal)
    if causal:
        width = texts.shape[1]
        full &= torch.ones((width, width), dtype=torch.bool, device=texts.device).tril()
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        return full[:, None]
    # Causal windows count the token itself, others do not.
    radius = window - 1 if causal else window
    distance = (positions[:, :, None] - positions[:, None, :]).abs()
    sliding: Tensor = full & (distance <= radius)
    if types is None:
        return sliding[:, None]
    return {"full_attention": full[:, None], "sliding_attention": sliding[:, None]}


def _made_causal(transformer: nn.Module) -> bool:
    """Whether the model's attention was made to look back only."""
    return any(bool(getattr(module, "is_causal", False)) for module in transformer.modules())


def rounding(module: nn.Module) -> float:
    """How far apart, relative to the largest, values may lie that only rounding sets apart: sums in another order, another kernel.

    Rounding grows from layer to layer (to 1.3e-4 in float32 in a trained decoder of thirty); what is read wrongly differs by
    about the size of the values.
    """
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return 0.05 if dtype in (torch.float16, torch.bfloat16) else 2e-3


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def placed(model: nn.Module, features: Features, device: torch.device) -> Features:
    """Features on a device, their numbers in the type of a model's weights."""
    # Of a base in 4 bits some parameters are no numbers.
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


TARGETS = "token_targets_of_task"
"""The key under which features hold what a task on tokens is to predict."""
TextKey = tuple[int, int, int, int]
"""(seed, step, item, prompt) of a text."""
HideTokens = Callable[
    [Sequence[Tokens], Sequence[TextKey], Sequence[bool], int, str, torch.device], tuple[list[Tokens], Any]
]
"""(rows of tokens, key of each, whether it is chosen, the prompt's length, side of padding, device) -> the rows that the
encoder reads, and the targets."""


class TokenTask(nn.Module):
    """A task on the tokens of texts, whose losses go the way of embeddings: behind the embedding of each text."""

    hide: HideTokens
    columns: int
    """How many numbers stand behind a text's embedding: a sum and a count for each loss."""

    def forward(self, model: SentenceTransformer, features: Features) -> Tensor:
        """Features of n texts with their targets -> (n, d + columns)."""
        raise NotImplementedError


MakeTokenTask = Callable[["SentenceTransformer", str, int], TokenTask]
"""(model, the place of the base's weights, seed) -> the task."""
