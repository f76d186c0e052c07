"""What must hold of a transformer that reads pictures and texts: tried out when it is loaded, and before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.data.pictures import pillow
from nearfield.encoders.one_tower import FAMILIES, Size, family_of, row_features, row_ids
from nearfield.encoders.packing import embed, evaluating, rounding
from nearfield.encoders.weights import leads_to
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.config import EncoderConfig
    from nearfield.encoders.packing import Features


def check_verified(model: SentenceTransformer, config: EncoderConfig) -> None:
    """Refuse to train a transformer of pictures and texts whose architecture was not tried out, and what it cannot have."""
    reads = getattr(model[0], "modality_config", None) or {}
    together = ("message" in reads and "image" in reads) or any(isinstance(key, tuple) for key in reads)
    if not together:
        return
    if family_of(model) is None:
        raise BadInputError(
            f"{model[0].config.model_type} reads pictures and texts in one transformer, and was not tried out",
            where=config.model,
            hint=f"Tried out are {', '.join(FAMILIES)}.",
        )
    keys = ("attention", "layers", "layer_mix", "fresh", "image_tower")
    asked = [key for key in keys if getattr(config, key) is not None]
    if config.pool_prompt is False:
        asked.append("pool_prompt")
    if config.adapter is not None and config.adapter.kind != "lora":
        asked.append("adapter.kind")
    if asked:
        raise BadInputError(
            "this cannot be set for a model that reads pictures and texts in one transformer",
            where=f"encoder.{asked[0]}",
            hint="Use kind: lora." if asked[0] == "adapter.kind" else "Remove it.",
        )


def unused_parameters(model: SentenceTransformer) -> list[nn.Parameter]:
    """Parameters that no embedding depends on, found by trial: the last layers of some vision models.

    They are those that the graph of an embedding does not lead to; no gradient is computed.
    """
    with torch.enable_grad(), torch.random.fork_rng(), evaluating(model):
        used = leads_to([trial_embedding(model)])
    return [each for each in model.parameters() if each.requires_grad and id(each) not in used]


def trial_embedding(model: SentenceTransformer) -> Tensor:
    """(1, d) the embedding of one item with a text and a picture."""
    return embed(model, _trial(model, [(3, 0)]))


_TRIAL_SIZES: tuple[Size, ...] = ((112, 14), (14, 112), (70, 14))
"""Long and thin: of those that are cut into tiles, some models make the fewest."""


def _trial(model: SentenceTransformer, items: Sequence[tuple[int | None, int]]) -> Features:
    """Features of items for a trial: each names the seed of its picture (None for none) and the number of its text."""
    words = ["a", "what is shown here ?", "the name of a colour , and of nothing else"]
    sizes = [None if seed is None else _TRIAL_SIZES[seed % len(_TRIAL_SIZES)] for seed, _ in items]
    rows = row_ids(model, [words[number] for _, number in items], sizes, "", cut=False)
    pictures = [None if seed is None else _noise(seed) for seed, _ in items]
    return row_features(model, rows, pictures, model.device)


def _noise(seed: int) -> Image:
    width, height = _TRIAL_SIZES[seed % len(_TRIAL_SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image: Image = pillow().fromarray(pixels)
    return image


def check_one_tower(model: SentenceTransformer, where: str) -> None:
    """Refuse a model of pictures and texts that does not read them rightly: tried out each time it is loaded.

    An item must have the same embedding alone and beside longer ones, with pictures of other sizes or without one; another
    picture must give another embedding, to its own item and to no other.
    """
    if family_of(model) is None:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
            complaint = _complaint(model)
    except BadInputError:
        raise
    except Exception as error:  # whatever an architecture in another version raises means that it cannot be tried out
        complaint = f"it cannot be tried out ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
    if complaint:
        raise BadInputError(
            f"{type(model[0].auto_model).__name__} does not read pictures and texts in one row rightly: {complaint}",
            where=where,
            hint="Use another version of transformers, or another model.",
        )


def _complaint(model: SentenceTransformer) -> str | None:
    # Few pictures: of some models each is a thousand tokens.
    items: list[tuple[int | None, int]] = [(0, 1), (None, 0), (1, 2)]
    together = embed(model, _trial(model, items)).double()
    scale = float(together.abs().max())
    tolerance = rounding(model)
    for place, item in enumerate(items[:2]):
        alone = embed(model, _trial(model, [item])).double()[0]
        if not float((alone - together[place]).abs().max()) <= tolerance * scale:
            what = "text" if item[0] is None else "text with a picture"
            return f"a {what} has another embedding beside others than alone"
    changed = embed(model, _trial(model, [(3, 1), *items[1:]])).double()
    moved = (changed - together).abs().amax(dim=1)
    if not float(moved[0]) > 1e-6 * scale:
        return "another picture gives the same embedding"
    if not float(moved[1:].max()) <= tolerance * scale:
        return "another picture changes the embedding of other items"
    return None
