"""Settings of the encoder, of its prompts, and of losses on single tokens; light, without torch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from nearfield.config import Config, Kinds, KindSettings
from nearfield.data.config import InContextConfig
from nearfield.errors import BadInputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

    from nearfield.encoders.source import AdapterBase


def resolve_model(model: str, info: ValidationInfo) -> str:
    """A folder or GGUF file beside the recipe becomes its absolute path; anything else is a hub id and stays as it is."""
    base = (info.context or {}).get("base")
    path = Path(model).expanduser()
    if base is not None and not path.is_absolute() and _is_model(base / path):
        return str((base / path).resolve())
    if model.startswith((".", "/", "~")) and not _is_model(path):
        raise ValueError(f"there is no folder or GGUF file {str(base / path if base else path)!r}")
    return model


def _is_model(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".gguf" and path.is_file())


class AdapterSettings(KindSettings):
    """The base of settings of adapters, which are trained in the place of the transformer's own weights."""

    name: ClassVar[str] = "adapter"
    """Its name in a model card."""
    merges: ClassVar[bool] = False
    """Whether it can be added to the weights that it stands on."""
    save: Literal["merged", "adapter"] = "merged"
    """``merged`` saves base and adapter in one folder, ``adapter`` the adapter alone, which loads where its base is found."""

    @property
    def base_bits(self) -> Literal["none", "4bit", "8bit"]:
        """How the base is held while the adapter is trained: as it is, or in 4 or 8 bits."""
        return "none"

    @abstractmethod
    def add(self, model: SentenceTransformer, base: AdapterBase, seed: int) -> None:
        """Put a fresh adapter on the model's transformer; ``base`` is what it stands on, weights are drawn from ``seed``."""


class LoRAConfig(AdapterSettings):
    """Train low-rank matrices beside the transformer's own, which stay as they are (LoRA, arXiv 2106.09685).

    Modules after the transformer (a dense layer, say) are trained whole.
    """

    name: ClassVar[str] = "low-rank adapter"
    merges: ClassVar[bool] = True
    kind: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1)] = 16
    """The rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """The product of the two low-rank matrices is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what enters the low-rank matrices."""
    targets: Literal["all-linear", "attention", "mlp"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """The matrices of the layers that get one, by role, or a list of module names or their endings."""
    use_dora: bool = False
    """Learn the length of each output's weights beside (DoRA, arXiv 2402.09353)."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the base in 4 or 8 bits (QLoRA, arXiv 2305.14314): CUDA and the package bitsandbytes."""
    save: Literal["merged", "adapter"] = "merged"
    """``merged`` saves a whole model with the adapter added to its weights; ``adapter`` the adapter alone, which loads where
    its base is found."""

    @model_validator(mode="after")
    def _quantized_bases_are_not_merged(self) -> LoRAConfig:
        if self.quantize != "none" and self.save == "merged":
            raise ValueError(
                f"an adapter merged into a base in {self.quantize} would be rounded to {self.quantize}; say save: adapter "
                "(it can be merged into the unrounded base afterwards)"
            )
        return self

    @property
    def base_bits(self) -> Literal["none", "4bit", "8bit"]:
        """As ``quantize`` says."""
        return self.quantize

    def add(self, model: SentenceTransformer, base: AdapterBase, seed: int) -> None:
        """By :func:`nearfield.encoders.adapters.add_lora`."""
        from nearfield.encoders.adapters import add_lora

        add_lora(model, self, base, seed)


ADAPTERS = Kinds(
    "adapters",
    "nearfield.encoders.config:AdapterSettings",
    {
        "lora": ("nearfield.encoders.config:LoRAConfig", "low-rank matrices beside the transformer's own"),
        "bottleneck": (
            "nearfield.methods.bottleneck:BottleneckConfig",
            "small networks behind the parts of each layer",
        ),
        "prefix": ("nearfield.methods.prefix:PrefixConfig", "learnt vectors before the text in every layer"),
    },
)


class PoolingSettings(KindSettings):
    """The base of settings of poolings with weights of their own."""

    @abstractmethod
    def build(self, dimension: int, include_prompt: bool) -> nn.Module:
        """The module: token embeddings (n, tokens, dimension) -> one vector a text. It may leave the prompt's tokens out."""


