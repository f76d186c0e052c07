"""The objective by loops over plain floats, written from its definition: no tensor, no tile, no shared code."""

from __future__ import annotations

import math

import numpy as np

from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.config import ScoreMaskConfig
from tests.objectives.options import SOURCES

Vector = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def similarity(a: Vector, b: Vector, cosine: bool) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) if cosine else float(a @ b)


def limit(positive: float, config: ScoreMaskConfig) -> float:
    moved = {
        "absolute": positive + config.margin,
        "relative": positive + config.margin * abs(positive),
        "cut": config.margin,
    }[config.rule]
    return moved + 1e-12


class Loops:
    """The loss of each query of a batch, without mixing."""

    def __init__(self, config: InfoNCEConfig, batch: ContrastiveBatch, width: int) -> None:
        self.config = config
        self.vectors = {
            "query": batch.queries.detach().numpy()[:, :width],
            "document": batch.documents.detach().numpy()[:, :width],
        }
        self.queue_ids: list[int] = []
        if batch.queue is not None:
            self.vectors["queue"] = batch.queue.vectors.numpy()[:, :width]
            assert batch.queue.guide is not None and batch.sources is not None
            self.queue_ids, self.queue_labels = batch.queue.ids.tolist(), batch.queue.labels.tolist()
            self.queue_sources, self.sources = batch.queue.sources.tolist(), batch.sources.tolist()
        assert batch.guide_queries is not None and batch.guide_documents is not None
        self.guide = {
            "query": batch.guide_queries.float().double().numpy(),
            "document": batch.guide_documents.float().double().numpy(),
        }
        if batch.queue is not None and batch.queue.guide is not None:
            self.guide["queue"] = batch.queue.guide.float().double().numpy()
        self.owner, self.positive = batch.owner.tolist(), batch.is_positive.tolist()
        self.ids = batch.document_ids.tolist()
        self.known = [set(row) - {-1} for row in batch.known_positives.tolist()]
        assert batch.query_ids is not None and batch.labels is not None
        self.query_ids, self.labels = batch.query_ids.tolist(), batch.labels.tolist()

    def score(self, a: tuple[str, int], b: tuple[str, int]) -> float:
        return similarity(self.vectors[a[0]][a[1]], self.vectors[b[0]][b[1]], self.config.similarity == "cosine")

    def guided(self, a: tuple[str, int], b: tuple[str, int]) -> float:
        return similarity(self.guide[a[0]][a[1]], self.guide[b[0]][b[1]], True)

    def label(self, node: tuple[str, int]) -> int:
        if node[0] == "query":
            return int(self.labels[node[1]])
        if node[0] == "queue":
            return int(self.queue_labels[node[1]])
        return int(self.labels[self.owner[node[1]]]) if self.positive[node[1]] else -1

    def positives_of(self, row: int) -> list[int]:
        return [c for c in range(len(self.owner)) if self.owner[c] == row and self.positive[c]]

    def masked(self, row: int, anchor: tuple[str, int], other: tuple[str, int], positives: list[int]) -> bool:
        """Whether a mask rules the candidate ``other`` of ``anchor`` out."""
        config = self.config
        if config.mask_known_positives:
            if other[0] == "queue":
                if self.queue_ids[other[1]] in self.known[row]:
                    return True
            elif other[0] == "document":
                if self.ids[other[1]] in self.known[row]:
                    return True
                if anchor[0] == "document" and self.ids[other[1]] == self.ids[anchor[1]]:
                    return True
            else:
                mine = [anchor[1]] if anchor[0] == "document" else self.positives_of(row)
                if any(self.ids[p] in self.known[other[1]] for p in mine):
                    return True
                if anchor[0] == "query" and self.query_ids[row] == self.query_ids[other[1]]:
                    return True
        if config.mask_same_label and self.labels[row] >= 0 and self.labels[row] == self.label(other):
            return True
        for mask, score in ((config.score_mask, self.score), (config.guide_mask, self.guided)):
            if mask is not None:
                best = max(score(("query", row), ("document", p)) for p in positives)
                if score(anchor, other) > limit(best, mask):
                    return True
        return False

    def candidates(self, row: int, direction: str, positive: int | None) -> list[float]:
        """Logits of the candidates of a query, or of one of its positives."""
        config = self.config
        side, _, other = direction.partition("_")
        anchor = ("query", row) if side == "query" else ("document", positive)
        positives = self.positives_of(row) if side == "query" else [positive]
        found = []
        for c in range(len(self.vectors[other])):
            node = (other, c)
            own = (c if other == "query" else self.owner[c]) == row
            explicit = own and other == "document" and not self.positive[c] and direction == "query_document"
            if own and not explicit:
                continue
            if not own and direction == "query_document" and not config.in_batch_negatives:
                continue
            if not own and other == "document" and not self.positive[c] and not config.shared_negatives:
                continue
            if self.masked(row, anchor, node, positives):  # type: ignore[arg-type]
                continue
            score = self.score(anchor, node)  # type: ignore[arg-type]
            logit = score / config.temperature
            if config.hardness and direction == "query_document":
                which = {"in_batch": not own, "explicit": own, "all": True}[config.hardness.on]
                logit += config.hardness.alpha * score * which
            found.append(logit)
        if direction == "query_document" and config.queue:
            for c, source in enumerate(self.queue_sources):
                if source == self.sources[row] and not self.masked(row, anchor, ("queue", c), positives):  # type: ignore[arg-type]
                    score = self.score(anchor, ("queue", c))  # type: ignore[arg-type]
                    hard = config.hardness.alpha if config.hardness and config.hardness.on != "explicit" else 0.0
                    found.append(score / config.temperature + hard * score)
        return found

    def softmax(self, positives: list[float], negatives: list[float]) -> float:
        config = self.config
        top = max([*positives, *negatives])
        p = sum(math.exp(x - top) for x in positives)
        n = sum(math.exp(x - top) for x in negatives)
        loss = plain = math.log1p(n / p)
        if config.label_smoothing:
            every = [*positives, *negatives]
            z = top + math.log(p + n)
            uniform = sum(z - x for x in every) / len(every)
            loss = (1 - config.label_smoothing) * plain + config.label_smoothing * uniform
        return loss * (n / (p + n)) ** config.focal.gamma if config.focal else loss

    def of(self, row: int, directions: tuple[str, ...]) -> float:
        """One softmax over some directions, for each positive or for all together."""
        positives = self.positives_of(row)
        logit = {p: self.score(("query", row), ("document", p)) / self.config.temperature for p in positives}
        shared = [x for d in directions if d.startswith("query") for x in self.candidates(row, d, None)]
        own = {
            p: [x for d in directions if d.startswith("document") for x in self.candidates(row, d, p)] for p in logit
        }
        together = self.config.several_positives == "log_sum"
        if together and not (directions == ("document_query",) and not self.config.joint):
            return self.softmax(list(logit.values()), [*shared, *(x for p in positives for x in own[p])])
        return sum(self.softmax([logit[p]], [*shared, *own[p]]) for p in positives) / len(positives)

    def loss(self, row: int) -> float:
        directions = self.config.all_directions
        if self.config.joint:
            return self.of(row, directions)
        return sum(self.of(row, (d,)) for d in directions) / len(directions)


def row_losses(config: InfoNCEConfig, batch: ContrastiveBatch) -> list[float]:
    """Each query's loss with its weights, without the regulariser."""
    width = batch.queries.shape[1]
    if config.matryoshka is None:
        parts = [(width, 1.0)]
    else:
        dimensions = config.matryoshka.dimensions
        parts = list(zip(dimensions, config.matryoshka.weights or (1.0,) * len(dimensions), strict=True))
    assert batch.sources is not None
    result = [0.0] * len(batch.queries)
    for prefix, counts in parts:
        loops = Loops(config, batch, prefix)
        for row in range(len(result)):
            result[row] += counts * loops.loss(row)
    for row in range(len(result)):
        result[row] *= config.source_weights.get(SOURCES[int(batch.sources[row])], 1.0)
        result[row] *= 1.0 if batch.weights is None else float(batch.weights[row])
    return result
