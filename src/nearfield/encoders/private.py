"""Private parts of sentence-transformers, transformers and torch that have no public way to them, all in this file.

A version that lacks one is refused in one sentence that names the package and its installed version.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn


def part(owner: Any, name: str, package: str) -> Any:
    """An attribute of an object of a package; raise :class:`BadInputError` where the installed version has none."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        version = importlib.metadata.version(package)
        raise BadInputError(
            f"{package} {version} has no {name!r}, which nearfield relies on",
            hint=f"Install a version of {package} that nearfield's pyproject.toml allows.",
        ) from error


def load_with_modules(path: str, modules: dict[str, type[nn.Module]], **settings: Any) -> SentenceTransformer:
    """Load a model of which some module types, as its modules.json names them, are the given classes: no code of a folder runs."""
    from sentence_transformers import SentenceTransformer

    load = part(SentenceTransformer, "_load_with_module_classes", "sentence-transformers")
    model: SentenceTransformer = load(path, modules, **settings)
    return model


@contextlib.contextmanager
def processors_by(replacement: Any) -> Iterator[None]:
    """While sentence-transformers loads a model, let it take processors from ``replacement`` instead of ``AutoProcessor``."""
    from sentence_transformers.base.modules import transformer

    theirs = part(transformer, "AutoProcessor", "sentence-transformers")
    transformer.AutoProcessor = replacement
    try:
        yield
    finally:
        transformer.AutoProcessor = theirs


def forget_prompt_lengths(model: SentenceTransformer) -> None:
    """Let sentence-transformers count the tokens of prompts anew, after a change of the tokenizer."""
    part(model[0], "_prompt_length_mapping", "sentence-transformers").clear()


@contextlib.contextmanager
def loading_reports(record: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call ``record`` with each model or adapter that transformers loads inside the block, and what it reports of its weights."""
    said = {}
    for name in ("transformers.modeling_utils", "transformers.integrations.peft"):
        owner = importlib.import_module(name)
        said[owner] = part(owner, "log_state_dict_report", "transformers")

    def recording(report: Callable[..., None]) -> Callable[..., None]:
        def recorded(model: nn.Module, *args: Any, loading_info: Any, **kwargs: Any) -> None:
            record(model, loading_info)
            report(model, *args, loading_info=loading_info, **kwargs)

        return recorded

    for owner, report in said.items():
        owner.log_state_dict_report = recording(report)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for owner, report in said.items():
            owner.log_state_dict_report = report  # type: ignore[attr-defined]


def attention_kernel(config: Any) -> str | None:
    """The attention function that a transformer's config names."""
    kernel: str | None = part(config, "_attn_implementation", "transformers")
    return kernel


def has_adapter(model: SentenceTransformer) -> bool:
    """Whether the transformer carries an adapter that is not merged."""
    return bool(getattr(getattr(model[0], "auto_model", None), "peft_config", None))


def registered(kernel: str | None) -> list[Any]:
    """The functions that transformers calls for an attention of this name: that of the attention, and that of its mask."""
    callables = []
    for module, name in (
        ("modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ):
        functions = part(importlib.import_module(f"transformers.{module}"), name, "transformers")
        callables += [functions[kernel]] if kernel in functions else []
    return callables


def without_adapter(transformer: Any) -> None:
    """Let a transformer whose adapter was merged be saved as one that never had any."""
    transformer._hf_peft_config_loaded = False
    del transformer.peft_config
    # A loaded adapter leaves its renamings behind, and saving would give them to all weights; without any, transformers
    # finds the model's own again.
    if "base_model.model." in str(getattr(transformer, "_weight_conversions", "")):
        del transformer._weight_conversions


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> that of the one that it is the same as."""
    ties = part(model, "_tied_weights_keys", "transformers")
    return dict(ties) if isinstance(ties, dict) else {}
