"""Models that embed images: in one row with texts, by one transformer (VLM2Vec, arXiv 2410.05160), or by a tower beside that of texts.

Of the first kind the model is sentence-transformers' own ``Transformer`` around a vision-language model without its language head,
with a chat template that puts an image's mark, the prompt and the text in a row and nothing else. Only architectures that were
tried out are read; each is tried out again when it is loaded.

The towers of the second kind are the routes of a sentence-transformers ``Router``, which sends each input to the one of its modality,
both projected to one width. A folder of CLIP and the like, whose towers are one module, is fed alike. Saved, both load in plain
``SentenceTransformer(folder)``.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nearfield.arrays import Tokens
from nearfield.data.images import MARK, pillow
from nearfield.data.tokens import IMAGE
from nearfield.encoders.packing import Padding, embed, evaluating, longest_input, placed, rounding, whole_dimension
from nearfield.encoders.private import processors_by
from nearfield.encoders.transformer import check_settings, check_weights, recorded_loading
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.config import EncoderConfig, ImageTowerConfig
    from nearfield.encoders.packing import Features


Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Family:
    """The facts about an architecture."""

    processor: Callable[[Any], Any]
    """The module ``transformers`` -> the class of its processor, without a part for videos."""
    mark: str
    """The text that stands for an image in the model's own texts."""
    reserved: tuple[str, ...]
    """Words that the processor puts around or in the place of images: in a text they are taken out."""
    nested: bool = False
    """Whether its image processor takes the images of each item as a list."""
    token_types: bool = False
    """Whether it is told which tokens are an image's, to place them in two dimensions."""


def _without_videos(name: str, videos: str) -> Callable[[Any], Any]:
    """A processor's class whose part for videos is not made: it would need torchvision, and no item is a video.

    The settings of that part are kept and saved, since plain transformers asks for them.
    """

    def kind(transformers: Any) -> Any:
        whole = getattr(transformers, name)

        def begin(
            self: Any,
            image_processor: Any = None,
            tokenizer: Any = None,
            video_processor: Any = None,
            chat_template: Any = None,
            num_image_tokens: int | None = None,
            vision_feature_select_strategy: str | None = None,
            vision_aspect_ratio: str | None = None,
        ) -> None:
            # The last three are LLaVA-OneVision's.
            settings = {
                "num_image_tokens": num_image_tokens,
                "vision_feature_select_strategy": vision_feature_select_strategy,
                "vision_aspect_ratio": vision_aspect_ratio,
            }
            given = {key: value for key, value in settings.items() if value is not None}
            whole.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **given)
            self.video_processor = video_processor or {"video_processor_type": videos}

        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        return type(name, (whole,), {"__init__": begin, "get_attributes": parts, "__module__": whole.__module__})

    return kind


def _named(name: str) -> Callable[[Any], Any]:
    return lambda transformers: getattr(transformers, name)


_QWEN_WORDS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>")
_IDEFICS_WORDS = ("<fake_token_around_image>", "<image>", "<global-img>", "<video>")
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        _without_videos("Qwen2VLProcessor", "Qwen2VLVideoProcessor"), _QWEN_MARK, _QWEN_WORDS, token_types=True
    ),
    "qwen2_5_vl": Family(
        _without_videos("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"), _QWEN_MARK, _QWEN_WORDS, token_types=True
    ),
    "qwen3_vl": Family(
        _without_videos("Qwen3VLProcessor", "Qwen3VLVideoProcessor"), _QWEN_MARK, _QWEN_WORDS, token_types=True
    ),
    # The processor of Idefics3 gives the same for images, and needs neither torchvision nor num2words.
    "smolvlm": Family(_named("Idefics3Processor"), "<image>", _IDEFICS_WORDS, nested=True),
    "idefics3": Family(_named("Idefics3Processor"), "<image>", _IDEFICS_WORDS, nested=True),
    "llava": Family(_named("LlavaProcessor"), "<image>", ("<image>",)),
    "llava_next": Family(_named("LlavaNextProcessor"), "<image>", ("<image>",)),
    "llava_onevision": Family(
        _without_videos("LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor"),
        "<image>",
        ("<image>", "<video>"),
        nested=True,
    ),
}
"""By transformers' name of the architecture."""

