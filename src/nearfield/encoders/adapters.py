"""Adapters of a transformer: low-rank ones (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) put on and merged; any saved without
their base, and several on one base, switched when texts are encoded (arXiv 2307.03104).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.encoders.private import has_adapter, without_adapter
from nearfield.encoders.source import (
    ADAPTER_CONFIG,
    BASE_FILE,
    BESIDE,
    BOTTLENECKS,
    INDEXES,
    AdapterBase,
    adapter_base,
    adapter_files,
    find_base,
    weights_hash,
)
from nearfield.encoders.transformer import LAYER
from nearfield.errors import BadInputError
from nearfield.files import read_json, write_json
from nearfield.provenance import require_bitsandbytes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from nearfield.encoders.config import LoRAConfig
    from nearfield.encoders.load import LoadedEncoder
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer


ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT = "default"
"""The name of the one adapter of a model that is trained."""
_SETTINGS = "sentence_bert_config.json"
_MAGNITUDE = ".lora_magnitude_vector"
_ROUTERS = ("gate", "router")


def lora_targets(transformer: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """The names of the matrices that get an adapter, in the model's order.

    ``attention`` are the linear modules of a layer below one whose name has ``attn`` or ``attention``, ``mlp`` the
    layer's other ones (not the routers of experts), ``all-linear`` both. Heads and poolers are in no layer. Raises
    :class:`BadInputError` where nothing matches.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)  # the second is GPT-2's own linear module
    linear = [name for name, module in transformer.named_modules() if isinstance(module, kinds)]
    if isinstance(targets, tuple):
        for position, target in enumerate(targets):
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                close = difflib.get_close_matches(
                    target, {name.rpartition(".")[2] for name in linear} | set(linear), 3, 0.0
                )
                raise BadInputError(
                    f"{type(transformer).__name__} has no linear module {target!r}",
                    where=f"encoder.adapter.targets.{position}",
                    hint=f"Nearest: {', '.join(close) or 'it has none at all'}.",
                )
        return [name for name in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
    names = []
    for name in linear:
        layer = LAYER.search(name)
        if layer is None or name.rpartition(".")[2] in _ROUTERS:
            continue
        inside = name[layer.end() :].lower()
        role = "attention" if "attn" in inside or "attention" in inside else "mlp"
        if targets in ("all-linear", role):
            names.append(name)
    if not names:
        shown = ", ".join(linear[:3]) or "none"
        raise BadInputError(
            f"no module of {type(transformer).__name__} is known as {targets}, so no adapter can be put on",
            where="encoder.adapter.targets",
            hint=f"Name the modules in a list. Linear modules: {shown}.",
        )
    return names


def quantization_settings(quantize: str, device_type: str) -> dict[str, Any]:
    """The options by which transformers loads a base in 4 or 8 bits (QLoRA, arXiv 2305.14314); nothing for ``none``."""
    if quantize == "none":
        return {}
    require_bitsandbytes(f"a base in {quantize}", device_type, "encoder.adapter.quantize", "Use quantize: none.")
    import torch
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if native else torch.float32,
    )
    return {"quantization_config": settings}


def add_lora(model: SentenceTransformer, config: LoRAConfig, base: AdapterBase, seed: int) -> None:
    """Put a fresh adapter on the transformer; its weights are float32, and the transformer's own no longer trained.

    The embeddings are those of the base until the first step.
    """
    import torch
    from peft import LoraConfig

    if not hasattr(model[0], "auto_model"):
        raise BadInputError(
            f"adapters need a transformer, and the model's first module is a {type(model[0]).__name__}",
            where="encoder.adapter",
        )
    from torch import nn

    transformer = model[0].auto_model
    targets = lora_targets(transformer, config.targets)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_dora=config.use_dora,
        fan_in_fan_out=not isinstance(transformer.get_submodule(targets[0]), nn.Linear),
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(settings)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        raise BadInputError(
            f"the installed transformers does not work with the installed peft: {error}",
            where="encoder.adapter",
            hint="pip install 'transformers<5.24', or a newer peft.",
        ) from error
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    record_base(transformer, base)


