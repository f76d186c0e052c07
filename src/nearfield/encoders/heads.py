"""What follows the transformer: layer mix, pooling, projection, normalisation; and the shipped file of own poolings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfield.encoders.config import EncoderConfig, PoolingConfig
from nearfield.encoders.layers import transformer_of
from nearfield.errors import BadInputError
from nearfield.files import read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

_SHIPPED = f"{__package__}.shipped."
_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean", "max": "max"}


def own_modules() -> dict[str, type[nn.Module]]:
    """The types that our saved folders name in modules.json -> our own classes: loading them runs no code of a folder."""
    from nearfield.encoders.shipped import nearfield_adapters, nearfield_pooling

    classes = (
        nearfield_adapters.AdaptedTransformer,
        nearfield_pooling.AttentionPooling,
        nearfield_pooling.LatentAttentionPooling,
    )
    return {f"{each.__module__.removeprefix(_SHIPPED)}.{each.__name__}": each for each in classes}


def whole_dimension(model: SentenceTransformer) -> int:
    """The width of what the modules give, also of a model that says that it is truncated."""
    with model.truncate_embeddings(None):
        return int(model.get_embedding_dimension() or 0)


def shipped_files(model: SentenceTransformer) -> list[str]:
    """The files that plain sentence-transformers must run, with ``trust_remote_code``, to load the model when it is saved."""
    modules = {type(module).__module__ for module in model}
    return sorted(f"{name.removeprefix(_SHIPPED)}.py" for name in modules if name.startswith(_SHIPPED))


def ship_modules(model: SentenceTransformer, folder: Path) -> None:
    """Put the files of our own modules into a saved model's folder and let modules.json name them; nothing without any."""
    files = shipped_files(model)
    if not files:
        return
    for file in files:
        shutil.copyfile(Path(__file__).parent / "shipped" / file, folder / file)
    modules = read_json(folder / "modules.json", "list of modules")
    for module in modules:
        module["type"] = module["type"].removeprefix(_SHIPPED)
    write_json(folder / "modules.json", modules)


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

    own = tuple(own_modules().values())
    position = next((i for i, module in enumerate(model) if isinstance(module, (Pooling, *own))), None)
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


def _pooling(pooling: str | PoolingConfig, dimension: int, prompt: bool) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Pooling

    from nearfield.encoders.shipped.nearfield_pooling import AttentionPooling, LatentAttentionPooling

    if isinstance(pooling, str):
        module: nn.Module = Pooling(dimension, _MODES[pooling], include_prompt=prompt)
        return module
    settings = pooling.model_dump(exclude={"kind"})
    if pooling.kind == "latent_attention":
        return LatentAttentionPooling(dimension, **settings, include_prompt=prompt)
    if dimension % pooling.heads:
        raise BadInputError(
            f"{pooling.heads} heads do not divide the model's {dimension} dimensions", where="encoder.pooling.heads"
        )
    return AttentionPooling(dimension, **settings, include_prompt=prompt)


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
    # What the base keeps of its own vectors is no part of the new ones.
    model.truncate_dim = None
    model.insert(len(model) - 1 if isinstance(model[-1], Normalize) else len(model), dense)
