"""YAML as people write it: numbers of YAML 1.2 (``2e-5`` is one), truth values of YAML 1.1; safe loading only.

PyYAML follows YAML 1.1, which reads ``2e-5`` as a string, ``010`` as eight and ``1:30`` as ninety.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+)$")
_TAGS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}
_FIRST = list("-+0123456789.")


class Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does."""


class Dumper(yaml.SafeDumper):
    """Writes what both readers, of YAML 1.1 and 1.2, read as it is."""


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    based = re.match(r"[-+]?0[obx]", text)
    return int(text, 0) if based else int(text)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


# Integers first: a float's pattern matches them too.
Loader.yaml_implicit_resolvers = {
    first: [*[(tag, _TAGS[tag]) for tag in _TAGS if first in _FIRST], *[r for r in known if r[0] not in _TAGS]]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
for _tag, _pattern in _TAGS.items():
    Dumper.add_implicit_resolver(_tag, _pattern, _FIRST)


def load(text: str) -> Any:
    """The value of a YAML text; raises ``yaml.YAMLError``."""
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump(value: Any, **options: Any) -> str:
    """A YAML text of a value, its keys in their order."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, **options))
