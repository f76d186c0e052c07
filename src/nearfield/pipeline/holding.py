"""What the base says of its vectors and its files, and what a training makes of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.encoders.stated import stored_dtype, trained_similarity
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.build import LoadedEncoder
    from nearfield.objectives.config import ObjectiveSettings

HALF = ("bfloat16", "float16")


def hold_similarity(loaded: LoadedEncoder, objective: ObjectiveSettings) -> LoadedEncoder:
    """The encoder, which compares its vectors as the objective does: by what its base says where the objective knows it.

    Where that differs from what the base says, or several are trained, a notice tells.
    """
    model, comparisons = loaded.model, objective.comparisons
    stated = str(model.similarity_fn_name)
    model.similarity_fn_name = trained_similarity(comparisons, stated)
    notices = [*_differs(comparisons, stated, str(model.similarity_fn_name)), *_scale(model, objective)]
    return replace(loaded, notices=(*loaded.notices, *notices)) if notices else loaded


def _differs(comparisons: Collection[str], stated: str, kept: str) -> list[Notice]:
    if not comparisons or set(comparisons) == {stated}:
        return []
    trained = " and ".join(sorted(comparisons))
    return [
        Notice(
            "similarity",
            f"the base compares its vectors by {stated}, and the objective by {trained}: the trained model says {kept}",
            "Set objective.similarity (of triplets objective.distance), or name an objective that knows the base's.",
        )
    ]


def _scale(model: SentenceTransformer, objective: ObjectiveSettings) -> list[Notice]:
    from sentence_transformers.sentence_transformer.modules import Normalize

    temperature = getattr(objective, "temperature", None)
    unit = isinstance(model[-1], Normalize) and model.truncate_dim is None
    if "dot" not in objective.comparisons or unit or temperature is None or temperature >= 1:
        return []
    return [
        Notice(
            "dot-products",
            f"similarities are dot products of vectors of any length, divided by a temperature of {temperature:g}, which is made "
            "for cosines: a softmax of them may be all 0 and 1",
            "Set objective.temperature: 1, as is common for dot products.",
            minor=True,
        )
    ]


def kept_dtype(loaded: LoadedEncoder) -> str | None:
    """The half-precision type that the base's weights are stored in, which the trained model's are stored in too; None for
    others."""
    transformer: Any = getattr(loaded.model[0], "auto_model", None)
    if transformer is None or loaded.path.endswith(".gguf"):
        return None
    folder = Path(getattr(transformer, "name_or_path", "") or loaded.path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        found = cached_file(str(folder), "config.json", revision=loaded.revision, local_files_only=True)
        folder = Path(str(found)).parent
    stored = stored_dtype(folder)
    return stored if stored in HALF else None


def say_rounding(dtype: str | None) -> list[Notice]:
    """That weights are trained in another type than they are stored in."""
    if dtype is None:
        return []
    return [
        Notice(
            "stored-dtype",
            f"the base is stored in {dtype}, and so is the trained model: the weights that training holds in float32 are rounded "
            "when they are saved",
            minor=True,
        )
    ]
