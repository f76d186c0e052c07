"""Small cases with all that makes batches hard: ragged texts, several positives, explicit negatives, shared texts; the
objectives that are checked, and steps as the trainer makes them.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.arrays import Floats, Ragged, Rows
from nearfield.batching.plan import Batch
from nearfield.batching.planner import VectorsOf
from nearfield.conformance.tiny_models import WORDS, save_tiny_bert, save_tiny_clip, save_tiny_vlm
from nearfield.data.tokens import IMAGE, TokenCache, TokenTable
from nearfield.encoders.config import EncoderConfig, ImageTowerConfig, LoRAConfig
from nearfield.encoders.images import row_ids
from nearfield.encoders.load import build_encoder
from nearfield.encoders.packing import TokenTask
from nearfield.methods.carol import CAROLConfig
from nearfield.methods.cmim import CMIMConfig
from nearfield.methods.hiprbert import HiPrBERTConfig
from nearfield.methods.masked_tokens import DecoderConfig, MaskedTokensConfig
from nearfield.methods.mcse import MCSEConfig
from nearfield.methods.ntxent import NTXentConfig
from nearfield.methods.sbcl import SBCLConfig
from nearfield.methods.simlap import SimLAPConfig
from nearfield.methods.unicom import UnicomConfig
from nearfield.objectives.batch import ContrastiveBatch, MemoryQueue, Objective
from nearfield.objectives.config import (
    CombinedConfig,
    CoSENTConfig,
    EmbeddingDistillationConfig,
    FocalConfig,
    HardnessConfig,
    InfoNCEConfig,
    MatryoshkaConfig,
    MixingConfig,
    ObjectiveSettings,
    PartConfig,
    ScoreDistillationConfig,
    ScoreMaskConfig,
    SigLIPConfig,
    SimCSEConfig,
    SpreadConfig,
    SupConConfig,
    Surroundings,
    TripletConfig,
)
from nearfield.provenance import derive_seed
from nearfield.training.backends.replicated import Backend, ReplicatedBackend
from nearfield.training.chunks import Cut, LoadImages, TeacherScores, TrainingData, Work, contrastive_batch
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import EmbeddingModule, Engine, build_engine
from nearfield.training.launch import Launch
from nearfield.training.step import StepResult, run_step

if TYPE_CHECKING:
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

    from nearfield.encoders.load import Dtype


SEVERAL = "infonce and cosent at once, each of its source"
VIEWS = "simcse of one source beside infonce of another"
WEIGHTED = "infonce, guide mask, examples with weights"
OBJECTIVES: dict[str, ObjectiveSettings] = {
    "infonce": InfoNCEConfig(temperature=0.1),
    "infonce, both directions": InfoNCEConfig(temperature=0.1, both_directions=True),
    "infonce, log-sum of positives": InfoNCEConfig(temperature=0.1, several_positives="log_sum"),
    "infonce, own documents only": InfoNCEConfig(temperature=0.1, in_batch_negatives=False),
    "infonce, learnt temperature": InfoNCEConfig(temperature=0.1, both_directions=True, learn_temperature=True),
    "infonce, four directions in tiles": InfoNCEConfig(
        temperature=0.1,
        directions=("query_document", "query_query", "document_query", "document_document"),
        implementation="blockwise",
    ),
    "infonce, score mask, hardness, focal": InfoNCEConfig(
        temperature=0.1,
        score_mask=ScoreMaskConfig(margin=0.3),
        hardness=HardnessConfig(alpha=2.0, detach=False),
        focal=FocalConfig(detach=False),
    ),
    "infonce, mixing, prefixes, spread": InfoNCEConfig(
        temperature=0.1,
        mixing=MixingConfig(),
        matryoshka=MatryoshkaConfig(dimensions=(8, 16)),
        spread=SpreadConfig(),
    ),
    "infonce, queue of earlier positives": InfoNCEConfig(temperature=0.1, queue=4),
    WEIGHTED: InfoNCEConfig(temperature=0.1, guide_mask=ScoreMaskConfig()),
    "cosent": CoSENTConfig(),
    "triplet": TripletConfig(margin=1.0),
    "supcon": SupConConfig(class_weights="inverse"),
    "siglip": SigLIPConfig(),
    "unicom, a part of prototypes and features": UnicomConfig(classes=0.8, features=0.5),
    "simcse": SimCSEConfig(),
    "ntxent": NTXentConfig(temperature=0.1),
    "masked tokens, with a decoder": MaskedTokensConfig(share=0.4, decoder=DecoderConfig(share=0.5, weight=0.7)),
    "masked next tokens beside infonce": CombinedConfig(
        parts=(
            PartConfig(objective=InfoNCEConfig(temperature=0.1)),
            PartConfig(objective=MaskedTokensConfig(predict="next", share=0.5), weight=0.3),
        )
    ),
    "sbcl, subclasses of labels": SBCLConfig(),
    "hiprbert, levels of labels": HiPrBERTConfig(),
    "simlap, gates of pairs of labels": SimLAPConfig(label_width=8, hidden=8, project=16, project_hidden=8),
    "carol, decoding and contrast": CAROLConfig(delete=0.0, inner=8),
    "cmim": CMIMConfig(inner=8),
    "mcse, texts and features of images": MCSEConfig(weight=0.5, projection=16),
    "distillation of scores, own and in batch": CombinedConfig(
        parts=(
            PartConfig(objective=ScoreDistillationConfig()),
            PartConfig(objective=ScoreDistillationConfig(loss="margin_mse")),
            PartConfig(objective=ScoreDistillationConfig(teacher="vectors", candidates="in_batch")),
        )
    ),
    "distillation of embeddings, projected": EmbeddingDistillationConfig(),
    VIEWS: CombinedConfig(
        parts=(
            PartConfig(objective=SimCSEConfig(temperature=0.1), sources=("a",)),
            PartConfig(objective=InfoNCEConfig(temperature=0.1), sources=("b",), weight=0.8),
        )
    ),
    SEVERAL: CombinedConfig(
        parts=(
            PartConfig(objective=InfoNCEConfig(temperature=0.1, learn_temperature=True), sources=("a",)),
            PartConfig(objective=CoSENTConfig(), sources=("b",), weight=0.8),
        )
    ),
}
"""Every shipped objective, with the options that change which cells of the logits count."""


CPU = torch.device("cpu")
TEXTS = 60
LONGEST = 20
GUIDE_WIDTH = 8


def memory_tokens(ids: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> TokenCache:
    """A token cache of one prompt that lives in memory."""
    cache = object.__new__(TokenCache)
    cache.tables = [TokenTable(np.arange(len(ids)), Ragged.from_lists(ids, np.int32), prompt="", prompt_length=0)]
    return cache


def random_tokens(seed: int = 0) -> TokenCache:
    """``TEXTS`` texts of 3 to ``LONGEST`` random tokens."""
    random = np.random.default_rng(seed)
    sizes = random.integers(3, LONGEST + 1, size=TEXTS)
    return memory_tokens([np.r_[2, random.integers(5, 200, size=size - 2), 3].astype(np.int32) for size in sizes])


def random_batch(queries: int, seed: int = 0) -> tuple[Batch, dict[int, Rows]]:
    """A batch of ``queries`` (at most 12) with one or two positives and up to two negatives each, and all known positives.

    The first query's text is the last one's positive as well, and a negative of another is known as a positive of it.
    """
    random = np.random.default_rng(seed)
    documents = iter(random.permutation(np.arange(queries, TEXTS)))
    positives = [np.array([next(documents) for _ in range(1 + row % 2)]) for row in range(queries)]
    negatives = [np.array([next(documents) for _ in range(row % 3)], dtype=np.int64) for row in range(queries)]
    if queries > 3:
        positives[-1] = np.array([0])
    zeros = np.zeros(queries, dtype=np.int64)
    known = {row: positives[row] for row in range(queries)}
    if queries > 5:
        known[0] = np.r_[positives[0], negatives[5][:1]]
    numbers = np.arange(queries)
    scores, labels = random.integers(0, 6, queries) / 5, numbers % 3
    batch = Batch(numbers, numbers, positives, negatives, zeros, zeros, 0, scores, labels)
    return batch, known


TINY_VISION: dict[str, int | float | bool | str | tuple[int, ...]] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "hidden_dropout_prob": 0.1,
}


def random_images(items: Rows) -> list[Image | None]:
    """For each item its image, of a size of its own."""
    import PIL.Image

    random = [np.random.default_rng(int(item)) for item in items]
    return [PIL.Image.fromarray(r.integers(0, 256, (*r.integers(9, 40, 2), 3), dtype=np.uint8)) for r in random]


def mixed_images(items: Rows) -> list[Image | None]:
    """The same for items of which every third is a text alone."""
    return [image if item % 3 else None for item, image in zip(items.tolist(), random_images(items), strict=True)]


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD: a step of rate 1 subtracts the gradient. Each step sets its rate."""
    return torch.optim.SGD(parameters, lr=1.0)


