"""Bottleneck and prefix adapters put on, and several adapters on one base, switched when texts are encoded (arXiv 2307.03104)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nearfield.encoders.adapters import ADAPTER_WEIGHTS, joined_with_base, lora_targets
from nearfield.encoders.config import BottleneckConfig, PrefixConfig
from nearfield.encoders.source import (
    ADAPTER_CONFIG,
    BOTTLENECKS,
    AdapterBase,
    adapter_base,
    adapter_files,
    weights_hash,
)
from nearfield.encoders.transformer import LAYER, layers_of
from nearfield.errors import BadInputError
from nearfield.files import read_json
from nearfield.randomness import generator

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

    from nearfield.encoders.load import LoadedEncoder
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer

_DEFAULT = "default"


def bottleneck_places(model: SentenceTransformer, places: Literal["mlp", "both"]) -> list[str]:
    """The modules whose outputs get an adapter: of each layer the last linear module of its feed-forward part, and with
    ``both`` of its attention; by running the model, since the order of their names tells nothing.
    """
    import torch

    from nearfield.encoders.packing import evaluating, padded_features, random_tokens

    transformer = model[0].auto_model
    size = int(transformer.config.hidden_size)
    last: dict[tuple[str, str], str] = {}
    hooks = []
    for role in ("attention", "mlp") if places == "both" else ("mlp",):
        for name in lora_targets(transformer, role):
            layer = LAYER.search(name)
            assert layer is not None
            key = (name[: layer.end()], role)

            def note(_: Any, __: Any, output: Any, key: tuple[str, str] = key, name: str = name) -> None:
                if output.shape[-1] == size:
                    last.pop(key, None)  # to the end: the order is that of the run
                    last[key] = name

            hooks.append(transformer.get_submodule(name).register_forward_hook(note))
    try:
        features = padded_features(
            [random_tokens(transformer, 4)], pad_token=0, side="right", device=transformer.device, prompt_length=0
        )
        with torch.no_grad(), evaluating(transformer):
            transformer(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise BadInputError(
            f"no layer of {type(transformer).__name__} has a linear module that gives {size} numbers a token",
            where="encoder.adapter.places",
        )
    return list(last.values())


def add_bottleneck(model: SentenceTransformer, config: BottleneckConfig, base: AdapterBase, seed: int) -> None:
    """Put fresh adapters on the transformer, whose own weights are no longer trained; they change nothing yet."""
    import torch

    _check_plain(model, "bottleneck")
    places = bottleneck_places(model, config.places)
    adapted = _adapted(model, base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted.add_adapter(_DEFAULT, places, config.width, config.activation)
    model[0] = adapted


def add_prefix(model: SentenceTransformer, config: PrefixConfig, base: AdapterBase, seed: int) -> None:
    """Put a fresh prefix before the text in every layer, whose own weights are no longer trained.

    It begins as the states that words drawn from ``seed`` have in each layer. A model in which padding would change a text's
    embedding with a prefix is refused.
    """
    import torch

    _check_plain(model, "prefix")
    transformer = model[0].auto_model
    layers = layers_of(transformer, "encoder.adapter")
    states = _states_of_words(transformer, layers, config.length, seed)
    adapted = _adapted(model, base)
    adapted.add_prefix(_DEFAULT, layers, config.length)
    with torch.no_grad():
        prefix: Any = adapted.adapters[_DEFAULT]
        prefix.states.copy_(states)
    model[0] = adapted
    _check_prefix(model)


def _check_plain(model: SentenceTransformer, kind: str) -> None:
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer

    if not hasattr(model[0], "auto_model") or isinstance(model[0], AdaptedTransformer):
        raise BadInputError(
            f"{kind} adapters are put on a plain transformer, and the model's first module is a {type(model[0]).__name__}",
            where="encoder.adapter",
        )


def _adapted(model: SentenceTransformer, base: AdapterBase) -> AdaptedTransformer:
    """The model's transformer, of which nothing is trained, with a place for adapters."""
    from nearfield.encoders.shipped.nearfield_adapters import AdaptedTransformer

    adapted = AdaptedTransformer.around(model[0])
    adapted.model.requires_grad_(False)
    adapted.base, adapted.base_path = base.identity, base.path
    return adapted


def _states_of_words(transformer: Any, layers: list[str], length: int, seed: int) -> Tensor:
    """(layers, length, d) float32: what each layer is given when it reads words drawn from a seed."""
    import torch

    from nearfield.encoders.packing import evaluating

    size = int(transformer.get_input_embeddings().num_embeddings)
    words = torch.from_numpy(generator(seed, "prefix").integers(0, size, (1, length))).to(transformer.device)
    given: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).detach().float())

    hooks = [transformer.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in layers]
    try:
        with torch.no_grad(), evaluating(transformer):
            transformer(input_ids=words, attention_mask=torch.ones_like(words))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(given)


