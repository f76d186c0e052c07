"""Trials of a model as it is loaded: its vectors come from their item alone, its tokens have rows and positions and look the right
way; and whether it can be fed without padding.

transformers builds a decoder's masks and calls its kernels by ``config.is_causal``, which is saved with the model, so that a plain
``SentenceTransformer(folder)`` reads it. Some architectures heed it in some kernels only, or not at all: a model that is to look
both ways is tried out each time it is loaded (LLM2Vec, arXiv 2404.05961; NV-Embed, arXiv 2405.17428).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.arrays import Tokens
from nearfield.data.images import pillow
from nearfield.encoders.images import blank_image, family_of, trial_embedding
from nearfield.encoders.kernels import has_flash_attn, set_attention
from nearfield.encoders.packing import (
    PackingKind,
    Padding,
    TokenTypes,
    embed,
    evaluating,
    longest_input,
    packed_features,
    placed,
    rounding,
    stated_positions,
    table_rows,
    text_part,
    usable_positions,
)
from nearfield.encoders.private import attention_kernel
from nearfield.encoders.transformer import leads_to
from nearfield.errors import BadInputError, Notice

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer


logger = logging.getLogger("nearfield.encoders")


def trial_embeddings(model: SentenceTransformer) -> list[Tensor]:
    """The embeddings of a text and an image, each where the model takes them, with their graph."""
    with torch.enable_grad(), torch.random.fork_rng(), evaluating(model):
        if family_of(model) is not None:
            return [trial_embedding(model)]
        takes: dict[str, Callable[[], Any]] = {"text": lambda: "a text of some words", "image": blank_image}
        unknown = [each for each in model.modalities if isinstance(each, str) and each not in (*takes, "message")]
        if unknown:
            raise ValueError(f"no trial of {unknown[0]}")
        items = [item() for modality, item in takes.items() if modality in model.modalities]
        return [
            model(placed(model, model.preprocess([item], **task), model.device), **task)["sentence_embedding"]
            for item in items
            for task in _tasks(model)
        ]


def trial_scores(model: CrossEncoder) -> list[Tensor]:
    """The scores of a pair of texts by a cross-encoder, with their graph."""
    with torch.enable_grad(), torch.random.fork_rng(), evaluating(model):
        return [model(placed(model, model.preprocess([("a text", "another text")]), model.device))["scores"]]


def draws_dropout(model: SentenceTransformer) -> bool:
    """Whether a text has another embedding each time that it is encoded in training."""
    was, embeddings = model.training, []
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for seed in (0, 1):
                torch.manual_seed(seed)
                features = placed(model, model.preprocess(["a text of some words"]), model.device)
                embeddings.append(model(features)["sentence_embedding"])
    finally:
        model.train(was)
    return not torch.equal(*embeddings)


def unused_parameters(model: SentenceTransformer, part: nn.Module | None = None) -> list[nn.Parameter]:
    """Trained parameters of a model, or a part of it, that no embedding depends on; no gradient is computed."""
    used = leads_to(trial_embeddings(model))
    return [each for each in (part or model).parameters() if each.requires_grad and id(each) not in used]


def freeze_unused(model: SentenceTransformer) -> None:
    """Take the gradient from parameters of a model of images that its embeddings do not depend on, found by trial.

    Such are the head that a vision model was pretrained with, and the layer before it.
    """
    tower = dict(getattr(model[0], "sub_modules", None) or {}).get("image")
    if tower is not None or family_of(model) is not None:
        for parameter in unused_parameters(model, tower):
            parameter.requires_grad_(False)


_TEXTS = ["the vectors of texts", "the vectors of texts that are read together are those of each alone and of no other"]
_SIDE = 64


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


def check_words(model: SentenceTransformer, name: str) -> tuple[Notice, ...]:
    """Refuse a tokenizer without a padding token, or whose padding or enclosing tokens have no row in the model's table.

    sentence-transformers cannot run such a model. Words that only stand in some texts and have no row are a notice.
    """
    tokenizer: Any = model.tokenizer if hasattr(model[0], "tokenizer") else None
    if tokenizer is None or not hasattr(tokenizer, "pad_token_id") or text_part(model) is None:
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


FIXED_WIDTH = ("siglip", "siglip_text_model")
"""Architectures that are made for texts of one width, where their processor does not say so by itself."""


def pad_as_processor(model: SentenceTransformer) -> None:
    """Pad texts as the model's own processor does: sentence-transformers pads them to the longest of a batch.

    SigLIP's text tower takes the last position, padding or not, and was trained on texts of one width (as mteb's own loader
    gives it). The setting is saved with the model, so that plain sentence-transformers pads alike.
    """
    module: Any = model[0]
    settings = getattr(module, "processing_kwargs", None)
    if settings is None or not hasattr(module, "config") or "padding" in settings.get("text", {}):
        return
    text_settings = dict(getattr(type(module.processor), "text_kwargs", None) or {})
    if text_settings.get("padding") != "max_length" and module.config.model_type not in FIXED_WIDTH:
        return
    width = text_settings.get("max_length")
    limit = longest_input(model)
    if width is None and limit is None:
        return
    if width is not None and (limit is None or limit > width):
        model.max_seq_length = width
    module.processing_kwargs = {**settings, "text": {**settings.get("text", {}), "padding": "max_length"}}


_UNLIKE = "images of unlike sizes"


def try_company(model: SentenceTransformer, name: str) -> tuple[Notice, ...]:
    """Embed texts, and images, alone and together, as sentence-transformers does; what differs is a notice.

    Raises :class:`BadInputError` where sentence-transformers cannot embed them at all.
    """
    if family_of(model) is not None:
        return ()  # these are tried out with images and texts in one row
    notices, dependent = [], set()
    for what, items in _items(model).items():
        try:
            with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
                apart = max(_apart(model, items, task) for task in _tasks(model))
        except Exception as error:
            if model.get_model_kwargs() or what == _UNLIKE:
                continue  # it wants to be told more than items, or images of one size
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BadInputError(
                f"sentence-transformers cannot embed {what} with this model: {reason}", where=name
            ) from error
        if not apart <= rounding(model) and not (what == _UNLIKE and "images" in dependent):
            dependent.add(what)
            notices.append(
                Notice(
                    "batch-dependent",
                    f"{name} gives {what} other vectors in company than alone (by {apart:.2g} of the largest value): scores "
                    "depend on how items are cut into batches",
                    "Its architecture reads padding or other items; use one that does not, or compare scores of equal batches "
                    "only.",
                )
            )
    return tuple(notices)


def _tasks(model: SentenceTransformer) -> tuple[dict[str, str], ...]:
    """The arguments of the model about an item: nothing, or each side in turn where these go different ways."""
    routes = getattr(model[0], "sub_modules", None) or {}
    return tuple({"task": task} for task in ("query", "document") if task in routes) or ({},)


def _apart(model: SentenceTransformer, items: list[Any], task: dict[str, str]) -> float:
    """How far the vectors of some items alone are from those together, by the largest value of any."""
    together = _embedded(model, items, task)
    alone = torch.cat([_embedded(model, [item], task) for item in items])
    return float((alone - together).abs().max() / alone.abs().max().clamp(min=1e-12))


def _items(model: SentenceTransformer) -> dict[str, list[Any]]:
    """The items that the model is tried out with, by name: a short and a long one of each kind that it takes."""
    taken: Sequence[Any] = model.modalities
    items: dict[str, list[Any]] = {}
    if "text" in taken or not taken:
        items["texts"] = list(_TEXTS)
    if "image" in taken:
        random = np.random.default_rng(0)
        pixels = [random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8) for _ in range(2)]
        images = [pillow().fromarray(each) for each in pixels]
        # A processor may pad images to the largest of a batch.
        items |= {"images": images, _UNLIKE: [images[0], images[1].resize((_SIDE + 32, _SIDE - 16))]}
    return items


def _embedded(model: SentenceTransformer, items: list[Any], task: dict[str, str]) -> Tensor:
    features = model.preprocess(items, **task)
    output = model({k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}, **task)
    if "sentence_embedding" not in output:
        raise ValueError("it has no pooling, so each token gets a vector and the whole none")
    vectors: Tensor = output["sentence_embedding"]
    return vectors.double()


_SHORT = 4
_LONG = 24
_LONGEST = 512


def check_claimed_direction(model: SentenceTransformer, where: str) -> None:
    """Try out a decoder whose config says that it was made bidirectional; other models are taken as they are."""
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    if getattr(config, "is_causal", None) is False:
        check_direction(model, False, where)


def set_direction(model: SentenceTransformer, causal: bool, where: str) -> None:
    """Let tokens look back only, or over the whole text, and try it out (:func:`check_direction`)."""
    transformer = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise BadInputError("this model has no transformer whose attention could be set", where="encoder.attention")
    transformer.config.is_causal = causal
    check_direction(model, causal, where)


def check_direction(model: SentenceTransformer, causal: bool, where: str) -> None:
    """Refuse a model whose tokens do not look the way that its config says.

    Bidirectional means: the hidden state of a text's first token depends on its last token, alone, beside a longer text
    and in every layer; padding changes nothing; eager attention gives what the fast kernel gives. Causal means: it depends
    on the last token neither alone nor beside a longer text.
    """
    transformer = model[0].auto_model
    with torch.random.fork_rng(), evaluating(model):
        try:
            complaint = _wrong_direction(model, causal)
        except Exception as error:  # whatever an unknown architecture raises means that it cannot be tried out
            complaint = f"it cannot be tried out ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
    if complaint:
        direction = "causal" if causal else "bidirectional"
        raise BadInputError(
            f"{type(transformer).__name__} is not {direction} with config.is_causal = {causal}: {complaint}",
            where=where,
            hint="Leave out encoder.attention to use the model as it was made."
            if causal
            else "Use encoder.attention: causal, or another version of transformers; its architecture or its kernel "
            f"({attention_kernel(transformer.config)}) does not heed the setting.",
        )


def _hidden(model: SentenceTransformer, rows: list[Any]) -> tuple[Tensor, Tensor]:
    """Hidden states (n, longest, d) of texts as the model pads them, and which of them are of real tokens."""
    transformer = model[0].auto_model
    features = Padding.of(model).features(rows, transformer.device, 0)
    mask = features["attention_mask"]
    with torch.no_grad():
        states = transformer(input_ids=features["input_ids"], attention_mask=mask, return_dict=True).last_hidden_state
    return states.double(), mask.bool()


def _first_token(model: SentenceTransformer, rows: list[Any]) -> Tensor:
    """(d,) the state of the first text's first token."""
    states, real = _hidden(model, rows)
    return states[0][real[0]][0]