def record_base(transformer: Any, base: AdapterBase) -> None:
    """Say in the adapter's settings what it was trained on; peft would write the path of this machine."""
    for settings in transformer.peft_config.values():
        settings.base_model_name_or_path = base.name
        settings.revision = base.revision
        settings.base_weights, settings.base_path = base.weights, base.path  # none of peft's own, so not saved by it


def merge_adapter(model: SentenceTransformer) -> None:
    """Add the adapter to the weights it stands on and take it off, in place; the weights can be trained again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not has_adapter(model):
        ours = bool(getattr(model[0], "adapters", None))
        raise BadInputError(
            "bottlenecks and prefixes are no sums of weights, so they cannot be merged into the weights of their base"
            if ours
            else "this model has no adapter that could be merged",
            where="adapter",
            hint="save_encoder keeps base and adapter in one folder." if ours else None,
        )
    transformer = model[0].auto_model
    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, module.get_base_layer())
    transformer.requires_grad_(True)
    without_adapter(transformer)


def save_adapter(model: SentenceTransformer, folder: Path, place: Path) -> None:
    """Save a model without the weights of its transformer, which its adapter's settings name; the folder will stand at ``place``."""
    settings = model[0].auto_model.peft_config["default"]
    base = base_of(model)
    assert base is not None
    # peft would ask the hub for the base's vocabulary.
    settings.base_model_name_or_path = None
    try:
        model.save_pretrained(str(folder), create_model_card=False)
    finally:
        settings.base_model_name_or_path = base.name
    repair_dora(folder)
    written = read_json(folder / ADAPTER_CONFIG, "adapter configuration")
    write_json(folder / ADAPTER_CONFIG, {**written, "base_model_name_or_path": base.name, "revision": base.revision})
    name_base(folder, base, place)


def base_of(model: SentenceTransformer) -> AdapterBase | None:
    """The base of a loaded model's adapter; None without an adapter."""
    settings = (getattr(getattr(model[0], "auto_model", None), "peft_config", None) or {}).get("default")
    if settings is not None:
        more = (getattr(settings, name, None) for name in ("base_weights", "base_path"))
        return AdapterBase(settings.base_model_name_or_path, settings.revision, *more)
    known = getattr(model[0], "base", None)
    return None if known is None else AdapterBase(**known, path=getattr(model[0], "base_path", None))


def name_base(folder: Path, base: AdapterBase, place: Path) -> None:
    """Say in an adapter's folder where its base is: its name, its content, and the way there, if it is one, from ``place``.

    That is where the folder will stand: it may be written aside, from where the way is another.
    """
    way = None
    if base.is_local and base.path is not None and Path(base.path).is_dir():
        way = Path(os.path.relpath(base.path, place.resolve())).as_posix()
        if not (folder / BOTTLENECKS).is_file():
            _link_weights(folder, Path(base.path), way)
    write_json(folder / BASE_FILE, {**base.identity, "path": way})


