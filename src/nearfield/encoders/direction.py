"""Which way a decoder's tokens look: back only, as it was made, or over the whole text.

transformers builds a model's masks and calls its kernels by ``config.is_causal``, which is saved with the model, so that
a plain ``SentenceTransformer(folder)`` reads it. Some architectures heed it in some kernels only, or not at all: a model
that is to look both ways is tried out each time it is loaded (LLM2Vec, arXiv 2404.05961; NV-Embed, arXiv 2405.17428).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfield.encoders.packing import Padding, evaluating, random_tokens, rounding
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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
            complaint = _first_sees_last(model) if causal else _complaint(model)
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
            f"({transformer.config._attn_implementation}) does not heed the setting.",
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


def _first_sees_last(model: SentenceTransformer) -> str | None:
    short, other, long = _texts(model)
    for beside, how in (([], "alone"), ([long], "beside a longer one")):
        first, changed = _first_token(model, [short, *beside]), _first_token(model, [other, *beside])
        if float((first - changed).abs().max()) > 1e-6 * float(first.abs().max()):
            return f"the first token of a text that is encoded {how} sees the last one"
    return None


def _complaint(model: SentenceTransformer) -> str | None:
    transformer = model[0].auto_model
    short, other, long = _texts(model)
    for beside, how in (([], "alone"), ([long], "beside a longer one")):
        first, changed = _first_token(model, [short, *beside]), _first_token(model, [other, *beside])
        if not float((first - changed).abs().max()) > 1e-6 * float(first.abs().max()):
            return f"the first token of a text that is encoded {how} does not see the last one"
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
    used = transformer.config._attn_implementation
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
    used = transformer.config._attn_implementation
    other: str | None = "sdpa" if used == "eager" else "eager"
    try:
        transformer.set_attn_implementation(other)
    except ValueError:  # an architecture with one attention function
        other = None
    try:
        yield other
    finally:
        if transformer.config._attn_implementation != used:
            transformer.set_attn_implementation(used)
