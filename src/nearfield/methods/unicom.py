"""Unicom: a softmax over learnt prototypes of the labels, of which each step takes a part (arXiv 2304.05884).

The paper's clusters of images stand as labels here; drawn are classes and features alike.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from nearfield.config import Positive
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, in_tiles
from nearfield.objectives.config import Names, ObjectiveSettings, Part, Surroundings
from nearfield.objectives.losses import LabelledTextLoss
from nearfield.provenance import derive_seed


class UnicomConfig(ObjectiveSettings):
    """A softmax over learnt prototypes of the labels, a part of them and of the features a step (Unicom, arXiv 2304.05884)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["unicom"] = "unicom"
    scale: Positive = 32.0
    """The factor of cosines."""
    margin: Annotated[float, Field(ge=0, lt=1.57)] = 0.3
    """By which the angle to the own prototype is widened, in radians."""
    classes: Part = 1.0
    """The share of the prototypes that a step takes; those of the batch always."""
    features: Part = 1.0
    """The share of the dimensions that a step compares."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> Unicom:
        around = around or Surroundings()
        if not around.labels or around.width is None:
            raise BadInputError("prototypes want labels, and the width of embeddings", where="objective")
        return Unicom(self, around.labels, around.width)


class Unicom(LabelledTextLoss):
    """Cross-entropy of scale x cos(angle to the prototype), the target's angle widened by a margin (ArcFace).

    A step takes the batch's classes and a drawn part of the others, and one drawn part of the features, the same for texts and
    prototypes, which are brought to unit length after that. Prototypes that were not taken have gradient 0.
    """

    def __init__(self, config: UnicomConfig, classes: int, width: int) -> None:
        super().__init__()
        self.config = config
        drawn = torch.randn(classes, width, generator=torch.Generator().manual_seed(derive_seed(0, "prototypes")))
        self.prototypes = nn.Parameter(drawn * 0.01)

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        taken, features = self.draw(labels, batch.draw)
        number = torch.full((len(self.prototypes),), -1, dtype=torch.int64, device=labels.device)
        number[taken] = torch.arange(len(taken), device=labels.device)

        def part(some: Tensor) -> Tensor:
            return self._softmax(vectors[some], number[labels[some]], taken, features)

        return in_tiles(part, anchors, len(taken), vectors)

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

    def _softmax(self, vectors: Tensor, target: Tensor, taken: Tensor, features: Tensor) -> Tensor:
        unit = functional.normalize(vectors[:, features], dim=1)
        prototypes = functional.normalize(self.prototypes[taken][:, features].to(vectors.dtype), dim=1)
        cosine = unit @ prototypes.T
        right = cosine.gather(1, target[:, None]).squeeze(1)
        logits = cosine.scatter(1, target[:, None], self._widened(right)[:, None]) * self.config.scale
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
