"""Options of the model in training: frozen parameters, activation checkpointing, compiling."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

logger = logging.getLogger("nearfield.training")


def freeze_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]], patterns: Sequence[str]) -> list[str]:
    """Take the gradient from all parameters whose name a pattern matches (``*``, ``?``, ``[...]``); return their names.

    Raises :class:`BadInputError` for a pattern that matches nothing, and where nothing is left to train.
    """
    parameters = dict(named_parameters)
    frozen: dict[str, None] = {}
    for position, pattern in enumerate(patterns):
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            raise BadInputError(
                f"the pattern {pattern!r} matches no parameter of the model",
                where=f"training.freeze.{position}",
                hint=f"A pattern is for the whole name. Nearest: {', '.join(_nearest(pattern, list(parameters)))}.",
            )
        frozen.update(dict.fromkeys(matched))
    for name in frozen:
        parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise BadInputError(
            "these patterns freeze every parameter, so that nothing is trained",
            where="training.freeze",
            hint=f"The model has {len(parameters)} parameters, such as {next(iter(parameters))!r}.",
        )
    return list(frozen)


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The names that look most like a pattern: first those that hold its text, then the close ones."""
    text = pattern.replace("*", "").strip(".").lower()
    holding = [name for name in names if text and text in name.lower()]
    close = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, text, name.lower(), False).ratio())
    return list(dict.fromkeys([*holding, *close]))[:3]


def transformer_of(model: SentenceTransformer, setting: str) -> PreTrainedModel:
    """The transformers model inside; :class:`BadInputError` for a model that has none, where ``setting`` needs one."""
    transformer = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise BadInputError(
            f"{setting} needs a transformer, and the model's first module is a {type(model[0]).__name__}",
            where=f"training.{setting}",
        )
    return transformer


def enable_checkpointing(model: SentenceTransformer) -> None:
    """Let each layer keep its input alone and be computed again in the backward pass, with the dropout it had."""
    transformer = transformer_of(model, "gradient_checkpointing")
    if not transformer.supports_gradient_checkpointing:
        raise BadInputError(
            f"{type(transformer).__name__} cannot compute its layers again", where="training.gradient_checkpointing"
        )
    # Reentrant checkpointing loses the gradient of a model whose inputs need none, as embedding layers' do not.
    settings = {"use_reentrant": False}
    if hasattr(transformer, "activation_checkpointing_enable"):
        transformer.activation_checkpointing_enable(settings)
    else:  # its name before transformers 5.24
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def set_attention_dropout(model: SentenceTransformer, rate: float) -> None:
    """Let attention leave out so many of its weights in training. The model's config, which is saved, keeps its own rate."""
    transformer = transformer_of(model, "attention_dropout")
    changed = False
    for module in transformer.modules():
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            part = getattr(module, name, None)
            # Where a plain ``dropout`` is one of attention, the module has queries beside it.
            if name == "dropout" and not any(hasattr(module, query) for query in ("query", "q_lin", "q")):
                continue
            if isinstance(part, nn.Dropout):
                part.p, changed = rate, True
            elif isinstance(part, float):
                setattr(module, name, rate)
                changed = True
    if not changed:
        raise BadInputError(
            f"it is not clear where {type(transformer).__name__} drops out attention",
            where="training.attention_dropout",
            hint="Leave it null.",
        )


def set_training_mode(model: SentenceTransformer, *, dropout: bool) -> None:
    """Put the model into training mode, with or without its dropout.

    transformers computes a layer again only if the layer is in training mode: without dropout the layers are, and
    their parts are not, which is where dropout is drawn.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(dropout)
    if not dropout:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True


def compile_transformer(model: SentenceTransformer) -> None:
    """Compile the transformer's layers in place, for any length; names of parameters and the saved model do not change.

    Layer by layer, since sentence-transformers calls the transformer's ``forward`` and so passes by what
    ``Module.compile`` of the whole would set, and since layers alike are compiled once. Dropout is drawn by torch's own
    generator as without compiling, so that the two passes of gradient caching and a resumed run draw the same.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    transformer = transformer_of(model, "compile")
    layers = [module for module in transformer.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInputError(f"{type(transformer).__name__} has no layers to compile", where="training.compile")
    for layer in layers:
        layer.compile(dynamic=True, options={"fallback_random": True})
    logger.info("%d layers are compiled at their first forward, which takes up to some minutes", len(layers))
