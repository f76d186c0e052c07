"""Texts as tokens -> what an encoder takes -> one vector a text, padded or without padding.

Two ways without padding: ``varlen`` lays a chunk's texts end to end in one row and lets each attend to itself alone;
``block`` lays them into rows of about one width and masks the attention across texts. A trial
(:func:`packing_kind`) tells which of them a model supports; a model that gives other numbers than with padding is padded.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nearfield.encoders.kernels import Segments, has_flash_attn, set_attention, unmasked
from nearfield.encoders.limits import (
    bag,
    counts_from_padding,
    is_static,
    longest_input,
    stated_positions,
    usable_positions,
)
from nearfield.encoders.private import attention_kernel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.encoders")

Tokens = npt.NDArray[np.int32]
Features = dict[str, Any]
"""The input of :func:`embed` for n texts."""
PackingKind = Literal["block", "varlen"]

ROW_TOKENS = {"cpu": 128, "cuda": 512}
"""Width of packed rows: on a CPU attention across texts, which the mask throws away, soon costs more than padding."""

# Sliding windows too long to try out are trusted only where the layers that have one are known to be read rightly.
_KNOWN_WINDOWS = ("mistral", "modernbert", "qwen2", "qwen3")
_TRIAL_LENGTHS = (7, 1, 40, 2, 1, 33, 16, 1)
_LONGEST_TRIAL = 512


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


def packing_kind(
    model: SentenceTransformer, device: torch.device, *, bf16: bool = False, longest: int | None = None
) -> PackingKind | None:
    """How this model can be fed without padding: found by comparing it, on a few texts, with padding; else None.

    Call it with the model on its device, before it is wrapped for several devices; ``bf16`` says that it will run under
    autocast, ``longest`` that no text has more tokens than so many. A model that supports ``varlen`` is left with :mod:`nearfield.encoders.kernels` in place, which treats
    padded calls as before and leaves no trace in saved files.
    """
    transformer = getattr(model[0], "auto_model", None)
    modalities = getattr(model[0], "modality_config", None) or {}
    reads = modalities.get("text", {})
    plain = reads.get("method") == "forward" and reads.get("method_output_name") in (
        "last_hidden_state",
        ("last_hidden_state",),
        ["last_hidden_state"],
    )
    # A prefix stands in padded rows: packed texts would pass it by.
    prefixed = bool(getattr(model[0], "prefix_length", 0))
    # Tokens of an image have places of their own, which packed rows do not know.
    with_image = "image" in modalities
    # Packed rows say nothing of kinds of tokens.
    typed = TokenTypes.of(model.tokenizer) is not None
    if (
        transformer is None
        or prefixed
        or with_image
        or typed
        or not plain
        or not _windows_known(model, transformer, longest)
    ):
        return None
    half = bf16 or next(transformer.parameters()).dtype in (torch.float16, torch.bfloat16)
    kinds: list[PackingKind] = ["block"]
    if device.type == "cpu" or (half and (has_flash_attn() or not _attention_dropout(transformer))):
        kinds.insert(0, "varlen")
    for kind in kinds:
        before = attention_kernel(transformer.config)
        try:
            if kind == "varlen":
                set_attention(transformer)
            agrees = _agrees(model, device, kind, bf16)
        except Exception as error:  # a model that was not made for this may fail anyhow; it is then padded
            logger.debug("%s packing failed: %s", kind, error)
            agrees = False
        if agrees:
            return kind
        if attention_kernel(transformer.config) != before:
            transformer.set_attn_implementation(before)
    logger.info("This model's texts are padded: packed they do not give the same embeddings.")
    return None


def _attention_dropout(transformer: nn.Module) -> float:
    """By the config, or by what modules say where a training has set another."""
    names = ("attention_probs_dropout_prob", "attention_dropout")
    rates = [getattr(owner, name, 0.0) for owner in (transformer.config, *transformer.modules()) for name in names]
    return max(float(rate) for rate in rates if isinstance(rate, (int, float)))


def _windows_known(model: SentenceTransformer, transformer: nn.Module, most: int | None) -> bool:
    """Whether texts are no longer than the window of attention, or a trial can show what packed rows make of it."""
    config: Any = transformer.config
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    reads = longest_input(model) or stated_positions(model) or 0
    longest = reads if most is None else min(reads or most, most)
    return window is None or window >= longest or window + 2 <= _LONGEST_TRIAL or config.model_type in _KNOWN_WINDOWS


def _trial_texts(model: SentenceTransformer, transformer: nn.Module) -> list[Tokens]:
    limits = [longest_input(model), usable_positions(model), stated_positions(model), _LONGEST_TRIAL]
    longest = min(limit for limit in limits if limit)
    window = getattr(transformer.config, "sliding_window", None) or 0
    lengths = [min(length, longest) for length in (*_TRIAL_LENGTHS, *([window + 2] if window else []))]
    bounds = np.cumsum([0, *lengths])
    tokens = random_tokens(transformer, int(bounds[-1]))
    pad = getattr(transformer.config, "pad_token_id", None)
    if pad is not None and 0 <= pad < int(transformer.get_input_embeddings().num_embeddings):  # type: ignore[operator]
        # A text may have the padding word among its own, and some architectures number positions by it.
        tokens = tokens.copy()
        tokens[[*bounds[2:4], *(bounds[2:4] - 3)]] = pad
    return [tokens[start:end] for start, end in itertools.pairwise(bounds)]


def rounding(module: nn.Module) -> float:
    """How far apart, relative to the largest, values may lie that only rounding sets apart: sums in another order, another kernel.

    Rounding grows from layer to layer (to 1.3e-4 in float32 in a trained decoder of thirty); what is read wrongly differs by
    about the size of the values.
    """
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return 0.05 if dtype in (torch.float16, torch.bfloat16) else 2e-3


def random_tokens(transformer: nn.Module, count: int) -> Tokens:
    """Words of the model's vocabulary to try it out with, the same ones each time, none of them padding."""
    size = int(transformer.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    pad = getattr(transformer.config, "pad_token_id", None)
    ids = np.array([token for token in range(min(size, 5000)) if token != pad], dtype=np.int32)
    random = np.random.default_rng(0)
    return np.concatenate([random.permutation(ids) for _ in range(-(-count // len(ids)))])[:count]


def _agrees(model: SentenceTransformer, device: torch.device, kind: PackingKind, bf16: bool) -> bool:
    """Whether packed embeddings equal those of each text alone, as nearly as padded ones do."""
    texts = _trial_texts(model, model[0].auto_model)
    padding, prompt = Padding.of(model), 3

    def padded(rows: Sequence[Tokens]) -> Tensor:
        return embed(model, padding.features(rows, device, prompt))

    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    with torch.no_grad(), torch.random.fork_rng(), evaluating(model), autocast:
        alone = torch.cat([padded([text]) for text in texts]).double()
        together = padded(texts).double()
        features = packed_features(texts, kind=kind, device=device, prompt_length=prompt, pad_token=padding.pad_token)
        packed = embed(model, features).double()
    finite = alone.isfinite() & together.isfinite()
    if not torch.equal(packed.isfinite(), finite):
        return False
    alone, together, packed = (torch.where(finite, tensor, 0.0) for tensor in (alone, together, packed))
    scale = float(alone.abs().max())
    noise = float((together - alone).abs().max())
    half = bf16 or next(model[0].auto_model.parameters()).dtype in (torch.float16, torch.bfloat16)
    # Stricter than `rounding`: here nothing is refused, texts are only padded.
    if noise > scale * (0.05 if half else 1e-4):
        return False
    return float((packed - alone).abs().max()) <= max(3 * noise, scale * 1e-4)


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


def leads_to(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors with a gradient that the graph of some outputs leads to; no gradient is computed."""
    ends: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    used: set[int] = set()
    while ends:
        node = ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        ends += [before for before, _ in node.next_functions]
    return used
