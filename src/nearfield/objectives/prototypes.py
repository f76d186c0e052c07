"""A softmax over learnt prototypes of classes, of which each step takes a part (Unicom, arXiv 2304.05884)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nearfield.objectives.batch import ContrastiveBatch, LossSum
from nearfield.objectives.objective import Objective
from nearfield.objectives.supervised import labelled_texts
from nearfield.objectives.vectors import accumulation_dtype, tiles
from nearfield.randomness import derive_seed

if TYPE_CHECKING:
    from nearfield.objectives.kinds import UnicomConfig

CELLS = 2**22
"""Logits that are held at once."""


class Unicom(Objective):
    """Cross-entropy of scale x cos(angle to the prototype), the target's angle widened by a margin (ArcFace).

    A step takes the batch's classes and a drawn part of the others, and one drawn part of the features, the same for texts and
    prototypes, which are brought to unit length after that. Prototypes that were not taken have gradient 0.
    """

    def __init__(self, config: UnicomConfig, classes: int, width: int) -> None:
        super().__init__()
        self.config = config
        drawn = torch.randn(classes, width, generator=torch.Generator().manual_seed(derive_seed(0, "prototypes")))
        self.prototypes = nn.Parameter(drawn * 0.01)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        texts, labels, owner = labelled_texts(batch)
        rows = batch.local_rows()
        place = batch.row_places()
        mine = place[owner] >= 0
        with torch.autocast(batch.queries.device.type, enabled=False):
            vectors = torch.cat([batch.queries, batch.documents])[texts[mine]]
            taken, features = self.draw(labels, batch.draw)
            number = torch.full((len(self.prototypes),), -1, dtype=torch.int64, device=labels.device)
            number[taken] = torch.arange(len(taken), device=labels.device)
            target = number[labels[mine]]
            found = [vectors.new_zeros(0)]
            for low, high in tiles(len(target), max(1, CELLS // len(taken))):
                # Kept is nothing of the size of the logits: the backward makes them again.
                found.append(
                    checkpoint(self._losses, vectors[low:high], target[low:high], taken, features, use_reentrant=False)
                )
            # Rows have different numbers of texts, and the caller divides by the rows.
            each = torch.cat(found) * (len(batch.queries) / max(1, len(texts)))
            losses = batch.weighed(each.new_zeros(len(rows)).index_add(0, place[owner[mine]], each))
        return LossSum(losses.sum() + self.prototypes.sum() * 0, batch.denominator(), losses.detach())

    def draw(self, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """The classes and the features of a step, ascending: the same on all processes."""
        generator = torch.Generator().manual_seed(derive_seed(seed or 0, "prototypes"))
        classes, width = self.prototypes.shape
        score = torch.rand(classes, generator=generator)
        present = torch.unique(labels.cpu()) if len(labels) else labels.cpu()
        score[present] = 2.0
        wanted = max(len(present), math.ceil(self.config.classes * classes), 1)
        taken = score.topk(wanted).indices.sort().values
        features = torch.randperm(width, generator=generator)[: math.ceil(self.config.features * width)].sort().values
        return taken.to(labels.device), features.to(labels.device)

    def _losses(self, vectors: Tensor, target: Tensor, taken: Tensor, features: Tensor) -> Tensor:
        dtype = accumulation_dtype(vectors.dtype)
        unit = functional.normalize(vectors[:, features].to(dtype), dim=1)
        prototypes = functional.normalize(self.prototypes[taken][:, features].to(dtype), dim=1)
        cosine = unit @ prototypes.T
        own = cosine.gather(1, target[:, None]).squeeze(1)
        logits = cosine.scatter(1, target[:, None], self._widened(own)[:, None]) * self.config.scale
        losses: Tensor = functional.cross_entropy(logits, target, reduction="none")
        return losses

    def _widened(self, cosine: Tensor) -> Tensor:
        """cos(angle + margin), and beyond a half turn its straight continuation, which still falls with the angle."""
        margin = self.config.margin
        if not margin:
            return cosine
        # By the identity: the slope of an arc cosine at 1 is infinite.
        sine = (1 - cosine.square()).clamp_min(1e-12).sqrt()
        widened = cosine * math.cos(margin) - sine * math.sin(margin)
        return torch.where(cosine > -math.cos(margin), widened, cosine - 1 + math.cos(margin))
