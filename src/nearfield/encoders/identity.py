"""A name for what a model computes: its vectors are kept under it, so all that changes a vector must change it.

Read from the model in memory, whatever it was loaded from: weights and buffers with their types, the settings of each module and
of its configuration (and so the attention kernel), hooks, adapters, tokenizers and processors, and the code of classes that no
library holds. Paths of files, and what a model remembers of earlier calls, are left out.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import logging
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.files import canonical_json, fingerprint
from nearfield.provenance import versions_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VERSION = 3
"""Raised when the same model would give other vectors, as by another way of packing texts."""

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "peft",
    "gguf",
    "bitsandbytes",
    "flash-attn",
    "pillow",
    "torchvision",
    "numpy",
)
"""Packages whose versions change the numbers that a model gives, in their last digits or by a fault that was mended."""

_PLACES = re.compile(
    r"name_or_path$|(^|_)(path|file|files_loaded|dir|folder|commit_hash)$|^transformers_version$|^model_card"
)
_PASSING = {
    "training",
    "deprecation_warnings",
    "verbose",
    "gradient_checkpointing",
    "max_seq_len_cached",
    "rope_deltas",
    # The prompt is named beside each vector, and the similarity function changes no vector.
    "prompts",
    "default_prompt_name",
    "similarity",
    "similarity_pairwise",
    "similarity_fn_name",
    "trust_remote_code",
}
"""Attributes that say nothing of a vector, or change as a model is used."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def computing_versions() -> dict[str, str]:
    """The versions of the installed packages that change the numbers a model gives."""
    return versions_of(PACKAGES)


def model_fingerprint(model: SentenceTransformer) -> str:
    """32 hex digits of what turns a text into a vector in this process: see the top of this file.

    It is taken from the model in memory, so that a model that was changed after loading is another one.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    modules = dict(model.named_modules(remove_duplicate=False))
    told = _Telling({id(module): name for name, module in modules.items()})
    described = [[name, told.module(module)] for name, module in modules.items()]
    settings = {
        "version": VERSION,
        "versions": computing_versions(),
        "modules": described,
        "longest": model.max_seq_length,
        "kernels": [model.device.type, torch.get_float32_matmul_precision()],
    }
    everywhere = [hook for place in _GLOBAL_HOOKS for hook in getattr(torch.nn.modules.module, place).values()]
    if everywhere:
        settings["hooks of all modules"] = told.value(everywhere)
    digest.update(canonical_json(settings).encode())
    return digest.hexdigest()


def _bytes_of(tensor: Any) -> Any:
    """The bytes of a tensor of any type, in main memory."""
    import torch

    if hasattr(tensor, "dequantize") and tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@functools.cache
def _library(top: str) -> str | None:
    """The name and version of the installed library that a top-level module belongs to; None for code that may change without
    a version: a user's own, and that which travels with a model."""
    if top in sys.stdlib_module_names or top == "builtins":
        return "python"
    module = sys.modules.get(top)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    if not any(part in ("site-packages", "dist-packages") for place in places for part in Path(place).parts):
        return None
    stated = getattr(module, "__version__", None)
    if isinstance(stated, str):
        return f"{top} {stated}"
    versions = versions_of([top]) or versions_of(sorted(set(importlib.metadata.packages_distributions().get(top, ()))))
    return canonical_json(versions or top)


def _is_own(part: Any) -> bool:
    """Whether a function or class is no library's, nor ours, whatever it says of itself: its code is what counts."""
    if isinstance(part, types.FunctionType):
        module = part.__globals__.get("__name__")
    elif isinstance(part, type):
        module = part.__module__
    else:
        return False
    return _library_of(module) is None and (module or "").partition(".")[0] != "nearfield"


def _replaced(kind: type) -> dict[str, Any]:
    """Functions and classes of a user's own that stand in a library's class, in those that it is made from, or beside it in its
    module: what was there is not what runs."""
    parts_replaced: dict[str, Any] = {}
    for each in kind.__mro__:
        if _library_of(each.__module__) in (None, "python"):
            continue
        beside = vars(sys.modules.get(each.__module__, types))
        for place in (vars(each), beside):
            parts = {key: _plain(part) for key, part in place.items()}
            parts_replaced |= {f"{each.__qualname__}.{key}": part for key, part in parts.items() if _is_own(part)}
    return parts_replaced


