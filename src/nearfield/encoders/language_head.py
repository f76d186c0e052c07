"""What makes words of hidden states: the head that a language model of the encoder's architecture has."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("nearfield.encoders")


class _Given(nn.Module):
    """Stands in for the transformer below a head: gives back the states that it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class LanguageHead(nn.Module):
    """A language model without its transformer."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> Tensor:
        """(m, d) -> (m, words) logits."""
        logits: Tensor = self.head(inputs_embeds=states[None]).logits[0]
        return logits


def language_head(model: SentenceTransformer, path: str, seed: int) -> tuple[LanguageHead, list[str]]:
    """The head of the encoder's architecture, and the names of those of its parameters that begin at random.

    Where the architecture ties the head's matrix to the table of embeddings it is that table, the same parameter. What else a
    head has is read from the weights of the base, a folder or a hub id, where they hold it.
    """
    transformer = model[0].auto_model
    config = copy.deepcopy(transformer.config)
    config._attn_implementation = "eager"  # there is no attention in a head
    config.output_hidden_states = False
    kind = _model_class(config)
    with torch.device("meta"):
        whole: Any = kind(config)
    prefix = whole.base_model_prefix
    if not isinstance(getattr(whole, prefix, None), nn.Module):
        raise BadInputError(f"{kind.__name__} has no head that can be taken off", where="objective")
    setattr(whole, prefix, _Given())
    embeddings = transformer.get_input_embeddings().weight
    trained = embeddings.requires_grad
    whole = whole.to_empty(device="cpu").to(embeddings.dtype)
    ties = dict(whole._tied_weights_keys) if isinstance(whole._tied_weights_keys, dict) else {}
    own = dict(whole.named_parameters())
    tied = bool(getattr(config, "tie_word_embeddings", True))
    needed = {name for name in own if name not in ties or (ties[name].startswith(f"{prefix}.") and not tied)}
    read = _read(kind, (str(getattr(transformer, "name_or_path", "")), path), needed) if needed else {}
    fresh: list[str] = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in own.items():
            if name in read:
                parameter.copy_(read[name])
            else:
                _begin(name, parameter)
                fresh.append(name)
    for target, source in ties.items():
        below = source.startswith(f"{prefix}.")
        # A head of its own that the base's weights lack would know nothing: the table of embeddings knows more.
        if target not in own or (below and target in read):
            continue
        owner, _, name = target.rpartition(".")
        setattr(whole.get_submodule(owner), name, embeddings if below else whole.get_parameter(source))
        fresh = [other for other in fresh if other != target]
    if fresh:
        logger.info("The base's weights hold no %s: it begins at random", ", ".join(fresh))
    whole.requires_grad_(True)
    embeddings.requires_grad_(trained)
    return LanguageHead(whole), [f"head.{name}" for name in fresh]


def transformer_is_trained(transformer: nn.Module) -> bool:
    """Whether the transformer's own weights are trained, rather than an adapter."""
    adapters = bool(getattr(transformer, "peft_config", None))
    layers = [parameter for parameter in transformer.parameters() if parameter.ndim > 1]
    return not adapters and any(parameter.requires_grad for parameter in layers)


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise BadInputError(
        f"transformers knows no language model of the architecture {config.model_type!r}, so tokens cannot be told",
        where="objective",
    )


def _begin(name: str, parameter: nn.Parameter) -> None:
    if parameter.ndim > 1:
        parameter.normal_(0, 0.02)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _read(kind: Any, places: Sequence[str], names: Collection[str]) -> dict[str, Tensor]:
    """Those of the named parameters that the base's weights hold; nothing where they are in a file of another format."""
    from nearfield.encoders.load import quiet_transformers

    for place in places:
        if not place or Path(place).is_file():
            continue
        try:
            with quiet_transformers():
                whole, about = kind.from_pretrained(place, output_loading_info=True)
        except Exception as error:  # whatever an unknown folder or hub raises means that there is no head to be had
            logger.debug("no language model at %s: %s", place, error)
            continue
        held = dict(whole.named_parameters())
        return {name: held[name].detach() for name in names if name in held and name not in about["missing_keys"]}
    return {}
