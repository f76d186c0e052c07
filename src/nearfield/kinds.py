"""Open kinds: ``kind:`` in a recipe names one of ours, one that an installed package registers, or an import path.

A part of the library (objectives, planners, readers ...) has one table of its kinds: name -> import path of the settings
class and a line of help. Nothing is imported until a recipe names a kind. A setting that picks one is annotated with the
base class of the settings and the table::

    objective: Annotated[ObjectiveSettings, OBJECTIVES]

An installed package adds names by entry points of the group ``nearfield.<part>``; ``kind: package.module:Settings`` needs
no entry point. An import path imports code, so only installed packages may be named (the working folder too with
:func:`allow_local_code`), and never a model's or a data set's folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import re
import site
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlparse

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from nearfield.files import fingerprint, hash_file

logger = logging.getLogger("nearfield")

IMPORT_PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
# Files that make a folder a model's or a data set's: code that came with one is never run.
_FILES_OF_MODELS_AND_DATA = ("modules.json", "adapter_config.json", "tokenizer.json", "dataset_info.json", "store.json")

_local_code: ContextVar[bool] = ContextVar("local_code", default=False)
_registered_in_schema: ContextVar[bool] = ContextVar("registered_in_schema", default=True)
_told: set[str] = set()
"""The import paths whose files this process has named in its log."""


@dataclass(frozen=True)
class KindSource:
    """Where the code of a kind from outside is."""

    path: str
    """``package.module:Settings``."""
    file: str
    """Empty where the class was made without a file, as in a notebook."""
    package: str
    version: str
    """Of the installed package; empty for code of the working folder."""
    content: str
    """Hash of the module's file and of the other modules of its package."""

    def __str__(self) -> str:
        version = f" ({self.package} {self.version})" if self.version else ""
        return f"{self.path} runs code of {self.file or 'this session'}{version}"


PARTS: dict[str, Kinds] = {}
"""The tables of kinds of all parts whose settings are imported, by the part's name."""


