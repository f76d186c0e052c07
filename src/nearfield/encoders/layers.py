"""What the names of a transformer's parameters and modules tell: layers and embeddings."""

from __future__ import annotations

import re

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks)\.(\d+)(?=\.)")
"""The number of the layer that a name lies in, such as ``encoder.layer.3.output.dense``."""
EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.|relative_attention_bias")
"""Tables that are looked up in."""