def _texts(model: SentenceTransformer) -> tuple[Any, Any, Any]:
    """A short text, the same with another last token, and a long one that reaches past a window of attention."""
    transformer = model[0].auto_model
    window = getattr(transformer.config, "sliding_window", None) or 0
    limit = getattr(transformer.config, "max_position_embeddings", None) or _LONGEST
    long = min(max(_LONG, window + 2), _LONGEST, int(limit))
    tokens = random_tokens(transformer, _SHORT + 1 + long)
    short, other, rest = tokens[:_SHORT], tokens[: _SHORT + 1], tokens[_SHORT + 1 :]
    other = other[[*range(_SHORT - 1), _SHORT]]
    return short, other, rest


def _wrong_direction(model: SentenceTransformer, causal: bool) -> str | None:
    """The reason why a model cannot look back only, or both ways."""
    transformer = model[0].auto_model
    short, other, long = _texts(model)
    for beside, how in (([], "alone"), ([long], "beside a longer one")):
        first, changed = _first_token(model, [short, *beside]), _first_token(model, [other, *beside])
        sees = float((first - changed).abs().max()) > 1e-6 * float(first.abs().max())
        if sees == causal:
            return f"the first token of a text that is encoded {how} {'sees' if sees else 'does not see'} the last one"
    if causal:
        return None
    layer = _blind_layer(transformer, short)
    if layer is not None:
        return f"in layer {layer} the first token does not see the last one"
    tolerance = rounding(transformer)
    together, real = _hidden(model, [short, long])
    alone = [_hidden(model, [text])[0][0] for text in (short, long)]
    for states, keep, single in zip(together, real, alone, strict=True):
        if not _close(states[keep], single, tolerance):
            side = Padding.of(model).side
            return f"a text that is padded on the {side} has other hidden states than alone"
    used = attention_kernel(transformer.config)
    with _other_kernel(transformer) as kernel:
        if kernel is not None and not _close(_hidden(model, [short, long])[0][real], together[real], tolerance):
            return f"attention by {kernel} gives other hidden states than by {used}"
    return None


