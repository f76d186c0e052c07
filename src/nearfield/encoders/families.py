"""Models that are no dense embedding models, told by what their folders say of themselves.

sentence-transformers loads a folder of another family (SPLADE, ColBERT, a cross-encoder) by leaving out what makes it one
and averaging its token vectors: that is another model, whose scores must not go by the folder's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError
from nearfield.notices import Notice

if TYPE_CHECKING:
    from nearfield.encoders.config import EncoderConfig


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
_COLBERT_KEYS = ("skiplist_words", "do_query_expansion", "query_expansion", "attend_to_expansion_tokens")
_ARCHITECTURES = (
    ("ForSequenceClassification", CROSS_ENCODER),
    ("ForRetrieval", MULTI_VECTOR),
    ("ColBERT", MULTI_VECTOR),
    ("Splade", SPARSE),
)
"""By a part of the architecture's name, of a folder that is not of sentence-transformers."""

ReadJson = Callable[[str], Any]
"""A file's name -> its content; None where the model has no such file."""


def other_family(read: ReadJson) -> str | None:
    """The family of a model that is no dense embedding model, in words; None for one that is, or says nothing of it."""
    modules = read("modules.json")
    if not isinstance(modules, list):
        return _of_architecture(read)
    config = _mapping(read("config_sentence_transformers.json"))
    declared = _MODEL_TYPES.get(str(config.get("model_type")))
    if declared is not None:
        return declared
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
    names = _architectures(read)
    return next((family for part, family in _ARCHITECTURES if any(part in name for name in names)), None)


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
