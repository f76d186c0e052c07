"""The model and its objective on the devices at hand, and how items become what the model takes.

:func:`build_engine` puts the model on its devices as far as this machine, its launcher and the objective allow.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.arrays import Mask, Rows, Tokens
from nearfield.batching.plan import Batch
from nearfield.data.tokens import IMAGE
from nearfield.encoders.images import family_of, image_token_id, item_features
from nearfield.encoders.kernels import add_tables_in_float32, sparse_embedding_gradients, use_fast_dropout
from nearfield.encoders.packing import TARGETS, Features, PackingKind, Padding, TokenTask, embed, packed_features
from nearfield.encoders.tokenize import leaves_prompt_out
from nearfield.encoders.trials import packing_kind
from nearfield.errors import BadInputError
from nearfield.objectives.batch import MemoryQueue, Objective
from nearfield.objectives.infonce import InfoNCE, can_ring
from nearfield.training.backends.replicated import Backend, MakeOptimizer, trainable
from nearfield.training.chunks import Budget, Cut, TextPool, TrainingData, Work, cut_work
from nearfield.training.launch import BackendName, Launch, asked_backend, check_launch, wants_several
from nearfield.training.step import can_keep_graphs

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

    from nearfield.training.config import TrainingConfig

logger = logging.getLogger("nearfield.training")

MakeFeatures = Callable[[Rows], Features]
"""TextPool rows of a chunk of n texts -> what the encoder takes."""


class EmbeddingModule(nn.Module):
    """The encoder and what the objective learns, in one module, so that all parameters are treated alike."""

    def __init__(self, encoder: SentenceTransformer, objective: nn.Module, token_task: TokenTask | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.token_task = token_task

    def forward(self, features: Features) -> Tensor:
        """Features of n texts, padded or packed -> (n, d) embeddings, and losses of tokens where features have targets."""
        if self.token_task is not None and TARGETS in features:
            rows: Tensor = self.token_task.forward(self.encoder, features)
            return rows
        embeddings: Tensor = embed(self.encoder, features)
        return embeddings


@dataclass
class Engine:
    """A backend with its model, its objective and the data that it trains on."""

    backend: Backend
    encoder: SentenceTransformer
    objective: Objective
    launch: Launch
    data: TrainingData
    packing: PackingKind | None
    """How texts are packed, none where they are padded."""
    by_prompt: bool
    """Whether a chunk must have one prompt, since the pooling leaves it out."""
    dimension: int
    config: TrainingConfig
    """How the model is trained."""
    queue: MemoryQueue | None = None
    """Positives of earlier steps, where the objective asks for them."""
    ring: bool = False
    """Whether ranks pass their parts round instead of gathering them."""

    @property
    def columns(self) -> int:
        """The width of what the module gives for each text in a step: its embedding, and losses of its tokens."""
        return self.dimension + (0 if self.data.token_task is None else self.data.token_task.columns)

    @property
    def retries_in_place(self) -> bool:
        """Whether a step that ran out of memory can be told to the other ranks and repeated: not where its parts wait for each
        other."""
        return self.backend.retries_in_place and not self.ring

    @property
    def padded(self) -> bool:
        """Whether chunks are padded rectangles."""
        return self.packing is None

    @cached_property
    def padding(self) -> Padding:
        """How texts are padded."""
        return Padding.of(self.encoder)

    def backend_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, whole or in the shards that this rank holds."""
        return [p for p in self.backend.module.parameters() if p.requires_grad]

    def lengths(self, pool: TextPool) -> Rows:
        """(n,) tokens of the pool's texts; where all are padded to one width, that."""
        lengths = np.zeros(len(pool.items), dtype=np.int64)
        for prompt in np.unique(pool.prompts):
            mine = pool.prompts == prompt
            lengths[mine] = self.data.tokens.tables[int(prompt)].lengths(pool.items[mine])
        width = self.padding.width if self.padded else None
        if width is not None:
            images = self.images(pool)
            lengths = np.where(np.False_ if images is None else images, lengths, np.maximum(lengths, width))
        return lengths

    def images(self, pool: TextPool, *, apart: bool = False) -> Mask | None:
        """(n,) which items of the pool go through layers that texts do not; none where a chunk may hold both.

        ``apart`` keeps them apart where one transformer reads both, too.
        """
        if self.data.images is None:
            return None
        of_images = np.zeros(len(pool.items), dtype=bool)
        for prompt in np.unique(pool.prompts):
            mine, table = np.flatnonzero(pool.prompts == prompt), self.data.tokens.tables[int(prompt)]
            of_images[mine] = self.go_apart([table.of(int(item)) for item in pool.items[mine]], apart=apart)
        return of_images

    def go_apart(self, rows: Sequence[Tokens], *, apart: bool = False) -> Mask:
        """(n,) which items, by their tokens, go through layers that others do not and may share no chunk with them."""
        apart = self.data.images is not None and (apart or self.towers or self.level)
        return np.asarray([apart and self._has_image(row) for row in rows], dtype=bool)

    @property
    def towers(self) -> bool:
        """Whether images go through a tower of their own, where there are some."""
        return family_of(self.encoder) is None

    @property
    def level(self) -> bool:
        """Whether all ranks must go through the same layers at once."""
        return self.backend.same_chunk_count

    def work(
        self, batch: Batch, cut: Cut, *, first_number: int = 0, weight: float = 1.0, final: bool = True
    ) -> tuple[Work, Rows]:
        """A planned batch cut into chunks and dealt to ranks, and the tokens of its texts."""
        pool = self.pool(batch)
        lengths = self.lengths(pool)
        images = self.images(pool, apart=cut.apart)
        work = cut_work(
            pool,
            lengths,
            cut,
            self.launch,
            padded=self.padded,
            by_prompt=self.by_prompt,
            images=images,
            level=self.level,
        )
        whole = replace(
            work,
            known_positives=self.data.known(batch),
            first_number=first_number,
            weight=weight,
            final=final,
            guide=self.data.guide,
            queue=None if self.queue is None else self.queue.queued(),
            ring=self.ring,
        )
        return whole, lengths

    def keeps_graph(self, work: Work, budget: Budget) -> bool:
        """Whether a step keeps the graph of all its chunks, rather than encode each twice."""
        cache = self.config.gradient_cache
        fits = cache == "never" or (cache == "auto" and work.heaviest <= budget.graph_tokens)
        return fits and can_keep_graphs(self.backend, work.rounds if self.level else len(work.own))

    def pool(self, batch: Batch) -> TextPool:
        """The texts of a planned batch, with what its examples count."""
        pool = self.data.pool(batch)
        if not self.objective.wants_tokens:
            return pool
        if any(map(self._has_image, self.data.tokens_of(pool, pool.queries))):
            raise BadInputError("this objective decodes texts, and some queries are images", where="objective")
        return self.data.with_query_tokens(pool)

    def make_features(self, pool: TextPool, seed: int = 0, step: int = 0) -> MakeFeatures:
        """The function that turns a chunk of a pool into features; which tokens are hidden depends on seed, step and text."""
        queries = np.zeros(len(pool.items), dtype=bool)
        queries[pool.queries] = True

        def features(chunk: Rows) -> Features:
            rows = [self.data.tokens.tables[int(pool.prompts[i])].of(int(pool.items[i])) for i in chunk]
            prompt_length = self.data.tokens.tables[int(pool.prompts[chunk[0]])].prompt_length
            if pool.deleted is not None:
                rows = [
                    row if self._has_image(row) else delete_tokens(row, share, prompt_length)
                    for row, share in zip(rows, pool.deleted[chunk].tolist(), strict=True)
                ]
            if self.data.token_task is None:
                return self.item_features(pool.items[chunk], rows, prompt_length)
            keys = [(seed, step, int(pool.items[i]), int(pool.prompts[i])) for i in chunk]
            side = self.encoder.tokenizer.padding_side if self.padded else "right"
            device, chosen = self.backend.device, queries[chunk].tolist()
            read, targets = self.data.token_task.hide(rows, keys, chosen, prompt_length, side, device)
            return {**self.features(read, prompt_length), TARGETS: targets}

        return features

    def _has_image(self, row: Tokens) -> bool:
        """Whether this is the entry of an image in the token cache, or of a text with one."""
        if self.data.images is None:
            return False
        if self.towers:
            return bool(row[0] == IMAGE)
        return bool((row == image_token_id(self.encoder)).any())

    def item_features(self, items: Rows, rows: list[Tokens], prompt_length: int) -> Features:
        """Items of a chunk with what the token cache says of them -> what the encoder takes."""
        images = self.data.images
        if images is not None:
            features = item_features(self.encoder, rows, lambda: images(items), self.backend.device)
            if features is not None:
                return features
        return self.features(rows, prompt_length)

    def features(self, rows: list[Tokens], prompt_length: int) -> Features:
        """Token ids of texts -> what the encoder takes."""
        device = self.backend.device
        if self.packing is not None and any(map(len, rows)):
            return packed_features(rows, kind=self.packing, device=device, prompt_length=prompt_length)
        return self.padding.features(rows, device, prompt_length)


