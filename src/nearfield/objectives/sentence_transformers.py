"""The contrastive objective as losses of sentence-transformers, plain and gradient-cached.

    trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=InfoNCELoss(model))

Columns are a query, its positive, and any number of explicit negatives, as for ``MultipleNegativesRankingLoss``, which it
equals at neutral settings. Texts that are equal after tokenisation have the same id, so that a copy of a query's positive is
not its negative.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, MemoryQueue
from nearfield.objectives.config import InfoNCEConfig
from nearfield.provenance import derive_seed

Features = dict[str, Tensor]


class InfoNCELoss(nn.Module):
    """The objective of the settings, by default InfoNCE at a temperature of 0.05 with known positives masked.

    With ``gather_across_devices`` the documents of all devices are candidates; each must have as many rows. ``guide`` embeds
    the texts, as the model's tokenizer reads them back, for a ``guide_mask``. The draws of mixing follow ``seed`` and the number
    of calls, which starts at 0 again when a trainer resumes; so does a queue.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        config: InfoNCEConfig | None = None,
        *,
        gather_across_devices: bool = False,
        guide: SentenceTransformer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config or InfoNCEConfig()
        self.gather_across_devices = gather_across_devices
        self.seed = seed
        self.calls = 0
        if self.config.names_sources:
            raise BadInputError("columns of a data set have no sources: remove tasks and source_weights")
        if self.config.needs_guide and guide is None:
            raise BadInputError("guide_mask wants a guide model", hint="Give guide=SentenceTransformer(...).")
        self.objective = self.config.build()
        self.queue = MemoryQueue(self.config.queue)
        # In a tuple, so that its parameters are not those of the loss.
        self._guide = (guide,)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The mean loss over this device's rows."""
        features = list(sentence_features)
        known = self._know(features)
        return self._loss(embed_columns(self.model, features), labels, *known)

    def _know(self, features: list[Features]) -> tuple[list[Tensor | None], list[Tensor] | None]:
        """Ids of each column's texts, and what the guide makes of them; before anything changes the features."""
        if len(features) < 2:
            raise BadInputError(f"a query and a positive are wanted, and there are {len(features)} columns")
        ids = [text_ids(column) for column in features]
        guide = self._guide[0]
        if guide is None or not self.config.needs_guide:
            return ids, None
        with torch.no_grad():
            return ids, [self._guided(guide, column) for column in features]

    def _guided(self, guide: SentenceTransformer, column: Features) -> Tensor:
        texts = self.model.tokenizer.batch_decode(column["input_ids"], skip_special_tokens=True)
        vectors = guide.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        embeddings: Tensor = vectors.clone().to(column["input_ids"].device)
        return embeddings

    def _loss(
        self, columns: list[Tensor], labels: Tensor | None, ids: list[Tensor | None], guided: list[Tensor] | None
    ) -> Tensor:
        size, device, rank, world = len(columns[0]), columns[0].device, 0, 1
        if self.gather_across_devices:
            rank = get_rank()
            columns = [all_gather_with_grad(column) for column in columns]
            world = len(columns[0]) // size
            ids = [None if column is None else all_gather(column) for column in ids]
            guided = None if guided is None else [all_gather(column) for column in guided]
            labels = all_gather(labels) if labels is not None and self.config.mask_same_label else labels
        count = len(columns[0])
        owner = torch.arange(count, device=device).repeat(len(columns) - 1)
        documents = torch.cat(columns[1:])
        known_ids = [column for column in ids[1:] if column is not None]
        document_ids = (
            torch.cat(known_ids) if len(known_ids) == len(ids) - 1 else torch.arange(len(documents), device=device)
        )
        self.calls += 1
        batch = ContrastiveBatch(
            queries=columns[0],
            documents=documents,
            owner=owner,
            is_positive=torch.arange(len(documents), device=device) < count,
            document_ids=document_ids,
            known_positives=_known_positives(ids[0], document_ids[:count]),
            rows=torch.arange(rank * size, (rank + 1) * size, device=device),
            query_ids=ids[0],
            labels=labels if self.config.mask_same_label else None,
            guide_queries=None if guided is None else guided[0],
            guide_documents=None if guided is None else torch.cat(guided[1:]),
            queue=self.queue.queued(),
            draw=derive_seed(self.seed, "objective", self.calls),
        )
        loss = self.objective(batch)
        if self.training and torch.is_grad_enabled():
            self.queue.push(batch)
        # Trainers average the gradients of devices.
        mean: Tensor = loss.total * (world / loss.denominator)
        return mean

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return self.config.model_dump(mode="json", exclude_defaults=True) | {
            "temperature": self.config.temperature,
            "gather_across_devices": self.gather_across_devices,
        }


class CachedInfoNCELoss(CachedLossMixin, InfoNCELoss):  # type: ignore[misc]
    """The same with gradient caching (arXiv 2101.06983): texts are encoded ``mini_batch_size`` at a time."""

    def __init__(
        self,
        model: SentenceTransformer,
        config: InfoNCEConfig | None = None,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        guide: SentenceTransformer | None = None,
        seed: int = 0,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(model, config, gather_across_devices=gather_across_devices, guide=guide, seed=seed)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._known: tuple[list[Tensor | None], list[Tensor] | None] = ([], None)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The mean loss over this device's rows."""
        features = list(sentence_features)
        self._known = self._know(features)
        loss: Tensor = self.forward_cached(features, labels)  # type: ignore[operator]
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss from the embeddings of each column's mini-batches."""
        loss = self._loss([torch.cat(column) for column in reps], labels, *self._known)
        if with_backward:
            torch.autograd.backward(loss)
            loss = loss.detach()
        return loss


def text_ids(features: Features) -> Tensor | None:
    """(n,) int64: a hash of each row's tokens, whatever they are padded to; none where inputs are no padded tokens."""
    tokens, mask = features.get("input_ids"), features.get("attention_mask")
    if tokens is None or mask is None or tokens.dim() != 2 or tokens.shape != mask.shape:
        return None
    hashes = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    for token, there in zip(tokens.long().unbind(dim=1), mask.bool().unbind(dim=1), strict=True):
        # Integers wrap around by design.
        mixed = (hashes ^ (token + 1)) * 6364136223846793005 + 1442695040888963407
        hashes = torch.where(there, mixed ^ ((mixed >> 29) & 0x7FFFFFFFF), hashes)
    return hashes & 0x7FFFFFFFFFFFFFFF


def _known_positives(queries: Tensor | None, positives: Tensor) -> Tensor:
    """(Q, K) ids of the positives of each query, those of equal queries together, padded with -1."""
    if queries is None:
        return positives[:, None]
    _, query, size = torch.unique(queries, return_inverse=True, return_counts=True)
    order = torch.argsort(query, stable=True)
    number = torch.arange(len(query), device=query.device) - (size.cumsum(0) - size)[query[order]]
    table = torch.full((len(size), int(size.max())), -1, dtype=torch.int64, device=query.device)
    table[query[order], number] = positives[order]
    return table[query]