_TEMPLATE = """\
{%- set item = namespace(prompt='', text='', images=0) -%}
{%- for message in messages -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set item.images = item.images + 1 -%}
{%- elif message.role == 'system' -%}{%- set item.prompt = item.prompt ~ part.text -%}
{%- else -%}{%- set item.text = item.text ~ part.text -%}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if item.images > 1 -%}{{- raise_exception('an item has one image, not ' ~ item.images) -}}{%- endif -%}
{%- set parts = item.text.split(MARK) -%}
{%- set between = item.images and parts|length > 1 and parts[0]|trim -%}
{%- set words = namespace(before='', behind='') -%}
{%- if between -%}
{%- set words.before = item.prompt.replace(MARK, ' ') ~ parts[0] -%}{%- set words.behind = parts[1:]|join(' ') -%}
{%- else -%}
{%- set words.behind = item.prompt.replace(MARK, ' ') ~ parts|join(' ')|trim -%}
{%- endif -%}
{%- for word in RESERVED -%}
{%- set words.before = words.before.replace(word, ' ') -%}{%- set words.behind = words.behind.replace(word, ' ') -%}
{%- endfor -%}
{%- if between -%}{{- words.before.lstrip() ~ PICTURE ~ words.behind.rstrip() -}}
{%- elif item.images and words.behind|trim -%}{{- PICTURE ~ '\\n' ~ words.behind|trim -}}
{%- elif item.images -%}{{- PICTURE -}}
{%- else -%}{{- words.behind|trim -}}{%- endif -%}
"""
"""Image, prompt, text; where the text has a mark between its words, the image stands there. The model's own words for
images are taken out of texts, so that no text can name an image that it does not have."""


def template_of(family: Family, start: str | None) -> str:
    """The chat template of a family; ``start`` is the token that its tokenizer begins a text with, if it has one."""
    reserved = [*family.reserved, *([start] if start else [])]
    fixed = {"MARK": MARK, "RESERVED": reserved, "PICTURE": family.mark}
    # Not with `format`: the template is full of braces.
    text = _TEMPLATE
    for name, value in fixed.items():
        text = text.replace(name, json.dumps(value))
    return text


def family_of(model: SentenceTransformer) -> Family | None:
    """The family of a model that reads texts and images in one transformer; None for any other model."""
    module = model[0]
    if "message" not in (getattr(module, "modality_config", None) or {}) or "image" not in module.modality_config:
        return None
    return FAMILIES.get(module.config.model_type)


def image_token_id(model: SentenceTransformer) -> int:
    """The token that stands in each place of an image, of a model that :func:`family_of` knows."""
    return int(model[0].processor.image_token_id)


class _Processors:
    """In the place of transformers' ``AutoProcessor``: processors of these families without videos, with Pillow's pixels."""

    @staticmethod
    def from_pretrained(path: str, **kwargs: Any) -> Any:
        import transformers

        where = {k: v for k, v in kwargs.items() if k in _PLACE}
        config, _ = transformers.PreTrainedConfig.get_config_dict(path, **where)
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            return transformers.AutoProcessor.from_pretrained(path, **kwargs)
        processor = family.processor(transformers).from_pretrained(path, **kwargs)
        # The same pixels on every machine, with torchvision or without.
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil", **where)
        return processor


_PLACE = ("revision", "subfolder", "token", "cache_dir", "trust_remote_code", "local_files_only")


def own_processors() -> AbstractContextManager[None]:
    """While sentence-transformers loads a model, give those of these families the processors above."""
    return processors_by(_Processors)


def read_in_a_row(model: SentenceTransformer) -> None:
    """Let a model of plain transformers read images and texts by the template of its family."""
    family = FAMILIES.get(getattr(getattr(model[0], "config", None), "model_type", ""))
    if family is None:
        return
    module: Any = model[0]
    tokenizer = module.tokenizer
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    module.processor.chat_template = template_of(family, tokenizer.bos_token)
    tokenizer.chat_template = None
    reads = {"method": "forward", "method_output_name": "last_hidden_state"}
    module.modality_config = {"text": reads, "image": reads, "message": {**reads, "format": "structured"}}
    module.module_output_name = "token_embeddings"
    module.input_formatter.message_format = "structured"
    module.input_formatter.supported_modalities = list(module.modality_config)