def _close(states: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((states - wanted).abs().max() <= tolerance * wanted.abs().max())


def _blind_layer(transformer: nn.Module, text: Any) -> int | None:
    """The first layer in which the text's first token gets nothing from its last one: by the layer's own gradient."""
    ids = torch.from_numpy(text).long().to(transformer.device)[None]  # type: ignore[arg-type]
    with torch.enable_grad():
        embeddings = transformer.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        states = transformer(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            output_hidden_states=True,
            return_dict=True,
        ).hidden_states
        for layer, (before, after) in enumerate(itertools.pairwise(states)):
            # Not the plain sum: a norm at the end would make it a constant.
            weights = torch.linspace(-1, 2, after.shape[-1], device=after.device, dtype=after.dtype).sin()
            (gradient,) = torch.autograd.grad((after[0, 0] * weights).sum(), before, retain_graph=True)
            if not bool(gradient[0, -1].abs().max() > 0):
                return layer
    return None


@contextlib.contextmanager
def _other_kernel(transformer: Any) -> Iterator[str | None]:
    """Another attention function than the model's own for the time of a block; None where it has no other."""
    used = attention_kernel(transformer.config)
    other: str | None = "sdpa" if used == "eager" else "eager"
    try:
        transformer.set_attn_implementation(other)
    except ValueError:  # an architecture with one attention function
        other = None
    try:
        yield other
    finally:
        if attention_kernel(transformer.config) != used:
            transformer.set_attn_implementation(used)


# Sliding windows too long to try out are trusted only where the layers that have one are known to be read rightly.
_KNOWN_WINDOWS = ("mistral", "modernbert", "qwen2", "qwen3")


_TRIAL_LENGTHS = (7, 1, 40, 2, 1, 33, 16, 1)


_LONGEST_TRIAL = 512


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