class AttentionPoolingConfig(PoolingSettings):
    """A softmax over tokens by learnt vectors weighs them; starts as the mean."""

    kind: Literal["attention"] = "attention"
    heads: Annotated[int, Field(ge=1)] = 1
    """Each weighs its own part of the dimensions, which it must divide."""

    def build(self, dimension: int, include_prompt: bool) -> nn.Module:
        """Raises :class:`BadInputError` where the heads do not divide the dimensions."""
        from nearfield.encoders.shipped.nearfield_pooling import AttentionPooling

        if dimension % self.heads:
            raise BadInputError(
                f"{self.heads} heads do not divide the model's {dimension} dimensions", where="encoder.pooling.heads"
            )
        return AttentionPooling(dimension, self.heads, include_prompt)


class LatentAttentionPoolingConfig(PoolingSettings):
    """Tokens look up a learnt dictionary before their mean is taken (NV-Embed, arXiv 2405.17428); starts as the mean."""

    kind: Literal["latent_attention"] = "latent_attention"
    latents: Annotated[int, Field(ge=1)] = 512
    """Vectors in the dictionary."""
    heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads that look the dictionary up, each by a projection of its own."""
    head_dimension: Annotated[int, Field(ge=1)] | None = None
    """Width of a head; null divides the model's dimensions by the heads (the released model has 4,096)."""
    expansion: Annotated[int, Field(ge=1)] = 4
    """How many times wider the feed-forward block is."""
    gated: bool = True
    """A gated feed-forward block (the released code), else a plain one (the paper)."""

    def build(self, dimension: int, include_prompt: bool) -> nn.Module:
        """A module of sentence-transformers."""
        from nearfield.encoders.shipped.nearfield_pooling import LatentAttentionPooling

        return LatentAttentionPooling(dimension, **self.model_dump(exclude={"kind"}), include_prompt=include_prompt)


POOLINGS = Kinds(
    "poolings",
    "nearfield.encoders.config:PoolingSettings",
    {
        "attention": (
            "nearfield.encoders.config:AttentionPoolingConfig",
            "a softmax by learnt vectors weighs the tokens",
        ),
        "latent_attention": (
            "nearfield.encoders.config:LatentAttentionPoolingConfig",
            "tokens look up a learnt dictionary before their mean",
        ),
    },
)


class LayerMixConfig(Config):
    """A learnt weighted mean of the last layers' outputs instead of the last one's (ELMo, arXiv 1802.05365)."""

    from_layer: Annotated[int, Field(ge=0)] = 4
    """The first layer whose output counts; 0 is the embeddings, the number of layers means the last output alone."""


class ProjectionConfig(Config):
    """A dense layer behind the pooling."""

    dimensions: Annotated[int, Field(ge=1)]
    """The width of the embeddings behind it: fewer make a smaller index, at some cost in quality."""
    bias: bool = True
    """Whether a learnt constant is added to each dimension."""
    activation: Literal["identity", "tanh", "gelu", "relu"] = "identity"
    """The activation after its output; ``identity`` keeps it linear."""


