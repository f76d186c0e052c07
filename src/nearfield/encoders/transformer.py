"""The transformer itself and its tokenizer: its layers by name, fewer layers, new weights, an end token."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
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
