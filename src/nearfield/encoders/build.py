"""Load a sentence-transformers model by folder or hub id, and build the encoder that a recipe asks for."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nearfield.encoders.adapters import (
    BASE_FILE,
    INDEXES,
    AdapterBase,
    adapter_base,
    add_lora,
    base_of,
    has_adapter,
    joined_with_base,
    merge_adapter,
    name_base,
    quantization_settings,
    record_base,
    save_adapter,
)
from nearfield.encoders.base_prompts import CONTRACT_FILE
from nearfield.encoders.borders import BORDER, border_notices, keep_borders, save_borders
from nearfield.encoders.checks import check_folder, load_error
from nearfield.encoders.config import EncoderConfig
from nearfield.encoders.domains import add_bottleneck, add_prefix, has_bottlenecks, saved_alone, weights_hash
from nearfield.encoders.gguf import gguf_file, load_gguf
from nearfield.encoders.heads import own_modules, set_heads, ship_modules
from nearfield.encoders.limits import stated_positions, usable_positions
from nearfield.encoders.offline import find_offline
from nearfield.encoders.static import set_longest
from nearfield.encoders.trunk import append_eos, draw_anew, keep_layers, read_plain_texts
from nearfield.errors import BadInputError
from nearfield.files import fingerprint, hash_file, hash_folder
from nearfield.notices import Notice
from nearfield.provenance import hub_commit

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.weights import Loading

logger = logging.getLogger("nearfield.encoders")

Dtype = Literal["float32", "bfloat16"]

_UNREAD_SUFFIXES = (
    ".md",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
    ".pdf",
)
_UNREAD_FILES = (CONTRACT_FILE, "data_config.json", "LICENSE", "NOTICE")
_TOLD_BESIDE = (".json", ".txt", ".model", ".jinja")
"""What loading reads beside a GGUF file, where it is there."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are, and the name and revision it goes by in results."""

    name: str
    revision: str
    path: str
    note: str | None = None
    content: str = ""
    """All that loading reads, by its hash; of a model on the hub its commit, as far as that is known."""


@dataclass(frozen=True)
class LoadedEncoder:
    """A loaded model with the name and revision it goes by in results, and a note on where it came from."""

    model: SentenceTransformer
    name: str
    revision: str
    path: str
    note: str | None = None
    notices: tuple[Notice, ...] = ()
    """What its users must know, as that its vectors depend on the rest of the batch."""
    content: str = ""
    """All that loading read, by its hash or commit, that of an adapter's base counted; empty where it is not known."""


def folder_revision(folder: Path) -> str:
    """32 hex digits of all that loading reads in a model folder, code that travels with it counted, whatever its name.

    Of the base of an adapter that is alone in it the name and content count, not where it lies.
    """
    places = {BASE_FILE, *INDEXES} if (folder / BASE_FILE).is_file() else set()
    return hash_folder(folder, lambda file: _is_read(file) and file.name not in places)


def _is_read(file: Path) -> bool:
    """Whether loading may read a file of a model folder: all but cards, pictures, other frameworks' weights and hidden files."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.parts)
    return not hidden and file.suffix.lower() not in _UNREAD_SUFFIXES and file.name not in _UNREAD_FILES


def _gguf_content(file: Path) -> str:
    """The hash of a GGUF file, and of the settings beside it that loading would read."""
    beside = [each for each in sorted(file.parent.iterdir()) if each.suffix in _TOLD_BESIDE and each.is_file()]
    own = hash_file(file)
    return fingerprint([own, *([each.name, hash_file(each)] for each in beside)]) if beside else own


def _with_base(folder: Path, content: str) -> str:
    """The content of a model folder, with that of the base that it is loaded on where it holds an adapter alone."""
    try:
        stands_on = adapter_base(folder)
        if stands_on is None:
            return content
        if stands_on.is_local:
            return fingerprint([content, locate(_place_of_base(stands_on, folder, None)).content])
        return fingerprint([content, locate(stands_on.name, stands_on.revision).content])
    except (BadInputError, OSError):  # no base is here: loading says so, or is told where it is
        return content


def locate(name_or_path: str, revision: str | None = None) -> ModelSource:
    """Find a model without loading it: a folder, an offline package, or a hub id (resolved to a commit if reachable)."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BadInputError("a model folder has no revision", where=name_or_path, hint="Remove 'revision'.")
        path = path.resolve()
        run_name = path.parent.name if path.name == "model" else path.name
        revision = folder_revision(path)
        return ModelSource(f"local/{run_name or 'model'}", revision, str(path), content=_with_base(path, revision))
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInputError(
                "a model is a folder, a GGUF file or a hub id; this is another file", where=name_or_path
            )
        path = path.resolve()
        content = _gguf_content(path)
        return ModelSource(f"local/{path.stem}", content, str(path), content=content)
    found = find_offline(name_or_path, revision)
    if found:
        model, place = found
        note = f"{model.name} is read from the package {model.package} (weights verified against revision {model.revision[:8]})"
        content = folder_revision(place) if place.is_dir() else _gguf_content(place)
        return ModelSource(model.name, model.revision, str(place), note, content)
    commit = hub_commit(name_or_path, revision) or revision or "main"
    return ModelSource(name_or_path, revision or "main", name_or_path, content=commit)