def row_ids(
    model: SentenceTransformer,
    texts: Sequence[str],
    sizes: Sequence[Size | None],
    prompt: str,
    *,
    cut: bool = True,
) -> list[Tokens]:
    """The token ids of n items as the model reads them: each a text, an image of a size, or both.

    An image's tokens are all there, so a row is as long as what is computed. Words behind the longest input are cut, unless
    ``cut`` is false; raises :class:`BadInputError` where an image would be.
    """
    if not texts:
        return []
    module: Any = model[0]
    processor, tokenizer = module.processor, module.tokenizer
    rendered = _rendered(module, texts, [size is not None for size in sizes], prompt)
    # As transformers does with the whole of a template's output.
    special = not (tokenizer.bos_token and rendered[0].startswith(tokenizer.bos_token))
    ending = _ending(tokenizer) if special else 0
    # In families that close an image's mark, one token does.
    family = family_of(model)
    behind = int(family is not None and not family.mark.endswith(processor.image_token))
    limit = longest_input(model) if cut else None
    lines = tokenizer(rendered, truncation=False, padding=False, add_special_tokens=special, verbose=False)
    ids_of_rows: list[Tokens] = []
    for text, size, line in zip(texts, sizes, lines["input_ids"], strict=True):
        ids = np.asarray(line, dtype=np.int32)
        places = np.flatnonzero(ids == image_token_id(model))
        if len(places) != (size is not None):
            raise BadInputError(
                f"an item with {'an' if size else 'no'} image has {len(places)} places for one: {text[:60]!r}",
                hint="Its text holds a word that stands for images in this model.",
            )
        if size is None:
            if limit is not None and len(ids) > limit:
                ids = module.preprocess([text], prompt=prompt or None)["input_ids"][0].numpy().astype(np.int32)
            ids_of_rows.append(ids)
            continue
        run = _run(model, size)
        ids = np.concatenate([ids[: places[0]], run, ids[places[0] + 1 :]])
        if limit is not None and len(ids) > limit:
            end = int(places[0]) + len(run) + behind
            if end + ending > limit:
                raise BadInputError(
                    f"an image of {size[0]} x {size[1]} pixels ends at token {end}, and the model's longest input is {limit}",
                    where="encoder.max_length",
                    hint="Raise it (and training.max_length, where that is less), or let the data keep smaller images (images.max_side).",
                )
            ids = np.concatenate([ids[: limit - ending], ids[len(ids) - ending :]])
        ids_of_rows.append(ids)
    return ids_of_rows


def _rendered(module: Any, texts: Sequence[str], with_image: Sequence[bool], prompt: str) -> list[str]:
    """The strings that the template makes of items."""
    conversations = []
    for text, image in zip(texts, with_image, strict=True):
        parts = [*([{"type": "image"}] if image else []), *([{"type": "text", "text": text}] if text else [])]
        system = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        conversations.append([*system, {"role": "user", "content": parts}])
    rendered: list[str] = module.processor.apply_chat_template(conversations, tokenize=False) if conversations else []
    return rendered