@dataclass(frozen=True)
class Kinds:
    """The kinds of one part of the library; an annotation of the settings that pick one of them."""

    part: str
    """``objectives``: packages register theirs under the entry points ``nearfield.objectives``."""
    base: str
    """Import path of the class that the settings of every kind are a subclass of."""
    table: Mapping[str, tuple[str, str]]
    """Name -> (import path of its settings, one line of help)."""
    left_out: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.left_out:
            PARTS[self.part] = self

    def without(self, *names: str, base: str | None = None) -> Kinds:
        """The same kinds without some of ours, for settings that cannot hold them; ``base`` is a narrower class that is wanted."""
        return replace(self, left_out=self.left_out | set(names), base=base or self.base)

    def __hash__(self) -> int:
        return hash((self.part, self.base, self.left_out))

    def names(self) -> list[str]:
        """Our names, then those that installed packages register."""
        ours = [name for name in self.table if name not in self.left_out]
        return ours + sorted(name for name in self.registered() if name not in self.table)

    def help(self, name: str) -> str:
        """One line about a kind."""
        if name in self.table:
            return self.table[name][1]
        return f"registered by {self.registered()[name].value}"

    def registered(self) -> dict[str, importlib.metadata.EntryPoint]:
        """The names that installed packages register, each with its entry point; those of ours stay ours."""
        return {entry.name: entry for entry in importlib.metadata.entry_points(group=f"nearfield.{self.part}")}

    def find(self, kind: str) -> type[BaseModel]:
        """The settings class of a kind. Raises PydanticCustomError or PydanticKnownError where there is none."""
        if kind in self.table and kind not in self.left_out:
            return _settings_class(self.table[kind][0])
        path = kind
        if ":" not in kind:
            registered = self.registered().get(kind)
            if registered is None or kind in self.table:
                expected = ", ".join(repr(name) for name in self.names())
                raise PydanticKnownError(
                    "union_tag_invalid", {"discriminator": "'kind'", "tag": kind, "expected_tags": expected}
                )
            path = registered.value
        return self._from_outside(kind, path)

    def _from_outside(self, kind: str, path: str) -> type[BaseModel]:
        if not re.match(IMPORT_PATH, path):
            raise _refused(kind, "is no import path", "Write package.module:Settings.")
        module, _, name = path.partition(":")
        file = _importable(kind, module)
        if file is not None and path not in _told:
            _told.add(path)
            logger.info("%s: the kind %r runs code of %s", self.part, kind, file)
        try:
            settings = getattr(importlib.import_module(module), name, None)
        except Exception as error:
            raise _refused(kind, f"cannot be imported: {type(error).__name__}: {error}", f"Look at {file}.") from error
        base = _settings_class(self.base)
        if not (isinstance(settings, type) and issubclass(settings, base)):
            what = (
                f"{module} has no {name!r}" if settings is None else f"{name!r} is no subclass of {base.__qualname__}"
            )
            raise _refused(kind, f"cannot be used: {what}", f"Name a subclass of {self.base.replace(':', '.')}.")
        return settings

    # The methods that pydantic calls on an annotation.

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate, serialization=core_schema.simple_ser_schema("any")
        )

    def _validate(self, value: Any, info: ValidationInfo) -> BaseModel:
        if isinstance(value, BaseModel):
            if isinstance(value, _settings_class(self.base)) and getattr(value, "kind", None) not in self.left_out:
                return value
            raise PydanticCustomError("kind_refused", "{what}", {"what": f"{value!r} is none of these kinds"})
        if not isinstance(value, dict):
            raise PydanticKnownError("model_attributes_type")
        if not isinstance(value.get("kind"), str):
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        kind = value["kind"]
        settings_class = self.find(kind)
        outside = not _is_ours(settings_class)
        settings = {name: each for name, each in value.items() if name != "kind" or not outside}
        if info.mode == "json":
            # The type of a value is as strict in here as around: a list is a tuple, text is no number.
            made: BaseModel = settings_class.model_validate_json(
                json.dumps(settings), strict=True, context=info.context
            )
        else:
            made = settings_class.model_validate(settings, context=info.context)
        if outside:
            # The name that it goes by is the recipe's, so that what is written down can be read again.
            made.__dict__["kind"] = kind
            made.__pydantic_fields_set__.add("kind")
        return made

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = self.names() if _registered_in_schema.get() else [n for n in self.table if n not in self.left_out]
        choices = {}
        for name in names:
            settings = self.find(name)
            # A schema with a ``ref`` is written once, under ``$defs``.
            mark = {"ref": f"{settings.__module__}.{settings.__qualname__}:{id(settings)}"}
            choices[name] = cast(CoreSchema, {**settings.__pydantic_core_schema__, **mark})
        ours = handler(core_schema.tagged_union_schema(choices, discriminator="kind"))
        outside = {
            "type": "object",
            "description": "A kind of an installed package: package.module:Settings.",
            "properties": {"kind": {"type": "string", "pattern": IMPORT_PATH}},
            "required": ["kind"],
        }
        return {**ours, "oneOf": [*ours["oneOf"], outside]}


def _settings_class(path: str) -> type[BaseModel]:
    module, _, name = path.partition(":")
    settings: type[BaseModel] = getattr(importlib.import_module(module), name)
    return settings


