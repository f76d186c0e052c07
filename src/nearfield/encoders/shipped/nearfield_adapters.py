"""A transformer with bottleneck or prefix adapters, for sentence-transformers. This file travels with the models that use it.

It needs torch, safetensors and sentence-transformers only. ``SentenceTransformer(folder, trust_remote_code=True)`` runs it.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from transformers import AutoTokenizer

SETTINGS = "adapters.json"
BASE = "adapter_base.json"
WEIGHTS = "adapters.safetensors"


class Bottleneck(nn.Module):
    """h + up(activation(down(h))); ``up`` starts at zero, so that nothing is changed (Houlsby et al., arXiv 1902.00751)."""

    def __init__(self, dimension: int, width: int, activation: str = "gelu") -> None:
        super().__init__()
        self.down = nn.Linear(dimension, width)
        self.activation = {"gelu": nn.GELU, "relu": nn.ReLU}[activation]()
        self.up = nn.Linear(width, dimension)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d)."""
        changed: Tensor = self.up(self.activation(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + changed.to(hidden.dtype)


class Prefix(nn.Module):
    """Learnt states that stand before the text in every layer (P-tuning v2, arXiv 2110.07602; prefix tuning, 2101.00190)."""

    def __init__(self, layers: int, length: int, dimension: int) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.zeros(layers, length, dimension))


class _Fill:
    """Puts the active prefix's states of one layer where the text of a prefix stands in what the layer is given."""

    def __init__(self, owner: AdaptedTransformer, place: str) -> None:
        self.owner = owner
        self.place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = self.owner.prefix_rows
        if rows is None or self.owner.active is None:
            return None
        layers = self.owner.settings[self.owner.active]["layers"]
        prefix: Any = self.owner.adapters[self.owner.active]
        states: Tensor = prefix.states[layers.index(self.place)]
        hidden = args[0] if args else kwargs["hidden_states"]
        filled = hidden.scatter(1, rows, states.to(hidden.dtype).expand(len(hidden), -1, -1))
        return ((filled, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": filled})


def _key(place: str) -> str:
    """A module's name as a key, which may hold no dot."""
    return place.replace(".", "__")


class _Insert:
    """Sends what a module gives through the active adapter of that place; a class, so that a copied model has its own."""

    def __init__(self, owner: AdaptedTransformer, place: str) -> None:
        self.owner = owner
        self.place = place

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        active = self.owner.active
        if active is None or self.place not in self.owner.settings[active].get("places", ()):
            return output
        adapter = self.owner.adapters.get_submodule(f"{active}.{_key(self.place)}")
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa and models like it count from behind the padding token's number."""
    embeddings: Any = getattr(model, "embeddings", None)
    return int(embeddings.padding_idx) + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0


def _place_of(base: dict[str, Any], folder: str, place: dict[str, Any]) -> str:
    """The base's folder, on the way that is named from the adapters' own, or its name."""
    file = Module.load_file_path(folder, filename=BASE, **place)
    way = None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("path")
    if way is not None and (Path(folder) / way).is_dir():
        return str(Path(folder) / way)
    name = str(base["name"])
    if name.startswith("local/") and not Path(name).is_dir():
        looked = f" at {Path(folder) / way}" if way is not None else ""
        raise FileNotFoundError(
            f"{folder} holds adapters alone, and their base, the folder {name.removeprefix('local/')} (content "
            f"{base['revision']}), is not{looked or ' here'}"
        )
    return name


class AdaptedTransformer(Transformer):  # type: ignore[misc]
    """sentence-transformers' Transformer with named sets of adapters, one of which is active, or none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin()

    def _begin(self) -> None:
        self.adapters = nn.ModuleDict()
        self.settings: dict[str, dict[str, Any]] = {}
        self.active: str | None = None
        self.base: dict[str, Any] | None = None
        """Name, revision and weight hash of the model that the adapters stand on."""
        self.base_path: str | None = None
        """Its folder, if it is one."""
        self.saves_base = True
        self.prefix_rows: Tensor | None = None
        """(n, p, d) while texts are encoded with a prefix: which tokens of each are the prefix's."""
        self._places: set[str] = set()
        self._layers: set[str] = set()

    @classmethod
    def around(cls, transformer: Transformer) -> AdaptedTransformer:
        """The same transformer, which can have adapters from now on."""
        adapted = cls.__new__(cls)
        adapted.__dict__.update(transformer.__dict__)
        adapted._begin()
        return adapted

    def add_adapter(self, name: str, places: list[str], width: int, activation: str = "gelu") -> None:
        """Put a fresh adapter behind each of the named modules, and let it be active."""
        made = nn.ModuleDict()
        weight = next(self.model.parameters())
        dimension = int(self.model.config.hidden_size)
        for place in places:
            made[_key(place)] = Bottleneck(dimension, width, activation).to(weight.device)
            if place not in self._places:
                self._places.add(place)
                self.model.get_submodule(place).register_forward_hook(_Insert(self, place))
        self.adapters[name] = made
        self.settings[name] = {"places": list(places), "width": width, "activation": activation}
        self.active = name

    def add_prefix(self, name: str, layers: list[str], length: int) -> None:
        """Put a prefix of so many tokens, of zeros, before the text in each of the named layers, and let it be active."""
        weight = next(self.model.parameters())
        self.adapters[name] = Prefix(len(layers), length, int(self.model.config.hidden_size)).to(weight.device)
        for layer in layers:
            if layer not in self._layers:
                self._layers.add(layer)
                self.model.get_submodule(layer).register_forward_pre_hook(_Fill(self, layer), with_kwargs=True)
        self.settings[name] = {"kind": "prefix", "layers": list(layers), "length": length}
        self.active = name

    @property
    def prefix_length(self) -> int:
        """Tokens of the active prefix; 0 where there is none."""
        return 0 if self.active is None else int(self.settings[self.active].get("length", 0))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As sentence-transformers' own; what is given back are the text's tokens alone, without those of a prefix."""
        count = self.prefix_length
        if not count:
            plain: dict[str, Any] = super().forward(features, **kwargs)
            return plain
        ids, mask = features["input_ids"], features["attention_mask"]
        n, length = ids.shape
        # The prefix stands right before the text, behind what is padded on the left.
        begins = mask.long().argmax(1, keepdim=True)
        place = torch.arange(length, device=ids.device).expand(n, -1)
        text = torch.where(place < begins, place, place + count)
        rows = begins + torch.arange(count, device=ids.device)
        # Any word but the padding: what it looks up is replaced.
        word = 1 if getattr(self.model.config, "pad_token_id", None) == 0 else 0
        longer = ids.new_full((n, length + count), word).scatter(1, text, ids)
        seen = mask.new_ones((n, length + count)).scatter(1, text, mask)
        given = {**features, "input_ids": longer, "attention_mask": seen}
        for name in ("token_type_ids", "position_ids"):
            given.pop(name, None)
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            # Texts have the positions that they have without a prefix, so that none is too long with it.
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = torch.zeros_like(longer).scatter(1, text, positions) + _first_position(self.model)
        if "token_type_ids" in features:
            types = features["token_type_ids"]
            given["token_type_ids"] = types.new_zeros((n, length + count)).scatter(1, text, types)
        self.prefix_rows = rows[:, :, None].expand(-1, -1, int(self.model.config.hidden_size))
        try:
            output = super().forward(given, **kwargs)
        finally:
            self.prefix_rows = None

        def of_text(states: Tensor) -> Tensor:
            return states.gather(1, text[:, :, None].expand(-1, -1, states.shape[-1]))

        features[self.module_output_name] = of_text(output[self.module_output_name])
        if "all_layer_embeddings" in output:
            features["all_layer_embeddings"] = tuple(of_text(states) for states in output["all_layer_embeddings"])
        return features

    def activate(self, name: str | None) -> None:
        """Encode with this adapter from now on, or with the base alone."""
        if name is not None and name not in self.adapters:
            raise KeyError(f"there is no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        self.active = name

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """The adapters, beside the base or alone."""
        if self.saves_base:
            super().save(output_path, safe_serialization=safe_serialization)
        else:
            self.processor.save_pretrained(output_path)
            self.save_config(output_path)
        base = None if self.saves_base else self.base
        settings = {"base": base, "active": self.active, "adapters": self.settings}
        (Path(output_path) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in self.adapters.state_dict().items()}
        save_file(tensors, Path(output_path) / WEIGHTS, metadata={"format": "pt"})

    def read_adapters(self, settings: dict[str, Any], weights: Path, rename: str | None = None) -> None:
        """Add the adapters of a saved model; ``rename`` names the only one."""
        tensors = load_file(weights)
        for name, each in settings["adapters"].items():
            called = rename or name
            if each.get("kind") == "prefix":
                self.add_prefix(called, each["layers"], each["length"])
            else:
                self.add_adapter(called, each["places"], each["width"], each["activation"])
            of_adapter = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            self.adapters[called].load_state_dict(of_adapter)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> AdaptedTransformer:
        """From a folder or the hub; adapters that were saved alone are put on the base that they name."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        place = {name: kwargs[name] for name in names if name in kwargs}
        files = [Module.load_file_path(model_name_or_path, filename=name, **place) for name in (SETTINGS, WEIGHTS)]
        if files[0] is None or files[1] is None:
            raise FileNotFoundError(f"{model_name_or_path} lacks {SETTINGS} or {WEIGHTS}")
        settings = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        base = settings["base"]
        if base is None:
            module = super().load(model_name_or_path, **kwargs)
        else:
            found_at = _place_of(base, model_name_or_path, place)
            module = super().load(found_at, **{**kwargs, "subfolder": "", "revision": base["revision"]})
            where = {"cache_dir" if name == "cache_folder" else name: value for name, value in place.items()}
            module.processor = AutoTokenizer.from_pretrained(model_name_or_path, **where)
        module.read_adapters(settings, Path(files[1]))
        module.base = base
        module.activate(settings["active"])
        adapted: AdaptedTransformer = module
        return adapted
