"""Models loaded, built as a recipe asks for them, and saved, in sentence-transformers' format.

Loading checks what it gets; building adds layers, attention, pooling, projection, norm, image tower and adapter; the files of our own
modules travel with a saved model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nearfield.encoders.adapters import (
    base_of,
    has_bottlenecks,
    joined_with_base,
    merge_adapter,
    name_base,
    quantization_settings,
    record_base,
    save_adapter,
    saved_alone,
)
from nearfield.encoders.private import has_adapter, load_with_modules
from nearfield.encoders.source import (
    AdapterBase,
    adapter_base,
    check_folder,
    find_base,
    gguf_file,
    load_error,
    locate,
    read_stated,
    weights_hash,
)
from nearfield.encoders.transformer import (
    Loading,
    append_eos,
    check_weights,
    draw_anew,
    keep_layers,
    recorded_loading,
    transformer_of,
)
from nearfield.errors import BadInputError, Notice
from nearfield.files import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from nearfield.encoders.config import AdapterSettings, EncoderConfig, PoolingSettings
    from nearfield.encoders.tokenize import Tokenizer


logger = logging.getLogger("nearfield.encoders")

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoadedEncoder:
    """A loaded model with the name and revision it goes by in results, and a note on where it came from."""

    model: SentenceTransformer
    name: str
    revision: str
    path: str
    note: str | None = None
    notices: tuple[Notice, ...] = ()
    """Notices for its users, as that its vectors depend on the rest of the batch."""
    content: str = ""
    """All that loading read, by its hash or commit, that of an adapter's base counted; empty where it is not known."""


def load_encoder(
    name_or_path: str,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: Dtype = "float32",
    base: str | None = None,
    quantize: str = "none",
    recipe: EncoderConfig | None = None,
) -> LoadedEncoder:
    """Load a dense embedding model by folder or hub id.

    The folder of an adapter alone is loaded on its base: ``base`` if given, else the one it names. ``quantize`` holds the
    transformer in 4 or 8 bits (CUDA). ``recipe`` says what a training that begins from the model replaces of it. Raises
    :class:`BadInputError` when it is no such model, is damaged or incomplete, or cannot be fetched.
    """
    source = locate(name_or_path, revision)
    folder = Path(source.path)
    base_path, stands_on, gguf = None, None, gguf_file(folder)
    if folder.is_dir() and gguf is None:
        check_folder(folder)
        stands_on = adapter_base(folder)
    if stands_on is not None:
        base_path = find_base(stands_on, folder, base)
    elif base is not None:
        raise BadInputError(
            "this is a whole model, no adapter that was saved alone: it has no base",
            where=name_or_path,
            hint="Leave out the base.",
        )
    if source.note:
        logger.info(source.note)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if quantize != "none":
        kwargs |= quantization_settings(quantize, _device_type(device))
    from nearfield.encoders.images import own_processors, read_in_a_row
    from nearfield.encoders.source import check_family

    notices: tuple[Notice, ...] = ()
    try:
        with (
            quiet_transformers(),
            contextlib.nullcontext(source.path) if base_path is None else joined_with_base(folder, base_path) as path,
            recorded_loading() as loading,
        ):
            if gguf is not None:
                model = _load_gguf(gguf, device, kwargs)
            else:
                # The present commit of the name: the model that is loaded is the one that its key names.
                taken = None if folder.is_dir() else revision if source.content == "main" else source.content
                read = partial(read_stated, str(path), taken)
                notices += check_family(read, name_or_path, recipe)
                if base_path is not None and read("modules.json") is None:
                    # An adapter that says nothing of what is made of its token vectors is what its base is.
                    notices += check_family(partial(read_stated, base_path, None), name_or_path, recipe)
                settings = {"revision": taken, "device": device, "trust_remote_code": trust_remote_code}
                with own_processors():
                    model = load_with_modules(str(path), own_modules(), model_kwargs=kwargs, **settings)
    except BadInputError:
        raise
    except Exception as error:  # whatever a damaged folder or an unreachable hub raises becomes one message
        raise load_error(name_or_path, folder, error) from error
    if stands_on is not None and has_bottlenecks(model):
        model[0].base, model[0].base_path = stands_on.identity, base_path
    elif stands_on is not None:
        record_base(model[0].auto_model, replace(stands_on, path=base_path))
    if gguf is not None or not _knows_its_inputs(folder, revision):
        read_plain_texts(model)
        read_in_a_row(model)
    notices += _checked(model, loading, name_or_path, recipe)
    commit = None
    if not folder.is_dir() and gguf is None and hasattr(model[0], "config"):
        commit = getattr(model[0].config, "_commit_hash", None)
    content = (commit or source.content) if base is None else fingerprint([source.revision, locate(base).content])
    return LoadedEncoder(model, source.name, commit or source.revision, source.path, source.note, notices, content)


