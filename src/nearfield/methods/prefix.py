"""Prefix adapters: learnt vectors before the text in every layer (arXiv 2101.00190, in the form of P-tuning v2, 2110.07602).

The module that a saved model needs, ``AdaptedTransformer``, travels with it (:mod:`nearfield.encoders.shipped`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from nearfield.encoders.adapters import DEFAULT, adapted_transformer, check_plain, using
from nearfield.encoders.config import AdapterSettings
from nearfield.encoders.packing import Padding, embed, evaluating, rounding
from nearfield.encoders.transformer import layers_of
from nearfield.encoders.trials import random_tokens
from nearfield.errors import BadInputError
from nearfield.provenance import generator

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.source import AdapterBase


class PrefixConfig(AdapterSettings):
    """Train vectors that stand before the text in every layer, and leave the transformer as it is (prefix tuning, arXiv
    2101.00190, in the form of P-tuning v2, arXiv 2110.07602).

    They are attended to and never pooled. Unlike the other kinds they begin as something: the states of words drawn at
    random. They cannot be added to the weights: their file is saved with the model, which plain sentence-transformers then
    loads with ``trust_remote_code=True`` only; and texts are padded, not packed.
    """

    name: ClassVar[str] = "prefix"
    kind: Literal["prefix"] = "prefix"
    length: Annotated[int, Field(ge=1, le=1024)] = 16
    """Vectors before the text, in each layer."""

    def add(self, model: SentenceTransformer, base: AdapterBase, seed: int) -> None:
        """Put a fresh prefix before the text in every layer, whose own weights are no longer trained.

        It begins as the states that words drawn from ``seed`` have in each layer. A model in which padding would change a
        text's embedding with a prefix is refused.
        """
        check_plain(model, "prefix")
        transformer = model[0].auto_model
        layers = layers_of(transformer, "encoder.adapter")
        states = _states_of_words(transformer, layers, self.length, seed)
        adapted = adapted_transformer(model, base)
        adapted.add_prefix(DEFAULT, layers, self.length)
        with torch.no_grad():
            prefix: Any = adapted.adapters[DEFAULT]
            prefix.states.copy_(states)
        model[0] = adapted
        _check_prefix(model)


def _states_of_words(transformer: Any, layers: list[str], length: int, seed: int) -> Tensor:
    """(layers, length, d) float32: what each layer is given when it reads words drawn from a seed."""
    size = int(transformer.get_input_embeddings().num_embeddings)
    words = torch.from_numpy(generator(seed, "prefix").integers(0, size, (1, length))).to(transformer.device)
    given: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).detach().float())

    hooks = [transformer.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in layers]
    try:
        with torch.no_grad(), evaluating(transformer):
            transformer(input_ids=words, attention_mask=torch.ones_like(words))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(given)


def _check_prefix(model: SentenceTransformer) -> None:
    """Refuse a model in which a prefix does nothing, or in which a text has another embedding beside a longer one."""
    transformer = model[0].auto_model
    tokens = random_tokens(transformer, 13)
    short, long = tokens[:4], tokens[4:]

    def embeddings(rows: list[Any]) -> Tensor:
        return embed(model, Padding.of(model).features(rows, transformer.device, 0)).double()

    name = type(transformer).__name__
    with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
        try:
            alone, together = embeddings([short])[0], embeddings([short, long])[0]
            with using(model, None, afterwards=DEFAULT):
                bare = embeddings([short])[0]
        except Exception as error:  # whatever an unknown architecture raises means that it takes no prefix
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BadInputError(f"{name} takes no prefix ({reason})", where="encoder.adapter") from error
    scale = float(alone.abs().max())
    if float((alone - bare).abs().max()) <= 1e-6 * scale:
        raise BadInputError(f"a prefix changes nothing in {name}", where="encoder.adapter")
    if float((alone - together).abs().max()) > rounding(transformer) * scale:
        raise BadInputError(
            f"with a prefix, padding changes the embeddings of {name}",
            where="encoder.adapter",
            hint="Use kind: bottleneck or lora, or a tokenizer that pads on the other side.",
        )