def _ending(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return len(whole) - start - len(plain)


_RUNS: WeakKeyDictionary[nn.Module, dict[Size, Tokens]] = WeakKeyDictionary()


def _run(model: SentenceTransformer, size: Size) -> Tokens:
    """The tokens that an image of a size takes; they depend on the size alone."""
    runs = _RUNS.setdefault(model[0], {})
    if size not in runs:
        processor: Any = model[0].processor
        blank = pillow().new("RGB", size, (128, 160, 192))
        mark = processor.image_token
        output = processor(text=[mark], images=[[blank]], add_special_tokens=False)
        runs[size] = np.asarray(output["input_ids"][0], dtype=np.int32)
    return runs[size]


def row_features(
    model: SentenceTransformer, rows: Sequence[Tokens], images: Sequence[Image | None], device: torch.device
) -> Features:
    """The input of :func:`nearfield.encoders.packing.embed` for n items, by their token ids and images (None for texts).

    Pixels are those of the items of this chunk alone, in their order: models find them by the order of their places.
    """
    module: Any = model[0]
    family = family_of(model)
    assert family is not None
    image_token = image_token_id(model)
    for row, image in zip(rows, images, strict=True):
        if bool((row == image_token).any()) != (image is not None):
            raise ValueError("the tokens of an item and its image do not belong together")
    features = Padding.of(model).features(rows, device, 0)
    features["modality"] = "message"
    shown = [image for image in images if image is not None]
    if not shown:
        return features
    pixels = module.processor.image_processor(
        [[each] for each in shown] if family.nested else shown, return_tensors="pt"
    )
    told = {name: value for name, value in pixels.items() if isinstance(value, Tensor) and name not in ("rows", "cols")}
    features |= placed(model, told, device)
    if family.token_types:
        features["mm_token_type_ids"] = (features["input_ids"] == image_token).int()
    return features


def check_verified(model: SentenceTransformer, config: EncoderConfig) -> None:
    """Refuse to train a transformer of images and texts whose architecture was not tried out, and what it cannot have."""
    reads = getattr(model[0], "modality_config", None) or {}
    together = ("message" in reads and "image" in reads) or any(isinstance(key, tuple) for key in reads)
    if not together:
        return
    if family_of(model) is None:
        raise BadInputError(
            f"{model[0].config.model_type} reads images and texts in one transformer, and was not tried out",
            where=config.model,
            hint=f"Tried out are {', '.join(FAMILIES)}.",
        )
    keys = ("attention", "layers", "layer_mix", "fresh", "image_tower")
    asked = [key for key in keys if getattr(config, key) is not None]
    if config.pool_prompt is False:
        asked.append("pool_prompt")
    if config.adapter is not None and not config.adapter.merges:
        asked.append("adapter.kind")
    if asked:
        raise BadInputError(
            "this cannot be set for a model that reads images and texts in one transformer",
            where=f"encoder.{asked[0]}",
            hint="Use kind: lora." if asked[0] == "adapter.kind" else "Remove it.",
        )


def trial_embedding(model: SentenceTransformer) -> Tensor:
    """(1, d) the embedding of one item with a text and an image."""
    return embed(model, _trial(model, [(3, 0)]))


_TRIAL_SIZES: tuple[Size, ...] = ((112, 14), (14, 112), (70, 14))
"""Long and thin: of those that are cut into tiles, some models make the fewest."""


def _trial(model: SentenceTransformer, items: Sequence[tuple[int | None, int]]) -> Features:
    """Features of items for a trial: each names the seed of its image (None for none) and the number of its text."""
    words = ["a", "what is shown here ?", "the name of a colour , and of nothing else"]
    sizes = [None if seed is None else _TRIAL_SIZES[seed % len(_TRIAL_SIZES)] for seed, _ in items]
    rows = row_ids(model, [words[number] for _, number in items], sizes, "", cut=False)
    images = [None if seed is None else _noise(seed) for seed, _ in items]
    return row_features(model, rows, images, model.device)


def _noise(seed: int) -> Image:
    width, height = _TRIAL_SIZES[seed % len(_TRIAL_SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image: Image = pillow().fromarray(pixels)
    return image


def check_one_tower(model: SentenceTransformer, where: str) -> None:
    """Refuse a model of images and texts that does not read them rightly: tried out each time it is loaded.

    An item must have the same embedding alone and beside longer ones, with images of other sizes or without one; another
    image must give another embedding, to its own item and to no other.
    """
    if family_of(model) is None:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
            complaint = _complaint(model)
    except BadInputError:
        raise
    except Exception as error:  # whatever an architecture in another version raises means that it cannot be tried out
        complaint = f"it cannot be tried out ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
    if complaint:
        raise BadInputError(
            f"{type(model[0].auto_model).__name__} does not read images and texts in one row rightly: {complaint}",
            where=where,
            hint="Use another version of transformers, or another model.",
        )


def _complaint(model: SentenceTransformer) -> str | None:
    # Few images: of some models each is a thousand tokens.
    items: list[tuple[int | None, int]] = [(0, 1), (None, 0), (1, 2)]
    together = embed(model, _trial(model, items)).double()
    scale = float(together.abs().max())
    tolerance = rounding(model)
    for place, item in enumerate(items[:2]):
        alone = embed(model, _trial(model, [item])).double()[0]
        if not float((alone - together[place]).abs().max()) <= tolerance * scale:
            what = "text" if item[0] is None else "text with an image"
            return f"a {what} has another embedding beside others than alone"
    changed = embed(model, _trial(model, [(3, 1), *items[1:]])).double()
    moved = (changed - together).abs().amax(dim=1)
    if not float(moved[0]) > 1e-6 * scale:
        return "another image gives the same embedding"
    if not float(moved[1:].max()) <= tolerance * scale:
        return "another image changes the embedding of other items"
    return None


def blank_image() -> Image:
    """A small image of one colour, to try models out with."""
    blank: Image = pillow().new("RGB", (64, 64), (128, 160, 192))
    return blank


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
