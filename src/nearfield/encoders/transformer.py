"""The transformer itself and its tokenizer: its layers by name, fewer layers, new weights, an end token; and that its weights come
from its files.

transformers draws a weight that a file lacks at random and only warns. It knows the layouts that it reads (sharded, tied,
compressed, of earlier versions, under a prefix of its own), so its report of each loading is kept, and a model that owes a weight
to no file is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nearfield.encoders.private import loading_reports
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn
    from transformers import PreTrainedModel


LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks)\.(\d+)(?=\.)")
"""The number of the layer that a name lies in, such as ``encoder.layer.3.output.dense``."""
EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared)\.|relative_attention_bias")
"""Tables that are looked up in."""


def transformer_of(model: SentenceTransformer, where: str) -> PreTrainedModel:
    """The transformer that a model begins with; :class:`BadInputError` where it begins with something else."""
    transformer: PreTrainedModel | None = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise BadInputError(
            f"this needs a transformer, and the model's first module is a {type(model[0]).__name__}",
            where=where,
            hint="Leave it out.",
        )
    return transformer


def layers_of(transformer: PreTrainedModel, where: str) -> list[str]:
    """The names of a transformer's layers, in their order; :class:`BadInputError` where it is not clear which they are."""
    from torch import nn

    present = int(transformer.config.num_hidden_layers)
    lists = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == present and "." not in name.removeprefix("encoder.")
    ]
    if len(lists) != 1:
        raise BadInputError(
            f"it is not clear which modules are the layers of {type(transformer).__name__}", where=where
        )
    return [f"{lists[0]}.{number}" for number in range(present)]


_TRIAL = "a text of some words"


def draw_anew(model: SentenceTransformer, settings: Mapping[str, Any], seed: int) -> None:
    """Replace the transformer by a new one of its architecture with these settings and random weights from ``seed``.

    The tokenizer stays. Pooling keeps its way; what stood behind it, trained for the old weights, goes.
    """
    import torch
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoModel

    module = model[0]
    if not hasattr(module, "auto_model") or set(getattr(module, "modality_config", {"text": {}})) != {"text"}:
        raise BadInputError("new weights can be drawn for a transformer of texts alone", where="encoder.fresh")
    config = module.auto_model.config
    check_settings(config, settings, "encoder.fresh")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            # A config checks that its parts fit when it is made.
            changed = type(config).from_dict({**config.to_dict(), **settings})
            transformer = AutoModel.from_config(changed).to(device=model.device, dtype=model.dtype)
        except Exception as error:  # what a wrong combination of settings raises differs by architecture
            raise BadInputError(
                f"no {config.model_type} can be made of these settings: {str(error).splitlines()[0]}",
                where="encoder.fresh",
            ) from error
    module.model = transformer
    poolings = [each for each in model if isinstance(each, Pooling)]
    normalized = isinstance(model[-1], Normalize)
    del model[1:]
    model.truncate_dim = None
    if poolings:
        width = int(module.get_embedding_dimension())
        model.append(Pooling(width, poolings[0].pooling_mode, include_prompt=poolings[0].include_prompt))
    if normalized:
        model.append(Normalize())


def check_settings(config: Any, settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that a transformers config does not have."""
    known = [key for key in config.to_dict() if not key.startswith("_")]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 3, 0.5)
            raise BadInputError(
                f"a {config.model_type} has no setting {key!r}",
                where=where,
                hint=f"Nearest: {', '.join(near)}." if near else None,
            )


def keep_layers(model: SentenceTransformer, count: int) -> None:
    """Keep the transformer's first ``count`` layers; the norm after the last one stays where it has one."""
    transformer = transformer_of(model, "encoder.layers")
    config = transformer.config
    present = int(config.num_hidden_layers)
    if count > present:
        raise BadInputError(f"the model has {present} layers, not {count}", where="encoder.layers")
    name = layers_of(transformer, "encoder.layers")[0].rpartition(".")[0]
    transformer.set_submodule(name, transformer.get_submodule(name)[:count])
    config.num_hidden_layers = count
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        kinds = getattr(config, key, None)
        if isinstance(kinds, list) and len(kinds) == present:
            setattr(config, key, kinds[:count])


def append_eos(model: SentenceTransformer) -> None:
    """Let the tokenizer end every text with its end-of-text token, also one that is cut to the longest input."""
    from tokenizers.processors import Sequence, TemplateProcessing

    tokenizer: Any = model.tokenizer
    end, number = getattr(tokenizer, "eos_token", None), getattr(tokenizer, "eos_token_id", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if end is None or number is None or backend is None:
        raise BadInputError(
            f"the tokenizer {type(tokenizer).__name__} has no end-of-text token that could be put behind texts",
            where="encoder.append_eos",
        )
    plain = tokenizer(_TRIAL)["input_ids"]
    if plain[-1:] == [number]:
        return
    # A second processor takes the part before a text for the first text of a pair.
    ending = TemplateProcessing(single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, number)])
    before = backend.post_processor
    backend.post_processor = ending if before is None else Sequence([before, ending])
    if tokenizer(_TRIAL)["input_ids"] != [*plain, number]:
        raise BadInputError(
            f"the tokenizer {type(tokenizer).__name__} cannot be made to end texts with {end}",
            where="encoder.append_eos",
        )


