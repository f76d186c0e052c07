"""Alone = in company: an item's embedding must not depend on the others of its batch. Tried out when a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nearfield.data.pictures import pillow
from nearfield.encoders.limits import longest_input
from nearfield.encoders.one_tower import family_of
from nearfield.encoders.packing import evaluating, rounding
from nearfield.errors import BadInputError
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TEXTS = ["the vectors of texts", "the vectors of texts that are read together are those of each alone and of no other"]
_SIDE = 64

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
    own = dict(getattr(type(module.processor), "text_kwargs", None) or {})
    if own.get("padding") != "max_length" and module.config.model_type not in FIXED_WIDTH:
        return
    width = own.get("max_length")
    limit = longest_input(model)
    if width is None and limit is None:
        return
    if width is not None and (limit is None or limit > width):
        model.max_seq_length = width
    module.processing_kwargs = {**settings, "text": {**settings.get("text", {}), "padding": "max_length"}}


def try_company(model: SentenceTransformer, name: str) -> tuple[Notice, ...]:
    """Embed texts, and pictures, alone and together, as sentence-transformers does; what differs is a notice.

    Raises :class:`BadInputError` where sentence-transformers cannot embed them at all.
    """
    if family_of(model) is not None:
        return ()  # these are tried out with pictures and texts in one row
    found = []
    for what, items in _items(model).items():
        try:
            with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
                apart = max(_apart(model, items, task) for task in _tasks(model))
        except Exception as error:
            if model.get_model_kwargs():
                continue  # it wants to be told more than items
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BadInputError(
                f"sentence-transformers cannot embed {what} with this model: {reason}", where=name
            ) from error
        if not apart <= rounding(model):
            found.append(
                Notice(
                    "batch-dependent",
                    f"{name} gives {what} other vectors in company than alone (by {apart:.2g} of the largest value): scores "
                    "depend on how items are cut into batches",
                    "Its architecture reads padding or other items; use one that does not, or compare scores of equal batches "
                    "only.",
                )
            )
    return tuple(found)


def _tasks(model: SentenceTransformer) -> tuple[dict[str, str], ...]:
    """What the model must be told of an item: nothing, or each side in turn where these go different ways."""
    routes = getattr(model[0], "sub_modules", None)
    if routes is None or getattr(model[0], "default_route", None) is not None:
        return ({},)
    return tuple({"task": task} for task in ("query", "document") if task in routes) or ({},)


def _apart(model: SentenceTransformer, items: list[Any], task: dict[str, str]) -> float:
    """How far the vectors of some items alone are from those together, by the largest value of any."""
    together = _embedded(model, items, task)
    alone = torch.cat([_embedded(model, [item], task) for item in items])
    return float((alone - together).abs().max() / alone.abs().max().clamp(min=1e-12))


def _items(model: SentenceTransformer) -> dict[str, list[Any]]:
    """What the model is tried out with, by what it is called: a short and a long one of each kind that it takes."""
    taken: Sequence[Any] = model.modalities
    found: dict[str, list[Any]] = {}
    if "text" in taken or not taken:
        found["texts"] = list(_TEXTS)
    if "image" in taken:
        random = np.random.default_rng(0)
        pixels = [random.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8) for _ in range(2)]
        found["pictures"] = [pillow().fromarray(each) for each in pixels]
    return found


def _embedded(model: SentenceTransformer, items: list[Any], task: dict[str, str]) -> Tensor:
    features = model.preprocess(items, **task)
    output = model({k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in features.items()}, **task)
    if "sentence_embedding" not in output:
        raise ValueError("it has no pooling, so each token gets a vector and the whole none")
    vectors: Tensor = output["sentence_embedding"]
    return vectors.double()