def load_encoder(
    name_or_path: str,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: Dtype = "float32",
    base: str | None = None,
    quantize: str = "none",
    recipe: EncoderConfig | None = None,
) -> LoadedEncoder:
    """Load a dense embedding model by folder or hub id.

    The folder of an adapter alone is loaded on its base: ``base`` if given, else the one it names. ``quantize`` holds the
    transformer in 4 or 8 bits (CUDA). ``recipe`` says what a training that begins from the model replaces of it. Raises
    :class:`BadInputError` when it is no such model, is damaged or incomplete, or cannot be fetched.
    """
    source = locate(name_or_path, revision)
    folder = Path(source.path)
    base_path, stands_on, gguf = None, None, gguf_file(folder)
    if folder.is_dir() and gguf is None:
        check_folder(folder)
        stands_on = adapter_base(folder)
    if stands_on is not None:
        base_path = find_base(stands_on, folder, base)
    elif base is not None:
        raise BadInputError(
            "this is a whole model, no adapter that was saved alone: it has no base",
            where=name_or_path,
            hint="Leave out the base.",
        )
    if source.note:
        logger.info(source.note)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if quantize != "none":
        kwargs |= quantization_settings(quantize, _device_type(device))
    from nearfield.encoders.families import check_family, reader_of
    from nearfield.encoders.one_tower import read_in_a_row
    from nearfield.encoders.weights import recorded_loading

    notices: tuple[Notice, ...] = ()
    try:
        with (
            quiet_transformers(),
            contextlib.nullcontext(source.path) if base_path is None else joined_with_base(folder, base_path) as path,
            recorded_loading() as loading,
        ):
            if gguf is not None:
                model = load_gguf(gguf, device, kwargs)
            else:
                # The commit that the name stands for now, so that what is loaded is what it is known by.
                taken = None if folder.is_dir() else revision if source.content == "main" else source.content
                read = reader_of(str(path), taken)
                notices += check_family(read, name_or_path, recipe)
                model = _open(str(path), taken, device, trust_remote_code, kwargs)
    except BadInputError:
        raise
    except Exception as error:  # whatever a damaged folder or an unreachable hub raises becomes one message
        raise load_error(name_or_path, folder, error) from error
    if stands_on is not None and has_bottlenecks(model):
        model[0].base, model[0].base_path = stands_on.identity, base_path
    elif stands_on is not None:
        record_base(model[0].auto_model, replace(stands_on, path=base_path))
    if gguf is not None or not _knows_its_inputs(folder, revision):
        read_plain_texts(model)
        read_in_a_row(model)
    notices += _checked(model, loading, name_or_path, recipe)
    commit = None
    if not folder.is_dir() and gguf is None and hasattr(model[0], "config"):
        commit = getattr(model[0].config, "_commit_hash", None)
    content = (commit or source.content) if base is None else fingerprint([source.revision, locate(base).content])
    return LoadedEncoder(model, source.name, commit or source.revision, source.path, source.note, notices, content)


def _checked(
    model: SentenceTransformer, loading: Loading, name: str, recipe: EncoderConfig | None
) -> tuple[Notice, ...]:
    """Make a loaded model read texts as it was made to, and try it out; returns what its users must know."""
    from nearfield.encoders.company import pad_as_processor, try_company
    from nearfield.encoders.direction import check_claimed_direction
    from nearfield.encoders.limits import check_words, fit_positions
    from nearfield.encoders.one_tower_checks import check_one_tower
    from nearfield.encoders.weights import check_weights, embedding_trial

    notices = check_words(model, name) + fit_positions(model, name)
    pad_as_processor(model)
    if recipe is None or recipe.fresh is None:
        check_weights(loading, embedding_trial(model), name)
    check_claimed_direction(model, name)
    check_one_tower(model, name)
    return (*notices, *border_notices(model), *try_company(model, name))


