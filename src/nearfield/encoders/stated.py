"""What a model's folder says of the use of its vectors and of its files, read without loading the model."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nearfield.encoders.offline import find_offline
from nearfield.errors import BadInputError
from nearfield.files import read_json

SETTINGS = "config_sentence_transformers.json"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def stated_settings(model: str, revision: str | None = None) -> dict[str, Any]:
    """The prompts, similarity function and truncation that a folder, offline package or hub model states; empty where it states
    nothing, or is out of reach."""
    file = stated_file(model, revision, SETTINGS)
    found = {} if file is None else read_json(file, "model config")
    return found if isinstance(found, dict) else {}


def stated_similarity(model: str, revision: str | None = None) -> str:
    """How vectors of the model are compared: ``cosine``, ``dot``, ``euclidean`` or ``manhattan``."""
    return str(stated_settings(model, revision).get("similarity_fn_name") or "cosine")


def trained_similarity(comparisons: Collection[str], stated: str) -> str:
    """How the vectors of a model are compared after a training that compared them so: as its base says, where the training knows
    that, or knows several."""
    return stated if stated in comparisons or len(comparisons) != 1 else next(iter(comparisons))


def stored_dtype(folder: Path) -> str | None:
    """The type that transformers holds the weights of a folder in, left to itself: its config's, else that of the file.

    None where neither says.
    """
    config = read_json(folder / "config.json", "model config") if (folder / "config.json").is_file() else {}
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str):
        return said
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        kinds = [_DTYPES[entry["dtype"]] for entry in header.values() if entry.get("dtype") in _DTYPES]
        if kinds:
            return kinds[0]
    return None


def stated_file(model: str, revision: str | None, name: str) -> Path | None:
    """A file of a model: of its folder, of the package that carries it, of the hub or its cache."""
    folder = Path(model).expanduser()
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        found = find_offline(model, revision)
    except BadInputError:
        return None  # said when the model is loaded
    if found is not None:
        place = found[1] / name
        return place if place.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, name, revision=revision)
        if not isinstance(cached, str):
            cached = hf_hub_download(model, name, revision=revision)
    except Exception:  # no such model, no such file, no network: said when the model is loaded
        return None
    return Path(cached)