def _library_of(module: str | None) -> str | None:
    return _library((module or "").partition(".")[0])


class _Telling:
    """JSON-able descriptions of whatever a model holds, the same in every process; each object is told once."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        """id of a module -> its name in the model."""
        self.told: dict[int, Any] = {}
        """id of an object -> its description, so that each is described once."""
        self.alive: list[Any] = []
        """The objects that were described, so that no other gets their address."""

    def module(self, module: Any) -> Any:
        """The class, settings and hooks of a module, without its tensors and the modules in it."""
        from torch import nn

        module_class = type(module)
        inner = set(vars(nn.Module()))
        private = _library_of(module_class.__module__) is None
        settings = {
            key: self.value(value)
            for key, value in vars(module).items()
            if key not in inner and (private or not key.startswith("_")) and not _is_passing(key)
        }
        hooks = [self.value(list(getattr(module, place).values())) for place in _HOOKS]
        tensors = sorted([*module._parameters, *module._buffers])
        return [self.value(module_class), settings, hooks, tensors, list(module._modules), self._tools(module)]

    def _tools(self, module: Any) -> Any:
        """Values that sentence-transformers reaches through properties, where it is not among a module's attributes."""
        tokenizer = getattr(module, "tokenizer", None)
        return None if tokenizer is None or "tokenizer" in vars(module) else self.value(tokenizer)

    def value(self, value: Any) -> Any:
        """Of any object."""
        if value is None or isinstance(value, bool | int | str):
            return value.value if isinstance(value, enum.Enum) else value
        if isinstance(value, float | complex):
            return repr(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return hashlib.blake2b(bytes(value), digest_size=16).hexdigest()
        if id(value) in self.names:
            return f"module {self.names[id(value)]}"
        if id(value) not in self.told:
            self.alive.append(value)
            self.told[id(value)] = "again"  # what an object that holds itself finds
            content = self._container(value)
            self.told[id(value)] = content if isinstance(content, str) else fingerprint(content)
        return self.told[id(value)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        if isinstance(value, set | frozenset):
            return ["set", sorted(canonical_json(_Telling(self.names).value(each)) for each in value)]
        if isinstance(value, np.ndarray | np.generic):
            data = np.ascontiguousarray(value)
            plain = (
                data.tolist() if data.dtype == object else hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
            )
            return [str(data.dtype), list(data.shape), self.value(plain)]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, Path | logging.Logger):
            return "place"
        if isinstance(value, type):
            return self._kind(value)
        return self._callable(value)

    def _callable(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            return value.__name__
        return self._object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        pairs = [
            [key if isinstance(key, str) else canonical_json(self.value(key)), self.value(each)]
            for key, each in value.items()
            if not (isinstance(key, str) and _is_passing(key))
        ]
        return ["mapping", sorted(pairs, key=lambda pair: str(pair[0]))]

    def _kind(self, kind: type) -> Any:
        """A class by its name, and of ours or a user's its code with that of the classes that it is made from."""
        library = _library_of(kind.__module__)
        if library is not None:
            name = f"{kind.__module__}.{kind.__qualname__} {library}"
            replaced = {key: self.value(part) for key, part in _replaced(kind).items()}
            return [name, replaced] if replaced else name
        parts = {
            key: self.value(_plain(part))
            for key, part in vars(kind).items()
            if not (key.startswith("__") and not callable(part)) and not key.startswith("_abc_")
        }
        return [kind.__qualname__, dict(sorted(parts.items())), [self.value(base) for base in kind.__bases__]]

    def _function(self, function: types.FunctionType) -> Any:
        closed = [_content(cell) for cell in function.__closure__ or ()]
        library = _library_of(function.__module__)
        if library is not None and not any(map(callable, closed)):
            return f"{function.__module__}.{function.__qualname__} {library}"
        code = function.__code__
        called = {
            name: self.value(function.__globals__[name])
            for name in _names(code)
            if name in function.__globals__ and _says_something(function.__globals__[name])
        }
        given = [function.__defaults__, function.__kwdefaults__]
        return ["function", self._code(code), called, self.value(closed), self.value(given)]

    def _code(self, code: types.CodeType) -> Any:
        inner = [self._code(each) if isinstance(each, types.CodeType) else self.value(each) for each in code.co_consts]
        return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), inner]

    def _object(self, value: Any) -> Any:
        """An object by its class and what it holds."""
        kind, told = type(value), self._known(value)
        if told is not None:
            return told
        if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            held = {key: each for key, each in vars(value).items() if not _is_passing(key)}
            return [self.value(kind), self.value(held)]
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # what cannot be taken apart is known by its class alone
            return self.value(kind)
        return [self.value(kind), self.value(reduced[1:3] if isinstance(reduced, tuple) else reduced)]

    def _known(self, value: Any) -> Any:
        """Tensors, types, tokenizers and configurations, each as its library writes it down; None for all else."""
        import torch
        from tokenizers import Tokenizer
        from transformers import PretrainedConfig, PreTrainedTokenizerBase

        from nearfield.encoders.kernels import ATTENTION
        from nearfield.encoders.private import registered

        if isinstance(value, torch.Tensor):
            digest = hashlib.blake2b(_bytes_of(value), digest_size=16).hexdigest()
            return ["tensor", str(value.dtype), list(value.shape), digest]
        if isinstance(value, torch.dtype):
            return str(value)
        if isinstance(value, torch.device | torch.Generator):
            return "place"
        if isinstance(value, Tokenizer):
            return _without(value.to_str(), "padding")
        if isinstance(value, PreTrainedTokenizerBase):
            return self._tokenizer(value)
        if isinstance(value, PretrainedConfig):
            kernel = getattr(value, "_attn_implementation", None)
            # Ours takes the place of torch's when texts are packed for the first time, and is the same in numbers.
            kernel = "sdpa" if kernel == ATTENTION else kernel
            own = [part for part in registered(kernel) if _is_own(part)]
            return [type(value).__name__, self.value(value.to_dict()), [kernel, self.value(own)] if own else kernel]
        proto = getattr(value, "serialized_model_proto", None)
        return self.value(proto()) if callable(proto) else None

    def _tokenizer(self, tokenizer: Any) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        held = {
            key: value
            for key, value in vars(tokenizer).items()
            if not _is_passing(key)
            and key not in ("_tokenizer", "init_kwargs", "init_inputs", "_in_target_context_manager")
        }
        words = tokenizer.get_vocab() if backend is None else _without(backend.to_str(), "padding", "truncation")
        return [self.value(type(tokenizer)), self.value(words), self.value(held)]


def _is_passing(name: str) -> bool:
    name = name.lstrip("_")
    return name in _PASSING or _PLACES.search(name) is not None


def _plain(part: Any) -> Any:
    """The function in a static method, class method or property."""
    if isinstance(part, staticmethod | classmethod):
        return part.__func__
    if isinstance(part, property):
        return [part.fget, part.fset]
    return part.func if isinstance(part, functools.cached_property) else part


def _names(code: types.CodeType) -> list[str]:
    inner = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in _names(each)]
    return sorted({*code.co_names, *inner})


def _says_something(value: Any) -> bool:
    """Whether a global that a function names may change what it does: settings and code that no library holds."""
    if isinstance(value, types.ModuleType):
        return False
    if isinstance(value, type | types.FunctionType):
        return _library_of(value.__module__) is None
    return isinstance(value, bool | int | float | str | bytes | list | tuple | dict | set | frozenset | np.ndarray)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _without(tokenizer: str, *keys: str) -> str:
    """A tokenizer's own description without what a batch sets on it for the time being."""
    value = json.loads(tokenizer)
    return canonical_json({key: part for key, part in value.items() if key not in keys})
