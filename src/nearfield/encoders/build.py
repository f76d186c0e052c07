"""The encoder that a recipe asks for: the model with its layers, attention, pooling, projection, norm, image tower and adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nearfield.encoders.adapters import (
    has_adapter,
    merge_adapter,
)
from nearfield.encoders.limits import set_longest, stated_positions, usable_positions, whole_dimension
from nearfield.encoders.load import Dtype, LoadedEncoder, load_encoder, own_modules
from nearfield.encoders.source import (
    AdapterBase,
    weights_hash,
)
from nearfield.encoders.transformer import append_eos, draw_anew, keep_layers, transformer_of
from nearfield.errors import BadInputError
from nearfield.notices import Notice

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from nearfield.encoders.config import AdapterSettings, EncoderConfig, PoolingSettings
    from nearfield.encoders.tokenize import Tokenizer


_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean", "max": "max"}


def set_heads(model: SentenceTransformer, config: EncoderConfig, seed: int) -> None:
    """Give a model the layer mix, pooling, projection and normalisation that a recipe asks for.

    New weights are drawn from ``seed``. Raises :class:`BadInputError` where the model has no pooling to change.
    """
    import torch
    from sentence_transformers.sentence_transformer.modules import Normalize

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.layer_mix is not None:
            _add_layer_mix(model, config.layer_mix.from_layer, config)
        if config.pooling is not None or config.pool_prompt is not None:
            _set_pooling(model, config)
        if config.projection is not None:
            _add_projection(model, config)
    if config.normalize is not None:
        present = isinstance(model[-1], Normalize)
        if config.normalize and not present:
            model.append(Normalize())
        elif present and not config.normalize:
            del model[-1]


def _pooling_at(model: SentenceTransformer, config: EncoderConfig, key: str) -> int:
    from sentence_transformers.sentence_transformer.modules import Pooling

    poolings = tuple(own_modules().values())
    position = next((i for i, module in enumerate(model) if isinstance(module, (Pooling, *poolings))), None)
    if position is None:
        raise BadInputError(f"this model has no pooling module, so 'encoder.{key}' cannot be set", where=config.model)
    return position


def _set_pooling(model: SentenceTransformer, config: EncoderConfig) -> None:
    key = "pooling" if config.pooling is not None else "pool_prompt"
    position = _pooling_at(model, config, key)
    present: Any = model[position]
    prompt = config.pool_prompt if config.pool_prompt is not None else present.include_prompt
    if config.pooling is None:
        present.include_prompt = prompt
        return
    model[position] = _pooling(config.pooling, int(present.embedding_dimension), prompt)


def _pooling(pooling: str | PoolingSettings, dimension: int, prompt: bool) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Pooling

    if not isinstance(pooling, str):
        return pooling.build(dimension, prompt)
    module: nn.Module = Pooling(dimension, _MODES[pooling], include_prompt=prompt)
    return module


def _add_layer_mix(model: SentenceTransformer, from_layer: int, config: EncoderConfig) -> None:
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

    position = _pooling_at(model, config, "layer_mix")
    transformer = transformer_of(model, "encoder.layer_mix")
    layers = int(transformer.config.num_hidden_layers)
    if from_layer > layers:
        raise BadInputError(f"the model has {layers} layers", where="encoder.layer_mix.from_layer")
    if position != 1:
        raise BadInputError(
            "this model has a module between transformer and pooling already", where="encoder.layer_mix"
        )
    transformer.config.output_hidden_states = True
    model.insert(1, WeightedLayerPooling(model[1].embedding_dimension, layers, from_layer))


def _add_projection(model: SentenceTransformer, config: EncoderConfig) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize
    from torch import nn

    assert config.projection is not None
    activations = {"identity": nn.Identity, "tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
    dense = Dense(
        whole_dimension(model),
        config.projection.dimensions,
        bias=config.projection.bias,
        activation_function=activations[config.projection.activation](),
    )
    # The base's truncation belongs to its own vectors, not to the new ones.
    model.truncate_dim = None
    model.insert(len(model) - 1 if isinstance(model[-1], Normalize) else len(model), dense)


logger = logging.getLogger("nearfield.encoders")


def build_encoder(
    config: EncoderConfig,
    device: str | None = None,
    *,
    dtype: Dtype = "float32",
    seed: int = 0,
    prompts: Iterable[str] = (),
) -> LoadedEncoder:
    """The encoder of a recipe: the model with the recipe's layers, attention, pooling, heads, maximum length and adapter.

    ``dtype`` is that of its weights; those of an adapter are float32. New weights are drawn from ``seed``. Where pooling
    leaves prompts out, the ends of ``prompts`` and of the model's own are kept borders of tokens.
    """
    quantize = config.adapter.base_bits if config.adapter else "none"
    loaded = load_encoder(
        config.model, config.revision, device, config.trust_remote_code, dtype=dtype, quantize=quantize, recipe=config
    )
    model = loaded.model
    from nearfield.encoders.image_tower import add_image_tower
    from nearfield.encoders.tokenize import BORDER, keep_borders
    from nearfield.encoders.trials import freeze_unused, set_direction, try_company
    from nearfield.encoders.vision_language import check_verified

    check_verified(model, config)
    if has_adapter(model):
        _merge_base_adapter(loaded, config)
    truncation = model.truncate_dim
    if config.fresh is not None:
        draw_anew(model, config.fresh, seed)
    if config.layers is not None:
        keep_layers(model, config.layers)
    if config.attention is not None:
        set_direction(model, config.attention == "causal", config.model)
    if config.append_eos:
        append_eos(model)
    set_heads(model, config, seed)
    notices = [one for one in loaded.notices if one.code != BORDER]
    notices += keep_borders(model, [*prompts, *model.prompts.values()])
    if truncation is not None and model.truncate_dim is None:
        words = f"the base keeps the first {truncation} dimensions of its vectors; of the new ones all are kept"
        notices.append(Notice("truncation", words, minor=True))
    loaded = replace(loaded, notices=tuple(notices))
    if config.max_length is not None:
        usable = usable_positions(model)
        limit = stated_positions(model) if usable is None else usable
        if limit is not None and config.max_length > limit:
            raise BadInputError(
                f"max_length {config.max_length} is more than the model's {limit} positions", where="encoder.max_length"
            )
        set_longest(model, config.max_length)
    _freeze_pooler(model)
    if config.image_tower is not None:
        model = add_image_tower(model, config.image_tower, seed, dtype)
        said = dict.fromkeys((*loaded.notices, *try_company(model, config.model)))
        loaded = replace(loaded, model=model, notices=tuple(said))
    freeze_unused(model)
    if config.adapter is not None:
        _add_adapter(loaded, config.adapter, config, seed)
    return loaded


def _add_adapter(loaded: LoadedEncoder, adapter: AdapterSettings, config: EncoderConfig, seed: int) -> None:
    """Put a fresh adapter on the model, and refuse one that could not be loaded when it is saved alone."""
    model = loaded.model
    if adapter.save == "adapter" and loaded.path.endswith(".gguf"):
        raise BadInputError(
            "an adapter alone does not load on a GGUF file", where="encoder.adapter.save", hint="Use save: merged."
        )
    transformer = getattr(model[0], "auto_model", None)
    if adapter.save == "adapter" and getattr(transformer, "name_or_path", loaded.path) != loaded.path:
        raise BadInputError(
            "the transformer of this model lies in a folder below it, where an adapter alone would not find it",
            where=config.model,
            hint="Use encoder.adapter.save: merged.",
        )
    base = AdapterBase(loaded.name, loaded.revision, weights_hash(loaded.path, loaded.revision), loaded.path)
    adapter.add(model, base, seed)


def build_tokenizer(config: EncoderConfig, max_length: int | None = None, prompts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a recipe's encoder, which reads at most ``max_length`` tokens of a text."""
    from nearfield.encoders.tokenize import Tokenizer

    plain = config.model_copy(update={"adapter": None})
    return Tokenizer(build_encoder(plain, "cpu", prompts=prompts).model, max_length)


def _merge_base_adapter(loaded: LoadedEncoder, config: EncoderConfig) -> None:
    """A base that is itself an adapter on another model becomes one model, all of whose weights can be trained."""
    if config.adapter is not None and (config.adapter.save == "adapter" or config.adapter.base_bits != "none"):
        raise BadInputError(
            "this model is an adapter on another model, and an adapter on it cannot be quantised or saved alone",
            where=config.model,
            hint="Use encoder.adapter.save: merged and quantize: none, or begin from a merged model.",
        )
    merge_adapter(loaded.model)


def _freeze_pooler(model: SentenceTransformer) -> None:
    """BERT's own pooler sees no gradient where embeddings are made of token vectors: it stays as it was loaded."""
    from torch import nn

    pooler = getattr(getattr(model[0], "auto_model", None), "pooler", None)
    text = getattr(model[0], "modality_config", {}).get("text", {})
    if isinstance(pooler, nn.Module) and text.get("method_output_name") == "last_hidden_state":
        pooler.requires_grad_(False)