def _check_prefix(model: SentenceTransformer) -> None:
    """Refuse a model in which a prefix does nothing, or in which a text has another embedding beside a longer one."""
    import torch

    from nearfield.encoders.packing import Padding, embed, evaluating, random_tokens, rounding

    transformer = model[0].auto_model
    tokens = random_tokens(transformer, 13)
    short, long = tokens[:4], tokens[4:]

    def embeddings(rows: list[Any]) -> Tensor:
        return embed(model, Padding.of(model).features(rows, transformer.device, 0)).double()

    name = type(transformer).__name__
    with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
        try:
            alone, together = embeddings([short])[0], embeddings([short, long])[0]
            with using(model, None, afterwards=_DEFAULT):
                bare = embeddings([short])[0]
        except Exception as error:  # whatever an unknown architecture raises means that it takes no prefix
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BadInputError(f"{name} takes no prefix ({reason})", where="encoder.adapter") from error
    scale = float(alone.abs().max())
    if float((alone - bare).abs().max()) <= 1e-6 * scale:
        raise BadInputError(f"a prefix changes nothing in {name}", where="encoder.adapter")
    if float((alone - together).abs().max()) > rounding(transformer) * scale:
        raise BadInputError(
            f"with a prefix, padding changes the embeddings of {name}",
            where="encoder.adapter",
            hint="Use kind: bottleneck or lora, or a tokenizer that pads on the other side.",
        )


def has_bottlenecks(model: SentenceTransformer) -> bool:
    """Whether the transformer has adapters of ours, bottlenecks or prefixes, which are no part of its weights."""
    return bool(getattr(model[0], "adapters", None))


@contextlib.contextmanager
def saved_alone(model: SentenceTransformer, alone: bool) -> Iterator[None]:
    """Let a model with adapters of ours be saved without its base for the time of a block."""
    module: Any = model[0]
    if not has_bottlenecks(model):
        yield
        return
    before = module.saves_base
    module.saves_base = not alone
    try:
        yield
    finally:
        module.saves_base = before


def load_adapters(encoder: LoadedEncoder, folders: Mapping[str, str | Path]) -> None:
    """Put several saved adapters on one loaded base, each under its name; none is active then.

    Raises :class:`BadInputError` for an adapter that was trained on another base (another name, revision or weights), that is
    not alone in its folder, or where low-rank ones stand beside bottlenecks or prefixes.
    """
    from nearfield.encoders.shipped.nearfield_adapters import WEIGHTS, AdaptedTransformer

    model, base = (
        encoder.model,
        AdapterBase(encoder.name, encoder.revision, weights_hash(encoder.path, encoder.revision)),
    )
    kinds = {name: (Path(folder) / BOTTLENECKS).is_file() for name, folder in folders.items()}
    if len(set(kinds.values())) > 1:
        raise BadInputError("low-rank and other adapters cannot stand on one model together", where="adapters")
    for name, place in folders.items():
        folder = Path(place)
        stands_on = adapter_base(folder)
        if stands_on is None:
            raise BadInputError("this folder does not hold an adapter alone", where=str(folder))
        for what, wanted, found in (
            ("name", stands_on.name, base.name),
            ("revision", stands_on.revision, base.revision),
            ("weights", stands_on.weights, base.weights),
        ):
            if wanted != found and None not in (wanted, found):
                raise BadInputError(
                    f"this adapter was trained on another base: its {what} is {wanted}, here it is {found}",
                    where=str(folder),
                )
        if kinds[name]:
            if not isinstance(model[0], AdaptedTransformer):
                model[0] = AdaptedTransformer.around(model[0])
            settings = read_json(folder / BOTTLENECKS, "adapter configuration")
            model[0].read_adapters(settings, folder / WEIGHTS, rename=name)
        else:
            _load_lora(model, name, folder, stands_on)
    activate(model, None)
    model.eval()


def _load_lora(model: SentenceTransformer, name: str, folder: Path, base: AdapterBase) -> None:
    from nearfield.encoders.adapters import record_base

    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter_files(folder) / file).is_file():
            raise BadInputError(f"this adapter has no {file}", where=str(folder))
    with joined_with_base(folder, base.name) as joined, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
        model[0].auto_model.load_adapter(str(joined), adapter_name=name)
    record_base(model[0].auto_model, base)


def activate(model: SentenceTransformer, name: str | None) -> None:
    """Encode with the adapter of this name from now on; None is the base alone, to the bit."""
    module: Any = model[0]
    if has_bottlenecks(model):
        known = list(module.adapters)
    else:
        known = list(getattr(getattr(module, "auto_model", None), "peft_config", None) or {})
    if name is not None and name not in known:
        raise BadInputError(
            f"there is no adapter {name!r}", where="adapters", hint=f"There are: {', '.join(known) or 'none'}."
        )
    if has_bottlenecks(model):
        module.activate(name)
    elif name is None and known:
        module.auto_model.disable_adapters()
    elif name is not None:
        module.auto_model.enable_adapters()
        module.auto_model.set_adapter(name)


@contextlib.contextmanager
def using(
    model: SentenceTransformer, name: str | None, *, afterwards: str | None = None
) -> Iterator[SentenceTransformer]:
    """Encode with the adapter of this name for the time of a block, with the base alone (or another one) afterwards."""
    activate(model, name)
    try:
        yield model
    finally:
        activate(model, afterwards)
