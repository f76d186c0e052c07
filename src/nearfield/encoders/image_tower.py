"""A tower for images beside a model of texts, both projected to one width.

The towers are the routes of a sentence-transformers ``Router``, which sends each input to the one of its modality: saved,
they load in plain ``SentenceTransformer(folder)``. A folder of CLIP and the like, whose towers are one module, is fed alike.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nearfield.data.tokens import IMAGE
from nearfield.encoders.limits import whole_dimension
from nearfield.encoders.packing import placed
from nearfield.encoders.transformer import check_settings
from nearfield.encoders.vision_language import blank_image, family_of, row_features
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.config import ImageTowerConfig
    from nearfield.encoders.packing import Features


_WHERE = "encoder.image_tower"
_PATCH = 16
"""The side of a patch for the budget, in pixels, where an architecture has no patches of one size."""


def takes_images(model: SentenceTransformer) -> bool:
    """Whether the model embeds images."""
    return "image" in model.modalities


def reads_together(model: SentenceTransformer) -> bool:
    """Whether the model embeds a text and an image as one item, rather than one or the other."""
    return "message" in model.modalities or any(
        isinstance(each, tuple) and "image" in each for each in model.modalities
    )


def add_image_tower(
    model: SentenceTransformer, config: ImageTowerConfig, seed: int, dtype: str = "float32"
) -> SentenceTransformer:
    """A model of the text model's modules and, beside them, a tower for images; new weights are drawn from ``seed``.

    The projection of images has the width of the text model's embeddings. Raises :class:`BadInputError` where the
    text model takes images already, and for a vision model that cannot be a tower.
    """
    from sentence_transformers import SentenceTransformer as Model
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router

    if takes_images(model):
        raise BadInputError("this model takes images already", where=_WHERE, hint="Remove 'image_tower'.")
    text = list(model)
    behind = [text.pop()] if isinstance(text[-1], Normalize) else []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = _new_tower(config) if config.architecture is not None else _trained_tower(config, dtype)
        batch_norms = [type(part).__name__ for part in tower.modules() if "BatchNorm" in type(part).__name__]
        if batch_norms:
            raise BadInputError(
                f"this vision model has {len(batch_norms)} layers of batch normalisation: an image's embedding would "
                "depend on the others that are encoded with it, and on how a batch is cut",
                where=_WHERE,
                hint="Use one with layer normalisation, such as vit or convnext.",
            )
        image: list[nn.Module] = [tower]
        width = _width(tower)
        if tower.module_output_name == "token_embeddings":
            image.append(Pooling(width, "cls" if config.pooling == "cls" else "mean"))
        shared = whole_dimension(model)
        image.append(Dense(width, shared, bias=config.bias, activation_function=None))
    router = Router(
        {"text": text, "image": image},
        default_route="text",
        route_mappings={(None, "text"): "text", (None, "image"): "image"},
    )
    return Model(
        modules=[router.to(getattr(torch, dtype)), *behind],
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
    )


def _new_tower(config: ImageTowerConfig) -> Any:
    """A module of the architecture with random weights, and an image processor that only resizes and scales."""
    from safetensors.torch import save_model
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

    assert config.architecture is not None
    if config.architecture not in CONFIG_MAPPING:
        near = difflib.get_close_matches(config.architecture, list(CONFIG_MAPPING), 3, 0.4)
        raise BadInputError(
            f"transformers has no architecture {config.architecture!r}",
            where=f"{_WHERE}.architecture",
            hint=f"Nearest: {', '.join(near)}." if near else None,
        )
    plain = CONFIG_MAPPING[config.architecture]()
    takes = getattr(MODEL_MAPPING.get(type(plain), None), "main_input_name", None)
    if takes != "pixel_values":
        raise BadInputError(
            f"{config.architecture} is no architecture of images alone",
            where=f"{_WHERE}.architecture",
            hint="Such are vit, deit, dinov2, clip_vision_model, siglip_vision_model, convnext, swin.",
        )
    check_settings(plain, config.settings, f"{_WHERE}.settings")
    settings: dict[str, Any] = {"image_size": config.size} if hasattr(plain, "image_size") else {}
    settings |= {key: list(value) if isinstance(value, tuple) else value for key, value in config.settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = AutoModel.from_config(type(plain)(**settings))
        except Exception as error:  # what a wrong combination of settings raises differs by architecture
            raise BadInputError(
                f"no {config.architecture} can be made of these settings: {str(error).strip().splitlines()[0]}",
                where=f"{_WHERE}.settings",
            ) from error
        # Of several ranks transformers lets only the first save.
        model.config.to_json_file(f"{folder}/config.json", use_diff=False)
        save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
        _processor(config.size).to_json_file(f"{folder}/preprocessor_config.json")
        return _module(folder, config)


def _processor(size: int) -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    # Pillow's, which needs no torchvision and gives the same pixels on every machine.
    return ViTImageProcessorPil(size={"height": size, "width": size})


def _trained_tower(config: ImageTowerConfig, dtype: str) -> Any:
    from nearfield.encoders.source import locate
    from nearfield.encoders.trials import check_weights, recorded_loading

    assert config.model is not None
    source = locate(config.model, config.revision)
    try:
        with recorded_loading() as loading:
            tower = _module(source.path, config, revision=config.revision, dtype=dtype)
        check_weights(loading, lambda: [_seen(tower)], config.model)
        return tower
    except BadInputError:
        raise
    except Exception as error:  # whatever a damaged folder or an unreachable hub raises becomes one message
        from pathlib import Path

        from nearfield.encoders.source import load_error

        raise load_error(config.model, Path(source.path), error) from error


def _module(path: str, config: ImageTowerConfig, *, revision: str | None = None, dtype: str = "float32") -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    kwargs: dict[str, Any] = {"model_kwargs": {"dtype": dtype}}
    if revision is not None:
        kwargs = {key: {**kwargs.get(key, {}), "revision": revision} for key in _KWARGS}
    modality = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    module = Transformer(
        path,
        **kwargs,
        **(
            {"modality_config": modality, "module_output_name": "sentence_embedding"} if config.pooling == "own" else {}
        ),
    )
    if set(module.modality_config) != {"image"}:
        raise BadInputError(
            f"an image tower takes images alone, and this model takes {', '.join(map(str, module.modality_config))}",
            where=config.model or _WHERE,
            hint="A model of both is named under encoder.model.",
        )
    return module


_KWARGS = ("model_kwargs", "processor_kwargs", "config_kwargs")


def _width(tower: nn.Module) -> int:
    """The width of what a tower gives for one image, by trial."""
    with torch.no_grad():
        output = _seen(tower)
    if output is None:
        raise BadInputError("this vision model has no pooling of its own", where=f"{_WHERE}.pooling", hint="Use mean.")
    return int(output.shape[-1])


def _seen(tower: nn.Module) -> Any:
    """The output of a tower for one image."""
    return tower.eval()(tower.preprocess([blank_image()]))[tower.module_output_name]  # type: ignore[operator]


def image_tokens(model: SentenceTransformer) -> int:
    """As how many tokens an image counts: its patches. All images are brought to one size."""
    pixels = model.preprocess([blank_image()])["pixel_values"]
    if pixels.dim() == 3:
        return int(pixels.shape[1])
    sides = [int(side) // _patch(model) for side in pixels.shape[-2:]]
    return max(1, sides[0] * sides[1])


def _patch(model: SentenceTransformer) -> int:
    configs = [getattr(part, "config", None) for part in model.modules()]
    for config in configs:
        config = getattr(config, "vision_config", config)
        if hasattr(config, "depths"):
            # Stages that halve the image begin with patches of a few pixels, and most of their work is behind them.
            return _PATCH
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and patch > 1:
            return patch
    return _PATCH


def image_features(model: SentenceTransformer, images: Sequence[Image], device: torch.device) -> Features:
    """The input of :func:`nearfield.encoders.packing.embed` for n images, by the model's own image processor."""
    return placed(model, model.preprocess(list(images)), device)


def item_features(
    model: SentenceTransformer,
    rows: Sequence[npt.NDArray[np.int32]],
    images: Callable[[], Sequence[Image | None]],
    device: torch.device,
) -> Features | None:
    """The input of :func:`nearfield.encoders.packing.embed` for n items, by what ``item_token_ids`` says of each, and their images.

    None where they are texts beside a tower for images, which are read as all texts are. Beside such a tower all of
    a call's items are images or none is.
    """
    if family_of(model) is not None:
        return row_features(model, rows, images(), device)
    if not len(rows[0]) or rows[0][0] != IMAGE:
        return None
    shown = [image for image in images() if image is not None]
    assert len(shown) == len(rows)
    return image_features(model, shown, device)
