"""A transformer with bottleneck adapters, for sentence-transformers. This file travels with the models that use it.

It needs torch, safetensors and sentence-transformers only. ``SentenceTransformer(folder, trust_remote_code=True)`` runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer
from torch import Tensor, nn
from transformers import AutoTokenizer

SETTINGS = "adapters.json"
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
        if active is None or self.place not in self.owner.settings[active]["places"]:
            return output
        adapter = self.owner.adapters.get_submodule(f"{active}.{_key(self.place)}")
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


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
        self.saves_base = True
        self._places: set[str] = set()

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
            self.add_adapter(called, each["places"], each["width"], each["activation"])
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            self.adapters[called].load_state_dict(own)

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
            module = super().load(base["name"], **{**kwargs, "subfolder": "", "revision": base["revision"]})
            where = {"cache_dir" if name == "cache_folder" else name: value for name, value in place.items()}
            module.processor = AutoTokenizer.from_pretrained(model_name_or_path, **where)
        module.read_adapters(settings, Path(files[1]))
        module.base = base
        module.activate(settings["active"])
        found: AdaptedTransformer = module
        return found