def delete_tokens(row: Tokens, share: float, prompt_length: int) -> Tokens:
    """A text without some of its tokens, each deleted with the chance ``share``; its prompt, its first and its last token stay.

    The draw comes from torch's global generator, which a step seeds for each chunk: a second encoding draws the same.
    """
    stays = torch.rand(len(row)).numpy() >= share
    stays[: max(1, prompt_length)] = True
    stays[-1:] = True
    return row[stays]


def check_token_task(backend: BackendName) -> None:
    """Refuse losses on tokens where parameters are taken apart: a head shares its matrix with the table of embeddings."""
    if backend not in ("single", "ddp"):
        raise BadInputError(
            f"losses on tokens share a matrix between embeddings and head, which {backend} would take apart",
            where="objective",
            hint="Use training.backend=ddp.",
        )


def check_can_train(config: TrainingConfig, launch: Launch, *, adapter: bool, token_task: bool = False) -> None:
    """Refuse, before any data is built, what this rank could never train: ``adapter`` and ``token_task`` say what it has."""
    name = check_launch(config.backend, launch)
    if token_task:
        check_token_task(name)
    if launch.is_main:
        for tracker in config.trackers:
            tracker.check()
    device = pick_device(config, launch)
    config.optimizer.check_sharded(name)
    if name == "fsdp2" and adapter and pick_precision(config, device) == "bf16-pure":
        raise BadInputError(
            "FSDP2 shards parameters of one type; bf16-pure holds the base in bfloat16 and the adapter in float32",
            where="training.precision",
            hint="Use training.precision=bf16-mixed, or another backend.",
        )
    if name.startswith("zero"):
        from nearfield.training.backends.zero import check_deepspeed

        check_deepspeed(name, launch.world_size)