def _refused(kind: str, what: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("kind_refused", "{what}", {"what": f"the kind {kind!r} {what}", "hint": hint})


@contextlib.contextmanager
def allow_local_code(allowed: bool = True) -> Iterator[None]:
    """Inside this block import paths may name modules of the working folder too."""
    mark = _local_code.set(allowed)
    try:
        yield
    finally:
        _local_code.reset(mark)


@contextlib.contextmanager
def only_our_kinds() -> Iterator[None]:
    """Inside this block JSON schemas leave out what installed packages register."""
    mark = _registered_in_schema.set(False)
    try:
        yield
    finally:
        _registered_in_schema.reset(mark)


def _is_ours(settings: type) -> bool:
    return settings.__module__.partition(".")[0] == "nearfield"


def _importable(kind: str, module: str) -> Path | None:
    """The file of a module that may be imported, found without importing it; None for a module of ours.

    Raises PydanticCustomError where it may not be imported.
    """
    top, *below = module.split(".")
    if top == "nearfield":
        return None
    folder = Path.cwd().resolve()
    if _local_code.get() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    # The package alone is looked up: to find a module in it would import the package.
    spec = importlib.util.find_spec(top) or importlib.machinery.PathFinder.find_spec(top, [str(folder)])
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    places = [root.joinpath(*below) for root in roots]
    files = [file for one in places for file in (one.with_suffix(".py"), one / "__init__.py") if file.is_file()]
    if spec is not None and spec.origin is not None and not below:
        files.insert(0, Path(spec.origin))
    if not files:
        raise _refused(
            kind, f"names no module that is installed: {module}", "Install its package, or correct the name."
        )
    file = files[0].resolve()
    if any(file.is_relative_to(root) for root in [*_package_folders(), *_installed_in_place().values()]):
        return file
    if not file.is_relative_to(folder):
        raise _refused(kind, f"is in no installed package: its code is {file}", "Install it (pip install -e FOLDER).")
    if not _local_code.get():
        hint = "Install it (pip install -e FOLDER), or allow code of the working folder by --allow-local-code."
        raise _refused(kind, f"is code of the working folder: {file}", hint)
    for parent in file.parents:
        if any((parent / name).is_file() for name in _FILES_OF_MODELS_AND_DATA):
            raise _refused(kind, f"is code in a folder of a model or of data: {parent}", "Move the code elsewhere.")
        if parent == folder:
            break
    return file


def _package_folders() -> list[Path]:
    """The folders that packages are installed in."""
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        places.add(site.getusersitepackages())
    return [Path(place).resolve() for place in places if place]


def _installed_in_place() -> dict[str, Path]:
    """Project -> its folder, of those that are installed in place (PEP 610: ``direct_url.json`` says ``editable``)."""
    folders = {}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("direct_url.json")
        stated = json.loads(text) if text else {}
        if stated.get("dir_info", {}).get("editable"):
            folders[str(distribution.metadata["Name"])] = Path(unquote(urlparse(stated["url"]).path)).resolve()
    return folders


@functools.cache
def _source(settings: type) -> KindSource:
    """Where a class came from, with the content of its module's file and of all modules of its package."""
    path = f"{settings.__module__}:{settings.__qualname__}"
    top = settings.__module__.partition(".")[0]
    name = getattr(sys.modules.get(settings.__module__), "__file__", None)
    if name is None:
        return KindSource(path, "", top, "", fingerprint([path, _text_of(settings)]))
    file = Path(name).resolve()
    head = getattr(sys.modules.get(top), "__file__", None)
    root = Path(head).resolve().parent if head and Path(head).name == "__init__.py" else None
    files = [file] if root is None else sorted(root.rglob("*.py"))
    base = root or file.parent
    content = fingerprint([[str(each.relative_to(base)), hash_file(each)] for each in files])
    owners = importlib.metadata.packages_distributions().get(top, [])
    owners = [*owners, *(project for project, place in _installed_in_place().items() if file.is_relative_to(place))]
    version = importlib.metadata.version(owners[0]) if owners else ""
    return KindSource(path, str(file), owners[0] if owners else top, version, content)


def _text_of(settings: type) -> str:
    try:
        return inspect.getsource(settings)
    except (OSError, TypeError):
        return ""


def outside_sources(settings: Any, exclude: Collection[str] = ()) -> list[KindSource]:
    """The code from outside that settings, and those in them, are classes of; each once, in their order.

    ``exclude`` names fields of the settings that are not looked into.
    """
    sources: dict[KindSource, None] = {}

    def walk(value: Any, left_out: Collection[str] = ()) -> None:
        if isinstance(value, BaseModel):
            if not _is_ours(type(value)):
                sources[_source(type(value))] = None
            for name in type(value).model_fields:
                if name not in left_out:
                    walk(getattr(value, name))
        elif isinstance(value, dict | list | tuple):
            for each in value.values() if isinstance(value, dict) else value:
                walk(each)

    walk(settings, exclude)
    return list(sources)
