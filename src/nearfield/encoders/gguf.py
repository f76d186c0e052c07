"""A decoder from a GGUF file (llama.cpp's format), dequantised as it is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder that holds no other model."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file() or (path / "modules.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise BadInputError(
            f"this folder holds {len(files)} GGUF files",
            where=str(path),
            hint=f"Name one of them, e.g. {files[0].name}.",
        )
    return files[0] if files else None


def load_gguf(file: Path, device: str | None, kwargs: dict[str, Any]) -> SentenceTransformer:
    """A sentence-transformers model with mean pooling on the file's weights, to which ``kwargs`` are passed.

    It is saved as any other model: nothing of it still names the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise BadInputError(
            "a GGUF file needs the package gguf, which is not installed", where=str(file), hint="pip install gguf"
        )
    from sentence_transformers import SentenceTransformer

    named = {"gguf_file": file.name}
    model = SentenceTransformer(
        str(file.parent), device=device, model_kwargs={**kwargs, **named}, processor_kwargs=named, config_kwargs=named
    )
    transformer = model[0].auto_model
    # Its weights are plain ones by now; transformers would quantise them again from a file that a saved folder lacks.
    for owner, name in ((transformer.config, "quantization_config"), (transformer, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    transformer.is_quantized = False
    return model