def pick_device(config: TrainingConfig, launch: Launch) -> torch.device:
    """The device of this rank; ``auto`` follows accelerate's ``use_cpu``."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("training.device is cuda, but no CUDA device is here", hint="Use training.device=auto.")
    unwanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if config.device == "cpu" or not torch.cuda.is_available() or (config.device == "auto" and unwanted):
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise BadInputError(
            f"local rank {launch.local_rank} has no GPU: {torch.cuda.device_count()} are here",
            hint="Start one process a GPU.",
        )
    return torch.device("cuda", launch.local_rank)


def pick_precision(config: TrainingConfig, device: torch.device) -> str:
    """``fp32``, ``bf16-mixed`` or ``bf16-pure``."""
    if config.precision != "auto":
        return config.precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if native else "fp32"


def build_engine(
    config: TrainingConfig,
    encoder: SentenceTransformer,
    objective: Objective,
    make_optimizer: MakeOptimizer,
    data: TrainingData,
    device: torch.device,
    launch: Launch,
) -> Engine:
    """Put the model on its devices; the process group of several ranks must exist."""
    name = asked_backend(config.backend, launch.world_size)
    config.optimizer.check_sharded(name)
    if data.token_task is not None:
        check_token_task(name)
        if data.images is not None:
            raise BadInputError("tokens are told of texts, and the data has images", where="objective")
    if config.exchange == "ring":
        check_ring(objective)
    freeze_parameters(encoder.named_parameters(), config.freeze)
    if config.gradient_checkpointing:
        enable_checkpointing(encoder)
    if config.attention_dropout is not None:
        set_attention_dropout(encoder, config.attention_dropout)
    packing = None
    if config.packing == "auto":
        # An evaluation during the training reads whole texts.
        longest = config.max_length if config.evaluation is None else None
        half = pick_precision(config, device) == "bf16-mixed"
        packing = packing_kind(encoder.to(device), device, bf16=half, longest=longest)
    use_fast_dropout(encoder)
    # A head that is tied to the table of embeddings gives all of its rows a gradient.
    if name in ("single", "ddp") and data.token_task is None:
        sparse_embedding_gradients(encoder)
    if device.type == "cpu" and pick_precision(config, device) != "fp32":
        add_tables_in_float32(encoder)
    set_training_mode(encoder, dropout=config.dropout)
    if config.compile:
        compile_transformer(encoder)
    module = EmbeddingModule(encoder, objective, data.token_task)
    dimension = encoder.get_embedding_dimension()
    if dimension is None:
        raise BadInputError("this model does not say how wide its embeddings are", where="encoder.model")
    backend = open_backend(name, config, module, make_optimizer, device, launch)
    backend.verify()
    if launch.is_main:
        precision: str = pick_precision(config, device)
        if not name.startswith("zero") and any(p.dtype == torch.bfloat16 for p in trainable(module).values()):
            precision += ": weights, gradients and their sums over chunks and ranks in bfloat16"
        logger.info("Backend %s in effect on %d process(es), %s, %s", name, launch.world_size, device.type, precision)
    by_prompt = leaves_prompt_out(encoder) or data.token_task is not None
    return Engine(
        backend,
        encoder,
        objective,
        launch,
        data,
        packing,
        by_prompt,
        dimension,
        config,
        queue=open_queue(config, objective),
        ring=launch.world_size > 1 and config.exchange == "ring",
    )


def check_ring(objective: nn.Module) -> None:
    """Refuse an objective that cannot be computed while parts of a batch are passed round."""
    known = isinstance(objective, InfoNCE)
    if isinstance(objective, InfoNCE) and can_ring(objective.config) and not objective.config.queue:
        return
    raise BadInputError(
        "a spread-out regulariser and a queue look at all embeddings of a batch, which a ring never brings together"
        if known
        else "this objective looks at all embeddings of a batch, which a ring never brings together",
        where="training.exchange",
        hint="Use training.exchange=gather.",
    )


def open_queue(config: TrainingConfig, objective: nn.Module) -> MemoryQueue | None:
    """The memory that the objective asks for, empty; none where it asks for none."""
    sizes = [part.config.queue for part in objective.modules() if isinstance(part, InfoNCE)]
    if not any(sizes):
        return None
    if config.averaged_batches > 1:
        raise BadInputError(
            "a queue takes in whole batches, which training.averaged_batches cuts",
            where="training.averaged_batches",
            hint="Leave it at 1: a large batch fits by gradient caching.",
        )
    return MemoryQueue(max(sizes))


def open_backend(
    name: BackendName,
    config: TrainingConfig,
    module: EmbeddingModule,
    make_optimizer: MakeOptimizer,
    device: torch.device,
    launch: Launch,
) -> Backend:
    """The backend of a name."""
    precision = pick_precision(config, device)
    mixed = precision == "bf16-mixed"
    world = launch.world_size
    if name in ("single", "ddp"):
        from nearfield.training.backends.replicated import ReplicatedBackend

        return ReplicatedBackend(module, make_optimizer, device, world, mixed)
    if world == 1 and not torch.distributed.is_initialized():
        raise wants_several(name)
    if name == "fsdp2":
        from nearfield.training.backends.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(module, list(module.objective.parameters()), make_optimizer, device, world, mixed)
    from nearfield.training.backends.zero import ZeroBackend

    bf16 = precision.startswith("bf16")
    return ZeroBackend(name, module, make_optimizer, device, world, bf16, config.max_gradient_norm)


def freeze_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]], patterns: Sequence[str]) -> list[str]:
    """Take the gradient from all parameters whose name a pattern matches (``*``, ``?``, ``[...]``); return their names.

    Raises :class:`BadInputError` for a pattern that matches nothing, and where nothing is left to train.
    """
    parameters = dict(named_parameters)
    frozen: dict[str, None] = {}
    for position, pattern in enumerate(patterns):
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            raise BadInputError(
                f"the pattern {pattern!r} matches no parameter of the model",
                where=f"training.freeze.{position}",
                hint=f"A pattern is for the whole name. Nearest: {', '.join(_nearest(pattern, list(parameters)))}.",
            )
        frozen.update(dict.fromkeys(matched))
    for name in frozen:
        parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise BadInputError(
            "these patterns freeze every parameter, so that nothing is trained",
            where="training.freeze",
            hint=f"The model has {len(parameters)} parameters, such as {next(iter(parameters))!r}.",
        )
    return list(frozen)


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """The names that look most like a pattern: first those that hold its text, then the close ones."""
    text = pattern.replace("*", "").strip(".").lower()
    holding = [name for name in names if text and text in name.lower()]
    close = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, text, name.lower(), False).ratio())
    return list(dict.fromkeys([*holding, *close]))[:3]


def transformer_of(model: SentenceTransformer, setting: str) -> PreTrainedModel:
    """The transformers model inside; :class:`BadInputError` for a model that has none, where ``setting`` needs one."""
    transformer = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise BadInputError(
            f"{setting} needs a transformer, and the model's first module is a {type(model[0]).__name__}",
            where=f"training.{setting}",
        )
    return transformer


def enable_checkpointing(model: SentenceTransformer) -> None:
    """Let each layer keep its input alone and be computed again in the backward pass, with the dropout it had."""
    transformer = transformer_of(model, "gradient_checkpointing")
    if not transformer.supports_gradient_checkpointing:
        raise BadInputError(
            f"{type(transformer).__name__} cannot compute its layers again", where="training.gradient_checkpointing"
        )
    # Reentrant checkpointing loses the gradient of a model whose inputs need none, as embedding layers' do not.
    settings = {"use_reentrant": False}
    if hasattr(transformer, "activation_checkpointing_enable"):
        transformer.activation_checkpointing_enable(settings)
    else:  # its name before transformers 5.24
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def set_attention_dropout(model: SentenceTransformer, rate: float) -> None:
    """Let attention leave out so many of its weights in training. The model's config, which is saved, keeps its own rate."""
    transformer = transformer_of(model, "attention_dropout")
    changed = False
    for module in transformer.modules():
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            part = getattr(module, name, None)
            # Where a plain ``dropout`` is one of attention, the module has queries beside it.
            if name == "dropout" and not any(hasattr(module, query) for query in ("query", "q_lin", "q")):
                continue
            if isinstance(part, nn.Dropout):
                part.p, changed = rate, True
            elif isinstance(part, float):
                setattr(module, name, rate)
                changed = True
    if not changed:
        raise BadInputError(
            f"it is not clear where {type(transformer).__name__} drops out attention",
            where="training.attention_dropout",
            hint="Leave it null.",
        )


def set_training_mode(model: SentenceTransformer, *, dropout: bool) -> None:
    """Put the model into training mode, with or without its dropout.

    transformers computes a layer again only if the layer is in training mode: without dropout the layers are, and
    their parts are not, which is where dropout is drawn.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(dropout)
    if not dropout:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = True


def compile_transformer(model: SentenceTransformer) -> None:
    """Compile the transformer's layers in place, for any length; names of parameters and the saved model do not change.

    Layer by layer, since sentence-transformers calls the transformer's ``forward`` and so passes by what
    ``Module.compile`` of the whole would set, and since layers alike are compiled once. Dropout is drawn by torch's own
    generator as without compiling, so that the two passes of gradient caching and a resumed run draw the same.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    transformer = transformer_of(model, "compile")
    layers = [module for module in transformer.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInputError(f"{type(transformer).__name__} has no layers to compile", where="training.compile")
    for layer in layers:
        layer.compile(dynamic=True, options={"fallback_random": True})
    logger.info("%d layers are compiled at their first forward, which takes up to some minutes", len(layers))
