"""What the names of a transformer's parameters and modules tell: layers and embeddings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks)\.(\d+)(?=\.)")
"""The number of the layer that a name lies in, such as ``encoder.layer.3.output.dense``."""
EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.|relative_attention_bias")
"""Tables that are looked up in."""


def transformer_of(model: SentenceTransformer, where: str) -> PreTrainedModel:
    """The transformer that a model begins with; :class:`BadInputError` where it begins with something else."""
    found: PreTrainedModel | None = getattr(model[0], "auto_model", None)
    if found is None:
        raise BadInputError(
            f"this needs a transformer, and the model's first module is a {type(model[0]).__name__}",
            where=where,
            hint="Leave it out.",
        )
    return found


def layers_of(transformer: PreTrainedModel, where: str) -> list[str]:
    """The names of a transformer's layers, in their order; :class:`BadInputError` where it is not clear which they are."""
    from torch import nn

    present = int(transformer.config.num_hidden_layers)
    lists = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == present and "." not in name.removeprefix("encoder.")
    ]
    if len(lists) != 1:
        raise BadInputError(
            f"it is not clear which modules are the layers of {type(transformer).__name__}", where=where
        )
    return [f"{lists[0]}.{number}" for number in range(present)]