SEED, STEP = 5, 3


@functools.cache
def _built(config: str, dtype: Dtype) -> SentenceTransformer:
    return build_encoder(EncoderConfig.model_validate_json(config), "cpu", dtype=dtype).model


@dataclass
class Case:
    """A tiny encoder, an objective, and a batch."""

    model_folder: Path
    objective: ObjectiveSettings
    batch: Batch
    known: dict[int, Rows]
    tokens: TokenCache
    dtype: torch.dtype = torch.float64
    weights: Floats | None = None
    """The weight of each example; none where all count alike."""
    towers: bool = False
    """Whether every item whose number is odd is an image, for a tower of its own."""
    adapter: bool = False
    """Whether an adapter is trained in place of the transformer's own weights."""
    rounded: bool = False
    """Whether weights are those that bfloat16 has."""
    clip: bool = False
    """Whether the towers are those of a CLIP folder, one module with a scalar parameter."""
    together: bool = False
    """Whether items are texts, images, or both, all for one transformer."""
    device: torch.device = CPU
    """Where engines run; the reference is always computed on the CPU."""
    precision: str = "fp32"
    """``training.precision`` of engines."""
    ranks: int = 2
    """The ranks that the batch was cut for: recorded, so that any number of them compute the same chunks."""
    apart: bool = False
    """Whether texts share no chunk with images that go through the same transformer."""

    @classmethod
    def make(
        cls,
        objective: ObjectiveSettings,
        queries: int = 8,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Case:
        """The case with a tiny BERT that has dropout, saved to ``folder`` or to a temporary one."""
        folder = folder or save_tiny_bert(Path(tempfile.mkdtemp(prefix="nearfield-conformance-")) / "model")
        batch, known = random_batch(queries)
        return cls(folder, objective, batch, known, random_tokens(), dtype)

    def encoder(self) -> SentenceTransformer:
        """The encoder, new: a copy of one that is read once, as hundreds of engines are made from a few models."""
        image_tower = self.towers and not self.clip
        tower = ImageTowerConfig(architecture="vit", settings=TINY_VISION, size=16) if image_tower else None
        last = "last" if self.together else None
        adapter = LoRAConfig(r=4, alpha=8) if self.adapter else None
        config = EncoderConfig(model=str(self.model_folder), image_tower=tower, pooling=last, adapter=adapter)
        pure = self.precision == "bf16-pure"
        model = copy.deepcopy(_built(config.model_dump_json(), "bfloat16" if pure else "float32"))
        if pure:
            return model
        return (model.bfloat16() if self.rounded else model).to(self.dtype)

    def with_images(self) -> Case:
        """The same with images for every other item: as queries, positives and negatives."""
        table = self.tokens.tables[0]
        rows = [table.of(item) for item in range(TEXTS)]
        image = np.full(16, IMAGE, dtype=np.int32)
        return replace(self, tokens=memory_tokens([image if n % 2 else row for n, row in enumerate(rows)]), towers=True)

    def in_clip(self) -> Case:
        """The same images and texts for the towers of a tiny CLIP folder."""
        folder = save_tiny_clip(Path(tempfile.mkdtemp(prefix="nearfield-conformance-")) / "model")
        return replace(self.with_images(), model_folder=folder, clip=True)

    def in_vision_language_model(self, architecture: str = "qwen2_vl") -> Case:
        """The same with a tiny model of an architecture that reads both in one, and texts, images and items of both."""
        folder = save_tiny_vlm(Path(tempfile.mkdtemp(prefix="nearfield-conformance-")) / "model", architecture)
        case = replace(self, model_folder=folder, together=True)
        table, items = self.tokens.tables[0], np.arange(TEXTS)
        texts = [" ".join(WORDS[token] for token in table.of(item)[1:-1]) for item in items.tolist()]
        shown = mixed_images(items)
        sizes = [None if image is None else image.size for image in shown]
        rows = row_ids(case.encoder(), ["" if n % 3 == 1 else text for n, text in enumerate(texts)], sizes, "")
        return replace(case, tokens=memory_tokens(rows))

    @property
    def images(self) -> LoadImages | None:
        """Random images of several sizes, where the case has some."""
        if self.together:
            return mixed_images
        return random_images if self.towers else None

    def engine(
        self,
        launch: Launch,
        backend: str,
        *,
        dropout: bool,
        packing: str = "never",
        max_norm: float | None = None,
        exchange: str = "gather",
        optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] = sgd,
    ) -> Engine:
        """A new engine; its optimiser is plain SGD, so that a step shows the gradient, unless another is given."""
        config = TrainingConfig.model_validate(
            {
                "backend": backend,
                "dropout": dropout,
                "packing": packing,
                "precision": self.precision,
                "device": self.device.type,
                "max_gradient_norm": max_norm,
                "exchange": exchange,
            }
        )
        encoder, objective = self.encoder(), self.build()

        def make_optimizer(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            return optimizer([parameter for _, parameter in named])

        engine = build_engine(config, encoder, objective, make_optimizer, self.data(encoder), self.device, launch)
        if engine.queue is not None:
            self.fill(engine.queue)
        return engine

    def data(self, encoder: SentenceTransformer) -> TrainingData:
        """The batch's items and examples."""
        return TrainingData(
            self.tokens,
            known_positives=self.known.__getitem__,
            guide=self.guide,
            weights=self.weights,
            teacher_scores=self.teacher_scores,
            readings=dict(enumerate(self.objective.readings(dict.fromkeys("ab", "retrieval")).values())),
            token_task=self.token_task(encoder),
            images=self.images,
        )

    def token_task(self, encoder: SentenceTransformer) -> TokenTask | None:
        """The task that hides tokens, where the objective asks for one."""
        make = self.objective.token_task
        return None if make is None else make(encoder, str(self.model_folder), SEED).to(self.dtype)

    def fill(self, queue: MemoryQueue) -> MemoryQueue:
        """Let a queue remember random vectors of some texts, one of which a query has as a positive."""
        rows = torch.arange(6)
        random = torch.Generator().manual_seed(2)
        vectors = torch.randn(6, 32, generator=random, dtype=torch.float64).to(self.dtype)
        ids = torch.from_numpy(np.r_[self.batch.positives[1][:1], 1:6])
        queue.push(ContrastiveBatch(vectors, vectors, rows, rows >= 0, ids, ids[:, None]))
        return queue

    def build(self) -> Objective:
        """The objective, new; even rows are of the source "a", odd ones of "b"."""
        names = [("a", f"{n // 2}/{n % 2}") for n in range(5)]
        around = Surroundings(width=32, guide_width=GUIDE_WIDTH, labels=5, label_names=names, vocabulary=256)
        return self.objective.build(("a", "b"), around).to(self.dtype)

    @property
    def teacher_scores(self) -> TeacherScores | None:
        """Random scores of each row's documents, where the objective learns from some."""
        if not self.objective.needs_teacher_scores:
            return None
        random = np.random.default_rng(2)
        sides = [Ragged.from_lists(side) for side in (self.batch.positives, self.batch.negatives)]
        scores = [random.standard_normal(len(side.values)) for side in sides]
        return TeacherScores(self.batch.example, sides[0], scores[0], sides[1], scores[1])

    @property
    def guide(self) -> VectorsOf | None:
        """Random vectors of each text in each role, where the objective wants some."""
        if not self.objective.needs_guide:
            return None
        random = np.random.default_rng(1)
        vectors = {
            role: random.standard_normal((TEXTS, GUIDE_WIDTH)).astype(np.float32) for role in ("query", "document")
        }
        return lambda role, rows: vectors[role][rows]

    def work(self, engine: Engine, budget: int) -> Work:
        """The batch cut and dealt."""
        return engine.work(self.batch, Cut(budget, self.ranks, self.apart))[0]

    def gradient(
        self, engine: Engine, work: Work, *, keep_graph: bool, seed: int = SEED, step: int = STEP, watch: bool = False
    ) -> tuple[StepResult, dict[str, Tensor]]:
        """One step's loss and its gradient, summed over ranks."""
        engine.backend.begin()
        result = run_step(
            engine,
            work,
            seed=seed,
            step=step,
            keep_graph=keep_graph,
            watch=watch,
        )
        return result, engine.backend.gradients()

    def reference(self) -> tuple[float, dict[str, Tensor]]:
        """Mean loss and gradient of one padded forward over the whole pool and one backward: no chunk, no rank."""
        encoder = self.encoder().eval()
        objective = self.build()
        size = self.objective.queue if isinstance(self.objective, InfoNCEConfig) else 0
        data = self.data(encoder)
        module = EmbeddingModule(encoder, objective, data.token_task)
        engine = Engine(
            ReplicatedBackend(module, lambda named: sgd([p for _, p in named]), CPU, 1, False),
            encoder,
            objective,
            Launch(),
            data,
            None,
            False,
            encoder.get_embedding_dimension(),
            TrainingConfig(),
            queue=self.fill(MemoryQueue(size)) if size else None,
        )
        work = self.work(engine, 10**9)
        images = engine.images(work.pool)
        apart = np.zeros(len(work.pool.items), dtype=bool) if images is None else images
        parts = [part for part in (np.flatnonzero(~apart), np.flatnonzero(apart)) if len(part)]
        features = engine.make_features(work.pool, SEED, STEP)
        encoded = torch.cat([module(features(part)) for part in parts])
        embeddings = encoded[torch.from_numpy(np.argsort(np.concatenate(parts)))]
        draw = derive_seed(SEED, "objective", STEP, work.first_number)
        loss = objective(
            contrastive_batch(work.pool, embeddings, work.known_positives, None, draw, work.guide, work.queue)
        )
        mean = loss.total / loss.denominator
        mean.backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        return float(mean.detach()), gradients


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest absolute difference of two gradients, relative to the largest entry; infinite if names differ.

    A parameter that has no gradient on one side counts as zero there.
    """
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    worst = 0.0
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            there = a if a is not None else b
            assert there is not None
            worst = max(worst, float(there.abs().max()))
        elif a.shape != b.shape:
            return float("inf")
        else:
            worst = max(worst, float((a.double().cpu() - b.double().cpu()).abs().max()))
    return worst / scale


def whole(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def one_step(
    engine: Engine, case: Case, budget: int, *, step: int, max_norm: float | None = None, rate: float = 1.0
) -> float:
    """A step as the loop makes it; returns the gradient's norm."""
    engine.backend.begin()
    work = case.work(engine, budget)
    result = run_step(
        engine,
        work,
        seed=5,
        step=step,
        keep_graph=False,
    )
    rates = [rate] * len(engine.backend.optimizer.param_groups)
    return engine.backend.update(rates, max_norm, result.word.used)


def next_loss(engine: Engine, case: Case, step: int) -> float:
    """The loss of one more step, without taking it."""
    return case.gradient(engine, case.work(engine, 60), keep_graph=True, step=step)[0].loss


def count_differences(one: Backend, other: Backend) -> float:
    """Tensors of the model and of the optimiser that differ in at least one bit; *collective*."""
    count = 0
    for tensors in (Backend.model_tensors, Backend.optimizer_tensors):
        name = tensors.__name__
        a, b = whole(getattr(one, name)()), whole(getattr(other, name)())
        count += len(a.keys() ^ b.keys())
        count += sum(not torch.equal(a[key], b[key]) for key in a.keys() & b.keys())
    return float(count)


def decoupled_adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in two groups, as recipes have it."""
    big = [p for p in parameters if p.ndim >= 2]
    small = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW([{"params": big, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}], lr=1.0)