def _checked(
    model: SentenceTransformer, loading: Loading, name: str, recipe: EncoderConfig | None
) -> tuple[Notice, ...]:
    """Make a loaded model read texts as it was made to, and try it out; returns what its users must know."""
    from nearfield.encoders.images import check_one_tower
    from nearfield.encoders.tokenize import border_notices
    from nearfield.encoders.trials import (
        check_claimed_direction,
        check_words,
        fit_positions,
        pad_as_processor,
        trial_embeddings,
        try_company,
    )

    notices = check_words(model, name) + fit_positions(model, name)
    pad_as_processor(model)
    if recipe is None or recipe.fresh is None:
        check_weights(loading, lambda: trial_embeddings(model), name)
    check_claimed_direction(model, name)
    check_one_tower(model, name)
    return (*notices, *border_notices(model), *try_company(model, name))


def _load_gguf(file: Path, device: str | None, kwargs: dict[str, Any]) -> SentenceTransformer:
    """A sentence-transformers model with mean pooling on the file's weights, to which ``kwargs`` are passed.

    It is saved as any other model: nothing of it still names the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise BadInputError(
            "a GGUF file needs the package gguf, which is not installed", where=str(file), hint="pip install gguf"
        )
    from sentence_transformers import SentenceTransformer

    named = {"gguf_file": file.name}
    model = SentenceTransformer(
        str(file.parent), device=device, model_kwargs={**kwargs, **named}, processor_kwargs=named, config_kwargs=named
    )
    transformer = model[0].auto_model
    # Its weights are plain ones by now; transformers would quantise them again from a file that a saved folder lacks.
    for owner, name in ((transformer.config, "quantization_config"), (transformer, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    transformer.is_quantized = False
    return model


def _knows_its_inputs(folder: Path, revision: str | None) -> bool:
    """Whether sentence-transformers saved the model: what it reads as a chat is its maker's choice then."""
    if folder.is_dir():
        return (folder / "modules.json").is_file()
    from sentence_transformers.util import is_sentence_transformer_model

    return bool(is_sentence_transformer_model(str(folder), revision=revision, local_files_only=True))


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


def _device_type(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device).type


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Bars and loading reports go unseen: what they warn of (tensors that a file lacks) is checked here and is an error."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.cuda.is_available():
        # Saving imports DeepSpeed where it is installed, which would look for devices and tell of it.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # A head that the file lacks and nothing uses (BERT's pooler) is filled at random: the same for everyone.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


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
    from nearfield.encoders.images import add_image_tower, check_verified
    from nearfield.encoders.packing import set_longest, stated_positions, usable_positions
    from nearfield.encoders.tokenize import BORDER, keep_borders
    from nearfield.encoders.trials import freeze_unused, set_direction, try_company

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

    from nearfield.encoders.packing import whole_dimension

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


def save_encoder(
    model: SentenceTransformer,
    folder: Path,
    *,
    adapter: Literal["merged", "adapter"] = "merged",
    dtype: str | None = None,
    place: Path | None = None,
) -> None:
    """Save in sentence-transformers' format, so that plain ``SentenceTransformer(folder)`` loads it.

    ``adapter`` says what becomes of an adapter: ``merged`` saves a copy of the model that has it in its weights, ``adapter``
    saves it alone, with the name and revision of its base. ``dtype`` is that of the saved weights; null keeps the model's.
    ``place`` is where the folder will stand, if it is written aside: an adapter's way to its base begins there.
    Without a card: sentence-transformers would repeat the base model's.
    """
    from nearfield.encoders.tokenize import save_borders

    merged = has_adapter(model) and adapter == "merged"
    if merged or dtype is not None:
        model = copy.deepcopy(model)
    if merged:
        merge_adapter(model)
    if dtype is not None:
        import torch

        model = model.to(getattr(torch, dtype))
    with quiet_transformers(), saved_alone(model, adapter == "adapter"):
        if has_adapter(model):
            save_adapter(model, folder, place or folder)
        else:
            model.save_pretrained(str(folder), create_model_card=False)
    stands_on = base_of(model)
    if stands_on is not None and has_bottlenecks(model) and adapter == "adapter":
        name_base(folder, stands_on, place or folder)
    ship_modules(model, folder)
    save_borders(model, folder)


_SHIPPED = f"{__package__}.shipped."


def own_modules() -> dict[str, type[nn.Module]]:
    """The types that our saved folders name in modules.json -> our own classes: loading them runs no code of a folder."""
    from nearfield.encoders.shipped import nearfield_adapters, nearfield_pooling

    classes = (
        nearfield_adapters.AdaptedTransformer,
        nearfield_pooling.AttentionPooling,
        nearfield_pooling.LatentAttentionPooling,
    )
    return {f"{each.__module__.removeprefix(_SHIPPED)}.{each.__name__}": each for each in classes}


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
