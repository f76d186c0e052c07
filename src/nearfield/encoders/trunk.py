"""Changes of the transformer itself, and of its tokenizer: fewer layers, an end token, plain texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nearfield.encoders.layers import layers_of
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TRIAL = "a text of some words"


def keep_layers(model: SentenceTransformer, count: int) -> None:
    """Keep the transformer's first ``count`` layers; the norm after the last one stays where it has one."""
    transformer = model[0].auto_model
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
    # What stands before a text is, to a second processor, the first of a pair.
    ending = TemplateProcessing(single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, number)])
    before = backend.post_processor
    backend.post_processor = ending if before is None else Sequence([before, ending])
    if tokenizer(_TRIAL)["input_ids"] != [*plain, number]:
        raise BadInputError(
            f"the tokenizer {type(tokenizer).__name__} cannot be made to end texts with {end}",
            where="encoder.append_eos",
        )


def read_plain_texts(model: SentenceTransformer) -> None:
    """Read texts as they are: sentence-transformers would put them into a chat where the tokenizer has a template for one.

    Also gives a decoder's tokenizer a padding token, which the attention mask hides.
    """
    tokenizer: Any = model.tokenizer
    reads = getattr(model[0], "modality_config", None)
    if reads and "text" in reads and set(reads) <= {"text", "message"}:
        model[0].modality_config = {"text": reads["text"]}
        model[0].input_formatter.supported_modalities = ["text"]
        tokenizer.chat_template = None
    if getattr(tokenizer, "pad_token", "") is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