def _link_weights(folder: Path, base: Path, way: str) -> None:
    """Lay a low-rank adapter's folder out so that plain sentence-transformers takes the weights from the base's folder."""
    (folder / BESIDE).mkdir(exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if (folder / name).is_file():
            (folder / name).replace(folder / BESIDE / name)
    shutil.copyfile(base / "config.json", folder / "config.json")
    for name in INDEXES:
        (folder / name).unlink(missing_ok=True)
    index, places = _weights_of(base)
    write_json(folder / index, {"metadata": {}, "weight_map": {key: f"{way}/{file}" for key, file in places.items()}})
    settings = read_json(folder / _SETTINGS, "settings") if (folder / _SETTINGS).is_file() else {}
    loading = {**settings.get("model_kwargs", {}), "adapter_kwargs": {"subfolder": BESIDE}}
    write_json(folder / _SETTINGS, {**settings, "model_kwargs": loading})


def _weights_of(base: Path) -> tuple[str, dict[str, str]]:
    """The index that names a model's weights, and weight -> file, in shards or in one file."""
    from nearfield.encoders.source import safetensors_header

    for index in INDEXES:
        one = index.removesuffix(".index.json")
        if (base / one).is_file():
            if one.endswith(".safetensors"):
                return index, dict.fromkeys(safetensors_header(base / one), one)
            import torch

            return index, dict.fromkeys(torch.load(base / one, map_location="meta", weights_only=True), one)
        if (base / index).is_file():
            return index, dict(read_json(base / index, "index of weights")["weight_map"])
    raise BadInputError("this base has no weights (*.safetensors) at its top", where=str(base))


def repair_dora(folder: Path) -> None:
    """Name DoRA's magnitudes in a saved adapter so that transformers finds them.

    peft drops their last part ``.weight`` in saving, and transformers then loads an adapter without them and only warns.
    peft reads both names.
    """
    from safetensors.torch import load_file, save_file

    file = folder / ADAPTER_WEIGHTS
    tensors = load_file(file) if file.is_file() else {}
    if any(name.endswith(_MAGNITUDE) for name in tensors):
        renamed = {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: t for name, t in tensors.items()}
        file.unlink()  # it may be a link
        save_file(renamed, file, metadata={"format": "pt"})


@contextlib.contextmanager
def joined_with_base(folder: Path, base: str) -> Iterator[Path]:
    """A folder of links to an adapter's files that names ``base``, a folder of this machine, as what it stands on."""
    with tempfile.TemporaryDirectory(prefix="nearfield-adapter-") as temporary:
        joined, place = Path(temporary), adapter_files(folder)
        changed = {ADAPTER_CONFIG, BOTTLENECKS, BASE_FILE}
        entries = list(folder.iterdir())
        if place != folder:
            # The base's own files take the places of what leads to it.
            changed |= {BESIDE, "config.json", _SETTINGS, *INDEXES}
            entries += list(place.iterdir())
            settings = read_json(folder / _SETTINGS, "settings")
            settings["model_kwargs"] = {k: v for k, v in settings["model_kwargs"].items() if k != "adapter_kwargs"}
            write_json(joined / _SETTINGS, settings)
        for entry in entries:
            if entry.name not in changed:
                try:
                    (joined / entry.name).symlink_to(entry.resolve())
                except OSError:  # no links on this file system
                    (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, joined / entry.name)
        if (folder / BOTTLENECKS).is_file():
            settings = read_json(folder / BOTTLENECKS, "adapter configuration")
            write_json(joined / BOTTLENECKS, {**settings, "base": {"name": base, "revision": None}})
            yield joined
            return
        settings = read_json(place / ADAPTER_CONFIG, "adapter configuration")
        repair_dora(joined)
        write_json(joined / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": base, "revision": None})
        yield joined


def relink(folder: Path, given: str) -> None:
    """Say in the folder of an adapter alone that its base lies elsewhere now; it must be the same base."""
    stands_on = adapter_base(folder)
    if stands_on is None:
        raise BadInputError("this is a whole model, no adapter that was saved alone: it has no base", where=str(folder))
    name_base(folder, replace(stands_on, path=find_base(stands_on, folder, given)), folder)


def has_bottlenecks(model: SentenceTransformer) -> bool:
    """Whether the transformer has adapters of ours, bottlenecks or prefixes, which are no part of its weights."""
    return bool(getattr(model[0], "adapters", None))


@contextlib.contextmanager
def saved_alone(model: SentenceTransformer, alone: bool) -> Iterator[None]:
    """Let a model with adapters of ours be saved without its base for the time of a block."""
    module: Any = model[0]
    if not has_bottlenecks(model):
        yield
        return
    before = module.saves_base
    module.saves_base = not alone
    try:
        yield
    finally:
        module.saves_base = before


def check_plain(model: SentenceTransformer, kind: str) -> None:
    """Refuse a model that does not begin with a transformer, or has such adapters already."""
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer

    if not hasattr(model[0], "auto_model") or isinstance(model[0], AdaptedTransformer):
        raise BadInputError(
            f"{kind} adapters are put on a plain transformer, and the model's first module is a {type(model[0]).__name__}",
            where="encoder.adapter",
        )


def adapted_transformer(model: SentenceTransformer, base: AdapterBase) -> AdaptedTransformer:
    """The model's transformer, of which nothing is trained, with a place for adapters."""
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer

    adapted = AdaptedTransformer.around(model[0])
    adapted.model.requires_grad_(False)
    adapted.base, adapted.base_path = base.identity, base.path
    return adapted


def load_adapters(encoder: LoadedEncoder, folders: Mapping[str, str | Path]) -> None:
    """Put several saved adapters on one loaded base, each under its name; none is active then.

    Raises :class:`BadInputError` for an adapter that was trained on another base (another name, revision or weights), that is
    not alone in its folder, or where low-rank ones stand beside bottlenecks or prefixes.
    """
    from nearfield.encoders.shipped.nearfield_adapters import WEIGHTS, AdaptedTransformer

    model, base = (
        encoder.model,
        AdapterBase(encoder.name, encoder.revision, weights_hash(encoder.path, encoder.revision)),
    )
    kinds = {name: (Path(folder) / BOTTLENECKS).is_file() for name, folder in folders.items()}
    if len(set(kinds.values())) > 1:
        raise BadInputError("low-rank and other adapters cannot stand on one model together", where="adapters")
    for name, place in folders.items():
        folder = Path(place)
        stands_on = adapter_base(folder)
        if stands_on is None:
            raise BadInputError("this folder does not hold an adapter alone", where=str(folder))
        for what, wanted, present in (
            ("name", stands_on.name, base.name),
            ("revision", stands_on.revision, base.revision),
            ("weights", stands_on.weights, base.weights),
        ):
            if wanted != present and None not in (wanted, present):
                raise BadInputError(
                    f"this adapter was trained on another base: its {what} is {wanted}, here it is {present}",
                    where=str(folder),
                )
        if kinds[name]:
            if not isinstance(model[0], AdaptedTransformer):
                model[0] = AdaptedTransformer.around(model[0])
            settings = read_json(folder / BOTTLENECKS, "adapter configuration")
            model[0].read_adapters(settings, folder / WEIGHTS, rename=name)
        else:
            _load_lora(model, name, folder, stands_on)
    activate(model, None)
    model.eval()


def _load_lora(model: SentenceTransformer, name: str, folder: Path, base: AdapterBase) -> None:
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter_files(folder) / file).is_file():
            raise BadInputError(f"this adapter has no {file}", where=str(folder))
    with joined_with_base(folder, base.name) as joined, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
        model[0].auto_model.load_adapter(str(joined), adapter_name=name)
    record_base(model[0].auto_model, base)


def activate(model: SentenceTransformer, name: str | None) -> None:
    """Encode with the adapter of this name from now on; None is the base alone, to the bit."""
    module: Any = model[0]
    if has_bottlenecks(model):
        known = list(module.adapters)
    else:
        known = list(getattr(getattr(module, "auto_model", None), "peft_config", None) or {})
    if name is not None and name not in known:
        raise BadInputError(
            f"there is no adapter {name!r}", where="adapters", hint=f"There are: {', '.join(known) or 'none'}."
        )
    if has_bottlenecks(model):
        module.activate(name)
    elif name is None and known:
        module.auto_model.disable_adapters()
    elif name is not None:
        module.auto_model.enable_adapters()
        module.auto_model.set_adapter(name)


@contextlib.contextmanager
def using(
    model: SentenceTransformer, name: str | None, *, afterwards: str | None = None
) -> Iterator[SentenceTransformer]:
    """Encode with the adapter of this name for the time of a block, with the base alone (or another one) afterwards."""
    activate(model, name)
    try:
        yield model
    finally:
        activate(model, afterwards)
