"""The base of every config, how a YAML file becomes one, and how ``kind:`` picks its class.

A config is a frozen pydantic model. Unknown keys, wrong types and impossible combinations are errors that name the
file, the line, the key, the allowed values and the nearest spelling. Relative paths are resolved against the file that names
them.

YAML is read as people write it: numbers of YAML 1.2 (``2e-5`` is one), truth values of YAML 1.1; safe loading only. PyYAML follows
YAML 1.1, which reads ``2e-5`` as a string, ``010`` as eight and ``1:30`` as ninety.

A key ``kind:`` names one of our classes, one that an installed package registers, or an import path. A part of the library
(objectives, planners, readers ...) has one table of its kinds: name -> import path of the settings class and a line of help.
Nothing is imported until a recipe names a kind. A setting that picks one is annotated with the base class of the settings and
the table::

    objective: Annotated[ObjectiveSettings, OBJECTIVES]

An installed package adds names by entry points of the group ``nearfield.<part>``; ``kind: package.module:Settings`` needs
no entry point. An import path imports code, so only installed packages may be named (the working folder too with
:func:`allow_local_code`), and never a model's or a data set's folder.
"""

from __future__ import annotations

import contextlib
import difflib
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
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar, cast
from urllib.parse import unquote, urlparse

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from nearfield.errors import BadInputError
from nearfield.files import fingerprint, hash_file

KeyPath = tuple[str | int, ...]
T = TypeVar("T", bound="Config")


class Config(BaseModel):
    """Frozen and strict: settings are written once, in a file or in Python, and never changed behind one's back."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def load(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> Self:
        """Read this config from a YAML file, with ``key.path=value`` overrides."""
        return load_config(cls, path, overrides).config

    def identity(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """These settings as they enter a fingerprint: those of kinds from outside with the content of their code."""
        settings = self.model_dump(mode="json", exclude=exclude)
        code = [[one.path, one.version, one.content] for one in outside_sources(self, exclude or ())]
        return {**settings, "code": code} if code else settings


class KindSettings(Config):
    """The base of settings that a ``kind`` picks. Ours name their ``kind``; a class from outside leaves that to the recipe."""

    kind: str = ""
    """The kind of these settings: a name of ours, one that an installed package registers, or an import path."""

    @model_validator(mode="after")
    def _goes_by_a_name(self) -> Self:
        if not self.kind:
            self.__dict__["kind"] = f"{type(self).__module__}:{type(self).__qualname__}"
        return self


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    path = path.expanduser()
    return (base / path).resolve() if base is not None and not path.is_absolute() else path


ConfigPath = Annotated[Path, AfterValidator(_resolve_path)]
"""A path in a config: relative to the file that names it."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A config with the place that each of its values came from: a line of a file or an override."""

    config: T
    path: Path
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, key: KeyPath) -> str:
        """Where the value at a key path came from: ``file:line``, ``override ...`` or ``default``."""
        return self.origins.get(key, "default")

    def where(self, key: KeyPath) -> str:
        """The place to name in a message about a key path: its own, else that of the nearest key above it."""
        return _nearest(key, self.path, self.origins)


def _nearest(key: KeyPath, path: Path, origins: dict[KeyPath, str]) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in origins:
            return origins[key[:length]]
    return str(path)


def dotted(key: KeyPath) -> str:
    """``("data", 0, "path")`` as ``data.0.path``."""
    return ".".join(str(part) for part in key)


# YAML

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+)$")
_TAGS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}
_FIRST = list("-+0123456789.")
_TEXTS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
"""Tags of YAML 1.1 that YAML 1.2 reads as texts: dates, and ``=``."""


class YamlLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does."""


class YamlDumper(yaml.SafeDumper):
    """Writes what both readers, of YAML 1.1 and 1.2, read as it is."""


def _construct_int(loader: YamlLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    based = re.match(r"[-+]?0[obx]", text)
    return int(text, 0) if based else int(text)


def _construct_float(loader: YamlLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


# Integers first: a float's pattern matches them too.
YamlLoader.yaml_implicit_resolvers = {
    first: [
        *[(tag, _TAGS[tag]) for tag in _TAGS if first in _FIRST],
        *[one for one in known if one[0] not in (*_TAGS, *_TEXTS)],
    ]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
YamlLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
for _tag, _pattern in _TAGS.items():
    YamlDumper.add_implicit_resolver(_tag, _pattern, _FIRST)


def load_yaml(text: str) -> Any:
    """The value of a YAML text; raises ``yaml.YAMLError``."""
    loader = YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(value: Any, **options: Any) -> str:
    """A YAML text of a value, its keys in their order."""
    return str(yaml.dump(value, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, **options))


_COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_MERGE_TAG = "tag:yaml.org,2002:merge"


def _construct(node: yaml.Node, key: KeyPath, path: Path, origins: dict[KeyPath, str], loader: YamlLoader) -> Any:
    where = f"{path}:{node.start_mark.line + 1}"
    if key:
        origins[key] = where
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTION_TAGS:
        raise BadInputError(f"this is not valid YAML here: the tag {node.tag!r} is not allowed", where=where)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for value_node in (value for key_node, value in node.value if key_node.tag == _MERGE_TAG):
            for each in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(each, yaml.MappingNode):
                    raise BadInputError("only keys and values can be merged with '<<'", where=where)
                # Of several the first counts, and what the mapping states itself counts more.
                merged = {**_construct(each, key, path, origins, loader), **merged}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            name = loader.construct_object(key_node, deep=True)
            here = f"{path}:{key_node.start_mark.line + 1}"
            if not isinstance(name, str):
                raise BadInputError(f"the key {name!r} is not a string", where=here, hint="Put it in quotes.")
            if name in result:
                raise BadInputError(f"the key {dotted((*key, name))!r} stands twice", where=here, hint="Keep one.")
            result[name] = _construct(value_node, (*key, name), path, origins, loader)
            origins[(*key, name)] = here
        return {**merged, **result}
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*key, i), path, origins, loader) for i, child in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """A YAML file's mapping, and the ``file:line`` of each of its keys. Safe loading only; duplicate keys are errors."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInputError("this file does not exist", where=str(path)) from error
    except IsADirectoryError as error:
        raise BadInputError("this is a folder; a YAML file is wanted", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"this file is not UTF-8 text ({error.reason} at byte {error.start})", where=str(path)
        ) from error
    origins: dict[KeyPath, str] = {}
    loader = YamlLoader(text) if _printable(text, path) else None
    assert loader is not None
    try:
        node = loader.get_single_node()
        value = {} if node is None else _construct(node, (), path, origins, loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise BadInputError(f"this is not valid YAML: {problem}", where=f"{path}{line}") from error
    except (RecursionError, ValueError) as error:
        raise BadInputError(f"this is not usable YAML: {error}", where=str(path)) from error
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise BadInputError(
            "the file must hold keys and values", where=str(path), hint="Start with lines like 'name: my-run'."
        )
    return value, origins


def _printable(text: str, path: Path) -> bool:
    match = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if match:
        line = text.count("\n", 0, match.start()) + 1
        raise BadInputError(f"the character {match.group()!r} is not allowed in YAML", where=f"{path}:{line}")
    return True


def apply_override(data: dict[str, Any], override: str, origins: dict[KeyPath, str]) -> None:
    """Apply one ``key.path=value`` to parsed YAML, in place. The value is read as YAML; a number picks a list item."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise BadInputError(f"the override {override!r} is not of the form key.path=value", where="command line")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise BadInputError(
            f"the value of the override {override!r} is not valid YAML", where="command line"
        ) from error
    key: KeyPath = ()
    target: Any = data
    parts = name.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        step: str | int = part
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise BadInputError(
                    f"the override {override!r}: {dotted(key)!r} is a list of {len(target)}, so {part!r} names nothing in it",
                    where="command line",
                )
            step = int(part)
        elif not isinstance(target, dict):
            raise BadInputError(
                f"the override {override!r}: {dotted(key)!r} is a single value and has no keys", where="command line"
            )
        key = (*key, step)
        if last:
            target[step] = value
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            target = target[int(part)]
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    _mark(value, key, f"override {override}", origins)


def _mark(value: Any, key: KeyPath, origin: str, origins: dict[KeyPath, str]) -> None:
    origins[key] = origin
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        _mark(child, (*key, name), origin, origins)


def load_config(cls: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> Loaded[T]:
    """Read a config of class ``cls`` from a YAML file and overrides; raise :class:`BadInputError` with all faults."""
    path = Path(path)
    data, origins = read_yaml(path)
    for override in overrides:
        apply_override(data, override, origins)
    config = validate(cls, data, path, origins, base=path.resolve().parent)
    return Loaded(config, path, origins)


def validate(cls: type[T], data: dict[str, Any], path: Path, origins: dict[KeyPath, str], *, base: Path | None) -> T:
    """Validate parsed YAML; types are not coerced (a number in quotes is a string)."""
    try:
        text = json.dumps(data, default=str)
        return cls.model_validate_json(text, strict=True, context={"base": base})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        if _write_whole(faults, data):
            return validate(cls, data, path, origins, base=base)
        raise _join([_fault(cls, details, data, path, origins) for details in faults]) from error


_WHOLE = 2**53
"""Below it a float is the whole number that was written."""


def _write_whole(faults: typing.Sequence[ErrorDetails], data: Any) -> bool:
    """Write whole numbers that stand as floats in ``data``, such as ``1e3``, as integers where these are wanted; whether any
    were."""
    places = {
        _data_path(details["loc"], data)
        for details in faults
        if details["type"] in ("int_type", "int_from_float")
        and isinstance(details["input"], float)
        and details["input"].is_integer()
        and abs(details["input"]) < _WHOLE
    }
    changed = False
    for *above, last in filter(None, places):
        owner = data
        for step in above:
            owner = owner[step]
        if isinstance(owner[last], float):
            owner[last], changed = int(owner[last]), True
    return changed


def _join(faults: list[BadInputError]) -> BadInputError:
    if len(faults) == 1:
        return faults[0]
    return BadInputError("\n".join([f"{len(faults)} things are wrong", *map(str, faults)]))


def _fault(
    cls: type[Config], details: ErrorDetails, data: Any, path: Path, origins: dict[KeyPath, str]
) -> BadInputError:
    key = _data_path(details["loc"], data)
    where = _nearest(key, path, origins)
    name, kind, context = dotted(key) or "the file", details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        owner = _model_at(cls, details["loc"][:-1], data)
        allowed = sorted(owner.model_fields) if owner else []
        return BadInputError(f"unknown key {name!r}", where=where, hint=_suggest(str(key[-1]), allowed, "Keys here"))
    if kind == "missing":
        return BadInputError(f"the key {name!r} is missing", where=where, hint=f"Add {key[-1]!r}.")
    if kind == "union_tag_not_found":
        expected = str(context.get("discriminator", "'kind'")).strip("'")
        return BadInputError(f"the key {name + '.' + expected!r} is missing: it picks the kind", where=where)
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context["expected_tags"]).split(",")]
        tag = str(context["tag"])
        tag_where = origins.get((*key, "kind"), where)
        return BadInputError(f"{name}: unknown kind {tag!r}", where=tag_where, hint=_suggest(tag, tags, "Kinds"))
    if kind == "kind_refused":
        tag_where = origins.get((*key, "kind"), where)
        return BadInputError(f"{name}: {context['what']}", where=tag_where, hint=context.get("hint") or None)
    if kind in ("literal_error", "enum"):
        allowed = [part.strip().strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(",")]
        return BadInputError(
            f"{name}: {details['input']!r} is not allowed",
            where=where,
            hint=_suggest(str(details["input"]), allowed, "Allowed"),
        )
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = details["input"]
    value = (
        ""
        if isinstance(shown, dict | list) or kind == "value_error"
        else f" (it is {json.dumps(shown, default=str)[:80]})"
    )
    quoted = kind == "string_type" and isinstance(shown, bool | int | float)
    return BadInputError(f"{name}: {message}{value}", where=where, hint="Put it in quotes." if quoted else None)


def _suggest(word: str, allowed: typing.Sequence[str], label: str) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    nearest = f"Did you mean {close[0]!r}? " if close else ""
    return f"{nearest}{label}: {', '.join(allowed)}."


def _data_path(loc: tuple[str | int, ...], data: Any) -> KeyPath:
    """Pydantic's location without the tags of unions, which are no keys of the file."""
    key: KeyPath = ()
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(data, dict):
            if part in data:
                data = data[part]
            elif not last:
                continue
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        key = (*key, part)
    return key


def _model_at(
    annotation: Any, loc: tuple[str | int, ...], data: Any, metadata: typing.Sequence[Any] = ()
) -> type[BaseModel] | None:
    """The model class at a pydantic location in ``data``; tags of closed unions pick the member."""
    open_kinds = next((one for one in metadata if isinstance(one, Kinds)), None)
    if open_kinds is not None and isinstance(data, dict):
        return _model_at(open_kinds.find(str(data.get("kind"))), loc, data)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _model_at(arguments[0], loc, data, arguments[1:])
    if origin in (typing.Union, types.UnionType):
        members = [argument for argument in arguments if argument is not type(None)]
        if len(members) == 1:
            return _model_at(members[0], loc, data)
        for member in members:
            model = _model_at(member, (), data)
            if loc and model is not None and _kind_of(model) == loc[0]:
                return _model_at(member, loc[1:], data)
        return None
    if origin in (list, tuple) and loc:
        return _model_at(arguments[0], loc[1:], _child(data, loc[0]))
    if origin is dict and loc:
        return _model_at(arguments[1], loc[1:], _child(data, loc[0]))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        member_field = annotation.model_fields.get(str(loc[0])) if loc else None
        if not loc or member_field is None:
            return None if loc else annotation
        return _model_at(member_field.annotation, loc[1:], _child(data, loc[0]), member_field.metadata)
    return None


def _child(data: Any, key: str | int) -> Any:
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return None


def _kind_of(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return None if kind is None else str(typing.get_args(kind.annotation)[0])


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
