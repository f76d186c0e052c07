"""A memory of the positives of earlier steps, as further candidates (MoCo, arXiv 1911.05722; XBM, arXiv 1912.06798).

The objective itself remembers nothing: whoever takes the steps hands it what is queued, and queues what a step has seen. Every
process queues the positives of the whole batch, so that the number of processes does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nearfield.objectives.batch import ContrastiveBatch, Queued

_PREFIX = "queue."
_NONE = -1


class MemoryQueue:
    """The newest ``size`` positives, each in a place of its own: the oldest gives its place to the next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pushed = 0
        """How many ever were."""
        self._held: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.pushed, self.size)

    def queued(self) -> Queued | None:
        """The documents in the queue; none before the first step."""
        if not len(self):
            return None
        held = {name: tensor[: len(self)] for name, tensor in self._held.items()}
        return Queued(held["vectors"], held["ids"], held["labels"], held["sources"], held.get("guide"))

    def push(self, batch: ContrastiveBatch) -> None:
        """Remember the positives of a batch that a step was taken on."""
        positive = batch.is_positive.nonzero().squeeze(1)[-self.size :] if self.size else batch.is_positive[:0]
        if not len(positive):
            return
        owner = batch.owner[positive]
        nothing = torch.full_like(owner, _NONE)
        new = {
            "vectors": batch.documents.detach()[positive],
            "ids": batch.document_ids[positive],
            "labels": nothing if batch.labels is None else batch.labels[owner],
            "sources": nothing if batch.sources is None else batch.sources[owner],
        }
        if batch.guide_documents is not None:
            new["guide"] = batch.guide_documents[positive]
        places = (self.pushed + torch.arange(len(positive), device=owner.device)) % self.size
        for name, rows in new.items():
            if name not in self._held:
                self._held[name] = rows.new_zeros((self.size, *rows.shape[1:]))
            self._held[name][places] = rows
        self.pushed += len(positive)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state for a checkpoint."""
        if len(self):
            yield f"{_PREFIX}pushed", torch.tensor([self.pushed])
            yield from ((f"{_PREFIX}{name}", tensor) for name, tensor in self._held.items())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        queue_tensors = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        pushed = queue_tensors.pop("pushed", None)
        self.pushed = 0 if pushed is None else int(pushed)
        self._held = {name: tensor.clone() for name, tensor in queue_tensors.items()}