def _open(
    path: str, revision: str | None, device: str | None, trust_remote_code: bool, kwargs: dict[str, Any]
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.one_tower import own_processors

    with own_processors():
        return SentenceTransformer._load_with_module_classes(
            path,
            own_modules(),
            revision=revision,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs=kwargs,
        )


def _check_base_weights(stands_on: AdapterBase, base_path: str, folder: Path) -> None:
    found = weights_hash(base_path)
    if stands_on.weights not in (None, found):
        raise BadInputError(
            f"the weights of {base_path} are not those that this adapter was trained on (hash {found}, wanted "
            f"{stands_on.weights})",
            where=str(folder),
        )


def _knows_its_inputs(folder: Path, revision: str | None) -> bool:
    """Whether sentence-transformers saved the model: what it reads as a chat is its maker's choice then."""
    if folder.is_dir():
        return (folder / "modules.json").is_file()
    from sentence_transformers.util import is_sentence_transformer_model

    return bool(is_sentence_transformer_model(str(folder), revision=revision, local_files_only=True))


def _device_type(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


def find_base(stands_on: AdapterBase, folder: Path, given: str | None = None) -> str:
    """The folder (of a package, of the hub's cache, of the user) with the model that an adapter was trained on.

    Raises :class:`BadInputError` where it is not there, or holds another model.
    """
    place = _place_of_base(stands_on, folder, given)
    _check_base_weights(stands_on, place, folder)
    return place


def relink(folder: Path, given: str) -> None:
    """Say in the folder of an adapter alone that its base lies elsewhere now; it must be the same base."""
    stands_on = adapter_base(folder)
    if stands_on is None:
        raise BadInputError("this is a whole model, no adapter that was saved alone: it has no base", where=str(folder))
    name_base(folder, replace(stands_on, path=find_base(stands_on, folder, given)))


def _place_of_base(stands_on: AdapterBase, folder: Path, given: str | None) -> str:
    hint = "Save the model with encoder.adapter.save: merged where it must load by itself."
    if given is not None or stands_on.is_local:
        name = stands_on.name.removeprefix("local/")
        named = [] if stands_on.path is None else [str(folder / stands_on.path)]
        places = [given] if given is not None else [*named, stands_on.name, str(folder.parent / name)]
        found = next((place for place in map(locate, filter(_is_there, places)) if Path(place.path).is_dir()), None)
        if found is None:
            raise BadInputError(
                f"this folder holds an adapter only, and its base (the folder {name!r}, content {stands_on.revision}) is not here",
                where=str(folder),
                hint=f"Put it at {places[0]}, or name it with --base. {hint}",
            )
        if stands_on.revision not in (None, "main", found.revision):
            raise BadInputError(
                f"the model at {found.path} is not the base that this adapter was trained on (revision {found.revision}, wanted {stands_on.revision})",
                where=str(folder),
                hint=hint,
            )
        return found.path
    source = locate(stands_on.name, None if stands_on.revision == "main" else stands_on.revision)
    if Path(source.path).is_dir():
        return source.path
    # sentence-transformers would take the newest revision of the base.
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return str(snapshot_download(stands_on.name, revision=stands_on.revision, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, forbidden: one message
        raise load_error(stands_on.name, Path(stands_on.name), error) from error


def _is_there(place: str) -> bool:
    return Path(place).expanduser().is_dir() or find_offline(place, None) is not None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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


def save_encoder(
    model: SentenceTransformer,
    folder: Path,
    *,
    adapter: Literal["merged", "adapter"] = "merged",
    dtype: str | None = None,
) -> None:
    """Save in sentence-transformers' format, so that plain ``SentenceTransformer(folder)`` loads it.

    ``adapter`` says what becomes of an adapter: ``merged`` saves a copy of the model that has it in its weights, ``adapter``
    saves it alone, with the name and revision of its base. ``dtype`` is that of the saved weights; null keeps the model's.
    Without a card: sentence-transformers would repeat the base model's.
    """
    merged = has_adapter(model) and adapter == "merged"
    if merged or dtype is not None:
        model = copy.deepcopy(model)
    if merged:
        merge_adapter(model)
    if dtype is not None:
        import torch

        model = model.to(getattr(torch, dtype))
    with quiet_transformers(), saved_alone(model, adapter == "adapter"):
        if has_adapter(model):
            save_adapter(model, folder)
        else:
            model.save_pretrained(str(folder), create_model_card=False)
    stands_on = base_of(model)
    if stands_on is not None and has_bottlenecks(model) and adapter == "adapter":
        name_base(folder, stands_on)
    ship_modules(model, folder)
    save_borders(model, folder)


def build_encoder(
    config: EncoderConfig,
    device: str | None = None,
    *,
    dtype: Dtype = "float32",
    seed: int = 0,
    prompts: Iterable[str] = (),
) -> LoadedEncoder:
    """The encoder of a recipe: the model with the recipe's layers, attention, pooling, heads, maximum length and adapter.

    ``dtype`` is that of its weights; those of an adapter are float32. New weights are drawn from ``seed``. Where pooling
    leaves prompts out, the ends of ``prompts`` and of the model's own are kept borders of tokens.
    """
    quantize = config.adapter.quantize if config.adapter else "none"
    loaded = load_encoder(
        config.model, config.revision, device, config.trust_remote_code, dtype=dtype, quantize=quantize, recipe=config
    )
    model = loaded.model
    from nearfield.encoders.one_tower_checks import check_verified

    check_verified(model, config)
    if has_adapter(model):
        _merge_base_adapter(loaded, config)
    truncation = model.truncate_dim
    if config.fresh is not None:
        draw_anew(model, config.fresh, seed)
    if config.layers is not None:
        keep_layers(model, config.layers)
    if config.attention is not None:
        from nearfield.encoders.direction import set_direction

        set_direction(model, config.attention == "causal", config.model)
    if config.append_eos:
        append_eos(model)
    set_heads(model, config, seed)
    notices = [one for one in loaded.notices if one.code != BORDER]
    notices += keep_borders(model, [*prompts, *model.prompts.values()])
    if truncation is not None and model.truncate_dim is None:
        words = f"the base keeps the first {truncation} dimensions of its vectors; of the new ones all are kept"
        notices.append(Notice("truncation", words, minor=True))
    loaded = replace(loaded, notices=tuple(notices))
    if config.max_length is not None:
        usable = usable_positions(model)
        limit = stated_positions(model) if usable is None else usable
        if limit is not None and config.max_length > limit:
            raise BadInputError(
                f"max_length {config.max_length} is more than the model's {limit} positions", where="encoder.max_length"
            )
        set_longest(model, config.max_length)
    _freeze_pooler(model)
    from nearfield.encoders.company import try_company
    from nearfield.encoders.towers import add_image_tower, freeze_unused

    if config.image_tower is not None:
        model = add_image_tower(model, config.image_tower, seed, dtype)
        said = dict.fromkeys((*loaded.notices, *try_company(model, config.model)))
        loaded = replace(loaded, model=model, notices=tuple(said))
    freeze_unused(model)
    if config.adapter is not None:
        transformer = getattr(model[0], "auto_model", None)
        if config.adapter.save == "adapter" and loaded.path.endswith(".gguf"):
            raise BadInputError(
                "an adapter alone does not load on a GGUF file", where="encoder.adapter.save", hint="Use save: merged."
            )
        if config.adapter.save == "adapter" and getattr(transformer, "name_or_path", loaded.path) != loaded.path:
            raise BadInputError(
                "the transformer of this model lies in a folder below it, where an adapter alone would not find it",
                where=config.model,
                hint="Use encoder.adapter.save: merged.",
            )
        weights = weights_hash(loaded.path, loaded.revision)
        base = AdapterBase(loaded.name, loaded.revision, weights, loaded.path)
        if config.adapter.kind == "lora":
            add_lora(model, config.adapter, base, seed)
        elif config.adapter.kind == "prefix":
            add_prefix(model, config.adapter, base, seed)
        else:
            add_bottleneck(model, config.adapter, base, seed)
    return loaded


def _merge_base_adapter(loaded: LoadedEncoder, config: EncoderConfig) -> None:
    """A base that is itself an adapter on another model becomes one model, all of whose weights can be trained."""
    if config.adapter is not None and (config.adapter.save == "adapter" or config.adapter.quantize != "none"):
        raise BadInputError(
            "this model is an adapter on another model, and an adapter on it cannot be quantised or saved alone",
            where=config.model,
            hint="Use encoder.adapter.save: merged and quantize: none, or begin from a merged model.",
        )
    merge_adapter(loaded.model)


def _freeze_pooler(model: SentenceTransformer) -> None:
    """BERT's own pooler sees no gradient where embeddings are made of token vectors: it stays as it was loaded."""
    from torch import nn

    pooler = getattr(getattr(model[0], "auto_model", None), "pooler", None)
    text = getattr(model[0], "modality_config", {}).get("text", {})
    if isinstance(pooler, nn.Module) and text.get("method_output_name") == "last_hidden_state":
        pooler.requires_grad_(False)