# The weights that no file held.

_STATISTICS = re.compile(r"(?:^|\.)running_(?:mean|var)$")
"""Buffers that are learnt: all others follow from the config."""


@dataclass
class Loading:
    """The reports of transformers on the models that it loaded."""

    missing: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and learnt buffers that no file held, by their names."""
    unread: set[str] = field(default_factory=set)
    """Tensors of the files that no model had a place for."""


@contextlib.contextmanager
def recorded_loading() -> Iterator[Loading]:
    """Keep what transformers reports of each model and adapter that it loads inside the block."""
    from torch import nn

    loading = Loading()

    def record(model: nn.Module, report: Any) -> None:
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name in report.missing_keys:
            tensor = tensors.get(name)
            if isinstance(tensor, nn.Parameter) or (tensor is not None and _STATISTICS.search(name)):
                loading.missing[name] = tensor
        loading.unread |= set(report.unexpected_keys)

    with loading_reports(record):
        yield loading


def check_weights(loading: Loading, outputs: Callable[[], Sequence[Tensor]], where: str) -> None:
    """Refuse a model that owes a weight to no file, unless nothing depends on it (``outputs`` makes a trial: :func:`trial_embeddings`).

    Heads that an embedding does not pass through, as BERT's pooler, are often left out of files. Those of layers are
    wanted always: of a mixture of experts one trial does not reach all.
    """
    from torch import nn

    missing = dict(loading.missing)
    heads = {n: t for n, t in missing.items() if isinstance(t, nn.Parameter) and not LAYER.search(n)}
    if heads:
        try:
            used = _reached(list(heads.values()), outputs)
        except Exception:  # a model that cannot be tried out: all are wanted
            used = {id(tensor) for tensor in heads.values()}
        missing = {name: tensor for name, tensor in missing.items() if name not in heads or id(tensor) in used}
    if not missing:
        return
    prefix = _prefix(missing, loading.unread)
    raise BadInputError(
        f"{len(missing)} tensors of the model are not in its weights files, e.g. {min(missing)!r}; random numbers would stand "
        "in their place",
        where=where,
        hint=f"The files have them under names that begin with {prefix!r}: save the model without this wrapper."
        if prefix
        else "The folder's config and weights do not belong together, or its weights are not complete.",
    )


def _prefix(missing: dict[str, Tensor], unread: set[str]) -> str | None:
    """The prefix of the missing tensors' names in the files, where that is one and the same for most."""
    before: Counter[str] = Counter()
    for name in unread:
        # The shortest start whose rest is missed.
        parts = name.split(".")
        rest = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in missing), None)
        if rest is not None:
            before[".".join(parts[:rest]) + "."] += 1
    most = before.most_common(1)
    return most[0][0] if most and most[0][1] > len(missing) // 2 else None


def _reached(parameters: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]]) -> set[int]:
    """The ids of those of some parameters that outputs depend on."""
    # Whole numbers, as of a quantised layer, have no gradient: they count as reached.
    fixed = {id(each) for each in parameters if not each.is_floating_point()}
    learnt = [(each, each.requires_grad) for each in parameters if each.is_floating_point()]
    for each, _ in learnt:
        each.requires_grad_(True)
    try:
        return leads_to(outputs()) | fixed
    finally:
        for each, required in learnt:
            each.requires_grad_(required)


def leads_to(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the tensors with a gradient that the graph of some outputs leads to; no gradient is computed."""
    ends: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    used: set[int] = set()
    while ends:
        node = ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        ends += [before for before, _ in node.next_functions]
    return used
