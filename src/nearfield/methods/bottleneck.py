"""Bottleneck adapters: a small network behind the parts of each layer (Houlsby et al., arXiv 1902.00751; 2307.03104).

The module that a saved model needs, ``AdaptedTransformer``, travels with it (:mod:`nearfield.encoders.shipped`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from nearfield.encoders.adapters import DEFAULT, adapted_transformer, check_plain, lora_targets
from nearfield.encoders.config import AdapterSettings
from nearfield.encoders.packing import evaluating, padded_features
from nearfield.encoders.transformer import LAYER
from nearfield.encoders.trials import random_tokens
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.source import AdapterBase


class BottleneckConfig(AdapterSettings):
    """Train a small network behind the sub-layers of each layer, and leave the transformer as it is (arXiv 2307.03104).

    They cannot be added to the weights: their file is saved with the model, which plain sentence-transformers then loads
    with ``trust_remote_code=True`` only.
    """

    name: ClassVar[str] = "bottleneck adapter"
    kind: Literal["bottleneck"] = "bottleneck"
    width: Annotated[int, Field(ge=1)] = 64
    """Of the narrow middle."""
    places: Literal["mlp", "both"] = "both"
    """Behind the feed-forward part of each layer (Pfeiffer et al., arXiv 2005.00247), or behind attention too (Houlsby et
    al., arXiv 1902.00751)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Between its two layers."""

    def add(self, model: SentenceTransformer, base: AdapterBase, seed: int) -> None:
        """Put fresh bottlenecks on the transformer, whose own weights are no longer trained; they change nothing yet."""
        check_plain(model, "bottleneck")
        places = bottleneck_places(model, self.places)
        adapted = adapted_transformer(model, base)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted.add_adapter(DEFAULT, places, self.width, self.activation)
        model[0] = adapted


def bottleneck_places(model: SentenceTransformer, places: Literal["mlp", "both"]) -> list[str]:
    """The modules whose outputs get an adapter: of each layer the last linear module of its feed-forward part, and with
    ``both`` of its attention; by running the model, since the order of their names tells nothing.
    """
    transformer = model[0].auto_model
    size = int(transformer.config.hidden_size)
    last: dict[tuple[str, str], str] = {}
    hooks = []
    for role in ("attention", "mlp") if places == "both" else ("mlp",):
        for name in lora_targets(transformer, role):
            layer = LAYER.search(name)
            assert layer is not None
            key = (name[: layer.end()], role)

            def note(_: Any, __: Any, output: Any, key: tuple[str, str] = key, name: str = name) -> None:
                if output.shape[-1] == size:
                    last.pop(key, None)  # to the end: the order is that of the run
                    last[key] = name

            hooks.append(transformer.get_submodule(name).register_forward_hook(note))
    try:
        features = padded_features(
            [random_tokens(transformer, 4)], pad_token=0, side="right", device=transformer.device, prompt_length=0
        )
        with torch.no_grad(), evaluating(transformer):
            transformer(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise BadInputError(
            f"no layer of {type(transformer).__name__} has a linear module that gives {size} numbers a token",
            where="encoder.adapter.places",
        )
    return list(last.values())
