"""What the names of a transformer's parameters and modules tell: layers and embeddings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks)\.(\d+)(?=\.)")
"""The number of the layer that a name lies in, such as ``encoder.layer.3.output.dense``."""
EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.|relative_attention_bias")
"""Tables that are looked up in."""


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
