"""HiPrBERT (arXiv 2307.00266), in a working form of ours: labels are paths in a tree, ``animal/dog/poodle``.

The paper does not state its exact loss; here it is a multi-similarity loss for each level of the tree, given below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from nearfield.config import NotNegative, Positive
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, in_tiles
from nearfield.objectives.config import Names, ObjectiveSettings, Surroundings
from nearfield.objectives.losses import LabelledTextLoss


class HiPrBERTConfig(ObjectiveSettings):
    """Similarity by distance in a tree of labels, whose paths the data give (``animal/dog/poodle``); a working form of ours of
    HiPrBERT (arXiv 2307.00266)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["hiprbert"] = "hiprbert"
    thresholds: Annotated[tuple[float, ...], Field(min_length=1)] = (0.7, 0.5, 0.3)
    """The similarity that separates levels 0 (the same label), 1 (siblings), 2 (cousins) ...: pairs at most so far apart are to
    be above it, all others below."""
    weights: tuple[NotNegative, ...] | None = None
    """The weight of each level; null counts each 1."""
    alpha: Positive = 2.0
    """How steeply positives below a threshold are pulled; higher looks at the farthest alone."""
    beta: Positive = 50.0
    """How steeply negatives above a threshold are pushed; higher looks at the nearest alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> HiPrBERTConfig:
        if self.weights is not None and len(self.weights) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds have {len(self.weights)} weights")
        if any(a <= b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError("thresholds must fall from level to level, or the tree collapses")
        return self

    def build(self, sources: Names = (), around: Surroundings | None = None) -> HiPrBERT:
        return HiPrBERT(self, Tree.around(around))


SEPARATOR = "/"


@dataclass(frozen=True)
class Tree:
    """The labels of a data set by their number."""

    ancestors: Tensor
    """(C, D) int64: the number of the first k + 1 parts of each label's path; a number of its own where that is shorter."""
    depth: Tensor
    """(C,) int64 parts of the path."""

    @classmethod
    def of(cls, labels: Sequence[tuple[str, str]], count: int = 0) -> Tree:
        """(source, path) of each label; without them ``count`` labels that have nothing in common."""
        paths = [(source, *path.split(SEPARATOR)) for source, path in labels] or [(str(n),) for n in range(count)]
        # Labels of one source share at least the source; a label without a path shares nothing with others.
        depth = max((len(path) for path in paths), default=1)
        number: dict[tuple[str, ...], int] = {}
        table = torch.full((len(paths), depth), -1, dtype=torch.int64)
        for row, path in enumerate(paths):
            for level in range(depth):
                key = path[: level + 1] if level < len(path) else ("", str(row), str(level))
                table[row, level] = number.setdefault(key, len(number))
        return cls(table, torch.tensor([len(path) for path in paths], dtype=torch.int64))

    @classmethod
    def around(cls, around: Surroundings | None) -> Tree:
        """The tree of the labels of a run's data."""
        if around is None or not around.labels:
            raise BadInputError("this objective wants to know the labels of the data", where="objective")
        return cls.of(around.label_names, around.labels)

    def parents(self) -> Tensor:
        """(C,) the number of each label's path without its last part; of a path of one part, itself."""
        sources = 1 if self.ancestors.shape[1] > 1 else 0
        level = (self.depth - 2).clamp_min(sources).minimum(self.depth - 1)
        return self.ancestors.gather(1, level[:, None]).squeeze(1)

    def distance(self, left: Tensor, right: Tensor) -> Tensor:
        """(a,) and (b,) labels -> (a, b) levels from the deeper of two labels up to what they have in common."""
        ancestors, depth = self.ancestors.to(left.device), self.depth.to(left.device)
        common = sum((one[left][:, None] == one[right][None, :]).to(torch.int64) for one in ancestors.unbind(dim=1))
        return (torch.maximum(depth[left][:, None], depth[right][None, :]) - common).clamp_min(0)


class HiPrBERT(LabelledTextLoss):
    """The sum over levels l of weight x multi-similarity (Wang et al. 2019, arXiv 1904.06627) with texts at most l apart as
    positives, all others as negatives, and a threshold of the level's own:

    ``log(1 + sum exp(-alpha (s - threshold))) / alpha`` over positives ``+ log(1 + sum exp(beta (s - threshold))) / beta``
    over negatives. Level 0 are texts of the same label, level 1 siblings, level 2 cousins; an ancestor is as far as the
    levels between.
    """

    def __init__(self, config: HiPrBERTConfig, tree: Tree) -> None:
        super().__init__()
        self.config, self.tree = config, tree

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        unit = functional.normalize(vectors, dim=1)
        config, numbers = self.config, torch.arange(len(unit), device=unit.device)
        weights = config.weights or (1.0,) * len(config.thresholds)

        def part(some: Tensor) -> Tensor:
            cosine = unit[some] @ unit.T
            distance = self.tree.distance(labels[some], labels)
            itself = some[:, None] == numbers[None, :]
            total = cosine.new_zeros(len(some))
            for level, (threshold, weight) in enumerate(zip(config.thresholds, weights, strict=True)):
                positive = (distance <= level) & ~itself
                total = total + weight * _soft(-config.alpha * (cosine - threshold), positive) / config.alpha
                total = total + weight * _soft(config.beta * (cosine - threshold), distance > level) / config.beta
            return total

        return in_tiles(part, anchors, len(unit), unit)


def _soft(logits: Tensor, which: Tensor) -> Tensor:
    """log(1 + sum of the exponentials of the cells that count), a row."""
    lowest = torch.finfo(logits.dtype).min / 2
    summed = logits.masked_fill(~which, lowest)
    return torch.cat([summed, summed.new_zeros(len(summed), 1)], dim=1).logsumexp(dim=1)
