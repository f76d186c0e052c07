"""Figures that show how the learning goes, from the embeddings that the loss has seen anyway.

All are of the global batch, the same on any number of ranks. Of a large batch a seeded sample of rows is looked at, and
of these all documents: at most ``CELLS`` similarities, never a whole matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nearfield.objectives.batch import ContrastiveBatch, Objective, accumulation_dtype
from nearfield.objectives.statistics import Join
from nearfield.provenance import derive_seed

ROWS = 512
"""Queries, and texts of each side, that are looked at, at most."""

CELLS = 2**22
"""Similarities of queries with documents that are looked at, at most; but those of 16 queries always."""


def sample(count: int, most: int, seed: int | None, use: str) -> Tensor:
    """(n,) ascending numbers below ``count``: all, or a seeded draw of ``most``."""
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "watch", use))
    return torch.randperm(count, generator=generator)[:most].sort().values


def watched_rows(batch: ContrastiveBatch) -> Tensor:
    """The queries that are looked at."""
    most = min(ROWS, max(16, CELLS // max(1, len(batch.documents))))
    return sample(len(batch.queries), most, batch.draw, "rows").to(batch.queries.device)


@torch.no_grad()
def similarities(batch: ContrastiveBatch) -> dict[str, float]:
    """Mean cosine of queries with their positives, and with the hardest document that is no known positive of theirs."""
    if not len(batch.queries) or not len(batch.documents):
        return {}
    rows = watched_rows(batch)
    queries, documents = functional.normalize(batch.queries[rows], dim=1), functional.normalize(batch.documents, dim=1)
    cosine = queries @ documents.T
    positive = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
    figures = {"positive_similarity": cosine[positive].mean()}
    cosine.masked_fill_(positive, -torch.inf)
    known = Join(batch.known_positives[rows], batch.document_ids[:, None], tile=len(documents))
    cosine[known.cells(0, len(rows), 0)] = -torch.inf
    hardest = cosine.amax(dim=1)
    hardest = hardest[hardest > -torch.inf]
    if len(hardest):
        figures["hardest_negative_similarity"] = hardest.mean()
    return _floats(figures)


@torch.no_grad()
def watch(objective: Objective, batch: ContrastiveBatch) -> dict[str, float]:
    """All figures but :func:`similarities`; the objective adds its own. Of no rows there are none."""
    if not len(batch.queries) or not len(batch.documents):
        return {}
    with torch.autocast(batch.queries.device.type, enabled=False):
        alike = {**geometry(batch), **labels_seen(batch)} if objective.contrasts else {}
        return {**alike, **objective.watch(batch)}


def labels_seen(batch: ContrastiveBatch) -> dict[str, float]:
    """Of the watched queries: ``label_probe`` and ``source_probe``, how well a linear map finds their label and their source, and
    ``class_scatter``, the share of their spread that lies within labels."""
    rows = watched_rows(batch)
    vectors, figures = batch.queries[rows].double(), {}
    if batch.labels is not None:
        known = batch.labels[rows] >= 0
        labels = batch.labels[rows][known]
        figures = {
            "label_probe": probe_accuracy(vectors[known], labels, batch.draw),
            "class_scatter": class_scatter(vectors[known], labels),
        }
    if batch.sources is not None:
        figures["source_probe"] = probe_accuracy(vectors, batch.sources[rows], batch.draw)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def geometry(batch: ContrastiveBatch) -> dict[str, float]:
    """Alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242), and the effective rank (Roy and Vetterli 2007).

    Alignment is the mean squared distance of a query and its positive as unit vectors. Uniformity is the logarithm of
    the mean of exp(-2 x squared distance) over pairs of different queries, and of different documents; the mean of both.
    The effective rank of n texts of both sides is exp of the entropy of their normalised singular values, at most
    ``rank_limit``, the lesser of n and the dimension.
    """
    rows = watched_rows(batch)
    mine = torch.zeros(len(batch.queries), dtype=torch.bool, device=rows.device)
    mine[rows] = True
    pairs = (mine[batch.owner] & batch.is_positive).nonzero().squeeze(1)
    between = unit_vectors(batch.queries[batch.owner[pairs]]) - unit_vectors(batch.documents[pairs])
    figures = {"alignment": between.square().sum(dim=1).mean()}
    query_ids = batch.query_ids
    if query_ids is None:
        query_ids = torch.arange(len(batch.queries), device=rows.device)
    sides = [
        _distinct(batch.queries, query_ids, batch.draw),
        _distinct(batch.documents, batch.document_ids, batch.draw),
    ]
    spread = [_uniformity(side) for side in sides if len(side) > 1]
    if spread:
        figures["uniformity"] = torch.stack(spread).mean()
    both = torch.cat([side[: ROWS // 2] for side in sides])
    figures["effective_rank"] = effective_rank(both)
    return {**_floats(figures), "rank_limit": float(min(both.shape))}


def effective_rank(vectors: Tensor) -> Tensor:
    """(n, d) -> exp of the entropy of the singular values as shares of their sum."""
    # The smaller Gram matrix has their squares as eigenvalues, at a fraction of the price.
    vectors = vectors.double()
    gram = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    if not gram.isfinite().all():
        return gram.new_tensor(math.nan)
    shares = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = shares / shares.sum()
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank


def unit_vectors(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors.to(accumulation_dtype(vectors.dtype)), dim=1)


def _distinct(vectors: Tensor, ids: Tensor, seed: int | None) -> Tensor:
    """The unit vectors of at most ``ROWS`` different texts, in a drawn order."""
    order = torch.argsort(ids, stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = ids[order][1:] != ids[order][:-1]
    places = order[first].sort().values
    return unit_vectors(vectors[places[sample(len(places), ROWS, seed, "texts").to(places.device)]])


def _uniformity(vectors: Tensor) -> Tensor:
    count = len(vectors)
    distances = (2 - 2 * (vectors @ vectors.T)).clamp_min(0)
    pairs = torch.ones_like(distances, dtype=torch.bool).triu(1)
    return (-2 * distances[pairs]).logsumexp(0) - math.log(count * (count - 1) / 2)


def _floats(figures: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device."""
    values = torch.stack([value.double() for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


RIDGE = 1e-2


@torch.no_grad()
def probe_accuracy(vectors: Tensor, labels: Tensor, seed: int | None) -> float:
    """(n, d) embeddings and (n,) labels -> the share of texts whose label a ridge regression finds that was fit on the other half.

    The halves are drawn by the seed within each label. Labels of one text are left out; not a number where fewer than two
    are left.
    """
    names, number, count = torch.unique(labels, return_inverse=True, return_counts=True)
    keep = count[number] > 1
    if int((count > 1).sum()) < 2:
        return math.nan
    vectors, number = vectors[keep].double(), number[keep]
    generator = torch.Generator().manual_seed(derive_seed(seed or 0, "probe"))
    order = torch.randperm(len(vectors), generator=generator).to(number.device)
    order = order[torch.argsort(number[order], stable=True)]
    half = torch.empty(len(order), dtype=torch.int64, device=number.device)
    half[order] = torch.arange(len(order), device=number.device) % 2
    targets = torch.nn.functional.one_hot(number, len(names)).double()
    right = 0
    for one in (0, 1):
        fit, test = half == one, half != one
        centre, mean = vectors[fit].mean(dim=0), targets[fit].mean(dim=0)
        seen = vectors[fit] - centre
        gram = seen.T @ seen
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
        weights = torch.linalg.solve(gram, seen.T @ (targets[fit] - mean))
        right += int((((vectors[test] - centre) @ weights + mean).argmax(dim=1) == number[test]).sum())
    return right / len(vectors)


@torch.no_grad()
def class_scatter(vectors: Tensor, labels: Tensor) -> float:
    """Mean squared distance of embeddings to their label's centre, as a share of that to the common centre.

    1 where labels explain nothing, 0 where all texts of a label are one point. Not a number for fewer than two labels.
    """
    _, number, count = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(count) < 2:
        return math.nan
    vectors = vectors.double()
    centres = vectors.new_zeros(len(count), vectors.shape[1]).index_add(0, number, vectors) / count[:, None]
    within = (vectors - centres[number]).square().sum()
    return float(within / (vectors - vectors.mean(dim=0)).square().sum().clamp_min(1e-24))