class ImageTowerConfig(Config):
    """A model of images beside the one of texts, projected to the same width (CLIP, arXiv 2103.00020; ALIGN, 2102.05918).

    Either a trained one by folder or hub id, or one of a transformers architecture with new weights.
    """

    model: Annotated[str, AfterValidator(resolve_model)] | None = None
    """A folder (relative to the recipe), or a hub id."""
    revision: str | None = None
    """The commit of the hub model; null takes the newest."""
    architecture: Annotated[str, Field(min_length=1)] | None = None
    """Draw new weights: a vision architecture as transformers names it, such as ``vit``, ``convnext`` or
    ``siglip_vision_model``."""
    settings: dict[str, int | float | bool | str | tuple[int, ...]] = {}
    """Of the architecture's config, such as ``hidden_size``; what is not said is its default."""
    size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Pixels of a side that images are brought to, where the weights are new; a trained model says it itself."""
    pooling: Literal["mean", "cls", "own"] = "mean"
    """How the vectors of an image's patches become one: their mean, the first, or by the model's own pooling."""
    bias: bool = False
    """Whether the projection behind it has one."""

    @model_validator(mode="after")
    def _trained_or_new(self) -> ImageTowerConfig:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either 'model', a trained one, or 'architecture', whose weights are new")
        if self.architecture is None and (self.settings or "size" in self.model_fields_set):
            raise ValueError("'settings' and 'size' go with 'architecture': a trained model brings its own")
        if self.architecture is not None and self.revision is not None:
            raise ValueError("'revision' goes with 'model'")
        return self


class EncoderConfig(Config):
    """A sentence-transformers model, or a plain transformers encoder or decoder, by folder, GGUF file or hub id."""

    kind: Literal["sentence_transformer"] = "sentence_transformer"
    model: Annotated[str, AfterValidator(resolve_model)] = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder or a GGUF file (relative to the recipe), or a hub id."""
    revision: str | None = None
    """The commit of the hub model; null takes the newest, or the pinned one of the offline package."""
    fresh: dict[str, int | float | bool | str] | None = None
    """Keep the tokenizer alone and draw the transformer's weights anew, with these settings of its config changed (such as
    ``hidden_size``; ``{}`` changes none); null keeps the weights."""
    attention: Literal["causal", "bidirectional"] | None = None
    """The direction in which a decoder's tokens look; null keeps the model's own setting, which is tested when the model is loaded."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Keep so many layers, the first ones; null keeps all."""
    append_eos: bool = False
    """End every text with the tokenizer's end-of-text token, which pooling ``last`` then takes."""
    layer_mix: LayerMixConfig | None = None
    """The hidden states that pooling sees; null is the last layer's output."""
    pooling: Literal["mean", "cls", "last", "weighted_mean", "max"] | Annotated[PoolingSettings, POOLINGS] | None = None
    """How token vectors become one; null keeps what the model says (mean for a plain transformers model). The kinds with
    weights are no modules of sentence-transformers: their file is saved with the model, which it then loads with
    ``trust_remote_code=True`` only."""
    pool_prompt: bool | None = None
    """Whether the prompt's tokens count in pooling; null keeps what the model says (they do)."""
    projection: ProjectionConfig | None = None
    """A dense layer behind the pooling; null adds none."""
    normalize: bool | None = None
    """Whether embeddings have length 1; null keeps what the model says."""
    max_length: Annotated[int, Field(ge=4, le=1_000_000)] | None = None
    """Longest input of the trained model in tokens, special tokens and prompt included; null keeps the model's
    own. Training may read less of a text: ``training.max_length``."""
    adapter: Annotated[AdapterSettings, ADAPTERS] | None = None
    """Train an adapter instead of the transformer's own weights."""
    image_tower: ImageTowerConfig | None = None
    """A model of images beside this one of texts; null adds none."""
    trust_remote_code: bool = False
    """Run code from the model's folder or repository. Only for models that you trust."""

    @property
    def changes_base(self) -> bool:
        """Whether the model before training is another than the one that ``model`` names; its length is that one's always."""
        ignored = {"kind", "model", "revision", "adapter", "max_length", "trust_remote_code"}
        return self.model_dump(exclude=ignored) != EncoderConfig().model_dump(exclude=ignored)

    @model_validator(mode="after")
    def _new_weights_and_towers_are_trained_whole(self) -> EncoderConfig:
        if self.adapter is not None and (self.fresh is not None or self.image_tower is not None):
            key = "fresh" if self.fresh is not None else "image_tower"
            raise ValueError(
                f"'adapter' and '{key}' do not go together: an adapter leaves a trained transformer as it is. To train the "
                "image tower alone, say training.freeze: ['0.sub_modules.text.*']"
            )
        return self

    @model_validator(mode="after")
    def _adapters_alone_load_on_the_base_as_it_is(self) -> EncoderConfig:
        changed = [key for key in ("attention", "layers", "layer_mix") if getattr(self, key) is not None]
        if self.adapter is not None and self.adapter.save == "adapter" and changed:
            raise ValueError(
                f"an adapter saved alone loads on its base as it is, without {', '.join(changed)}; say adapter.save: merged, "
                "or save a base that is changed so and train on that"
            )
        return self


class QueryPrompts(Config):
    """The text put before queries and before documents; null says nothing, an empty string says 'no prompt'."""

    query: str | None = None
    """Before queries, joined to the text without a space of its own: end it with one where the model wants that."""
    document: str | None = None
    """Before documents, joined as that of queries is."""


class RolePrompts(QueryPrompts):
    """The text put before queries, before documents, and before texts that are neither; null says nothing, an empty string
    says 'no prompt'."""

    text: str | None = None
    """Before texts without a role: those of classification, clustering, pairs and the like."""


class PromptConfig(Config):
    """Prompts that live in the model under the keys that mteb resolves."""

    fallback: RolePrompts = RolePrompts()
    """For sources that state none, and for tasks of a type that no source has. There null takes what is trained for the role
    (to be stated where task types differ); for texts without a role the base model's default prompt, mostly none."""
    types: dict[str, RolePrompts] = {}
    """For an mteb task type: which of their prompts is evaluated, where the sources of the type do not agree on one; or the
    prompt of a type that no source has."""
    in_context: InContextConfig | None = None
    """Examples of the training split before the prompts of queries."""
