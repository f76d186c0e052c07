"""Subclass-balancing contrastive learning (SBCL, arXiv 2306.15925) of long-tailed labels.

Large classes are cut into subclasses of the small ones' size, and both levels are contrasted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nearfield.arrays import Vectors
from nearfield.config import NotNegative, Positive
from nearfield.methods.hiprbert import SEPARATOR, Tree
from nearfield.mining.approximate import spherical_kmeans
from nearfield.objectives.batch import ContrastiveBatch, in_tiles
from nearfield.objectives.config import Names, ObjectiveSettings, Surroundings
from nearfield.objectives.diagnostics import probe_accuracy
from nearfield.objectives.losses import LabelledTextLoss, labelled_views


class SBCLConfig(ObjectiveSettings):
    """Subclass-balancing contrastive learning (arXiv 2306.15925) of labels that are ``class/subclass``; each text is encoded
    twice with other dropout."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    views: ClassVar[int] = 2
    kind: Literal["sbcl"] = "sbcl"
    temperature: Positive = 0.1
    """Cosines of the fine part are divided by it, and those of the coarse part on average."""
    base_temperature: Positive = 0.07
    """The fine part counts temperature / base_temperature."""
    gamma: NotNegative = 0.25
    """The weight of the coarse part."""
    class_temperatures: bool = True
    """Whether the coarse part has a temperature for each class, by how wide it lies."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SBCL:
        return SBCL(self, Tree.around(around))


def subclass_counts(counts: Sequence[int], smallest: int = 10) -> list[int]:
    """Texts of each class -> subclasses of each: of the size of the smallest class, but of at least ``smallest`` texts."""
    size = max(min(counts), smallest)
    return [max(1, count // size) for count in counts]


def split_classes(vectors: Vectors, labels: Sequence[str], *, smallest: int = 10, seed: int = 0) -> list[str]:
    """(n, d) unit vectors and n labels -> ``label/number``, by k-means within each class; a class of one subclass keeps
    its name. For the label column of a data set, from a model that has learnt a little: then a stage follows it."""
    names, number = np.unique(np.asarray(labels), return_inverse=True)
    subclasses = [""] * len(labels)
    for row, count in enumerate(subclass_counts(np.bincount(number).tolist(), smallest)):
        members = np.flatnonzero(number == row)
        name = str(names[row])
        which = spherical_kmeans(vectors[members], count, seed=seed).labels if count > 1 else np.zeros(len(members))
        for place, cluster in zip(members.tolist(), which.tolist(), strict=True):
            subclasses[place] = f"{name}{SEPARATOR}{int(cluster)}" if count > 1 else name
    return subclasses


class SBCL(LabelledTextLoss):
    """Of a view of a text with the label ``class/subclass``: (temperature / base) x fine + gamma x coarse.

    Fine: the mean over the other texts of its subclass of -log softmax among all others. Coarse: the mean over texts of other
    subclasses of its class, and its own other view, of -log softmax among what lies outside its subclass and that view, at a
    temperature of the class.
    """

    views = True

    def __init__(self, config: SBCLConfig, tree: Tree) -> None:
        super().__init__()
        self.config, self.parents = config, tree.parents()

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        unit = functional.normalize(vectors, dim=1)
        config, count = self.config, len(unit)
        classes = torch.unique(self.parents.to(labels.device)[labels], return_inverse=True)[1]
        temperatures = self.temperatures(unit.detach(), labels, classes)
        numbers = torch.arange(count, device=unit.device)

        def part(some: Tensor) -> Tensor:
            cosine = unit[some] @ unit.T
            itself = some[:, None] == numbers[None, :]
            view = ((some + count // 2) % count)[:, None] == numbers[None, :]
            same = labels[some][:, None] == labels[None, :]
            fine = _mean_log(cosine / config.temperature, same & ~itself, ~itself)
            positive = ((classes[some][:, None] == classes[None, :]) & ~same) | view
            coarse = _mean_log(cosine / temperatures[some][:, None], positive, ~same | view)
            return config.temperature / config.base_temperature * fine + config.gamma * coarse

        return in_tiles(part, anchors, count, unit)

    def temperatures(self, unit: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """(n,) of each text's class: by how wide the batch's members lie around their centre, so that the mean is the
        temperature; a class of one subclass keeps it."""
        config, several = self.config, int(classes.max()) + 1 if len(classes) else 0
        values = unit.new_full((len(unit),), config.temperature)
        if not config.class_temperatures or not several:
            return values
        size = torch.bincount(classes, minlength=several)
        centre = unit.new_zeros(several, unit.shape[1]).index_add(0, classes, unit) / size[:, None]
        apart = torch.linalg.vector_norm(unit - centre[classes], dim=1)
        phi = unit.new_zeros(several).index_add(0, classes, apart) / size / (size + 10).to(unit.dtype).log()
        low, high = torch.quantile(phi, phi.new_tensor([0.2, 0.8])).tolist()
        phi = phi.clamp(low, high)
        subclasses = torch.bincount(classes[_first_of(labels)], minlength=several)
        scaled = config.temperature * phi / phi.mean().clamp_min(1e-12)
        return torch.where(subclasses > 1, scaled.clamp_min(1e-3), config.temperature)[classes]

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """``subclass_probe``: how well a linear map tells a class's subclasses apart, over classes that have several."""
        texts, labels, _ = labelled_views(batch)
        vectors = torch.cat([batch.queries, batch.documents])[texts].double()
        classes = self.parents.to(labels.device)[labels]
        each = [
            probe_accuracy(vectors[classes == one], labels[classes == one], batch.draw) for one in torch.unique(classes)
        ]
        known = [value for value in each if not math.isnan(value)]
        return {"subclass_probe": sum(known) / len(known)} if known else {}


def _mean_log(logits: Tensor, positive: Tensor, candidate: Tensor) -> Tensor:
    """The mean over a row's positives of -log softmax among its candidates; 0 where it has none."""
    log = logits.masked_fill(~candidate, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
    losses: Tensor = -torch.where(positive, log, 0).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    return losses


def _first_of(values: Tensor) -> Tensor:
    """(m,) where each distinct value first stands."""
    _, number = torch.unique(values, return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(values), dtype=torch.int64, device=values.device)
    return first.scatter_reduce(0, number, torch.arange(len(values), device=values.device), "amin")
